"""The table of a replay: measured against simulated latencies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsched_gym.evaluation.replay import Replay
from llmsched_gym.report.console import new_table
from llmsched_gym.text import number

if TYPE_CHECKING:
    from rich.table import Table


def replay_table(result: Replay) -> Table:
    """Measured against simulated latencies and their errors."""
    errors, episode, run = result.errors(), result.episode, result.measured
    failed = f", {run.num_failed:,} failed ones left out" if run.num_failed else ""
    sim = episode.sim
    title = (
        f"{run.name}: {len(run):,} requests{failed}\n"
        f"{result.policy}, {episode.scenario.profile}\n"
        f"{sim.max_num_seqs:,} sequences, {result.token_budget:,} tokens a batch, {sim.total_blocks:,} KV blocks"
    )
    table = new_table("latency", "over requests", "measured", "simulated", "error (%)", title=title, text=2)
    for latency, (name, factor, digits) in {
        "ttft": ("TTFT (s)", 1.0, 3),
        "tpot": ("TPOT (ms)", 1e3, 2),
        "e2e": ("E2E (s)", 1.0, 3),
    }.items():
        pair, own = result.figures(latency), errors[latency]
        for figure, (measured_s, simulated_s) in pair.items():
            values = [number(factor * seconds, digits) for seconds in (measured_s, simulated_s)]
            table.add_row(name, figure, *values, f"{100 * own[f'{figure}_error']:+.1f}")
            name = ""
        if pair:
            table.add_row("", "mean absolute, per request", "", "", number(100 * own["mape"], 1))
    ends = [number(run.end_s, 2) for run in (result.measured, result.simulated)]
    table.add_row("end (s)", "last token", *ends, f"{100 * errors['end_error']:+.1f}")
    table.add_row("preemptions", "in all", "-", f"{sim.num_preemptions:,}", "")
    return table
