"""Time of a batch's linear layers against its tokens: a measured table, or reading the weights against computing."""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmsched_gym.config import plain_fields
from llmsched_gym.cost.fields import check_number, is_whole, names, section
from llmsched_gym.cost.surface import MOST_MS, ProfileError

MOST_TOKENS = 1 << 16
"""Of the batches whose times are looked at when a profile is made."""


@dataclass(frozen=True)
class TableLinear:
    """Time of the linear layers against batch tokens, as knots joined by straight lines.

    Constant below the first knot; past the last one the last segment goes on.
    """

    tokens: tuple[int, ...]  # (num_knots,) increasing, >= 1
    ms: tuple[float, ...]  # (num_knots,)

    def __post_init__(self) -> None:
        plain_fields(self)
        if len(self.tokens) < 2 or len(self.tokens) != len(self.ms):
            raise ProfileError("linear.tokens: expected at least two knots, as many as linear.ms")
        if not all(is_whole(n) and n >= 1 for n in self.tokens):
            raise ProfileError("linear.tokens: expected whole numbers >= 1")
        if any(b <= a for a, b in zip(self.tokens, self.tokens[1:], strict=False)):
            raise ProfileError("linear.tokens: expected increasing numbers")
        for ms in self.ms:
            check_number("linear.ms", ms, open_low=True, most=MOST_MS)

    def at(self, n: int) -> float:
        """Milliseconds for n >= 1 tokens."""
        if n <= self.tokens[0]:
            return self.ms[0]
        i = min(bisect_right(self.tokens, n), len(self.tokens) - 1)
        share = (n - self.tokens[i - 1]) / (self.tokens[i] - self.tokens[i - 1])
        return self.ms[i - 1] + share * (self.ms[i] - self.ms[i - 1])

    def table(self, max_tokens: int) -> np.ndarray:
        """Milliseconds for 1..max_tokens tokens, shape (max_tokens,)."""
        n = np.arange(1, max_tokens + 1)
        ms = np.interp(n, self.tokens, self.ms)
        slope = (self.ms[-1] - self.ms[-2]) / (self.tokens[-1] - self.tokens[-2])
        return np.where(n > self.tokens[-1], self.ms[-1] + slope * (n - self.tokens[-1]), ms)


@dataclass(frozen=True)
class SmoothLinear:
    """Reading the weights against computing: (weight_ms^power + (token_ms * n)^power)^(1 / power)."""

    weight_ms: float  # reading all weights once
    token_ms: float  # computing one token
    power: float  # sharpness of the change from the one to the other

    def __post_init__(self) -> None:
        plain_fields(self)
        for name in ("weight_ms", "token_ms", "power"):
            check_number(f"linear.{name}", getattr(self, name), open_low=True)

    def at(self, n: int) -> float:
        """Milliseconds for n >= 1 tokens."""
        return float((self.weight_ms**self.power + (self.token_ms * n) ** self.power) ** (1.0 / self.power))

    def table(self, max_tokens: int) -> np.ndarray:
        """Milliseconds for 1..max_tokens tokens, shape (max_tokens,)."""
        n = np.arange(1, max_tokens + 1, dtype=np.float64)
        return np.asarray((self.weight_ms**self.power + (self.token_ms * n) ** self.power) ** (1.0 / self.power))


@functools.lru_cache(maxsize=32)
def linear_table_s(linear: TableLinear | SmoothLinear, overhead_ms: float, max_tokens: int) -> np.ndarray:
    """Overhead and linear layers of 0..max_tokens tokens, seconds; read-only, (max_tokens + 1,), and [0] is 0."""
    table = np.zeros(max_tokens + 1)
    table[1:] = (overhead_ms + linear.table(max_tokens)) / 1e3
    table.setflags(write=False)
    return table


def linear_of(data: Any) -> TableLinear | SmoothLinear:
    """The linear layers of a profile's file; ProfileError names the field."""
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind == "smooth":
        return SmoothLinear(**section(data, "linear", names(SmoothLinear), [*names(SmoothLinear), "kind"]))
    if kind == "table":
        knots = section(data, "linear", names(TableLinear), [*names(TableLinear), "kind"])
        for name, values in knots.items():
            if not isinstance(values, list):
                raise ProfileError(f"linear.{name}: expected a list of numbers")
        return TableLinear(tuple(knots["tokens"]), tuple(knots["ms"]))
    raise ProfileError("linear.kind: expected table or smooth")


def check_linear(linear: TableLinear | SmoothLinear) -> None:
    """ProfileError unless one token takes time, and the longest batches, where the last trend goes on."""
    for n in (1, MOST_TOKENS):
        try:
            ms = linear.at(n)
        except OverflowError:
            ms = math.inf
        if not 0.0 < ms < math.inf:
            raise ProfileError(f"linear: expected finite milliseconds > 0 for 1 to {MOST_TOKENS:,} tokens, got {ms!r}")
