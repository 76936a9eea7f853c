"""A replay in one figure: each request's latencies, simulated against measured."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from llmsched_gym.evaluation.replay import Replay
from llmsched_gym.report import draw
from llmsched_gym.text import counted

PANELS = {
    "ttft": ("Time to first token", "TTFT", "s", 1.0),
    "tpot": ("Mean time per output token", "TPOT", "ms", 1e3),
    "e2e": ("Time to the last token", "E2E latency", "s", 1.0),
}
WITHIN = 0.1
"""Relative error of the band around the line of equality."""


@draw.styled
def plot_replay(result: Replay) -> Figure:
    """A dot per request on log scales, with the line of equality, a band around it, and the means."""
    figure = Figure(figsize=(12.6, 4.9), layout="constrained")
    errors = result.errors()
    requests = counted(len(result.measured), "request")
    title = f"{draw.short(result.measured.name)}: {requests}, {draw.short(result.policy)}"
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    for ax, (latency, (what, short, unit, factor)) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
        measured, simulated = (factor * seconds for seconds in result.seconds(latency))
        ax.set(
            title=what, xlabel=f"Measured {short} ({unit}, log scale)", ylabel=f"Simulated {short} ({unit}, log scale)"
        )
        if not len(measured):
            ax.text(0.5, 0.5, "no request has one", ha="center", va="center", transform=ax.transAxes)
            continue
        both = np.concatenate([measured, simulated])
        for axis in (ax.xaxis, ax.yaxis):
            draw.log_scale(axis, both)
        ends = np.array(ax.get_xlim())
        band: dict[str, Any] = dict(color=draw.GRID, linewidth=0, zorder=1, label=f"within {100 * WITHIN:.0f} %")
        ax.fill_between(ends, (1 - WITHIN) * ends, (1 + WITHIN) * ends, **band)
        ax.plot(ends, ends, color=draw.INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=2, label="equal")
        ax.plot(
            measured,
            simulated,
            "o",
            color="#0072b2",
            markersize=3.2,
            alpha=0.45 if len(measured) > 100 else 0.9,
            zorder=3,
            markeredgewidth=0,
        )
        label = f"mean ({100 * errors[latency]['mean_error']:+.1f} %)"
        ax.plot([measured.mean()], [simulated.mean()], "D", color="#d55e00", markersize=7, zorder=4, label=label)
        ax.set_aspect("equal")
        ax.legend(loc="upper left")
    return figure
