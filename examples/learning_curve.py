"""The learning curve of examples/ppo.py over three seeds, beside what reference schedulers earn in the same episodes.

python -m examples.learning_curve [--steps 1000000] [--out docs/figures/ppo_learning_curve.png]
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from llmsched_gym.env import LLMSchedEnv
from llmsched_gym.env.policy import SchedulerPolicy
from llmsched_gym.env.sb3 import LLMSchedVecEnv

WORLD = {"qps": 1.8}
REFERENCES = {"slai": "C1", "sarathi": "C2"}


class Returns(BaseCallback):
    """Return of every finished episode and the step it ended at."""

    def _on_training_start(self) -> None:
        self.rows: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        ends = [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        self.rows += [(self.num_timesteps, episode_return) for episode_return in ends]
        return True


def train(seed: int, steps: int) -> np.ndarray:
    """Rows (step, return) of one training run."""
    env = LLMSchedVecEnv(num_envs=64, action_repeat=4, **WORLD)
    env.seed(1000 + 100 * seed)
    returns = Returns()
    model = PPO("MlpPolicy", env, n_steps=128, batch_size=2048, n_epochs=4, gamma=0.998, seed=seed, device="cpu")
    model.learn(steps, callback=returns)
    return np.array(returns.rows)


def reference_return(name: str, episodes: int = 40) -> float:
    """Mean return of a scheduler over training episodes."""
    env, total = LLMSchedEnv(**WORLD), 0.0
    for seed in range(1000, 1000 + episodes):
        env.reset(seed=seed)
        policy, done = SchedulerPolicy(env, name), False
        while not done:
            _, reward, terminated, truncated, _ = policy.step()
            total += reward
            done = terminated or truncated
    return total / episodes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.learning_curve", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1_000_000, help="decisions per training run")
    parser.add_argument("--out", type=Path, default=Path("docs/figures/ppo_learning_curve.png"), help="the plot")
    args = parser.parse_args()
    figure = Figure(figsize=(7.5, 4.2), layout="constrained", dpi=130)
    axes = figure.subplots()
    for seed in range(3):
        rows = train(seed, args.steps)
        bins = np.array_split(rows[np.argsort(rows[:, 0], kind="stable")], max(1, len(rows) // 64))
        x, y = (np.array([b[:, k].mean() for b in bins]) for k in (0, 1))
        axes.plot(x / 1e6, y, color="C0", alpha=0.5 + 0.2 * seed, label="PPO, three seeds" if seed == 0 else None)
        print(f"seed {seed}: last 64 episodes {y[-1]:.1f}", flush=True)
    for name, colour in REFERENCES.items():
        level = reference_return(name)
        axes.axhline(level, color=colour, linestyle="--", label=f"{name}: {level:.0f}")
        print(f"{name}: {level:.1f}", flush=True)
    axes.set_xlabel("decisions of 4 batches (millions)")
    axes.set_ylabel("return of a 300 s episode\n(utility, about 540 requests)")
    axes.set_title("PPO on LLMSched-v0 at 1.8 requests/s; each point is the mean of 64 episodes", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
