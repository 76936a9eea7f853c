"""Figures of a report: pure functions from rows, requests, gap distributions or steps to a matplotlib figure.

Rows are tidy ones (:func:`llmsched_gym.evaluation.tables.tidy`). Every figure stands alone, legend and units included,
and a policy has the same colour, marker and dash in all of them. Nothing here touches pyplot's state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from llmsched_gym.evaluation import tables

INK, FAINT, GRID = "#1c2733", "#68737f", "#dfe4ea"
PREFILL, DECODE = "#e69f00", "#0072b2"
WIDTH = 5.8  # inches, of a single panel
RC = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.facecolor": "none",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.7,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "legend.fontsize": 8.8,
    "figure.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "llmsched",
}


class NothingToPlot(ValueError):
    """There is no value that the figure could show."""


class Style(NamedTuple):
    """How a policy is drawn."""

    colour: str
    marker: str
    dash: Any


# Families share a hue (Okabe and Ito's, Tol's), members differ in lightness, marker and dash.
STYLES = {
    "sarathi": Style("#0072b2", "o", "-"),
    "sarathi-spf": Style("#56b4e9", "s", (0, (5, 1.5))),
    "slai": Style("#d55e00", "D", "-"),
    "slai-spf-fixed": Style("#e69f00", "^", (0, (5, 1.5))),
    "slai-fcfs-fixed": Style("#b39b00", "v", (0, (1.5, 1.2))),
    "slai-priority": Style("#cc79a7", "P", (0, (4, 1.2, 1, 1.2))),
    "rad": Style("#117733", "X", "-"),
    "rad-512": Style("#44aa99", "<", (0, (5, 1.5))),
    "vllm-v0": Style("#882255", ">", "-"),
    "vllm-v1": Style("#aa4499", "h", (0, (5, 1.5))),
    "orca": Style("#6b4c2a", "p", "-"),
    "faster-transformer": Style("#a08060", "*", (0, (5, 1.5))),
    "edf": Style("#4d5966", "d", (0, (1.5, 1.2))),
    "srpt-capped": Style("#332288", "8", "-"),
    "feasible-first": Style("#6f63c4", "s", "-"),
    "random": Style("#95a0ab", "x", (0, (1.5, 1.2))),
    "learned": Style("#c4003c", "*", "-"),
}
_SPARE = ("feasible-first", "rad", "slai-priority", "orca", "rad-512", "vllm-v0", "faster-transformer", "srpt-capped")
_SPARE += ("slai-fcfs-fixed", "vllm-v1", "sarathi-spf", "edf", "slai-spf-fixed", "learned", "sarathi", "slai", "random")


def policy_styles(policies: Sequence[str]) -> dict[str, Style]:
    """The style of each policy: registered names have their own, others get what is left, then other markers."""
    spare = [STYLES[name] for name in _SPARE if name not in policies]
    others = [p for p in policies if p not in STYLES]
    again = [Style(s.colour, marker, "-") for marker in "vo^sDPX<>" for s in STYLES.values()]
    given = dict(zip(others, [*spare, *again], strict=False))
    return {p: STYLES.get(p) or given[p] for p in policies}


def styled(function: Any) -> Any:
    """Draw with our settings, whatever the caller's are."""
    return rc_context(RC)(function)


# --- Against load ---------------------------------------------------------------------------------------------------


@styled
def plot_attainment(rows: pd.DataFrame, slo_class: str | None = None) -> Figure:
    """SLO attainment against load, of all requests or of one class."""
    column = f"slo_attainment_{slo_class}" if slo_class else "slo_attainment"
    whose = f", {slo_class} users" if slo_class else ""
    return _against_load(rows, column, f"SLO attainment{whose}", "Requests within all SLOs (%)", scale=100, top=100)


@styled
def plot_goodput(rows: pd.DataFrame) -> Figure:
    """Requests within all SLOs per second against load."""
    return _against_load(rows, "request_goodput", "Goodput", "Requests within all SLOs (requests/s)")


@styled
def plot_utility(rows: pd.DataFrame) -> Figure:
    """Mean utility against load: attained less a share for lateness."""
    return _against_load(rows, "mean_utility", "Mean utility", "Mean utility per request")


