"""TorchRL's GymEnv on the single and the native vector environment: its rollouts beside single episodes.

    python benchmarks/peers/torchrl_envs.py        (pip install torchrl)

Every action is the same, so that each episode can be made again; prints versions and one line a check.
"""

from __future__ import annotations

import sys

import gymnasium as gym
import numpy as np
import torch
from gymnasium_wrappers import FIELDS, STEPS, report, versions
from torchrl.envs import GymEnv, GymWrapper, set_gym_backend
from torchrl.envs.libs.gym import default_info_dict_reader

import llmsched_gym  # noqa: F401  registers the environments

SEED = 3


def truth(seed: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and discounts of a single environment that is reset without a seed at each end."""
    env = gym.make("LLMSched-v0", **FIELDS).unwrapped
    env.reset(seed=seed)
    rewards, discounts, over = [], [], False
    for _ in range(steps):
        if over:
            env.reset()
        _, reward, terminated, truncated, info = env.step(np.zeros(7, np.int64))
        over = terminated or truncated
        rewards.append(reward)
        discounts.append(info["discount"])
    return np.array(rewards), np.array(discounts)


def rollout(env) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and discounts of a rollout under action 0; shape (steps,) or (num_envs, steps)."""
    zeros = torch.zeros_like(env.action_spec.rand())
    out = env.rollout(STEPS, policy=lambda td: td.set("action", zeros), break_when_any_done=False)
    return out["next", "reward"][..., 0].numpy(), out["next", "discount"][..., 0].numpy()


def with_infos(env):
    env.set_info_dict_reader(default_info_dict_reader(["discount", "duration_s"]))
    env.set_seed(SEED, static_seed=True)
    return env


def main() -> int:
    print(versions("gymnasium", "torchrl", "tensordict", "torch", "numpy"))
    with set_gym_backend("gymnasium"):
        plain = gym.make("LLMSched-v0", **FIELDS)
        single = with_infos(GymWrapper(plain, categorical_action_encoding=True))
        rewards, discounts = rollout(single)
        checks = {"GymWrapper(single): rewards": (rewards, truth(SEED, STEPS)[0])}
        checks["GymWrapper(single): discounts"] = (discounts, truth(SEED, STEPS)[1])
        named = with_infos(GymEnv("LLMSched-v0", categorical_action_encoding=True, **FIELDS))
        checks["GymEnv(id): rewards"] = (rollout(named)[0], truth(SEED, STEPS)[0])
    return report(checks)


if __name__ == "__main__":
    sys.exit(main())
