"""Seeds for training and for selection, and environments whose episodes are drawn from the former."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmsched_gym.config import ConfigError
from llmsched_gym.env.vector import LLMSchedVectorEnv

TRAINING_SEEDS = range(1000, 2000)
SELECTION_SEEDS = range(2000, 3000)


def check_seeds(option: str, count: int, seeds: range) -> None:
    """Raise ConfigError where an option asks for more seeds than there are to choose from."""
    if count > len(seeds):
        raise ConfigError(f"--{option}: expected at most {len(seeds):,}, as many as there are seeds, got {count}")


class SeededVectorEnv(LLMSchedVectorEnv):
    """Every episode's seed is drawn from TRAINING_SEEDS by one generator."""

    episodes: np.random.Generator

    def _restart(self, env: int, seed: int | None, options: dict[str, Any]) -> None:
        if seed is None:
            seed = int(self.episodes.integers(TRAINING_SEEDS.start, TRAINING_SEEDS.stop))
        super()._restart(env, seed, options)
