"""Capacities of routers with schedulers, ``ROUTER+SCHEDULER``, on several numbers of replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmsched_gym.config import ClusterScenario, ConfigError, Scenario
from llmsched_gym.evaluation.capacity import HIGH_QPS, LOW_QPS, Capacity, capacity
from llmsched_gym.fluid import fluid_capacity

ABOVE = 1.5  # rates are searched up to this share of the fluid capacity; refusing requests serves others above it
BELOW = 0.05  # and from this share of it on, on machines so slow that it is below the usual lowest rate


def pairs(routers: Sequence[str], schedulers: Sequence[str]) -> list[str]:
    """Each router with each scheduler, as evaluations name them."""
    return [f"{router}+{scheduler}" for router in dict.fromkeys(routers) for scheduler in dict.fromkeys(schedulers)]


def with_replicas(scenario: Scenario, num_replicas: int) -> ClusterScenario:
    """The scenario with so many equal replicas; ConfigError where it has none, or says what each of them is."""
    if not isinstance(scenario, ClusterScenario):
        raise ConfigError(f"replicas: expected a suite of several replicas, got {scenario.suite!r}")
    if num_replicas != scenario.num_replicas:
        for name in ("replica_profiles", "roles", "replica_failures"):
            if getattr(scenario, name):
                said = f"suite {scenario.suite!r} names {name}"
                raise ConfigError(f"replicas: expected {scenario.num_replicas}, as {said}, got {num_replicas}")
    return scenario.replace(num_replicas=num_replicas)


def searched_rates(scenario: Scenario) -> tuple[float, float]:
    """Lowest and highest rate that a search has to look at, arrivals per second.

    A run of finitely many requests, or one that refuses some of them, can meet a criterion above the fluid capacity,
    so the search ends well above it. A real model's speed is not the profile's: its rates are the usual ones.
    """
    if scenario.backend != "simulated":
        return LOW_QPS, HIGH_QPS
    most = fluid_capacity(scenario).qps
    return min(LOW_QPS, BELOW * most), max(HIGH_QPS, ABOVE * most)


def by_replicas(
    scenario: ClusterScenario,
    policies: Sequence[str],
    judged: str,
    replicas: Sequence[int],
    *,
    qps: tuple[float, float] | None = None,
    out: str | Path | None = None,
    search: Callable[..., list[Capacity]] = capacity,
    **settings: Any,
) -> list[tuple[int, Capacity]]:
    """The capacity of each policy on each number of replicas, in that order.

    Args:
        scenario: the cluster; its `num_replicas` is replaced.
        policies: routers with schedulers.
        judged: the criterion.
        replicas: numbers of equal replicas.
        qps: rates between which to search; None: by the fluid capacity of so many.
        out: folder for results, of several numbers of replicas in a folder each.
        search, settings: what finds the capacities of one world, and its other arguments.
    """
    numbers = list(dict.fromkeys(replicas))
    if not numbers:
        raise ConfigError("replicas: expected at least one number")
    worlds = [with_replicas(scenario, n) for n in numbers]  # all of them are tried before the first run
    found = []
    for n, world in zip(numbers, worlds, strict=True):
        folder = None if out is None else Path(out) if len(numbers) == 1 else Path(out) / f"replicas-{n}"
        given = {"qps": qps or searched_rates(world), "out": folder}
        found += [(n, item) for item in search(world, policies, judged, **given, **settings)]
    return found
