"""What `slai` earns in an episode of each registered environment: ``python -m benchmarks.thresholds --episodes 20``.

`on-time` stands beside it. Episodes of selection seeds, 2000 and on; mean returns. The first column are the
`reward_threshold` that environments are registered with.
"""

from __future__ import annotations

import argparse
import sys

import gymnasium as gym
import numpy as np

from llmsched_gym.agents.seeds import SELECTION_SEEDS
from llmsched_gym.config import SUITES
from llmsched_gym.env.policy import SchedulerPolicy
from llmsched_gym.text import table

POLICIES = ("slai", "on-time")


def returns(env_id: str, scheduler: str, episodes: int) -> list[float]:
    """What a scheduler earns in each episode."""
    env, found = gym.make(env_id), []
    for seed in SELECTION_SEEDS[:episodes]:
        env.reset(seed=seed)
        policy, earned, is_over = SchedulerPolicy(env, scheduler), 0.0, False
        while not is_over:
            _, reward, terminated, truncated, _ = policy.step()
            earned, is_over = earned + reward, terminated or truncated
        found.append(earned)
    return found


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=20, help="of each environment")
    episodes = parser.parse_args().episodes
    rows = []
    for suite in SUITES.values():
        row = [f"{np.mean(returns(suite.env_id, name, episodes)):.1f}" for name in POLICIES]
        print(suite.env_id, *row, file=sys.stderr, flush=True)
        rows.append((f"`{suite.env_id}`", *row))
    print(table(("environment", *POLICIES), rows, 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
