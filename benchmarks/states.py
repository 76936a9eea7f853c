"""What saved states cost: ``python benchmarks/states.py``, a Markdown table.

Of environments in the middle of an episode, after so many requests have come: bytes of one state, beside what all
states of an episode share, and microseconds of processor time to get one, to set it again, and to pickle and read it.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from llmsched_gym.env import LLMSchedEnv, LLMSchedVectorEnv
from llmsched_gym.env.route import LLMRouteEnv

WORLDS: tuple[tuple[str, Callable[..., Any], dict[str, Any]], ...] = (
    ("default", LLMSchedEnv, {"horizon_s": 900.0}),
    ("default, episode_metrics", LLMSchedEnv, {"horizon_s": 900.0, "episode_metrics": True}),
    ("default, slots", LLMSchedEnv, {"horizon_s": 900.0, "observation": "slots"}),
    ("chat: prefix caching", LLMSchedEnv, {"suite": "chat"}),
    ("agents: prefix caching", LLMSchedEnv, {"suite": "agents"}),
    ("route, 4 replicas", LLMRouteEnv, {"prefix_caching": False, "workload": "sharegpt", "qps": 6.0}),
    ("route, 4 replicas, prefix caching", LLMRouteEnv, {}),
)
REQUESTS = (100, 300, 1000)


def microseconds(work: Callable[[], Any], seconds: float) -> float:
    """Processor time of a call, the median over several rounds."""
    work()
    found, begun = [], time.process_time()
    while time.process_time() - begun < seconds or len(found) < 5:
        start = time.process_time()
        for _ in range(20):
            work()
        found.append(1e6 * (time.process_time() - start) / 20)
    return median(found)


def come(env: Any) -> int:
    """Requests that have come since the episode began."""
    return int(env.core.engine.state.episodes["num_arrived"][0])


def rows(seconds: float) -> list[list[str]]:
    """A row for each world and number of requests."""
    found = []
    for name, make, fields in WORLDS:
        env = make(**fields)
        env.reset(seed=0)
        action = env.action_space.sample() * 0
        for requests in REQUESTS:
            while come(env) < requests:
                if any(env.step(action)[2:4]):
                    break
            if come(env) < requests:
                continue
            state = env.get_state()
            get_us = microseconds(env.get_state, seconds)
            set_us = microseconds(lambda state=state, env=env: env.set_state(state), seconds)
            both_us = microseconds(lambda state=state: pickle.loads(pickle.dumps(state)), seconds)
            cells = [f"{come(env):,}", f"{state.nbytes:,}", f"{get_us:.0f}", f"{set_us:.0f}", f"{both_us:,.0f}"]
            found.append([name, *cells])
    return found


def slots_us(seconds: float) -> tuple[float, float]:
    """Microseconds to get the state of one of 64 slots, and to set it into another."""
    envs = LLMSchedVectorEnv(64, horizon_s=900.0)
    envs.reset(seed=0)
    actions = envs.action_space.sample() * 0
    while int(envs.core.engine.state.episodes["num_arrived"][0]) < 300:
        envs.step(actions)
    states = [envs.get_state(slot) for slot in range(2)]

    def move() -> None:
        envs.set_state(2, states[0])  # of another episode each time
        envs.set_state(2, states[1])

    return microseconds(lambda: envs.get_state(0), seconds), microseconds(move, seconds) / 2


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=0.3, help="processor time of one figure")
    seconds = parser.parse_args().seconds
    header = ["environment", "requests", "bytes", "get us", "set us", "pickle and back us"]
    print("\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---", *["---:"] * 5], *rows(seconds))))
    get_us, set_us = slots_us(seconds)
    print(f"\nof 64 slots, 300 requests: get {get_us:.0f} us, set into a slot of another episode {set_us:.0f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
