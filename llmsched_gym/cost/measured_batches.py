"""Measured batches, and the format of their tables.

A CSV or a DataFrame with one row per batch: `prefill`, items "computed:n" joined by ";" (or empty); `decode`, context
lengths in tokens joined by ";" (or empty); `ms`, the measured time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmsched_gym.cost.surface import ProfileError
from llmsched_gym.text import shown

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("prefill", "decode", "ms")
LEAST_MS, MOST_MS, MOST_TOKENS = 1e-6, 1e6, 1 << 24
"""What one batch may take, and the tokens of one number: anything else is a fault of the file."""


@dataclass(frozen=True)
class Batch:
    """One measured batch."""

    chunks: tuple[tuple[int, int], ...]  # (computed, n) tokens of each prefill chunk
    decode_contexts: tuple[int, ...]  # tokens
    ms: float

    @property
    def num_tokens(self) -> int:
        """Tokens to compute: those of the chunks, and one a decode."""
        return sum(n for _, n in self.chunks) + len(self.decode_contexts)


def kind_of(batch: Batch) -> str:
    """decodes, chunks or hybrid."""
    return "hybrid" if batch.chunks and batch.decode_contexts else "chunks" if batch.chunks else "decodes"


def batch_row(chunks: Sequence[tuple[int, int]], decode_contexts: Sequence[int], ms: float) -> dict[str, Any]:
    """A measured batch as a row of the measurements' format."""
    return {
        "prefill": ";".join(f"{computed}:{n}" for computed, n in chunks),
        "decode": ";".join(str(context) for context in decode_contexts),
        "ms": ms,
    }


def read_batches(measurements: str | Path | pd.DataFrame) -> list[Batch]:
    """Batches from a CSV file or a DataFrame; raises :class:`ProfileError` naming line (or row) and column."""
    import pandas as pd

    if isinstance(measurements, pd.DataFrame):
        table, where, unit, first = measurements, "measurements", "row", 0
    else:
        where, unit, first = str(measurements), "line", 2
        try:
            table = pd.read_csv(measurements, dtype=str, keep_default_na=False, skip_blank_lines=False)
        except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
            text = " ".join(str(getattr(error, "strerror", None) or error).split())
            raise ProfileError(f"{where}: cannot read: {text}") from None
    for column in COLUMNS:
        if column not in table.columns:
            raise ProfileError(f"{where}: no column {column!r}; expected {', '.join(COLUMNS)}")
        if f"{column}.1" in table.columns:  # which is what pandas calls a second one
            raise ProfileError(f"{where}: column {column!r} is there twice")
    batches = []
    for i, (prefill, decode, ms) in enumerate(zip(*(table[column] for column in COLUMNS), strict=True)):
        at = f"{where}: {unit} {first + i}"
        batch = Batch(_parse_chunks(prefill, at), _parse_contexts(decode, at), _parse_ms(ms, at))
        if batch.num_tokens == 0:
            raise ProfileError(f"{at}: an empty batch; prefill and decode are both empty")
        batches.append(batch)
    return batches


def _parse_chunks(text: Any, at: str) -> tuple[tuple[int, int], ...]:
    try:
        chunks = tuple((int(computed), int(n)) for computed, n in (item.split(":") for item in _items(text)))
    except ValueError:
        chunks = ((-1, 0),)
    if any(not (0 <= computed <= MOST_TOKENS and 1 <= n <= MOST_TOKENS) for computed, n in chunks):
        what = f"expected items computed:n of at most {MOST_TOKENS:,} tokens joined by ';'"
        raise ProfileError(f"{at}, column 'prefill': {what}, got {shown(text)}")
    return chunks


def _parse_contexts(text: Any, at: str) -> tuple[int, ...]:
    try:
        contexts = tuple(int(item) for item in _items(text))
    except ValueError:
        contexts = (0,)
    if any(not 1 <= context <= MOST_TOKENS for context in contexts):
        what = f"expected context lengths of at most {MOST_TOKENS:,} tokens joined by ';'"
        raise ProfileError(f"{at}, column 'decode': {what}, got {shown(text)}")
    return contexts


def _parse_ms(text: Any, at: str) -> float:
    try:
        ms = float(text)
    except (TypeError, ValueError):
        ms = np.nan
    if not (LEAST_MS <= ms <= MOST_MS):
        raise ProfileError(
            f"{at}, column 'ms': expected a time from {LEAST_MS:g} to {MOST_MS:,.0f} ms, got {shown(text)}"
        )
    return ms


def _items(text: Any) -> list[str]:
    """The parts of a cell; a DataFrame may hold a lone context as a number and an empty cell as NaN."""
    if text is None or text != text:
        return []
    if isinstance(text, float) and text.is_integer():
        text = int(text)
    return [item for item in str(text).strip().split(";") if item]
