"""The tile of a device, read off measured times: GeMM kernels work in tiles, so time against tokens is a staircase."""

from __future__ import annotations

from collections.abc import Sequence

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
