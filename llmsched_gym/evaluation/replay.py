"""A measured serving run against the simulator, request by request: the same requests at the same times."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llmsched_gym.config import ConfigError, Scenario, blocks_needed, scenario
from llmsched_gym.cost import load_profile
from llmsched_gym.evaluation.run import Episode, scenario_for, simulate
from llmsched_gym.files import claim_folder, make_folder, replace_file, write_text
from llmsched_gym.registry import make_scheduler
from llmsched_gym.scheduler import SGLANG_CHUNK, VLLM_TOKEN_BUDGET, Compiled
from llmsched_gym.workload import RequestTable
from llmsched_gym.workload.served_runs import ServedRun

LATENCIES = {"ttft": "ttft_s", "tpot": "tpot_s", "e2e": "e2e_latency_s"}
"""Of a request: time to first token, mean time per token after it, time to the last token; as arrays of a run."""
PERCENTILES = (50, 90, 99)
FIGURES = ("mean", *(f"p{q}" for q in PERCENTILES))


@dataclass(frozen=True, eq=False)
class Replay:
    """A run as it was measured and as it was simulated, request for request."""

    measured: ServedRun
    simulated: ServedRun
    policy: str
    token_budget: int  # of a batch: the policy's, or the engine's limit where that is smaller
    episode: Episode

    def seconds(self, latency: str) -> tuple[np.ndarray, np.ndarray]:
        """One of LATENCIES of each request that has it, measured and simulated; shapes (n,)."""
        pair = [getattr(run, LATENCIES[latency]) for run in (self.measured, self.simulated)]
        known = ~np.isnan(pair[0])
        return pair[0][known], pair[1][known]

    def figures(self, latency: str) -> dict[str, tuple[float, float]]:
        """FIGURES over requests, measured and simulated, seconds; empty where no request has the latency."""
        measured, simulated = self.seconds(latency)
        if not len(measured):
            return {}
        found = {"mean": (float(measured.mean()), float(simulated.mean()))}
        for q in PERCENTILES:
            found[f"p{q}"] = float(np.percentile(measured, q)), float(np.percentile(simulated, q))
        return found

    def errors(self) -> dict[str, Any]:
        """Errors as fractions, simulated / measured - 1; None where no request has the latency.

        ``mean_error`` and ``p50_error`` and so on are errors of the mean and of percentiles over requests, ``mape`` is
        the mean over requests of each one's absolute error, ``end_error`` is of the time from the first arrival to the
        last token of all.
        """
        found: dict[str, Any] = {}
        for latency in LATENCIES:
            figures = self.figures(latency)
            found[latency] = dict.fromkeys([f"{name}_error" for name in FIGURES] + ["mape"])
            for name, (measured_s, simulated_s) in figures.items():
                found[latency][f"{name}_error"] = simulated_s / measured_s - 1.0
            if figures:
                measured, simulated = self.seconds(latency)
                found[latency]["mape"] = float(np.abs(simulated / measured - 1.0).mean())
        return found | {"end_error": self.simulated.end_s / self.measured.end_s - 1.0}

    def frame(self) -> pd.DataFrame:
        """A line per request: where it is in the file, its lengths, and measured beside simulated latencies."""
        run = self.measured
        columns: dict[str, Any] = {
            "row": run.row,
            "prompt_tokens": run.prompt_tokens,
            "output_tokens": run.output_tokens,
            "arrival_s": run.arrival_s,
        }
        for name in ("queue_time_s", *LATENCIES.values()):
            columns[f"measured_{name}"] = getattr(run, name)
            columns[f"simulated_{name}"] = getattr(self.simulated, name)
        return pd.DataFrame(columns | {"simulated_preemptions": self.episode.requests["num_preemptions"]})


def replay(
    run: ServedRun,
    policy: str,
    profile: str,
    *,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
    num_kv_blocks: int | None = None,
) -> Replay:
    """Simulate the requests of `run`, which arrive as they did and are as long as they were.

    Nobody is turned away or leaves, and batches take what the profile says, without noise.

    Args:
        run: what was measured.
        policy: name of a scheduler. It is told no SLOs: all users are relaxed ones of the default suite.
        profile: cost profile, a name or a JSON file.
        max_num_seqs, num_kv_blocks: as the run had them (usable blocks of 16 tokens); None: the profile's.
        max_num_batched_tokens: largest number of tokens in a batch, which is vLLM V1's token budget too; None: its
            budget on the profile's device. A scheduler with a budget of its own keeps that.

    Raises:
        ConfigError: a limit that is none, or fewer blocks than a request of the run needs.
        PolicyError: a policy that cannot be made.
    """
    device = load_profile(profile).device
    scheduler, limit = make_scheduler(policy), max_num_batched_tokens
    if limit is None:
        limit = max(Scenario.max_num_batched_tokens, device.vllm_token_budget)
    budget = limit
    if isinstance(scheduler, Compiled):
        budget = int(scheduler.knobs["token_budget"])
        if budget == VLLM_TOKEN_BUDGET:
            budget = max_num_batched_tokens or device.vllm_token_budget
        elif budget == SGLANG_CHUNK:
            budget = device.sglang_chunk_tokens
        if budget != scheduler.knobs["token_budget"]:
            scheduler = replace(scheduler, settings={**scheduler.settings, "token_budget": budget})
    total_tokens = run.prompt_tokens.astype(np.int64) + run.output_tokens
    world = scenario(
        "paper",
        profile=profile,
        num_requests=len(run),
        max_model_len=int(total_tokens.max()),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=limit,
        num_kv_blocks=num_kv_blocks,
    )
    world = scenario_for(world, scheduler)
    if world.admission != "prompt":
        world = world.replace(watermark=0.0)  # admission holds nothing back there, so rejection is not to either
    _check_blocks(world, run, total_tokens)
    hints = run.output_tokens.astype(float) if getattr(scheduler, "clairvoyant", False) else np.full(len(run), np.nan)
    episode = simulate(world, scheduler, 0, table=_table(world, run, hints))
    simulated = replace(
        run,
        scheduled_s=episode.requests["first_scheduled_s"].copy(),
        first_token_s=episode.requests["first_token_s"].copy(),
        last_token_s=episode.requests["last_token_s"].copy(),
    )
    return Replay(run, simulated, policy, min(budget, limit), episode)


def _check_blocks(world: Scenario, run: ServedRun, total_tokens: np.ndarray) -> None:
    blocks = world.blocks(load_profile(world.profile).num_kv_blocks)
    r = int(np.argmax(total_tokens))
    needed = blocks_needed(int(total_tokens[r]), world.block_size) + int(world.watermark * blocks)
    if needed > blocks:
        what = f"expected at least {needed:,}, for the {total_tokens[r]:,} tokens of {run.where(r)}"
        raise ConfigError(f"num_kv_blocks: {what}, got {blocks:,}")


def _table(world: Scenario, run: ServedRun, length_hint: np.ndarray) -> RequestTable:
    span_s = float(run.arrival_s[-1])
    return RequestTable.of(
        run.arrival_s,
        run.prompt_tokens,
        run.output_tokens,
        ttft_slo_s=world.ttft_slo_s + world.ttft_slo_per_token_s * run.prompt_tokens,
        tbt_slo_s=world.relaxed_tbt_slo_s,
        length_hint=length_hint,
        qps=(len(run) - 1) / span_s if span_s > 0.0 else np.nan,
        arrivals="trace",
    )


def above(errors: dict[str, Any], max_error: float) -> list[str]:
    """Which of the mean errors of TTFT, TPOT and E2E are larger than `max_error` in absolute value, in words."""
    means = {latency: errors[latency]["mean_error"] for latency in LATENCIES}
    return [
        f"the mean of {latency} is off by {100 * error:+.1f} %, more than {100 * max_error:g} %"
        for latency, error in means.items()
        if error is not None and abs(error) > max_error
    ]


FIRST_COLUMNS = "row,prompt_tokens,output_tokens,arrival_s,"
"""With which the file of a replay begins."""


def claim_replay(out: str | Path) -> None:
    """One line of :class:`ConfigError` for a folder that holds something else than a replay."""

    def is_own(path: Path) -> bool:
        with path.open(encoding="utf-8") as file:
            return file.readline().startswith(FIRST_COLUMNS)

    claim_folder(Path(out), "replay of llmsched", {"requests.csv": is_own})


def write(result: Replay, out: str | Path) -> None:
    """Write ``requests.csv`` and ``replay.png`` into the folder `out`, each as a whole or not at all."""
    from llmsched_gym.evaluation.replay_plot import plot_replay

    folder = Path(out)
    claim_replay(folder)
    figure = plot_replay(result)
    make_folder(folder)
    try:
        write_text(folder / "requests.csv", result.frame().to_csv(index=False, lineterminator="\n"))
        replace_file(
            folder / "replay.png",
            lambda partial: figure.savefig(partial, format="png", dpi=120, metadata={"Software": None}),
        )
    except OSError as error:
        raise ConfigError(f"out: cannot write to {folder}: {error.strerror or error}") from None
