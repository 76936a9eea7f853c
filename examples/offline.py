"""Learn from recorded decisions alone: advantage-weighted regression on a data set of `llmsched record`.

    llmsched record --policy mixed --episodes 200 --out out/datasets
    python -m examples.offline --datasets out/datasets

A value network learns the discounted return of what the makers of the data did, each step with its own discount; the
policy imitates their actions, the more the better these turned out than expected (Peng et al., 2019, 1910.00177).
Then it acts, greedily, in episodes that nobody recorded, beside the makers in the same ones, as they
were recorded and undisturbed. Needs the extras agents and record.
"""

from __future__ import annotations

import argparse
import os

import numpy as np
import torch
from torch import nn

from llmsched_gym.agents.record import MIXTURE, play

BETA, MOST = 0.05, 20.0  # of advantages in units of their deviation; largest weight
TEST_SEEDS = range(3000, 3010)


def returns(rewards: np.ndarray, discounts: np.ndarray) -> np.ndarray:
    """Discounted return from each step on; `discounts` are of the steps themselves."""
    found, ahead = np.zeros(len(rewards), np.float32), 0.0
    for k in reversed(range(len(rewards))):
        found[k] = ahead = rewards[k] + discounts[k] * ahead
    return found


class Network(nn.Module):
    """Features, normalised by the data's, to scores of all choices and a value."""

    def __init__(self, data: np.ndarray, choices: list[int]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(data.mean(0)))
        self.register_buffer("scale", torch.from_numpy(data.std(0) + 1e-3))
        self.choices = choices
        size = data.shape[1]
        self.actor = nn.Sequential(
            nn.Linear(size, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, sum(choices))
        )
        self.critic = nn.Sequential(nn.Linear(size, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 1))

    def forward(self, features: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        x = ((features - self.mean) / self.scale).clamp(-5.0, 5.0)
        return list(self.actor(x).split(self.choices, -1)), self.critic(x).squeeze(-1)

    def act(self, features: np.ndarray) -> np.ndarray:
        """The likeliest action."""
        with torch.no_grad():
            scores, _ = self(torch.from_numpy(features)[None])
        return np.array([int(part.argmax()) for part in scores])


def learn(features: np.ndarray, actions: np.ndarray, goals: np.ndarray, choices: list[int], steps: int) -> Network:
    """Value first, then the policy on what it makes of the actions."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    network = Network(features, choices)
    scale = float(goals.std()) + 1e-6
    x, a, g = torch.from_numpy(features), torch.from_numpy(actions), torch.from_numpy((goals - goals.mean()) / scale)
    for part, loss_of in (("critic", value_loss), ("actor", policy_loss)):
        optimizer = torch.optim.Adam(getattr(network, part).parameters(), 1e-3)
        for _ in range(steps):
            rows = torch.from_numpy(rng.integers(0, len(goals), 512))
            loss = loss_of(network, x[rows], a[rows], g[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network


def value_loss(network: Network, x: torch.Tensor, a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return (network(x)[1] - g).square().mean()


def policy_loss(network: Network, x: torch.Tensor, a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    scores, value = network(x)
    weight = ((g - value.detach()) / BETA).exp().clamp(max=MOST)
    likelihood = sum(-nn.functional.cross_entropy(s, a[:, i], reduction="none") for i, s in enumerate(scores))
    return -(weight * likelihood).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--datasets", default="out/datasets", help="folder of llmsched record")
    parser.add_argument("--name", default="llmsched/default-knobs/mixed-v0", help="of the data set in it")
    parser.add_argument("--steps", type=int, default=2000, help="gradient steps of each network")
    args = parser.parse_args()
    os.environ["MINARI_DATASETS_PATH"] = os.path.abspath(args.datasets)
    import minari

    try:
        dataset = minari.load_dataset(args.name)
    except FileNotFoundError:
        parser.error(f"--datasets {args.datasets}: has no {args.name}; `llmsched record --policy mixed` makes one")
    episodes = list(dataset.iterate_episodes())
    env = dataset.recover_environment()
    features = np.concatenate([e.observations[:-1] for e in episodes]).astype(np.float32)
    actions = np.concatenate([e.actions for e in episodes])
    goals = np.concatenate([returns(e.rewards, e.infos["discount"][1:]) for e in episodes])
    network = learn(features, actions, goals, [int(n) for n in env.action_space.nvec], args.steps)
    found = []
    for seed in TEST_SEEDS:
        observation, _ = env.reset(seed=seed)
        total, over = 0.0, False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(network.act(observation))
            total, over = total + float(reward), terminated or truncated
        found.append(total)
    print(f"{len(goals):,} decisions of {len(episodes)} episodes, seeds {TEST_SEEDS.start} to {TEST_SEEDS.stop - 1}")
    world = {"action": "knobs", "action_repeat": env.unwrapped.config.action_repeat}
    print(f"{'return of':>20}  as recorded  undisturbed")
    for maker in MIXTURE:
        theirs = [
            np.mean([play("default", world, maker, seed, share)["rewards"].sum() for seed in TEST_SEEDS])
            for share in (0.1, 0.0)
        ]
        print(f"{maker:>20}  {theirs[0]:11.1f}  {theirs[1]:11.1f}")
    print(f"{'learned from them':>20}  {'':11}  {np.mean(found):11.1f}")


if __name__ == "__main__":
    main()
