"""Figures of a report at one load, made as in `plots`: of requests, of gaps between tokens, of batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from llmsched_gym.report import draw, statistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PREFILL, DECODE = "#e69f00", "#0072b2"


@draw.styled
def plot_ttft_by_prompt(
    requests: pd.DataFrame,
    quantile: float = 0.5,
    *,
    slo: tuple[float, float] | None = None,
    num_bins: int = 10,
    at: str = "",
) -> Figure:
    """A quantile of TTFT by prompt length, in bins of equally many requests; `slo` = (s, s per prompt token)."""
    edges = _prompt_edges(requests, num_bins)
    policies = statistics.policies_of(requests)
    name = "Median" if quantile == 0.5 else f"p{100 * quantile:g}"
    figure, ax = draw.panel(_titled(f"{name} TTFT by prompt length", at))
    values: list[float] = []
    centres: list[float] = []
    lost = []
    for policy, style in draw.policy_styles(policies).items():
        own = requests[requests["policy"] == policy]
        groups = own.assign(ttft_s=own["ttft_s"].fillna(np.inf)).groupby(_bins(own["prompt_tokens"], edges))
        x = groups["prompt_tokens"].median().to_numpy()
        y = groups["ttft_s"].quantile(quantile, interpolation="higher").to_numpy()
        finite = np.isfinite(y)
        values += y[finite].tolist()
        centres += x.tolist()
        ax.plot(x, np.where(finite, y, np.nan), color=style.colour, marker=style.marker, linestyle=style.dash)
        lost.append((x[~finite], style.colour))
    if not values:
        raise draw.NothingToPlot("no first token")
    draw.off_scale(ax, lost, up=True)
    extra = []
    low, high = min(centres) / 1.25, max(centres) * 1.25
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    draw.log_ticks(ax.xaxis, low, high, numbers=lambda v, _: f"{v:,.0f}" if v >= 1 else f"{v:g}")
    if slo is not None:
        x = np.geomspace(*ax.get_xlim(), 100)
        line: dict[str, Any] = dict(color=draw.INK, linewidth=1.1, linestyle=(0, (4, 3)))
        ax.plot(x, slo[0] + slo[1] * x, **line)
        extra = [(draw.mark(**line), "TTFT SLO")]
    draw.log_scale(ax.yaxis, values)
    ax.set_xlabel("Prompt length (tokens, log scale)")
    ax.set_ylabel(f"{name} TTFT (s, log scale)")
    draw.legend(figure, policies, extra)
    return figure


@draw.styled
def plot_share_by_prompt(requests: pd.DataFrame, what: str = "attained", *, at: str = "") -> Figure:
    """Share of requests that attained (or were served: finished) by tenth of prompt length."""
    edges = _prompt_edges(requests, 10)
    hit = requests["attained"] if what == "attained" else requests["phase"].astype(str) == "finished"
    policies = statistics.policies_of(requests)
    title = "Within all SLOs by prompt length" if what == "attained" else "Served by prompt length"
    figure, ax = draw.panel(_titled(title, at))
    for policy, style in draw.policy_styles(policies).items():
        mine = requests["policy"] == policy
        shares = hit[mine].astype(float).groupby(_bins(requests["prompt_tokens"][mine], edges)).mean()
        shares = 100 * shares.reindex(range(len(edges) - 1))
        ax.plot(shares.index, shares, color=style.colour, marker=style.marker, linestyle=style.dash)
    ax.set_xticks(range(len(edges) - 1), [f"{edge:,.0f}" for edge in edges[1:]])
    ax.tick_params(axis="x", labelsize=8.5)
    ax.set_ylim(draw.PERCENT)
    ax.set_xlabel("Tenths of requests by prompt length, longest prompt in each (tokens)")
    ax.set_ylabel(f"{'Requests within all SLOs' if what == 'attained' else 'Requests finished'} (%)")
    draw.legend(figure, policies)
    return figure


def _titled(title: str, at: str) -> str:
    return f"{title}, {at}" if at else title


def _prompt_edges(requests: pd.DataFrame, num_bins: int) -> np.ndarray:
    lengths = requests["prompt_tokens"].to_numpy(float)
    if len(lengths) == 0:
        raise draw.NothingToPlot("no requests")
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, num_bins + 1)))
    return edges if len(edges) > 1 else np.array([edges[0] - 1, edges[0]])


def _bins(lengths: pd.Series, edges: np.ndarray) -> np.ndarray:
    """Index of the bin (edge, next edge] of each length; the first bin includes its lower edge."""
    return np.clip(np.searchsorted(edges, lengths, side="left") - 1, 0, len(edges) - 2)


@draw.styled
def plot_ttft_cdf(requests: pd.DataFrame, slo_s: float = 0.5, *, at: str = "") -> Figure:
    """Distribution of TTFT over all requests: one without a first token never reaches the line's top."""
    policies = statistics.policies_of(requests)
    figure, ax = draw.panel(_titled("Time to first token", at))
    shares = np.unique(np.concatenate([np.linspace(0.002, 0.99, 240), np.linspace(0.99, 1, 21)]))
    seen = []
    for policy, style in draw.policy_styles(policies).items():
        ttft_s = requests["ttft_s"][requests["policy"] == policy].fillna(np.inf).to_numpy(float)
        x = np.quantile(ttft_s, shares, method="inverted_cdf")
        finite = np.isfinite(x) & (x > 0)
        if finite.any():
            seen += [x[finite][0], x[finite][-1]]
            every = (len(x[finite]) // 6, len(x[finite]) // 4 + 1)
            ax.plot(
                x[finite],
                100 * shares[finite],
                color=style.colour,
                linestyle=style.dash,
                marker=style.marker,
                markevery=every,
            )
    if not seen:
        raise draw.NothingToPlot("no first token")
    draw.log_scale(ax.xaxis, seen)
    ax.set_ylim(draw.PERCENT)
    ax.set_xlabel("TTFT (s, log scale)")
    ax.set_ylabel("Requests served that fast (%)")
    draw.legend(figure, policies, [draw.guide(ax, slo_s, f"TTFT {slo_s:g} s", vertical=True)])
    return figure


@draw.styled
def plot_itl_cdf(itl: pd.DataFrame, slo_class: str = "strict", slo_s: float = 0.1, *, at: str = "") -> Figure:
    """Share of one class's gaps longer than x, from a quantile table (policy, slo_class, prob, itl_s), to 1 in 10^4."""
    own = itl[(itl["slo_class"].astype(str) == slo_class) & (itl["itl_s"] > 0)]
    if own.empty:
        raise draw.NothingToPlot(f"no gaps of {slo_class} users")
    policies = statistics.policies_of(itl)
    figure, ax = draw.panel(_titled(f"Gaps between tokens, {slo_class} users", at))
    for policy, style in draw.policy_styles(policies).items():
        mine = own[(own["policy"] == policy) & (own["prob"] < 0.99995)].sort_values("prob")
        every = (len(mine) // 3, max(1, len(mine) // 4))
        line: dict[str, Any] = dict(color=style.colour, linestyle=style.dash, marker=style.marker, markevery=every)
        ax.plot(mine["itl_s"], 100 * (1 - mine["prob"]), **line)
    ax.set_yscale("log")
    ax.set_ylim(0.01, 100)
    draw.log_ticks(ax.yaxis, 0.01, 100, whole=True)
    draw.log_scale(ax.xaxis, [own["itl_s"].min(), own["itl_s"].max(), slo_s])
    ax.set_xlabel("Gap (s, log scale)")
    ax.set_ylabel("Gaps longer than that (%)")
    p99 = draw.guide(ax, 1.0, "p99", dash=(0, (1, 1.5)))
    draw.legend(figure, policies, [draw.guide(ax, slo_s, f"TBT SLO {slo_s:g} s", vertical=True), p99])
    return figure


@draw.styled
def plot_batches(steps: pd.DataFrame, policies: Sequence[str], window_s: float = 120.0, bin_s: float = 0.5) -> Figure:
    """What batches were made of over time: mean tokens a batch by kind, requests, KV use, for up to three policies."""
    runs = {p: steps[steps["policy"] == p].sort_values("start_s") for p in policies[:3]}
    runs = {p: run for p, run in runs.items() if len(run) > 1}
    if not runs:
        raise draw.NothingToPlot("no steps")
    ends = [float((run["start_s"] + run["duration_s"]).iloc[-1]) for run in runs.values()]
    window_s = min(window_s, min(ends))
    bin_s = min(bin_s, window_s / 40)
    figure = draw.new_figure(2.0 + 3.2 * len(runs), 5.6)
    grid = figure.subplots(3, len(runs), sharex=True, sharey="row", squeeze=False, height_ratios=[1.6, 1, 0.8])
    edges = np.arange(0, window_s + bin_s / 2, bin_s)
    time_s = edges[:-1] + bin_s / 2
    totals: list[np.ndarray] = []
    for column, (policy, run) in enumerate(runs.items()):
        tokens, requests, kv = grid[:, column]
        decode, prefill = (_averaged(run, f"{kind}_tokens", edges) for kind in ("decode", "prefill"))
        tokens.fill_between(time_s, decode, step="mid", color=DECODE, linewidth=0, label="decode tokens")
        tokens.fill_between(
            time_s, decode, decode + prefill, step="mid", color=PREFILL, linewidth=0, label="prefill tokens"
        )
        tokens.set_title(draw.short(policy, 24))
        totals.append(decode + prefill)
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
        draw.few_ticks(ax.yaxis, 5, integer=True)
    most = 1.15 * max(float(np.quantile(t[t > 0], 0.96)) if (t > 0).any() else 1.0 for t in totals)
    if max(t.max() for t in totals) > 1.6 * most:  # rare spikes would flatten all the rest
        grid[0, 0].set_ylim(0, most)
        for ax, total in zip(grid[0], totals, strict=True):
            if total.max() > most:
                text = f"cut off: up to {total.max():,.0f}"
                ax.text(
                    0.99, 1.01, text, transform=ax.transAxes, ha="right", va="bottom", fontsize=8.5, color=draw.FAINT
                )
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
