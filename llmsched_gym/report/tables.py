"""Tables ready to print, for both kinds of report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from llmsched_gym.paper import constants
from llmsched_gym.report import statistics
from llmsched_gym.report.bounds import ordinary
from llmsched_gym.report.statistics import METRICS, Metric
from llmsched_gym.report.text import decimals, interval, load_label, number, same, seeds_label

BEST, TIED, GREY, HEAD = "best", "tied", "grey", "head"


class Cell(NamedTuple):
    """One cell of a printed table."""

    text: str
    interval: str = ""
    kind: str = ""  # best, tied, grey, head or nothing
    heat: float | None = None  # 0 to 1, shown as a tint


class Table(NamedTuple):
    """A printed table: the first cell of a row is its head."""

    title: str
    groups: list[tuple[str, int]]  # headings over so many columns
    labels: list[str]  # of columns, units included
    rows: list[list[Cell]]
    notes: Sequence[str] = ()


def shown_metrics(table: pd.DataFrame, metrics: Sequence[Metric] = METRICS) -> list[Metric]:
    """The columns of comparison tables: shares of requests not served only if some run has one that is not 0."""
    used = table.groupby("metric")["value"].max()
    return [m for m in metrics if m.column in used and (m.group != "Not served" or used[m.column] > 0)]


def comparison_tables(
    rows: pd.DataFrame, table: pd.DataFrame, metrics: Sequence[Metric] = METRICS, what: str = ""
) -> list[Table]:
    """One table per load from :func:`statistics.comparison_table`, none where no run has such figures."""
    metrics, policies = shown_metrics(table, metrics), statistics.policies_of(rows)
    if not metrics:
        return []
    labels = ["policy", *(f"{m.label} ({m.unit})".strip() for m in metrics)]
    found = []
    for load, own in table.groupby("load"):
        cells = own.set_index(["policy", "metric"])
        present = [p for p in policies if own.loc[own["policy"] == p, "num_seeds"].max() > 0]
        lines = [[Cell(p, kind=HEAD), *(_cell(m, cells.loc[p, m.column]) for m in metrics)] for p in present]
        title = f"{load_label(rows, float(load))}, {seeds_label(int(own['num_seeds'].max()))}"
        title = f"{what}, {title}" if what else title[0].upper() + title[1:]
        found.append(Table(title, [("", 1), *_groups(metrics)], labels, lines))
    return found


def _groups(metrics: Sequence[Metric]) -> list[tuple[str, int]]:
    groups = list(dict.fromkeys(m.group for m in metrics))
    return [(g, sum(m.group == g for m in metrics)) for g in groups]


def _cell(metric: Metric, line: pd.Series) -> Cell:
    value, low, high = (metric.scale * float(line[c]) for c in ("value", "low", "high"))
    digits = decimals(value) if metric.digits is None else metric.digits
    kind = GREY if line["grey"] else BEST if line["best"] else TIED if line["tied"] else ""
    ends, seeds = interval(low, high, digits), int(line["num_seeds"])
    if 0 < line["num_infinite"] < seeds:
        ends = f"{ends + '; ' if ends else ''}∞ in {line['num_infinite']} of {seeds} seeds"
    return Cell(number(value, digits), ends, "" if math.isnan(value) else kind)


def attainment_matrix(rows: pd.DataFrame) -> Table | None:
    """Mean SLO attainment of every policy at every load; None with a single load."""
    means = statistics.over_seeds(statistics.binned_loads(rows), "slo_attainment")
    wide = means.pivot(index="policy", columns="load", values="value").reindex(statistics.policies_of(rows))
    if wide.shape[1] < 2:
        return None
    drawn = bool(rows["drawn"].any())
    labels = ["policy", *(f"{'about ' if drawn else ''}{load:.3g}" for load in wide.columns)]
    lines = []
    rivals = wide.loc[ordinary(wide.index)]
    for policy, own in wide.iterrows():
        best = rivals.max() if policy in rivals.index and len(rivals) > 1 else {}
        cells = [
            Cell(number(100 * v, 1), "", BEST if load in best and same(100 * v, 100 * best[load], 1) else "", float(v))
            for load, v in own.items()
        ]
        lines.append([Cell(str(policy), kind=HEAD), *cells])
    return Table(f"SLO attainment (%) by load ({statistics.load_unit(rows)})", [], labels, lines)


def ttft_matrix(rows: pd.DataFrame) -> Table | None:
    """The 99th percentile of TTFT of every policy at every load, the median over seeds, with its interval."""
    if not statistics.has(rows, "ttft_p99_s"):
        return None
    found = statistics.over_seeds(statistics.binned_loads(rows), "ttft_p99_s").set_index(["policy", "load"])
    policies, loads = statistics.policies_of(rows), sorted(found.index.get_level_values("load").unique())
    rivals = found.loc[ordinary(policies)]["value"].groupby("load").min()
    lines = []
    for policy in policies:
        cells = []
        for load in loads:
            line = found.loc[(policy, load)]
            digits = decimals(float(line["value"]))
            known = policy in ordinary(policies) and len(policies) > 1 and np.isfinite(line["value"])
            best = known and same(line["value"], rivals[load], digits)
            ends = interval(line["low"], line["high"], digits)
            cells.append(Cell(number(line["value"], digits), ends, BEST if best else ""))
        lines.append([Cell(policy, kind=HEAD), *cells])
    drawn = bool(rows["drawn"].any())
    labels = ["policy", *(f"{'about ' if drawn else ''}{load:.3g}" for load in loads)]
    return Table(f"p99 TTFT (s) by load ({statistics.load_unit(rows)})", [], labels, lines)


def reduction_table(reduction: pd.DataFrame) -> Table | None:
    """SLAI's TTFT reduction beside the reference figures."""
    lines = []
    against = statistics.reduction_against_reference(reduction)
    for line in against.itertuples():
        ours = Cell(number(100 * line.ours, 1), interval(100 * line.low, 100 * line.high, 1))
        head = f"{line.load:g}{'*' if line.interpolated else ''}"
        difference = f"{100 * line.difference:+.1f}".replace("-", "−")
        lines.append([Cell(head, kind=HEAD), ours, Cell(number(100 * line.reference, 0)), Cell(difference)])
    if not lines:
        return None
    labels = ["load (requests/s)", "ours (%)", "reference (%)", "difference (points)"]
    notes = ["* on the straight line between the two nearest loads that were run"] * bool(against["interpolated"].any())
    return Table("Median TTFT of `slai` below `sarathi`'s", [], labels, lines, notes)


