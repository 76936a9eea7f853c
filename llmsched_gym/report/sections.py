"""What a report shows, part by part: which charts and tables, with their captions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd

from llmsched_gym.paper import constants
from llmsched_gym.report import batch_charts, clusters, distance, lives, load_charts, request_charts, statistics, tables
from llmsched_gym.report.bounds import ordinary, shown_capacity
from llmsched_gym.report.chart import Chart
from llmsched_gym.report.intervals import MIN_SEEDS
from llmsched_gym.report.load_charts import against_load, by_class
from llmsched_gym.report.results import Results, named
from llmsched_gym.report.statistics import BASELINE
from llmsched_gym.report.tables import Table
from llmsched_gym.report.text import load_label

NEVER_CAME = ("pending", "cancelled")
"""Phases of turns of sessions that asked for nothing."""


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


def sections(results: Results) -> list[Section]:
    """Figures and tables in their order, all but the comparison tables."""
    return [
        _against_load(results),
        _pareto(results),
        _sessions(results),
        _routers(results),
        _against_bound(results),
        _against_paper(results),
        _capacity(results),
        _at_focus(results),
        _lives(results),
        _batches(results),
    ]


def _against_load(results: Results) -> Section:
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
        text = "Dashed: the TTFT SLO of an empty prompt" + (", and the paper's limit." if percentile == 50 else ".")
        charts.append(
            seconds(
                f"ttft-{name.lower()}", rows, by_class(column, rows), f"{name} time to first token",
                f"{name} TTFT (s, log scale)", text + _infinite(rows, percentile),
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
            "goodput", columns=_column(rows, "request_goodput"), title="Goodput", unit="requests/s",
            label="Within all SLOs (requests/s)", line=goodput_line, dash=load_charts.FLUID,
            caption="Requests within all SLOs, per second of the time in which they arrived.",
        ),
        rates(
            "throughput", columns=_column(rows, "throughput_tok_s"), title="Throughput", unit="tokens/s",
            label="Output (tokens/s)", fluid_qps=fluid_qps,
            caption="All tokens sent while the measured requests arrived, in time or not.",
        ),
    ]  # fmt: skip
    if "mean_utility" in rows and not np.allclose(rows["mean_utility"], rows["slo_attainment"], atol=5e-4):
        text = "1 for a request within all SLOs, less up to one half for its late seconds."
        columns = _column(rows, "mean_utility")
        charts.append(rates("utility", columns=columns, title="Mean utility", label="Mean utility", caption=text))
    if results.has_baseline and not results.repeats_paper:
        charts.append(_reduction(rows))
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


def _column(rows: pd.DataFrame, column: str) -> dict[str, str]:
    return {"all": column} if statistics.has(rows, column) else {}


def _pareto(results: Results) -> Section:
    charts = load_charts.pareto_charts(results.rows) if results.rows["policy"].nunique() > 1 else []
    return Section("trade-offs", "Trade-offs", "What a policy gives up of one figure for another.", charts)


def _sessions(results: Results) -> Section:
    rows = results.rows
    table = tables.session_table(rows)
    if table is None:
        return Section("sessions", "")
    fluid_qps = shown_capacity(results.fluid, statistics.binned_loads(rows)["load"])
    share = partial(against_load, rows=rows, scale=100, unit="%", percent=True, fluid_qps=fluid_qps)
    charts, parts, text = [], [], ""
    if statistics.has(rows, "num_sessions"):
        parts.append("sessions")
        charts.append(
            share(
                "sessions-on-time", columns=_column(rows, "session_on_time"), title="Sessions on time",
                label="Sessions with every turn within SLOs (%)",
                caption="Share of sessions with every turn within all its SLOs.",
            )
        )  # fmt: skip
        text = (
            "A turn comes when the one before it has been answered and its client has thought, and never if that one "
            "was rejected, refused or abandoned: it is cancelled then, and a miss. "
        )
    if statistics.has(rows, "prefix_hit_rate"):
        parts.append("prefix cache")
        charts.append(
            share(
                "prefix-hit-rate", columns=_column(rows, "prefix_hit_rate"), title="Prefix cache hit rate",
                label="Prompt tokens found cached (%)",
                caption="Of the prompt tokens of requests that were scheduled, those found cached at first.",
            )
        )  # fmt: skip
        text += "Prompt tokens that the cache holds are not computed."
    title = " and ".join(parts)
    return Section("sessions", title[0].upper() + title[1:], text.strip(), charts, [table])


def _routers(results: Results) -> Section:
    rows = results.rows
    if not clusters.has_replicas(rows):
        return Section("routers", "")
    text = (
        "A policy is a router and, behind the plus, the scheduler of every replica. Below: means over seeds with their "
        f"95 % intervals from {MIN_SEEDS} seeds on; differences on the same seeds are in the tables of policies."
    )
    return Section("routers", "Routers", text, batch_charts.replicas(rows), clusters.matrices(rows))


def _infinite(rows: pd.DataFrame, percentile: int) -> str:
    """A sentence on the triangles at the upper edge, if the figure has some."""
    column = f"ttft_p{percentile}_s"
    binned = statistics.binned_loads(rows)
    if column not in rows or binned["load"].nunique() == 1:
        return ""
    if not np.isposinf(statistics.over_seeds(binned, column)["value"]).any():
        return ""
    share = f"{100 - percentile} % or more" if percentile > 50 else "half or more"
    return f" Triangles on the upper edge: infinite in half of the seeds, as {share} never got a first token."


def _against_bound(results: Results) -> Section:
    table = distance.gap_table(results)
    if table is None:
        return Section("bound", "")
    text = (
        "Against a scheduler that is told every output length, serves the least work left first and caps the predicted "
        "time of a batch. Differences are paired by seed."
    )
    return Section("bound", "How far from the best", text, tables=[table])


def _reduction(rows: pd.DataFrame, *, paper: bool = False) -> Chart | None:
    reduction = statistics.ttft_reduction(statistics.binned_loads(rows))
    return load_charts.reduction_chart(reduction, paper=paper, unit=statistics.load_unit(rows))


def _against_paper(results: Results) -> Section:
    if not (results.repeats_paper and results.has_baseline):
        return Section("paper", "")
    lower, more = 100 * constants.PAPER_TTFT_REDUCTION, 100 * constants.PAPER_CAPACITY_GAIN
    text = (
        f"The paper (arXiv 2508.01002) reports for SLAI against Sarathi-Serve a median TTFT {lower:.0f} % lower and "
        f"{more:.0f} % more capacity. Reference figures are what the authors' own scheduler classes give on a virtual "
        "clock with the same cost formula (1,500 requests, 2 seeds). Beyond Sarathi-Serve's capacity its median TTFT "
        "grows with the length of the run, so figures there depend on it."
    )
    table = tables.reduction_table(statistics.ttft_reduction(results.rows))
    return Section("paper", "Beside the paper", text, [_reduction(results.rows, paper=True)], [table] if table else [])


def _capacity(results: Results) -> Section:
    if results.capacity.empty:
        return Section("capacity", "")
    charts, shown = [], []
    for (criterion, suite), own in results.capacity.groupby(["criterion", "suite"], sort=False):
        reference = constants.REFERENCE_CAPACITY_QPS if (suite, criterion) == ("paper", "ttft-median") else None
        other = "" if suite == results.suite else f"-{suite}"
        name = named(f"{criterion}{other}")
        measured = own["measured"].iloc[0]
        text = f"Largest rate that meets `{criterion}`" + (f", suite {suite}, {measured}." if measured else ".")
        fluid = results.fluid if suite == results.suite else None
        qps, unit = fluid.qps if fluid else None, statistics.load_unit(results.rows)
        text += distance.above_fluid(own, fluid)
        chart = load_charts.capacity_chart(name, own, text, reference=reference, fluid_qps=qps, unit=unit)
        charts.append(chart)
        beside = tables.capacity_reference_table(own) if reference else None
        if beside is not None:
            shown.append(beside)
        if beside is None or len(own) > own["policy"].isin(constants.REFERENCE_CAPACITY_QPS).sum():
            shown.append(tables.capacity_table(str(criterion), own, unit))
    text = "The largest arrival rate at which a policy meets the criterion, on seed means."
    return Section("capacity", "Capacity", text, charts, shown)


def _at_focus(results: Results) -> Section:
    rows, focus = results.rows, results.focus
    own = results.requests_at(focus)
    own = own[~own["phase"].astype(str).isin(NEVER_CAME)]
    in_sessions = statistics.has(rows, "num_sessions")  # whose TTFT SLOs go by what is new of a prompt
    slo = results.ttft_slo() if results.ttft_scales() == [1.0] and not in_sessions else None
    drawn = bool(rows["drawn"].any())
    at = "" if drawn else load_label(rows, focus)
    charts = [
        request_charts.scatter(own, at=at),
        request_charts.ttft_by_prompt(own, 0.5, slo=slo, at=at),
        request_charts.ttft_by_prompt(own, 0.9, slo=slo, at=at),
    ]
    for load in dict.fromkeys((focus, float(rows["load"].max()))):
        requests, stem = results.requests_at(load), "by-prompt" if load == focus else "by-prompt-highest-load"
        requests = requests[requests["phase"].astype(str) != "pending"]
        where = "" if drawn else load_label(rows, load)
        charts.append(request_charts.share_by_prompt(requests, f"attained-{stem}", at=where))
        finished = (requests["phase"].astype(str) == "finished").groupby(requests["policy"], observed=True).mean()
        if len(finished) and finished.min() < 0.995:
            charts.append(request_charts.share_by_prompt(requests, f"served-{stem}", "served", at=where))
    for name, tbt_s in results.tbt_slos_s().items() if len(results.itl) else ():
        charts.append(request_charts.itl_cdf(results.itl, name, tbt_s, at=at))
    charts.append(request_charts.ttft_cdf(own, results.ttft_slo()[0], at=at))
    why = ""
    if rows["load"].nunique() > 1:
        best = rows[rows["load"] == focus].groupby("policy")["slo_attainment"].mean().max()
        why = ", the highest load at which some policy attains 90 %"
        why = why if best >= 0.9 else ", the lowest load: no policy attains 90 % at any"
    seeds = own["seed"].nunique()
    text = f"At {load_label(rows, focus)}{why}; requests of {seeds} seed{'s' if seeds != 1 else ''} together."
    return Section("distributions", "Requests", text, charts)


def _lives(results: Results) -> Section:
    found = lives.table(results.lives)
    if found is None:
        return Section("lives", "")
    text = lives.section_text(results.lives, load_label(results.rows, results.focus))
    return Section("lives", "Why they missed", text, [lives.chart(results.lives)], [found])


def _batches(results: Results) -> Section:
    if results.steps.empty:
        return Section("batches", "")
    rows = results.rows[results.rows["load"] == results.focus]
    best = rows.groupby("policy")["slo_attainment"].mean().sort_values(ascending=False, kind="stable").index
    best = ordinary(best)
    logged = set(results.steps["policy"].astype(str))
    order = [p for p in dict.fromkeys([BASELINE, "slai", *best]) if p in logged]
    families = {re.split(r"[-\[]", p)[0]: p for p in reversed(order)}  # the first of each
    chosen = list(dict.fromkeys([*(p for p in order if p in families.values()), *order]))[:MOST_RUNS]
    seed, qps = int(results.steps["seed"].iloc[0]), float(results.steps["qps"].iloc[0])
    text = f"The first two minutes of seed {seed} at {qps:.3g} {statistics.load_unit(rows)}." if chosen else ""
    caption = "Mean tokens per batch over half-second bins, requests running and waiting, share of KV blocks in use."
    return Section("batches", "Batches", text, [batch_charts.timeline(results.steps, chosen, caption)])


MOST_RUNS = 6
"""Policies whose batches are shown."""
