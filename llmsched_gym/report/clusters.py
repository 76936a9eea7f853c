"""What a report says of replicas: matrices of routers and schedulers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from llmsched_gym.report import statistics
from llmsched_gym.report.tables import HEAD, Cell, Table
from llmsched_gym.text import number


class Shown(NamedTuple):
    """A column of rows that has a matrix."""

    column: str
    title: str
    scale: float
    decimals: int


MATRICES = (
    Shown("slo_attainment", "SLO attainment (%)", 100.0, 1),
    Shown("mean_utility", "Mean utility", 1.0, 3),
    Shown("ttft_p99_s", "p99 of TTFT (s)", 1.0, 2),
    Shown("prefix_hit_rate", "Prefix hit rate (%)", 100.0, 1),
    Shown("imbalance", "Busy time of the busiest replica over the mean", 1.0, 2),
)


def has_replicas(rows: pd.DataFrame) -> bool:
    """Whether rows are of clusters."""
    return "router" in rows and bool(rows["router"].notna().any())


def matrices(rows: pd.DataFrame) -> list[Table]:
    """Routers in lines, schedulers in columns, a table for each figure and load; none for rows of one engine."""
    if not has_replicas(rows):
        return []
    tidy = rows if "load" in rows else statistics.tidy(rows)
    binned, found = statistics.binned_loads(tidy), []
    pairs = rows.drop_duplicates("policy").set_index("policy")[["router", "scheduler"]]
    routers, schedulers = (list(dict.fromkeys(pairs[name])) for name in ("router", "scheduler"))
    for shown in MATRICES:
        if not statistics.has(binned, shown.column):
            continue
        values = statistics.over_seeds(binned, shown.column)
        for load, group in values.groupby("load"):
            by_pair = {tuple(pairs.loc[str(line.policy)]): line for line in group.itertuples()}
            lines = [
                [Cell(router, kind=HEAD), *(_cell(by_pair.get((router, s)), shown) for s in schedulers)]
                for router in routers
            ]
            title = f"{shown.title} at {load:.3g} {statistics.load_unit(tidy)}"
            found.append(Table(title, [], ["router", *schedulers], lines))
    return found


def _cell(line: object, shown: Shown) -> Cell:
    """A mean with its interval; empty where a router had no run with a scheduler."""
    value = getattr(line, "value", np.nan)
    if not np.isfinite(value):
        return Cell("")
    low, high = (shown.scale * getattr(line, end) for end in ("low", "high"))
    interval = f"{number(low, shown.decimals)}-{number(high, shown.decimals)}" if np.isfinite([low, high]).all() else ""
    return Cell(number(shown.scale * value, shown.decimals), interval)
