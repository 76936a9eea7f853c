"""What agents that route train in: episodes of the training seeds, and a replay memory with each step's discount."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from llmsched_gym.agents.seeds import TRAINING_SEEDS
from llmsched_gym.env.route import LLMRouteVectorEnv
from llmsched_gym.env.sb3 import SimulatedVecEnv


class _SeededRouteEnv(LLMRouteVectorEnv):
    """Every episode's seed is drawn from TRAINING_SEEDS by one generator."""

    episodes: np.random.Generator

    def _restart(self, env: int, seed: int | None, options: dict[str, Any]) -> None:
        if seed is None:
            seed = int(self.episodes.integers(TRAINING_SEEDS.start, TRAINING_SEEDS.stop))
        super()._restart(env, seed, options)


class RouteTrainingEnv(SimulatedVecEnv):
    """`num_envs` routing environments on episodes of the training seeds, chosen by `seed`."""

    env: _SeededRouteEnv

    def __init__(self, num_envs: int, suite: str, seed: int, **fields: Any) -> None:
        super().__init__(_SeededRouteEnv(num_envs, suite, autoreset_mode="same_step", **fields))
        self.env.episodes = np.random.default_rng([seed, 1])


class DiscountedReplay(ReplayBuffer):
    """SB3's replay memory with each step's own discount, from its info."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.discounts = np.zeros((self.buffer_size, self.n_envs), np.float32)

    def add(self, obs: Any, next_obs: Any, action: Any, reward: Any, done: Any, infos: list[dict[str, Any]]) -> None:
        self.discounts[self.pos] = [info["discount"] for info in infos]
        super().add(obs, next_obs, action, reward, done, infos)

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> ReplayBufferSamples:
        # which environment of each step: SB3 draws it from numpy's own generator, too
        at = batch_inds, np.random.randint(0, self.n_envs, len(batch_inds))  # noqa: NPY002
        is_last = self.dones[at] * (1.0 - self.timeouts[at])
        columns = is_last, self.rewards[at], self.discounts[at]
        last, rewards, discounts = (self.to_torch(column[:, None].astype(np.float32)) for column in columns)
        before, actions, after = (
            self.to_torch(array[at]) for array in (self.observations, self.actions, self.next_observations)
        )
        return ReplayBufferSamples(before, actions, after, last, rewards, discounts)


def typical_observations(env: RouteTrainingEnv, seed: int, steps: int = 300) -> np.ndarray:
    """Flat observations under random routing, for the normalisation; (steps * num_envs, entries)."""
    rng = np.random.default_rng([seed, 2])
    seen = [np.asarray(env.reset())]
    for _ in range(steps - 1):
        seen.append(np.asarray(env.step(rng.integers(env.action_space.n, size=env.num_envs))[0]))  # type: ignore[attr-defined]
    return np.concatenate(seen)
