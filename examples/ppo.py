"""Train PPO on LLMSched-v0 and compare it with SLAI on the same requests. Needs `pip install '.[agents]'`."""

import sys

from stable_baselines3 import PPO

from llmsched_gym import env_config
from llmsched_gym.env.policy import PolicyScheduler
from llmsched_gym.env.sb3 import LLMSchedVecEnv
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
env = LLMSchedVecEnv(num_envs=64, qps=1.8, action_repeat=4)
env.seed(1000)
model = PPO("MlpPolicy", env, n_steps=128, batch_size=2048, n_epochs=4, gamma=0.998, verbose=1, seed=0)
model.learn(total_timesteps=steps)
model.save("out/ppo")

world = env_config("default", qps=1.8, num_requests=1000, action_repeat=4)
agent = PolicyScheduler(lambda observation: model.predict(observation, deterministic=True)[0], world)
for scheduler in (agent, "slai", "sarathi"):
    result = row(simulate(world, scheduler, seed=2000))
    print(result["policy"], result["slo_attainment"], result["mean_utility"])
