"""What a report says: sentences computed from rows.

Text marks `code` with backticks and **strong** words with asterisks, in both kinds of report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from llmsched_gym.paper import constants
from llmsched_gym.report import distance, served, statistics
from llmsched_gym.report.bounds import is_clairvoyant, ordinary
from llmsched_gym.report.intervals import MIN_SEEDS
from llmsched_gym.report.results import Results
from llmsched_gym.report.statistics import BASELINE, MIN_SAMPLES_BEYOND
from llmsched_gym.report.text import estimate, load_label, names, number

WORTH_SAYING = 0.02
"""Difference in attainment among strict users that the summary mentions."""


def overview(results: Results) -> str:
    """What was run, in one sentence or two."""
    rows = results.rows
    policies, seeds = statistics.policies_of(rows), rows["seed"].nunique()
    counts = sorted({int(n) for n in rows["num_requests"]})
    each = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    values = [f"{load:g}" for load in sorted(rows["load"].unique())]
    loads = f"{len(values)} loads ({', '.join(values)} {statistics.load_unit(rows)})"
    if len(values) == 1:
        loads = load_label(rows, float(rows["load"].iloc[0]))
    kind = "servers" if served.is_served(rows) else "schedulers"
    compared = results.config.get("compared") or {}
    served_what = "were run in worlds that differ" if compared.get("differences") else "served the same requests"
    who = f"{len(policies)} {kind} {served_what}" if len(policies) > 1 else f"`{policies[0]}` was run"
    each += " request" if counts == [1] else " requests"
    if rows.groupby("policy")["load"].nunique().nunique() > 1:
        loads += ", not all at each"
    text = f"{who} at {loads}: {each} {'of one seed' if seeds == 1 else f'in each of {seeds} seeds'}"
    if len(rows) > 1:
        text += f", {len(rows):,} runs and {int(rows['num_requests'].sum()):,} requests in all"
    text += "."
    if not statistics.has_intervals(rows):
        text += f" {SAME_REQUESTS}"
    elif rows.groupby(["load", "policy"])["seed"].nunique().max() < MIN_SEEDS:
        text += f" With fewer than {MIN_SEEDS} seeds no intervals are given: small differences may be chance."
    return text


def summary(rows: pd.DataFrame, table: pd.DataFrame) -> list[str]:
    """What was found at each load, one sentence or a few for each."""
    means = table.set_index(["load", "metric", "policy"]).sort_index()
    found = []
    for load in sorted(rows["load"].unique()):
        own = (
            means.loc[(load, "slo_attainment")].reindex(ordinary(statistics.policies_of(rows))).dropna(subset=["value"])
        )
        strict = None
        if (load, "slo_attainment_strict") in means.index.droplevel(2):
            strict = means.loc[(load, "slo_attainment_strict")].reindex(own.index)
        longest = _longest(rows[rows["load"] == load])
        label = load_label(rows, load)
        found.append(f"**{label[0].upper() + label[1:]}:** {_at_load(own, strict, longest)}")
    return found


def _at_load(own: pd.DataFrame, strict: pd.DataFrame | None, longest: Mapping[str, float]) -> str:
    order = own.sort_values("value", ascending=False, kind="stable")
    if len(order) == 1:
        return f"`{order.index[0]}` has an SLO attainment of {_percent(order.iloc[0])}."
    if order["value"].nunique() == 1:
        return f"all policies attain the same, {_percent(order.iloc[0])}."
    leader = str(order.index[0])
    text = f"`{leader}` has the highest SLO attainment, {_percent(order.iloc[0])}"
    tied = [p for p in order.index if order.loc[p, "tied"]]
    if order["num_seeds"].max() < MIN_SEEDS:
        text += " (too few seeds to rule out chance)"
    elif tied:
        text += f"; {names(tied)} cannot be told apart from it"
    others = [p for p in order.index if p != leader and p not in tied]
    base = BASELINE if BASELINE in others else others[0] if others else None
    if base is not None:
        text += f"; `{base}` has {_percent(order.loc[base])}"
    text += "."
    if strict is not None and np.isfinite(strict["value"]).sum() > 1:
        first = str(strict["value"].idxmax())
        ahead = strict.loc[first, "value"] - strict.loc[leader, "value"]
        if ahead >= WORTH_SAYING and not strict.loc[leader, "tied"]:
            text += f" Strict users do best under `{first}`, {_percent(strict.loc[first])}"
            text += f" against {_percent(strict.loc[leader])} under `{leader}`."
    if longest.get(leader, 1.0) < 0.75 * order["value"].iloc[0]:
        text += f" Of the tenth with the longest prompts `{leader}` attains {100 * longest[leader]:.1f} %."
    return text


def _percent(line: pd.Series) -> str:
    return estimate(100 * line["value"], 100 * line["low"], 100 * line["high"], " %", 1)


def _longest(group: pd.DataFrame) -> dict[str, float]:
    """Mean attainment of the tenth with the longest prompts, by policy."""
    if "attained_by_decile" not in group:
        return {}
    last = [v[-1] if isinstance(v, list | np.ndarray) and len(v) else None for v in group["attained_by_decile"]]
    shares = pd.Series(last, index=group["policy"].to_numpy(), dtype=float).groupby(level=0).mean()
    return {str(p): float(v) for p, v in shares.items() if not math.isnan(v)}


def overall(results: Results) -> list[str]:
    """What holds over all loads: bounds, gaps between tokens, requests lost, the paper's claims if it is repeated."""
    return [*distance.findings(results), *_gaps(results), *_lost(results), *_claims(results)]


