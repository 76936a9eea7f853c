"""What async scheduling changes: attainment of the same requests with and without a batch formed ahead.

    python -m benchmarks.async_lag [--seeds 10] [--first-seed 0] [--qps 1.4] [--workers N] [--ray | --ray-address A]

Prints a table for the paper's suite and one for the default suite: means over seeds without `async_lag`, and the
difference with it, paired by seed, in points with its 95 % interval; once with outputs that end with a stop token that
nobody foresees, once with limits that are known (`max_output_tokens`).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llmsched_gym import text
from llmsched_gym.config import Scenario, scenario
from llmsched_gym.evaluation.outcomes import Outcomes
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.evaluation.spread import Places, add_options, choose, run_cells
from llmsched_gym.report.intervals import MIN_SEEDS, interval
from llmsched_gym.workload import make_table

POLICIES = ("vllm-v1", "sarathi", "slai", "slai[offset=6]", "slai[offset=7]", "on-time")
MODES = ((False, False), (True, False), (True, True))  # whether it lags, whether limits are known


def attained(world: Scenario, policy: str, seed: int, known: bool) -> float:
    """Share of a seed's requests within all SLOs, in percent."""
    table = make_table(world, seed)
    if known:
        table = replace(table, max_output_tokens=table.output_tokens)
    return 100.0 * float(np.mean(Outcomes(simulate(world, policy, seed, table=table)).attained))


def measure(world: Scenario, seeds: Sequence[int], workers: Places) -> str:
    """A line for each policy."""
    cells = [
        (world.replace(async_lag=lags), policy, seed, known)
        for policy in POLICIES
        for lags, known in MODES
        for seed in seeds
    ]
    found = np.reshape(run_cells(attained, cells, workers, lambda note: None), (len(POLICIES), len(MODES), len(seeds)))
    rows = []
    for policy, (alone, *others) in zip(POLICIES, found, strict=True):
        differences = []
        for other in others:
            low, high = interval(other - alone) or (math.nan, math.nan)
            differences.append(f"{np.mean(other - alone):+.2f} [{low:+.2f}, {high:+.2f}]")
        rows.append((f"`{policy}`", f"{alone.mean():.1f} %", *differences))
    return text.table(("scheduler", "attainment", "with lag, stop tokens", "with lag, known limits"), rows, 1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.async_lag", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=MIN_SEEDS, help=f"how many ({MIN_SEEDS})")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them (0)")
    parser.add_argument("--qps", type=float, default=1.4, help="requests per second of the paper's suite (1.4)")
    parser.add_argument("--num-requests", type=int, default=1000, help="measured requests of a run (1000)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    add_options(parser)
    args = parser.parse_args()
    if args.seeds < MIN_SEEDS or min(args.workers, args.num_requests) < 1 or args.first_seed < 0:
        parser.error(f"expected --seeds >= {MIN_SEEDS}, --workers and --num-requests >= 1 and --first-seed >= 0")
    if not 0 < args.qps < math.inf:
        parser.error("expected a finite --qps > 0")
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    worlds = {
        f"paper, {args.qps:g} requests/s": scenario("paper", qps=args.qps, num_requests=args.num_requests),
        "default": scenario("default", num_requests=args.num_requests),
    }
    with choose(args.workers, args.ray, args.ray_address) as places:
        for name, world in worlds.items():
            print(f"{name}, {args.num_requests} requests, {args.seeds} seeds\n\n{measure(world, seeds, places)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
