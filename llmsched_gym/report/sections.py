"""What a report shows, part by part: which figures and tables, with their captions."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from llmsched_gym.paper import constants
from llmsched_gym.report import clusters, distance, distributions, plots, statistics, tables
from llmsched_gym.report.bounds import ordinary, shown_capacity
from llmsched_gym.report.intervals import MIN_SEEDS
from llmsched_gym.report.results import Results
from llmsched_gym.report.statistics import BASELINE
from llmsched_gym.report.tables import Table
from llmsched_gym.report.text import load_label, names

if TYPE_CHECKING:
    from matplotlib.figure import Figure


NEVER_CAME = ("pending", "cancelled")
"""Phases of turns of sessions that asked for nothing."""


@dataclass(frozen=True)
class Exhibit:
    """A figure that may turn out to have nothing to show."""

    name: str  # of its file
    make: Callable[[], Figure]
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the report, left out when it is empty."""

    anchor: str
    title: str
    text: str = ""
    exhibits: Sequence[Exhibit] = ()
    tables: Sequence[Table] = ()


def sections(results: Results) -> list[Section]:
    """Figures and tables in their order, all but the comparison tables."""
    return [
        _against_load(results),
        _sessions(results),
        _routers(results),
        _against_bound(results),
        _against_paper(results),
        _capacity(results),
        _at_focus(results),
        _batches(results),
    ]


def _against_load(results: Results) -> Section:
    rows = results.rows
    slo_s = results.ttft_slo()[0]
    fluid_qps = shown_capacity(results.fluid, statistics.binned_loads(rows)["load"])
    attainment = partial(plots.plot_attainment, rows, fluid_qps=fluid_qps)
    ttft = partial(plots.plot_ttft, rows, slo_s=slo_s, fluid_qps=fluid_qps)
    goodput = partial(plots.plot_goodput, rows, fluid_qps=fluid_qps)
    throughput = partial(plots.plot_throughput, rows, fluid_qps=fluid_qps)
    in_sessions = statistics.has(rows, "num_sessions")
    whose = "requests, cancelled ones included," if in_sessions else "arrived requests"
    dashed = "Dashed: the TTFT SLO of an empty prompt"
    strict = "The same among strict users, whose gaps between tokens have the tighter SLO."
    exhibits = [
        Exhibit("slo-attainment", attainment, f"Share of {whose} that meet all SLOs."),
        Exhibit("slo-attainment-strict", partial(attainment, "strict"), strict),
        Exhibit("ttft-median", partial(ttft, 50), f"{dashed}, and the paper's limit.{_infinite(rows, 50)}"),
        Exhibit("ttft-p99", partial(ttft, 99), f"{dashed}.{_infinite(rows, 99)}"),
    ]
    for name, tbt_s in results.tbt_slos_s().items():
        text = f"Gaps between tokens of {name} users, preemptions included. Dashed: their TBT SLO."
        exhibits.append(Exhibit(f"itl-p99-{name}", partial(plots.plot_itl, rows, name, tbt_s), text))
    exhibits += [
        Exhibit("goodput", goodput, "Requests within all SLOs, per second of the time in which they arrived."),
        Exhibit("throughput", throughput, "All tokens sent while the measured requests arrived, in time or not."),
    ]
    if "mean_utility" in rows and not np.allclose(rows["mean_utility"], rows["slo_attainment"], atol=5e-4):
        text = "1 for a request within all SLOs, less up to one half for its late seconds."
        exhibits.append(Exhibit("utility", partial(plots.plot_utility, rows), text))
    if results.has_baseline and not results.repeats_paper:
        exhibits.append(_reduction(rows))
    title = "Against load" if results.num_loads > 1 else "At the load that was run"
    text = "Shares and rates are means over seeds, latencies medians."
    if results.num_seeds >= MIN_SEEDS and statistics.has_intervals(rows):
        text += " Bands are 95 % intervals."
    text = "One seed." if results.num_seeds == 1 else text
    if rows["drawn"].any() and results.num_loads > 1:
        text = "Every seed draws its own rate: a point is the mean over the seeds of one of a few bins of rates."
    if fluid_qps:
        text += " Dash-dotted: the fluid capacity, which no scheduler sustains more than."
    return Section("load", title, text, exhibits)


