"""Rewards and observations of the user's over all environments in one call: arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, iterate

from llmsched_gym.config import ConfigError
from llmsched_gym.engine.state import State
from llmsched_gym.engine.view import VISIBLE
from llmsched_gym.env.arrays import DURATION_S, FIRST_TERM, PAUSED, REWARD, Arrays
from llmsched_gym.env.observations import as_observation
from llmsched_gym.env.reward import TERMS, as_rewards

F = TypeVar("F", bound=Callable[..., Any])


def batched(function: F) -> F:
    """Mark a reward, or an observation's `observe`, as one that takes :class:`Moments` of all environments at once.

    Such a reward returns numbers (num_envs,), such an `observe` an array (num_envs, *shape of the space), or for a
    ``Dict`` a dict of these. In Python a call costs as much for one environment as for a thousand.
    """
    function.batched = True  # type: ignore[attr-defined]
    return function


def is_batched(function: Any) -> bool:
    """Whether `function`, or an object that can be called, is marked with :func:`batched`."""
    return any(getattr(where, "batched", False) for where in (function, vars(type(function)).get("__call__")))


class Requests:
    """Requests of several environments, field by field: ``requests["arrival_s"]`` is an array (num_requests,).

    Attributes:
        env: int64 (num_requests,), each one's environment, counted from the first of the :class:`Moments`.
        names: the fields there are.
    """

    def __init__(self, rows: np.ndarray, env: np.ndarray, index: np.ndarray, names: tuple[str, ...]) -> None:
        self._rows, self._index = rows, index
        self.env, self.names = env, names

    def __len__(self) -> int:
        return len(self.env)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.names:
            raise KeyError(f"requests: expected one of {', '.join(self.names)}, got {name!r}")
        return self._index.copy() if name == "index" else np.asarray(self._rows[name][self.env, self._index])

    def count(self, where: np.ndarray | None = None) -> np.ndarray:
        """How many each environment has, int64 (num_envs,); of those in `where`, a mask (num_requests,)."""
        return np.bincount(self.env if where is None else self.env[where], minlength=len(self._rows))

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The sum of `values` (num_requests,) over each environment's requests, float64 (num_envs,)."""
        if np.shape(values) != self.env.shape:
            raise ValueError(f"requests: expected values of shape {self.env.shape}, got {np.shape(values)}")
        return np.bincount(self.env, values, len(self._rows))


_LIVE = tuple(name for name in VISIBLE.names or () if name != "num_uncached_tokens")


class Moments:
    """Environments at one moment, all side by side: the same that a ``View`` and a ``Transition`` tell of one.

    Whatever is asked for is made then, so that a call pays for what it reads.

    Attributes:
        num_envs: environments.
        duration_s: how far the clock moved in the last step, float64 (num_envs,).
        terms: parts of the built-in reward, before ``reward_scale``, each float64 (num_envs,).
        reward: the built-in reward, float64 (num_envs,).
        features: what the observation "features" holds, float32 (num_envs, number of features).
    """

    def __init__(
        self, state: State, arrays: Arrays, first: int, stop: int, resolved_before: np.ndarray | None = None
    ) -> None:
        """Environments first, ..., stop - 1; `resolved_before` (num_envs,) requests were so before the last step."""
        of, outcomes = slice(first, stop), arrays.outcomes[first:stop]
        self.num_envs = stop - first
        self.duration_s = outcomes[:, DURATION_S].copy()
        self.reward = outcomes[:, REWARD].copy()
        self.terms = {name: outcomes[:, FIRST_TERM + k].copy() for k, name in enumerate(TERMS)}
        self.features = arrays.features[of].copy()
        self._state, self._of, self._sims = state, of, state.sims[of]
        self._nobody = np.zeros(self.num_envs, np.int64)
        self._resolved_before = resolved_before

    def __getattr__(self, name: str) -> np.ndarray:
        """Figures of the engine as of a ``View``, and the lengths of its lists, ``num_running`` and ``num_waiting``.

        Each is an array (num_envs,).
        """
        if name not in _FIGURES:
            raise AttributeError(f"Moments has no {name!r}; figures are {', '.join(_FIGURES)}")
        return np.array(self._sims[_FIGURES[name]])

    def _listed(self, lists: np.ndarray, since: np.ndarray, until: np.ndarray, names: tuple[str, ...]) -> Requests:
        """The requests in places `since`, ..., `until` - 1 of `lists`, both (num_envs,)."""
        most = int((until - since).max(initial=0))
        env, place = (np.arange(most) < (until - since)[:, None]).nonzero()
        return Requests(self._state.requests[self._of], env, lists[self._of][env, place + since[env]], names)

    @cached_property
    def running(self) -> Requests:
        """Admitted requests, by admission."""
        return self._listed(self._state.running, self._nobody, self._sims["num_running"], _LIVE)

    @cached_property
    def waiting(self) -> Requests:
        """Waiting requests, by arrival, preempted ones first."""
        return self._listed(self._state.waiting, self._nobody, self._sims["num_waiting"], _LIVE)

    @cached_property
    def resolved(self) -> Requests:
        """Measured requests that finished, left or were refused in the last step; all fields of a record."""
        about, worlds = self._state.episodes[self._of], self._state.worlds[self._of]
        names = ("index", *(self._state.requests.dtype.names or ()))
        since = about["num_resolved"] if self._resolved_before is None else self._resolved_before
        found = self._listed(self._state.resolved, since, about["num_resolved"], names)
        index, env = found["index"], found.env
        is_measured = (index >= worlds["cohort_start"][env]) & (index < worlds["cohort_stop"][env])
        return Requests(self._state.requests[self._of], env[is_measured], index[is_measured], names)


_FIGURES = {
    "now_s": "clock_s",
    **{
        name: name
        for name in (
            *("num_running", "num_waiting", "free_blocks", "total_blocks", "kv_cache_usage"),
            *("mean_batch_s", "last_batch_s", "max_num_seqs", "max_num_batched_tokens"),
        )
    },
}


def observe_all(observation: Any, space: spaces.Space, state: State, arrays: Arrays) -> Any:
    """What the user's batched observation makes of all environments, an element of their `space`."""
    return as_observation(space, observation.observe(Moments(state, arrays, 0, len(arrays.outcomes))))


def observe_one(observation: Any, state: State, arrays: Arrays, env: int) -> Any:
    """What the user's batched observation makes of environment `env` alone."""
    space = batch_space(observation.space)
    seen = as_observation(space, observation.observe(Moments(state, arrays, env, env + 1)))
    return next(iterate(space, seen))


def pay_together(reward: Any, state: State, arrays: Arrays, first: int, stop: int, resolved_before: np.ndarray) -> None:
    """Replace the rewards of environments first, ..., stop - 1 by the user's; those that are paused have 0."""
    outcomes = arrays.outcomes[first:stop]
    paid = as_rewards(reward(Moments(state, arrays, first, stop, resolved_before)), stop - first)
    outcomes[:, REWARD] = np.where(outcomes[:, PAUSED] > 0.0, 0.0, paid)


def refuse_batched(config: Any) -> None:
    """Raise :class:`ConfigError` where a batched reward or observation is given to who has no such form."""
    for name, function in (("reward", config.reward), ("observation", getattr(config.observation, "observe", None))):
        if is_batched(function):
            raise ConfigError(f"{name}: only LLMSched environments take one marked as batched")
