"""RLlib: PPO on native vector environments in a remote runner, on presets and, with masks, on single requests."""

import os

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.examples.rl_modules.classes.action_masking_rlm import ActionMaskingTorchRLModule

from examples.libraries.common import ID, NUM_ENVS, SEED, WORLD, Clock, decisions

STEPS = 128


def config_of(**world):
    """PPO as the other libraries here have it."""
    return (
        PPOConfig()
        .environment(ID, env_config={"reward_scale": 0.05, **world}, disable_env_checking=True)
        .env_runners(num_env_runners=1, num_envs_per_env_runner=NUM_ENVS, gym_env_vectorize_mode="vector_entry_point")
        .training(train_batch_size_per_learner=STEPS * NUM_ENVS, minibatch_size=512, num_epochs=4, lr=1e-3, gamma=0.98)
        .rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[64], vf_share_layers=False))
        .debugging(seed=SEED, log_level="ERROR")
    )


def learn(config, what, count):
    """Train, and say how fast it went."""
    algorithm, clock = config.build_algo(), Clock()
    for _ in range(max(1, count // (STEPS * NUM_ENVS))):
        found = algorithm.train()["env_runners"]
    done = int(found["num_env_steps_sampled_lifetime"])
    clock.report("ray", what, done)
    algorithm.stop()


if __name__ == "__main__":
    ray.init("local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    learn(config_of(**WORLD), "PPO, one remote runner", decisions(32_768))
    masked = config_of(qps=1.8, action="request", mask_in_observation="rllib")
    masked.rl_module(rl_module_spec=RLModuleSpec(module_class=ActionMaskingTorchRLModule))
    learn(masked, "PPO, request actions, masked", decisions(32_768) // 2)
    ray.shutdown()
