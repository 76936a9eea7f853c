"""What agents see, declared once: spaces, arrays, their copies and the documentation follow from these tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

from llmsched_gym.config import ConfigError, EnvConfig
from llmsched_gym.env.features import Feature, features_of
from llmsched_gym.env.kernels import observe_slots_of
from llmsched_gym.env.slots import NUM_SLOTS, SLOT_FEATURES


@dataclass(frozen=True)
class Part:
    """One array of an observation, a field of :class:`~llmsched_gym.env.arrays.Arrays`."""

    array: str
    entries: Callable[[EnvConfig], tuple[Feature, ...]] | None  # of a row; None: one number, whether the row is in use
    num_rows: int | None = None  # None: there is one, which has no axis of rows

    def space(self, config: EnvConfig) -> spaces.Space:
        rows = () if self.num_rows is None else (self.num_rows,)
        if self.entries is None:
            return spaces.MultiBinary(rows)
        entries = self.entries(config)
        low = np.tile(np.array([f.low for f in entries], np.float32), (*rows, 1))
        high = np.tile(np.array([f.high for f in entries], np.float32), (*rows, 1))
        shape = (*rows, len(entries))
        return spaces.Box(low.reshape(shape), high.reshape(shape), dtype=np.float32)


@dataclass(frozen=True)
class Observation:
    """A kind of observation: one array, or a dict of several."""

    what: str  # for the page of the environment, Markdown
    parts: dict[str, Part]  # by their keys
    fill: Any = (
        None  # entry (handle, arrays, first, stop): fill what `observe_features` does not, of these environments
    )

    def space(self, config: EnvConfig) -> spaces.Space:
        """The space of one environment's observations."""
        if len(self.parts) == 1:
            return next(iter(self.parts.values())).space(config)
        return spaces.Dict({key: part.space(config) for key, part in self.parts.items()})

    def reader(self, arrays: Any) -> Callable[[Any], Any]:
        """What copies observations out of the arrays: of one environment by its index, of all by ``...``."""
        views = {key: getattr(arrays, part.array) for key, part in self.parts.items()}
        if len(views) == 1:
            (view,) = views.values()
            return lambda where: view[where].copy()
        return lambda where: {key: view[where].copy() for key, view in views.items()}


FEATURES_PART = Part("features", features_of)
OBSERVATIONS: dict[str, Observation] = {
    "features": Observation("The state as a whole, in numbers.", {"features": FEATURES_PART}),
    "slots": Observation(
        "The rows are running requests by admission, then waiting ones by arrival, preempted ones first. `in_use`\n"
        "says which rows hold one; `features` sums up the rest. It is no mask of actions: that is `action_masks()`.",
        {
            "slots": Part("rows", lambda config: SLOT_FEATURES, NUM_SLOTS),
            "in_use": Part("in_use", None, NUM_SLOTS),
            "features": FEATURES_PART,
        },
        observe_slots_of,
    ),
}
"""By their names in :data:`llmsched_gym.config.OBSERVATIONS`."""

PARTS = tuple({part.array: part for kind in OBSERVATIONS.values() for part in kind.parts.values()}.values())


def observation_of(config: EnvConfig) -> Observation | None:
    """The kind of observation of an environment; None for an object of the user's."""
    return OBSERVATIONS[config.observation] if isinstance(config.observation, str) else None


def observation_space(config: EnvConfig) -> spaces.Space:
    """The space of one environment's observations."""
    kind = observation_of(config)
    if kind is not None:
        return kind.space(config)
    space = getattr(config.observation, "space", None)
    if not isinstance(space, spaces.Space):
        raise ConfigError(f"observation: expected an object with a gymnasium space in `space`, got {space!r}")
    return space
