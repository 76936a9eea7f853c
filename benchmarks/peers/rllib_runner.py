"""RLlib's env runner on the native vector environment: the episodes it reports beside those that single ones make.

    python benchmarks/peers/rllib_runner.py        (pip install "llmsched-gym[rllib]")

Every action is the same, so that each episode can be made again; prints versions and one line a check.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("RAY_DISABLE_IMPORT_WARNING", "1")

import gymnasium as gym
import numpy as np
import torch
from gymnasium_wrappers import FIELDS, report, versions
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

NUM_ENVS, EPISODES = 3, 12


class AllZeros(TorchRLModule):
    """Sarathi-Serve: every knob at its first value."""

    def _forward(self, batch, **kwargs):
        return {Columns.ACTIONS: torch.zeros((len(batch[Columns.OBS]), 7), dtype=torch.int64)}


def runner_episodes() -> list:
    """Episodes of RLlib's own sampler on the native vector environment."""
    config = (
        PPOConfig()
        .environment("llmsched_gym:LLMSched-v0", env_config=FIELDS)
        .env_runners(
            num_env_runners=0,
            num_envs_per_env_runner=NUM_ENVS,
            gym_env_vectorize_mode="vector_entry_point",
            rollout_fragment_length="auto",
            batch_mode="complete_episodes",
        )
        .rl_module(rl_module_spec=RLModuleSpec(module_class=AllZeros))
        .debugging(seed=0)
    )
    runner = SingleAgentEnvRunner(config=config, worker_index=0)
    native = runner.env.unwrapped
    print("vector environment:", type(native).__name__, native.metadata["autoreset_mode"])
    return runner.sample(num_episodes=EPISODES, random_actions=False)


def again(seed: int) -> tuple[float, int, np.ndarray]:
    """Return, length and last observation of the episode of a seed, from a single environment."""
    env = gym.make("llmsched_gym:LLMSched-v0", **FIELDS).unwrapped
    observation, _ = env.reset(seed=seed)
    total, length, over = 0.0, 0, False
    while not over:
        observation, reward, terminated, truncated, _ = env.step(np.zeros(7, np.int64))
        total, length, over = total + reward, length + 1, terminated or truncated
    return total, length, observation


def main() -> int:
    print(versions("gymnasium", "ray", "numpy"))
    episodes = runner_episodes()
    told = [(float(e.get_return()), len(e), *e.get_observations(-1)[:5]) for e in episodes]
    seeds = [int(e.get_infos(0)["seed"]) for e in episodes]
    true = [(total, length, *last[:5]) for total, length, last in map(again, seeds)]
    return report(
        {
            f"return, length and last observation of {len(episodes)} episodes": (told, true),
            "mean return": (np.mean([t[0] for t in told]), np.mean([t[0] for t in true])),
        }
    )


if __name__ == "__main__":
    sys.exit(main())
