"""Drive random actions through the vector environment and check every rule of the engine on the way.

    python -m benchmarks.soak [--steps 1000000]

prints one JSON line per action space: steps, checks, invariant violations, and what the run went through.

    python -m benchmarks.soak --requests 10000000    # through one engine, in a window of them
    python -m benchmarks.soak --seconds 600          # a vector environment, stepped so long; 3600 is an hour

print a JSON line with the memory of the process (resident, MiB) at each tenth; they fail where it grows behind the
first by more than `GROWTH_MIB`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from llmsched_gym.config import scenario
from llmsched_gym.engine import InvariantError, check
from llmsched_gym.env import LLMSchedVectorEnv
from llmsched_gym.evaluation.long_run import long_run

NUM_ENVS = 64
SUITES = ("default", "tenants", "burst", "drift")
STRESS = {"num_kv_blocks": 2500, "patience_s": 10.0, "allow_refusal": True, "qps_range": (0.5, 3.5), "horizon_s": 100.0}


def soak(action: str, steps: int, seed: int = 0) -> dict[str, object]:
    """`steps` random decisions in `action`, a quarter of them in each suite; one environment is checked every call."""
    totals = dict.fromkeys(("preemptions", "rejected", "refused", "abandoned", "finished"), 0)
    violations, checks, done_steps = 0, 0, 0
    start = time.perf_counter()
    for suite in SUITES:
        # long prompts and outputs exceed this model length, so that some requests are rejected
        envs = LLMSchedVectorEnv(NUM_ENVS, suite, action=action, max_model_len=7000, **STRESS)
        envs.action_space.seed(seed)
        envs.reset(seed=5000 + seed)
        state, clocks = envs.core.engine.state, np.zeros(NUM_ENVS)
        for k in range(steps // len(SUITES) // NUM_ENVS + 1):
            actions = envs.action_space.sample()
            if action == "request":  # mostly legal ones: a random slot is rarely in use
                legal = envs.action_masks()
                actions = np.array(
                    [np.random.default_rng([k, i]).choice(np.flatnonzero(m)) for i, m in enumerate(legal)]
                )
            before = state.sims.copy()
            *_, terminated, truncated, _ = envs.step(actions)
            state = envs.core.engine.state
            ended = terminated | truncated
            clocks[ended] = 0.0
            for name in totals:
                totals[name] += int(before[f"num_{name}"][ended].sum())
            env = k % NUM_ENVS
            marks = state.requests[env]["num_scheduled_tokens"].copy()
            if action == "request":  # a batch in the making carries marks
                state.requests[env]["num_scheduled_tokens"] = 0
            try:
                clocks[env] = check(state, env, clocks[env])
            except InvariantError as error:
                violations += 1
                print(error, file=sys.stderr)
            state.requests[env]["num_scheduled_tokens"] = marks
            checks += 1
            done_steps += NUM_ENVS
        for name in totals:
            totals[name] += int(state.sims[f"num_{name}"].sum())
    seconds = round(time.perf_counter() - start, 1)
    return {
        "action": action,
        "steps": done_steps,
        "checks": checks,
        "violations": violations,
        **totals,
        "wall_s": seconds,
    }


GROWTH_MIB = 64


def resident_mib() -> int:
    """What this process holds in memory now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def grew(resident: list[int]) -> bool:
    """Whether memory grew behind the first tenth, in which all is allocated and compiled."""
    return max(resident[1:], default=0) > resident[0] + GROWTH_MIB


def requests(count: int, policy: str, seed: int = 0) -> dict[str, object]:
    """`count` requests of the paper's workload at 1.2 requests/s through one engine."""
    resident: list[int] = []
    gone = 0

    def seen(episode: object) -> None:
        nonlocal gone
        gone += len(episode.requests)  # type: ignore[attr-defined]
        while gone >= (len(resident) + 1) * count / 10:
            resident.append(resident_mib())
            print(f"{gone:,} requests, {resident[-1]} MiB", file=sys.stderr, flush=True)

    world = scenario("paper", qps=1.2, num_requests=count)
    return long_run(world, policy, seed, seen=seen) | {"resident_mib": resident, "grew": grew(resident)}


def stepping(seconds: float, seed: int = 0) -> dict[str, object]:
    """Random knobs in 64 environments, episode after episode, for so long."""
    envs = LLMSchedVectorEnv(NUM_ENVS, "drift", **STRESS)
    envs.action_space.seed(seed)
    envs.reset(seed=seed)
    steps, episodes, resident = 0, 0, []
    begun = time.monotonic()
    while len(resident) < 10:
        for _ in range(100):
            *_, terminated, truncated, _ = envs.step(envs.action_space.sample())
            episodes += int((terminated | truncated).sum())
        steps += 100 * NUM_ENVS
        if time.monotonic() - begun >= (len(resident) + 1) * seconds / 10:
            resident.append(resident_mib())
    wall_s = round(time.monotonic() - begun, 1)
    return {"steps": steps, "episodes": episodes, "wall_s": wall_s, "resident_mib": resident, "grew": grew(resident)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1_000_000, help="decisions per action space (default 1000000)")
    parser.add_argument("--requests", type=int, help="so many through one engine instead")
    parser.add_argument("--policy", default="slai", help="whose (default slai)")
    parser.add_argument("--seconds", type=float, help="step a vector environment so long instead")
    args = parser.parse_args()
    if args.requests is not None or args.seconds is not None:
        result = requests(args.requests, args.policy) if args.requests is not None else stepping(args.seconds)
        print(json.dumps(result), flush=True)
        return int(bool(result["grew"]))
    failed = 0
    for action in ("knobs", "priority", "request"):
        result = soak(action, args.steps)
        failed += int(str(result["violations"]))
        print(json.dumps(result), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
