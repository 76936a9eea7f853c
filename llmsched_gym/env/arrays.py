"""What agents put in and get out, as arrays over all environments, and their handle for the step kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.experimental import structref
from numba.np.numpy_support import from_dtype

from llmsched_gym.config import EnvConfig
from llmsched_gym.engine.jit import JIT_ENABLED, kernel
from llmsched_gym.env.actions.knobs import KNOBS, knob_values
from llmsched_gym.env.features import NUM_FEATURES
from llmsched_gym.env.reward import RULES, TERMS, rules_of
from llmsched_gym.env.slots import NUM_SLOT_FEATURES, NUM_SLOTS

# columns of the outcome of a step; the parts of the reward follow, and what `info` tells of it stands side by side
REWARD, TERMINATED, TRUNCATED, PAUSED, DURATION_S, DISCOUNT, FIRST_TERM = range(7)
# PAUSED is asked, not told: not 0 for an environment that the step is to leave as it is


class Arrays(NamedTuple):
    """Actions, constants, outcomes and observations; an axis of length 0 is not in use."""

    knob_actions: Any  # (num_envs, num_knobs) int64, index of each knob's value
    scores: Any  # (num_envs, NUM_SLOTS) float32, priority actions
    slots: Any  # (num_envs,) int64, request actions
    values: Any  # (num_knobs, most values) float64
    rules: Any  # (1,) RULES
    outcomes: Any  # (num_envs, FIRST_TERM + number of terms) float64
    features: Any  # (num_envs, NUM_FEATURES) float32
    rows: Any  # (num_envs or 0, NUM_SLOTS, NUM_SLOT_FEATURES) float32
    in_use: Any  # (num_envs or 0, NUM_SLOTS) int8


def _array(dtype: Any, ndim: int) -> Any:
    return types.Array(dtype, ndim, "C")


_TYPES = {
    "knob_actions": _array(types.int64, 2),
    "scores": _array(types.float32, 2),
    "slots": _array(types.int64, 1),
    "values": _array(types.float64, 2),
    "rules": _array(from_dtype(RULES), 1),
    "outcomes": _array(types.float64, 2),
    "features": _array(types.float32, 2),
    "rows": _array(types.float32, 3),
    "in_use": _array(types.int8, 2),
}


@structref.register
class ArraysHandleType(types.StructRef):
    """A compiled reference to :class:`Arrays`."""


class ArraysHandle(structref.StructRefProxy):
    """:class:`Arrays` as the step kernels take them; see :class:`llmsched_gym.engine.state.Handle`."""


structref.define_boxing(ArraysHandleType, ArraysHandle)
ARRAYS_HANDLE_TYPE = ArraysHandleType(list(_TYPES.items()))


@kernel(ARRAYS_HANDLE_TYPE(types.NamedTuple(list(_TYPES.values()), Arrays)), counted=True)
def _make_handle(arrays):
    a = structref.new(ARRAYS_HANDLE_TYPE)
    a.knob_actions, a.scores, a.slots = arrays.knob_actions, arrays.scores, arrays.slots
    a.values, a.rules, a.outcomes = arrays.values, arrays.rules, arrays.outcomes
    a.features, a.rows, a.in_use = arrays.features, arrays.rows, arrays.in_use
    return a


@kernel(inline="always")
def unpack_arrays(a):
    """The arrays behind a handle; see :func:`llmsched_gym.engine.state.unpack`."""
    return Arrays(a.knob_actions, a.scores, a.slots, a.values, a.rules, a.outcomes, a.features, a.rows, a.in_use)


def make_arrays(config: EnvConfig, num_envs: int) -> tuple[Arrays, Any]:
    """Zeroed arrays for `num_envs` environments, and their handle."""
    with_slots = num_envs if config.observation == "slots" else 0
    arrays = Arrays(
        knob_actions=np.zeros((num_envs, len(KNOBS) if config.allow_refusal else len(KNOBS) - 1), np.int64),
        scores=np.zeros((num_envs, NUM_SLOTS), np.float32),
        slots=np.zeros(num_envs, np.int64),
        values=knob_values(),
        rules=rules_of(config),
        outcomes=np.zeros((num_envs, FIRST_TERM + len(TERMS))),
        features=np.zeros((num_envs, NUM_FEATURES), np.float32),
        rows=np.zeros((with_slots, NUM_SLOTS, NUM_SLOT_FEATURES), np.float32),
        in_use=np.zeros((with_slots, NUM_SLOTS), np.int8),
    )
    return arrays, _make_handle(arrays) if JIT_ENABLED else arrays
