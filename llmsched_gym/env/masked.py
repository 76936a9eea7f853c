"""Masks of legal actions inside observations, under the names where training libraries look for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from llmsched_gym.config import MASK_NAMES, ConfigError

FLOAT_MASKS = ("rllib",)
"""Libraries whose masks are numbers: RLlib's ActionMaskingRLModule adds log(mask) to the logits. Else they are bool."""
DISCRETE_ONLY = ("tianshou",)
"""Libraries that mask actions of one number alone: Tianshou's DiscreteQLearningPolicy has a value for each."""


class MaskPlace(NamedTuple):
    """Where observation and mask stand in what an agent sees."""

    observation: str
    mask: str
    dtype: type  # of the mask: bool or float32

    def space(self, seen: spaces.Space, num_actions: int) -> spaces.Dict:
        """Dict of the observation's space and a Box of 0 and 1, (num_actions,)."""
        return spaces.Dict({self.observation: seen, self.mask: spaces.Box(0, 1, (num_actions,), self.dtype)})

    def put(self, seen: Any, masks: np.ndarray) -> dict[str, Any]:
        """The observation, of one environment or of many, beside its masks (..., num_actions) bool."""
        return {self.observation: seen, self.mask: masks.astype(self.dtype, copy=False)}


def mask_place(config: Any) -> MaskPlace | None:
    """Where the masks of an environment stand; None where they are no part of the observation."""
    given = config.mask_in_observation
    if given is None:
        return None
    observation, mask = MASK_NAMES[given] if isinstance(given, str) else given
    return MaskPlace(observation, mask, np.float32 if given in FLOAT_MASKS else np.bool_)


def seen_with_masks(config: Any, seen: spaces.Space, actions: spaces.Space) -> spaces.Space:
    """The space of what an agent sees: `seen`, with the masks of `actions` where the configuration wants them."""
    place = mask_place(config)
    return seen if place is None else place.space(seen, mask_length(config, actions))


def mask_length(config: Any, actions: spaces.Space) -> int:
    """How many entries the mask of a space of actions has.

    Of a Discrete space one an action; of a MultiDiscrete one those of all its entries, one behind the other, as RLlib's
    logits and TorchRL's MultiCategorical have them. ConfigError for actions without masks, and where the library has no
    use for them.
    """
    if isinstance(actions, spaces.Discrete):
        return int(actions.n)
    given = config.mask_in_observation
    if not isinstance(actions, spaces.MultiDiscrete):
        raise ConfigError(
            f"mask_in_observation: expected None with action={config.action!r}, which has no masks, got {given!r}"
        )
    if given in DISCRETE_ONLY:
        what = "expected an action that is one number (preset, request), as it masks no others, with"
        raise ConfigError(f"mask_in_observation: {what} {given!r}, got action={config.action!r}")
    return int(actions.nvec.sum())
