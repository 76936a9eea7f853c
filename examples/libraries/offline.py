"""d3rlpy: conservative Q-learning on what SLAI and random presets did, without a step of its own."""

import d3rlpy
import gymnasium as gym
import numpy as np

from examples.libraries.common import ID, SEED, WORLD, Clock, decisions, utility
from llmsched_gym.env.actions.preset import PRESETS

SLAI, EPSILON = list(PRESETS).index("slai"), 0.3  # the share of decisions that are random presets
count, rng = decisions(10_000), np.random.default_rng(SEED)
env = gym.make(ID, reward_scale=0.05, **WORLD)
rows, episodes = [], 0
while len(rows) < count:
    seen, _ = env.reset(seed=episodes)
    over, episodes = False, episodes + 1
    while not over:
        action = int(rng.integers(len(PRESETS))) if rng.random() < EPSILON else SLAI
        following, reward, terminated, truncated, _ = env.step(action)
        over = terminated or truncated
        rows.append((seen, action, reward, terminated, truncated))
        seen = following
observations, actions, rewards, ended, cut = map(np.array, zip(*rows, strict=True))
cut[-1] |= not ended[-1]
data = d3rlpy.dataset.MDPDataset(observations, actions, rewards, ended, cut, action_size=len(PRESETS))
clock = Clock()
learner = d3rlpy.algos.DiscreteCQLConfig(gamma=0.98, batch_size=64).create(device="cpu")
learner.fit(
    data,
    n_steps=count // 4,
    n_steps_per_epoch=count // 4,
    show_progress=False,
    logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
)
greedy = utility(lambda seen: int(learner.predict(seen[None])[0]))
clock.report("d3rlpy", "DiscreteCQL, updates of 64", count // 4, utility=greedy)
