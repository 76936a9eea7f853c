"""Static figures over loads, and of capacities, for the page of the paper's evaluation: rows to a matplotlib figure.

Rows are tidy ones (:func:`llmsched_gym.report.statistics.tidy`). Every figure stands alone, legend and units included,
and a policy has the same colour, marker and dash in all of them. Nothing here touches pyplot's state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from llmsched_gym.paper import constants
from llmsched_gym.report import draw, statistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FAR_BELOW = -60.0
"""A reduction (%) below which a policy is off the scale."""
FLUID = (0, (7, 2, 1, 2))
"""Dash of a line at the fluid capacity."""


@draw.styled
def plot_attainment(rows: pd.DataFrame, slo_class: str | None = None, *, fluid_qps: float | None = None) -> Figure:
    """SLO attainment against load, of all requests or of one class, with the fluid capacity."""
    column = f"slo_attainment_{slo_class}" if slo_class else "slo_attainment"
    whose = f", {slo_class} users" if slo_class else ""
    title, label = f"SLO attainment{whose}", "Requests within all SLOs (%)"
    return _against_load(rows, column, title, label, percent=True, fluid_qps=fluid_qps)


@draw.styled
def plot_ttft(
    rows: pd.DataFrame, percentile: int = 50, slo_s: float = 0.5, *, fluid_qps: float | None = None
) -> Figure:
    """A percentile of TTFT against load, on a log scale, with the SLO of an empty prompt and the fluid capacity."""
    name = "Median" if percentile == 50 else f"p{percentile}"
    title, label = f"{name} time to first token", f"{name} TTFT (s, log scale)"
    line = (slo_s, f"TTFT {slo_s:g} s")
    return _against_load(rows, f"ttft_p{percentile}_s", title, label, log=True, line=line, fluid_qps=fluid_qps)


@draw.styled
def plot_itl(rows: pd.DataFrame, slo_class: str = "strict", slo_s: float = 0.1) -> Figure:
    """99th percentile of one class's gaps between tokens against load, with the class's TBT SLO."""
    title = f"p99 inter-token latency, {slo_class} users"
    line = (slo_s, f"TBT SLO {slo_s:g} s")
    return _against_load(rows, f"itl_p99_s_{slo_class}", title, "p99 ITL (s, log scale)", log=True, line=line)


def _against_load(
    rows: pd.DataFrame,
    column: str,
    title: str,
    label: str,
    *,
    percent: bool = False,
    log: bool = False,
    line: tuple[float, str] | None = None,
    dash: Any = (0, (4, 3)),
    fluid_qps: float | None = None,
) -> Figure:
    """A column against load, or its values at the only load; `line` is a level of the column, `fluid_qps` a load."""
    if column not in rows:
        raise draw.NothingToPlot(f"{column}: no such column")
    means = statistics.over_seeds(statistics.binned_loads(rows), column)
    means[["value", "low", "high"]] *= 100 if percent else 1
    finite = means[np.isfinite(means["value"]) & ((means["value"] > 0) | (not log))]
    if finite.empty:
        raise draw.NothingToPlot(f"{column}: no finite value")
    policies = statistics.policies_of(rows)
    single = means["load"].nunique() == 1
    if single:
        figure, ax = draw.panel(title, 1.35 + 0.3 * len(policies))
        draw.dots(ax, means, policies)
        ax.set_xlabel(label)
    else:
        figure, ax = draw.panel(title)
        draw.lines(ax, means, policies)
        ax.set(xlabel=f"Load ({statistics.load_unit(rows)})", ylabel=label)
    axis = ax.xaxis if single else ax.yaxis
    if log:
        ends = finite[["low", "high"]].to_numpy().ravel() if single else []
        draw.log_scale(axis, [*finite["value"], *ends, *(line or ())[:1]])
    elif percent:
        ax.set(**{f"{axis.axis_name}lim": draw.PERCENT})
    elif finite["value"].min() >= 0:
        ax.set(**{f"{axis.axis_name}lim": (0, 1.06 * line[0] if line and line[0] > finite["value"].max() else None)})
    guides = [draw.guide(ax, *line, vertical=single, dash=dash)] if line else []
    if fluid_qps and not single:
        label = _fluid_label(fluid_qps, statistics.load_unit(rows))
        guides.append(draw.guide(ax, fluid_qps, label, vertical=True, dash=FLUID))
    draw.legend(figure, [] if single else policies, guides)
    return figure


def _fluid_label(qps: float, unit: str) -> str:
    return f"fluid capacity, {qps:.2f} {unit}"


@draw.styled
def plot_ttft_reduction(
    reduction: pd.DataFrame,
    baseline: str = statistics.BASELINE,
    *,
    paper: bool = False,
    unit: str = "requests/s",
) -> Figure:
    """Reduction of the median TTFT against `baseline` over load in `unit`.

    With `paper` its claim and the reference figures.
    """
    means = reduction.assign(**{c: 100 * reduction[c] for c in ("value", "low", "high")})
    finite = means[np.isfinite(means["value"])]
    if finite.empty:
        raise draw.NothingToPlot("no finite reduction")
    policies = statistics.policies_of(means)
    title, label = f"Median TTFT reduction against {baseline}", "Reduction of median TTFT (%)"
    low = max(FAR_BELOW, min(0.0, float(finite[["value", "low"]].min().min())) * 1.1)
    high = min(100.0, max(60.0, float(finite[["value", "high"]].max().max()) + 6))
    if means["load"].nunique() == 1:
        figure, ax = draw.panel(title, 1.35 + 0.3 * len(policies))
        draw.dots(ax, means, policies, floor=low)
        ax.set_xlabel(label)
        ax.set_xlim(low, high)
        ax.axvline(0, color=draw.FAINT, linewidth=1)
        return figure
    figure, ax = draw.panel(title)
    draw.lines(ax, means, policies, floor=low)
    ax.axhline(0, color=draw.FAINT, linewidth=1)
    extra = []
    if paper:
        claim = 100 * constants.PAPER_TTFT_REDUCTION
        loads, values = zip(*constants.REFERENCE_TTFT_REDUCTION.items(), strict=True)
        marks: dict[str, Any] = dict(marker="D", linestyle="none", markerfacecolor="none", color=draw.INK, markersize=7)
        ax.plot(loads, 100 * np.array(values), zorder=5, **marks)
        extra = [
            (draw.mark(**marks), "reference figures for slai"),
            draw.guide(ax, claim, f"the paper's claim ({claim:.0f} %)"),
        ]
    ax.set_ylim(low, high)
    ax.set_xlabel(f"Load ({unit})")
    ax.set_ylabel(label)
    draw.legend(figure, policies, extra)
    return figure


@draw.styled
def plot_capacity(
    capacity: pd.DataFrame,
    *,
    reference: Mapping[str, float] | None = None,
    fluid_qps: float | None = None,
    unit: str = "requests/s",
) -> Figure:
    """Capacity by policy with intervals, for one criterion; dotted: reference figures, dash-dotted: the fluid bound."""
    own = capacity[np.isfinite(capacity["capacity_qps"].astype(float))].reset_index(drop=True)
    if own.empty:
        raise draw.NothingToPlot("no capacity")
    policies = [str(p) for p in own["policy"]]
    shown = {p: (reference or {})[p] for p in policies if p in (reference or {})}
    figure, ax = draw.panel(f"Capacity ({own['criterion'].iloc[0]})", 1.3 + 0.34 * len(own))
    styles = draw.policy_styles(policies)
    right = float(max([*own["capacity_qps"], *own["ci_high"].dropna(), *shown.values(), fluid_qps or 0.0]))
    for y, bar in own.iterrows():
        ax.barh(y, bar["capacity_qps"], height=0.62, color=styles[bar["policy"]].colour, alpha=0.85, linewidth=0)
        if np.isfinite(bar["ci_low"]) and np.isfinite(bar["ci_high"]):
            ax.plot([bar["ci_low"], bar["ci_high"]], [y, y], color=draw.INK, linewidth=1.6, marker="|", markersize=8)
        ax.text(right * 1.04, y, f"{bar['capacity_qps']:.2f}", va="center", fontweight="bold")
    dotted: dict[str, Any] = dict(color=draw.INK, linewidth=1.6, linestyle=(0, (1.5, 1)))
    for policy, qps in shown.items():
        y = policies.index(policy)
        ax.plot([qps, qps], [y - 0.4, y + 0.4], **dotted)
    entries = []
    if own["ci_low"].notna().any():
        entries.append((draw.mark(color=draw.INK, marker="|", linewidth=1.6), "95 % interval"))
    if shown:
        entries.append((draw.mark(**dotted), "reference figure"))
    if fluid_qps:
        entries.append(draw.guide(ax, fluid_qps, _fluid_label(fluid_qps, unit), vertical=True, dash=FLUID))
    draw.legend(figure, [], entries)
    ax.set_yticks(range(len(own)), [draw.name_in_figure(p) for p in policies])
    ax.tick_params(axis="y", length=0, labelcolor=draw.INK)
    ax.grid(False, axis="y")
    ax.set_ylim(len(own) - 0.4, -0.6)
    ax.set_xlim(0, right * 1.16)
    ax.set_xlabel(f"Capacity ({unit})")
    return figure
