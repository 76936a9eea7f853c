"""Stable-Baselines3: PPO on all environments at once, DQN on one."""

from stable_baselines3 import DQN, PPO

from examples.libraries.common import NUM_ENVS, SEED, WORLD, Clock, decisions, utility
from llmsched_gym.env.sb3 import LLMSchedVecEnv

count, clock = decisions(32_768), Clock()
envs = LLMSchedVecEnv(num_envs=NUM_ENVS, reward_scale=0.05, **WORLD)
ppo = PPO("MlpPolicy", envs, n_steps=128, batch_size=512, n_epochs=4, gamma=0.98, seed=SEED, device="cpu")
ppo.learn(count)
clock.report("stable-baselines3", "PPO", count, utility=utility(lambda seen: ppo.predict(seen, deterministic=True)[0]))

count, clock = count // 4, Clock()
dqn = DQN("MlpPolicy", LLMSchedVecEnv(num_envs=1, reward_scale=0.05, **WORLD), gamma=0.98, seed=SEED, device="cpu")
dqn.learn(count)
clock.report("stable-baselines3", "DQN", count, utility=utility(lambda seen: dqn.predict(seen, deterministic=True)[0]))
