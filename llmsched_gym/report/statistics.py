"""What a report says in numbers: rows made tidy, figures over seeds with intervals, the comparison with the paper.

Pure functions of rows. A *load* is an arrival rate that was asked for; a suite that draws another rate for each seed
has one load, the mean of the rates drawn.
Long, as every figure goes by the same tidy rows, estimates and intervals; what says them in words lies elsewhere.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from llmsched_gym.config import SLO_CLASSES, ConfigError
from llmsched_gym.paper import constants
from llmsched_gym.report import intervals
from llmsched_gym.report.bounds import bound_of, is_clairvoyant, ordinary

MIN_SAMPLES_BEYOND = 100
"""A percentile with fewer samples beyond it, in all runs together, is greyed out."""
BASELINE = "sarathi"


class ReportError(ConfigError):
    """A directory or rows that no report can be made of; the message is one line."""


@dataclass(frozen=True)
class Metric:
    """A column of the comparison table."""

    column: str  # of tidy rows
    group: str  # heading above it
    label: str
    unit: str  # of the values shown
    better: int  # 1: more is better, -1: less is, 0: neither
    scale: float = 1.0  # shown = row * scale
    digits: int | None = None  # decimals; None: three significant digits
    quantile: float | None = None  # for percentiles
    samples: str = "requests"  # what a percentile is taken over: requests, sessions, or a class whose gaps are meant


METRICS = (
    Metric("ttft_p50_s", "TTFT", "p50", "s", -1, quantile=0.5),
    Metric("ttft_p99_s", "TTFT", "p99", "s", -1, quantile=0.99),
    Metric("itl_p99_s_strict", "ITL p99", "strict", "s", -1, quantile=0.99, samples="strict"),
    Metric("itl_p99_s_relaxed", "ITL p99", "relaxed", "s", -1, quantile=0.99, samples="relaxed"),
    Metric("slo_attainment", "SLO attainment", "all", "%", 1, 100, 1),
    Metric("slo_attainment_strict", "SLO attainment", "strict", "%", 1, 100, 1),
    Metric("slo_attainment_relaxed", "SLO attainment", "relaxed", "%", 1, 100, 1),
    Metric("mean_utility", "Utility", "mean", "1 at most", 1, 1, 3),
    Metric("refused_share", "Not served", "refused", "%", -1, 100, 1),
    Metric("abandoned_share", "Not served", "abandoned", "%", -1, 100, 1),
    Metric("cancelled_share", "Not served", "cancelled", "%", -1, 100, 1),
    Metric("unfinished_share", "Not served", "unfinished", "%", -1, 100, 1),
    Metric("request_goodput", "Goodput", "while arriving", "req/s", 1, 1, 3),
    Metric("vllm_request_goodput", "Goodput", "vLLM's", "req/s", 1, 1, 3),
    Metric("kv_cache_usage_max", "Engine", "KV peak", "%", 0, 100, 1),
    Metric("num_preemptions", "Engine", "preemptions", "1/run", 0, 1, 1),
)

TIMES = (
    Metric("tpot_p50_s", "TPOT", "p50", "s", -1, quantile=0.5),
    Metric("tpot_p99_s", "TPOT", "p99", "s", -1, quantile=0.99),
    Metric("e2e_p50_s", "E2E latency", "p50", "s", -1, quantile=0.5),
    Metric("e2e_p99_s", "E2E latency", "p99", "s", -1, quantile=0.99),
    Metric("queue_time_p50_s", "Queue time", "p50", "s", -1, quantile=0.5),
    Metric("queue_time_p99_s", "Queue time", "p99", "s", -1, quantile=0.99),
    Metric("throughput_tok_s", "Throughput", "output", "tokens/s", 1, 1, 0),
    Metric("mean_batch_s", "Batches", "duration", "s", 0),
    Metric("mean_batch_tokens", "Batches", "size", "tokens", 0, 1, 0),
)
"""Columns of a second comparison table."""


SESSION_COLUMNS = (
    *("num_sessions", "session_on_time", "session_p50_s", "session_p99_s"),
    *("prefix_hit_rate", "num_cached_tokens", "num_recached_tokens", "computed_tokens"),
)
"""Columns about sessions and the prefix cache, which rows made before there were any lack."""


def tidy(rows: pd.DataFrame | Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows with one number a column, a `load` and whether rates were drawn; a missing TTFT percentile is infinite."""
    df = rows.copy() if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    df = df.reset_index(drop=True)
    missing = [c for c in ("policy", "qps", "seed", "num_requests", "slo_attainment") if c not in df]
    if missing:
        raise ReportError(f"rows: expected a column {missing[0]!r}, got {', '.join(map(str, df.columns)) or 'none'}")
    if df.empty:
        raise ReportError("rows: expected at least one run, got none")
    if df.duplicated(["policy", "qps", "seed"]).any():
        raise ReportError("rows: expected one row per (policy, qps, seed), got some twice")
    if df["qps"].isna().any():
        raise ReportError("rows: expected a rate in every qps, got none in some")
    for column in [c for c in df.columns if c.endswith("_by_class")]:
        values = [_mapping(v) for v in df.pop(column)]
        for name in SLO_CLASSES:
            df[f"{column.removesuffix('_by_class')}_{name}"] = pd.Series([v.get(name) for v in values], dtype=float)
    for column in [c for c in df.columns if re.fullmatch(r"ttft_p\d+_s", c)]:
        df[column] = pd.to_numeric(df[column]).astype(float).fillna(math.inf)
        for name in SLO_CLASSES:
            of_class, there = f"{column}_{name}", f"num_requests_{name}"
            if of_class in df and there in df:
                df[of_class] = df[of_class].mask(df[of_class].isna() & (df[there] > 0), math.inf)
    for outcome in ("refused", "abandoned", "cancelled", "unfinished", "rejected"):
        df[f"{outcome}_share"] = df.get(f"num_{outcome}", 0.0) / df["num_requests"]
    for column in [c for c in df.columns if re.fullmatch(r"(e2e|queue_time)_p\d+_s", c)]:
        df[column] = pd.to_numeric(df[column]).astype(float)
        if df[column].notna().any():  # a client cannot tell how long a request waited in a server's queue
            df[column] = df[column].fillna(math.inf)
    numbers = {m.column for m in (*METRICS, *TIMES)} | {"qps", "throughput_tok_s", *SESSION_COLUMNS}
    for column in numbers & set(df.columns):
        df[column] = pd.to_numeric(df[column]).astype(float)
    df["drawn"] = _rates_are_drawn(df)
    given = df["requested_qps"].astype(float).fillna(df["qps"]) if "requested_qps" in df else df["qps"]
    df["load"] = df["qps"].mean() if df["drawn"].any() else given
    return df


