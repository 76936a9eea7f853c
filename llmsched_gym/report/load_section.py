"""The part of a report that shows figures against load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd

from llmsched_gym.paper import constants
from llmsched_gym.report import load_charts, statistics, tables
from llmsched_gym.report.bounds import shown_capacity
from llmsched_gym.report.chart import Chart
from llmsched_gym.report.intervals import MIN_SEEDS
from llmsched_gym.report.load_charts import against_load, by_class
from llmsched_gym.report.results import Results
from llmsched_gym.report.tables import Table


@dataclass(frozen=True)
class Section:
    """A part of the report, left out when it is empty."""

    anchor: str
    title: str
    text: str = ""
    charts: Sequence[Chart | None] = ()
    tables: Sequence[Table] = ()

    @property
    def shown(self) -> list[Chart]:
        """The charts that have something to show."""
        return [chart for chart in self.charts if chart is not None]


def against_all_loads(results: Results) -> Section:
    """Every figure that is worth a chart against load."""
    rows = results.rows
    slo_s = results.ttft_slo()[0]
    fluid_qps = shown_capacity(results.fluid, statistics.binned_loads(rows)["load"])
    in_sessions = statistics.has(rows, "num_sessions")
    whose = "requests, cancelled ones included," if in_sessions else "arrived requests"
    attained = by_class("slo_attainment", rows)
    share = partial(against_load, scale=100, unit="%", fluid_qps=fluid_qps)
    seconds = partial(against_load, unit="s", log=True)
    charts = [
        share(
            "slo-attainment", rows, attained, "SLO attainment", "Requests within all SLOs (%)",
            f"Share of {whose} that meet all SLOs.", percent=True,
        ),
        share(
            "slo-missed", rows, attained, "SLOs missed", "Missed an SLO (%, log scale)",
            "The same from the other side, where the best can be told apart. Triangles on the lower edge: none missed.",
            log=True, missed=True,
        ),
    ]  # fmt: skip
    for percentile in (50, 99):
        name = "Median" if percentile == 50 else f"p{percentile}"
        column = f"ttft_p{percentile}_s"
        is_papers = percentile == 50 and results.repeats_paper and slo_s == constants.PAPER_MEDIAN_TTFT_S
        text = "Dashed: the TTFT SLO of an empty prompt in this scenario"
        text += ", which is the paper's limit of the median." if is_papers else "."
        charts.append(
            seconds(
                f"ttft-{name.lower()}", rows, by_class(column, rows), f"{name} time to first token",
                f"{name} TTFT (s, log scale)", text + infinite(rows, percentile),
                line=(slo_s, f"TTFT SLO {slo_s:g} s"), fluid_qps=fluid_qps,
            )
        )  # fmt: skip
    for name, tbt_s in results.tbt_slos_s().items():
        columns = {"": f"itl_p99_s_{name}"} if statistics.has(rows, f"itl_p99_s_{name}") else {}
        text = f"Gaps between tokens of {name} users, preemptions included. Dashed: their TBT SLO."
        title = f"p99 inter-token latency, {name} users"
        line = (tbt_s, f"TBT SLO {tbt_s:g} s")
        charts.append(seconds(f"itl-p99-{name}", rows, columns, title, "p99 ITL (s, log scale)", text, line=line))
    for stem, short, what in TIMES:
        column = f"{stem}_p99_s"
        columns = {"all": column} if statistics.has(rows, column) else {}
        charts.append(
            seconds(f"{stem}-p99", rows, columns, f"p99 {what}", f"p99 {short} (s, log scale)", f"{WHAT[stem]}")
        )
    goodput_line = None
    if fluid_qps and not in_sessions:  # whose capacity is no number of requests
        goodput_line = (fluid_qps, load_charts.fluid_label(fluid_qps))
    rates = partial(against_load, rows=rows)
    charts += [
        rates(
            "goodput", columns=column_of(rows, "request_goodput"), title="Goodput", unit="requests/s",
            label="Within all SLOs (requests/s)", line=goodput_line, dash=load_charts.FLUID,
            caption="Requests within all SLOs, per second of the time in which they arrived.",
        ),
        rates(
            "throughput", columns=column_of(rows, "throughput_tok_s"), title="Throughput", unit="tokens/s",
            label="Output (tokens/s)", fluid_qps=fluid_qps,
            caption="All tokens sent while the measured requests arrived, in time or not.",
        ),
    ]  # fmt: skip
    if "mean_utility" in rows and not np.allclose(rows["mean_utility"], rows["slo_attainment"], atol=5e-4):
        text = "1 for a request within all SLOs, less up to one half for its late seconds."
        columns = column_of(rows, "mean_utility")
        charts.append(rates("utility", columns=columns, title="Mean utility", label="Mean utility", caption=text))
    if results.has_baseline and not results.repeats_paper:
        charts.append(reduction(rows))
    title = "Against load" if results.num_loads > 1 else "At the load that was run"
    text = "Shares and rates are means over seeds, latencies medians."
    if results.num_seeds >= MIN_SEEDS and statistics.has_intervals(rows):
        text += " Bands are 95 % intervals, shown with up to six policies."
    text = "One seed." if results.num_seeds == 1 else text
    if rows["drawn"].any() and results.num_loads > 1:
        text = "Every seed draws its own rate: a point is the mean over the seeds of one of a few bins of rates."
    if fluid_qps and results.num_loads > 1:
        text += " Dash-dotted: the fluid capacity, which no scheduler sustains more than."
    matrix = tables.ttft_matrix(rows) if results.num_loads > 1 else None
    return Section("load", title, text, charts, [matrix] if matrix else [])


TIMES = (
    ("tpot", "TPOT", "mean time per output token"),
    ("e2e", "E2E latency", "time to the last token"),
    ("queue_time", "queue time", "time in the queue"),
)
"""Latencies of requests: stem of their columns, in short, in words."""
WHAT = {
    "tpot": "A request's mean gap after its first token.",
    "e2e": "From a request's arrival to its last token; infinite where 1 % or more never got that.",
    "queue_time": "From a request's arrival to the batch that it is first part of.",
}


def column_of(rows: pd.DataFrame, column: str) -> dict[str, str]:
    """The column for all users, if some row has a figure in it."""
    return {"all": column} if statistics.has(rows, column) else {}


def infinite(rows: pd.DataFrame, percentile: int) -> str:
    """A sentence on the triangles at the upper edge, if the figure has some."""
    column = f"ttft_p{percentile}_s"
    binned = statistics.binned_loads(rows)
    if column not in rows or binned["load"].nunique() == 1:
        return ""
    if not np.isposinf(statistics.over_seeds(binned, column)["value"]).any():
        return ""
    share = f"{100 - percentile} % or more" if percentile > 50 else "half or more"
    return f" Triangles on the upper edge: infinite in half of the seeds, as {share} never got a first token."


def reduction(rows: pd.DataFrame, *, paper: bool = False) -> Chart | None:
    """The chart of TTFT reductions against the baseline."""
    found = statistics.ttft_reduction(statistics.binned_loads(rows))
    return load_charts.reduction_chart(found, paper=paper, unit=statistics.load_unit(rows))
