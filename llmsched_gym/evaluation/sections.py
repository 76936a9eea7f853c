"""What a report shows, part by part: which figures and tables, with their captions, and which remarks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from llmsched_gym.config import SUITES
from llmsched_gym.evaluation import plots, prose, tables
from llmsched_gym.evaluation.intervals import MIN_SEEDS
from llmsched_gym.evaluation.prose import Table, names, number
from llmsched_gym.evaluation.tables import MIN_SAMPLES_BEYOND


@dataclass(frozen=True)
class Results:
    """What a folder holds, read as far as a report needs it."""

    directory: Path
    config: dict[str, Any]
    rows: pd.DataFrame  # tidy
    focus: float  # the load at which distributions are shown
    requests: pd.DataFrame  # of the focus and the highest load
    itl: pd.DataFrame  # of the focus load; empty if there is none
    steps: pd.DataFrame  # of the focus load and one seed; empty if there is none
    capacity: pd.DataFrame  # empty if there is none

    @property
    def paper(self) -> bool:
        return bool((self.rows.get("suite", pd.Series(dtype=str)) == "paper").all())

    def setting(self, name: str, default: Any) -> Any:
        """A field of the scenario."""
        return (self.config.get("scenario") or {}).get(name, default)

    def requests_at(self, load: float) -> pd.DataFrame:
        rates = self.rows.loc[self.rows["load"] == load, "qps"].unique()
        return self.requests[self.requests["qps"].isin(rates)]


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
    return [_against_load(results), _against_paper(results), _capacity(results), _at_focus(results), _batches(results)]


def _against_load(results: Results) -> Section:
    rows = results.rows
    slo_s = float(results.setting("ttft_slo_s", 0.5))
    empty = "The dashed line is the TTFT SLO of an empty prompt"
    exhibits = [
        Exhibit("slo-attainment", lambda: plots.plot_attainment(rows), "Share of arrived requests that meet all SLOs."),
        Exhibit(
            "slo-attainment-strict",
            lambda: plots.plot_attainment(rows, "strict"),
            "The same among strict users, whose every gap between tokens has the tighter SLO.",
        ),
        Exhibit(
            "ttft-median", lambda: plots.plot_ttft(rows, 50, slo_s), f"{empty}, and the paper's limit of capacity."
        ),
        Exhibit("ttft-p99", lambda: plots.plot_ttft(rows, 99, slo_s), f"{empty}."),
    ]
    for name, default in (("strict", 0.1), ("relaxed", 0.5)):
        tbt_s = float(results.setting(f"{name}_tbt_slo_s", default))
        exhibits.append(
            Exhibit(
                f"itl-p99-{name}",
                lambda name=name, tbt_s=tbt_s: plots.plot_itl(rows, name, tbt_s),  # type: ignore[misc]
                f"Gaps between tokens of {name} users, preemptions included. The dashed line is their TBT SLO.",
            )
        )
    exhibits.append(
        Exhibit("goodput", lambda: plots.plot_goodput(rows), "Requests within all SLOs, per second of run.")
    )
    if "mean_utility" in rows and not np.allclose(rows["mean_utility"], rows["slo_attainment"], atol=5e-4):
        text = "1 for a request within all SLOs, less up to one half for its late seconds."
        exhibits.append(Exhibit("utility", lambda: plots.plot_utility(rows), text))
    if not results.paper and _has_baseline(rows):
        exhibits.append(_reduction_exhibit(rows, paper=False))
    single = tables.binned_loads(rows)["load"].nunique() == 1
    text = "Means over seeds; bands are 95 % intervals" + (
        "." if _max_seeds(rows) >= MIN_SEEDS else ", from 10 seeds on."
    )
    if rows["drawn"].any() and not single:
        text = "Every seed draws its own rate: a point is the mean over the seeds of one of a few bins of rates."
    return Section("load", "At the load that was run" if single else "Against load", text, exhibits)


def _has_baseline(rows: pd.DataFrame) -> bool:
    return tables.BASELINE in set(rows["policy"]) and rows["policy"].nunique() > 1


def _max_seeds(rows: pd.DataFrame) -> int:
    return int(tables.binned_loads(rows).groupby(["load", "policy"])["seed"].nunique().max())


def _reduction_exhibit(rows: pd.DataFrame, *, paper: bool) -> Exhibit:
    reduction = tables.ttft_reduction(tables.binned_loads(rows))
    caption = (
        "How much lower the median TTFT is, paired by seed; triangles on the lower edge stand for far higher ones."
    )
    return Exhibit("ttft-reduction", lambda: plots.plot_ttft_reduction(reduction, paper=paper), caption)


def _against_paper(results: Results) -> Section:
    rows = results.rows
    if not results.paper or not _has_baseline(rows):
        return Section("paper", "")
    table = prose.reduction_table(tables.ttft_reduction(rows))
    gain, reduction = tables.PAPER_CAPACITY_GAIN, tables.PAPER_TTFT_REDUCTION
    text = (
        f"The paper (arXiv 2508.01002) reports for SLAI against Sarathi-Serve a median TTFT {100 * reduction:.0f} % lower "
        f"and {100 * gain:.0f} % more capacity. Reference figures are what the authors' own scheduler classes give on a "
        "virtual clock with the same cost formula (1,500 requests, 2 seeds; there the first token comes one pass later "
        "than the one that ends the prompt)."
    )
    return Section("paper", "Beside the paper", text, [_reduction_exhibit(rows, paper=True)], [table] if table else [])


def _capacity(results: Results) -> Section:
    capacity = results.capacity
    if capacity.empty:
        return Section("capacity", "")
    exhibits, shown = [], []
    for criterion, own in capacity.groupby("criterion", sort=False):
        reference = tables.REFERENCE_CAPACITY_QPS if results.paper and criterion == "ttft-median" else None
        name = "capacity-" + re.sub(r"[^a-z0-9.]+", "-", str(criterion).lower())
        exhibits.append(
            Exhibit(
                name,
                lambda own=own, reference=reference: plots.plot_capacity(own, reference=reference),  # type: ignore[misc]
                f"Largest rate that meets `{criterion}`.",
            )
        )
        table = prose.capacity_reference_table(own) if reference else None
        if table is not None:
            shown.append(table)
        if table is None or len(table.rows) < len(own):
            shown.append(prose.capacity_table(str(criterion), own))
    text = "The largest arrival rate at which a policy meets the criterion, on seed means."
    return Section("capacity", "Capacity", text, exhibits, shown)


def _at_focus(results: Results) -> Section:
    focus, highest = results.focus, float(results.rows["load"].max())
    own = results.requests_at(focus)
    slo_s, per_token_s = (
        float(results.setting(n, d)) for n, d in (("ttft_slo_s", 0.5), ("ttft_slo_per_token_s", 5e-4))
    )
    scales = results.setting("ttft_class_scales", [1.0])
    slo = (slo_s, per_token_s) if list(scales) == [1.0] else None
    dashed = " The dashed line is the TTFT SLO." if slo else ""
    tenths = "Each point is a tenth of the requests by prompt length."
    exhibits = [
        Exhibit("ttft-by-prompt-median", lambda: plots.plot_ttft_by_prompt(own, 0.5, slo=slo), tenths + dashed),
        Exhibit("ttft-by-prompt-p90", lambda: plots.plot_ttft_by_prompt(own, 0.9, slo=slo), tenths + dashed),
    ]
    for load in dict.fromkeys((focus, highest)):
        requests = results.requests_at(load)
        at = f" At {prose.load_label(results.rows, load)}."
        stem = "by-prompt" if load == focus else "by-prompt-highest-load"
        caption = "Who is served well: requests within all SLOs, by prompt length." + at
        exhibits.append(Exhibit(f"attained-{stem}", _share(requests, "attained"), caption))
        finished = (requests["phase"].astype(str) == "finished").groupby(requests["policy"], observed=True).mean()
        if len(finished) and finished.min() < 0.995:
            exhibits.append(Exhibit(f"served-{stem}", _share(requests, "served"), "Who is served at all." + at))
    cut = "Requests without a first token keep a line from reaching 100 %."
    exhibits.append(Exhibit("ttft-cdf", lambda: plots.plot_ttft_cdf(own, slo_s), cut))
    for name, default in (("strict", 0.1), ("relaxed", 0.5)):
        tbt_s = float(results.setting(f"{name}_tbt_slo_s", default))
        if not results.itl.empty:
            exhibits.append(
                Exhibit(
                    f"itl-cdf-{name}",
                    lambda name=name, tbt_s=tbt_s: plots.plot_itl_cdf(results.itl, name, tbt_s),  # type: ignore[misc]
                    "One minus the cumulative distribution, so that the tail can be read: "
                    "a line that passes left of where SLO and p99 cross meets the SLO in 99 % of gaps.",
                )
            )
    label = prose.load_label(results.rows, focus)
    why = " (the highest load at which some policy attains 90 %)" if results.rows["load"].nunique() > 1 else ""
    if results.rows.groupby("load")["slo_attainment"].max().empty or _best_at(results.rows, focus) < 0.9:
        why = " (the lowest load: no policy attains 90 % at any)" if results.rows["load"].nunique() > 1 else ""
    text = f"At {label}{why}; all requests of {prose.seeds_label(own['seed'].nunique()).split(' (')[0]} together."
    return Section("distributions", "Distributions", text, exhibits)


def _best_at(rows: pd.DataFrame, load: float) -> float:
    return float(rows[rows["load"] == load].groupby("policy")["slo_attainment"].mean().max())


def _share(requests: pd.DataFrame, what: str) -> Callable[[], Figure]:
    return lambda: plots.plot_share_by_prompt(requests, what)


def _batches(results: Results) -> Section:
    if results.steps.empty:
        return Section("batches", "")
    rows = results.rows[results.rows["load"] == results.focus]
    best = rows.groupby("policy")["slo_attainment"].mean().sort_values(ascending=False, kind="stable").index
    order = list(dict.fromkeys([tables.BASELINE, "slai", *best, *tables.policies_of(rows)]))
    logged = set(results.steps["policy"].astype(str))
    chosen = [p for p in order if p in logged][:3]
    seed, qps = int(results.steps["seed"].iloc[0]), float(results.steps["qps"].iloc[0])
    text = f"Seed {seed} at {qps:.3g} requests/s, from its start: {names(chosen) if chosen else ''}."
    caption = (
        "Mean tokens per batch in bins of half a second, with the requests running and waiting and the share of KV blocks "
        "in use."
    )
    exhibit = Exhibit("batches", lambda: plots.plot_batches(results.steps, chosen), caption, wide=True)
    return Section("batches", "What batches are made of", text, [exhibit])


def suite_of(results: Results) -> str:
    return ", ".join(f"`{s}`" for s in results.rows.get("suite", pd.Series(["unknown"])).unique()).replace("`", "")


def overview(results: Results) -> str:
    """What was run, in one sentence or two."""
    rows = results.rows
    policies, seeds = tables.policies_of(rows), rows["seed"].nunique()
    counts = sorted({int(n) for n in rows["num_requests"]})
    each = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    if rows["drawn"].any():
        loads = f"rates drawn per seed from {rows['qps'].min():.2f} to {rows['qps'].max():.2f} requests/s"
    else:
        values = [f"{load:g}" for load in sorted(rows["load"].unique())]
        loads = (
            f"{len(values)} loads ({', '.join(values)} requests/s)" if len(values) > 1 else f"{values[0]} requests/s"
        )
    who = f"{len(policies)} schedulers served the same requests" if len(policies) > 1 else f"`{policies[0]}` was run"
    text = f"{who} at {loads}: {each} requests in each of {seeds} seed{'s' if seeds != 1 else ''}"
    text += f", {len(rows):,} runs and {int(rows['num_requests'].sum()):,} requests in all."
    if _max_seeds(rows) < MIN_SEEDS:
        text += (
            f" With fewer than {MIN_SEEDS} seeds for a load no intervals are given: small differences may be chance."
        )
    return text


def findings(results: Results) -> list[str]:
    """The paper's two claims, in the suite that repeats its experiment."""
    found = []
    if results.paper and _has_baseline(results.rows):
        reduction = tables.ttft_reduction(results.rows)
        own = reduction[(reduction["policy"] == "slai") & np.isfinite(reduction["mean"])]
        parts = [
            f"{prose.estimate(*(100 * float(line[c]) for c in ('mean', 'low', 'high')), ' %', 1)} at {line['load']:g}"
            for _, line in own.iterrows()
        ]
        if parts:
            claim = 100 * tables.PAPER_TTFT_REDUCTION
            text = "**The paper's claim on latency:** the median TTFT of `slai` lies below that of `sarathi` by "
            found.append(f"{text}{', '.join(parts)} requests/s; the paper reports {claim:.0f} %.")
    capacity = results.capacity
    if results.paper and not capacity.empty:
        at = capacity[capacity["criterion"] == "ttft-median"].set_index("policy")["capacity_qps"]
        if np.isfinite([at.get("slai", np.nan), at.get(tables.BASELINE, np.nan)]).all():
            ratio, claim = at["slai"] / at[tables.BASELINE], tables.PAPER_CAPACITY_GAIN
            reference = tables.REFERENCE_CAPACITY_QPS["slai"] / tables.REFERENCE_CAPACITY_QPS[tables.BASELINE]
            found.append(
                f"**The paper's claim on capacity:** `slai` carries {at['slai']:.2f} requests/s and `sarathi` "
                f"{at[tables.BASELINE]:.2f} with a median TTFT below 0.5 s, {number(100 * (ratio - 1), 1)} % more; the "
                f"paper reports {100 * claim:.0f} %, the reference figures {100 * (reference - 1):.0f} %."
            )
    return found


