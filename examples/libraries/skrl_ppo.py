"""skrl: PPO on the native vector environment, in the mode in which a last step's observation is the next episode's."""

import gymnasium as gym
import torch
from skrl.agents.torch.ppo import PPO, PPO_CFG
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.models.torch import CategoricalMixin, DeterministicMixin, Model
from skrl.trainers.torch import SequentialTrainer, SequentialTrainerCfg
from torch import nn

from examples.libraries.common import ID, NUM_ENVS, SEED, WORLD, Clock, decisions, utility

STEPS = 128


class Actor(CategoricalMixin, Model):
    """A network whose outputs are logits of the actions."""

    def __init__(self, env):
        Model.__init__(self, observation_space=env.observation_space, action_space=env.action_space, device=env.device)
        CategoricalMixin.__init__(self)
        self.net = nn.Sequential(nn.Linear(self.num_observations, 64), nn.Tanh(), nn.Linear(64, self.num_actions))

    def compute(self, inputs, role=""):
        """Logits, and nothing else to tell."""
        return self.net(inputs["observations"]), {}


class Critic(DeterministicMixin, Model):
    """A network whose output is what is still to come."""

    def __init__(self, env):
        Model.__init__(self, observation_space=env.observation_space, action_space=env.action_space, device=env.device)
        DeterministicMixin.__init__(self)
        self.net = nn.Sequential(nn.Linear(self.num_observations, 64), nn.Tanh(), nn.Linear(64, 1))

    def compute(self, inputs, role=""):
        """Values, and nothing else to tell."""
        return self.net(inputs["observations"]), {}


torch.manual_seed(SEED)
options = {"vectorization_mode": "vector_entry_point", "autoreset_mode": "same_step", "reward_scale": 0.05}
env = wrap_env(gym.make_vec(ID, NUM_ENVS, **options, **WORLD), wrapper="gymnasium")
models = {"policy": Actor(env), "value": Critic(env)}
settings = PPO_CFG(rollouts=STEPS, learning_epochs=4, mini_batches=4, discount_factor=0.98)
settings.experiment.write_interval = settings.experiment.checkpoint_interval = 0
agent = PPO(
    models=models,
    memory=RandomMemory(memory_size=STEPS, num_envs=NUM_ENVS, device=env.device),
    cfg=settings,
    observation_space=env.observation_space,
    action_space=env.action_space,
    device=env.device,
)
count, clock = decisions(32_768), Clock()
trainer = SequentialTrainer(cfg=SequentialTrainerCfg(timesteps=count // NUM_ENVS, headless=True), env=env, agents=agent)
trainer.train()
actor = models["policy"].eval()
greedy = utility(lambda seen: int(actor.net(torch.as_tensor(seen)).argmax()))
clock.report("skrl", "PPO", count, utility=greedy)
