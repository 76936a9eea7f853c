"""What a report shows, part by part: which charts and tables, with their captions."""

from __future__ import annotations

import re
from functools import partial

from llmsched_gym.paper import constants
from llmsched_gym.report import batch_charts, clusters, distance, lives, load_charts, request_charts, statistics, tables
from llmsched_gym.report.bounds import ordinary, shown_capacity
from llmsched_gym.report.intervals import MIN_SEEDS
from llmsched_gym.report.load_charts import against_load
from llmsched_gym.report.load_section import Section, against_all_loads, column_of, reduction
from llmsched_gym.report.results import Results, named
from llmsched_gym.report.statistics import BASELINE
from llmsched_gym.report.text import load_label

NEVER_CAME = ("pending", "cancelled")
"""Phases of turns of sessions that asked for nothing."""


def sections(results: Results) -> list[Section]:
    """Figures and tables in their order, all but the comparison tables."""
    return [
        against_all_loads(results),
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
                "sessions-on-time", columns=column_of(rows, "session_on_time"), title="Sessions on time",
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
                "prefix-hit-rate", columns=column_of(rows, "prefix_hit_rate"), title="Prefix cache hit rate",
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


def _against_bound(results: Results) -> Section:
    table = distance.gap_table(results)
    if table is None:
        return Section("bound", "")
    text = (
        "Against a scheduler that is told every output length, serves the least work left first and caps the predicted "
        "time of a batch. Differences are paired by seed."
    )
    return Section("bound", "How far from the best", text, tables=[table])


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
    return Section("paper", "Beside the paper", text, [reduction(results.rows, paper=True)], [table] if table else [])


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
    text = f"At most the first two minutes of seed {seed} at {qps:.3g} {statistics.load_unit(rows)}." if chosen else ""
    caption = "Mean tokens per batch over half-second bins, requests running and waiting, share of KV blocks in use."
    if "replica" in results.steps:
        caption += " Of the replica that executed longest."
    found = [batch_charts.timeline(batch_charts.busiest(results.steps), chosen, caption)]
    return Section("batches", "Batches", text, [batch_charts.replicas_over_time(results.steps, chosen), *found])


MOST_RUNS = 6
"""Policies whose batches are shown."""
