"""How far the figures can be trusted, and what they cost: robustness of the ranking, speed."""

# ruff: noqa: E501  (lines of prose)

from __future__ import annotations

import json
from typing import Any

import numpy as np

from llmsched_gym.paper.page.text import number, table
from llmsched_gym.report import intervals

MODELLED = "as modelled"
COSTLY = {
    "decodes beside prompts 2 times as dear, known": "decodes beside prompts 2 times as dear, hidden",
    "vLLM on an RTX PRO 6000, known": "vLLM on an RTX PRO 6000, predicted as a sum",
}  # worlds in which mixing costs, and the same with predictions that leave the price out
FALLEN = ("sarathi", "slai", "srpt-capped", "on-time")  # whose figures the paragraph on the engine gives
PREDICT = FALLEN[2:]


def section_robustness(data: dict[str, Any]) -> str:
    """The ranking of schedulers in worlds where the cost model is wrong."""
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
predictions have that price and *hidden* or *as a sum* that they leave it out. Against the same device as a sum, Sarathi-Serve,
which puts decodes beside every chunk, falls furthest of those that do not predict. Leaving the price out costs schedulers that
predict much of what they attain, those that cap a batch's time most of all; predicting one that is not there costs them little. On
the RTX 4090, short of memory, all of this is less.

{table(["world", "requests/s", "Kendall's tau", "best three, attainment in %", "slai / sarathi / srpt-capped"], lines)}
"""


def section_assumption(data: dict[str, Any]) -> str:
    """What the comparison takes for granted of the engine, with the figures of the worlds in which it does not hold."""
    percents = {
        entry["world"]: {p: 100 * float(np.mean(entry["attainment"][p])) for p in FALLEN if p in entry["attainment"]}
        for entry in data["robustness"]
    }
    known = [world for world in COSTLY if world in percents]
    if not known:
        return ""
    base = percents[MODELLED]
    worlds = [MODELLED, *(w for world in known for w in (world, COSTLY[world]) if w in percents)]
    lines = [[world, *(number(percents[world].get(policy), 1) for policy in base)] for world in worlds]
    leads = [f"{percents[world]['slai'] - percents[world]['sarathi']:.1f}" for world in (MODELLED, *known)]
    lost = []
    for policy in (p for p in PREDICT if p in base):
        gaps = [percents[world][policy] - percents[COSTLY[world]][policy] for world in known]
        lost.append(f"{policy} {' and '.join(f'{gap:.1f}' for gap in gaps)}")
    left_out = f"\nLeaving the price out of predictions costs, in points: {'; '.join(lost)}." if lost else ""
    return f"""**What this assumes of the engine.** Here the time of a batch is the sum of its parts, as on the authors' engine, which runs
prefill and decode attention in kernels of their own. Where one kernel serves both, as in vLLM 0.19 on the two GPUs on which it was
measured, decodes beside a prompt chunk cost up to four times what they cost alone ([cost_model.md](cost_model.md)), and mixing
them, which is what Sarathi-Serve is for, stops paying. SLO attainment in % at 80 % of each world's fluid capacity:

{table(["world", *base], lines)}

The lead of SLAI over Sarathi-Serve is {leads[0]} points as modelled, {" and ".join(leads[1:])} where mixing costs.{left_out}
[hybrid.md](hybrid.md) has the whole comparison, the section on [robustness](#robustness-of-the-ranking) the other worlds.
"""


def section_speed(data: dict[str, Any], plan: Any) -> str:
    """Iterations per second, compiled and in Python, and how long the main table took."""
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
