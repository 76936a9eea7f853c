"""Run policies on the same requests over loads and seeds: one row of figures per run, and a folder of results."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmsched_gym.config import ClusterScenario, ConfigError, Scenario, plain
from llmsched_gym.cost import load_profile
from llmsched_gym.evaluation.cells import Cell, Runner, make_policy
from llmsched_gym.evaluation.run import check_arrivals, make_backend
from llmsched_gym.evaluation.spread import Places
from llmsched_gym.evaluation.store import Store, grid_config
from llmsched_gym.files import digest_of
from llmsched_gym.workload import make_table
from llmsched_gym.workload.generate import trace_remarks

NUM_REQUESTS = 2000
"""Measured requests of a run, unless told otherwise."""

MAX_REQUEST_LINES = 1_200_000
"""``requests.parquet`` holds all seeds up to so many lines; a larger grid keeps the first seeds of each load."""

Progress = Callable[[int, int], None]
"""Called with the number of runs done and of all runs."""


def finite(scenario: Scenario) -> Scenario:
    """The scenario as a finite run, which is what evaluations are."""
    return scenario if scenario.num_requests is not None else scenario.replace(num_requests=NUM_REQUESTS)


MOST_SEEDS = 1_000_000


def seed_range(seeds: int, first_seed: int) -> range:
    """The seeds from `first_seed` on; ConfigError where they are no whole numbers or too many."""
    seeds, first_seed = plain((seeds, first_seed))
    for name, value, low in (("seeds", seeds, 1), ("first_seed", first_seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ConfigError(f"{name}: expected a whole number >= {low}, got {value!r}")
    if seeds > MOST_SEEDS or first_seed + seeds > 2**63:
        raise ConfigError(f"seeds: expected at most {MOST_SEEDS:,}, below 2**63, got {seeds} from {first_seed} on")
    return range(first_seed, first_seed + seeds)


def check(scenario: Scenario, policies: Sequence[str], qps: Sequence[float | None], first_seed: int) -> None:
    """Try everything that a grid needs before its first run; a fault raises one clear line."""
    if not policies:
        raise ConfigError("policy: expected at least one")
    for policy in policies:
        make_policy(scenario, policy)
    named = scenario.profiles if isinstance(scenario, ClusterScenario) else (scenario.profile,)
    for profile in (*named, scenario.scheduler_profile):
        if profile is not None:
            load_profile(profile)
    if not qps:
        raise ConfigError("qps: expected at least one rate")
    for rate in qps:
        check_arrivals(make_table(scenario if rate is None else scenario.replace(qps=rate), first_seed))


def evaluate(
    scenario: Scenario,
    policies: Sequence[str],
    *,
    qps: Sequence[float] | None = None,
    seeds: int = 20,
    first_seed: int = 0,
    workers: Places | None = 1,
    out: str | Path | None = None,
    frames: bool = True,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Rows of all runs (see `metrics.row`), by policy, load and seed; open loop, the same requests for every policy.

    Args:
        scenario: the world; a continuing one is measured over `NUM_REQUESTS` arrivals.
        policies: as `make_scheduler` takes them.
        qps: mean arrival rates, 1/s; None: the scenario's own, drawn per seed where it says so.
        seeds, first_seed: seeds first_seed, first_seed + 1, ...
        workers: processes; None: one per core, and one with a real backend. More than one needs a script's
            ``if __name__ == "__main__"``. Or an open pool, see :func:`~llmsched_gym.evaluation.spread.choose`.
        out: folder for results; one that an interrupted run of the same grid left is completed.
        frames: whether `out` gets requests, first batches and gaps besides the rows, which a report needs.
        progress: called after each run.
    """
    scenario = finite(scenario)
    policies = list(dict.fromkeys(policies))
    rates: list[float | None] = [scenario.qps] if qps is None else list(dict.fromkeys(float(rate) for rate in qps))
    numbers = seed_range(seeds, first_seed)
    check(scenario, policies, rates, numbers.start)
    cells = grid(policies, rates, numbers, scenario.num_requests or NUM_REQUESTS, frames=frames and out is not None)

    backend = make_backend(scenario, workers)

    store: Store | None = None
    if out is not None:
        settings: dict[str, Any] = {
            "qps": None if qps is None else rates,
            "seeds": len(numbers),
            "first_seed": numbers.start,
        }
        world = scenario if rates[0] is None else scenario.replace(qps=rates[0])
        settings["trace_remarks"] = trace_remarks(world, numbers.start)
        if backend is not None:
            settings["setup"] = backend.setup
        store = Store(out, grid_config(scenario, policies, **settings))
    try:
        return _run_grid(scenario, cells, store, workers, backend, progress)
    finally:
        if store is not None:
            store.close()


def _run_grid(
    scenario: Scenario,
    cells: Sequence[Cell],
    store: Store | None,
    workers: Places | None,
    backend: Any,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """Run the cells that the store lacks and keep them there; returns all rows in the order of the cells."""
    done = {} if store is None else store.open()
    label = digest_of({k: v for k, v in dataclasses.asdict(scenario).items() if k != "qps"})
    left = [cell for cell in cells if cell.index not in done]
    if progress is not None:
        progress(len(done), len(cells))
    with Runner(scenario, workers, store.partial if store else None, backend) as runner:
        for cell, row in runner.run(left):
            done[cell.index] = row | {"config_hash": label}
            if store is not None:
                store.add(cell.index, done[cell.index])
            if progress is not None:
                progress(len(done), len(cells))
    rows = [done[cell.index] for cell in cells]
    if store is not None and not store.complete:
        store.finish(rows)
    return rows


def grid(
    policies: Sequence[str], rates: Sequence[float | None], seeds: range, num_requests: int, *, frames: bool
) -> list[Cell]:
    """The cells by policy, load and seed; with `frames` the first seeds keep their requests, the first its steps."""
    cells: list[Cell] = []
    kept = max(1, math.floor(MAX_REQUEST_LINES / (len(policies) * len(rates) * num_requests)))
    for policy in policies:
        for qps in rates:
            for seed in seeds:
                wanted = ["itl"] + ["requests"] * (seed < seeds.start + kept) + ["steps"] * (seed == seeds.start)
                cells.append(Cell(len(cells), policy, qps, seed, tuple(wanted) if frames else ()))
    return cells