@styled
def plot_ttft(rows: pd.DataFrame, percentile: int = 50, slo_s: float = 0.5) -> Figure:
    """A percentile of TTFT against load, on a log scale, with the TTFT SLO of an empty prompt."""
    name = "Median" if percentile == 50 else f"p{percentile}"
    title, label = f"{name} time to first token", f"{name} TTFT (s, log scale)"
    return _against_load(rows, f"ttft_p{percentile}_s", title, label, log=True, line=(slo_s, f"{slo_s:g} s"))


@styled
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
    scale: float = 1.0,
    log: bool = False,
    top: float | None = None,
    line: tuple[float, str] | None = None,
) -> Figure:
    if column not in rows:
        raise NothingToPlot(f"{column}: no such column")
    means = tables.seed_means(tables.binned_loads(rows), column)
    means[["mean", "low", "high"]] *= scale
    finite = means[np.isfinite(means["mean"]) & ((means["mean"] > 0) | (not log))]
    if finite.empty:
        raise NothingToPlot(f"{column}: no finite value")
    policies = tables.policies_of(rows)
    if means["load"].nunique() == 1:
        figure, ax = _panel(title, 0, height=1.35 + 0.3 * len(policies))
        _dots(ax, means, policies)
        _scale(ax.xaxis, finite, log, top, line)
        ax.set_xlabel(label)
        if line:
            _guide(ax, line[0], line[1], vertical=True)
        return figure
    figure, ax = _panel(title, len(policies))
    _lines(ax, means, policies, above=True)
    _scale(ax.yaxis, finite, log, top, line)
    ax.set_xlabel("Load (requests/s)")
    ax.set_ylabel(label)
    if line:
        _guide(ax, *line)
    _legend(figure, policies)
    return figure


def _lines(ax: Axes, means: pd.DataFrame, policies: Sequence[str], *, above: bool) -> None:
    """A line with an interval band for each policy; infinite values become triangles on the upper edge."""
    for z, (policy, style) in enumerate(policy_styles(policies).items()):
        own = means[means["policy"] == policy].sort_values("load")
        mean = own["mean"].where(np.isfinite(own["mean"]))
        ax.fill_between(own["load"], own["low"], own["high"], color=style.colour, alpha=0.13, linewidth=0)
        ax.plot(own["load"], mean, color=style.colour, marker=style.marker, linestyle=style.dash, zorder=3 + z / 100)
        if above:
            _off_scale(ax, own["load"][np.isposinf(own["mean"])], style.colour, up=True)
    ax.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))


def _off_scale(ax: Axes, x: Any, colour: str, *, up: bool) -> None:
    """Triangles on the edge of the axes for values beyond it."""
    if len(x):
        y = [1.0 if up else 0.0] * len(x)
        kind = dict(marker="^" if up else "v", linestyle="none", markerfacecolor="none", color=colour, clip_on=False)
        ax.plot(x, y, transform=ax.get_xaxis_transform(), zorder=4, **kind)


def _dots(ax: Axes, means: pd.DataFrame, policies: Sequence[str]) -> None:
    """One load: a dot with its interval on a line of its own for each policy."""
    for y, (policy, style) in enumerate(policy_styles(policies).items()):
        own = means[means["policy"] == policy].iloc[0]
        if np.isfinite(own["mean"]):
            if np.isfinite(own["low"]):
                ax.plot([own["low"], own["high"]], [y, y], color=style.colour, linewidth=4, alpha=0.35)
            ax.plot([own["mean"]], [y], color=style.colour, marker=style.marker, markersize=7)
        else:
            text = "infinite" if np.isposinf(own["mean"]) else "none"
            ax.text(0.995, y, text, transform=ax.get_yaxis_transform(), ha="right", va="center", color=style.colour)
    ax.set_yticks(range(len(policies)), policies)
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    ax.set_ylim(len(policies) - 0.5, -0.5)