def _mapping(value: Any) -> Mapping[str, Any]:
    """A `*_by_class` cell: a JSON string, a struct or nothing."""
    if isinstance(value, str):
        value = json.loads(value)
    return value if isinstance(value, Mapping) else {}


def _rates_are_drawn(df: pd.DataFrame) -> bool:
    if "requested_qps" in df:
        return bool(df["requested_qps"].isna().all() and df["qps"].nunique() > 1)
    runs = df.groupby("policy").agg(runs=("seed", "size"), seeds=("seed", "nunique"), rates=("qps", "nunique"))
    return bool(((runs["seeds"] > 1) & (runs["rates"] == runs["runs"]) & (runs["seeds"] == runs["runs"])).all())


def has(df: pd.DataFrame, column: str) -> bool:
    """Whether some row has a figure in a column."""
    return column in df and bool(df[column].notna().any())


def load_unit(df: pd.DataFrame) -> str:
    """What a load is counted in."""
    return "sessions/s" if has(df, "num_sessions") else "requests/s"


def policies_of(df: pd.DataFrame) -> list[str]:
    """Policies in the order in which they were run."""
    return [str(p) for p in df["policy"].unique()]


def binned_loads(df: pd.DataFrame) -> pd.DataFrame:
    """Tidy rows whose drawn rates are gathered in up to five bins of equally many seeds; given loads stay."""
    rates = df.drop_duplicates("seed").set_index("seed")["qps"]
    num_bins = min(5, len(rates) // 3)
    if not df["drawn"].any() or num_bins < 2 or rates.isna().any():
        return df
    bins = pd.qcut(rates.rank(method="first"), num_bins, labels=False)
    return df.assign(load=df["seed"].map(rates.groupby(bins).transform("mean")))


def _estimate(column: str, values: np.ndarray) -> tuple[float, float, float, int]:
    """A figure over the seeds that have one, the ends of its interval and how many seeds are infinite.

    The figure is the median of latencies and the mean of all else (see `intervals`); nan where there is none.
    """
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return np.nan, np.nan, np.nan, 0
    if intervals.is_latency(column):
        ends = intervals.median_interval(known.tolist())
        return float(np.median(known)), *(ends or (np.nan, np.nan)), int(np.isposinf(known).sum())
    bounded = column.startswith("slo_attainment") or column.endswith("_share")
    bounded |= column in ("kv_cache_usage_max", "session_on_time", "prefix_hit_rate")
    ends = intervals.interval(known.tolist(), (0.0, 1.0) if bounded else (-np.inf, np.inf))
    return float(known.mean()), *(ends or (np.nan, np.nan)), 0


def _by_seed(group: pd.DataFrame, column: str, policies: list[str]) -> np.ndarray:
    """Values of one load; shape (policies, seeds), nan where there is no run."""
    return group.pivot(index="policy", columns="seed", values=column).reindex(policies).to_numpy(float)


def over_seeds(df: pd.DataFrame, column: str) -> pd.DataFrame:
    """A column over seeds by load and policy: columns load, policy, value, low, high, num_infinite, num_seeds."""
    policies = policies_of(df)
    parts = [
        _summarise(load, policies, column, _by_seed(group, column, policies), has_intervals(group))
        for load, group in df.groupby("load")
    ]
    return pd.concat(parts, ignore_index=True)


def has_intervals(rows: pd.DataFrame) -> bool:
    """Whether seeds are independent: not where a trace's own arrivals are kept, the same requests for every seed."""
    return "arrivals" not in rows or not (rows["arrivals"] == "trace").any()


def _summarise(load: Any, policies: list[str], column: str, values: np.ndarray, intervals_too: bool) -> pd.DataFrame:
    found = np.array([_estimate(column, own) for own in values])
    if not intervals_too:
        found[:, 1:3] = np.nan
    return pd.DataFrame(
        {
            "load": load,
            "policy": policies,
            "value": found[:, 0],
            "low": found[:, 1],
            "high": found[:, 2],
            "num_infinite": found[:, 3].astype(int),
            "num_seeds": (~np.isnan(values)).sum(axis=1),
        }
    )


def comparison_table(rows: pd.DataFrame | Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Every metric of every policy at every load, one a line.

    Columns: load, policy, metric (a column of METRICS or TIMES), value and its interval (low, high) over num_seeds
    seeds, of which num_infinite are infinite, grey (a percentile with fewer than MIN_SAMPLES_BEYOND samples beyond
    it), best, tied (its paired difference from the best has an interval that includes 0). A clairvoyant policy is
    neither, where there are others.
    """
    df = rows if isinstance(rows, pd.DataFrame) and "load" in rows else tidy(rows)
    policies, parts = policies_of(df), []
    for load, group in df.groupby("load"):
        for metric in (*METRICS, *TIMES):
            if metric.column not in df or df[metric.column].isna().all():
                continue
            values = _by_seed(group, metric.column, policies)
            part = _summarise(load, policies, metric.column, values, has_intervals(group))
            part.insert(2, "metric", metric.column)
            part["grey"] = samples_beyond(group, metric, policies) < MIN_SAMPLES_BEYOND
            part["best"], part["tied"] = _best(metric, values, part, np.isin(policies, ordinary(policies)))
            part["tied"] &= has_intervals(group)
            parts.append(part)
    return pd.concat(parts, ignore_index=True)


def samples_beyond(group: pd.DataFrame, metric: Metric, policies: list[str]) -> np.ndarray:
    """Samples beyond a percentile in all runs of each policy together; infinite for other metrics; shape (policies,).

    Without a count of gaps there are none.
    """
    if metric.quantile is None:
        return np.full(len(policies), np.inf)
    column = f"num_{metric.samples}" if metric.samples in ("requests", "sessions") else f"num_gaps_{metric.samples}"
    if column not in group:
        return np.zeros(len(policies))
    samples = group.groupby("policy")[column].sum().reindex(policies).fillna(0).to_numpy()
    share = min(metric.quantile, 1 - metric.quantile)
    return np.floor(samples * share + 1e-6)  # 1 - 0.99 is a little less than 0.01


def _best(
    metric: Metric, values: np.ndarray, part: pd.DataFrame, eligible: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which of the eligible policies have the best value, and which others a paired interval cannot tell from it."""
    nobody = np.zeros(len(values), bool)
    value = part["value"].to_numpy()
    eligible = eligible & np.isfinite(value) & ~part["grey"].to_numpy()
    if metric.better == 0 or eligible.sum() < 2 or np.ptp(value[eligible]) == 0:
        return nobody, nobody
    best = eligible & (value == (value[eligible].max() if metric.better > 0 else value[eligible].min()))
    with np.errstate(invalid="ignore"):
        differences = values - values[np.argmax(best)]
    name = metric.column if intervals.is_latency(metric.column) else "difference"
    ends = np.array([_estimate(name, own)[1:3] for own in differences])
    return best, eligible & ~best & (ends[:, 0] <= 0) & (ends[:, 1] >= 0)


def ttft_reduction(df: pd.DataFrame, baseline: str = BASELINE) -> pd.DataFrame:
    """Reduction of the median TTFT against `baseline`: the median over the seeds that both ran of 1 - ratio.

    Columns load, policy, value, low, high, num_seeds.
    """
    policies, parts = policies_of(df), []
    for load, group in df.groupby("load") if baseline in policies else ():
        values = _by_seed(group, "ttft_p50_s", policies)
        base = values[policies.index(baseline)]
        for policy, own in zip(policies, values, strict=True):
            both = ~np.isnan(own) & ~np.isnan(base)
            if policy == baseline or not both.any():
                continue
            found = intervals.reductions(own[both].tolist(), base[both].tolist())
            value = float(np.median(found)) if found else np.nan
            ends = intervals.median_interval(found) if has_intervals(group) else None
            low, high = ends or (np.nan, np.nan)
            parts.append(dict(load=load, policy=policy, value=value, low=low, high=high, num_seeds=len(found)))
    frame = pd.DataFrame(parts, columns=["load", "policy", "value", "low", "high", "num_seeds"])
    return frame.astype({column: float for column in ("load", "value", "low", "high")})


def attainment_gap(df: pd.DataFrame) -> pd.DataFrame:
    """SLO attainment of each policy less that of the first clairvoyant one, over the seeds that both ran.

    Columns load, policy, value, low, high, num_seeds, the interval of the mean of pairs. Empty without such a policy.
    """
    policies, parts = policies_of(df), []
    bound = bound_of(policies)
    for load, group in df.groupby("load") if bound is not None else ():
        values = _by_seed(group, "slo_attainment", policies)
        apart = values - values[policies.index(str(bound))]
        parts.append(_summarise(load, policies, "difference", apart, has_intervals(group)))
    if not parts:
        return pd.DataFrame(columns=["load", "policy", "value", "low", "high", "num_seeds"])
    found = pd.concat(parts, ignore_index=True)
    return found[~found["policy"].map(is_clairvoyant).astype(bool)].reset_index(drop=True)


def reduction_against_reference(reduction: pd.DataFrame) -> pd.DataFrame:
    """SLAI's TTFT reduction beside the reference figures: load, ours, low, high, reference, difference, interpolated.

    Between two loads that were run ours is a straight line; outside them there is no line.
    """
    ours = reduction[(reduction["policy"] == "slai") & np.isfinite(reduction["value"])].sort_values("load")
    loads, lines = ours["load"].to_numpy(), []
    for load, reference in constants.REFERENCE_TTFT_REDUCTION.items():
        if len(loads) and loads[0] - 1e-9 <= load <= loads[-1] + 1e-9:
            at = {c: float(np.interp(load, loads, ours[c])) for c in ("value", "low", "high")}
            exact = bool(np.isclose(loads, load).any())
            lines.append((load, at["value"], at["low"], at["high"], reference, at["value"] - reference, not exact))
    return pd.DataFrame(lines, columns=["load", "ours", "low", "high", "reference", "difference", "interpolated"])


def capacity_against_reference(capacity: pd.DataFrame) -> pd.DataFrame:
    """Capacities by the paper's criterion beside the reference: policy, ours, low, high, reference, difference."""
    ours = capacity[capacity["criterion"] == "ttft-median"].copy()
    ours["reference"] = ours["policy"].map(constants.REFERENCE_CAPACITY_QPS)
    ours = ours.rename(columns={"capacity_qps": "ours", "ci_low": "low", "ci_high": "high"})
    ours["difference"] = ours["ours"] - ours["reference"]
    columns = ["policy", "ours", "low", "high", "reference", "difference"]
    return ours.dropna(subset=["reference"])[columns].reset_index(drop=True)


def focus_load(df: pd.DataFrame) -> float:
    """The load that distributions are shown at: the largest one at which some policy still attains 90 %."""
    df = df[df["policy"].isin(ordinary(policies_of(df)))]
    best = df.groupby(["load", "policy"])["slo_attainment"].mean().groupby("load").max()
    good = best[best >= 0.9]
    return float(good.index.max() if len(good) else best.index.min())
