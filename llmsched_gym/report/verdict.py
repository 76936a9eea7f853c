"""Who won: the policy with the highest SLO attainment, and whether its lead over the others can be told from chance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from llmsched_gym.report import intervals, statistics
from llmsched_gym.report.bounds import ordinary
from llmsched_gym.report.tables import BEST, HEAD, Cell, Table
from llmsched_gym.report.text import estimate, interval, names, number, telling


@dataclass(frozen=True)
class Verdict:
    """The leader over some runs and its lead over the next one, as shares; nan ends where there is no interval."""

    leader: str
    share: float  # attained, mean over seeds
    next: str
    lead: float  # mean over seeds of paired differences
    low: float
    high: float
    tied: tuple[str, ...]  # whose paired difference has an interval with 0 in it
    judged: bool  # whether there are intervals

    @property
    def is_clear(self) -> bool:
        """Whether the interval of the lead over every other policy lies above 0."""
        return self.judged and not self.tied and self.lead > 0


def verdict(rows: pd.DataFrame) -> Verdict | None:
    """The verdict over all loads that all policies ran, each weighing the same; None where there is nothing to compare.

    Rows are tidy. Pairs are runs on the same seed's requests at all these loads.
    """
    judged = ordinary(statistics.policies_of(rows))
    own = rows[rows["policy"].isin(judged) & rows["load"].isin(shared_loads(rows))]
    wide = own.pivot_table(index="seed", columns=["policy", "load"], values="slo_attainment").dropna()
    if len(judged) < 2 or wide.empty:
        return None
    shares = wide.T.groupby(level=0).mean().T.reindex(columns=judged).dropna(axis=1)  # (seeds, policies)
    order = shares.mean().sort_values(ascending=False, kind="stable")
    if len(order) < 2:
        return None
    leader, second = str(order.index[0]), str(order.index[1])
    known = statistics.has_intervals(rows) and len(shares) >= intervals.MIN_SEEDS
    ends, tied = {}, []
    for other in order.index[1:]:
        found = intervals.difference(shares[leader].tolist(), shares[other].tolist()) if known else None
        ends[str(other)] = found or (np.nan, np.nan)
        if found is not None and found[0] <= 0.0:
            tied.append(str(other))
    lead = float((shares[leader] - shares[second]).mean())
    return Verdict(leader, float(order.iloc[0]), second, lead, *ends[second], tuple(tied), known)


def shared_loads(rows: pd.DataFrame) -> list[float]:
    """The loads that all policies ran, but for clairvoyant ones; folders that are compared may differ in them."""
    own = rows[rows["policy"].isin(ordinary(statistics.policies_of(rows)))]
    counts = own.groupby("load")["policy"].nunique()
    return [float(load) for load in counts.index[counts == own["policy"].nunique()]]


def sentence(rows: pd.DataFrame) -> str:
    """The verdict in a sentence or two; nothing where there is nothing to compare."""
    found = verdict(rows)
    if found is None:
        return ""
    loads, shared = rows["load"].nunique(), shared_loads(rows)
    where = f"over the {loads} loads" if loads > 1 else "at this load"
    if len(shared) < loads:
        where = f"at what all ran ({', '.join(f'{load:.3g}' for load in shared)} {statistics.load_unit(rows)})"
    ends = 100 * found.lead, 100 * found.low, 100 * found.high
    lead = estimate(*ends, " points", telling(*ends))
    share = f"{number(100 * found.share, 1)} % SLO attainment {where}"
    if abs(found.lead) < 5e-4 and not found.judged:
        return f"**No clear winner:** `{found.leader}` and `{found.next}` attain the same, {share}."
    if found.is_clear:
        return f"**Winner: `{found.leader}`**, {share}: {lead} more than `{found.next}`, the next, paired by seed."
    if found.judged:
        text = f"**No clear winner:** `{found.leader}` leads with {share}, {lead} more than `{found.next}`"
        return f"{text}, but its interval against {names(found.tied)} contains 0."
    why = "too few seeds to rule out chance"
    if not statistics.has_intervals(rows):
        why = "all seeds have the same requests, so there is no interval"
    return f"**No clear winner:** `{found.leader}` leads with {share}, {lead} more than `{found.next}` ({why})."


def table(rows: pd.DataFrame) -> Table | None:
    """The verdict at every load that several policies ran; None with a single load or policy."""
    loads = sorted(rows["load"].unique())
    found = {load: item for load in loads if (item := verdict(rows[rows["load"] == load])) is not None}
    if len(loads) < 2 or not found:
        return None
    lines = []
    for load, item in found.items():
        cells = [
            Cell(item.leader, "", BEST if item.is_clear else ""),
            Cell(number(100 * item.share, 1)),
            Cell(item.next),
        ]
        digits = telling(100 * item.lead, 100 * item.low, 100 * item.high)
        lead = Cell(number(100 * item.lead, digits), interval(100 * item.low, 100 * item.high, digits))
        said = "clear" if item.is_clear else "not clear" if item.judged else "unknown"
        lines.append([Cell(f"{load:.3g}", kind=HEAD), *cells, lead, Cell(said)])
    labels = [f"load ({statistics.load_unit(rows)})", "leader", "attains (%)", "next", "lead (points)", "lead is"]
    return Table("Who leads at each load, and by how much (paired by seed)", [], labels, lines)
