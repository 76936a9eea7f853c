"""The native vector environment: the same kernels over many environments in one call."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from llmsched_gym.config import ConfigError, env_config
from llmsched_gym.env.arrays import DURATION_S, INFOS, PAUSED, REWARD, TERMINATED
from llmsched_gym.env.base import (
    EPISODE_INFOS,
    RESET_OPTIONS,
    SEED_BITS,
    SimulatedEnv,
    check_options,
    check_render_mode,
)
from llmsched_gym.env.core import EnvCore
from llmsched_gym.env.reward import TERMS
from llmsched_gym.env.saved import EnvState
from llmsched_gym.env.single import LLMSchedEnv
from llmsched_gym.env.spec import JsonSpec
from llmsched_gym.workload import check_seed

RENDER_MODES = ("ansi", "rgb_array")


class SimulatedVectorEnv(JsonSpec, VectorEnv):
    """`num_envs` single environments stepped in compiled code.

    Environment i of ``reset(seed=s)`` equals the single environment with seed s + i. What happens at an episode's end
    is ``autoreset_mode``, as in gymnasium's own vector environments, which this one equals step by step:

    - ``"next_step"``, the default: the step that ends an episode returns its last observation; the next one ignores
      that environment's action and returns the next episode's first observation, with reward 0, duration 0, discount 1.
    - ``"same_step"``: the step that ends an episode returns the next episode's first observation and `info`; the last
      ones are in ``info["final_obs"]`` and ``info["final_info"]``.
    - ``"disabled"``: environments whose episode has ended are to be reset by ``reset(options={"reset_mask": mask})``
      before the next step; `mask` is bool of shape (num_envs,). The option is obeyed in the other modes too.

    Infos are arrays of shape (num_envs,), each with a mask under its name with ``_`` in front.

    Args:
        core: makes the core from `num_envs` and `num_threads`.
        member: makes environment i of a core.
        num_envs: environments side by side.
        render_mode: None, "ansi" or "rgb_array"; `render` returns a tuple of frames.
        autoreset_mode: one of the above, or gymnasium's ``AutoresetMode``.
        max_episode_steps: truncate episodes after so many steps; None: only where the environment itself does.
        num_threads: threads that share the environments of a step, without Python's lock; one a core is the most that
            helps, and from some 64 environments on. Trajectories do not depend on it. What runs in Python (a callable
            reward or observation, a backend, resets) runs in one.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012
        "render_modes": list(RENDER_MODES),
        "render_fps": SimulatedEnv.metadata["render_fps"],
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        core: Callable[[int, int], Any],
        member: Callable[[Any, int, str | None], SimulatedEnv],
        num_envs: int,
        render_mode: str | None,
        autoreset_mode: str | AutoresetMode,
        max_episode_steps: int | None,
        num_threads: int,
    ) -> None:
        num_envs, num_threads = _positive("num_envs", num_envs), _positive("num_threads", num_threads)
        check_render_mode(render_mode, RENDER_MODES)
        self.autoreset_mode = _autoreset_mode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        limit = max_episode_steps
        self._most_steps = None if limit is None else _positive("max_episode_steps", limit)
        self.num_envs, self.render_mode = num_envs, render_mode
        self.core = core(num_envs, num_threads)
        self.envs = [member(self.core, i, render_mode) for i in range(num_envs)]
        self.single_action_space = self.core.action_space
        self.single_observation_space = self.core.observation_space
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._steps = np.zeros(num_envs, np.int64)  # of the episode
        self._is_over = np.ones(num_envs, np.bool_)  # until reset
        self._any_over = True
        names = (*INFOS, "seed", "qps", *EPISODE_INFOS * self.core.config.episode_metrics)
        self._mask_names = [f"_{name}" for name in names]
        self._everybody = np.ones((len(names), num_envs), np.bool_)

    @property
    def config(self) -> Any:
        """The settings, which do not change after the environment is made."""
        return self.core.config

    @property
    def feature_names(self) -> list[str]:
        """Names of the entries of the features observation."""
        names: list[str] = self.core.feature_names
        return names

    @property  # type: ignore[misc]
    def np_random(self) -> Any:
        """The generators that seed unseeded episodes, one an environment."""
        return self.get_attr("np_random")

    @property
    def np_random_seed(self) -> Any:
        """What they were seeded with."""
        return self.get_attr("np_random_seed")

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start all episodes, or those in ``options["reset_mask"]``; `options` are else the single environment's."""
        options = dict(check_options(options, (*RESET_OPTIONS, "reset_mask")))
        which = _reset_mask(options.pop("reset_mask", None), self.num_envs)
        seeds = _seeds(seed, self.num_envs)
        for env in np.flatnonzero(which).tolist():
            self._restart(env, seeds[env], options)
        return self.core.observations(), self._infos(self._outcomes()[DURATION_S:], None if which.all() else which)

    def _restart(self, env: int, seed: int | None, options: dict[str, Any]) -> None:
        self.envs[env].restart(seed, **options)
        self._steps[env] = 0
        self._is_over[env] = False
        self._any_over = bool(self._is_over.any())

    def _infos(self, told: np.ndarray, which: np.ndarray | None, ended: np.ndarray | None = None) -> dict[str, Any]:
        """`info` of the environments in `which` (None: all; others have zeros) from the columns of their outcomes.

        Episodes that have `ended` have figures.
        """
        core = self.core
        infos: dict[str, Any] = dict(zip(INFOS, told, strict=True))
        infos["seed"], infos["qps"] = core.seeds.copy(), core.qps.copy()
        if core.config.episode_metrics:
            figures = np.full((self.num_envs, len(EPISODE_INFOS)), math.nan)
            for env in np.flatnonzero(ended).tolist() if ended is not None else ():
                figures[env] = list(core.metrics(env).values())
            infos |= zip(EPISODE_INFOS, figures.T.copy(), strict=True)
        masks = self._everybody.copy()
        if which is not None:
            masks[:] = which
            for values in infos.values():
                values[~which] = 0
        infos |= zip(self._mask_names, masks, strict=True)
        return infos

    def _outcomes(self) -> np.ndarray:
        """A copy of the columns of the last step's outcomes; (columns, num_envs)."""
        return self.core.arrays.outcomes.T.copy()

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One decision of every environment; an action outside the space raises, and none has stepped then."""
        core, mode = self.core, self.autoreset_mode
        over: list[int] = []
        if self._any_over:
            over = np.flatnonzero(self._is_over).tolist()
            if mode != AutoresetMode.NEXT_STEP or core.tables.count(None) == self.num_envs:
                raise gym.error.ResetNeeded(f"step: environments {over} have ended, reset them")
            core.arrays.outcomes[:, PAUSED] = self._is_over
        core.act(actions)
        if self._most_steps is not None:
            self._steps += 1
        for env in over:
            self._restart(env, None, {})
        outcomes = self._outcomes()
        rewards, told = outcomes[REWARD], outcomes[DURATION_S:]
        terminated, truncated = verdicts = outcomes[TERMINATED:PAUSED] > 0.0
        own = terminated | truncated  # a limit on steps is outside the episode, as gymnasium's TimeLimit is: no figures
        if self._most_steps is not None:
            truncated |= self._steps >= self._most_steps
        if not np.count_nonzero(verdicts):  # the common case: whatever was over has begun anew
            return self.core.observations(), rewards, terminated, truncated, self._infos(told, None)
        self._is_over = ended = terminated | truncated
        self._any_over = True
        if mode != AutoresetMode.SAME_STEP:
            return self.core.observations(), rewards, terminated, truncated, self._infos(told, None, own)
        final_obs, final_info = np.full(self.num_envs, None, dtype=object), self._infos(told, ended, own)
        for env in np.flatnonzero(ended).tolist():
            final_obs[env] = core.observation(env)
            self._restart(env, None, {})
        info = {"final_obs": final_obs, "_final_obs": terminated | truncated, "final_info": final_info}
        info |= {"_final_info": terminated | truncated, **self._infos(self._outcomes()[DURATION_S:], None)}
        return self.core.observations(), rewards, terminated, truncated, info

    def get_state(self, slot: int) -> EnvState:
        """This moment of environment `slot`: as the single environment's, and for it. IndexError for no such slot."""
        slot = self.slot_of(slot)
        found = SimulatedEnv.get_state(self.envs[slot])
        return replace(found, is_over=bool(self._is_over[slot]), num_steps=int(self._steps[slot]))

    def set_state(self, slot: int, state: EnvState, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Put environment `slot`, and no other, at the moment at which `state` was taken, of whichever slot it was.

        Otherwise as the single environment's method, whose states can be set too.
        """
        slot = self.slot_of(slot)
        found = SimulatedEnv.set_state(self.envs[slot], state, seed=seed)
        self._steps[slot], self._is_over[slot] = state.num_steps, state.is_over
        self._any_over = bool(self._is_over.any())
        return found

    def slot_of(self, slot: int) -> int:
        """The index of an environment, checked: IndexError for none."""
        if not hasattr(slot, "__index__") or not 0 <= slot < self.num_envs:
            raise IndexError(f"slot: expected 0 to {self.num_envs - 1}, got {slot!r}")
        return operator.index(slot)

    def reward_terms(self) -> dict[str, np.ndarray]:
        """Parts of the last step's rewards, before ``reward_scale``; arrays of shape (num_envs,)."""
        return {name: self.core.arrays.outcomes[:, -len(TERMS) + k].copy() for k, name in enumerate(TERMS)}

    def episode_metrics(self) -> dict[str, np.ndarray]:
        """The figures of the episodes so far, see the single environment; arrays of shape (num_envs,)."""
        rows = [self.core.metrics(env) for env in range(self.num_envs)]
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    def action_masks(self) -> np.ndarray:
        """Legal actions of all environments, bool: (num_envs, 65) for request actions."""
        return self.core.action_masks()

    def render(self) -> tuple[Any, ...]:
        """A frame of each environment."""
        return self.call("render")

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The attribute `name` of each environment, or what its method returns."""
        found = [getattr(env, name) for env in self.envs]
        return tuple(value(*args, **kwargs) if callable(value) else value for value in found)

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """The attribute `name` of each environment."""
        return self.call(name)

    def set_attr(self, name: str, values: Any) -> None:
        """Set an attribute of each environment: to its entry of a list or tuple, or all to one value."""
        if not isinstance(values, list | tuple):
            values = [values] * self.num_envs
        if len(values) != self.num_envs:
            raise ValueError(f"{name}: expected {self.num_envs} values, got {len(values)}")
        for env, value in zip(self.envs, values, strict=True):
            setattr(env, name, value)

    def close_extras(self, **kwargs: Any) -> None:
        """Close what single environments and threads hold."""
        for env in self.envs:
            env.close()
        self.core.close()


class LLMSchedVectorEnv(SimulatedVectorEnv):
    """`num_envs` environments of :class:`~llmsched_gym.env.single.LLMSchedEnv`, see :class:`SimulatedVectorEnv`.

    Args:
        num_envs: environments side by side.
        suite, fields: as of the single environment.
        render_mode, autoreset_mode, max_episode_steps, num_threads: as of :class:`SimulatedVectorEnv`.
    """

    def __init__(
        self,
        num_envs: int = 1,
        suite: str = "default",
        render_mode: str | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        max_episode_steps: int | None = None,
        num_threads: int = 1,
        **fields: Any,
    ) -> None:
        super().__init__(
            lambda n, threads: EnvCore(env_config(suite, **fields), n, threads),
            *(Member, num_envs, render_mode, autoreset_mode, max_episode_steps, num_threads),
        )


def together(self: Any, *args: Any, **kwargs: Any) -> Any:
    """What a member of a vector environment does when it is to step, or to go back, by itself."""
    what = "step, reset, get_state, set_state"
    raise AttributeError(f"{what}: expected a call of the vector environment's, which does it for all")


class Member(LLMSchedEnv):
    """One environment of a vector environment: all that a single one is, but they are stepped and reset together."""

    def __init__(self, core: EnvCore, index: int, render_mode: str | None) -> None:
        self._stand_on(core, index, render_mode)

    step = reset = step_scheduler = get_state = set_state = together


def _positive(name: str, value: Any) -> int:
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ConfigError(f"{name}: expected a whole number >= 1, got {value!r}")
    return number


def _autoreset_mode(mode: str | AutoresetMode) -> AutoresetMode:
    """The mode by its name, or by gymnasium's value of it."""
    if isinstance(mode, AutoresetMode):
        return mode
    for known in AutoresetMode:
        if mode in (known.name.lower(), known.value):
            return known
    raise ConfigError(f"autoreset_mode: expected next_step, same_step or disabled, got {mode!r}")


def _reset_mask(mask: Any, num_envs: int) -> np.ndarray:
    if mask is None:
        return np.ones(num_envs, np.bool_)
    found = np.asarray(mask)
    if found.dtype != np.bool_ or found.shape != (num_envs,) or not found.any():
        got = f"{found.dtype} of shape {found.shape}" if found.dtype != np.bool_ or found.any() else "no True"
        raise ConfigError(f"options: reset_mask: expected bool of shape ({num_envs},), at least one True, got {got}")
    return found


def _seeds(seed: Any, num_envs: int) -> list[int | None]:
    """One seed an environment; a number stands for itself and those that follow."""
    if seed is None:
        return [None] * num_envs
    if np.ndim(seed) == 0:
        first = check_seed(seed, SEED_BITS)
        return [check_seed(first + i, SEED_BITS) for i in range(num_envs)]
    if len(seed) != num_envs:
        raise ConfigError(f"seed: expected {num_envs} seeds, got {len(seed)}")
    return [None if s is None else check_seed(s, SEED_BITS) for s in seed]
