"""The default world at another scale: shorter requests, smaller budgets, SLOs in step with the device's speed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmsched_gym.config import BLOCK_SIZE, ConfigError, Scenario, scenario
from llmsched_gym.cost import Profile, load_profile
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.workload.lengths import DATA_DIR, length_workloads

REFERENCE_DECODES = 16
"""Decodes of the batch whose time sets the SLOs; prompt tokens fill it up to the token budget."""
REFERENCE_BUDGET = 512
PROBE_REQUESTS = 200
PROBE_POLICY = "sarathi"


@dataclass(frozen=True)
class SmallWorld:
    """A scenario at a scale, and what belongs to it."""

    scenario: Scenario
    token_budget: int  # of the policies that have one
    time_unit: float  # this world's seconds per second of the default one: the SLOs' scale
    saturation_qps: float  # requests per second that sarathi finishes in the simulator when all are there

    def policy(self, name: str) -> str:
        """A policy with this world's token budget, unless it sets its own parameters or has no budget."""
        has_budget = name.split("[")[0] in ("sarathi", "sarathi-spf", "vllm-v1") or name.startswith("slai")
        return name if "[" in name or not has_budget else f"{name}[budget={self.token_budget}]"


def limits(scale: float) -> dict[str, int]:
    """Engine limits of the default scenario at `scale`; batches stay large enough to be worth a name."""
    world = Scenario()
    seqs = load_profile(world.profile).device.max_num_seqs
    return {
        "max_model_len": _blocks(world.max_model_len * scale),
        "max_num_seqs": min(seqs, 64) if scale < 1 else seqs,
        "max_num_batched_tokens": _blocks(world.max_num_batched_tokens * scale),
    }


def token_budget(scale: float) -> int:
    return REFERENCE_BUDGET if scale >= 1 else max(64, _blocks(REFERENCE_BUDGET * scale))


def make_world(
    profile: Profile,
    scale: float,
    folder: Path,
    num_requests: int,
    num_kv_blocks: int,
    block_size: int = BLOCK_SIZE,
) -> SmallWorld:
    """The default scenario with lengths times `scale`, as finite runs on the device that `profile` describes.

    The scaled lengths are written to `folder`. SLOs keep their size in batch times: they are the default's times the
    ratio of a full batch's time here and on the default profile.
    """
    default, budget = Scenario(), token_budget(scale)
    mean_context = _statistics()["prompt_tokens"]["mean"]
    here = _full_batch_s(profile, budget, mean_context * scale)
    there = _full_batch_s(load_profile(default.profile), REFERENCE_BUDGET, mean_context)
    unit = here / there
    per_token_s = default.ttft_slo_per_token_s * unit * REFERENCE_BUDGET / budget
    world = scenario(
        "default",
        workload=default.workload if scale == 1 else str(scaled_workload(default.workload, scale, folder)),
        arrivals_continue=False,
        warmup_s=0.0,
        num_requests=num_requests,
        jitter=0.0,
        strict_share=0.25,  # few requests run: with 5 % hardly any would be strict
        strict_tbt_slo_s=default.strict_tbt_slo_s * unit,
        relaxed_tbt_slo_s=default.relaxed_tbt_slo_s * unit,
        ttft_slo_s=default.ttft_slo_s * unit,
        ttft_slo_per_token_s=per_token_s,
        patience_s=default.patience_s * unit,
        drain_s=default.drain_s * unit,
        idle_step_s=default.idle_step_s * unit,
        num_kv_blocks=num_kv_blocks,
        block_size=block_size,
        **limits(scale),
    )
    small = SmallWorld(world, budget, unit, 0.0)
    return SmallWorld(world, budget, unit, _saturation_qps(small, profile))


def scaled_workload(name: str, scale: float, folder: Path) -> Path:
    """Write a shipped length distribution with all lengths times `scale`; returns the file."""
    if name not in length_workloads() or not 0.0 < scale <= 1.0:
        raise ConfigError(
            f"scale: expected a number > 0 and <= 1 of a workload in {', '.join(length_workloads())}, got {scale:g}"
        )
    data = json.loads((DATA_DIR / f"{name}.json").read_text(encoding="utf-8"))
    data["name"] = f"{name} x {scale:g}"
    data["max_total_tokens"] = int(data["max_total_tokens"] * scale)
    for part in ("prompt", "output"):
        tokens = np.maximum(np.asarray(data[part]["tokens"], float) * scale, 1.0)
        data[part]["tokens"] = np.minimum(tokens, data["max_total_tokens"] - 1).tolist()
    path = folder / f"{name}-scaled.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def _saturation_qps(small: SmallWorld, profile: Profile) -> float:
    world = small.scenario.replace(qps=1e6, num_requests=PROBE_REQUESTS, patience_s=float("inf"), drain_s=float("inf"))
    episode = simulate(world, small.policy(PROBE_POLICY), 0, profile=profile)
    return float(episode.sim.num_finished / episode.sim.clock_s)


def _full_batch_s(profile: Profile, budget: int, context: float) -> float:
    decodes = min(REFERENCE_DECODES, budget // 2)
    return profile.predict_s([(0, budget - decodes)], [max(int(context), 1)] * decodes)


def _statistics() -> dict[str, dict[str, float]]:
    statistics: dict[str, dict[str, float]] = json.loads((DATA_DIR / f"{Scenario().workload}.json").read_text())[
        "statistics"
    ]
    return statistics


def _blocks(tokens: float) -> int:
    """The nearest whole number of blocks, in tokens."""
    return max(round(tokens / BLOCK_SIZE), 1) * BLOCK_SIZE
