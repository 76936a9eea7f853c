"""CleanRL: PPO as its single files have it, on the native vector environment.

CleanRL is no package but files to copy: what its ``ppo.py`` needs is a line instead of its ``make_env``, and to leave
out the steps with which this mode of autoreset begins an episode.
"""

import gymnasium as gym
import torch
from torch import nn
from torch.distributions import Categorical

from examples.libraries.common import ID, NUM_ENVS, SEED, WORLD, Clock, decisions, utility

STEPS, EPOCHS, MINIBATCH, GAMMA, LAMBDA, CLIP = 128, 4, 512, 0.98, 0.95, 0.2
torch.manual_seed(SEED)
count, clock = decisions(32_768), Clock()
envs = gym.make_vec(ID, NUM_ENVS, vectorization_mode="vector_entry_point", reward_scale=0.05, **WORLD)
num_features, num_actions = envs.single_observation_space.shape[0], int(envs.single_action_space.n)
actor = nn.Sequential(nn.Linear(num_features, 64), nn.Tanh(), nn.Linear(64, num_actions))
critic = nn.Sequential(nn.Linear(num_features, 64), nn.Tanh(), nn.Linear(64, 1))
optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=1e-3)
seen = torch.as_tensor(envs.reset(seed=SEED)[0])
over = torch.zeros(NUM_ENVS, dtype=torch.bool)
for _ in range(count // (STEPS * NUM_ENVS)):
    rows = []
    for _ in range(STEPS):
        with torch.no_grad():
            policy, value = Categorical(logits=actor(seen)), critic(seen)[:, 0]
            action = policy.sample()
        new, reward, terminated, truncated, _ = envs.step(action.numpy())
        is_reset, over = over, torch.as_tensor(terminated | truncated)  # the step behind a last one resets
        ended = torch.as_tensor(terminated)
        rows.append(
            (seen, action, policy.log_prob(action), value, torch.as_tensor(reward).float(), ended, over, is_reset)
        )
        seen = torch.as_tensor(new)
    obs, actions, log_probs, values, rewards, ended, last, resets = map(torch.stack, zip(*rows, strict=True))
    with torch.no_grad():
        following = torch.cat([values[1:], critic(seen).T])  # the observation behind a last step is that episode's
        advantages, ahead = torch.zeros_like(rewards), torch.zeros(NUM_ENVS)
        for t in reversed(range(STEPS)):
            delta = rewards[t] + GAMMA * following[t] * ~ended[t] - values[t]
            ahead = advantages[t] = (delta + GAMMA * LAMBDA * ahead * ~last[t]) * ~resets[t]
    used = (~resets).flatten().nonzero()[:, 0]
    flat = [x.flatten(0, 1)[used] for x in (obs, actions, log_probs, advantages, advantages + values)]
    for _ in range(EPOCHS):
        for part in torch.randperm(len(used)).split(MINIBATCH):
            o, a, old, advantage, target = (x[part] for x in flat)
            ratio = (Categorical(logits=actor(o)).log_prob(a) - old).exp()
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            gain = torch.min(ratio * advantage, ratio.clip(1 - CLIP, 1 + CLIP) * advantage).mean()
            loss = 0.5 * (critic(o)[:, 0] - target).square().mean() - gain
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*actor.parameters(), *critic.parameters()], 0.5)
            optimizer.step()
greedy = utility(lambda x: int(actor(torch.as_tensor(x)).argmax()))
clock.report("torch", "PPO in one file, as CleanRL has it", count, utility=greedy)
