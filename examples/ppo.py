"""Train PPO on LLMSched-v0 and compare it with SLAI on the same requests. Needs `pip install '.[agents]'`."""

import sys

import numpy as np
from stable_baselines3 import PPO

from llmsched_gym import env_config
from llmsched_gym.env.policy import PolicyScheduler
from llmsched_gym.env.sb3 import LLMSchedVecEnv
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate

WORLD = {"qps": 1.8, "action": "preset", "action_repeat": 32}
TEST_SEEDS = range(2000, 2004)  # training draws others


def make_model(seed: int, verbose: int = 0) -> PPO:
    """PPO that chooses one of 32 schedulers for every 32 batches."""
    env = LLMSchedVecEnv(num_envs=64, reward_scale=0.05, **WORLD)
    env.seed(1000 + 100 * seed)
    learner = {"n_steps": 32, "batch_size": 512, "n_epochs": 4, "learning_rate": 1e-3, "gamma": 0.98}
    return PPO("MlpPolicy", env, **learner, seed=seed, device="cpu", verbose=verbose)


if __name__ == "__main__":
    model = make_model(seed=0, verbose=1)
    model.learn(total_timesteps=int(sys.argv[1]) if len(sys.argv) > 1 else 262_144, log_interval=16)
    model.save("out/ppo")

    world = env_config("default", **WORLD, num_requests=500)
    greedy = PolicyScheduler(lambda seen: model.predict(seen, deterministic=True)[0], world)
    sampled = PolicyScheduler(lambda seen: model.predict(seen, deterministic=False)[0], world)
    agents = {"greedy": greedy, "sampled": sampled}
    for name, policy in {**agents, "slai": "slai", "on-time": "on-time", "sarathi": "sarathi"}.items():
        rows = [row(simulate(world, policy, seed=seed)) for seed in TEST_SEEDS]
        attained, utility = (np.mean([r[column] for r in rows]) for column in ("slo_attainment", "mean_utility"))
        print(f"{name:8} {100 * attained:.1f} % within SLOs, mean utility {utility:.3f}")
