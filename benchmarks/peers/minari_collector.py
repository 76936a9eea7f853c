"""Minari's DataCollector with infos on the single environment: what it stores beside what the environment said.

python benchmarks/peers/minari_collector.py        (pip install "minari[hdf5,create]")
"""

from __future__ import annotations

import sys
import tempfile

import gymnasium as gym
import minari
import numpy as np
from gymnasium_wrappers import FIELDS, report, versions

import llmsched_gym  # noqa: F401  registers the environments

EPISODES = 3


def collect() -> tuple[list, list]:
    """Rewards, discounts and seeds of the stored episodes, and the same as they were played."""
    env = minari.DataCollector(gym.make("LLMSched-v0", episode_metrics=True, **FIELDS), record_infos=True)
    played = []
    for seed in range(EPISODES):
        _, info = env.reset(seed=seed)
        rewards, infos, over = [], [info], False
        while not over:
            _, reward, terminated, truncated, info = env.step(np.zeros(7, np.int64))
            rewards.append(reward)
            infos.append(info)
            over = terminated or truncated
        played.append([sum(rewards), len(rewards), *[sum(i[k] for i in infos) for k in ("discount", "seed", "qps")]])
    with tempfile.TemporaryDirectory() as folder:
        import os

        os.environ["MINARI_DATASETS_PATH"] = folder
        dataset = env.create_dataset("llmsched/check-v0", eval_env="LLMSched-v0", author="x", author_email="x@x.org")
        stored = [
            [e.rewards.sum(), len(e.rewards), *[float(np.sum(e.infos[k])) for k in ("discount", "seed", "qps")]]
            for e in dataset.iterate_episodes()
        ]
    return stored, played


def main() -> int:
    print(versions("gymnasium", "minari", "numpy"))
    return report({"returns, lengths, discounts, seeds and rates": collect})


if __name__ == "__main__":
    sys.exit(main())
