"""How fast our own PPO learns beside Stable-Baselines3's: ``python -m benchmarks.learners --threads 2``.

`agents.ppo` and `agents.train` train side by side, an iteration of the one and then of the other, with the same
environments, rollouts, epochs, minibatches, network and held actions; so does Stable-Baselines3's PPO on CartPole-v1
with these sizes. What else runs on the machine meets all three. Prints one JSON line: decisions per second (medians
over iterations), microseconds per decision of rollouts, of updates and, all threads together, of the processor; the
median of the ratios of iterations that followed each other; and the explained variance of the learners over the last
half of the iterations.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger

from llmsched_gym.agents import ppo, train
from llmsched_gym.agents.collect import networks_of
from llmsched_gym.agents.envs import TrainingEnv
from llmsched_gym.agents.networks import normaliser_of
from llmsched_gym.agents.rollout import Discounts
from llmsched_gym.evaluation.bench import machine

Iteration = Callable[[], tuple[float, float, float, float]]
"""Seconds of a rollout and of an update, of the processor for both, and the explained variance before the update."""


def timed(collect: Callable[[], Any], learn: Callable[[], Any]) -> tuple[float, float, float]:
    start, start_cpu = time.perf_counter(), time.process_time()
    collect()
    collected = time.perf_counter()
    learn()
    return collected - start, time.perf_counter() - collected, time.process_time() - start_cpu


def own(config: ppo.Config) -> Iteration:
    """Iterations of agents.ppo."""
    collector = ppo.make_collector(config)
    policy = ppo.make_policy(config, collector)
    ppo.begin(policy, config)
    learner = ppo.Learner(config, policy, collector.rollout.widths)
    collector.start()
    step = 0

    def iterate() -> tuple[float, float, float, float]:
        nonlocal step
        figures: dict[str, float] = {}
        times = timed(
            lambda: collector.collect(*networks_of(policy), step),
            lambda: figures.update(learner.learn(collector.rollout, step)),
        )
        step += config.num_envs * config.n_steps
        return *times, figures["train/explained_variance"]

    return iterate


def of_sb3(model: Any, env: Any, callback: Any, steps: int) -> Iteration:
    """Iterations of a model of Stable-Baselines3."""
    model.set_logger(Logger(folder=None, output_formats=[]))
    _, callback = model._setup_learn(steps, callback)

    def iterate() -> tuple[float, float, float, float]:
        def learn() -> None:
            model._update_current_progress_remaining(model.num_timesteps, steps)
            model.train()

        times = timed(
            lambda: model.collect_rollouts(env, callback, model.rollout_buffer, n_rollout_steps=model.n_steps), learn
        )
        return *times, float(model.logger.name_to_value["train/explained_variance"])

    return iterate


def beside(config: train.Config) -> Iteration:
    """Iterations of agents.train."""
    env = TrainingEnv(config.num_envs, config.suite, config.seed, **config.world())
    model = train.make_model(config, env)
    normaliser_of(model.policy).fit(train.typical_features(env, config.seed))
    return of_sb3(model, env, Discounts(per_second=True), config.steps)


def cartpole(config: train.Config) -> Iteration:
    """Iterations of Stable-Baselines3's PPO, as it comes, on CartPole-v1."""
    env = make_vec_env("CartPole-v1", config.num_envs)
    sizes = {"n_steps": config.n_steps, "batch_size": config.batch_size, "n_epochs": config.epochs}
    model = PPO("MlpPolicy", env, **sizes, policy_kwargs={"net_arch": list(config.hidden)}, device="cpu", seed=0)
    return of_sb3(model, model.get_env(), None, config.steps)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--iterations", type=int, default=40, help="of each")
    parser.add_argument(
        "--torch-threads", type=int, default=1, help="of Stable-Baselines3; ours shares out whole shards"
    )
    parser.add_argument("--suite", default="default", help="suite to train on")
    parser.add_argument("--action", default="knobs", choices=("knobs", "preset"), help="what the agents decide")
    for name in ("threads", "num_envs", "n_steps", "batch_size", "epochs", "action_repeat"):
        default = getattr(ppo.Config, name)
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default, help="as of agents.ppo")
    args = parser.parse_args()
    sizes = {name: value for name, value in vars(args).items() if name not in ("iterations", "torch_threads")}
    steps = args.iterations * args.num_envs * args.n_steps
    torch.distributions.Distribution.set_default_validate_args(False)
    theirs = train.Config(steps=steps, **sizes)
    learners = {
        "own": own(ppo.Config(steps=steps, **sizes)),
        "sb3": beside(theirs),
        "cartpole": cartpole(theirs),
    }
    rows = []
    for _ in range(args.iterations):
        row = []
        for name, iterate in learners.items():
            torch.set_num_threads(1 if name == "own" else args.torch_threads)
            row.append(iterate())
        rows.append(row)
    found = np.array(rows)
    kept = found[2:]  # the first load code
    decisions = args.num_envs * args.n_steps
    total = kept[..., 0] + kept[..., 1]
    figures: dict[str, Any] = {
        name: {
            "decisions_per_s": round(decisions / float(np.median(total[:, k]))),
            "rollout_us": round(1e6 * float(np.median(kept[:, k, 0])) / decisions, 2),
            "update_us": round(1e6 * float(np.median(kept[:, k, 1])) / decisions, 2),
            "processor_us": round(1e6 * float(np.median(kept[:, k, 2])) / decisions, 2),
            "explained_variance": round(float(np.mean(found[len(found) // 2 :, k, 3])), 3),
        }
        for k, name in enumerate(learners)
    }
    for k, name in ((1, "sb3"), (2, "cartpole")):
        figures[f"own_over_{name}"] = round(float(np.median(total[:, k] / total[:, 0])), 2)
        figures[f"own_over_{name}_by_processor"] = round(float(np.median(kept[:, k, 2] / kept[:, 0, 2])), 2)
    sizes["torch_threads"] = args.torch_threads
    print(json.dumps(figures | {"sizes": sizes, "load": os.getloadavg(), "machine": machine()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
