"""Run a router with a scheduler on one seed's requests, and what rows say of replicas.

The policy of such a run is written ``ROUTER+SCHEDULER``; without a router the scenario's routes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from llmsched_gym.cluster import Cluster
from llmsched_gym.cluster.router import CompiledRouter
from llmsched_gym.config import ClusterScenario, ConfigError
from llmsched_gym.engine.records import REPLICA
from llmsched_gym.engine.rows import rows_of
from llmsched_gym.evaluation.run import Episode, check_arrivals, scenario_for
from llmsched_gym.registry import make_router, make_scheduler
from llmsched_gym.scheduler import PolicyError
from llmsched_gym.workload import RequestTable, make_table

SUMS = (
    *("busy_s", "output_length_sum", "num_batches", "batch_tokens_sum", "tokens_emitted", "num_finished"),
    *("num_refused", "num_abandoned", "num_preemptions", "num_waiting", "num_running", "total_blocks", "free_blocks"),
)
"""Counters of a replica that add up."""


def split_policy(policy: str, router: str) -> tuple[str, str]:
    """(router, scheduler) of ``ROUTER+SCHEDULER``, split at the first + outside brackets; else `router` routes."""
    parts = re.split(r"\+(?![^\[\]]*\])", policy, maxsplit=1)
    return (parts[0].strip(), parts[1].strip()) if len(parts) == 2 else (router, policy.strip())


def check_policy(scenario: ClusterScenario, policy: str) -> Any:
    """The scheduler of a policy, when both halves can be made; else a :class:`PolicyError` of one line."""
    router, scheduler = split_policy(policy, scenario.router)
    check_inside(scenario)
    make_router(router)
    return make_scheduler(scheduler)


def check_inside(scenario: ClusterScenario) -> None:
    """Raise :class:`ConfigError` where a field names a router or a scheduler that there is none of."""
    makers: dict[str, Callable[[str], Any]] = {"decode_router": make_router, "replica_scheduler": make_scheduler}
    for field, make in makers.items():
        name = getattr(scenario, field)
        try:
            made = make(name)
        except PolicyError as error:
            raise ConfigError(f"{field}: {error}") from None
        if field == "decode_router" and not isinstance(made, CompiledRouter):
            raise ConfigError(f"decode_router: expected a compiled router, got {name!r}")


def simulate_cluster(
    scenario: ClusterScenario,
    policy: str | Any,
    seed: int,
    *,
    num_steps: int = 0,
    table: RequestTable | None = None,
    router: Any = None,
) -> Episode:
    """Run `policy` on the requests of `seed` to the end; see :func:`~llmsched_gym.evaluation.run.simulate`.

    `router` takes the place of the policy's; `policy` may be a scheduler then.
    """
    name = policy if isinstance(policy, str) else type(policy).__name__
    routed_by, formed_by = split_policy(policy, scenario.router) if isinstance(policy, str) else ("", policy)
    scheduler = make_scheduler(formed_by) if isinstance(formed_by, str) else formed_by
    router = make_router(routed_by or scenario.router) if router is None else router
    world = scenario_for(scenario, scheduler)
    clairvoyant = getattr(scheduler, "clairvoyant", False) or getattr(router, "clairvoyant", False)
    if clairvoyant and world.length_hint == "none":
        world = world.replace(length_hint="oracle")
    assert isinstance(world, ClusterScenario)
    table = make_table(world, seed) if table is None else table
    check_arrivals(table)
    num_gaps = int(np.sum(table.output_tokens, dtype=np.int64) - len(table))
    settings: dict[str, Any] = {"num_gaps": num_gaps, "num_steps": num_steps}
    cluster = Cluster(world, max(len(table), 1), scheduler=formed_by, **settings)
    cluster.reset(table)
    start = time.perf_counter()
    cluster.run(router)
    wall_time_s = time.perf_counter() - start
    state, nodes = cluster.state, cluster.nodes
    logs = [log[: min(num_steps, int(sim["num_batches"]))] for log, sim in zip(state.steps, state.sims, strict=True)]
    return Episode(
        scenario=world,
        policy=name,
        seed=seed,
        table=table,
        requests=rows_of(state, 0, table),
        gaps=state.gaps[0],
        steps=logs[int(np.argmax(state.sims["busy_s"]))],
        sim=_together(state.sims, float(nodes.routes[0].now_s)),
        wall_time_s=wall_time_s,
        recached_tokens=state.prefixes[0, : len(table)]["num_recached_tokens"] if world.prefix_caching else None,
        replicas=_replica_figures(cluster, table, routed_by or scenario.router, formed_by),
        replica_of=nodes.replica_of[0, : len(table)].copy(),
        steps_by_replica=logs,
    )


def _together(sims: np.ndarray, clock_s: float) -> np.record:
    """The counters of all replicas as one: sums, largest values, and means weighted by batches; at `clock_s`."""
    whole = np.zeros(1, REPLICA)
    for name in SUMS:
        whole[name][0] = sims[name].sum()
    whole["kv_cache_usage_max"] = sims["kv_cache_usage_max"].max()
    whole["clock_s"] = clock_s
    at_work = sims[sims["num_batches"] > 0]
    if len(at_work) == 1:
        whole["mean_batch_s"] = at_work["mean_batch_s"][0]
    elif len(at_work):
        whole["mean_batch_s"] = np.average(at_work["mean_batch_s"], weights=at_work["num_batches"])
    record: np.record = whole[0]
    return record


def _replica_figures(cluster: Cluster, table: RequestTable, router: str, scheduler: str | Any) -> dict[str, Any]:
    """Columns of a row about replicas and who routed; lists have one entry a replica."""
    state, nodes = cluster.state, cluster.nodes
    sims, route = state.sims, nodes.routes[0]
    cohort = slice(table.cohort_start, table.cohort_stop)
    requests, where = state.requests[0][cohort], nodes.replica_of[0][cohort]
    admitted = ~np.isnan(requests["first_scheduled_s"])
    hits: list[float | None] = []
    for j in range(cluster.num_replicas):
        mine = requests[admitted & (where == j)]
        prompts = int(mine["prompt_tokens"].sum(dtype=np.int64))
        cached = int(mine["num_cached_tokens"].sum(dtype=np.int64))
        hits.append(cached / prompts if prompts and cluster.scenario.prefix_caching else None)
    busy_s = sims["busy_s"]
    mean_s = float(busy_s.mean())
    return {
        "router": router,
        "scheduler": scheduler if isinstance(scheduler, str) else type(scheduler).__name__,
        "num_replicas": cluster.num_replicas,
        "replica_profiles": [profile.name for profile in cluster.profiles],
        "requests_by_replica": nodes.nodes["num_delivered"].tolist(),
        "tokens_by_replica": sims["batch_tokens_sum"].tolist(),
        "busy_share_by_replica": (busy_s / max(float(route.now_s), 1e-9)).tolist(),
        "hit_rate_by_replica": hits,
        "kv_usage_max_by_replica": sims["kv_cache_usage_max"].tolist(),
        "imbalance": float(busy_s.max()) / mean_s if mean_s > 0.0 else None,  # of busy time: most over mean
        "num_handed_back": int(route.num_handed_back),
        "num_transfers": int(route.num_transfers),
    }
