"""How far the figures can be trusted, and what they cost: robustness of the ranking, speed."""

# ruff: noqa: E501  (lines of prose)

from __future__ import annotations

import json
from typing import Any

import numpy as np

from llmsched_gym.paper.page.text import number, table
from llmsched_gym.report import intervals

KNOWN_TWICE = "decodes beside prompts 2 times as dear, known"
KNOWN_VLLM = "vLLM on an RTX PRO 6000, known"
FALLEN = ("sarathi", "slai", "srpt-capped", "on-time")  # whose figures the paragraph on the engine gives


def section_robustness(data: dict[str, Any]) -> str:
    base = data["robustness"][0]["attainment"]
    policies = list(base)
    lines = []
    for entry in data["robustness"]:
        own = entry["attainment"]
        tau, bounds = intervals.rank_agreement(base, own)
        agreement = f"{tau:.2f}" if own == base or bounds is None else f"{tau:.2f} [{bounds[0]:.2f}, {bounds[1]:.2f}]"
        order = [policies[i] for i in np.argsort([-np.mean(own[p]) for p in policies], kind="stable")]
        top = ", ".join(f"{p} {100 * np.mean(own[p]):.1f}" for p in order[:3])
        shown = (f"{100 * np.mean(own[p]):.1f}" for p in ("slai", "sarathi", "srpt-capped") if p in own)
        lines.append([entry["world"], number(entry["qps"]), agreement, top, " / ".join(shown)])
    return f"""## Robustness of the ranking

Schedulers ranked by SLO attainment at 80 % of each world's fluid capacity, where the cost model is wrong in one way or another;
Kendall's tau against the ranking as modelled (1: the same order). Its interval counts a pair of schedulers as it stands in both
worlds where paired 95 % intervals over seeds tell the two apart, and both ways where they do not. The second line, the same
world with other seeds, is how well a ranking repeats itself. What never changes is that SLAI beats Sarathi-Serve. What
does is the place of the schedulers that cap a batch's predicted time at
0.95 of the TBT SLO (srpt-capped, feasible-first): the cap has no margin, so a device that is slower or noisier
than predicted, or on which decodes cost more beside a prompt than predicted, costs them their strict users.

Where decodes cost more beside a prompt chunk (an engine whose attention kernel serves both phases at once), *known* means that
predictions have that price and *hidden* or *as a sum* that they leave it out. Sarathi-Serve, which puts decodes beside every
chunk, falls furthest. Leaving the price out costs schedulers that predict much of what they attain; predicting one
that is not there costs them little.

{table(["world", "requests/s", "Kendall's tau", "best three, attainment in %", "slai / sarathi / srpt-capped"], lines)}
"""


def section_assumption(data: dict[str, Any]) -> str:
    """What the comparison takes for granted of the engine, with the figures of the worlds in which it does not hold."""
    worlds = {entry["world"]: entry["attainment"] for entry in data["robustness"]}
    shown = [world for world in (KNOWN_TWICE, KNOWN_VLLM) if world in worlds]
    if not shown:
        return ""
    parts = []
    for world in ("as modelled", *shown):
        figures = ", ".join(f"{p} {100 * np.mean(worlds[world][p]):.1f}" for p in FALLEN if p in worlds[world])
        parts.append(f"{world}: {figures}")
    return f"""**What this assumes of the engine.** Here the time of a batch is the sum of its parts, as on the authors' engine, which runs
prefill and decode attention in kernels of their own. Where one kernel serves both, as vLLM 0.19 does on two GPUs on which it was
measured, decodes beside a prompt chunk cost up to four times what they cost alone ([cost_model.md](cost_model.md)). Then
mixing them, which is what Sarathi-Serve is for, stops paying: attainment in % at 80 % of each world's capacity is, {"; ".join(parts)}.
The paper's order (SLAI above Sarathi-Serve) holds and widens; putting decodes off pays more than on a sum; and who predicts batch
times without that price loses much of what it attains. [hybrid.md](hybrid.md) has the whole comparison.
"""


def section_speed(data: dict[str, Any], plan: Any) -> str:
    speed = data["speed"]
    ratio = speed["compiled"]["iterations_per_s"] / speed["python"]["iterations_per_s"]
    same = speed["compiled"]["sim_time_s"] == speed["python"]["sim_time_s"]
    wall = plan.out / "main_table_wall_s.json"
    took = ""
    if wall.is_file():
        timed = json.loads(wall.read_text(encoding="utf-8"))
        own, learned = timed["built_in"], timed["learned"]
        took = f"""
The main table's {own["runs"]} runs of built-in schedulers took {own["wall_s"]:.0f} s with {timed["workers"]} processes, the {learned["runs"]} of the learned policy, a network
that decides at every batch, {learned["wall_s"]:.0f} s more."""
    return f"""## Speed

Measured on {speed["machine"]["cpu"]} ({speed["machine"]["cores"]} cores), the only figures here that another run does not repeat. Sarathi-Serve compiled:
{speed["compiled"]["iterations_per_s"]:,.0f} iterations/s; the same rules as a plain-Python scheduler on the same engine and requests:
{speed["python"]["iterations_per_s"]:,.0f}; ratio **{ratio:,.0f}**. {"Both runs end at the same simulated instant." if same else "The two differ in when they admit."}{took}
"""
