"""Figures of the stability and tile experiments: from their data to matplotlib figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from llmsched_gym.report import draw

SHORT = {
    "rtx6000ada-mistral-7b": "RTX 6000 Ada, smooth",
    "a100-mistral-7b": "A100, measured staircase",
    "h100-mistral-7b": "H100, measured",
    "hetero": "2 H100, 2 A100, 4 RTX 6000 Ada",
}
COLOURS = ("#0072b2", "#d55e00", "#117733", "#aa4499", "#68737f")


def device_title(name: str) -> str:
    """What figures call a device."""
    return SHORT.get(name, "A100, roofline with waves" if "waves" in name else name)


@draw.styled
def plot_backlogs(rows: Sequence[dict[str, Any]], share: float) -> Figure:
    """Requests in the system over time at one share of the fluid capacity, a panel for each device."""
    devices = list(dict.fromkeys(row["profile"] for row in rows))
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    figure = Figure(figsize=(4.6 * len(devices), 4.1), layout="constrained")
    axes = figure.subplots(1, len(devices), sharey=True, squeeze=False)[0]
    styles = draw.policy_styles(policies)
    for ax, name in zip(axes, devices, strict=True):
        for row in (r for r in rows if r["profile"] == name):
            style = styles[row["policy"]]
            hours = np.array(row["time_s"]) / 3600
            every = (len(hours) // 6, len(hours) // 5)
            kind: dict[str, Any] = dict(color=style.colour, linestyle=style.dash, marker=style.marker, markevery=every)
            ax.plot(hours, np.maximum(row["requests"], 10), linewidth=1.2, **kind)
        ax.set_yscale("log")
        ax.set_title(device_title(name))
        ax.set_xlabel("Time (hours)")
        ax.set_xlim(0, None)
    axes[0].set_ylabel(f"Requests in the system at {share:.0%} (log scale)")
    high = axes[0].get_ylim()[1]
    axes[0].set_ylim(10, high)
    draw.log_ticks(axes[0].yaxis, 10, high, whole=True, numbers=lambda v, _: f"{v:,.0f}")
    draw.legend(figure, policies)
    return figure


@draw.styled
def plot_boundaries(rows: Sequence[dict[str, Any]]) -> Figure:
    """The largest load with a bounded backlog, as a share of the fluid capacity."""
    devices = list(dict.fromkeys(row["profile"] for row in rows))
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    figure, ax = draw.panel("Largest load with a bounded backlog", height=1.2 + 0.42 * len(policies))
    height = 0.8 / len(devices)
    for i, name in enumerate(devices):
        own = {row["policy"]: row for row in rows if row["profile"] == name}
        y = np.arange(len(policies)) + (i - (len(devices) - 1) / 2) * height
        shares = [100 * own[p]["boundary_share"] for p in policies]
        ax.barh(y, shares, height=0.92 * height, color=COLOURS[i], alpha=0.85, linewidth=0, label=device_title(name))
        for at, share in zip(y, shares, strict=True):
            ax.text(share - 0.8, at, f"{share:.1f}", va="center", ha="right", fontsize=8, color="white")
    ax.axvline(100, color=draw.INK, linewidth=1.1, linestyle=(0, (4, 3)))
    ax.set_yticks(range(len(policies)), policies)
    ax.set_ylim(len(policies) - 0.45, -0.55)
    ax.set_xlim(0, 104)
    ax.grid(False, axis="y")
    ax.set_xlabel("Share of the fluid capacity (%)")
    figure.legend(loc="outside lower left", ncols=2)
    return figure


@draw.styled
def plot_ablation(rows: Sequence[dict[str, Any]]) -> Figure:
    """Change in requests served in overload against RAD whole, by device, for both batch limits."""
    devices = list(dict.fromkeys(row["profile"] for row in rows))
    variants = [v for v in dict.fromkeys(row["variant"] for row in rows) if v != "both principles"]
    figure = Figure(figsize=(8.6, 3.7), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, size in zip(axes, (8192, 512), strict=True):
        for i, name in enumerate(devices):
            own = {r["variant"]: r for r in rows if r["profile"] == name and r["size"] == size}
            y = np.arange(len(variants)) + (i - (len(devices) - 1) / 2) * 0.26
            gain = np.array([100 * own[v]["gain"] for v in variants])
            ends = np.array([[100 * own[v][k] for v in variants] for k in ("gain_low", "gain_high")])
            ax.barh(y, gain, height=0.24, color=COLOURS[i], alpha=0.85, label=device_title(name))
            ax.errorbar(gain, y, xerr=np.abs(ends - gain), fmt="none", ecolor=draw.INK, elinewidth=1.2)
        ax.set_title(f"Batches of up to {size:,} tokens")
        ax.axvline(0, color=draw.FAINT, linewidth=1)
        ax.set_yticks(range(len(variants)), variants)
        ax.set_ylim(len(variants) - 0.45, -0.55)
        ax.grid(False, axis="y")
        ax.set_xlabel("Requests served, against whole RAD (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=3)
    return figure


@draw.styled
def plot_tiles(rows: Sequence[dict[str, Any]], most: int = 4096) -> Figure:
    """Tokens per second of the linear layers against batch tokens, with RAD's batch sizes."""
    figure = Figure(figsize=(4.0 * len(rows), 3.9), layout="constrained")
    axes = figure.subplots(1, len(rows), squeeze=False)[0]
    for ax, row, colour in zip(axes, rows, COLOURS, strict=False):
        tokens, rate = np.array(row["tokens"]), np.array(row["tokens_per_s"]) / 1e3
        shown = tokens <= most
        ax.plot(tokens[shown], rate[shown], color=colour, linewidth=1.1, label="every 8 tokens")
        whole = (tokens % row["tile"] == 0) & shown
        dots: dict[str, Any] = dict(linestyle="none", marker="o", markersize=3.6, markerfacecolor="white")
        ax.plot(tokens[whole], rate[whole], color=colour, label=f"multiples of the tile, {row['tile']}", **dots)
        kind: dict[str, Any] = dict(linestyle="none", marker="D", markersize=7, color=draw.INK, markerfacecolor="none")
        chosen = [n for n in (row["best_512"], row["best"]) if n <= most]
        label = "RAD's k*T: " + " and ".join(f"{n:,}" for n in (row["best_512"], row["best"]))
        ax.plot(chosen, [rate[tokens == n][0] for n in chosen], label=label, **kind)
        ax.set_title(device_title(row["profile"]))
        ax.set_xlabel("Tokens in the batch")
        ax.set_ylim(0, None)
        ax.set_xlim(0, most * 1.03)
        ax.set_xticks([0, 1024, 2048, 3072, 4096], ["0", "1,024", "2,048", "3,072", "4,096"])
        ax.legend(loc="lower right")
    axes[0].set_ylabel("Thousand tokens/s, linear layers and overhead")
    return figure