def capacity_reference_table(capacity: pd.DataFrame) -> Table | None:
    """Capacities by the paper's criterion beside the reference figures, and their ratio beside the claim."""
    against = statistics.capacity_against_reference(capacity)
    if against.empty:
        return None
    lines = []
    for line in against.itertuples():
        difference = f"{line.difference:+.2f}".replace("-", "−")
        ours = Cell(number(line.ours, 2), interval(line.low, line.high, 2))
        lines.append(
            [Cell(str(line.policy), kind=HEAD), ours, Cell(number(line.reference, 2)), Cell("–"), Cell(difference)]
        )
    at = against.set_index("policy")
    if {"slai", statistics.BASELINE} <= set(at.index):
        ratio, theirs = (float(at.loc["slai", c] / at.loc[statistics.BASELINE, c]) for c in ("ours", "reference"))
        claim = 1 + constants.PAPER_CAPACITY_GAIN
        difference = f"{ratio - theirs:+.2f}".replace("-", "−")
        cells = [Cell(number(ratio, 2), _ratio_interval(capacity)), Cell(number(theirs, 2)), Cell(number(claim, 2))]
        lines.append([Cell(f"slai / {statistics.BASELINE}", kind=HEAD), *cells, Cell(difference)])
    labels = ["policy", "ours (requests/s)", "reference (requests/s)", "the paper", "difference from the reference"]
    return Table("Capacity: largest rate with a median TTFT below 0.5 s", [], labels, lines)


def _ratio_interval(capacity: pd.DataFrame) -> str:
    if "ratio_to" not in capacity:
        return ""
    own = capacity[(capacity["policy"] == "slai") & (capacity["criterion"] == "ttft-median")]
    own = own[own["ratio_to"] == statistics.BASELINE]
    return interval(own["ratio_ci_low"].iloc[0], own["ratio_ci_high"].iloc[0], 2) if len(own) else ""