def _gaps(results: Results) -> list[str]:
    """Up to which load each policy keeps both classes' p99 ITL within their SLOs."""
    rows, slos = results.rows, results.tbt_slos_s()
    columns = {name: f"itl_p99_s_{name}" for name in slos if f"itl_p99_s_{name}" in rows}
    if not any(rows[column].notna().any() for column in columns.values()):
        return []
    up_to: dict[float, list[str]] = {}  # the last load that all goes well at, -inf if there is none
    for policy in statistics.policies_of(rows):
        p99 = rows[rows["policy"] == policy].groupby("load")[list(columns.values())].median()
        late = np.any([p99[column] > slos[name] for name, column in columns.items()], axis=0)
        late |= p99.isna().all(axis=1).to_numpy()
        last = p99.index[: np.argmax(late) if late.any() else None].max()
        up_to.setdefault(-math.inf if math.isnan(last) else last, []).append(policy)
    parts, top, single = [], rows["load"].max(), rows["load"].nunique() == 1
    for load, policies in sorted(up_to.items(), reverse=True):
        where = "" if single else "at all loads " if load == top else f"up to {load:g} {statistics.load_unit(rows)} "
        if load < 0:
            where = "not " if single else "at none "
        parts.append(f"{where}under {names(policies)}")
    what = "the p99 ITL of every class, the median over seeds, is within its TBT SLO"
    return [f"**Gaps between tokens:** {what}: {'; '.join(parts)}."]


def _lost(results: Results) -> list[str]:
    """Policies that refused, lost or never finished more than one request in a hundred, at their worst load."""
    rows = results.rows
    cancelled = bool((rows["cancelled_share"] > 0).any())
    outcomes = ["refused", "abandoned", *(["cancelled"] * cancelled), "unfinished"]
    share = rows[[f"{outcome}_share" for outcome in outcomes]].sum(axis=1)
    means = share.groupby([rows["policy"], rows["load"]], sort=False).mean()
    parts = []
    for policy in statistics.policies_of(rows):
        worst = means[policy].idxmax()
        if means[policy][worst] > 0.01:
            at = f" at {worst:g}" if rows["load"].nunique() > 1 else ""
            parts.append(f"{100 * means[policy][worst]:.1f} % under `{policy}`{at}")
    if not parts:
        return []
    worst = ", at the worst load of each" if rows["load"].nunique() > 1 else ""
    what = f"{', '.join(outcomes[:-1])} or {outcomes[-1]}"
    return [f"**Not served** ({what}){worst}: {', '.join(parts)}."]


def _claims(results: Results) -> list[str]:
    """The paper's two claims, in the suite that repeats its experiment."""
    if not (results.repeats_paper and results.has_baseline):
        return []
    found = []
    reduction = statistics.ttft_reduction(results.rows)
    own = reduction[(reduction["policy"] == "slai") & np.isfinite(reduction["value"])]
    parts = [
        f"{estimate(100 * mean, 100 * low, 100 * high, ' %', 1)} at {load:g}"
        for load, mean, low, high in own[["load", "value", "low", "high"]].itertuples(index=False)
    ]
    if parts:
        text = f"**The paper's claim on latency:** the median TTFT of `slai` lies below that of `{BASELINE}` by "
        claim = f"the paper reports {100 * constants.PAPER_TTFT_REDUCTION:.0f} %."
        found.append(f"{text}{', '.join(parts)} requests/s; {claim}")
    if not results.capacity.empty:
        at = results.capacity.query("criterion == 'ttft-median' and suite == 'paper'").set_index("policy")[
            "capacity_qps"
        ]
        ours, base = at.get("slai", np.nan), at.get(BASELINE, np.nan)
        if np.isfinite(ours) and np.isfinite(base):
            reference = constants.REFERENCE_CAPACITY_QPS["slai"] / constants.REFERENCE_CAPACITY_QPS[BASELINE] - 1
            found.append(
                f"**The paper's claim on capacity:** with a median TTFT below 0.5 s `slai` carries {ours:.2f} "
                f"requests/s, {number(100 * (ours / base - 1), 1)} % more than `{BASELINE}` with {base:.2f}; the paper "
                f"reports {100 * constants.PAPER_CAPACITY_GAIN:.0f} %, the reference figures give "
                f"{100 * reference:.0f} %."
            )
    return found


