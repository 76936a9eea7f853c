"""How fast agents train and decide on this machine, beside PPO on CartPole in the same run.

    python -m benchmarks.training [--steps 400000] [--policy learned] [--threads 2 --n-steps 128 --batch-size 8192]

prints one JSON line: decisions per second of `agents.train` with these sizes, else its defaults (simulation, forward
passes and updates; one decision is eight batches) and of Stable-Baselines3's PPO on CartPole-v1 with the same network,
rollouts and minibatches; and the milliseconds of one decision of a policy at 128 running and 256 waiting requests.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from llmsched_gym.agents.decision_time import measure_decision_s
from llmsched_gym.agents.train import Config, train
from llmsched_gym.evaluation.bench import machine
from llmsched_gym.policies import LoadedPolicy
from llmsched_gym.registry import make_scheduler


def training_frames_per_s(config: Config) -> dict[str, float]:
    """Median and best over the iterations of a training; evaluations are not part of an iteration."""
    with tempfile.TemporaryDirectory() as folder:
        train(dataclasses.replace(config, out=folder + "/run"))
        lines = [json.loads(line) for line in Path(folder, "run", "progress.jsonl").read_text().splitlines()]
    rates = [line["time/frames_per_s"] for line in lines[1:]]  # the first loads code
    return {"median": float(np.median(rates)), "best": max(rates)}


def cartpole_frames_per_s(config: Config, steps: int) -> float:
    """Steps per second of SB3's PPO, as it comes, with the same sizes."""
    env = make_vec_env("CartPole-v1", config.num_envs)
    model = PPO(
        "MlpPolicy",
        env,
        n_steps=config.n_steps,
        batch_size=config.batch_size,
        n_epochs=config.epochs,
        policy_kwargs={"net_arch": list(config.hidden)},
        device="cpu",
        seed=0,
    )
    model.learn(config.n_steps * config.num_envs)
    start = time.perf_counter()
    model.learn(steps)
    return model.num_timesteps / (time.perf_counter() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=400_000, help="decisions to train on")
    parser.add_argument("--policy", default="learned", help="policy folder or name whose decisions are timed")
    sizes = {name: getattr(Config, name) for name in ("threads", "n_steps", "batch_size")}
    for name, default in sizes.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default, help="as of agents.train")
    args = parser.parse_args()
    chosen = {name: getattr(args, name) for name in sizes}
    config = Config(suite="drift", steps=args.steps, eval_every=args.steps, eval_seeds=1, eval_requests=50, **chosen)
    policy = make_scheduler(args.policy)
    if not isinstance(policy, LoadedPolicy):
        parser.error(f"--policy: expected a policy folder with a network or a linear rule, got {args.policy!r}")
    figures = {
        "train_frames_per_s": training_frames_per_s(config),
        "cartpole_frames_per_s": cartpole_frames_per_s(config, args.steps // 4),
        "sizes": {**chosen, "num_envs": config.num_envs, "torch_threads": torch.get_num_threads()},
        "decision_ms": {k.removesuffix("_s"): 1e3 * v for k, v in measure_decision_s(policy).items()},
        "machine": machine(),
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
