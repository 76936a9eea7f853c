"""Train PPO on LLMSched-v0 and compare it with SLAI on the same requests. Needs `pip install '.[agents]'`."""

import sys

from stable_baselines3 import PPO

from llmsched_gym import env_config
from llmsched_gym.env.policy import PolicyScheduler
from llmsched_gym.env.sb3 import LLMSchedVecEnv
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate

WORLD = {"qps": 1.8, "action": "preset", "action_repeat": 32}


def make_model(seed: int, verbose: int = 0) -> PPO:
    """PPO that chooses one of 32 schedulers for every 32 batches."""
    env = LLMSchedVecEnv(num_envs=64, reward_scale=0.05, **WORLD)
    env.seed(1000 + 100 * seed)
    learner = {"n_steps": 32, "batch_size": 512, "n_epochs": 4, "learning_rate": 1e-3, "gamma": 0.98}
    return PPO("MlpPolicy", env, **learner, seed=seed, device="cpu", verbose=verbose)


if __name__ == "__main__":
    model = make_model(seed=0, verbose=1)
    model.learn(total_timesteps=int(sys.argv[1]) if len(sys.argv) > 1 else 262_144)
    model.save("out/ppo")

    world = env_config("default", **WORLD, num_requests=1000)
    for deterministic in (True, False):
        agent = PolicyScheduler(lambda seen, d=deterministic: model.predict(seen, deterministic=d)[0], world)
        result = row(simulate(world, agent, seed=2000))
        print("greedy " if deterministic else "sampled", result["slo_attainment"], result["mean_utility"])
    for scheduler in ("slai", "on-time", "sarathi"):
        result = row(simulate(world, scheduler, seed=2000))
        print(f"{scheduler:7}", result["slo_attainment"], result["mean_utility"])