def capacity_table(criterion: str, own: pd.DataFrame, unit: str = "requests/s") -> Table:
    """Capacities in `unit` under one criterion, with who is served there where that was recorded."""
    labels = ["policy", f"capacity ({unit})"]
    known = ("attained", "refused", "abandoned", "cancelled")
    shares = [s for s in known if s in own and own[s].notna().any()]
    tenths = bool("attained_by_decile" in own and own["attained_by_decile"].notna().any())
    limited = bool("limited_by" in own and own["limited_by"].notna().any())
    labels += ["limited by"] * limited + [f"{s} (%)" for s in shares] + [f"{i}" for i in range(1, 11)] * tenths
    groups = [("", 2 + limited)]
    groups += [("Requests at capacity", len(shares))] if shares else []
    groups += [("Attained by tenth of prompt length, shortest first (%)", 10)] if tenths else []
    lines = []
    for _, line in own.iterrows():
        note = line.get("note")
        qps = line["capacity_qps"]
        text = str(note) if isinstance(note, str) and not np.isfinite(qps) else number(qps, 2)
        cells = [Cell(str(line["policy"]), kind=HEAD), Cell(text, interval(line["ci_low"], line["ci_high"], 2))]
        cells += [Cell(line["limited_by"] if isinstance(line["limited_by"], str) else "–")] if limited else []
        cells += [Cell(number(100 * line[s], 1)) for s in shares]
        values = line["attained_by_decile"] if tenths else []
        values = values if isinstance(values, list) else [None] * 10
        cells += [Cell(number(None if v is None else 100 * v, 0), heat=v) for v in values] if tenths else []
        lines.append(cells)
    return Table(f"Capacity under `{criterion}`", groups if len(groups) > 1 else [], labels, lines)


SESSION_METRICS = (
    Metric("session_on_time", "Sessions", "on time", "%", 1, 100, 1),
    Metric("session_p50_s", "Time to the last answer", "p50", "s", -1, quantile=0.5, samples="sessions"),
    Metric("session_p99_s", "Time to the last answer", "p99", "s", -1, quantile=0.99, samples="sessions"),
    Metric("cancelled_share", "Turns", "cancelled", "%", -1, 100, 1),
    Metric("prefix_hit_rate", "Prefix cache", "hit rate", "%", 1, 100, 1),
    Metric("num_cached_tokens", "Prompt tokens of a run", "saved", "1000", 0, 1e-3, 0),
    Metric("num_recached_tokens", "Prompt tokens of a run", "saved after preemptions", "1000", 0, 1e-3, 0),
    Metric("computed_tokens", "Prompt tokens of a run", "computed", "1000", 0, 1e-3, 0),
)


def session_table(rows: pd.DataFrame) -> Table | None:
    """Sessions and the prefix cache by policy and load; None where there is neither."""
    turns, cache = statistics.has(rows, "num_sessions"), statistics.has(rows, "prefix_hit_rate")
    if not (turns or cache):
        return None
    about_cache = ("Prefix cache", "Prompt tokens of a run")
    metrics = [m for m in SESSION_METRICS if (cache if m.group in about_cache else turns)]
    binned, policies = statistics.binned_loads(rows), statistics.policies_of(rows)
    found = {m.column: statistics.over_seeds(binned, m.column).set_index(["policy", "load"]) for m in metrics}
    few = {
        (load, m.column): dict(zip(policies, statistics.samples_beyond(group, m, policies), strict=True))
        for load, group in binned.groupby("load")
        for m in metrics
    }
    lines = []
    for policy in policies:
        for load in sorted(binned["load"].unique()):
            cells = []
            for m in metrics:
                grey = few[load, m.column][policy] < statistics.MIN_SAMPLES_BEYOND
                marks = {"grey": grey, "best": False, "tied": False}
                cells.append(_cell(m, pd.Series(found[m.column].loc[(policy, load)].to_dict() | marks)))
            lines.append([Cell(policy, kind=HEAD), Cell(f"{load:.3g}"), *cells])
    labels = ["policy", f"load ({statistics.load_unit(rows)})", *(f"{m.label} ({m.unit})" for m in metrics)]
    notes = []
    if turns:
        notes.append("Times to the last answer are those of sessions that were finished, from their first arrival.")
    if any(cell.kind == GREY for line in lines for cell in line):
        notes.append(f"†: fewer than {statistics.MIN_SAMPLES_BEYOND} sessions beyond it in all runs together.")
    return Table("By policy and load", [("", 2), *_groups(metrics)], labels, lines, notes)
