"""The surface of attention from a table of measured kernels: chunks alone, decodes alone, both together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llmsched_gym.cost import fit_table
from llmsched_gym.cost.surface import ProfileError, Surface

if TYPE_CHECKING:
    import pandas as pd

AXES = {"n": "n_decode", "k": "kv_decode", "c": "prefill_chunk", "p": "kv_prefill"}
"""Columns of cells, and what tables of kernels call them."""
TABLES = ("decode", "chunk", "hybrid", "floor")
MIXING_CAP = 4.0
"""Times as much as alone that decodes cost at most beside a chunk where more of them run than were measured beside one:
query heads per KV head of common models, which kernels for decodes alone read together. Tables may show more."""
FEW, SHORT_CHUNK = 2, 64
"""So few decodes beside so short a chunk show the floor: one sequence's way through the kernel, with nothing hidden."""


@dataclass(frozen=True)
class Attention:
    """Attention of one layer, microseconds: a :class:`Surface` before it is scaled to all layers."""

    sequences: tuple[int, ...]
    context: tuple[int, ...]
    chunk: tuple[int, ...]
    prefix: tuple[int, ...]
    pair_us: float
    decode_us: np.ndarray  # (N, K)
    chunk_us: np.ndarray  # (C, P), less pair_us per query-key pair
    hybrid_us: np.ndarray  # (C, N, K)
    floor_us: np.ndarray  # (K,)

    def predict(self, cells: pd.DataFrame) -> np.ndarray:
        """Microseconds of batches of one chunk (c tokens behind p) and n decodes of k tokens, (rows,)."""
        c, p, n, k = (cells[name].to_numpy(float) for name in "cpnk")
        chunk = np.where(c > 0, self.chunks(c, p), 0.0)
        alone = _at(self.decode_us, (self.sequences, self.context), (n, k))
        hybrid = _at(self.hybrid_us, (self.chunk, self.sequences, self.context), (c, n, k))
        together = np.maximum(chunk, self.floor(k)) + hybrid
        return np.where(n == 0, chunk, np.where(c == 0, alone, together))

    @classmethod
    def of(cls, surface: Surface, pair_ms: float, num_layers: int) -> Attention:
        """One layer of a profile's surface."""
        to_us = 1e3 / num_layers
        tables: dict[str, Any] = {f"{name}_us": to_us * np.array(getattr(surface, f"{name}_ms")) for name in TABLES}
        knots = {name: getattr(surface, name) for name in ("sequences", "context", "chunk", "prefix")}
        return cls(**knots, **tables, pair_us=to_us * pair_ms)

    def chunks(self, c: np.ndarray, p: np.ndarray) -> np.ndarray:
        """Microseconds of chunks of `c` tokens behind `p`, alone; (rows,)."""
        return self.pair_us * pairs(c, p) + _at(self.chunk_us, (self.chunk, self.prefix), (c, p))

    def floor(self, k: np.ndarray) -> np.ndarray:
        """Microseconds that decodes of `k` tokens take at least beside a chunk, which hides them if long; (rows,)."""
        return _at(self.floor_us, (self.context,), (k,))


def kinds(cells: pd.DataFrame) -> dict[str, pd.Series]:
    """Which cells are decodes alone, chunks alone and hybrid batches."""
    return {"decodes": cells.c == 0, "chunks": cells.n == 0, "hybrid": (cells.c > 0) & (cells.n > 0)}


