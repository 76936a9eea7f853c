"""Run one scheduler on one seed's requests and keep what metrics need."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmsched_gym.config import ClusterScenario, ConfigError, Scenario
from llmsched_gym.cost import Profile, load_profile
from llmsched_gym.engine import Backend, Engine
from llmsched_gym.engine.compiling import expect_kernels
from llmsched_gym.engine.rows import rows_of
from llmsched_gym.registry import make_scheduler
from llmsched_gym.scheduler import install
from llmsched_gym.workload import RequestTable, make_table

HOST_WARM_UP_STEPS = 16
LATE_S = 1e6  # a clock beyond it loses nanoseconds a batch: runs that begin later count from their first arrival
MOST_S = 2.0**32  # of arrivals; float64 tells less than a microsecond there
TIMES = ("arrival_s", "first_scheduled_s", "first_token_s", "last_token_s", "resolved_s", "lst_s")


@dataclass(frozen=True, eq=False)
class Episode:
    """A finished run: the engine's records as they stood at the end."""

    scenario: Scenario
    policy: str
    seed: int
    table: RequestTable
    requests: np.ndarray  # (num_requests,) engine.state.REQUEST; all arrivals, warm-up and tail included
    gaps: np.ndarray  # (sum of output_tokens - 1,) float32, seconds; request r's from table.gap_start[r]
    steps: np.ndarray  # (num_steps,) engine.state.STEP: the first batches
    sim: np.record  # engine.records.REPLICA: clock and counters
    wall_time_s: float
    # (num_requests,) int32: of each request, found in the prefix cache after preemptions; None without prefix caching
    recached_tokens: np.ndarray | None = None
    replicas: dict[str, Any] | None = None  # of a cluster: columns of the row about its replicas
    replica_of: np.ndarray | None = None  # of a cluster (num_requests,) int32: where each was sent last; -1: nowhere
    steps_by_replica: Sequence[np.ndarray] | None = None  # of a cluster: `steps` of each; `steps` are the busiest's

    @property
    def cohort(self) -> slice:
        """The measured requests."""
        return slice(self.table.cohort_start, self.table.cohort_stop)


def scenario_for(scenario: Scenario, scheduler: Any) -> Scenario:
    """The scenario with what the scheduler asks of the engine: its admission rule."""
    admission = getattr(scheduler, "admission", None)
    return scenario.replace(admission=admission) if admission else scenario


def make_backend(scenario: Scenario, workers: Any = 1) -> Any:
    """What executes the batches of all runs of `scenario`: its model, loaded; None is the simulated device.

    Without `num_kv_blocks` the cache has the profile's blocks, as the simulated device has: what memory holds may be
    another number tomorrow. A model serves one run at a time, so more `workers` than one are refused.
    """
    if scenario.backend == "simulated":
        return None
    if workers not in (None, 1):
        raise ConfigError(f"workers: expected 1 with backend={scenario.backend!r}, got {workers}")
    blocks = scenario.num_kv_blocks or load_profile(scenario.profile).num_kv_blocks
    return importlib.import_module("llmsched_gym.real_backend").make_backend(
        scenario.replace(num_kv_blocks=blocks), scenario.model
    )


def check_arrivals(table: RequestTable) -> None:
    """ConfigError where requests come so late that a clock beside them tells no time, as at rates next to 0."""
    latest_s = float(table.arrival_s[table.is_root].max(initial=0.0))
    if not latest_s < MOST_S:
        at = f", at {table.qps:g} arrivals a second" if table.qps < 1.0 else ""
        raise ConfigError(f"arrival_s: expected times below {MOST_S:,.0f} s, got {latest_s:g}{at}")


def _origin_s(scenario: Scenario, table: RequestTable) -> float:
    """From where the engine counts the time of a finite run: whole seconds, 0 unless its requests come late."""
    roots = table.arrival_s[table.is_root]
    check_arrivals(table)
    is_late = scenario.num_requests is not None and table.num_past == 0 and len(roots) and roots[0] > LATE_S
    return float(np.floor(roots[0])) if is_late else 0.0


