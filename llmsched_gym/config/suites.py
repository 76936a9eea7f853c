"""The named suites, and scenarios and environments made from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from llmsched_gym.config.scenario import MEASURED, ConfigError, EnvConfig, Scenario, check_names


@dataclass(frozen=True)
class Suite:
    """A named scenario and the rates that reports show it at."""

    scenario: Scenario
    what: str
    env_id: str
    report_qps: tuple[float, ...] = field(default=())


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
    ),
    "default": Suite(
        Scenario(),
        "sharegpt, rate drawn from 1.0-2.2 per episode, jitter 0.05, patience 60 s",
        "LLMSched-v0",
    ),
    "drift": Suite(
        Scenario(suite="drift", arrivals="switching", cost_scale=(0.8, 1.25)),
        "rate switches between 1.0 and 2.2 every 60-120 s, hidden cost scale from 0.8-1.25, jitter 0.05",
        "LLMSched-Drift-v0",
    ),
    "burst": Suite(
        Scenario(suite="burst", arrivals="gamma", burstiness=0.25),
        "Gamma arrivals of shape 0.25 (bursty), otherwise the default suite",
        "LLMSched-Burst-v0",
    ),
    "tenants": Suite(
        Scenario(suite="tenants", strict_share=(0.0, 0.5), ttft_class_scales=(0.5, 1.0, 3.0)),
        "share of strict users drawn from 0-50 %, three TTFT classes (0.5x, 1x, 3x)",
        "LLMSched-Tenants-v0",
    ),
    # sessions/s: 0.6 to 1.1 of the fluid capacity with the hit rate of an infinite cache, 0.94 and 0.205
    "chat": Suite(
        Scenario(
            suite="chat", workload="chat", prefix_caching=True, qps_range=(0.57, 1.04), warmup_s=600.0, horizon_s=1800.0
        ),
        "conversations with prefix caching, sessions drawn at 0.57-1.04/s, jitter 0.05, patience 60 s",
        "LLMSched-Chat-v0",
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
    ),
}


def scenario(suite: str = "default", **fields: Any) -> Scenario:
    """The scenario of a named suite with some fields replaced."""
    if suite not in SUITES:
        raise ConfigError(f"suite: expected one of {', '.join(SUITES)}, got {suite!r}")
    return SUITES[suite].scenario.replace(**_measured(fields))


def env_config(suite: str = "default", **fields: Any) -> EnvConfig:
    """The environment of a named suite with some fields replaced; raises :class:`ConfigError` naming a bad one."""
    check_names(EnvConfig, fields)
    return EnvConfig(**{**scenario(suite).to_dict(), **_measured(fields)})


def _measured(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that replace a suite's; those for the transformers backend leave out its simulated noise."""
    return {**MEASURED, **fields} if fields.get("backend") == "transformers" else fields