@styled
def plot_ttft_reduction(reduction: pd.DataFrame, baseline: str = tables.BASELINE, *, paper: bool = False) -> Figure:
    """Reduction of the median TTFT against `baseline` over load; with `paper` its claim and the reference figures."""
    means = reduction.assign(**{c: 100 * reduction[c] for c in ("mean", "low", "high")})
    finite = means[np.isfinite(means["mean"])]
    if finite.empty:
        raise NothingToPlot("no finite reduction")
    policies = tables.policies_of(means)
    title, label = f"Median TTFT against {baseline}", f"Median TTFT below {baseline}'s (%)"
    low = max(-60.0, min(0.0, float(finite[["mean", "low"]].min().min())) * 1.1)
    high = min(100.0, max(60.0, float(finite[["mean", "high"]].max().max()) + 6))
    if means["load"].nunique() == 1:
        figure, ax = _panel(title, 0, height=1.35 + 0.3 * len(policies))
        _dots(ax, means, policies)
        ax.set_xlabel(label)
        ax.axvline(0, color=FAINT, linewidth=1)
        return figure
    figure, ax = _panel(title, len(policies) + 2 * paper)
    _lines(ax, means, policies, above=False)
    for policy, style in policy_styles(policies).items():
        _off_scale(ax, finite["load"][(finite["policy"] == policy) & (finite["mean"] < low)], style.colour, up=False)
    ax.axhline(0, color=FAINT, linewidth=1)
    extra = []
    if paper:
        claim = 100 * tables.PAPER_TTFT_REDUCTION
        ax.axhline(claim, color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
        loads, values = zip(*tables.REFERENCE_TTFT_REDUCTION.items(), strict=True)
        marks = dict(marker="D", linestyle="none", markerfacecolor="none", color=INK, markersize=7)
        ax.plot(loads, 100 * np.array(values), zorder=5, **marks)
        extra = [
            (Line2D([], [], **marks), "reference figures for slai"),
            (Line2D([], [], color=INK, linewidth=1.1, linestyle=(0, (4, 3))), f"the paper's claim ({claim:.0f} %)"),
        ]
    ax.set_ylim(low, high)
    ax.set_xlabel("Load (requests/s)")
    ax.set_ylabel(label)
    _legend(figure, policies, extra)
    return figure


# --- At one load ----------------------------------------------------------------------------------------------------


@styled
def plot_ttft_by_prompt(
    requests: pd.DataFrame, quantile: float = 0.5, *, slo: tuple[float, float] | None = None, num_bins: int = 10
) -> Figure:
    """A quantile of TTFT by prompt length, in bins of equally many requests; `slo` = (s, s per prompt token)."""
    edges = _prompt_edges(requests, num_bins)
    policies = tables.policies_of(requests)
    name = "Median" if quantile == 0.5 else f"p{100 * quantile:g}"
    figure, ax = _panel(f"{name} TTFT by prompt length", len(policies) + (slo is not None))
    values = []
    for policy, style in policy_styles(policies).items():
        own = requests[requests["policy"] == policy]
        groups = own.assign(ttft_s=own["ttft_s"].fillna(np.inf)).groupby(_bins(own["prompt_tokens"], edges))
        x = groups["prompt_tokens"].median().to_numpy()
        y = groups["ttft_s"].quantile(quantile, interpolation="higher").to_numpy()
        finite = np.isfinite(y)
        values += y[finite].tolist()
        ax.plot(x, np.where(finite, y, np.nan), color=style.colour, marker=style.marker, linestyle=style.dash)
        _off_scale(ax, x[~finite], style.colour, up=True)
    if not values:
        raise NothingToPlot("no first token")
    extra = []
    if slo is not None:
        x = np.geomspace(max(1, requests["prompt_tokens"].min()), requests["prompt_tokens"].max(), 100)
        line = dict(color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
        ax.plot(x, slo[0] + slo[1] * x, **line)
        extra = [(Line2D([], [], **line), "TTFT SLO")]
    ax.set_xscale("log")
    _log_ticks(ax.xaxis, *ax.get_xlim(), numbers=lambda v, _: f"{v:,.0f}" if v >= 1 else f"{v:g}")
    _scale(ax.yaxis, pd.DataFrame({"mean": values}), True, None, None)
    ax.set_xlabel("Prompt length (tokens, log scale)")
    ax.set_ylabel(f"{name} TTFT (s, log scale)")
    _legend(figure, policies, extra)
    return figure


@styled
def plot_share_by_prompt(requests: pd.DataFrame, what: str = "attained") -> Figure:
    """Share of requests that attained (or were served: finished) by tenth of prompt length."""
    edges = _prompt_edges(requests, 10)
    hit = requests["attained"] if what == "attained" else requests["phase"].astype(str) == "finished"
    policies = tables.policies_of(requests)
    title = "Within all SLOs by prompt length" if what == "attained" else "Served by prompt length"
    figure, ax = _panel(title, len(policies))
    for policy, style in policy_styles(policies).items():
        mine = requests["policy"] == policy
        shares = hit[mine].astype(float).groupby(_bins(requests["prompt_tokens"][mine], edges)).mean()
        shares = 100 * shares.reindex(range(len(edges) - 1))
        ax.plot(shares.index, shares, color=style.colour, marker=style.marker, linestyle=style.dash)
    ax.set_xticks(range(len(edges) - 1), [f"{edge:,.0f}" for edge in edges[1:]])
    ax.tick_params(axis="x", labelsize=8.5)
    _scale(ax.yaxis, None, False, 100, None)
    ax.set_xlabel("Tenths of requests by prompt length, longest prompt in each (tokens)")
    ax.set_ylabel(f"{'Requests within all SLOs' if what == 'attained' else 'Requests finished'} (%)")
    _legend(figure, policies)
    return figure


def _prompt_edges(requests: pd.DataFrame, num_bins: int) -> np.ndarray:
    lengths = requests["prompt_tokens"].to_numpy(float)
    if len(lengths) == 0:
        raise NothingToPlot("no requests")
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, num_bins + 1)))
    return edges if len(edges) > 1 else np.array([edges[0] - 1, edges[0]])


