"""Tianshou: DQN on single environments; the mask of legal actions lies in the observation, where its policies look."""

import gymnasium as gym
import numpy as np
import torch
from tianshou.algorithm.modelfree.dqn import DQN, DiscreteQLearningPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OffPolicyTrainerParams
from tianshou.utils.net.common import Net

from examples.libraries.common import ID, SEED, Clock, decisions

WORLD = {"qps": 1.8, "action": "request", "mask_in_observation": "tianshou", "reward_scale": 0.05}
NUM_ENVS = 8
np.random.seed(SEED)  # noqa: NPY002 - what Tianshou draws from
torch.manual_seed(SEED)
envs = DummyVectorEnv([lambda: gym.make(ID, **WORLD)] * NUM_ENVS)
envs.seed(SEED)
space, actions = envs.observation_space[0]["obs"], envs.action_space[0]
network = Net(state_shape=space.shape, action_shape=actions.n, hidden_sizes=[64, 64])
policy = DiscreteQLearningPolicy(model=network, action_space=actions, eps_training=0.1)
algorithm = DQN(policy=policy, optim=AdamOptimizerFactory(lr=1e-3), gamma=0.98, target_update_freq=500)
collector = Collector(algorithm, envs, VectorReplayBuffer(20_000, NUM_ENVS), exploration_noise=True)
count, clock = decisions(8_192), Clock()
result = algorithm.run_training(
    OffPolicyTrainerParams(
        training_collector=collector,
        max_epochs=1,
        epoch_num_steps=count,
        collection_step_num_env_steps=64,
        update_step_num_gradient_steps_per_sample=1 / 16,
        batch_size=64,
        test_in_training=False,
        verbose=False,
    )
)
clock.report("tianshou", "DQN, request actions, masked", result.train_step)
