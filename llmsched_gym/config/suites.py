"""The named suites, and scenarios and environments made from them."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from llmsched_gym.config.cluster import ClusterScenario, RouteConfig
from llmsched_gym.config.env import EnvConfig
from llmsched_gym.config.fields import ConfigError, check_names, plain
from llmsched_gym.config.scenario import MEASURED, MEASURING, Scenario
from llmsched_gym.config.suite import SUFFIX, Suite, read_suite

SUITES: dict[str, Suite] = {
    "paper": Suite(
        Scenario(
            suite="paper",
            jitter=0.0,
            patience_s=math.inf,
            num_requests=2000,
            warmup_s=0.0,
            drain_s=math.inf,
            arrivals_continue=False,
        ),
        "the experiment of arXiv 2508.01002: Poisson, finite run drained, no jitter, no patience, no warm-up cut",
        "LLMSched-Paper-v0",
        (1.0, 1.2, 1.4, 1.6, 1.8, 2.0),
        reward_threshold=1716.5,
    ),
    "default": Suite(
        Scenario(),
        "sharegpt, rate drawn from 1.0-2.2 per episode, jitter 0.05, patience 60 s",
        "LLMSched-v0",
        reward_threshold=399.4,
    ),
    "drift": Suite(
        Scenario(suite="drift", arrivals="switching", cost_scale=(0.8, 1.25)),
        "rate switches between 1.0 and 2.2 every 60-120 s, hidden cost scale from 0.8-1.25, jitter 0.05",
        "LLMSched-Drift-v0",
        reward_threshold=407.8,
    ),
    "burst": Suite(
        Scenario(suite="burst", arrivals="gamma", burstiness=0.25),
        "Gamma arrivals of shape 0.25 (bursty), otherwise the default suite",
        "LLMSched-Burst-v0",
        reward_threshold=370.3,
    ),
    "tenants": Suite(
        Scenario(suite="tenants", strict_share=(0.0, 0.5), ttft_class_scales=(0.5, 1.0, 3.0)),
        "share of strict users drawn from 0-50 %, three TTFT classes (0.5x, 1x, 3x)",
        "LLMSched-Tenants-v0",
        reward_threshold=328.5,
    ),
    # 0.57 to 1.05 of the fluid capacity, 1.235
    "tight": Suite(
        Scenario(suite="tight", profile="rtx4090-llama-3.1-8b-vllm", qps_range=(0.7, 1.3)),
        "vLLM on an RTX 4090, whose 2,587 KV blocks are full before its cores are, rate drawn from 0.7-1.3",
        "LLMSched-Tight-v0",
        reward_threshold=205.2,
    ),
    # sessions/s: 0.6 to 1.1 of the fluid capacity with the hit rate of an infinite cache, 0.94 and 0.205
    "chat": Suite(
        Scenario(
            suite="chat", workload="chat", prefix_caching=True, qps_range=(0.57, 1.04), warmup_s=600.0, horizon_s=1800.0
        ),
        "conversations with prefix caching, sessions drawn at 0.57-1.04/s, jitter 0.05, patience 60 s",
        "LLMSched-Chat-v0",
        reward_threshold=2260.5,
    ),
    "agents": Suite(
        Scenario(
            suite="agents",
            workload="agents",
            profile="h100-mistral-7b",
            prefix_caching=True,
            max_model_len=32768,
            max_num_seqs=256,
            qps_range=(0.12, 0.23),
            warmup_s=600.0,
            horizon_s=1800.0,
        ),
        "agents that call tools, contexts to 32,768 tokens on an H100, sessions drawn at 0.12-0.23/s, else as chat",
        "LLMSched-Agents-v0",
        reward_threshold=2426.8,
    ),
}


_REPLICA: dict[str, Any] = {
    "prefix_caching": True,
    "max_model_len": 32768,
    "max_num_seqs": 256,
    "warmup_s": 600.0,
    "horizon_s": 1800.0,
}

# 0.6 to 1.1 of the fluid capacity: 6.87 and 11.4 sessions/s with the hit rate of an infinite cache, 20.0 requests/s
CLUSTER_SUITES: dict[str, Suite] = {
    "cluster": Suite(
        ClusterScenario(
            suite="cluster",
            workload="mixed",
            profile="h100-mistral-7b",
            num_replicas=4,
            qps_range=(4.1, 7.6),
            **_REPLICA,
        ),
        "four H100 with prefix caching, conversations and agents, sessions drawn at 4.1-7.6/s",
        "LLMRoute-v0",
    ),
    "hetero": Suite(
        ClusterScenario(
            suite="hetero",
            workload="chat",
            profile="h100-mistral-7b",
            num_replicas=8,
            replica_profiles=("h100-mistral-7b",) * 2 + ("a100-mistral-7b",) * 2 + ("rtx6000ada-mistral-7b",) * 4,
            qps_range=(6.8, 12.5),
            **_REPLICA,
        ),
        "2 H100, 2 A100 and 4 RTX 6000 Ada with prefix caching, conversations, sessions drawn at 6.8-12.5/s",
        "LLMRoute-Hetero-v0",
    ),
    "disagg": Suite(
        ClusterScenario(
            suite="disagg",
            profile="h100-mistral-7b",
            num_replicas=4,
            replica_profiles=("h100-mistral-7b", "a100-mistral-7b") * 2,
            roles=("prefill", "prefill", "decode", "decode"),
            arrivals="gamma",
            burstiness=0.25,
            qps_range=(12.0, 22.0),
        ),
        "an H100 and an A100 that prefill, two that decode, bursts of sharegpt's requests drawn at 12-22/s",
        "LLMRoute-Disagg-v0",
    ),
}
"""Suites with several replicas: the environment of an agent that routes."""


def find_suite(suite: str | os.PathLike[str], among: dict[str, Suite] | None = None) -> Suite:
    """The suite of a name, of an environment's id, or in a TOML file; ConfigError for none.

    Of `among`, or of the same kind (None: of any).
    """
    known = SUITES | CLUSTER_SUITES
    wanted, name = known if among is None else among, plain(suite)
    expected = f"expected one of {', '.join(wanted)}, or a {SUFFIX} file, got {name!r}"
    if not isinstance(name, str):
        raise ConfigError(f"suite: {expected}")
    name = next((key for key, entry in known.items() if entry.env_id == name), name)
    if name not in known and Path(name).suffix != SUFFIX:
        raise ConfigError(f"suite: {expected}")
    found = known[name] if name in known else read_suite(name, known)
    kinds = {isinstance(entry.scenario, ClusterScenario) for entry in wanted.values()}
    if isinstance(found.scenario, ClusterScenario) not in kinds:
        kind = "several replicas" if kinds == {True} else "one engine"
        raise ConfigError(f"suite: {expected}, which is not of {kind}")
    return found


def scenario(suite: str = "default", **fields: Any) -> Scenario:
    """The scenario of a suite (a name or a TOML file) with some fields replaced; clusters' are ClusterScenarios."""
    return find_suite(suite).scenario.replace(**_measured(fields))


def env_config(suite: str = "default", **fields: Any) -> EnvConfig:
    """The environment of a suite with some fields replaced; raises :class:`ConfigError` naming a bad one."""
    check_names(EnvConfig, fields)
    return EnvConfig(**{**find_suite(suite, SUITES).scenario.to_dict(), **_measured(fields)})


def route_config(suite: str = "cluster", **fields: Any) -> RouteConfig:
    """The routing environment of a suite with some fields replaced; ConfigError naming a bad one."""
    check_names(RouteConfig, fields)
    return RouteConfig(**{**find_suite(suite, CLUSTER_SUITES).scenario.to_dict(), **fields})


def _measured(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that replace a suite's; those for a backend that measures leave out the simulated noise."""
    return {**MEASURED, **fields} if fields.get("backend") in MEASURING else fields
