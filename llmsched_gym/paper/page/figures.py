"""The figures of the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from llmsched_gym.paper import constants
from llmsched_gym.report import draw, plots, statistics
from llmsched_gym.theory import experiments
from llmsched_gym.theory import figures as theory


@draw.styled
def against_load(rows: pd.DataFrame, column: str, title: str, label: str, scale: float = 1.0) -> Figure:
    """A column's mean over seeds against load."""
    means = statistics.over_seeds(rows, column)
    means[["value", "low", "high"]] *= scale
    policies = statistics.policies_of(rows)
    figure, ax = draw.panel(title)
    for policy, style in draw.policy_styles(policies).items():
        own = means[means["policy"] == policy].sort_values("load")
        ax.plot(own["load"], own["value"], color=style.colour, marker=style.marker, linestyle=style.dash)
    ax.set(xlabel="Load (requests/s)", ylabel=label)
    ax.set_ylim(0, None)
    draw.legend(figure, policies)
    return figure


@draw.styled
def plot_sweep(points: Sequence[dict[str, float]]) -> Figure:
    """Token budget against TTFT and mean batch time, beside the published points."""
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    for i, (ax, key, label) in enumerate(
        zip(figure.subplots(1, 2), ("ttft_ms", "batch_ms"), ("Median TTFT (ms)", "Mean batch time (ms)"), strict=True)
    ):
        ax.plot([p["chunk"] for p in points], [p[key] for p in points], color="#0072b2", marker="o", label="cost model")
        published = [row[1 + i] for row in constants.PUBLISHED_SWEEP]
        kind: dict[str, Any] = dict(linestyle="none", marker="D", markersize=7, color=draw.INK, markerfacecolor="none")
        ax.plot([row[0] for row in constants.PUBLISHED_SWEEP], published, label="published", **kind)
        ax.set(xlabel="Token budget", ylabel=label)
        ax.set_ylim(0, None)
        ax.set_xticks([64, 256, 512, 768, 1024])
    figure.axes[0].legend(loc="upper right")
    figure.axes[0].set_title("Lone prompts of 2,048 tokens, one decode each")
    return figure


@draw.styled
def plot_batches(runs: dict[str, dict[str, list[float]]]) -> Figure:
    """Decodes in a batch against its time, and running requests against KV use."""
    figure = Figure(figsize=(8.6, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    for policy, style in draw.policy_styles(list(runs)).items():
        run = {k: np.array(v) for k, v in runs[policy].items()}
        kind: dict[str, Any] = dict(linestyle="none", marker=style.marker, color=style.colour, markersize=3, alpha=0.35)
        left.plot(run["decodes"], 1e3 * run["duration_s"], markeredgewidth=0, **kind)
        right.plot(run["running"], 100 * run["kv"], markeredgewidth=0, **kind)
    left.set(xlabel="Decodes in the batch", ylabel="Batch time (ms, log scale)", yscale="log")
    low, high = left.get_ylim()
    draw.log_ticks(left.yaxis, low, high)
    right.set(xlabel="Running requests", ylabel="KV cache used (%)", ylim=(0, 102))
    draw.legend(figure, list(runs))
    return figure


@draw.styled
def plot_strict(rows: pd.DataFrame) -> Figure:
    """SLO attainment of strict and of relaxed users against the share of strict ones."""
    figure = Figure(figsize=(8.6, 4.0), layout="constrained")
    policies = list(rows["policy"].unique())
    for ax, who in zip(figure.subplots(1, 2, sharey=True), ("strict", "relaxed"), strict=True):
        means = rows.groupby(["policy", "strict_share"])[f"slo_attainment_{who}"].mean() * 100
        for policy, style in draw.policy_styles(policies).items():
            own = means[policy].dropna()
            ax.plot(100 * own.index, own, color=style.colour, marker=style.marker, linestyle=style.dash)
        ax.set(xlabel="Strict users (%)", title=f"{who.capitalize()} users", ylim=(0, 101.5))
    figure.axes[0].set_ylabel("Within all SLOs (%)")
    draw.legend(figure, policies)
    return figure


def all_figures(data: dict[str, Any], long: pd.DataFrame, short: pd.DataFrame) -> dict[str, Figure]:
    """The page's figures by name."""
    fluid_qps = data["fluid"][0]["qps"]
    reduction = statistics.ttft_reduction(short)
    slai = reduction[reduction["policy"].str.startswith("slai")]
    bars = ["capacity_qps", "ci_low", "ci_high"]
    found = pd.DataFrame(data["capacity"])
    paper = found[found["criterion"] == "ttft-median"].astype(dict.fromkeys(bars, float))
    return {
        "ttft_median": plots.plot_ttft(long, 50, fluid_qps=fluid_qps),
        "ttft_p99": plots.plot_ttft(long, 99, fluid_qps=fluid_qps),
        "itl_strict": plots.plot_itl(long, "strict", 0.1),
        "itl_relaxed": plots.plot_itl(long, "relaxed", 0.5),
        "batch_time": against_load(long, "mean_batch_s", "Mean batch time", "Mean batch time (ms)", 1e3),
        "kv_use": against_load(long, "kv_cache_usage_max", "Largest KV cache use", "KV cache used (%)", 100),
        "ttft_reduction": plots.plot_ttft_reduction(slai, paper=True),
        "capacity": plots.plot_capacity(paper, reference=constants.REFERENCE_CAPACITY_QPS, fluid_qps=fluid_qps),
        "attainment": plots.plot_attainment(short, fluid_qps=fluid_qps),
        "budget_sweep": plot_sweep(data["budget_sweep"]),
        "batches": plot_batches(data["batches"]),
        "strict_shares": plot_strict(strict_rows(data)),
        "backlog": theory.plot_backlogs(data["stability"], experiments.JUDGED),
        "stability": theory.plot_boundaries(data["stability"]),
        "router_backlog": theory.plot_backlogs(data["router_stability"], experiments.JUDGED),
        "ablation": theory.plot_ablation(data["ablation"]),
        "tiles": theory.plot_tiles(data["tiles"]),
    }


def strict_rows(data: dict[str, Any]) -> pd.DataFrame:
    """Tidy rows of all shares of strict users."""
    parts = []
    for share in dict.fromkeys(row["strict_share"] for row in data["strict_shares"]):
        parts.append(statistics.tidy([row for row in data["strict_shares"] if row["strict_share"] == share]))
    return pd.concat(parts, ignore_index=True)
