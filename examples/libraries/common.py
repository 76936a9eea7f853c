"""What the snippets have in common: the problem, what they print at the end, and the test on unseen requests."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np

from llmsched_gym import env_config
from llmsched_gym.env.policy import PolicyScheduler
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate

ID = "llmsched_gym:LLMSched-v0"
WORLD = {"qps": 1.8, "action": "preset", "action_repeat": 32}
"""One of 32 schedulers for every 32 batches: what any learner of discrete actions takes."""
NUM_ENVS, SEED = 16, 0


def decisions(default: int) -> int:
    """How many decisions to learn from: the first argument of the command, or the default."""
    return int(sys.argv[1]) if len(sys.argv) > 1 else default


def utility(choose: Callable[[np.ndarray], Any], **world: Any) -> float:
    """Mean utility of 300 requests that nobody trained on, under the actions that `choose` returns for observations."""
    config = env_config("default", **{**WORLD, **world, "num_requests": 300})
    return float(row(simulate(config, PolicyScheduler(choose, config), seed=2000))["mean_utility"])


class Clock:
    """Seconds from here on, of the wall."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()

    def report(self, library: str, what: str, count: int, **found: float) -> None:
        """Print one line of JSON: how many decisions a second `what` took, and whatever else was found."""
        seconds = time.perf_counter() - self._start_s
        line = {"library": library, "version": version(library), "what": what, "decisions": count}
        line |= {"decisions_per_s": round(count / seconds), **{name: round(x, 3) for name, x in found.items()}}
        print(json.dumps(line), flush=True)
