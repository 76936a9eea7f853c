"""Drive random actions through the vector environment and check every rule of the engine on the way.

    python -m benchmarks.soak [--steps 1000000]

prints one JSON line per action space: steps, checks, invariant violations, and what the run went through.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import numpy as np

from llmsched_gym.engine import InvariantError, check
from llmsched_gym.env import LLMSchedVectorEnv

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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1_000_000, help="decisions per action space (default 1000000)")
    args = parser.parse_args()
    failed = 0
    for action in ("knobs", "priority", "request"):
        result = soak(action, args.steps)
        failed += int(str(result["violations"]))
        print(json.dumps(result), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
