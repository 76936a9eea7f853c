"""What an arena says in numbers: a ranking for each objective, paired with a reference, and who is on the Pareto front.

Pure functions of an arena's rows. Every world (a suite at a load) counts the same. Shares are averaged over worlds,
seed by seed; latencies and throughput are ratios to the reference in the same world on the same requests, averaged as
logarithms. Seeds are independent, worlds of a seed are not, so the intervals are Student's t over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from llmsched_gym.report import intervals
from llmsched_gym.report.statistics import ReportError
from llmsched_gym.report.tables import BEST, HEAD, TIED, Cell, Table
from llmsched_gym.report.text import interval, number

LATE_S = 600.0
"""Latencies count as at most this, also infinite ones: so a mean of logarithms exists."""
SHARE, RATIO = "share", "ratio"


@dataclass(frozen=True)
class Objective:
    """A figure by which schedulers are ranked."""

    name: str  # of the column
    title: str
    unit: str  # of the figures shown
    better: int  # 1: more is better, -1: less is
    kind: str  # SHARE: averaged; RATIO: compared as ratios
    digits: int


OBJECTIVES = (
    Objective("attainment", "SLO attainment", "%", 1, SHARE, 1),
    Objective("ttft_p99_s", "TTFT p99", "s", -1, RATIO, 2),
    Objective("strict_itl_p99_s", "Strict users' ITL p99", "s", -1, RATIO, 3),
    Objective("throughput", "Throughput", "tokens/s", 1, RATIO, 0),
    Objective("worst_tenth", "Fairness: attainment of the worst tenth of prompts by length", "%", 1, SHARE, 1),
)
FRONT = ("attainment", "ttft_p99_s", "throughput")
"""Objectives of the Pareto front."""


def figures(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A line per run: who, where, and the figures of OBJECTIVES; nan where a run has nothing to judge."""
    if not rows:
        raise ReportError("rows: expected at least one run, got none")
    lines = []
    for row in rows:
        tenths = [share for share in row["attained_by_decile"] if share is not None]
        strict = row["itl_p99_s_by_class"]["strict"] if row["num_requests_by_class"]["strict"] else math.nan
        lines.append(
            {
                "label": row["label"],
                "clairvoyant": row["clairvoyant"],
                "suite": row["arena_suite"],
                "profile": row["arena_profile"],
                "share": row["share"],
                "seed": row["seed"],
                "attainment": 100.0 * row["slo_attainment"],
                "ttft_p99_s": _at_most(row["ttft_p99_s"]),
                "strict_itl_p99_s": _at_most(strict),
                "throughput": math.nan if row["throughput_tok_s"] is None else max(row["throughput_tok_s"], 1e-3),
                "worst_tenth": 100.0 * min(tenths) if tenths else math.nan,
            }
        )
    return pd.DataFrame(lines)


def _at_most(seconds: float | None) -> float:
    """A latency, the latest one where there is none."""
    return LATE_S if seconds is None else min(float(seconds), LATE_S)


@dataclass(frozen=True)
class Standing:
    """A scheduler's place in a ranking."""

    label: str
    clairvoyant: bool
    value: float  # mean over worlds and seeds; of ratios the geometric one
    by_load: tuple[float, ...]
    change: float  # against the reference: points of shares, a factor of ratios
    change_ends: tuple[float, float] | None
    tied: bool  # the best that knows no lengths, or not told from it


