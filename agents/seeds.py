"""Seeds for training and for selection, and environments whose episodes are drawn from the former."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmsched_gym.config import ClusterScenario, ConfigError, EnvConfig, Scenario, env_config
from llmsched_gym.cost import load_profile
from llmsched_gym.env.vector import LLMSchedVectorEnv
from llmsched_gym.evaluation.clusters import check_inside
from llmsched_gym.evaluation.run import check_arrivals
from llmsched_gym.workload import make_table

TRAINING_SEEDS = range(1000, 2000)
SELECTION_SEEDS = range(2000, 3000)


def check_seeds(option: str, count: int, seeds: range) -> None:
    """Raise ConfigError where an option asks for more seeds than there are to choose from."""
    if count > len(seeds):
        raise ConfigError(f"--{option}: expected at most {len(seeds):,}, as many as there are seeds, got {count}")


def evaluation_of(config: Any) -> EnvConfig:
    """The world of a training's runs on selection seeds; its `set` counts before the number of requests."""
    return env_config(config.suite, **{"num_requests": config.eval_requests, **config.world()})


def check_evaluations(world: Scenario, num_seeds: int) -> None:
    """Raise ConfigError where a training's evaluations on selection seeds could not be run; before it begins."""
    check_seeds("eval-seeds", num_seeds, SELECTION_SEEDS)
    if isinstance(world, ClusterScenario):
        check_inside(world)
    profiles = world.profiles if isinstance(world, ClusterScenario) else (world.profile,)
    for profile in (*profiles, world.scheduler_profile):
        if profile is not None:
            load_profile(profile)
    check_arrivals(make_table(world, SELECTION_SEEDS.start))


class SeededVectorEnv(LLMSchedVectorEnv):
    """Every episode's seed is drawn from TRAINING_SEEDS by one generator."""

    episodes: np.random.Generator

    def _restart(self, env: int, seed: int | None, options: dict[str, Any]) -> None:
        if seed is None:
            seed = int(self.episodes.integers(TRAINING_SEEDS.start, TRAINING_SEEDS.stop))
        super()._restart(env, seed, options)
