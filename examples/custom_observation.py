"""An observation of your own: an object with a space and `observe(view)`."""

import gymnasium as gym
import numpy as np

import llmsched_gym  # noqa: F401
from llmsched_gym.engine import View


class Lengths:
    space = gym.spaces.Box(0.0, np.inf, (3,), np.float32)

    def observe(self, view: View) -> np.ndarray:
        return np.array([len(view.waiting), len(view.running), view.kv_cache_usage], np.float32)


env = gym.make("LLMSched-v0", observation=Lengths())
print(env.reset(seed=0)[0])
