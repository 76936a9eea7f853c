"""Attention of hybrid batches as a surface: what decodes, chunks, and both together cost, in tables over powers of two.

In engines whose attention kernel serves both phases at once, decodes cost up to four times as much beside a prompt
chunk as alone, and a sum over the batch's parts cannot say so. Tables of measured kernels can: between knots every axis
is interpolated linearly in its own unit, so that whatever is bilinear (bandwidth times tokens) is met exactly; past the
last knot the last cell goes on, below the first one it counts as the first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from llmsched_gym.config import ConfigError, plain_fields


class ProfileError(ConfigError):
    """A profile that cannot be used; the message is one line that names the file (or profile) and the field."""


class Sums(NamedTuple):
    """What the surface needs to know of a batch."""

    num_decodes: int
    decode_tokens: float  # KV tokens that the decodes read
    longest: float  # most of them by one decode
    num_sequences: int
    chunks: Sequence[tuple[int, int]]  # (computed, n) tokens of each prompt chunk


MOST_MS = 1e9
"""Of one entry of a profile: eleven days, so that sums of batches stay finite."""


@dataclass(frozen=True)
class Surface:
    """Attention of a batch, in ms for all layers, and what a batch costs by its kind.

    With n decodes of mean context k, the longest of l tokens, and chunks of c tokens in all:

        alone    = decode(n, k + tail_alone * (l - k) / n)
        chunks   = launch + sum over chunks (pair_ms * pairs + chunk(c_i, computed_i) - launch)
        together = max(chunks, floor(k')) + hybrid(c, n, k'),  k' = k + tail_hybrid * (l - k) / n

    `floor` is the path of one long sequence through the kernel, which runs beside the chunk; `tail` says how many
    tokens of the longest sequence's lead over the mean nobody hides.
    """

    sequences: tuple[int, ...]  # (N,) knots 1, 2, 4, ...: decodes in the batch
    context: tuple[int, ...]  # (K,) knots, powers of two: KV tokens that a decode reads
    chunk: tuple[int, ...]  # (C,) knots, powers of two: prompt tokens in the batch
    prefix: tuple[int, ...]  # (P,) knots, 0 and powers of two: computed tokens before the chunk
    decode_ms: tuple[tuple[float, ...], ...]  # (N, K) decodes alone
    chunk_ms: tuple[tuple[float, ...], ...]  # (C, P) chunks alone, less pair_ms per query-key pair; may be negative
    hybrid_ms: tuple[tuple[tuple[float, ...], ...], ...]  # (C, N, K) decodes beside a chunk
    floor_ms: tuple[float, ...]  # (K,) the least that decodes beside a chunk take, hidden by a long chunk
    launch_ms: float = 0.0  # of the kernels: paid once however many chunks there are
    tail_alone: float = 0.0
    tail_hybrid: float = 0.0
    chunk_batch_ms: float = 0.0  # per batch with a chunk, more than overhead_ms: run eagerly, not as a recorded graph
    sequence_ms: tuple[float, ...] = (0.0,)  # (S,) output head and sampler by sequences 1, 2, ..., S in the batch

    def __post_init__(self) -> None:
        plain_fields(self)
        for name, first in (("sequences", 1), ("context", None), ("chunk", None), ("prefix", 0)):
            _check_knots(name, getattr(self, name), first)
        n, k, c, p = (len(x) for x in (self.sequences, self.context, self.chunk, self.prefix))
        shapes = {"decode_ms": (n, k), "chunk_ms": (c, p), "hybrid_ms": (c, n, k), "floor_ms": (k,)}
        for name, shape in shapes.items():
            _check_table(name, getattr(self, name), shape, signed=name == "chunk_ms")
        rows = len(self.sequence_ms) if isinstance(self.sequence_ms, tuple) else 1
        _check_table("sequence_ms", self.sequence_ms, (max(1, rows),))
        for name in ("launch_ms", "tail_alone", "tail_hybrid", "chunk_batch_ms"):
            _check_table(name, (getattr(self, name),), (1,))

    def decode_at(self, n: float, k: float) -> float:
        """Milliseconds of n >= 1 decodes alone that read k tokens each."""
        return _interpolate(np.array(self.decode_ms), (self.sequences, n), (self.context, k))

    def chunk_at(self, n: float, computed: float) -> float:
        """Milliseconds of a chunk of n tokens behind `computed` ones, without its query-key pairs."""
        return _interpolate(np.array(self.chunk_ms), (self.chunk, n), (self.prefix, computed))

    def hybrid_at(self, c: float, n: float, k: float) -> float:
        """Milliseconds that n decodes of k tokens each add to chunks of c tokens, above the floor.

        Chunks longer than the last knot count as it: the last trend need not go on, least of all below 0.
        """
        return _interpolate(
            np.array(self.hybrid_ms), (self.chunk, min(c, self.chunk[-1])), (self.sequences, n), (self.context, k)
        )

    def floor_at(self, k: float) -> float:
        """Milliseconds that decodes of k tokens take at least beside a chunk."""
        return _interpolate(np.array(self.floor_ms), (self.context, k))

    def ms(self, batch: Sums, pair_ms: float) -> float:
        """Attention, output head and what batches with a chunk cost more; the readable reference of the kernels."""
        rest = self.sequence_at(batch.num_sequences)
        n = batch.num_decodes
        chunks = 0.0
        if batch.chunks:
            rest += self.chunk_batch_ms
            each = [
                pair_ms * size * (computed + (size + 1) / 2) + self.chunk_at(size, computed) - self.launch_ms
                for computed, size in batch.chunks
            ]
            chunks = self.launch_ms + sum(each)
        if n == 0:
            return rest + chunks
        mean = batch.decode_tokens / n
        lead = (batch.longest - mean) / n
        if not batch.chunks:
            return rest + self.decode_at(n, mean + self.tail_alone * lead)
        context, tokens = mean + self.tail_hybrid * lead, sum(size for _, size in batch.chunks)
        return rest + max(chunks, self.floor_at(context)) + self.hybrid_at(tokens, n, context)

    def sequence_at(self, n: int) -> float:
        """Milliseconds of output head and sampler for n sequences; past the last entry the last step goes on."""
        table = self.sequence_ms
        if n <= len(table):
            return table[n - 1]
        step = table[-1] - table[-2] if len(table) > 1 else 0.0
        return table[-1] + step * (n - len(table))

    def scaled(self, factor: float) -> Surface:
        """The surface of a device on which everything takes `factor` times as long."""
        times = {name: _times(getattr(self, name), factor) for name in _TIMES}
        return replace(self, **times)

    def rounded(self) -> Surface:
        """The surface with times of four significant digits, for files."""
        return replace(self, **{name: _rounded(getattr(self, name)) for name in _TIMES})

    def with_mixing(self, factor: float) -> Surface:
        """The surface on which decodes beside a chunk cost `factor` times as much of what they add."""
        return replace(self, hybrid_ms=_times(self.hybrid_ms, factor), floor_ms=_times(self.floor_ms, factor))

    def packed(self, max_num_seqs: int) -> np.ndarray:
        """Knots, seconds and tables as the kernels of `llmsched_gym.engine.surface` read them, float64."""
        head = [
            *(len(x) for x in (self.sequences, self.context, self.chunk, self.prefix)),
            *(math.log2(x) for x in (self.context[0], self.chunk[0], self.prefix[1])),
            self.tail_alone,
            self.tail_hybrid,
            self.launch_ms / 1e3,
            self.chunk_batch_ms / 1e3,
            max_num_seqs + 1,
        ]
        by_count = tuple(0.0 if n == 0 else self.sequence_at(n) for n in range(max_num_seqs + 1))
        tables: list[Any] = [by_count, self.decode_ms, self.chunk_ms, self.hybrid_ms, self.floor_ms]
        return np.concatenate([head, *(np.ravel(table) / 1e3 for table in tables)])

    @classmethod
    def additive(cls, kv_ms: float, *, factor: float = 1.0, sequences: int = 256, tokens: int = 1 << 15) -> Surface:
        """Every KV token costs `kv_ms`, and `factor` times as much where a decode reads it beside a chunk.

        With factor 1 it is the sum that profiles without a surface are; the price of mixing alone sets it apart.
        """
        n, k = _octaves(sequences), _octaves(tokens)
        prefix = (0, *k)
        decode = np.outer(n, k) * kv_ms
        return cls(
            sequences=n,
            context=k,
            chunk=k,
            prefix=prefix,
            decode_ms=nested(decode),
            chunk_ms=nested(kv_ms * np.add.outer(np.array(k), np.array(prefix))),
            hybrid_ms=nested(np.broadcast_to(factor * decode, (len(k), *decode.shape))),
            floor_ms=(0.0,) * len(k),
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Surface:
        """A surface from its JSON form, whose fields are known to be there."""
        return cls(**{name: _frozen(value) for name, value in data.items()})


_TIMES = ("decode_ms", "chunk_ms", "hybrid_ms", "floor_ms", "launch_ms", "chunk_batch_ms", "sequence_ms")


def _interpolate(table: np.ndarray, *at: tuple[Sequence[int], float]) -> float:
    """Multilinear in each axis' own unit; `at` is (knots, value) by axis."""
    for knots, value in at:
        x = max(float(value), float(knots[0]))
        i = min(max(int(np.searchsorted(knots, x, side="right")) - 1, 0), len(knots) - 2)
        share = (x - knots[i]) / (knots[i + 1] - knots[i])
        table = table[i] + share * (table[i + 1] - table[i])
    return float(table)


def _octaves(last: int) -> tuple[int, ...]:
    return tuple(1 << i for i in range(last.bit_length()))


def _times(value: Any, factor: float) -> Any:
    return tuple(_times(v, factor) for v in value) if isinstance(value, tuple) else factor * value


def _rounded(value: Any) -> Any:
    return tuple(map(_rounded, value)) if isinstance(value, tuple) else rounded(value)


def rounded(value: float) -> float:
    """To four significant digits: measurements have no more."""
    return float(f"{value:.4g}")


def nested(table: np.ndarray) -> Any:
    """An array as tuples of tuples."""
    return tuple(nested(row) for row in table) if table.ndim > 0 else float(table)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def _check_knots(name: str, knots: Any, first: int | None) -> None:
    where = f"surface.{name}"
    whole = isinstance(knots, tuple) and all(isinstance(x, int) and not isinstance(x, bool) for x in knots)
    if not whole or len(knots) < (3 if first == 0 else 2):
        raise ProfileError(f"{where}: expected at least {3 if first == 0 else 2} whole numbers, got {knots!r}")
    if first is not None and knots[0] != first:
        raise ProfileError(f"{where}: expected {first} as the first knot, got {knots[0]}")
    powers = knots[1:] if first == 0 else knots
    if powers[0] < 1 or powers[0] & (powers[0] - 1) or any(b != 2 * a for a, b in itertools.pairwise(powers)):
        raise ProfileError(f"{where}: expected powers of two, each twice the one before, got {list(knots)}")


def _check_table(name: str, table: Any, shape: tuple[int, ...], signed: bool = False) -> None:
    what = f"numbers from {-MOST_MS if signed else 0:g} to {MOST_MS:g}"
    try:
        values = np.array(table)
    except ValueError:  # rows of different lengths
        values = np.zeros(0)
    if values.dtype.kind not in "iuf":  # text would pass for numbers
        values = np.zeros(0)
    low = -MOST_MS if signed else 0.0
    if values.shape != shape or not ((values >= low) & (values <= MOST_MS)).all():
        size = " x ".join(str(n) for n in shape)
        raise ProfileError(f"surface.{name}: expected {size} {what}")
