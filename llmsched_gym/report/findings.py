"""What a report says: sentences computed from rows, the settings behind them, how to run it again.

Text marks `code` with backticks and **strong** words with asterisks, in both kinds of report.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llmsched_gym.config import SUITES
from llmsched_gym.cost import Profile, ProfileError, load_profile
from llmsched_gym.files import encode
from llmsched_gym.paper import constants
from llmsched_gym.report import distance, statistics
from llmsched_gym.report.bounds import bound_of, is_clairvoyant, ordinary
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
    loads = f"{len(values)} loads ({', '.join(values)} requests/s)"
    if len(values) == 1:
        loads = load_label(rows, float(rows["load"].iloc[0]))
    who = f"{len(policies)} schedulers served the same requests" if len(policies) > 1 else f"`{policies[0]}` was run"
    text = f"{who} at {loads}: {each} requests " + ("of one seed" if seeds == 1 else f"in each of {seeds} seeds")
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
        where = "" if single else "at all loads " if load == top else f"up to {load:g} requests/s "
        if load < 0:
            where = "not " if single else "at none "
        parts.append(f"{where}under {names(policies)}")
    return [f"**Gaps between tokens:** the p99 ITL of every class is within its TBT SLO: {'; '.join(parts)}."]


def _lost(results: Results) -> list[str]:
    """Policies that refused, lost or never finished more than one request in a hundred, at their worst load."""
    rows = results.rows
    share = rows[["refused_share", "abandoned_share", "unfinished_share"]].sum(axis=1)
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
    return [f"**Not served** (refused, abandoned or unfinished){worst}: {', '.join(parts)}."]


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


def settings(results: Results) -> list[tuple[str, str]]:
    """Names and values of what the reader needs to know of the scenario."""
    rows, get = results.rows, results.setting

    def only(column: str) -> str:
        return ", ".join(map(str, rows[column].unique())) if column in rows else "unknown"

    seeds = rows["seed"].unique()
    found = [("Suite", results.suite), ("Cost profile", _profile(only("profile"))), ("Workload", only("workload"))]
    found += [("Arrivals", _arrivals(results))]
    found.append(("Seeds", f"{seeds.min()} to {seeds.max()}" if len(seeds) > 1 else str(seeds[0])))
    found.append(("Requests per run", ", ".join(f"{n:,}" for n in sorted(rows["num_requests"].unique()))))
    found += [("Trace", remark) for remark in results.trace_remarks]
    if not results.config.get("scenario"):
        return found
    slo_s, per_token_s = results.ttft_slo()
    scales = "" if results.ttft_scales() == [1.0] else f", times {', '.join(f'{s:g}' for s in results.ttft_scales())}"
    found.append(("TTFT SLO", f"{slo_s:g} s + {1e3 * per_token_s:g} ms per prompt token{scales}"))
    tbt = ", ".join(f"{name} {slo_s:g} s" for name, slo_s in results.tbt_slos_s().items())
    found.append(("TBT SLO", f"{tbt}; rule {get('tbt_rule', 'every-gap')}"))
    found.append(("Strict users", _range(get("strict_share", 0.05), 100) + " %"))
    drain, after = get("drain_s", "inf"), "arrivals go on" if get("arrivals_continue", True) else "no arrivals"
    until = "until all are served" if drain == "inf" else f"for {drain:g} s at most"
    found.append(("Around them", f"{get('warmup_s', 0.0):g} s of warm-up; {after} behind them, {until}"))
    profile = _loaded(only("profile"))
    blocks = get("num_kv_blocks", None) or (profile and profile.num_kv_blocks)
    seqs = get("max_num_seqs", None) or (profile and profile.device.max_num_seqs)
    limits = f"max_num_seqs {seqs:,}, " if seqs else ""
    limits += f"max_num_batched_tokens {get('max_num_batched_tokens', 8192):,}"
    limits += f", max_model_len {get('max_model_len', 8192):,}"
    found.append(("Engine", f"{f'{blocks:,} KV blocks, ' if blocks else ''}{limits}"))
    patience = get("patience_s", "inf")
    found.append(("Patience", "infinite" if patience == "inf" else f"{patience:g} s late"))
    times = f"jitter {get('jitter', 0.0):g}, cost scale {_range(get('cost_scale', 1.0), 1)}"
    if get("backend", "simulated") != "simulated":
        times = f"measured on {results.config.get('setup', get('model', 'a model'))}; the profile is for predictions"
        if get("count_host_time", False):
            times += "; the scheduler's own time counts"
    found.append(("Batch times", times))
    return found


def _arrivals(results: Results) -> str:
    """Where arrivals come from, as runs had them."""
    rows, get = results.rows, results.setting
    kinds = rows["arrivals"].unique() if "arrivals" in rows else ["unknown"]
    kind = ", ".join(map(str, kinds))
    if kind == "trace":
        scaled = "scaled to the loads asked for" if rows["requested_qps"].notna().any() else "as they are"
        return f"the trace's own times, {scaled}"
    if kind == "gamma":
        kind += f" of shape {get('burstiness', 1.0):g}"
    if rows["drawn"].any():
        return f"{kind}, one rate per seed from {_range(get('qps_range', [0.0, 0.0]), 1)} requests/s"
    if kind in ("mmpp", "switching"):
        kind += f", rates switching every {_range(get('switch_every_s', [0.0, 0.0]), 1)} s"
    return f"{kind} at {', '.join(f'{load:.4g}' for load in sorted(rows['load'].unique()))} requests/s"


def _profile(name: str) -> str:
    """The profile's name, with a remark if nobody has measured it."""
    found = _loaded(name)
    return name if found is None or found.basis == "measured" else f"{name} ({found.basis})"