def settings(results: Results) -> list[tuple[str, str]]:
    """Names and values of what the reader needs to know of the scenario."""
    rows, get = results.rows, results.setting

    def only(column: str) -> str:
        return ", ".join(map(str, rows[column].unique())) if column in rows else "unknown"

    seeds = rows["seed"].unique()
    suite = only("suite")
    found = [("Suite", f"{suite}: {SUITES[suite].what}" if suite in SUITES else suite)]
    found += [("Cost profile", only("profile")), ("Workload", only("workload"))]
    found.append(("Seeds", f"{seeds.min()} to {seeds.max()}" if len(seeds) > 1 else str(seeds[0])))
    found.append(("Requests per run", ", ".join(f"{n:,}" for n in sorted(rows["num_requests"].unique()))))
    if not results.config.get("scenario"):
        return found
    per_token_ms = 1e3 * float(get("ttft_slo_per_token_s", 0.0005))
    scales = list(get("ttft_class_scales", [1.0]))
    times = "" if scales == [1.0] else f", times {', '.join(f'{s:g}' for s in scales)}"
    found.append(("TTFT SLO", f"{float(get('ttft_slo_s', 0.5)):g} s + {per_token_ms:g} ms per prompt token{times}"))
    strict, relaxed = (f"{float(get(f'{c}_tbt_slo_s', d)):g} s" for c, d in (("strict", 0.1), ("relaxed", 0.5)))
    found.append(("TBT SLO", f"strict {strict}, relaxed {relaxed}; rule {get('tbt_rule', 'every-gap')}"))
    found.append(("Strict users", _range(get("strict_share", None), 100, " %")))
    found.append(("Patience", "infinite" if get("patience_s", "inf") == "inf" else f"{get('patience_s', 0):g} s late"))
    jitter, cost = get("jitter", 0.0), get("cost_scale", 1.0)
    found.append(("Batch times", f"jitter {jitter:g}" + ("" if cost == 1.0 else f", cost scale {_range(cost, 1, '')}")))
    return found


