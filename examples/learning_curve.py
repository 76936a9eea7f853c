"""How examples/ppo.py learns: mean utility of greedy and sampled actions on selection seeds, 2000 to 2003.

    python -m examples.learning_curve [--steps 400000] [--seeds 5] [--out docs/figures/ppo_learning_curve.png]

Nobody trained on these seeds, but settings were chosen on them: this shows how learning goes and tests no agent.
Beside it what SLAI, `on-time` and the best preset held throughout earn on the same requests; what each preset is worth
when it is held throughout comes first, on other seeds.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from examples.ppo import TEST_SEEDS, WORLD, make_model
from llmsched_gym import env_config
from llmsched_gym.env.actions.preset import PRESETS
from llmsched_gym.env.policy import PolicyScheduler
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.help_text import place
from llmsched_gym.text import table

EVERY = 32_768  # decisions between two evaluations
CHOOSING_SEEDS = range(4000, 4004)  # the best preset is chosen on others than it is shown on
EVALUATED = env_config("default", **WORLD, num_requests=500)


def utility(scheduler, seeds=TEST_SEEDS) -> float:
    """Mean utility of a scheduler, by name or as an object, over runs of 500 requests."""
    return float(np.mean([row(simulate(EVALUATED, scheduler, seed=seed))["mean_utility"] for seed in seeds]))


class Evaluations(BaseCallback):
    """Rows (decisions, greedy, sampled, entropy in nats), the first before any training."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, float, float, float]] = []

    def _on_training_start(self) -> None:
        self.evaluate()

    def _on_step(self) -> bool:
        if self.num_timesteps % EVERY == 0:
            self.evaluate()
        return True

    def evaluate(self) -> None:
        """Append a row; torch's generator is left as it was."""
        state = torch.get_rng_state()
        agents = [
            PolicyScheduler(lambda seen, d=d: self.model.predict(seen, deterministic=d)[0], EVALUATED) for d in (1, 0)
        ]
        seen = self.model._last_obs
        with torch.no_grad():
            entropy = self.model.policy.get_distribution(self.model.policy.obs_to_tensor(seen)[0]).entropy().mean()
        self.rows.append((self.num_timesteps, *map(utility, agents), float(entropy)))
        torch.set_rng_state(state)


def favourite(model: PPO) -> str:
    """The preset that the policy chooses most, in the mean over the environments where training stopped."""
    with torch.no_grad():
        seen = model.policy.obs_to_tensor(model._last_obs)[0]
        shares = model.policy.get_distribution(seen).distribution.probs.mean(0)
    return f"`{list(PRESETS)[int(shares.argmax())]}` {float(shares.max()):.2f}"


def train(seed: int, steps: int) -> tuple[np.ndarray, str]:
    """Evaluations of one training run, (number of them, 4), and its favourite at the end."""
    torch.set_num_threads(1)
    evaluations = Evaluations()
    model = make_model(seed)
    model.learn(steps, callback=evaluations)
    return np.array(evaluations.rows), favourite(model)


def plot(runs: list[np.ndarray], levels: dict[str, float]) -> Figure:
    """Both measures of every run over decisions, and the references as lines."""
    figure = Figure(figsize=(8.0, 4.2), layout="constrained", dpi=130)
    axes = figure.subplots(1, 2, sharey=True)
    for panel, column, title in zip(axes, (1, 2), ("greedy actions", "sampled actions"), strict=True):
        for seed, rows in enumerate(runs):
            panel.plot(rows[:, 0] / 1e3, rows[:, column], color="C0", alpha=0.75, label="PPO" if seed == 0 else None)
        for k, (name, level) in enumerate(levels.items(), 1):
            panel.axhline(level, color=f"C{k}", linestyle="--", label=f"{name}: {level:.3f}")
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("decisions (thousands)")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("mean utility of a request")
    axes[0].set_ylim(min(0.0, *(rows[:, 1:3].min() for rows in runs)) - 0.02, 1.02)
    axes[1].legend(loc="lower right", fontsize=8)
    figure.suptitle(
        f"PPO over 32 presets, {len(runs)} training seeds, {WORLD['qps']} requests/s, unseen requests", fontsize=11
    )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.learning_curve", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400_000, help="decisions per training run")
    parser.add_argument("--seeds", type=int, default=5, help="training seeds")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--out", type=place, default=Path("docs/figures/ppo_learning_curve.png"), help="the plot")
    args = parser.parse_args()
    held = {name: utility(name, CHOOSING_SEEDS) for name in PRESETS}
    best = max(held, key=held.__getitem__)
    names = sorted(held, key=held.__getitem__, reverse=True)
    half = len(names) // 2
    pairs = zip(names[:half], names[half:], strict=True)
    header = ["preset", "held", "preset", "held"]
    print(table(header, [[f"`{a}`", f"{held[a]:.3f}", f"`{b}`", f"{held[b]:.3f}"] for a, b in pairs]), flush=True)
    levels = {name: utility(name) for name in ("slai", "on-time", best)}
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        trained = list(pool.map(train, range(args.seeds), [args.steps] * args.seeds))
    rows = []
    for seed, (found, liked) in enumerate(trained):
        above = (found[:, 1] > levels["slai"]) & (found[:, 2] > levels["slai"])
        since = len(above) - int(np.argmin(above[::-1])) if not above.all() else 0
        when = f"{found[since, 0]:,.0f}" if since < len(found) else "not yet"
        at_last = *(f"{x:.3f}" for x in found[-1, 1:3]), f"{found[0, 3]:.2f} to {found[-1, 3]:.2f}"
        rows.append([seed, when, *at_last, liked])
    header = ["seed", "above SLAI for good from", "greedy", "sampled", "entropy (nats)", "favourite and its share"]
    print(table(header, rows, 0))
    print("\n" + ", ".join(f"{name} {level:.3f}" for name, level in levels.items()))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot([found for found, _ in trained], levels).savefig(args.out)


if __name__ == "__main__":
    main()