def simulate(
    scenario: Scenario,
    policy: str | Any,
    seed: int,
    *,
    num_steps: int = 0,
    backend: Backend | None = None,
    profile: Profile | None = None,
    own_profile: Profile | None = None,
    table: RequestTable | None = None,
    watch: Callable[[Engine], int] | None = None,
) -> Episode:
    """Run `policy` (a name or a scheduler) on the requests of `seed` to the end; the first `num_steps` are logged.

    A `table` of requests takes the place of the seed's; where its first request comes very late, time is counted from
    there and told as the table has it, as float64 has little left beside 1e9 s. `watch` looks at the engine after the
    first step and then after as many as it returned; it changes nothing of the run.

    Clairvoyant schedulers need a scenario with ``length_hint``; they get an oracle's if it has none. A scenario for the
    real backend needs one, see `make_backend`. On a cluster the policy is ``ROUTER+SCHEDULER``, see `clusters`.
    """
    if isinstance(scenario, ClusterScenario):
        from llmsched_gym.evaluation.clusters import simulate_cluster

        if watch is not None:
            raise ConfigError("watch: expected None for a cluster")
        if profile is not None or own_profile is not None:
            raise ConfigError("profile: expected replica_profiles of the scenario for a cluster, got a profile")
        return simulate_cluster(scenario, policy, seed, num_steps=num_steps, table=table)
    if scenario.backend != "simulated" and backend is None:
        raise ConfigError(f"backend: expected what make_backend gives for {scenario.backend!r}, got None")
    scheduler = make_scheduler(policy) if isinstance(policy, str) else policy
    name = policy if isinstance(policy, str) else type(policy).__name__
    scenario = scenario_for(scenario, scheduler)
    if getattr(scheduler, "clairvoyant", False) and scenario.length_hint == "none":
        scenario = scenario.replace(length_hint="oracle")
    asked = make_table(scenario, seed) if table is None else table
    origin_s = _origin_s(scenario, asked)
    table = asked if origin_s == 0.0 else replace(asked, arrival_s=asked.arrival_s - origin_s)
    num_gaps = int(np.sum(table.output_tokens, dtype=np.int64) - len(table))
    engine = Engine(
        scenario,
        max(len(table), 1),
        backend=backend,
        profile=profile,
        own_profile=own_profile,
        num_gaps=num_gaps,
        num_steps=num_steps,
    )
    expect_kernels(4)  # start, run, the scheduler, and whether the run is over
    engine.reset(table)
    install(scheduler, engine.state, seed=seed)
    engine.prepare(scheduler)
    if scenario.count_host_time:
        # The first steps compile or load kernels, which is not to count. Nor do decisions count twice.
        engine.run(scheduler, max_steps=HOST_WARM_UP_STEPS)
        engine.reset(table)
        install(scheduler, engine.state, seed=seed)
        engine.state.sims[0].decision_s = 0.0
    start = time.perf_counter()
    if watch is None:
        engine.run(scheduler)
    else:
        steps = 1
        while not engine.run(scheduler, max_steps=steps):
            steps = watch(engine)
        watch(engine)
    wall_time_s = time.perf_counter() - start
    state = engine.state
    requests, sim = rows_of(state, 0, table), state.sims[0]
    steps = state.steps[0, : min(num_steps, int(sim.num_batches))]
    if origin_s > 0.0:
        for column in TIMES:
            requests[column] += origin_s
        steps["start_s"] += origin_s
        sim.clock_s += origin_s
    return Episode(
        scenario=scenario,
        policy=name,
        seed=seed,
        table=asked,
        requests=requests,
        gaps=state.gaps[0],
        steps=steps,
        sim=sim,
        wall_time_s=wall_time_s,
        recached_tokens=state.prefixes[0, : len(table)]["num_recached_tokens"] if scenario.prefix_caching else None,
    )
