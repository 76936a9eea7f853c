"""The tile of a device, read off measured times: GeMM kernels work in tiles, so time against tokens is a staircase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

MIN_GAIN = 0.01
CANDIDATES = (32, 64, 128, 256, 512)


def tile_gain(tokens: Sequence[int], ms: Sequence[float], tile: int, max_tokens: int = 2048) -> float | None:
    """Relative time per token that batches of odd multiples of `tile / 2` cost above their neighbours, multiples of it.

    None where the table, `ms` against `tokens`, has no such three neighbours up to `max_tokens`.
    """
    per_token = {n: t / n for n, t in zip(tokens, ms, strict=True) if n <= max_tokens}
    half = tile // 2
    gains = [
        per_token[n] / (0.5 * (per_token[n - half] + per_token[n + half])) - 1.0
        for n in range(3 * half, max_tokens, tile)
        if n in per_token and n - half in per_token and n + half in per_token
    ]
    return float(np.mean(gains)) if gains else None


def best_tile(tokens: Sequence[int], ms: Sequence[float], max_tokens: int = 2048) -> int:
    """The largest tile whose last doubling saved at least 1 % of the time per token; the smallest if none did."""
    gains = {tile: tile_gain(tokens, ms, tile, max_tokens) for tile in CANDIDATES}
    return max((tile for tile, gain in gains.items() if gain is not None and gain >= MIN_GAIN), default=CANDIDATES[0])


def steps(tokens: np.ndarray, ms: np.ndarray, tile: int) -> dict[str, Any]:
    """What one token too many costs at multiples of `tile`, and what each doubling of a tile saves, as shares.

    `step` maps a multiple to the rise of time per token from it to the next token; `doubling` a tile to what odd
    multiples of its half cost above their neighbours.
    """
    ms_of = dict(zip(tokens.tolist(), ms.tolist(), strict=True))
    edges = [n for n in range(tile, int(tokens[-1]), tile) if n in ms_of and n + 1 in ms_of]
    rises = {n: (ms_of[n + 1] / (n + 1)) / (ms_of[n] / n) - 1.0 for n in edges}
    gains = {t: tile_gain(tokens.tolist(), ms.tolist(), t) for t in CANDIDATES}
    return {"step": rises, "doubling": {t: gain for t, gain in gains.items() if gain is not None}}


def off_tile_cost(tokens: np.ndarray, ms: np.ndarray, tile: int, max_tokens: int = 2048) -> dict[int, float]:
    """Relative time per token of measured batches between two multiples of `tile`, above the line between those two.

    By the upper multiple, means over the batches; that is what filling batches up to the tile saves there.
    """
    per_token = {n: t / n for n, t in zip(tokens.tolist(), ms.tolist(), strict=True)}
    found = {}
    for high in range(2 * tile, max_tokens + 1, tile):
        low = high - tile
        between = [n for n in per_token if low < n < high]
        if low in per_token and high in per_token and between:
            line = np.interp(between, (low, high), (per_token[low], per_token[high]))
            found[high] = float(np.mean([per_token[n] for n in between] / line)) - 1.0
    return found
