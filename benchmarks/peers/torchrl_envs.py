"""TorchRL's GymEnv on the single and the native vector environment: its rollouts beside single episodes.

    python benchmarks/peers/torchrl_envs.py        (pip install torchrl)

Every action is the same, so that each episode can be made again; prints versions and one line a check.
"""

from __future__ import annotations

import sys

import gymnasium as gym
import numpy as np
import torch
from gymnasium_wrappers import FIELDS, NUM_ENVS, STEPS, report, versions
from torchrl.envs import GymEnv, GymWrapper, set_gym_backend
from torchrl.envs.libs.gym import default_info_dict_reader

import llmsched_gym  # noqa: F401  registers the environments

SEED = 3


def truth(seed: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and discounts of a single environment that is reset without a seed at each end."""
    env = gym.make("LLMSched-v0", **FIELDS).unwrapped
    env.reset(seed=seed)
    env.reset()  # TorchRL resets when it is given a seed, and once more as the rollout begins
    rewards, discounts, over = [], [], False
    for _ in range(steps):
        if over:
            env.reset()
        _, reward, terminated, truncated, info = env.step(np.zeros(7, np.int64))
        over = terminated or truncated
        rewards.append(reward)
        discounts.append(info["discount"])
    return np.array(rewards), np.array(discounts)


def rollout(env, *keys: str) -> list[np.ndarray]:
    """Figures of a rollout under action 0; each of shape (steps,) or (num_envs, steps)."""
    env.set_seed(SEED, static_seed=True)
    zeros = torch.zeros_like(env.action_spec.rand())
    out = env.rollout(STEPS, policy=lambda td: td.set("action", zeros), break_when_any_done=False)
    return [out["next", key].reshape(out.shape).numpy() for key in keys]


def single(make) -> tuple[np.ndarray, np.ndarray]:
    env = make()
    env.set_info_dict_reader(default_info_dict_reader(["discount", "duration_s"]))
    return np.array(rollout(env, "reward", "discount")), np.array(truth(SEED, STEPS))


def vector(mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Rewards alone: in mode same_step the info of a last step is the next episode's."""
    envs = gym.make_vec("LLMSched-v0", NUM_ENVS, autoreset_mode=mode, **FIELDS)
    (found,) = rollout(GymWrapper(envs, categorical_action_encoding=True), "reward")
    return found, np.array([truth(SEED + i, STEPS)[0] for i in range(NUM_ENVS)])


def main() -> int:
    print(versions("gymnasium", "torchrl", "tensordict", "torch", "numpy"))
    encoding = {"categorical_action_encoding": True}
    with set_gym_backend("gymnasium"):
        return report(
            {
                "GymWrapper(single)": lambda: single(lambda: GymWrapper(gym.make("LLMSched-v0", **FIELDS), **encoding)),
                "GymEnv(id)": lambda: single(lambda: GymEnv("LLMSched-v0", **encoding, **FIELDS)),
                "GymWrapper(vector), disabled": lambda: vector("disabled"),
                "GymWrapper(vector), same_step": lambda: vector("same_step"),
            }
        )


if __name__ == "__main__":
    sys.exit(main())
