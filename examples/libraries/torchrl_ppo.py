"""TorchRL: PPO on the native vector environment, which it resets itself; the discount is that of a step's duration."""

import gymnasium as gym
import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.collectors import Collector
from torchrl.data import Unbounded
from torchrl.envs import GymWrapper, set_gym_backend
from torchrl.envs.libs.gym import default_info_dict_reader
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

from examples.libraries.common import ID, NUM_ENVS, SEED, WORLD, Clock, decisions, utility

STEPS, EPOCHS, MINIBATCH = 128, 4, 512
torch.manual_seed(SEED)
options = {"vectorization_mode": "vector_entry_point", "autoreset_mode": "disabled", "reward_scale": 0.05}
with set_gym_backend("gymnasium"):
    env = GymWrapper(gym.make_vec(ID, NUM_ENVS, **options, **WORLD), categorical_action_encoding=True)
env.set_info_dict_reader(default_info_dict_reader(["discount"], {"discount": Unbounded((NUM_ENVS,))}))
env.set_seed(SEED)
num_features, num_actions = env.observation_spec["observation"].shape[-1], env.action_spec.space.n
net = nn.Sequential(nn.Linear(num_features, 64), nn.Tanh(), nn.Linear(64, num_actions))
actor = ProbabilisticActor(
    TensorDictModule(net, ["observation"], ["logits"]),
    in_keys=["logits"],
    spec=env.action_spec,
    distribution_class=Categorical,
    return_log_prob=True,
)
critic = ValueOperator(nn.Sequential(nn.Linear(num_features, 64), nn.Tanh(), nn.Linear(64, 1)), ["observation"])
loss_of = ClipPPOLoss(actor, critic, entropy_coeff=0.0, critic_coeff=0.5)
optimizer = torch.optim.Adam(loss_of.parameters(), lr=1e-3)
count, clock = decisions(32_768), Clock()
for batch in Collector(env, actor, frames_per_batch=STEPS * NUM_ENVS, total_frames=count):
    with torch.no_grad():
        critic(batch)
        critic(batch["next"])
        ahead = batch["next"]
        batch["advantage"], batch["value_target"] = vec_generalized_advantage_estimate(
            ahead["discount"].reshape(ahead["reward"].shape).float(),
            0.95,
            batch["state_value"],
            ahead["state_value"],
            ahead["reward"],
            ahead["done"],
            ahead["terminated"],
            time_dim=1,
        )
    flat = batch.reshape(-1)
    for _ in range(EPOCHS):
        for part in torch.randperm(len(flat)).split(MINIBATCH):
            losses = loss_of(flat[part])
            optimizer.zero_grad()
            (losses["loss_objective"] + losses["loss_critic"]).backward()
            nn.utils.clip_grad_norm_(loss_of.parameters(), 0.5)
            optimizer.step()
clock.report("torchrl", "PPO", count, utility=utility(lambda seen: int(net(torch.as_tensor(seen)).argmax())))
