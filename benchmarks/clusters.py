"""Is a suite of replicas a problem for a router: what is on time under each, at shares of the fluid capacity.

    python -m benchmarks.clusters [--suite disagg] [--routers jsq,...] [--scheduler slai] [--requests 6000] [--seeds 2]

Of the requests that came: all SLOs met, the first token in time, all further ones, and the hit rate of the cache, in %.
"""

from __future__ import annotations

import argparse

import numpy as np

from llmsched_gym.cluster.core import Cluster
from llmsched_gym.config import CLUSTER_SUITES, ClusterScenario, scenario
from llmsched_gym.fluid import cluster_fluid
from llmsched_gym.registry import make_router
from llmsched_gym.workload import make_table

SHARES = (0.6, 0.85, 1.1)
FINISHED = 3  # place in the engine's phases


def shares(world: ClusterScenario, router: str, scheduler: str, seed: int) -> tuple[float, float, float, float]:
    """Shares of the measured requests that came: on time, first token, further tokens; and the hit rate."""
    table = make_table(world, seed)
    cluster = Cluster(world, len(table), scheduler=scheduler)
    cluster.reset(table)
    cluster.run(make_router(router))
    cohort = cluster.state.requests[0, table.cohort_start : table.cohort_stop]
    came = cohort[~np.isnan(cohort["arrival_s"])]
    first = came["ttft_missed"] == 0
    further = (came["phase"] == FINISHED) & (came["num_late_gaps"] == 0)
    hits = came["num_cached_tokens"].sum() / came["prompt_tokens"].sum()
    return float((first & further).mean()), float(first.mean()), float(further.mean()), float(hits)


def main() -> None:
    """Print a line for each share and router."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=list(CLUSTER_SUITES), default="disagg")
    parser.add_argument("--routers", default="round-robin,jsq,least-tokens,slo-aware")
    parser.add_argument("--scheduler", default="slai")
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    base = scenario(given.suite, num_requests=given.requests)
    assert isinstance(base, ClusterScenario)
    capacity = cluster_fluid(base).qps
    print(f"{given.suite}: {capacity:.3g}/s are the fluid capacity; {given.scheduler}, {given.seeds} seeds")
    for share in SHARES:
        for router in given.routers.split(","):
            world = base.replace(qps=share * capacity)
            found = np.mean([shares(world, router, given.scheduler, seed) for seed in range(given.seeds)], axis=0)
            figures = "  ".join(f"{100 * value:5.1f}" for value in found)
            print(f"{share:4g}  {router:16s} {figures}", flush=True)


if __name__ == "__main__":
    main()
