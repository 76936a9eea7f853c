"""Estimates over seeds and their 95 % intervals; none below ten seeds.

Two kinds. Shares and other bounded figures have a *mean* over seeds, with Student's t interval. Latencies have a
*median* over seeds, with the interval of its order statistics, which holds for any distribution, infinite values
included: near saturation a few seeds hold much of a latency's mean, and no interval from ten or twenty of them covers
that mean as often as it says. Policies are compared by pairs of runs on the same seed's requests.
`python -m benchmarks.coverage` measures how often each kind covers the truth.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np

MIN_SEEDS = 10
CONFIDENCE = 0.95

Interval = tuple[float, float]
Values = Sequence[float | None]
"""A figure by seed; None is infinite, as in rows."""


def is_latency(column: str) -> bool:
    """Whether a column of rows is summarised by the median over seeds."""
    return bool(re.match(r"(ttft|itl|tpot|e2e|queue_time|session)_(p\d+|mean)_s|num_preemptions", column))


def mean(values: Values) -> float | None:
    """The mean over seeds; None (infinite) if that of any seed is, or if there is none."""
    return float(np.mean([v for v in values if v is not None])) if len(values) and None not in values else None


def median(values: Values) -> float | None:
    """The median over seeds; None if it is infinite, or if there is none."""
    found = float(np.median(_finite_or_inf(values))) if len(values) else math.inf
    return found if math.isfinite(found) else None


def interval(values: Values, within: Interval = (-math.inf, math.inf)) -> Interval | None:
    """Interval of the mean over seeds, cut to what the figure can be; None where a seed's figure is infinite."""
    if len(values) < MIN_SEEDS or None in values or not np.isfinite(array := np.asarray(values, float)).all():
        return None
    if np.ptp(array) == 0.0:
        return float(array[0]), float(array[0])
    n = len(array)
    middle, half = float(array.mean()), _student(n) * float(array.std(ddof=1)) / math.sqrt(n)
    return max(middle - half, within[0]), min(middle + half, within[1])


@cache
def _student(num_seeds: int) -> float:
    from scipy.stats import t

    return float(t.ppf((1.0 + CONFIDENCE) / 2.0, num_seeds - 1))


def median_interval(values: Values) -> Interval | None:
    """Interval of the median over seeds; an end may be infinite."""
    if len(values) < MIN_SEEDS:
        return None
    low, high = _ranks(len(values))
    ordered = np.sort(_finite_or_inf(values))
    return float(ordered[low]), float(ordered[high])


@cache
def _ranks(num_seeds: int) -> tuple[int, int]:
    """Which order statistics bound the median, counted from 0."""
    from scipy.stats import quantile_test

    found = quantile_test(np.arange(num_seeds), p=0.5).confidence_interval(CONFIDENCE)
    return int(found.low), int(found.high)


def _finite_or_inf(values: Values) -> np.ndarray:
    return np.array([math.inf if v is None else v for v in values], float)


def difference(a: Values, b: Values) -> Interval | None:
    """Interval of the mean over seeds of a - b."""
    if None in a or None in b:
        return None
    return interval((np.asarray(a, float) - np.asarray(b, float)).tolist())


def reductions(a: Values, b: Values) -> list[float]:
    """By how much a lies below b on each seed, as a share of b; seeds on which the ratio means nothing are left out."""
    with np.errstate(all="ignore"):
        ratio = _finite_or_inf(a) / _finite_or_inf(b)
    return [float(1.0 - r) for r in ratio if not math.isnan(r)]


def reduction(a: Values, b: Values) -> Interval | None:
    """Interval of the median over seeds of 1 - a / b."""
    return median_interval(reductions(a, b))


def resample_quantiles(num_seeds: int) -> Interval:
    """The quantiles of bootstrapped figures that bound an interval over `num_seeds` seeds.

    Resamples of a few seeds spread less than the seeds do; further quantiles make up for it, as t does for a mean
    (Hesterberg's expanded percentile interval, The American Statistician 2015).
    """
    from scipy.stats import norm, t

    tail = (1.0 - CONFIDENCE) / 2.0
    low = float(norm.cdf(t.ppf(tail, num_seeds - 1) * math.sqrt(num_seeds / (num_seeds - 1))))
    return low, 1.0 - low


def rank_agreement(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]) -> tuple[float, Interval | None]:
    """Kendall's tau of the policies' order by mean in two worlds (figures by policy, one a seed), and its interval.

    A pair of policies counts for the interval as it stands in both worlds if paired differences tell it apart in both,
    and both ways if they do not: resampling seeds would swap close policies far more often than the truth does.
    """
    agree, known, unknown = 0, 0, 0
    pairs = list(combinations(a, 2))
    for one, other in pairs:
        agree += _order(np.mean(a[one]) - np.mean(a[other])) * _order(np.mean(b[one]) - np.mean(b[other]))
        ends = [difference(world[one], world[other]) for world in (a, b)]
        told = [_order(low) if low * high > 0 else 0 for low, high in (end or (0.0, 0.0) for end in ends)]
        known += told[0] * told[1]
        unknown += 0 in told
    enough = min(len(values) for world in (a, b) for values in world.values()) >= MIN_SEEDS
    bounds = ((known - unknown) / len(pairs), (known + unknown) / len(pairs)) if enough else None
    return agree / len(pairs), bounds


def _order(value: Any) -> int:
    return int(np.sign(value))


def compare(rows: Sequence[Mapping[str, Any]], metric: str, policy: str, base: str) -> list[dict[str, Any]]:
    """`policy` against `base` at each load, paired by seed.

    One entry per ``requested_qps``: num_seeds, mean, base_mean, difference (of the means) and reduction (median over
    seeds), each with ci_low and ci_high.
    """
    cells: dict[float | None, dict[str, dict[int, float | None]]] = {}
    for row in rows:
        if row["policy"] in (policy, base):
            load = cells.setdefault(row["requested_qps"], {policy: {}, base: {}})
            load[row["policy"]][row["seed"]] = row[metric]
    entries = []
    for qps, load in cells.items():
        seeds = sorted(load[policy].keys() & load[base].keys())
        a, b = ([load[name][seed] for seed in seeds] for name in (policy, base))
        ours, theirs = mean(a), mean(b)
        entry: dict[str, Any] = {"requested_qps": qps, "num_seeds": len(seeds), "mean": ours, "base_mean": theirs}
        apart = None if ours is None or theirs is None else ours - theirs
        for name, value, bounds in (
            ("difference", apart, difference(a, b)),
            ("reduction", median(reductions(a, b)), reduction(a, b)),
        ):
            low, high = bounds or (None, None)
            entry |= {name: value, f"{name}_ci_low": low, f"{name}_ci_high": high}
        entries.append(entry)
    return entries
