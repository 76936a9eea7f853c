"""The native vector environment as Stable-Baselines3 expects it; needs ``pip install '.[agents]'``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from llmsched_gym.env.vector import LLMSchedVectorEnv


class LLMSchedVecEnv(VecEnv):
    """`num_envs` native environments for SB3 and sb3-contrib, action masks included.

    ``infos[i]`` carries ``duration_s`` and ``discount`` of the step; at an episode's end also ``terminal_observation``,
    ``TimeLimit.truncated`` and ``episode`` (return ``r``, length ``l`` in steps, wall time ``t`` in seconds), so no
    Monitor is needed. Truncated episodes are to be bootstrapped, which SB3 does by ``TimeLimit.truncated``.

    Args:
        num_envs: environments side by side.
        suite, fields: as of :class:`~llmsched_gym.env.single.LLMSchedEnv`.
    """

    def __init__(self, num_envs: int = 64, suite: str = "default", **fields: Any) -> None:
        self.env = LLMSchedVectorEnv(num_envs, suite, **fields)
        self._has_masks = self.env.config.action != "priority"
        self._returns = np.zeros(num_envs)
        self._lengths = np.zeros(num_envs, np.int64)
        self._start = time.time()
        self._actions: np.ndarray | None = None
        super().__init__(num_envs, self.env.single_observation_space, self.env.single_action_space)

    def reset(self) -> Any:
        seeds = self._seeds if any(seed is not None for seed in self._seeds) else None
        observations, _ = self.env.reset(seed=seeds)
        self._returns[:] = 0.0
        self._lengths[:] = 0
        self.reset_infos = [{} for _ in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        observations, rewards, terminated, truncated, info = self.env.step(self._actions)
        self._returns += rewards
        self._lengths += 1
        pairs = zip(info["duration_s"].tolist(), info["discount"].tolist(), strict=True)
        infos: list[dict[str, Any]] = [{"duration_s": s, "discount": d} for s, d in pairs]
        done = terminated | truncated
        for env in np.flatnonzero(done).tolist():
            infos[env] |= {
                "terminal_observation": info["final_obs"][env],
                "TimeLimit.truncated": bool(truncated[env] and not terminated[env]),
                "episode": {
                    "r": float(self._returns[env]),
                    "l": int(self._lengths[env]),
                    "t": round(time.time() - self._start, 6),
                },
            }
            self._returns[env] = 0.0
            self._lengths[env] = 0
        return observations, rewards.astype(np.float32), done, infos

    def action_masks(self) -> np.ndarray:
        """Legal actions of all environments; bool (num_envs, choices)."""
        return self.env.action_masks()

    def close(self) -> None:
        self.env.close()

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Call a method for each environment; only ``action_masks`` differs between them."""
        rows = self._get_indices(indices)
        if method_name == "action_masks":
            masks = self.action_masks()
            return [masks[i] for i in rows]
        result = getattr(self.env, method_name)(*args, **kwargs)
        return [result for _ in rows]

    def has_attr(self, attr_name: str) -> bool:
        if attr_name == "action_masks":
            return self._has_masks
        return hasattr(self.env, attr_name)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        value = None if attr_name == "render_mode" else getattr(self.env, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise AttributeError(f"{attr_name}: settings of an environment do not change after it is made")

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]  # it reports episodes itself

    def get_images(self) -> Sequence[np.ndarray | None]:
        return [None] * self.num_envs