def _loaded(name: str) -> Profile | None:
    try:
        return load_profile(name)
    except ProfileError:
        return None  # a file that has gone since


def _range(value: Any, scale: float) -> str:
    return " to ".join(f"{scale * v:g}" for v in (value if isinstance(value, list) else [value]))


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


FLAGS = frozenset(
    [
        "profile",
        "workload",
        "trace",
        "trace_arrivals",
        "trace_invalid",
        "strict_share",
        "jitter",
        "cost_scale",
        "length_hint",
        "tbt_rule",
        "backend",
        "model",
    ]
)
"""Fields of a scenario that have an option of their own."""


def command(config: Mapping[str, Any], directory: Path) -> str | None:
    """The `llmsched evaluate` that makes `directory` again, from its config."""
    if isinstance(config.get("command"), str):
        return str(config["command"])
    scenario = config.get("scenario")
    if not isinstance(scenario, Mapping) or scenario.get("suite") not in SUITES or "policies" not in config:
        return None
    usual = json.loads(json.dumps(encode(SUITES[scenario["suite"]].scenario.to_dict())))
    words = ["llmsched", "evaluate", "--suite", scenario["suite"], "--policy", ",".join(config["policies"])]
    if bound_of(config["policies"]) is None and scenario.get("backend", "simulated") == "simulated":
        words += ["--no-bound"]
    for name, value in scenario.items():
        if value == usual.get(name) or name in ("suite", "num_requests"):
            continue
        if name in FLAGS and isinstance(value, str | int | float):
            words += [f"--{name.replace('_', '-')}", f"{value}"]
        elif name == "patience_s":
            words += ["--patience", f"{value}"]
        elif name == "allow_refusal":
            words += ["--allow-refusal"]
        else:
            words += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    if config.get("qps"):
        words += ["--qps", ",".join(f"{q:.12g}" for q in config["qps"])]
    if scenario.get("num_requests") is not None:
        words += ["--num-requests", str(scenario["num_requests"])]
    words += ["--seeds", str(config.get("seeds", 20))]
    if config.get("first_seed"):
        words += ["--first-seed", str(config["first_seed"])]
    return shlex.join([*words, "--out", directory.resolve().name])
