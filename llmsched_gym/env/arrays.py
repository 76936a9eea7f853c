"""What agents put in and get out, as arrays over all environments, and their handle for the step kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import types
from numba.np.numpy_support import from_dtype

from llmsched_gym.engine.handles import as_handle, handle_type
from llmsched_gym.engine.jit import kernel
from llmsched_gym.env.reward import RULES, TERMS

# columns of the outcome of a step; the parts of the reward follow, and what `info` tells of it stands side by side
REWARD, TERMINATED, TRUNCATED, PAUSED, DURATION_S, DISCOUNT, FIRST_TERM = range(7)
INFOS = ("duration_s", "discount", *(f"reward_{name}" for name in TERMS))
"""What `info` tells of a step: the columns of its outcome from DURATION_S on."""
# PAUSED is asked, not told: not 0 for an environment that the step is to leave as it is


class Arrays(NamedTuple):
    """Actions, constants, outcomes and observations; an axis of length 0 is not in use."""

    choices: Any  # (num_envs or 0, entries of an action) int64, actions of integers
    scores: Any  # (num_envs or 0, entries of an action) float32, actions of numbers
    rules: Any  # (1,) RULES
    outcomes: Any  # (num_envs, FIRST_TERM + number of terms) float64
    features: Any  # (num_envs, number of features) float32
    rows: Any  # (num_envs or 0, NUM_SLOTS, number of slot_features_of) float32
    in_use: Any  # (num_envs or 0, NUM_SLOTS) int8


def _array(dtype: Any, ndim: int) -> Any:
    return types.Array(dtype, ndim, "C")


_TYPES = {
    "choices": _array(types.int64, 2),
    "scores": _array(types.float32, 2),
    "rules": _array(from_dtype(RULES), 1),
    "outcomes": _array(types.float64, 2),
    "features": _array(types.float32, 2),
    "rows": _array(types.float32, 3),
    "in_use": _array(types.int8, 2),
}


ARRAYS_TYPE = types.NamedTuple(list(_TYPES.values()), Arrays)
ARRAYS_HANDLE_TYPE = handle_type(ARRAYS_TYPE)


@kernel(ARRAYS_HANDLE_TYPE(ARRAYS_TYPE), counted=True)
def handle_of(arrays):
    """What the step kernels take for these arrays."""
    return as_handle(arrays)
