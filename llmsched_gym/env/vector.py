"""The native vector environment: the same kernels over many environments in one call."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from llmsched_gym.config import ConfigError, env_config, plain
from llmsched_gym.env.arrays import DISCOUNT, DURATION_S, FIRST_TERM, REWARD, TERMINATED, TRUNCATED
from llmsched_gym.env.core import EnvCore
from llmsched_gym.env.features import FEATURES
from llmsched_gym.env.reward import TERMS
from llmsched_gym.env.spec import JsonSpec
from llmsched_gym.workload import check_seed


class LLMSchedVectorEnv(JsonSpec, VectorEnv):
    """`num_envs` environments of :class:`~llmsched_gym.env.single.LLMSchedEnv` stepped in compiled code.

    Environment i of ``reset(seed=s)`` equals the single environment with seed s + i. Autoreset is SAME_STEP: the
    observation after an episode's end is the next episode's first, the last one is in ``info["final_obs"]``.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012
        "render_modes": [],
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self, num_envs: int = 1, suite: str = "default", render_mode: str | None = None, **fields: Any
    ) -> None:
        num_envs = plain(num_envs)
        if not isinstance(num_envs, int) or num_envs < 1:
            raise ConfigError(f"num_envs: expected a whole number >= 1, got {num_envs!r}")
        if render_mode is not None:
            raise ConfigError(f"render_mode: expected None for the vector environment, got {render_mode!r}")
        self.config = env_config(suite, **fields)
        self.num_envs = num_envs
        self.core = EnvCore(self.config, num_envs)
        self.single_action_space = self.core.action_space
        self.single_observation_space = self.core.observation_space
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._rngs: list[np.random.Generator | None] = [None] * num_envs

    @property
    def feature_names(self) -> list[str]:
        """Names of the entries of the features observation."""
        return [feature.name for feature in FEATURES]

    def _seed(self, env: int, seed: int | None) -> int:
        if seed is not None:
            seed = check_seed(seed)
            self._rngs[env] = gym.utils.seeding.np_random(seed)[0]
            return seed
        if self._rngs[env] is None:
            self._rngs[env] = gym.utils.seeding.np_random(None)[0]
        rng = self._rngs[env]
        assert rng is not None
        return int(rng.integers(2**62))

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        if seed is None or isinstance(seed, int | np.integer):
            seeds = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        elif len(seed) == self.num_envs:
            seeds = list(seed)
        else:
            raise ConfigError(f"seed: expected {self.num_envs} seeds, got {len(seed)}")
        for env in range(self.num_envs):
            self.core.reset(env, self._seed(env, seeds[env]))
        return self._observations(), {}

    def _observations(self) -> Any:
        core = self.core
        if hasattr(self.config.observation, "observe"):
            views = [core.observation(env) for env in range(self.num_envs)]
            out: Any = gym.vector.utils.create_empty_array(self.single_observation_space, self.num_envs)
            return gym.vector.utils.concatenate(self.single_observation_space, views, out)
        if self.config.observation == "features":
            return core.arrays.features.copy()
        return {
            "slots": core.arrays.rows.copy(),
            "mask": core.arrays.masks.copy(),
            "features": core.arrays.features.copy(),
        }

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        core = self.core
        core.actions[:] = actions
        core.step()
        outcomes = core.arrays.outcomes.copy()
        terminated = outcomes[:, TERMINATED] != 0.0
        truncated = outcomes[:, TRUNCATED] != 0.0
        info: dict[str, Any] = {
            "duration_s": outcomes[:, DURATION_S],
            "discount": outcomes[:, DISCOUNT],
            "reward_terms": {name: outcomes[:, FIRST_TERM + k] for k, name in enumerate(TERMS)},
        }
        done = terminated | truncated
        if done.any():
            final = np.full(self.num_envs, None, dtype=object)
            for env in np.flatnonzero(done).tolist():
                final[env] = core.observation(env)
                core.reset(env, self._seed(env, None))
            # what info has of the last step is the finished episode's: SAME_STEP resets add no information of their own
            info |= {"final_obs": final, "_final_obs": done, "final_info": self._final_info(info, done)}
            info["_final_info"] = done
        return self._observations(), outcomes[:, REWARD], terminated, truncated, info

    def _final_info(self, info: dict[str, Any], done: np.ndarray) -> dict[str, Any]:
        names = ("duration_s", "discount", "reward_terms")
        return copy.deepcopy({name: info[name] for name in names}) | {f"_{name}": done.copy() for name in names}

    def action_masks(self) -> np.ndarray:
        """Legal actions of all environments, bool: (num_envs, 65) for request actions."""
        return self.core.action_masks()

    def close_extras(self, **kwargs: Any) -> None:
        pass
