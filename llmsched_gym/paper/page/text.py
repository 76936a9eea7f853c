"""Numbers, intervals and tables as the page prints them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llmsched_gym import text
from llmsched_gym.text import between

__all__ = ["between", "number", "percent", "seconds", "table", "verdict"]

AGREES = 0.05  # relative difference up to which two figures are said to agree


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, text in the first column and numbers in the others."""
    return text.table(header, rows, 1)


def number(value: float | None, digits: int = 2) -> str:
    """A figure, or a dash where there is none or it is infinite."""
    return text.number(value, digits, infinite="-")


def seconds(value: float | None) -> str:
    """A latency; infinite where that many requests never got a token."""
    return text.number(value, infinite="infinite")


def percent(value: float | None, digits: int = 0) -> str:
    """A share as a signed percentage; a dash for nothing."""
    return "-" if (found := text.number(value, f"+.{digits}%", infinite="-")) == "-" else f"{found[:-1]} %"


def verdict(ours: float, theirs: float) -> str:
    """Whether two figures agree, or by how much ours is off."""
    off = ours / theirs - 1
    return "agrees" if abs(off) <= AGREES else f"{abs(off):.0%} {'higher' if off > 0 else 'lower'}"
