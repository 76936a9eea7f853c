"""What a report says of replicas: matrices of routers and schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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
    Shown("imbalance", "Busiest replica over the mean (busy time)", 1.0, 2),
)


def has_replicas(rows: pd.DataFrame) -> bool:
    """Whether rows are of clusters."""
    return "router" in rows and bool(rows["router"].notna().any())


def matrices(rows: pd.DataFrame) -> list[Table]:
    """What routers and schedulers came to; none for rows of one engine.

    Routers in lines, schedulers in columns, a table for each figure and load. With one scheduler those would have one
    column each: the figures are the columns then, a table for each load.
    """
    if not has_replicas(rows):
        return []
    tidy = rows if "load" in rows else statistics.tidy(rows)
    binned, found = statistics.binned_loads(tidy), []
    pairs = rows.drop_duplicates("policy").set_index("policy")[["router", "scheduler"]]
    routers, schedulers = (list(dict.fromkeys(pairs[name])) for name in ("router", "scheduler"))
    present = [shown for shown in MATRICES if statistics.has(binned, shown.column)]
    if len(schedulers) == 1:
        return _figures_of_routers(binned, tidy, pairs["router"], present, schedulers[0])
    for shown in present:
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


def _figures_of_routers(
    binned: pd.DataFrame, tidy: pd.DataFrame, routers: pd.Series, present: Sequence[Shown], scheduler: str
) -> list[Table]:
    """Routers, by policy, in lines and figures in columns, a table for each load."""
    cells: dict[Any, Any] = {
        (shown, line.load, line.policy): line
        for shown in present
        for line in statistics.over_seeds(binned, shown.column).itertuples()
    }
    found = []
    for load in sorted(binned["load"].unique()):
        lines = [
            [Cell(str(router), kind=HEAD), *(_cell(cells.get((shown, load, policy)), shown) for shown in present)]
            for policy, router in routers.items()
        ]
        title = f"Routers with {scheduler} at {load:.3g} {statistics.load_unit(tidy)}"
        found.append(Table(title, [], ["router", *(shown.title for shown in present)], lines))
    return found


def _cell(line: object, shown: Shown) -> Cell:
    """A mean with its interval; empty where a router had no run with a scheduler."""
    value = getattr(line, "value", np.nan)
    if not np.isfinite(value):
        return Cell("")
    low, high = (shown.scale * getattr(line, end) for end in ("low", "high"))
    interval = f"{number(low, shown.decimals)}-{number(high, shown.decimals)}" if np.isfinite([low, high]).all() else ""
    return Cell(number(shown.scale * value, shown.decimals), interval)
