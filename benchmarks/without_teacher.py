"""What our own PPO learns from scratch: ``python -m benchmarks.without_teacher --steps 400000 --seeds 5``.

For each training seed, from the uniform policy on: since when greedy and sampled actions both stay above SLAI, and what
they earn at the end, on selection seeds (2000 to 2003, 500 requests each, unless told otherwise): requests that nobody
trained on, but on which settings were chosen, so that this shows how learning goes and tests no agent. Presets or knobs
at 1.8 requests/s, as in ``examples/learning_curve.py``.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

import numpy as np
import torch

from llmsched_gym.agents import ppo
from llmsched_gym.agents.collect import networks_of
from llmsched_gym.agents.export import export
from llmsched_gym.agents.options import option, parse
from llmsched_gym.agents.seeds import SELECTION_SEEDS, evaluation_of
from llmsched_gym.env.policy import PolicyScheduler
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.policies import LoadedPolicy
from llmsched_gym.text import table


@dataclasses.dataclass(frozen=True)
class Trial(ppo.Config):
    seeds: int = option(5, "training seeds, from --seed on")
    eval_every: int = option(32_768, "decisions between looks on selection seeds, at least")


def utility(scheduler: Any, config: ppo.Config) -> float:
    """Mean utility of a scheduler, by name or as an object."""
    world, seeds = evaluation_of(config), SELECTION_SEEDS[: config.eval_seeds]
    return float(np.mean([row(simulate(world, scheduler, seed=seed))["mean_utility"] for seed in seeds]))


def both(policy: Any, config: ppo.Config, world: Any) -> tuple[float, float]:
    """What greedy and what sampled actions earn."""

    def draw(seen: Any, *masks: np.ndarray) -> Any:
        """An action for an observation and, where actions can be illegal, what is legal."""
        legal = {"action_masks": masks[0]} if masks else {}
        return policy.predict(seen, deterministic=False, **legal)[0]

    torch.manual_seed(0)
    return utility(LoadedPolicy(*export(policy, world)), config), utility(PolicyScheduler(draw, world), config)


def learn(config: ppo.Config) -> tuple[np.ndarray, float]:
    """Rows (decisions, greedy, sampled, entropy in nats) of one training, and the seconds that it took."""
    collector = ppo.make_collector(config)
    policy = ppo.make_policy(config, collector)
    ppo.begin(policy, config)
    learner = ppo.Learner(config, policy, collector.rollout.widths)
    collector.start()
    rows, step, spent_s = [(0, *both(policy, config, collector.config), np.nan)], 0, 0.0
    while step < config.steps:
        start = time.perf_counter()
        collector.collect(*networks_of(policy), step)
        figures = learner.learn(collector.rollout, step)
        spent_s += time.perf_counter() - start
        step += config.num_envs * config.n_steps
        if step - rows[-1][0] >= config.eval_every or step >= config.steps:
            rows.append((step, *both(policy, config, collector.config), figures["train/entropy"]))
    collector.close()
    learner.close()
    return np.array(rows), spent_s


def main() -> int:
    """Train, and print the table."""
    config = parse(Trial, None, __doc__, "python -m benchmarks.without_teacher")
    torch.set_num_threads(1)
    slai = utility("slai", config)
    rows = []
    for seed in range(config.seed, config.seed + config.seeds):
        found, spent_s = learn(dataclasses.replace(config, seed=seed))
        above = (found[:, 1] > slai) & (found[:, 2] > slai)
        since = len(above) - int(np.argmin(above[::-1])) if not above.all() else 0
        when = f"{found[since, 0]:,.0f}" if since < len(found) else "not yet"
        rows.append([seed, when, *(f"{x:.3f}" for x in found[-1, 1:3]), f"{found[-1, 3]:.2f}", f"{spent_s:.0f}"])
        print(f"seed {seed}: " + " ".join(f"{a:.3f}/{b:.3f}" for a, b in found[:, 1:3]), file=sys.stderr, flush=True)
    header = ["seed", "above SLAI for good from", "greedy", "sampled", "entropy (nats)", "seconds of training"]
    print(table(header, rows, 0))
    print(f"\nSLAI {slai:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
