"""The native vector environment as RLlib's env runners take it: normalised features, masks behind them, training seeds.

RLlib makes it by the id ``llmsched_gym.agents.rllib_env:LLMSchedRLlib-v0``, as one vector (``vector_entry_point``) with
autoreset in the next step, which is what its env runners expect.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space

from llmsched_gym.agents.seeds import SeededVectorEnv
from llmsched_gym.config import EnvConfig
from llmsched_gym.env.actions import action_of

ENV_ID = "LLMSchedRLlib-v0"


def is_masked(config: EnvConfig) -> bool:
    """Whether some actions may be illegal, so that observations end with the mask."""
    return action_of(config).mask is not None


class RLlibVectorEnv(SeededVectorEnv):
    """Observations are (features - mean) * scale and, where actions may be illegal, a 1 for each legal one.

    Episodes are drawn from the training seeds by a generator of (seed of the reset, `start`).

    Args:
        num_envs: environments side by side.
        suite, fields: as of the vector environment.
        mean, scale: of the features, float32 of shape (num_features,); None: as they are.
        start: another one for other episodes, as when a training goes on.
        seeds: instead of drawing: the seeds of the episodes, in their order over all environments.
    """

    def __init__(
        self,
        num_envs: int = 1,
        suite: str = "default",
        mean: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
        start: int = 0,
        seeds: Sequence[int] | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(num_envs, suite, **fields)
        size = self.single_observation_space.shape[0]  # type: ignore[index]
        self.mean = np.zeros(size, np.float32) if mean is None else np.asarray(mean, np.float32)
        self.scale = np.ones(size, np.float32) if scale is None else np.asarray(scale, np.float32)
        self.start, self._left = start, None if seeds is None else list(seeds)
        self.masked = is_masked(self.config)
        width = size + self.action_masks().shape[1] * self.masked
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (width,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start all episodes; `seed` is of the generator that chooses them."""
        first = 0 if seed is None else int(np.ravel(np.asarray(seed, np.int64))[0])
        if seed is not None or not hasattr(self, "episodes"):
            self.episodes = np.random.default_rng([first, self.start, 1])
        observation, info = super().reset(seed=None, options=options)
        return self._seen(observation), info

    def _restart(self, env: int, seed: int | None, options: dict[str, Any]) -> None:
        if seed is None and self._left:
            seed = self._left.pop(0)
        super()._restart(env, seed, options)

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """As the vector environment's."""
        observation, *others = super().step(actions)
        return self._seen(observation), *others  # type: ignore[return-value]

    def _seen(self, features: np.ndarray) -> np.ndarray:
        found = (features - self.mean) * self.scale
        return np.concatenate([found, self.action_masks().astype(np.float32)], 1) if self.masked else found


def typical(suite: str, seed: int, fields: dict[str, Any], num_envs: int = 64, steps: int = 200) -> np.ndarray:
    """Features under random constant actions, legal or not by turns; (steps * num_envs, num_features)."""
    env = SeededVectorEnv(num_envs, suite, **fields)
    env.episodes, rng = np.random.default_rng([seed, 2]), np.random.default_rng([seed, 3])
    observation, _ = env.reset()
    env.action_space.seed(seed)
    actions, seen = env.action_space.sample(), []
    for _ in range(steps):
        if is_masked(env.config):
            actions = np.array([rng.choice(np.flatnonzero(mask)) for mask in env.action_masks()])
        observation = env.step(actions)[0]
        seen.append(observation)
    env.close()
    return np.concatenate(seen)


gym.register(
    ENV_ID,
    entry_point="llmsched_gym.env:LLMSchedEnv",
    vector_entry_point="llmsched_gym.agents.rllib_env:RLlibVectorEnv",
)
