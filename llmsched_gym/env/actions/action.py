"""What a kind of action is, and how its actions are checked: dtype and shape here, the range by the step kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from llmsched_gym.config import ACTIONS as MOST_BATCHES
from llmsched_gym.config import EnvConfig


class InvalidAction(gym.error.InvalidAction, ValueError):
    """An action outside its space; the message is one line that names the entry, its range and the value."""


class Choice(NamedTuple):
    """An entry of an action that takes one of a few values."""

    name: str
    labels: tuple[str, ...]  # the values, as people and policy folders write them


def no_choices(config: EnvConfig) -> tuple[Choice, ...]:
    """Of actions whose entries are not each one of a few values."""
    return ()


@dataclass(frozen=True)
class Action:
    """A kind of action: all that environments, policies and agents know of it.

    Its kernels read the action from `choices` (integers) or `scores` (floats) of the arrays, see
    :class:`~llmsched_gym.env.arrays.Arrays`, and put it before the lane; the loops around them are those of
    ``env/kernels.py``. From Python they are reached through this record alone.
    """

    name: str
    what: str  # one action, for the page of the environment
    docs: Callable[[], str]  # its section of that page, Markdown
    space: Callable[[EnvConfig], spaces.Space]  # of one environment's actions: integers or float32
    expected: Callable[[EnvConfig, tuple[int, ...]], str]  # what an entry, by its index, should be
    touches: tuple[str, ...]  # fields of the lane that `put` writes
    legal: Any  # kernel (arrays, env) -> whether the action is in its space
    put: Any  # kernel (lane, arrays, env): put the action where the scheduler that forms the batch reads it
    step: Any  # entry (handle, arrays, first, stop): one decision of those environments
    decide: Any  # entry (handle, arrays, env): form the next batch; returns whether it is closed
    run: Any = None  # entry (handle, arrays, env, most steps, most idle steps): batches under one action
    reopen: Any = None  # entry (handle, arrays, env): start the batch that actions fill item by item
    mask: Any = None  # entry (handle, masks): which actions are legal now; None: all that are in the space, at any time
    has_masks: bool = True  # whether single actions can be legal or not; scores cannot
    has_budget: bool = True  # whether its batches keep to the configuration's token_budget
    choices: Callable[[EnvConfig], tuple[Choice, ...]] = no_choices  # of each entry, where all are such
    # Where there are no choices: scores that a network gives for each slot and besides, and the action that they mean,
    # (scores, mask of legal actions or None) -> action. Of choices the one with the highest score is taken.
    scores: tuple[int, int] = (0, 0)
    of_scores: Callable[..., Any] | None = None
    adapt: Callable[[np.ndarray, EnvConfig, EnvConfig], np.ndarray] | None = None  # from one configuration to another

    @property
    def by_item(self) -> bool:
        """Whether a batch takes many actions; their policies are called with the mask of what is legal."""
        return self.reopen is not None

    @property
    def is_held(self) -> bool:
        """Whether one action may decide several batches."""
        return MOST_BATCHES[self.name] > 1

    def num_scores(self, config: EnvConfig) -> tuple[int, int]:
        """How many scores a network gives: for the slots, and others."""
        choices = self.choices(config)
        return (0, sum(len(choice.labels) for choice in choices)) if choices else self.scores

    def all_legal(self, config: EnvConfig, num_envs: int) -> np.ndarray:
        """Masks for `mask` to fill in; (num_envs, number of single actions) bool, all True.

        AttributeError where single actions have none.
        """
        if not self.has_masks:
            raise AttributeError(f"action_masks: {self.name} actions have no mask, every score is legal")
        space = self.space(config)
        number = int(space.n) if isinstance(space, spaces.Discrete) else sum(self.num_scores(config))
        return np.ones((num_envs, number), np.bool_)


def as_array(space: spaces.Space, given: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The action `given` as an array of numbers of `shape`: that of `space`, or with an axis of environments in front.

    Integers of any width and lists of integers are accepted, in a space of floats these too. Raises
    :class:`InvalidAction`.
    """
    numbers = space.dtype is not None and space.dtype.kind == "f"
    try:
        found = np.asarray(given)
    except (ValueError, TypeError):  # rows of different lengths, or what refuses to be an array
        raise InvalidAction(_mismatch(numbers, shape, f"{type(given).__name__} that is no array")) from None
    if found.shape != shape or found.dtype.kind not in ("fiu" if numbers else "iu"):
        raise InvalidAction(_mismatch(numbers, shape, f"{found.dtype} of shape {found.shape}"))
    if numbers:
        with np.errstate(over="ignore"):  # what overflows is outside the range
            return found.astype(space.dtype)
    return found


def _mismatch(numbers: bool, shape: tuple[int, ...], got: str) -> str:
    expected = f"{'numbers' if numbers else 'integers'} of shape {shape}" if shape else "an integer"
    return f"action: expected {expected}, got {got}"


def check_range(
    action: Action, config: EnvConfig, actions: np.ndarray, given: Any = None, paused: np.ndarray | None = None
) -> None:
    """Raise :class:`InvalidAction` for the first entry of `actions` that is outside its range.

    `actions` has an axis of environments in front; those in `paused` take none. The message quotes `given`, which is
    what the caller passed: one action without that axis, or one for each environment.
    """
    low, high = _range(action.space(config))
    wrong = ~((actions >= low) & (actions <= high))  # so is nan
    if paused is not None:
        wrong[paused != 0] = False
    if not wrong.any():
        return
    place = tuple(np.argwhere(wrong)[0].tolist())
    values = actions if given is None else np.asarray(given)
    single = values.ndim < actions.ndim
    value = values[place[1:] if single else place]
    where = "action" if single or len(actions) == 1 else f"action of environment {place[0]}"
    raise InvalidAction(f"{where}: {action.expected(config, place[1:])}, got {value}")


def _range(space: spaces.Space) -> tuple[Any, Any]:
    """The least and the largest value of each entry."""
    if isinstance(space, spaces.Box):
        return space.low, space.high
    if isinstance(space, spaces.MultiDiscrete):
        return space.start, space.start + space.nvec - 1
    if isinstance(space, spaces.Discrete):
        return space.start, space.start + space.n - 1
    raise TypeError(f"space: expected Box, MultiDiscrete or Discrete, got {space}")
