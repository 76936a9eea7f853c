"""The sim-to-real page: pure functions from rows, steps and their summary to figures, Markdown and one HTML file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from llmsched_gym.cost import Profile
from llmsched_gym.real_backend.sim2real.agreement import ABSOLUTE, RELATIVE, paired
from llmsched_gym.real_backend.sim2real.small_world import SmallWorld
from llmsched_gym.report.draw import policy_styles, styled
from llmsched_gym.text import number, table

PREFILL, DECODE, FAINT = "#e69f00", "#0072b2", "#68737f"
NAMES = {
    "ttft_p50_s": "TTFT p50",
    "ttft_p99_s": "TTFT p99",
    "itl_p50_s": "ITL p50",
    "itl_p99_s": "ITL p99",
    "slo_attainment": "SLO attainment",
    "mean_utility": "mean utility",
}
BAND = 0.15
"""Half-width of the band around perfect prediction in the plot of step times."""
MAX_POINTS = 4000
CLEAR = "0.02 in utility or attainment, 10 % in TTFT"


@styled
def plot_steps(steps: pd.DataFrame) -> Figure:
    """Predicted against measured time of every batch of the real runs."""
    figure = Figure(figsize=(6.0, 4.6), layout="constrained")
    ax = figure.subplots()
    shown = steps if len(steps) <= MAX_POINTS else steps.sample(MAX_POINTS, random_state=0)
    prompts = shown["prefill_tokens"] > 0
    for mask, colour, name in ((~prompts, DECODE, "decodes only"), (prompts, PREFILL, "with prompt tokens")):
        part = shown[mask]
        ax.scatter(1e3 * part["duration_s"], 1e3 * part["predicted_s"], s=7, alpha=0.3, lw=0, color=colour, label=name)
    low, high = (1e3 * f(shown[["duration_s", "predicted_s"]].to_numpy()) for f in (np.min, np.max))
    ends = np.array([low, high])
    ax.plot(ends, ends, color=FAINT, lw=1)
    ax.fill_between(
        ends, (1 - BAND) * ends, (1 + BAND) * ends, color=FAINT, alpha=0.15, lw=0, label=f"within {BAND:.0%}"
    )
    ax.set(xlabel="Measured batch time (ms)", ylabel="Predicted batch time (ms)")
    _log(ax)
    ax.set_title("Batch time, profile against model")
    for mark in ax.legend(loc="upper left").legend_handles:
        if mark is not None:
            mark.set_alpha(0.9)
    return figure


@styled
def plot_pairs(pairs: pd.DataFrame) -> Figure:
    """Each run's figures in the simulator against those on the model: one point per policy and load."""
    figure = Figure(figsize=(9.0, 6.4), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    styles = policy_styles(list(pairs["policy"].unique()))
    for ax, name in zip(axes, ("ttft_p50_s", "itl_p99_s", "slo_attainment", "mean_utility"), strict=True):
        _diagonal(ax, pairs, name, styles)
    handles = [Line2D([], [], color=s.colour, marker=s.marker, ls="", label=p) for p, s in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6))
    return figure


def _diagonal(ax: Axes, pairs: pd.DataFrame, name: str, styles: dict[str, Any]) -> None:
    unit = 1e3 if name in RELATIVE else 1.0
    real, sim = unit * pairs[f"{name}_real"], unit * pairs[f"{name}_sim"]
    finite = np.isfinite(real) & np.isfinite(sim)
    for i in np.flatnonzero(finite):
        style = styles[pairs["policy"].iloc[i]]
        ax.plot(real.iloc[i], sim.iloc[i], color=style.colour, marker=style.marker, ls="", alpha=0.85)
    if name in RELATIVE:
        _log(ax)
    low, high = min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])
    ax.plot([low, high], [low, high], color=FAINT, lw=1, zorder=1)
    what = " (ms)" if name in RELATIVE else ""
    ax.set(xlabel=f"On the model{what}", ylabel=f"In the simulator{what}", xlim=(low, high), ylim=(low, high))
    ax.set_title(NAMES[name][0].upper() + NAMES[name][1:])