def ranking(table: pd.DataFrame, objective: Objective, reference: str) -> list[Standing]:
    """The schedulers of one profile, the best first; those that are told output lengths are ranked but never the best.

    Raises ReportError where the reference has no runs.
    """
    labels = list(dict.fromkeys(table["label"]))
    if reference not in labels:
        raise ReportError(f"reference: expected one of {', '.join(labels)}, got {reference!r}")
    values = table.copy()
    if objective.kind == RATIO:
        values[objective.name] = np.log(values[objective.name])
    cells = values.pivot_table(index=["suite", "share", "seed"], columns="label", values=objective.name)
    knowing = dict(zip(table["label"], table["clairvoyant"], strict=True))
    back = math.exp if objective.kind == RATIO else float
    means = cells.mean()
    rivals = [label for label in labels if not knowing[label]] or labels
    best = max(rivals, key=lambda label: objective.better * means.get(label, -math.inf))
    found = []
    for label in labels:
        if label not in cells:
            continue
        apart = (cells[label] - cells[reference]).groupby("seed").mean()
        to_best = intervals.interval((cells[label] - cells[best]).groupby("seed").mean().tolist())
        ends = intervals.interval(apart.tolist()) if label != reference else None
        found.append(
            Standing(
                label,
                bool(knowing[label]),
                back(means[label]),
                tuple(back(mean) for mean in cells[label].groupby("share").mean()),
                back(apart.mean()),
                None if ends is None else (back(ends[0]), back(ends[1])),
                label == best or (label in rivals and to_best is not None and to_best[0] <= 0.0 <= to_best[1]),
            )
        )
    return sorted(found, key=lambda standing: -objective.better * standing.value)


def front(table: pd.DataFrame, reference: str) -> list[str]:
    """Those whom nobody beats in all of FRONT at once, of those that know no output lengths, the best attainment first.

    By means alone: a difference that no interval tells apart can put one on it.
    """
    own = table[~table["clairvoyant"]] if not table["clairvoyant"].all() else table
    objectives = [objective for objective in OBJECTIVES if objective.name in FRONT]
    standings = [{s.label: o.better * s.value for s in ranking(own, o, reference)} for o in objectives]
    labels = [label for label in standings[0] if all(label in found for found in standings)]

    def beats(a: str, b: str) -> bool:
        pairs = [(found[a], found[b]) for found in standings]
        return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)

    return [label for label in labels if not any(beats(other, label) for other in labels)]


def ranking_table(objective: Objective, found: Sequence[Standing], loads: Sequence[float], title: str) -> Table:
    """A ranking as it is printed: figures by load, and the change against the reference."""
    labels = ["scheduler", f"all loads ({objective.unit})", "against the reference"]
    labels += [f"{load:g}" for load in loads]
    lines = []
    for standing in found:
        name = standing.label + (" ‡" if standing.clairvoyant else "")
        kind = "" if not standing.tied else BEST if standing is next(s for s in found if s.tied) else TIED
        cells = [Cell(name, kind=HEAD), Cell(number(standing.value, objective.digits), "", kind)]
        lines.append([*cells, _change(objective, standing), *(_load(objective, value) for value in standing.by_load)])
    return Table(title, [("", 3), ("load", len(loads))], labels, lines)


def _load(objective: Objective, value: float) -> Cell:
    return Cell(number(value, objective.digits), heat=value / 100.0 if objective.kind == SHARE else None)


def _change(objective: Objective, standing: Standing) -> Cell:
    """Points, or a factor, with its interval."""
    if standing.change_ends is None and standing.change in (0.0, 1.0):
        return Cell("base")
    digits = 1 if objective.kind == SHARE else 2
    sign = "×" if objective.kind == RATIO else "+" if standing.change > 0 else ""
    text = sign + number(standing.change, digits)
    ends = standing.change_ends
    return Cell(text, "" if ends is None else interval(*ends, digits))


def winners_table(table: pd.DataFrame, reference: str) -> Table:
    """Who is best in each suite by each objective, over all loads, and how many are not told from it."""
    lines = []
    for suite, own in table.groupby("suite", sort=False):
        cells = [Cell(str(suite), kind=HEAD)]
        for objective in OBJECTIVES:
            tied = [s.label for s in ranking(own, objective, reference) if s.tied]
            more = f"and {len(tied) - 1} more" if len(tied) > 1 else ""
            cells.append(Cell(tied[0] if tied else "–", more))
        lines.append(cells)
    labels = ["suite", *(objective.title.partition(":")[0] for objective in OBJECTIVES)]
    return Table("Best in each suite, all loads", [], labels, lines, ["In brackets: how many are not told from it."])
