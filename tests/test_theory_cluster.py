"""Stability of routers on unequal replicas: what knows how fast they are keeps up, what shares evenly does not."""

import numpy as np
import pytest

from llmsched_gym.config import scenario
from llmsched_gym.fluid import cluster_fluid
from llmsched_gym.theory import cluster
from llmsched_gym.theory.stability import drift

WORLD = cluster.unequal(scenario("paper"))


def drift_at(pair, share):
    capacity = cluster_fluid(WORLD).qps
    return drift(WORLD, pair, share * capacity, seeds=(0, 1, 2), num_requests=12_000, run=cluster.cluster_trajectory)


def test_rad_route_keeps_up_where_round_robin_does_not():
    """In turn, each of four slow replicas gets an eighth of the requests: at 80 % of the capacity 1.5 times its own."""
    alone = [f.qps for f in cluster_fluid(WORLD).used]
    rate = 0.8 * sum(alone)
    excess = sum(max(rate / 8 - qps, 0.0) for qps in alone) / rate
    assert 0.1 < excess < 0.2
    in_turn = drift_at("round-robin+rad", 0.8)
    assert in_turn.verdict == "growing" and in_turn.mean == pytest.approx(excess, abs=0.05)
    known = drift_at("rad-route+rad", 0.8)
    assert known.mean < 0.01 and known.ci_high < in_turn.ci_low and known.backlog < 0.3 * in_turn.backlog


def test_a_backlog_is_who_came_and_is_not_done():
    world = WORLD.replace(qps=5.0, num_requests=200)
    run = cluster.cluster_trajectory(world, "jsq+rad", 0)
    assert run.requests[0] <= 1 and (run.requests >= 0).all() and run.requests.max() < 200
    assert (np.diff(run.time_s) > 0).all()
