"""Stability of routers on unequal replicas: which share of a cluster's fluid capacity each pair sustains.

A pair is written ``ROUTER+SCHEDULER``. Drift, verdict and boundary are those of one engine (`stability`), of the
requests anywhere in the cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmsched_gym.cluster.core import Cluster
from llmsched_gym.config import CLUSTER_SUITES, ClusterScenario, Scenario
from llmsched_gym.evaluation.clusters import split_policy
from llmsched_gym.evaluation.spread import Places, run_cells
from llmsched_gym.fluid import cluster_fluid
from llmsched_gym.registry import make_router, make_scheduler
from llmsched_gym.theory.experiments import JUDGED, Note, as_row
from llmsched_gym.theory.stability import POINTS, SEEDS, Trajectory, boundary, drift
from llmsched_gym.workload import make_table

PAIRS = ("rad-route+rad", "least-tokens+rad", "jsq+rad", "power-of-two+rad", "round-robin+rad")
NUM_REQUESTS = 60_000  # of a run, on several replicas
STEP = 0.02  # half of the bracket with which the search for a boundary begins, share of the capacity


def unequal(world: Scenario) -> ClusterScenario:
    """The scenario's requests, open-loop and without a cache, on the replicas of suite `hetero`."""
    of: Any = CLUSTER_SUITES["hetero"].scenario
    return ClusterScenario(**world.to_dict(), num_replicas=of.num_replicas, replica_profiles=of.replica_profiles)


def cluster_trajectory(scenario: ClusterScenario, pair: str, seed: int) -> Trajectory:
    """Run a pair on the requests of `seed` up to the last arrival and count who is in the cluster."""
    router, name = split_policy(pair, scenario.router)
    scheduler = make_scheduler(name)
    admission = getattr(scheduler, "admission", None)
    scenario = scenario.replace(drain_s=1e-6, arrivals_continue=False, warmup_s=0.0)
    scenario = scenario.replace(admission=admission) if admission else scenario
    table = make_table(scenario, seed)
    cluster = Cluster(scenario, len(table), scheduler=name)
    cluster.reset(table)
    cluster.run(make_router(router))
    resolved_s = cluster.state.requests["resolved_s"][0, : len(table)]
    time_s = np.linspace(0.0, float(table.arrival_s[-1]), POINTS)
    left_s = np.sort(resolved_s[~np.isnan(resolved_s)])
    backlog = np.searchsorted(table.arrival_s, time_s, "right") - np.searchsorted(left_s, time_s, "right")
    return Trajectory(time_s, backlog, cluster.state.steps[0, :0], cluster.state.sims[0])


def pair_cell(
    scenario: ClusterScenario, capacity: float, pair: str, seeds: Sequence[int], num_requests: int
) -> dict[str, Any]:
    """Drift at the judged share, boundary, and one seed's backlog over time at the judged share."""
    settings: dict[str, Any] = {"seeds": seeds, "num_requests": num_requests, "run": cluster_trajectory}
    judged = drift(scenario, pair, JUDGED * capacity, **settings)
    # a pair that serves c and leaves the rest has a drift of 1 - c / rate
    guess = min(1.0, JUDGED * (1 - max(judged.mean, 0.0)) + (0.03 if judged.verdict == "bounded" else 0.0))
    edge = boundary(
        scenario, pair, (guess - STEP) * capacity, (guess + STEP) * capacity, resolution=STEP / 2, **settings
    )
    run = cluster_trajectory(scenario.replace(qps=JUDGED * capacity, num_requests=num_requests), pair, seeds[0])
    return {
        "profile": "hetero",
        "policy": pair,
        "fluid_qps": capacity,
        "judged": as_row(judged, capacity),
        "boundary_share": edge.qps / capacity,
        "boundary_low": edge.bounded_qps / capacity,
        "boundary_high": edge.unbounded_qps / capacity,
        "time_s": np.round(run.time_s, 3).tolist(),
        "requests": run.requests.tolist(),
    }


def cluster_stability(
    world: Scenario,
    *,
    pairs: Sequence[str] = PAIRS,
    seeds: Sequence[int] = SEEDS,
    num_requests: int = NUM_REQUESTS,
    workers: Places = 1,
    note: Note = lambda text: None,
) -> list[dict[str, Any]]:
    """Every pair on unequal replicas that get the requests of `world`."""
    scenario = unequal(world)
    capacity = cluster_fluid(scenario).qps
    return run_cells(pair_cell, [(scenario, capacity, pair, seeds, num_requests) for pair in pairs], workers, note)
