"""Random streams of a seed: every purpose has one of its own, so that no setting moves another one's draws."""

from __future__ import annotations

import numbers

import numpy as np

from llmsched_gym.config import ConfigError

EPISODE_STREAM, GAP_STREAM, REQUEST_STREAM, HINT_STREAM, HOLD_STREAM, NOISE_STREAM = range(6)
SESSION_STREAM, PAST_SESSION_STREAM, PAST_GAP_STREAM = range(6, 9)
QPS, START_SIDE, STRICT_SHARE, COST_SCALE, BACKLOG, FIRST_ROW = range(6)
"""Draws of the episode stream, by position; all are always drawn, so that a setting moves no other's draw."""


def rng(seed: int, *stream: int) -> np.random.Generator:
    """The generator of a stream, by its purpose and, where it has parts, which."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=stream)))


def uniform(value: float | tuple[float, float], draw: float) -> float:
    """A fixed setting, or one drawn from its range."""
    if isinstance(value, tuple | list):
        low, high = value
        return float(low + (high - low) * draw)
    return float(value)


def check_seed(seed: int, bits: int | None = None) -> int:
    """The seed as Python's int; raises :class:`ConfigError` for anything but a whole number of at most `bits` bits."""
    is_whole = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
    if not is_whole or seed < 0 or (bits is not None and seed >= 2**bits):
        most = "" if bits is None else f" and < 2**{bits}"
        raise ConfigError(f"seed: expected a whole number >= 0{most}, got {seed!r}")
    return int(seed)