def _range(value: Any, scale: float, unit: str) -> str:
    values = value if isinstance(value, list) else [value]
    return " to ".join(f"{scale * v:g}" for v in values) + unit if value is not None else "unknown"


def remarks(results: Results, table: pd.DataFrame) -> list[str]:
    """How to read the comparison tables."""
    rows = results.rows
    found = [
        "A request is within its SLOs when it finished, its first token came in time and every gap between its tokens was "
        "in time; the share is of all measured requests.",
        "TTFT percentiles are over all measured requests; one without a first token counts as infinite (∞).",
        "Each figure is the mean over seeds of the runs' figures. Beside or below it is the 95 % bootstrap interval over "
        f"seeds; with fewer than {MIN_SEEDS} seeds (n<{MIN_SEEDS}) there is no interval.",
    ]
    if table["best"].any():
        found.append(
            "The best mean of a column is **emphasised**; ≈ marks those whose difference from it, paired by seed, has an "
            "interval that includes 0."
        )
    if table["grey"].any():
        found.append(
            f"Greyed out (†): a percentile with fewer than {MIN_SAMPLES_BEYOND} samples beyond it in all runs together."
        )
    lost = [o for o in ("refused", "abandoned", "unfinished") if not rows[f"{o}_share"].any()]
    if lost:
        found.append(f"No request was {' or '.join(lost)} in any run.")
    if rows["rejected_share"].any():
        share = 100 * rows["num_rejected"].sum() / rows["num_requests"].sum()
        found.append(f"{number(share)} % of requests could never fit, were rejected on arrival and count as misses.")
    found.append(
        "KV peak: the largest share of KV blocks in use in a run. Triangles on an edge stand for values beyond it."
    )
    return found
