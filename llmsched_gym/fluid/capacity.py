"""The fluid capacity of a scenario, with every batch allowed and with batches of one phase only."""

from __future__ import annotations

from llmsched_gym.config import ClusterScenario, Scenario
from llmsched_gym.cost import Profile, load_profile
from llmsched_gym.fluid.additive import by_size
from llmsched_gym.fluid.cluster import cluster_capacity
from llmsched_gym.fluid.mixed import by_composition
from llmsched_gym.fluid.solution import Fluid
from llmsched_gym.fluid.work import scenario_work

MOST_MIXING = 64.0  # factors on the price of mixing are sought up to this
SAME = 1e-6  # relative difference of rates that is none


def fluid_capacity(scenario: Scenario, profile: Profile | None = None) -> Fluid:
    """The largest rate that the profile, the workload and the engine's limits allow in the long run.

    On an additive profile nobody sustains more: its unknowns are the rate and how many batches of N tokens run per
    second, for every N up to the limit, so whole tiles and everything between them are among them.

    On a profile with a surface the unknowns are the rate and how many batches of n decodes and c prompt tokens run per
    second, on a grid, and it is a bound in the mean-field sense: nobody sustains more whose batches have decodes of
    the workload's mean context and chunks behind the mean prefix that chunks of their size have. Sums over batches are
    exact where the surface is linear in contexts and prefixes, as bandwidth and computing make it; where it is convex
    (Jensen), unequal contexts cost more, so the bound holds; where it is concave, among few short decodes, a scheduler
    that sorts them into batches by context could gain the little that the curve leaves between its chords.

    Of a workload of sessions it is in sessions per second; with prefix caching at the hit rate of an infinite cache.

    A profile other than the scenario's may be given. Without it the capacity of several replicas is that of all of
    them, see `cluster`.
    """
    if profile is None and isinstance(scenario, ClusterScenario):
        return cluster_capacity(scenario)
    profile = profile or load_profile(scenario.profile)
    blocks = scenario.blocks(profile.num_kv_blocks)
    program = by_size if profile.surface is None else by_composition
    return program(scenario, profile, scenario_work(scenario, blocks), blocks)


def exclusive_capacity(scenario: Scenario, profile: Profile | None = None) -> Fluid:
    """The largest rate with batches of one phase only, which pay no price of mixing."""
    profile = (profile or load_profile(scenario.profile)).with_mixing(1.0)
    blocks = scenario.blocks(profile.num_kv_blocks)
    return by_composition(scenario, profile, scenario_work(scenario, blocks), blocks, exclusive=True)


def exclusive_factor(scenario: Scenario, profile: Profile | None = None, resolution: float = 0.01) -> float:
    """The factor on the price of mixing from which exclusive batches are optimal; inf if there is none up to 64.

    Below it the fluid capacity falls with the factor; from it on it is the exclusive one. On an additive profile 1 is
    what it says, on one with a surface what was measured.
    """
    profile = profile or load_profile(scenario.profile)
    blocks = scenario.blocks(profile.num_kv_blocks)
    work = scenario_work(scenario, blocks)

    def qps(factor: float, exclusive: bool = False) -> float:
        settings = {"exclusive": exclusive, "priced": False}
        return by_composition(scenario, profile.with_mixing(factor), work, blocks, **settings).qps

    least = (1.0 + SAME) * qps(1.0, exclusive=True)
    low, high = 0.0, 1.0
    while qps(high) > least:
        low, high = high, 2.0 * high
        if high > MOST_MIXING:
            return float("inf")
    while high - low > resolution:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if qps(middle) > least else (low, middle)
    return high
