"""What agents see, declared once: spaces, arrays, their copies and the documentation follow from these tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

from llmsched_gym.config import ConfigError, EnvConfig
from llmsched_gym.env.feature import Feature
from llmsched_gym.env.features import MIXING, WIDTHS, features_of
from llmsched_gym.env.kernels import observe_slots_of
from llmsched_gym.env.slots import NUM_SLOTS, slot_features_of


@dataclass(frozen=True)
class Part:
    """One array of an observation, a field of :class:`~llmsched_gym.env.arrays.Arrays`."""

    array: str
    # of a row, of an environment with so many features (None: as its profile has); no function: whether it is in use
    entries: Callable[[EnvConfig, int | None], tuple[Feature, ...]] | None
    num_rows: int | None = None  # None: there is one, which has no axis of rows

    def space(self, config: EnvConfig, num_features: int | None = None) -> spaces.Space:
        """Box of float32 (num_rows, num_entries) or (num_entries,); masks are MultiBinary (num_rows,)."""
        rows = () if self.num_rows is None else (self.num_rows,)
        if self.entries is None:
            return spaces.MultiBinary(self.num_rows or ())  # TorchRL reads a number as its length, and no tuple of one
        entries = self.entries(config, num_features)
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

    def space(self, config: EnvConfig, num_features: int | None = None) -> spaces.Space:
        """The space of one environment's observations."""
        found = {key: part.space(config, num_features) for key, part in self.parts.items()}
        return next(iter(found.values())) if len(found) == 1 else spaces.Dict(found)

    def reader(self, arrays: Any) -> Callable[[Any], Any]:
        """What copies observations out of the arrays: of one environment by its index, of all by ``...``."""
        views = {key: getattr(arrays, part.array) for key, part in self.parts.items()}
        if len(views) == 1:
            (view,) = views.values()
            return lambda where: view[where].copy()
        return lambda where: {key: view[where].copy() for key, view in views.items()}


FEATURES_PART = Part("features", features_of)
OBSERVATIONS: dict[str, Observation] = {
    "features": Observation(
        f"The state as a whole, in numbers; `Box({WIDTHS[1]})` where the profile behind the scheduler's\n"
        "predictions has a surface ([formats.md](formats.md)). Only there it can take longer to mix decodes and\n"
        f"prompts than to keep them apart; `{MIXING.name}` says whether it does (over 0.5). `Box({WIDTHS[2]})` with\n"
        "`prefix_caching`: the entries behind it say what of the waiting prompts is cached.\n"
        "`feature_names` has an environment's names.",
        {"features": FEATURES_PART},
    ),
    "slots": Observation(
        "The rows are running requests by admission, then waiting ones by arrival, preempted ones first. `in_use`\n"
        "says which rows hold one; `features`, as above, sums up the rest. It is no mask of actions: that is\n"
        "`action_masks()`.",
        {
            "slots": Part("rows", slot_features_of, NUM_SLOTS),
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


def observation_space(config: EnvConfig, num_features: int | None = None) -> spaces.Space:
    """The space of one environment's observations; `num_features` None: as many features as its profile has."""
    kind = observation_of(config)
    if kind is not None:
        return kind.space(config, num_features)
    space = getattr(config.observation, "space", None)
    if not isinstance(space, spaces.Space):
        raise ConfigError(f"observation: expected an object with a gymnasium space in `space`, got {space!r}")
    return space


def as_observation(space: spaces.Space, seen: Any) -> Any:
    """What an object of the user's made of the state, as an element of its space: arrays copied, of the space's dtype.

    Raises :class:`ConfigError` for what is none, such as a wrong shape, a forgotten return or nan.
    """
    found = _cast(space, seen)
    if not space.contains(found):
        wrong_shape = isinstance(found, np.ndarray) and found.shape != space.shape
        shown = f"an array of shape {found.shape}" if wrong_shape else " ".join(repr(seen).split())
        raise ConfigError(f"observation: expected an element of {space}, got {shown:.80}")
    return found


def _cast(space: spaces.Space, seen: Any) -> Any:
    """`seen` with its arrays as `space` has them, as far as its parts are where they should be."""
    if isinstance(space, spaces.Dict) and isinstance(seen, Mapping):
        return {key: _cast(space[key], value) if key in space.spaces else value for key, value in seen.items()}
    if isinstance(space, spaces.Tuple) and isinstance(seen, tuple | list):
        return tuple(_cast(*pair) for pair in zip(space, seen, strict=True)) if len(seen) == len(space) else seen
    if not isinstance(space, spaces.Box | spaces.MultiBinary | spaces.MultiDiscrete):
        return seen
    try:
        return np.array(seen, space.dtype)
    except (TypeError, ValueError):
        return None