def _sessions(results: Results) -> Section:
    rows = results.rows
    table = tables.session_table(rows)
    if table is None:
        return Section("sessions", "")
    fluid_qps = shown_capacity(results.fluid, statistics.binned_loads(rows)["load"])
    exhibits, parts, text = [], [], ""
    if statistics.has(rows, "num_sessions"):
        parts.append("sessions")
        on_time = partial(plots.plot_sessions_on_time, rows, fluid_qps=fluid_qps)
        exhibits.append(Exhibit("sessions-on-time", on_time, "Share of sessions with every turn within all its SLOs."))
        text = (
            "A turn comes when the one before it has been answered and its client has thought, and never if that one "
            "was rejected, refused or abandoned: it is cancelled then, and a miss. "
        )
    if statistics.has(rows, "prefix_hit_rate"):
        parts.append("prefix cache")
        hits = partial(plots.plot_hit_rate, rows, fluid_qps=fluid_qps)
        what = "Of the prompt tokens of requests that were scheduled, those found cached at first."
        exhibits.append(Exhibit("prefix-hit-rate", hits, what))
        text += "Prompt tokens that the cache holds are not computed."
    title = " and ".join(parts)
    return Section("sessions", title[0].upper() + title[1:], text.strip(), exhibits, [table])


def _routers(results: Results) -> Section:
    rows = results.rows
    if not clusters.has_replicas(rows):
        return Section("routers", "")
    plot = partial(clusters.plot_replicas, rows)
    what = "Share of the run in which each replica executed a batch, and what of its prompts it found cached; means."
    text = (
        "A policy is a router and, behind the plus, the scheduler of every replica. Below: means over seeds with their "
        f"95 % intervals from {MIN_SEEDS} seeds on; differences on the same seeds are in the tables of policies."
    )
    return Section(
        "routers", "Routers", text, [Exhibit("router-replicas", plot, what, wide=True)], clusters.matrices(rows)
    )


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


def _reduction(rows: pd.DataFrame, *, paper: bool = False) -> Exhibit:
    reduction = statistics.ttft_reduction(statistics.binned_loads(rows))
    text = "How much lower the median TTFT is: the median over seeds of paired runs."
    if reduction["load"].nunique() > 1 and (reduction["value"] < plots.FAR_BELOW / 100).any():
        text += " Triangles on the lower edge stand for far higher ones."
    plot = partial(plots.plot_ttft_reduction, reduction, paper=paper, unit=statistics.load_unit(rows))
    return Exhibit("ttft-reduction", plot, text)


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
    exhibits, shown = [], []
    for (criterion, suite), own in results.capacity.groupby(["criterion", "suite"], sort=False):
        reference = constants.REFERENCE_CAPACITY_QPS if (suite, criterion) == ("paper", "ttft-median") else None
        other = "" if suite == results.suite else f"-{suite}"
        name = "capacity-" + re.sub(r"[^a-z0-9.]+", "-", f"{criterion}{other}".lower())
        measured = own["measured"].iloc[0]
        text = f"Largest rate that meets `{criterion}`" + (f", suite {suite}, {measured}." if measured else ".")
        fluid = results.fluid if suite == results.suite else None
        qps, unit = fluid.qps if fluid else None, statistics.load_unit(results.rows)
        plot = partial(plots.plot_capacity, own, reference=reference, fluid_qps=qps, unit=unit)
        exhibits.append(Exhibit(name, plot, text + distance.above_fluid(own, fluid)))
        beside = tables.capacity_reference_table(own) if reference else None
        if beside is not None:
            shown.append(beside)
        if beside is None or len(own) > own["policy"].isin(constants.REFERENCE_CAPACITY_QPS).sum():
            shown.append(tables.capacity_table(str(criterion), own, unit))
    text = "The largest arrival rate at which a policy meets the criterion, on seed means."
    return Section("capacity", "Capacity", text, exhibits, shown)


