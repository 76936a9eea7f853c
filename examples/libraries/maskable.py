"""sb3-contrib: MaskablePPO on single requests, whose masks it asks the environments for."""

from sb3_contrib import MaskablePPO

from examples.libraries.common import NUM_ENVS, SEED, Clock, decisions
from llmsched_gym.env.sb3 import LLMSchedVecEnv

count, clock = decisions(32_768), Clock()
envs = LLMSchedVecEnv(num_envs=NUM_ENVS, reward_scale=0.05, qps=1.8, action="request")
model = MaskablePPO("MlpPolicy", envs, n_steps=128, batch_size=512, n_epochs=4, gamma=0.98, seed=SEED, device="cpu")
model.learn(count)
clock.report("sb3-contrib", "MaskablePPO, request actions", count)
