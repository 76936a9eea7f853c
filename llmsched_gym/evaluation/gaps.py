"""Exact percentiles, of requests by partition and of millions of gaps between tokens by counting."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from llmsched_gym.config import SLO_CLASSES

_SHIFT = 14  # a float32 without its last 14 bits: bins 0.2 % wide
_NUM_BINS = 1 << (31 - _SHIFT)
_CHUNK = 1 << 20


def percentile(values: np.ndarray, q: float) -> float | None:
    """The q-quantile (0 to 1), interpolated linearly; None if it is infinite or there are no values."""
    if len(values) == 0:
        return None
    low, high = _ranks(len(values), q)
    part = np.partition(values, (low, high))
    return _between(float(part[low]), float(part[high]), q * (len(values) - 1) - low)


def _ranks(n: int, q: float) -> tuple[int, int]:
    position = q * (n - 1)
    return math.floor(position), math.ceil(position)


def _between(low: float, high: float, share: float) -> float | None:
    value = low if share == 0.0 else low + share * (high - low) if math.isfinite(high) else high
    return value if math.isfinite(value) else None


class Gaps:
    """Gaps between tokens by SLO class.

    Counts over narrow bins find exact order statistics without sorting or copying millions of gaps.
    """

    def __init__(self, *parts: tuple[np.ndarray, np.ndarray]) -> None:
        self._parts = parts  # (seconds, float32; class, -1 for what is no gap), each of shape (n,)
        self._sorted: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by bin
        self.counts = np.zeros((len(SLO_CLASSES), _NUM_BINS), np.int64)
        for _, bins, owner in self._chunks():
            for c, counts in enumerate(self.counts):
                counts += np.bincount(bins[owner == c], minlength=_NUM_BINS)

    def _chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Seconds, bins and classes, a bounded number at a time."""
        for values, owner in self._parts:
            for i in range(0, len(values), _CHUNK):
                chunk = values[i : i + _CHUNK]
                yield chunk, chunk.view(np.uint32) >> _SHIFT, owner[i : i + _CHUNK]

    def num_gaps(self, slo_class: int) -> int:
        """Gaps between tokens of a class of requests."""
        return int(self.counts[slo_class].sum())

    def percentile(self, q: float, slo_class: int | None = None) -> float | None:
        """The q-quantile of all gaps or of one class's; None without gaps."""
        cumulated = np.cumsum(self.counts.sum(axis=0) if slo_class is None else self.counts[slo_class])
        n = int(cumulated[-1])
        if n == 0:
            return None
        ranks = _ranks(n, q)
        found = []
        for rank in ranks:
            place = int(np.searchsorted(cumulated, rank, side="right"))
            before = int(cumulated[place - 1]) if place else 0
            values, owner = self._in_bin(place)
            mine = values if slo_class is None else values[owner == slo_class]
            found.append(float(mine[rank - before]))
        return _between(found[0], found[1], q * (n - 1) - ranks[0])

    def _in_bin(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """The gaps of one bin, sorted, and their classes."""
        if place not in self._sorted:
            parts = []
            for chunk, bins, owner in self._chunks():
                inside = np.flatnonzero(bins == place)
                parts.append((chunk[inside], owner[inside]))
            values, owner = (np.concatenate(part) for part in zip(*parts, strict=True))
            order = np.argsort(values, kind="stable")
            order = order[owner[order] >= 0]
            self._sorted[place] = values[order], owner[order]
        return self._sorted[place]

    def bins(self) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """(class, seconds, count) of every bin in use; counts of several runs may be added up."""
        found = []
        for name, counts in zip(SLO_CLASSES, self.counts, strict=True):
            used = np.flatnonzero(counts)
            found.append((name, _middle(used), counts[used]))
        return found


def quantile(counts: np.ndarray, q: float, endless: int = 0) -> float | None:
    """The q-quantile of what bins of :class:`Gaps` count, (num_bins,), the middle of its bin, to 0.1 %.

    `endless` more are infinite. None of nothing, and where it is infinite.
    """
    total = int(counts.sum())
    if total + endless == 0:
        return None
    place = int(np.searchsorted(np.cumsum(counts), math.ceil(q * (total + endless - 1)), side="right"))
    return float(_middle(np.array([place]))[0]) if place < len(counts) else None


def _middle(bins: np.ndarray) -> np.ndarray:
    """The middle of bins, seconds; 0 of the first."""
    seconds = ((bins << _SHIFT) + (1 << (_SHIFT - 1))).astype(np.uint32).view(np.float32)
    return np.where(bins == 0, np.float32(0), seconds)
