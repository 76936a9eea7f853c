"""Numbers, intervals, names and loads as a report says them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd

from llmsched_gym import text
from llmsched_gym.report import statistics
from llmsched_gym.report.intervals import MIN_SEEDS


def number(value: float | None, digits: int | None = None) -> str:
    """Three significant digits, or so many decimals; a dash for nothing."""
    places = digits if digits is not None or value is None else decimals(value)
    return text.number(value, f",.{places}f", "–", "∞").replace("-", "−")


def same(a: float, b: float, digits: int | None = None) -> bool:
    """Whether two figures look the same in print: then both are the best, or none."""
    return number(a, digits) == number(b, digits)


def decimals(value: float) -> int:
    """Decimals that show three significant digits, at most four."""
    if value == 0 or not math.isfinite(value):
        return 1
    return min(4, max(0, 2 - math.floor(math.log10(abs(value)))))


def telling(value: float, low: float, high: float, digits: int = 1) -> int:
    """So many decimals, or up to two more that an end beside 0 is not printed as 0."""
    ends = [end for end in (value, low, high) if np.isfinite(end) and end != 0]
    return next((d for d in (digits, digits + 1) if all(round(abs(end), d) > 0 for end in ends)), digits + 2)


def interval(low: float, high: float, digits: int) -> str:
    """The two ends, of which the upper one may be infinite, or nothing."""
    if not np.isfinite(low) or math.isnan(high):
        return ""
    between = "–" if low >= 0 else " to "
    return f"{number(low, digits)}{between}{number(high, digits)}"


def estimate(mean: float, low: float, high: float, unit: str = "", digits: int | None = None) -> str:
    """A mean with its interval in brackets, in a sentence."""
    digits = decimals(mean) if digits is None else digits
    ends = interval(low, high, digits)
    return number(mean, digits) + unit + (f" [{ends}]" if ends else "")


def names(policies: Iterable[str]) -> str:
    """`a`, `b` and `c`."""
    quoted = [f"`{p}`" for p in policies]
    return quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + " and " + quoted[-1]


def load_label(rows: pd.DataFrame, load: float) -> str:
    """A load in words."""
    unit = statistics.load_unit(rows)
    if rows["drawn"].any():
        return f"rates drawn per seed ({rows['qps'].min():.2f} to {rows['qps'].max():.2f} {unit})"
    if not statistics.has_intervals(rows) and rows["requested_qps"].isna().all():
        return f"the trace's own {load:.3g} {unit}"
    return f"{load:.4g} {unit if load != 1 else unit.replace('s/', '/')}"


def seeds_label(num_seeds: int) -> str:
    """How many seeds there are, and whether they are too few for intervals."""
    few = f" (n<{MIN_SEEDS}: no interval)" if num_seeds < MIN_SEEDS else ""
    return f"{num_seeds} seed{'s' if num_seeds != 1 else ''}{few}"