def _at_focus(results: Results) -> Section:
    rows, focus = results.rows, results.focus
    own = results.requests_at(focus)
    own = own[~own["phase"].astype(str).isin(NEVER_CAME)]
    in_sessions = statistics.has(rows, "num_sessions")  # whose TTFT SLOs go by what is new of a prompt
    slo = results.ttft_slo() if results.ttft_scales() == [1.0] and not in_sessions else None
    drawn = bool(rows["drawn"].any())
    at = "" if drawn else load_label(rows, focus)
    tenths = "Each point is a tenth of the requests by prompt length." + (" Dashed: the TTFT SLO." if slo else "")
    exhibits = [
        Exhibit("ttft-by-prompt-median", partial(distributions.plot_ttft_by_prompt, own, 0.5, slo=slo, at=at), tenths),
        Exhibit("ttft-by-prompt-p90", partial(distributions.plot_ttft_by_prompt, own, 0.9, slo=slo, at=at), tenths),
    ]
    for load in dict.fromkeys((focus, float(rows["load"].max()))):
        requests, stem = results.requests_at(load), "by-prompt" if load == focus else "by-prompt-highest-load"
        requests = requests[requests["phase"].astype(str) != "pending"]
        where = "" if drawn else load_label(rows, load)
        share = partial(distributions.plot_share_by_prompt, requests, at=where)
        exhibits.append(Exhibit(f"attained-{stem}", share, "Whether short or long prompts pay for the attainment."))
        finished = (requests["phase"].astype(str) == "finished").groupby(requests["policy"], observed=True).mean()
        if len(finished) and finished.min() < 0.995:
            exhibits.append(Exhibit(f"served-{stem}", partial(share, "served"), "Who is served at all, late or not."))
    text = "The tail of the distribution. Left of where SLO and p99 cross, 99 % of gaps are in time."
    for name, tbt_s in results.tbt_slos_s().items() if len(results.itl) else ():
        plot = partial(distributions.plot_itl_cdf, results.itl, name, tbt_s, at=at)
        exhibits.append(Exhibit(f"itl-cdf-{name}", plot, text))
    text = "A line ends below 100 % where requests never got a first token. Dashed: the TTFT SLO of an empty prompt."
    exhibits.append(Exhibit("ttft-cdf", partial(distributions.plot_ttft_cdf, own, results.ttft_slo()[0], at=at), text))
    why = ""
    if rows["load"].nunique() > 1:
        best = rows[rows["load"] == focus].groupby("policy")["slo_attainment"].mean().max()
        why = ", the highest load at which some policy attains 90 %"
        why = why if best >= 0.9 else ", the lowest load: no policy attains 90 % at any"
    seeds = own["seed"].nunique()
    text = f"At {load_label(rows, focus)}{why}; requests of {seeds} seed{'s' if seeds != 1 else ''} together."
    return Section("distributions", "Distributions", text, exhibits)


def _batches(results: Results) -> Section:
    if results.steps.empty:
        return Section("batches", "")
    rows = results.rows[results.rows["load"] == results.focus]
    best = rows.groupby("policy")["slo_attainment"].mean().sort_values(ascending=False, kind="stable").index
    best = ordinary(best)
    logged = set(results.steps["policy"].astype(str))
    order = [p for p in dict.fromkeys([BASELINE, "slai", *best]) if p in logged]
    families = {re.split(r"[-\[]", p)[0]: p for p in reversed(order)}  # the first of each
    chosen = list(dict.fromkeys([*(p for p in order if p in families.values()), *order]))[:3]
    seed, qps = int(results.steps["seed"].iloc[0]), float(results.steps["qps"].iloc[0])
    text = (
        f"The first two minutes of seed {seed} at {qps:.3g} {statistics.load_unit(rows)} under {names(chosen)}."
        if chosen
        else ""
    )
    caption = "Mean tokens per batch over half-second bins, requests running and waiting, share of KV blocks in use."
    plot = partial(distributions.plot_batches, results.steps, chosen)
    return Section("batches", "What batches are made of", text, [Exhibit("batches", plot, caption, wide=True)])
