"""Minari: record SLAI, store it, read it again: the same returns."""

import os
import tempfile

import gymnasium as gym
import minari
import numpy as np

from examples.libraries.common import ID, WORLD, Clock, decisions
from llmsched_gym.env.actions.preset import PRESETS

SLAI = list(PRESETS).index("slai")
count, clock = decisions(2_000), Clock()
env = minari.DataCollector(gym.make(ID, **WORLD), record_infos=True)  # durations and discounts are in infos
played, done = [], 0
while done < count:
    env.reset(seed=len(played))
    total, over = 0.0, False
    while not over:
        _, reward, terminated, truncated, _ = env.step(SLAI)
        total, over, done = total + reward, terminated or truncated, done + 1
    played.append(total)
with tempfile.TemporaryDirectory() as folder:
    os.environ["MINARI_DATASETS_PATH"] = folder
    env.create_dataset("llmsched/slai-v0", eval_env="LLMSched-v0", algorithm_name="SLAI")
    stored = minari.load_dataset("llmsched/slai-v0")
    returns = [float(episode.rewards.sum()) for episode in stored.iterate_episodes()]
np.testing.assert_allclose(returns, played)
clock.report("minari", "recording SLAI", done, mean_return=float(np.mean(returns)))
