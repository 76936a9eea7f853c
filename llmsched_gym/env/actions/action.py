"""Actions as Python hands them in: dtype and shape are looked at here, the range by the step kernels."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from llmsched_gym.config import EnvConfig
from llmsched_gym.env.actions.knobs import knobs_for
from llmsched_gym.env.slots import NUM_SLOTS

_KINDS = {"knobs": "iu", "priority": "fiu", "request": "iu"}
_WORDS = {"knobs": "integers", "priority": "numbers", "request": "integers"}


class InvalidAction(gym.error.InvalidAction, ValueError):
    """An action outside its space; the message is one line that names the entry, its range and the value."""


def as_array(kind: str, given: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The action `given` as an array of numbers of `shape`; `kind` is the configuration's.

    Integers of any width and lists of integers are accepted, for priorities floats too. Raises :class:`InvalidAction`.
    """
    try:
        found = np.asarray(given)
    except (ValueError, TypeError):  # rows of different lengths, or what refuses to be an array
        raise InvalidAction(_mismatch(kind, shape, f"{type(given).__name__} that is no array")) from None
    if found.shape != shape or found.dtype.kind not in _KINDS[kind]:
        raise InvalidAction(_mismatch(kind, shape, f"{found.dtype} of shape {found.shape}"))
    if kind == "priority":
        with np.errstate(over="ignore"):  # what overflows is outside the range
            return found.astype(np.float32)
    return found


def _mismatch(kind: str, shape: tuple[int, ...], got: str) -> str:
    expected = "an integer" if not shape else f"{_WORDS[kind]} of shape {shape}"
    return f"action: expected {expected}, got {got}"


def check_range(config: EnvConfig, actions: np.ndarray, given: Any = None, paused: np.ndarray | None = None) -> None:
    """Raise :class:`InvalidAction` for the first entry of `actions` that is outside its range.

    `actions` has an axis of environments in front; those in `paused` take none. The message quotes `given`, which is
    what the caller passed: one action without that axis, or one for each environment.
    """
    wrong = ~_inside(config, actions)
    if paused is not None:
        wrong[paused != 0] = False
    if not wrong.any():
        return
    place = tuple(np.argwhere(wrong)[0].tolist())
    values = actions if given is None else np.asarray(given)
    single = values.ndim < actions.ndim
    value = values[place[1:] if single else place]
    where = "action" if single or len(actions) == 1 else f"action of environment {place[0]}"
    raise InvalidAction(f"{where}: {_expected(config, place[1:])}, got {value}")


def _inside(config: EnvConfig, actions: np.ndarray) -> np.ndarray:
    if config.action == "priority":
        return np.abs(actions) <= 1.0  # false for nan
    counts = np.array([len(k.values) for k in knobs_for(config)]) if config.action == "knobs" else NUM_SLOTS + 1
    return (actions >= 0) & (actions < counts)


def _expected(config: EnvConfig, entry: tuple[int, ...]) -> str:
    if config.action == "knobs":
        knob = knobs_for(config)[entry[0]]
        return f"{knob.name}: expected the index of a value, 0 to {len(knob.values) - 1}"
    if config.action == "priority":
        return f"slot {entry[0]}: expected a score from -1 to 1"
    return f"expected a slot, 0 to {NUM_SLOTS - 1}, or {NUM_SLOTS} to close the batch"