def _bins(lengths: pd.Series, edges: np.ndarray) -> np.ndarray:
    """Index of the bin (edge, next edge] of each length; the first bin includes its lower edge."""
    return np.clip(np.searchsorted(edges, lengths, side="left") - 1, 0, len(edges) - 2)


@styled
def plot_ttft_cdf(requests: pd.DataFrame, slo_s: float = 0.5) -> Figure:
    """Distribution of TTFT over all requests: one without a first token never reaches the line's top."""
    policies = tables.policies_of(requests)
    figure, ax = _panel("Distribution of time to first token", len(policies))
    shares = np.unique(np.concatenate([np.linspace(0.002, 0.99, 240), np.linspace(0.99, 1, 21)]))
    seen = []
    for policy, style in policy_styles(policies).items():
        ttft_s = requests["ttft_s"][requests["policy"] == policy].fillna(np.inf).to_numpy(float)
        x = np.quantile(ttft_s, shares, method="inverted_cdf")
        finite = np.isfinite(x) & (x > 0)
        if finite.any():
            seen += [x[finite][0], x[finite][-1]]
            every = (len(x[finite]) // 6, len(x[finite]) // 4 + 1)
            ax.plot(
                x[finite], 100 * shares[finite], color=style.colour, linestyle=style.dash, marker=style.marker, markevery=every
            )
    if not seen:
        raise NothingToPlot("no first token")
    _scale(ax.xaxis, pd.DataFrame({"mean": seen}), True, None, None)
    _scale(ax.yaxis, None, False, 100, None)
    ax.set_xlabel("TTFT (s, log scale)")
    ax.set_ylabel("Requests with a first token by then (%)")
    _guide(ax, slo_s, f"{slo_s:g} s", vertical=True)
    _legend(figure, policies)
    return figure


@styled
def plot_itl_cdf(itl: pd.DataFrame, slo_class: str = "strict", slo_s: float = 0.1) -> Figure:
    """Share of one class's gaps longer than x, from a quantile table (policy, slo_class, prob, itl_s), to 1 in 10^4."""
    own = itl[(itl["slo_class"].astype(str) == slo_class) & (itl["itl_s"] > 0)]
    if own.empty:
        raise NothingToPlot(f"no gaps of {slo_class} users")
    policies = tables.policies_of(itl)
    figure, ax = _panel(f"Gaps between tokens, {slo_class} users", len(policies))
    for policy, style in policy_styles(policies).items():
        mine = own[(own["policy"] == policy) & (own["prob"] < 0.99995)].sort_values("prob")
        every = (len(mine) // 3, max(1, len(mine) // 4))
        line = dict(color=style.colour, linestyle=style.dash, marker=style.marker, markevery=every)
        ax.plot(mine["itl_s"], 100 * (1 - mine["prob"]), **line)
    ax.set_yscale("log")
    ax.set_ylim(0.01, 100)
    _log_ticks(ax.yaxis, 0.01, 100, whole=True)
    _scale(ax.xaxis, own.rename(columns={"itl_s": "mean"}), True, None, (slo_s, ""))
    ax.set_xlabel("Gap (s, log scale)")
    ax.set_ylabel("Gaps longer than that (%, log scale)")
    _guide(ax, slo_s, f"TBT SLO {slo_s:g} s", vertical=True)
    _guide(ax, 1.0, "p99")
    _legend(figure, policies)
    return figure


@styled
def plot_batches(steps: pd.DataFrame, policies: Sequence[str], window_s: float = 120.0, bin_s: float = 0.5) -> Figure:
    """What batches were made of over time: mean tokens a batch by kind, requests, KV use, for up to three policies."""
    runs = {p: steps[steps["policy"] == p].sort_values("start_s") for p in policies[:3]}
    runs = {p: run for p, run in runs.items() if len(run) > 1}
    if not runs:
        raise NothingToPlot("no steps")
    ends = [float((run["start_s"] + run["duration_s"]).iloc[-1]) for run in runs.values()]
    window_s = min(window_s, min(ends))
    bin_s = min(bin_s, window_s / 40)
    figure = Figure(figsize=(2.0 + 3.2 * len(runs), 5.6), layout="constrained")
    grid = figure.subplots(3, len(runs), sharex=True, sharey="row", squeeze=False, height_ratios=[1.6, 1, 0.8])
    edges = np.arange(0, window_s + bin_s / 2, bin_s)
    time_s = edges[:-1] + bin_s / 2
    for column, (policy, run) in enumerate(runs.items()):
        tokens, requests, kv = grid[:, column]
        decode, prefill = (_averaged(run, f"{kind}_tokens", edges) for kind in ("decode", "prefill"))
        tokens.fill_between(time_s, decode, step="mid", color=DECODE, linewidth=0, label="decode tokens")
        tokens.fill_between(time_s, decode, decode + prefill, step="mid", color=PREFILL, linewidth=0, label="prefill tokens")
        tokens.set_title(policy)
        requests.plot(time_s, _averaged(run, "num_running", edges), color="#117733", label="running", linewidth=1.4)
        waiting = _averaged(run, "num_waiting", edges)
        requests.plot(time_s, waiting, color="#cc3311", label="waiting", linewidth=1.4, linestyle=(0, (3, 1.2)))
        kv.fill_between(time_s, 100 * _averaged(run, "kv_cache_usage", edges), color="#8793a0", linewidth=0, alpha=0.7)
        kv.set_ylim(0, 100)
        kv.set_xlim(0, window_s)
        kv.set_xlabel("Time (s)")
    for ax, label in zip(grid[:, 0], ("Tokens per batch", "Requests", "KV cache used (%)"), strict=True):
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    figure.align_ylabels(grid[:, 0])
    handles = [h for ax in grid[:2, 0] for h in ax.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower left", ncols=4)
    return figure


def _averaged(run: pd.DataFrame, column: str, edges: np.ndarray) -> np.ndarray:
    """Mean of a column over the busy time of each bin, 0 in one without."""
    start, duration = run["start_s"].to_numpy(float), run["duration_s"].to_numpy(float)
    at = np.column_stack([start, start + duration]).ravel()

    def integral(values: np.ndarray) -> np.ndarray:
        parts = np.column_stack([np.zeros(len(run)), values * duration]).ravel()
        return np.diff(np.interp(edges, at, np.cumsum(parts)))

    busy_s = integral(np.ones(len(run)))
    return np.where(busy_s > 1e-9, integral(run[column].to_numpy(float)) / np.maximum(busy_s, 1e-9), 0.0)


@styled
def plot_capacity(capacity: pd.DataFrame, *, reference: Mapping[str, float] | None = None) -> Figure:
    """Capacity by policy with intervals, for one criterion; diamonds are reference figures."""
    own = capacity[np.isfinite(capacity["capacity_qps"].astype(float))].reset_index(drop=True)
    if own.empty:
        raise NothingToPlot("no capacity")
    policies = [str(p) for p in own["policy"]]
    shown = {p: (reference or {})[p] for p in policies if p in (reference or {})}
    figure, ax = _panel(f"Capacity ({own['criterion'].iloc[0]})", 3 if shown else 0, height=1.3 + 0.34 * len(own))
    styles = policy_styles(policies)
    right = float(max([*own["capacity_qps"], *own["ci_high"].dropna(), *shown.values()]))
    for y, bar in own.iterrows():
        ax.barh(y, bar["capacity_qps"], height=0.62, color=styles[bar["policy"]].colour, alpha=0.85, linewidth=0)
        if np.isfinite(bar["ci_low"]) and np.isfinite(bar["ci_high"]):
            ax.plot([bar["ci_low"], bar["ci_high"]], [y, y], color=INK, linewidth=1.6, marker="|", markersize=8)
        ax.text(right * 1.04, y, f"{bar['capacity_qps']:.2f}", va="center", fontweight="bold")
    if shown:
        marks = dict(marker="D", linestyle="none", markerfacecolor="none", color=INK, markersize=7)
        ax.plot(list(shown.values()), [policies.index(p) for p in shown], **marks)
        handles = [Line2D([], [], **marks, label="reference"), Line2D([], [], color=INK, marker="|", label="95 % interval")]
        figure.legend(handles=handles, loc="outside lower left", ncols=2)
    ax.set_yticks(range(len(own)), policies)
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    ax.grid(False, axis="y")
    ax.set_ylim(len(own) - 0.4, -0.6)
    ax.set_xlim(0, right * 1.16)
    ax.set_xlabel("Capacity (requests/s)")
    return figure


# --- Parts ----------------------------------------------------------------------------------------------------------


def _panel(title: str, num_entries: int, height: float = 3.55) -> tuple[Figure, Axes]:
    """A figure of one panel with room for a legend of so many entries below it."""
    figure = Figure(figsize=(WIDTH, height + 0.2 * math.ceil(num_entries / 4)), layout="constrained")
    ax = figure.subplots()
    ax.set_title(title)
    return figure, ax


def _legend(figure: Figure, policies: Sequence[str], extra: Sequence[tuple[Any, str]] = ()) -> None:
    handles = [
        Line2D([], [], color=s.colour, marker=s.marker, linestyle=s.dash, label=_short(p))
        for p, s in policy_styles(policies).items()
    ]
    for handle, label in extra:
        handle.set_label(label)
        handles.append(handle)
    longest = max(len(h.get_label()) for h in handles)
    ncols = max(1, min(4, int(78 / (longest + 6))))
    figure.legend(handles=handles, loc="outside lower left", ncols=ncols, handlelength=2.4, columnspacing=1.4)


def _short(name: str, most: int = 34) -> str:
    return name if len(name) <= most else f"{name[: most - 12]}…{name[-11:]}"


def _guide(ax: Axes, value: float, text: str, *, vertical: bool = False) -> None:
    """A dashed line at a limit with its name at the end."""
    style = dict(color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=2)
    if vertical:
        ax.axvline(value, **style)
        ax.annotate(text, (value, 1), xycoords=("data", "axes fraction"), xytext=(4, -2), textcoords="offset points",
                    va="top", fontsize=8.5)  # fmt: skip
    else:
        ax.axhline(value, **style)
        ax.annotate(text, (1, value), xycoords=("axes fraction", "data"), xytext=(-2, 3), textcoords="offset points",
                    ha="right", fontsize=8.5)  # fmt: skip


def _scale(
    axis: Any, values: pd.DataFrame | None, log: bool, top: float | None, line: tuple[float, str] | None
) -> None:
    """Limits and ticks: 0 to `top`, from 0, or a log scale over the values and the line."""
    ax, name = axis.axes, axis.axis_name
    if log and values is not None:
        shown = [float(v) for v in values["mean"] if np.isfinite(v) and v > 0] + ([line[0]] if line else [])
        low, high = min(shown) / 1.25, max(shown) * 1.25
        getattr(ax, f"set_{name}scale")("log")
        getattr(ax, f"set_{name}lim")(low, high)
        _log_ticks(axis, low, high)
    elif top is not None:
        getattr(ax, f"set_{name}lim")(0, top * 1.015)
    elif values is not None and values["mean"].min() >= 0:
        getattr(ax, f"set_{name}lim")(0, None)


def _log_ticks(axis: Any, low: float, high: float, *, whole: bool = False, numbers: Any = None) -> None:
    """Plain numbers at 1, 2, 5 in each decade; only whole decades over a wide range."""
    subs = (1.0,) if whole or high / low > 3e3 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=30))
    axis.set_major_formatter(FuncFormatter(numbers or (lambda v, _: f"{v:g}")))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    ticks = [t for t in axis.get_major_locator().tick_values(low, high) if low <= t <= high]
    if len(ticks) < 2:
        axis.set_major_locator(FixedLocator(_round_ticks(low, high)))


def _round_ticks(low: float, high: float) -> np.ndarray:
    return np.array([t for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high])
