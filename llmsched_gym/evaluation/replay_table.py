"""The table of a replay: measured against simulated latencies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsched_gym.evaluation.replay import Replay
from llmsched_gym.report.console import new_table
from llmsched_gym.text import counted, number

if TYPE_CHECKING:
    from rich.table import Table


def replay_table(result: Replay) -> Table:
    """Measured against simulated latencies and their errors."""
    errors, episode, run = result.errors(), result.episode, result.measured
    failed = f", {counted(run.num_failed, 'failed one')} left out" if run.num_failed else ""
    sim = episode.sim
    limits = (
        counted(sim.max_num_seqs, "sequence"),
        f"{counted(result.token_budget, 'token')} a batch",
        counted(sim.total_blocks, "KV block"),
    )
    requests = f"{run.name}: {counted(len(run), 'request')}{failed}"
    title = f"{requests}\n{result.policy}, {episode.scenario.profile}\n{', '.join(limits)}"
    table = new_table("latency", "over requests", "measured", "simulated", "error (%)", title=title, text=2)
    for latency, (name, factor, digits) in {
        "ttft": ("TTFT (s)", 1.0, 3),
        "tpot": ("TPOT (ms)", 1e3, 2),
        "e2e": ("E2E (s)", 1.0, 3),
    }.items():
        pair, own = result.figures(latency), errors[latency]
        for figure, (measured_s, simulated_s) in pair.items():
            values = [number(factor * seconds, digits) for seconds in (measured_s, simulated_s)]
            table.add_row(name, figure, *values, _off(own[f"{figure}_error"]))
            name = ""
        if pair:
            table.add_row("", "mean absolute, per request", "", "", _off(own["mape"]).lstrip("+"))
    ends = [number(run.end_s, 2) for run in (result.measured, result.simulated)]
    table.add_row("end (s)", "last token", *ends, _off(errors["end_error"]))
    table.add_row("preemptions", "in all", "-", f"{sim.num_preemptions:,}", "")
    return table


def _off(error: float) -> str:
    """An error in percent, also where it is beyond measure."""
    percent = 100 * error
    return f"{percent:+.1f}" if abs(percent) < 1e6 else f"{percent:+.1e}"
