"""Is the backlog bounded at a rate, and up to which rate: drift over long horizons, with intervals over seeds.

The backlog is the number of requests in the system. A run starts empty and ends at its last arrival; nobody is
refused and nobody leaves. Its drift is the least-squares slope of the backlog over time behind a warm-up, divided by
the arrival rate: the share of arrivals that pile up. A stable scheduler's drift is 0 but for noise, one that can serve
only the rate c has 1 - c / rate. Seeds are independent, so the interval is Student's t over their drifts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmsched_gym.config import Scenario
from llmsched_gym.cost import Profile
from llmsched_gym.engine import Engine
from llmsched_gym.evaluation.run import scenario_for
from llmsched_gym.registry import make_scheduler
from llmsched_gym.scheduler import install
from llmsched_gym.workload import make_table

WARMUP = 0.25  # share of the horizon that is not regressed: the way from an empty system to its usual backlog
TOLERANCE = 0.01  # a drift that is certainly below this is none: one arrival in a hundred
SEEDS = (0, 1, 2, 3, 4, 5)
NUM_REQUESTS = 20_000
POINTS = 400


@dataclass(frozen=True)
class Trajectory:
    """The backlog of one run on an even grid of times, up to its last arrival."""

    time_s: np.ndarray  # (POINTS,)
    requests: np.ndarray  # (POINTS,) in the system
    steps: np.ndarray  # (num_steps,) engine.state.STEP, the first batches
    sim: np.record


@dataclass(frozen=True)
class Drift:
    """What the seeds' runs at one rate say."""

    qps: float
    drifts: tuple[float, ...]  # one a seed; share of arrivals that pile up
    mean: float
    ci_low: float
    ci_high: float
    backlog: float  # mean requests in the system behind the warm-up

    @property
    def verdict(self) -> str:
        """growing (the interval is above 0), bounded (it is below the tolerance), or undecided."""
        if self.ci_high < TOLERANCE:
            return "bounded"
        return "growing" if self.ci_low > 0.0 else "undecided"


@dataclass(frozen=True)
class Boundary:
    """Between the highest rate found bounded and the lowest found not to be."""

    bounded_qps: float
    unbounded_qps: float
    drifts: tuple[Drift, ...]  # all rates that were tried

    @property
    def qps(self) -> float:
        """The middle of the bracket, requests/s."""
        return 0.5 * (self.bounded_qps + self.unbounded_qps)


def trajectory(
    scenario: Scenario, policy: str | Any, seed: int, *, profile: Profile | None = None, num_steps: int = 0
) -> Trajectory:
    """Run `policy` on the requests of `seed` up to the last arrival and count who is in the system."""
    scheduler = make_scheduler(policy) if isinstance(policy, str) else policy
    scenario = scenario_for(scenario, scheduler)
    if getattr(scheduler, "clairvoyant", False) and scenario.length_hint == "none":
        scenario = scenario.replace(length_hint="oracle")
    scenario = scenario.replace(drain_s=1e-6, arrivals_continue=False, warmup_s=0.0)
    table = make_table(scenario, seed)
    engine = Engine(scenario, len(table), profile=profile, num_steps=num_steps)
    engine.reset(table)
    install(scheduler, engine.state, seed=seed)
    engine.run(scheduler)
    requests = engine.state.requests[0, : len(table)]
    end_s = float(table.arrival_s[-1])
    time_s = np.linspace(0.0, end_s, POINTS)
    left_s = np.sort(requests["resolved_s"][~np.isnan(requests["resolved_s"])])
    backlog = np.searchsorted(table.arrival_s, time_s, "right") - np.searchsorted(left_s, time_s, "right")
    steps = engine.state.steps[0, : min(num_steps, int(engine.state.sims[0].num_batches))]
    return Trajectory(time_s, backlog, steps, engine.state.sims[0])


def slope(time_s: np.ndarray, backlog: np.ndarray) -> float:
    """Least-squares slope behind the warm-up, requests per second."""
    kept = time_s >= WARMUP * time_s[-1]
    t = time_s[kept] - time_s[kept].mean()
    return float(t @ backlog[kept] / (t @ t))


def drift(
    scenario: Scenario,
    policy: str,
    qps: float,
    *,
    seeds: Sequence[int] = SEEDS,
    num_requests: int = NUM_REQUESTS,
    run: Callable[..., Trajectory] = trajectory,
    **settings: Any,
) -> Drift:
    """The drift of the backlog at one rate, of ``run(world, policy, seed, **settings)``. Needs at least two seeds."""
    from scipy.stats import t as student

    world = scenario.replace(qps=qps, num_requests=num_requests)
    runs = [run(world, policy, seed, **settings) for seed in seeds]
    drifts = np.array([slope(found.time_s, found.requests) / qps for found in runs])
    half = float(student.ppf(0.975, len(drifts) - 1) * drifts.std(ddof=1) / np.sqrt(len(drifts)))
    mean = float(drifts.mean())
    backlog = float(np.mean([r.requests[r.time_s >= WARMUP * r.time_s[-1]].mean() for r in runs]))
    return Drift(qps, tuple(drifts.tolist()), mean, mean - half, mean + half, backlog)


def boundary(
    scenario: Scenario,
    policy: str,
    low_qps: float,
    high_qps: float,
    *,
    resolution: float = 0.01,
    **settings: Any,
) -> Boundary:
    """Bisect for the rate up to which the backlog is bounded, to `resolution` times `high_qps`.

    Where the backlog grows at `low_qps` or not at `high_qps`, the search widens to that side. A rate counts as bounded
    if the mean drift is below half the tolerance.
    """
    tried: list[Drift] = []

    def bounded(qps: float) -> bool:
        tried.append(drift(scenario, policy, qps, **settings))
        return tried[-1].mean < TOLERANCE / 2

    low, high, step, end = low_qps, high_qps, high_qps - low_qps, resolution * high_qps
    while not bounded(low):
        low, high, step = low - step, low, 2 * step
        if low <= 0:
            return Boundary(0.0, high, tuple(tried))
    if high == high_qps:
        while bounded(high):
            low, high, step = high, high + step, 2 * step
    while high - low > end:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if bounded(middle) else (low, middle)
    return Boundary(low, high, tuple(tried))