def remarks(results: Results, table: pd.DataFrame) -> list[str]:
    """How to read the comparison tables."""
    rows = results.rows
    found = [
        "A request is within its SLOs when it finished, its first token came in time and every gap between its tokens "
        "was in time; the share is of all measured requests.",
        "TTFT percentiles are over all measured requests; one without a first token counts as infinite (∞).",
        _over_seeds(rows),
    ]
    rule = results.setting("tbt_rule", "every-gap")
    if rule != "every-gap":
        found[0] = (
            "A request is within its SLOs when it finished, its first token came in time and its other tokens met the "
            f"rule `{rule}`; the share is of all measured requests."
        )
    if statistics.has(rows, "num_sessions"):
        found.append(
            "A turn that never came asked for nothing and has no TTFT. It counts as a miss if it was cancelled, and "
            "not at all if it was still to come when the run ended."
        )
    if table["best"].any():
        found.append(
            "The best mean of a column is **emphasised**; ≈ marks those whose difference from it, paired by seed, has "
            "an interval that includes 0."
        )
    if table["grey"].any():
        found.append(
            f"Greyed out (†): a percentile with fewer than {MIN_SAMPLES_BEYOND} samples beyond it in all runs together."
        )
    told = [p for p in statistics.policies_of(rows) if is_clairvoyant(p)]
    if told:
        found.append(
            f"{names(told)} (oracle) is told every output length: a bound to compare with, not a policy that can be "
            "had, and never emphasised beside others."
        )
    lost = [o for o in ("refused", "abandoned", "unfinished") if not rows[f"{o}_share"].any()]
    if lost:
        found.append(f"Requests that were {' or '.join(lost)}: none, in any run.")
    if rows["rejected_share"].any():
        found.append(_rejected(results))
    found.append(
        "KV peak: the largest share of KV blocks in use in a run. Goodput: requests within all SLOs per second of the "
        "time in which they arrived; vLLM's benchmark divides by the time until its last request is done."
    )
    return found


def _rejected(results: Results) -> str:
    """How many requests were rejected on arrival, and what setting did it."""
    rows = results.rows
    share = 100 * rows["num_rejected"].sum() / rows["num_requests"].sum()
    text = f"{number(share)} % of requests were rejected on arrival and count as misses"
    if served.is_served(rows):
        return f"{number(share)} % of requests failed and count as misses: {served.failures(rows)}."
    if "num_too_long" not in rows:
        return f"{text}: they could never fit."
    long = 100 * rows["num_too_long"].sum() / rows["num_requests"].sum()
    if long > 0:
        text += f"; {number(long)} % are longer than `max_model_len={results.setting('max_model_len', 8192)}`"
    if share - long > 1e-9:
        text += f"; {number(share - long)} % need more KV blocks than there are"
    tail = " They have no first token: where they are 1 % or more of a run, its p99 TTFT is infinite."
    return f"{text}.{tail}"


def _over_seeds(rows: pd.DataFrame) -> str:
    """What a figure over seeds and its interval are."""
    text = (
        "Shares, utility and rates are means over seeds of the runs' figures; latencies are medians over seeds of the "
        "runs' percentiles, as a few seeds near saturation hold much of their mean."
    )
    if not statistics.has_intervals(rows):
        return f"{text} {SAME_REQUESTS}"
    return (
        f"{text} Ranges are 95 % intervals over seeds, of a mean by Student's t, of a median by order statistics; with "
        f"fewer than {MIN_SEEDS} seeds (n<{MIN_SEEDS}) there are none."
    )


SAME_REQUESTS = (
    "No intervals are given: with a trace's own arrival times all seeds have the same requests, so that differences "
    "between seeds say nothing about other requests."
)
