"""The native vector environment as Stable-Baselines3 expects it; needs ``pip install '.[agents]'``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from llmsched_gym.config import ConfigError
from llmsched_gym.env.base import EPISODE_INFOS
from llmsched_gym.env.route import LLMRouteVectorEnv
from llmsched_gym.env.saved import EnvState
from llmsched_gym.env.vector import LLMSchedVectorEnv, SimulatedVectorEnv


class SimulatedVecEnv(VecEnv):
    """Native environments for SB3 and sb3-contrib, action masks included.

    ``infos[i]`` is the `info` of the single environment for the step, its last one at an episode's end, when it also
    carries ``terminal_observation``, ``TimeLimit.truncated`` and ``episode`` (return ``r``, length ``l`` in steps, wall
    time ``t`` in seconds, and the figures of ``episode_metrics=True``), so no Monitor is needed. Truncated episodes are
    to be bootstrapped, which SB3 does by ``TimeLimit.truncated``.

    Args:
        env: a native vector environment with the autoreset mode "same_step".
    """

    def __init__(self, env: SimulatedVectorEnv) -> None:
        if env.config.mask_in_observation is not None:
            got = env.config.mask_in_observation
            what = "expected None, as sb3-contrib asks action_masks()"
            raise ConfigError(f"mask_in_observation: {what}, got {got!r}")
        self.env = env
        num_envs = env.num_envs
        self._returns = np.zeros(num_envs)
        self._lengths = np.zeros(num_envs, np.int64)
        self._start = time.time()
        self._actions: np.ndarray | None = None
        super().__init__(num_envs, self.env.single_observation_space, self.env.single_action_space)

    def reset(self) -> Any:
        """Start all episodes, with the seeds and options given before."""
        seeds = self._seeds if any(seed is not None for seed in self._seeds) else None
        observations, info = self.env.reset(seed=seeds, options=self._common_options())
        self._returns[:] = 0.0
        self._lengths[:] = 0
        self.reset_infos = _rows(info)
        self._reset_seeds()
        self._reset_options()
        return observations

    def _common_options(self) -> dict[str, Any]:
        if any(options != self._options[0] for options in self._options):
            raise ConfigError("options: expected the same for all environments")
        return self._options[0]

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions, (num_envs, ...), for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """One step: observations, rewards (num_envs,) float32, dones (num_envs,) bool, an info each."""
        observations, rewards, terminated, truncated, info = self.env.step(self._actions)
        self._returns += rewards
        self._lengths += 1
        infos = _rows(info)
        done = terminated | truncated
        for env in np.flatnonzero(done).tolist():
            last = {name: values[env] for name, values in info["final_info"].items() if name[0] != "_"}
            infos[env] = last | {
                "terminal_observation": info["final_obs"][env],
                "TimeLimit.truncated": bool(truncated[env] and not terminated[env]),
                "episode": {
                    "r": float(self._returns[env]),
                    "l": int(self._lengths[env]),
                    "t": round(time.time() - self._start, 6),
                    **{name: float(value) for name, value in last.items() if name in EPISODE_INFOS},
                },
            }
            self._returns[env] = 0.0
            self._lengths[env] = 0
        return observations, rewards.astype(np.float32), done, infos

    def get_state(self, slot: int) -> EnvState:
        """This moment of environment `slot`; see :meth:`~llmsched_gym.env.vector.SimulatedVectorEnv.get_state`."""
        slot = self.env.slot_of(slot)
        totals = float(self._returns[slot]), int(self._lengths[slot])
        return replace(self.env.get_state(slot), totals=totals)

    def set_state(self, slot: int, state: EnvState, *, seed: int | None = None) -> Any:
        """Put environment `slot` at the moment at which `state` was taken; returns the observation there."""
        slot = self.env.slot_of(slot)
        observation, _ = self.env.set_state(slot, state, seed=seed)
        self._returns[slot], self._lengths[slot] = state.totals
        return observation

    def action_masks(self) -> np.ndarray:
        """Legal actions of all environments; bool (num_envs, choices)."""
        return self.env.action_masks()

    def close(self) -> None:
        """Close the vector environment."""
        self.env.close()

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Call a method of each environment; masks are made for all of them at once."""
        rows = self._get_indices(indices)
        if method_name == "action_masks":
            masks = self.action_masks()
            return [masks[i] for i in rows]
        return [getattr(self.env.envs[i], method_name)(*args, **kwargs) for i in rows]

    def has_attr(self, attr_name: str) -> bool:
        """Whether environments have the attribute; `action_masks` only where actions can be illegal."""
        if attr_name == "action_masks":
            return bool(self.env.core.has_masks)
        return hasattr(self.env.envs[0], attr_name)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of each environment."""
        return [getattr(self.env.envs[i], attr_name) for i in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """AttributeError: nothing of an environment can be set."""
        raise AttributeError(f"{attr_name}: settings of an environment do not change after it is made")

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """Whether the environments do what a wrapper does: Monitor's is done here, episodes are reported."""
        return [issubclass(wrapper_class, Monitor) for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[np.ndarray | None]:
        """A frame (height, width, 3) uint8 of each environment, None where none is drawn."""
        return self.env.render() if self.render_mode == "rgb_array" else [None] * self.num_envs


class LLMSchedVecEnv(SimulatedVecEnv):
    """`num_envs` native environments of LLMSched, see :class:`SimulatedVecEnv`.

    Args:
        num_envs: environments side by side.
        suite, render_mode, fields: as of :class:`~llmsched_gym.env.vector.LLMSchedVectorEnv`.
    """

    def __init__(
        self, num_envs: int = 64, suite: str = "default", render_mode: str | None = None, **fields: Any
    ) -> None:
        super().__init__(LLMSchedVectorEnv(num_envs, suite, render_mode, "same_step", **_without_mode(fields)))


class LLMRouteVecEnv(SimulatedVecEnv):
    """`num_envs` native environments of LLMRoute, see :class:`SimulatedVecEnv`.

    Args:
        num_envs: environments side by side.
        suite, render_mode, fields: as of :class:`~llmsched_gym.env.route.LLMRouteVectorEnv`.
    """

    def __init__(
        self, num_envs: int = 16, suite: str = "cluster", render_mode: str | None = None, **fields: Any
    ) -> None:
        super().__init__(LLMRouteVectorEnv(num_envs, suite, render_mode, "same_step", **_without_mode(fields)))


def _without_mode(fields: dict[str, Any]) -> dict[str, Any]:
    if "autoreset_mode" in fields:
        raise ConfigError("autoreset_mode: expected none; it is 'same_step', as Stable-Baselines3 has it")
    return fields


def _rows(info: dict[str, Any]) -> list[dict[str, Any]]:
    """The infos of a vector environment, one dict an environment."""
    columns = {name: values for name, values in info.items() if name[0] != "_" and not name.startswith("final_")}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