def _log(ax: Axes) -> None:
    """Log scales with plain numbers at 1, 2, 5."""
    ax.set(xscale="log", yscale="log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())


@styled
def plot_order(pairs: pd.DataFrame, name: str = "mean_utility") -> Figure:
    """A figure against load, on the model and in the simulator side by side: the same order of lines is agreement."""
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, side, title in zip(axes, ("real", "sim"), ("on the model", "in the simulator"), strict=True):
        for policy, style in policy_styles(list(pairs["policy"].unique())).items():
            own = pairs[pairs["policy"] == policy].sort_values("load")
            ax.plot(
                own["load"], own[f"{name}_{side}"], color=style.colour, marker=style.marker, ls=style.dash, label=policy
            )
        ax.set_xlabel("Load (share of saturation)")
        ax.set_title(f"{NAMES[name][0].upper()}{NAMES[name][1:]}, {title}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))
    return figure


def write(
    rows: pd.DataFrame, steps: pd.DataFrame, found: dict[str, Any], profile: Profile, world: SmallWorld, out: Path
) -> None:
    """`report.html`, which needs no other file, and `report.md` with the same tables and its figures beside it."""
    pairs = paired(rows)
    figures = {
        "steps.png": (plot_steps(steps), "Each point is one batch of a real run."),
        "pairs.png": (plot_pairs(pairs), "Means over seeds; on the line, simulator and model agree."),
        "order.png": (plot_order(pairs), order_caption(found)),
    }
    intro = introduction(rows, found, profile, world)
    tables = [
        ("Batch time", *step_table(found)),
        ("Agreement on the order of policies", *ranking_table(found)),
        ("Every policy and load: on the model, in brackets the simulator's error", *pair_table(pairs)),
    ]
    text, body = ["# Simulator against model", "", *intro, ""], ["<h1>Simulator against model</h1>"]
    body += [f"<p>{html.escape(line)}</p>" for line in intro if line]
    for title, header, lines in tables:
        text += [f"## {title}", "", table(header, lines), ""]
        body += [f"<h2>{html.escape(title)}</h2>", _html_table(header, lines)]
    text += ["## Figures", ""]
    for name, (figure, caption) in figures.items():
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=130)
        (out / name).write_bytes(png.getvalue())
        text += [f"![{caption}]({name})", ""]
        code = base64.b64encode(png.getvalue()).decode()
        body.append(f'<figure><img alt="{caption}" src="data:image/png;base64,{code}">')
        body.append(f"<figcaption>{caption}</figcaption></figure>")
    (out / "report.md").write_text("\n".join(text), encoding="utf-8")
    (out / "report.html").write_text(PAGE.replace("BODY", "\n".join(body)), encoding="utf-8")


def introduction(rows: pd.DataFrame, found: dict[str, Any], profile: Profile, world: SmallWorld) -> list[str]:
    """What was compared, and the result in words."""
    step = found["step_time"]
    utility, attainment, ttft = (number(tau, ".2f") for tau in found["mean_kendall_tau"].values())
    runs, s = len(rows) // 2, world.scenario
    fit = found["calibration"]
    held_out = f" (held-out error of its calibration {fit['mape']:.1%})" if fit else ""
    return [
        f"{runs} runs of {int(rows['num_requests'].iloc[0])} requests each on {found['setup']}, and the same runs in "
        f"the simulator with profile {profile.name}{held_out} and jitter {found['jitter']:g}: equal requests, policies "
        "and predictions.",
        "",
        f"Batch times are predicted within {step['mape']:.1%} on average, {step['total']:+.1%} in total, over "
        f"{step['steps']:,} batches; with each run's own speed taken out, within {step['mape_at_run_speed']:.1%}. "
        "Kendall's tau between the policies' order on the model and in the simulator, mean over loads: "
        f"{utility} by mean utility, {attainment} by SLO attainment, {ttft} by median TTFT. Of the pairs of policies "
        f"that differ clearly on the model (by {CLEAR}), {found['clear_kept']} of {found['clear_pairs']} keep their "
        "order in the simulator.",
        "",
        f"World: prompts and outputs of at most {s.max_model_len} tokens, token budget {world.token_budget}, "
        f"{s.num_kv_blocks} KV blocks; SLOs: TTFT {1e3 * s.ttft_slo_s:.0f} ms + {1e3 * s.ttft_slo_per_token_s:.2f} ms "
        f"per prompt token, TBT {1e3 * s.strict_tbt_slo_s:.0f} ms (strict) and {1e3 * s.relaxed_tbt_slo_s:.0f} ms: "
        f"the default suite's times {world.time_unit:.2g}. Load 1 is {found['saturation_qps']:.2f} requests/s.",
    ]


Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def step_table(found: dict[str, Any]) -> Table:
    step = found["step_time"]
    header = ("Batches", "MAPE", "MAPE at each run's speed", "95 % within", "Mean signed error", "Error of the sum")
    return header, [
        (
            f"{step['steps']:,}",
            *(f"{step[k]:.1%}" for k in ("mape", "mape_at_run_speed", "p95_ape")),
            *_signed(step, "bias", "total"),
        )
    ]


def order_caption(found: dict[str, Any]) -> str:
    """What the figure of both sides shows, as it came out."""
    kept, pairs = found["clear_kept"], found["clear_pairs"]
    if not pairs:
        return "Policies on both sides: no two differ clearly on the model."
    return f"Policies on both sides: {kept} of {pairs} clearly different pairs are in the same order."


def ranking_table(found: dict[str, Any]) -> Table:
    header = ("Load", "Ranked by", "Kendall tau", "Clearly different pairs in the same order")
    return header, [
        (f"{r['load']:g}", NAMES[r["by"]], number(r["tau"], ".2f"), f"{r['clear_kept']} of {r['clear_pairs']}")
        for r in found["rankings"]
    ]


def pair_table(pairs: pd.DataFrame) -> Table:
    """Figures on the model, and in brackets the simulator's error: relative for times, difference for shares."""
    header = ("Load", "Policy", *(f"{NAMES[n]} (ms)" for n in RELATIVE), *(NAMES[n] for n in ABSOLUTE))
    lines = []
    for _, pair in pairs.sort_values(["load", "policy"], kind="stable").iterrows():
        cells = [f"{number(1e3 * pair[f'{n}_real'], ',.1f')} ({number(pair[f'{n}_error'], '+.1%')})" for n in RELATIVE]
        cells += [f"{pair[f'{n}_real']:.3f} ({number(pair[f'{n}_error'], '+.3f')})" for n in ABSOLUTE]
        lines.append((f"{pair['load']:g}", pair["policy"], *cells))
    return header, lines


def _signed(values: dict[str, float], *names: str) -> list[str]:
    return [f"{values[name]:+.1%}" for name in names]


def _html_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    words = {i for line in lines for i, cell in enumerate(line) if cell[:1].isalpha()}

    def row(cells: Sequence[str], tag: str) -> str:
        opened = (f'<{tag} class="text">' if i in words else f"<{tag}>" for i in range(len(cells)))
        return "<tr>" + "".join(f"{o}{html.escape(c)}</{tag}>" for o, c in zip(opened, cells, strict=True)) + "</tr>"

    return "<table>" + row(header, "th") + "".join(row(line, "td") for line in lines) + "</table>"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Simulator against model</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #dfe4ea; white-space: nowrap; }
th { vertical-align: bottom; } .text { text-align: left; }
figure { margin: 1.5rem 0; } img { max-width: 100%; } figcaption { color: #68737f; font-size: .9rem; }
</style></head><body>
BODY
</body></html>
"""
