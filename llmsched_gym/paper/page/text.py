"""Numbers, intervals and tables as the page prints them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

AGREES = 0.05  # relative difference up to which two figures are said to agree


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A markdown table, text to the left and numbers to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)])


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def seconds(value: float | None) -> str:
    """A latency; infinite where that many requests never got a token."""
    return "infinite" if value is not None and value == np.inf else number(value)


def between(low: float | None, high: float | None, digits: int = 2) -> str:
    return "" if low is None or high is None or not np.isfinite(low) else f" [{low:.{digits}f}, {high:.{digits}f}]"


def percent(value: float | None, digits: int = 0) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{100 * value:+.{digits}f} %"


def verdict(ours: float, theirs: float) -> str:
    off = ours / theirs - 1
    return "agrees" if abs(off) <= AGREES else f"{abs(off):.0%} {'higher' if off > 0 else 'lower'}"
