"""Bootstrap intervals over seeds, of one policy and of paired policies. None below ten seeds or without a mean."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

MIN_SEEDS = 10
NUM_RESAMPLES = 2000
CONFIDENCE = 0.95

Interval = tuple[float, float]


def interval(values: Sequence[float | None], *, confidence: float = CONFIDENCE) -> Interval | None:
    """Confidence interval of the mean of one value per seed (BCa bootstrap)."""
    return _bootstrap((values,), lambda x, axis: np.mean(x, axis=axis), confidence)


def mean(values: Sequence[float | None]) -> float | None:
    """The mean over seeds; None (infinite) if that of any seed is, or if there is none."""
    return float(np.mean([v for v in values if v is not None])) if len(values) and None not in values else None


def difference(a: Sequence[float | None], b: Sequence[float | None]) -> Interval | None:
    """Interval of mean(a) - mean(b) over the same seeds."""
    return _bootstrap((a, b), lambda x, y, axis: np.mean(x, axis=axis) - np.mean(y, axis=axis), CONFIDENCE)


def reduction(a: Sequence[float | None], b: Sequence[float | None]) -> Interval | None:
    """Interval of 1 - mean(a) / mean(b) over the same seeds: how much lower a is than b."""
    return _bootstrap((a, b), lambda x, y, axis: 1.0 - np.mean(x, axis=axis) / np.mean(y, axis=axis), CONFIDENCE)


def compare(rows: Sequence[Mapping[str, Any]], metric: str, policy: str, base: str) -> list[dict[str, Any]]:
    """`policy` against `base` at each load, paired by seed.

    One entry per ``requested_qps``: num_seeds, mean, base_mean, difference and reduction, each with ci_low and ci_high.
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
        apart = lower = None
        if ours is not None and theirs is not None:
            apart, lower = ours - theirs, 1.0 - ours / theirs if theirs else None
        for name, value, bounds in (
            ("difference", apart, difference(a, b)),
            ("reduction", lower, reduction(a, b)),
        ):
            low, high = bounds or (None, None)
            entry |= {name: value, f"{name}_ci_low": low, f"{name}_ci_high": high}
        entries.append(entry)
    return entries


def _bootstrap(
    samples: tuple[Sequence[float | None], ...], statistic: Callable[..., Any], confidence: float
) -> Interval | None:
    if len(samples[0]) < MIN_SEEDS or any(v is None or not math.isfinite(v) for sample in samples for v in sample):
        return None
    from scipy.stats import bootstrap  # here, because importing it takes longer than a run

    arrays = tuple(np.asarray(sample, float) for sample in samples)
    if all(np.ptp(array) == 0.0 for array in arrays):
        value = float(statistic(*arrays, axis=-1))
        return (value, value) if math.isfinite(value) else None
    for method in ("BCa", "percentile"):  # BCa has no answer where leaving out any one seed changes nothing
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            found = bootstrap(
                arrays,
                statistic,
                n_resamples=NUM_RESAMPLES,
                confidence_level=confidence,
                method=method,
                paired=len(arrays) > 1,
                vectorized=True,
                rng=np.random.default_rng(0),
            ).confidence_interval
        if math.isfinite(found.low) and math.isfinite(found.high):
            return float(found.low), float(found.high)
    return None