def pairs(c: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Query-key pairs of chunks of c tokens behind p."""
    return c * (p + (c + 1.0) / 2.0)


def fit_attention(cells: pd.DataFrame, where: str = "attention") -> Attention:
    """The surface closest to measured cells (columns c, p, n, k, us), relative errors counted, outliers little.

    Knots are the powers of two that the cells span; levels that were not measured are filled from their neighbours.
    Raises :class:`ProfileError`, which starts with `where`, if a kind of batch is missing.
    """
    decodes, chunks, hybrids = (cells[mask] for mask in kinds(cells).values())
    wanted = ((decodes, "decodes alone", "nk"), (chunks, "chunks alone", "cp"), (hybrids, "hybrid batches", "cnk"))
    for part, kind, axes in wanted:
        lacking = [AXES[name] for name in axes if part[name].nunique() < 2]
        if lacking:
            raise ProfileError(f"{where}: expected {kind} of at least two sizes by {lacking[0]}, got {len(part)} rows")
    sequences, context = octaves(cells.n, first=1), octaves(cells.k)
    chunk, prefix = octaves(cells.c), (0, *octaves(cells.p))

    pair_us = _pair_us(chunks)
    c, p, us = _columns(chunks, "c", "p", "us")
    rest = fit_table.fit((chunk, prefix), (c, p), us - pair_us * pairs(c, p), us, convex=0)

    n, k, us = _columns(decodes, "n", "k", "us")
    alone = fit_table.fit((sequences, context), (n, k), us, us, convex=0, at_zero=float(cells.us.min()))
    alone = rising(alone, 0, 1)

    floor = np.zeros(len(context))
    if hybrids.n.min() <= FEW:
        lone = hybrids[(hybrids.n == hybrids.n.min()) & (hybrids.p == hybrids.p.min())]
        lone = lone[lone.c <= max(SHORT_CHUNK, lone.c.min())]
        k, us = _columns(lone, "k", "us")
        floor = rising(fit_table.fit((context,), (k,), us, us), 0)

    table = Attention(sequences, context, chunk, prefix, pair_us, alone, rest, np.zeros(0), floor)
    c, p, n, k, us = _columns(hybrids, "c", "p", "n", "k", "us")
    above = us - np.maximum(table.chunks(c, p), table.floor(k))
    knots = (chunk, sequences, context)
    hybrid = fit_table.fit(knots, (c, n, k), above, us, order=(1, 2, 0), convex=1, at_zero=0.0)
    last = int(np.searchsorted(sequences, n.max()))
    return replace(table, hybrid_us=rising(_capped(hybrid, alone, last), 1, 2))


def _columns(rows: pd.DataFrame, *names: str) -> list[np.ndarray]:
    return [rows[name].to_numpy(float) for name in names]


def octaves(values: pd.Series | np.ndarray, first: int | None = None) -> tuple[int, ...]:
    """Powers of two around the positive values, at least two."""
    positive = np.asarray(values)[np.asarray(values) > 0]
    low = int(np.log2(max(positive.min(), 1.0))) if first is None else first.bit_length() - 1
    high = max((int(np.ceil(positive.max())) - 1).bit_length(), low + 1)
    return tuple(1 << i for i in range(low, high + 1))


def _pair_us(chunks: pd.DataFrame) -> float:
    """Microseconds per query-key pair, beside a constant and a time per key token; small relative errors."""
    from scipy.optimize import nnls

    c, p, us = (chunks[name].to_numpy(float) for name in ("c", "p", "us"))
    matrix = np.column_stack([np.ones(len(c)), c + p, pairs(c, p)]) / us[:, None]
    return float(nnls(matrix, np.ones(len(c)))[0][2])


def _capped(hybrid: np.ndarray, alone: np.ndarray, last: int) -> np.ndarray:
    """Past `last`, the most decodes measured beside a chunk, their time grows with the context at most so many times as
    fast as alone (:data:`MIXING_CAP`, or what the measured ones show)."""
    growth = alone - alone[:, :1]  # (N, K), over the shortest context
    shown = (hybrid[0] - hybrid[0, :, :1])[: last + 1, 1:] / np.maximum(growth[: last + 1, 1:], 1e-9)
    cap = max(MIXING_CAP, float(np.max(shown[-1])))
    hybrid = hybrid.copy()
    for i in range(last + 1, len(alone)):
        hybrid[:, i] = np.minimum(hybrid[:, i], hybrid[:, i, :1] + cap * growth[i])
    return hybrid


def rising(table: np.ndarray, *axes: int) -> np.ndarray:
    """Not below 0, and never falling along the axes: more decodes and longer ones take no less time."""
    table = np.maximum(table, 0.0)
    for axis in axes:
        table = np.maximum.accumulate(table, axis=axis)
    return table


def _at(table: np.ndarray, knots: tuple[tuple[int, ...], ...], at: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.asarray(fit_table.weights(knots, at) @ table.ravel())
