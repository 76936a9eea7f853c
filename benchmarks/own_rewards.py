"""What rewards and observations of one's own cost: decisions/s of the vector environment, one by one and batched.

    python -m benchmarks.own_rewards --num-envs 64

Random knobs on LLMSched-v0; all kinds take turns, medians of the rounds, on one core.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import typer

from examples.custom_batched import Lengths, shorter_queues
from llmsched_gym.env import LLMSchedVectorEnv, Moments, Transition, batched
from llmsched_gym.text import table


def queues(transition: Transition) -> float:
    """What the batched one pays, of one environment."""
    return -transition.duration_s * (len(transition.view.waiting) + len(transition.view.running))


@batched
def on_time(moments: Moments) -> np.ndarray:
    """+1 for every finished request whose first token was in time, -0.5 for every other that is over."""
    in_time = moments.resolved["ttft_missed"] == 0
    return 1.5 * moments.resolved.count(in_time) - 0.5 * moments.resolved.count()


class LengthsOfOne:
    """What the batched one shows, of one environment."""

    space = gym.spaces.Box(0.0, np.inf, (4,), np.float32)

    def observe(self, view: Any) -> list[float]:
        """Queue, batch, memory, and how many strict users run."""
        strict = np.count_nonzero(view.running.slo_class == 0)
        return [len(view.waiting), len(view.running), view.kv_cache_usage, strict]


KINDS: dict[str, dict[str, Any]] = {
    "built in": {},
    "reward on queues, one by one": {"reward": queues},
    "reward on queues, batched": {"reward": shorter_queues},
    "reward on what is over, batched": {"reward": on_time},
    "observation of lengths, one by one": {"observation": LengthsOfOne()},
    "observation of lengths, batched": {"observation": Lengths()},
}


def main(
    num_envs: Annotated[int, typer.Option(help="Environments side by side.")] = 64,
    seconds: Annotated[float, typer.Option(help="Of stepping, for each kind in a round.")] = 0.5,
    rounds: Annotated[int, typer.Option(help="Times that each kind has its turn.")] = 5,
) -> None:
    """Print the table."""
    envs = {name: LLMSchedVectorEnv(num_envs, **fields) for name, fields in KINDS.items()}
    space = next(iter(envs.values())).action_space
    space.seed(0)
    actions = [space.sample() for _ in range(64)]
    speeds: dict[str, list[float]] = {name: [] for name in envs}
    for vector in envs.values():
        vector.reset(seed=0)
        for action in actions:
            vector.step(action)
    for _ in range(rounds):
        for name, vector in envs.items():
            begin_s, steps = time.perf_counter(), 0
            while time.perf_counter() - begin_s < seconds:
                vector.step(actions[steps % len(actions)])
                steps += 1
            speeds[name].append(num_envs * steps / (time.perf_counter() - begin_s))
    usual = speeds["built in"]
    rows = []
    for name, own in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(own, usual, strict=True))
        rows.append([name, f"{statistics.median(own):,.0f}", f"{ratio:.2f}"])
    print(table(["reward or observation", "decisions/s", "of the built-in"], rows, 1))


if __name__ == "__main__":
    typer.run(main)
