"""What a report says of replicas: matrices of routers and schedulers, and what each replica did."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from llmsched_gym.report import statistics
from llmsched_gym.report.tables import HEAD, Cell, Table
from llmsched_gym.text import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


def plot_replicas(rows: pd.DataFrame) -> Figure:
    """Busy share of each replica, and its hit rate where something is cached: a panel a policy, means over seeds."""
    import matplotlib.pyplot as plt

    policies = list(dict.fromkeys(rows["policy"]))
    columns = min(4, len(policies))
    lines = -(-len(policies) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(2.6 * columns + 0.6, 2.1 * lines + 0.5), sharey=True, squeeze=False
    )
    for panel in panels.flat[len(policies) :]:
        panel.set_visible(False)
    for panel, policy in zip(panels.flat, policies, strict=False):
        own = rows[rows["policy"] == policy]
        busy = np.array(own["busy_share_by_replica"].tolist(), float)
        hits = np.array(own["hit_rate_by_replica"].tolist(), float)
        places = np.arange(busy.shape[1])
        cached = np.isfinite(hits).any()
        width = 0.4 if cached else 0.8
        panel.bar(
            places - (width / 2 if cached else 0.0), 100 * busy.mean(axis=0), width, color="#0072b2", label="busy"
        )
        if cached:
            hit = np.nanmean(np.where(np.isfinite(hits), hits, np.nan), axis=0)
            panel.bar(places + width / 2, 100 * np.nan_to_num(hit), width, color="#e69f00", label="hit rate")
        panel.set_title(policy, fontsize=8)
        panel.set_xticks(places[:: max(1, len(places) // 8)])
        panel.set_ylim(0, 100)
        panel.tick_params(labelsize=8)
    for panel in panels[:, 0]:
        panel.set_ylabel("%", fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel("replica", fontsize=8)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.legend(handles, labels, fontsize=8, ncols=2, frameon=False, loc="upper right")
    return figure
