"""Rollouts of our own PPO by actors on Ray, bit-equal to one process: ``python -m benchmarks.ray_rollouts --actors 4``.

Each actor holds a share of the environments of one training. An iteration sends the weights to all actors, and their
rollouts are put together for the update; beside it one process does the same alone. Every array of every rollout, the
ends of episodes and the weights after each update are compared; exits with 1 if a bit differs.

Needs ``pip install 'llmsched-gym[agents,ray]'``. Ray is started here, on the loopback.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

import numpy as np
import torch

from llmsched_gym.agents import ppo
from llmsched_gym.agents.advantages import Variant
from llmsched_gym.agents.collect import Collector, networks_of
from llmsched_gym.agents.options import fail_in_one_line, option, parse
from llmsched_gym.config import ConfigError
from llmsched_gym.evaluation.ray_pool import NO_CLUSTER
from llmsched_gym.evaluation.spread import choose
from llmsched_gym.interrupts import leave
from llmsched_gym.policies.network import Network


@dataclasses.dataclass(frozen=True)
class Trial(ppo.Config):
    steps: int = option(65_536, "decisions of the training")
    num_envs: int = option(64, "environments of the training")
    n_steps: int = option(32, "decisions per environment and iteration")
    batch_size: int = option(512, "of a minibatch")
    action: str = option("preset", "what the agent decides", choices=("knobs", "preset", "request"))
    actors: int = option(4, "actors on Ray, an equal share of the environments each")
    cores: int = option(2, "cores of the Ray that is started here")


class Part:
    """Environments `first` to `first + num_envs - 1` of a training, in a process of their own."""

    def __init__(self, config: ppo.Config, first: int, num_envs: int) -> None:
        world, sizes = config.world(), (num_envs, config.suite, config.seed, config.n_steps)
        self.collector = Collector(*sizes, gae_lambda=config.gae_lambda, first=first, **world)
        self.collector.start()

    def collect(self, networks: tuple[Any, Any], step: int) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
        """Arrays of the next rollout, environments first, and the figures of episodes that ended."""
        writable = [Network(*map(np.array, network)) for network in networks]  # those of Ray's store are not
        ended = self.collector.collect(*writable, step)
        return {name: array for name, array in self.collector.rollout._asdict().items() if name != "widths"}, ended


def main() -> None:
    """Train for some iterations by both; print what was compared, and exit with 1 if anything differs."""
    os.environ.setdefault(NO_CLUSTER, "0")  # before Ray is imported: all of it on the loopback
    config = parse(Trial, None, __doc__, "python -m benchmarks.ray_rollouts")
    if config.num_envs % config.actors:
        raise ConfigError(f"--actors: expected a divisor of {config.num_envs} environments, got {config.actors}")
    if any(getattr(config, field.name) != field.default for field in dataclasses.fields(Variant)):
        names = ", ".join(f"--{field.name}" for field in dataclasses.fields(Variant))
        raise ConfigError(f"{names}: expected their defaults, as they need all environments in one process")
    torch.set_num_threads(1)
    alone = ppo.make_collector(config)
    policy = ppo.make_policy(config, alone)
    ppo.begin(policy, config)
    learner = ppo.Learner(config, policy, alone.rollout.widths)
    alone.start()
    warm = Part(dataclasses.replace(config, n_steps=1), 0, 1)  # compiled once here, not by every actor
    warm.collect(networks_of(policy), 0)
    share, step, compared, differing, num_ended = config.num_envs // config.actors, 0, 0, [], 0
    with choose(config.cores, ray=True):
        import ray

        actor = ray.remote(num_cpus=0)(Part)
        parts = [actor.remote(config, i * share, share) for i in range(config.actors)]
        while step < config.steps:
            networks = networks_of(policy)
            told = ray.put(networks)
            calls = [part.collect.remote(told, step) for part in parts]
            ended = alone.collect(*networks, step)
            found, ends = zip(*ray.get(calls), strict=True)
            together = {name: np.concatenate([arrays[name] for arrays in found]) for name in found[0]}
            for name, array in together.items():
                compared += array.nbytes
                if getattr(alone.rollout, name).tobytes() != array.tobytes():
                    differing.append(f"{name} at {step:,}")
            returns = sorted(figures["r"] for figures in ended)
            if returns != sorted(figures["r"] for part in ends for figures in part):
                differing.append(f"ends of episodes at {step:,}")
            num_ended += len(ended)
            learner.learn(alone.rollout._replace(**together), step)  # by what came from the actors
            step += config.num_envs * config.n_steps
    learner.close()
    alone.close()
    print(
        f"{step:,} decisions of {config.num_envs} environments, {config.actors} actors: {compared / 1e6:.1f} MB of "
        f"rollouts and {num_ended} ends of episodes compared, differing: {', '.join(differing) or 'none'}"
    )
    if differing or not num_ended:
        sys.exit(1)


if __name__ == "__main__":
    from benchmarks import ray_rollouts as module  # under its one name: actors unpickle its classes

    leave(fail_in_one_line(module.main))
