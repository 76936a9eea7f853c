"""Routers against queueing theory, where replicas are single servers: the tails and waits that are known."""

import numpy as np
import pytest

from benchmarks import queueing

REPLICAS = 128


def of_two(load, i):
    return load ** (2**i - 1)


def at_random(load, i):
    return load**i


# two choices' law is that of many replicas: where the longest queues are rare, 128 have a few more of them
@pytest.mark.parametrize(
    "router, load, law, other", [("power-of-two", 0.9, of_two, at_random), ("random", 0.7, at_random, of_two)]
)
def test_the_tail_of_queues_is_the_theorys(router, load, law, other):
    mean, error = queueing.mean_and_error(queueing.tails(router, REPLICAS, load, 40_000, range(8)))
    mean, error, length = mean[:4], error[:4], np.arange(1, 5)
    assert (np.abs(mean - law(load, length)) < 3.0 * error).all(), (mean, error)
    assert (error < 0.1 * law(load, length)).all()
    assert (np.abs(mean - other(load, length))[1:] > 10.0 * error[1:]).all()


def test_the_shortest_queue_waits_longer_than_one_queue_and_shorter_than_a_random_split():
    load, replicas = 0.9, 8
    found = queueing.waits(("jsq", "round-robin", "random"), replicas, load, 20_000, range(4))
    one, jsq, in_turn, split = found.T
    assert (one < jsq).all() and (jsq < 0.3 * split).all()
    np.testing.assert_allclose(in_turn, one, rtol=1e-9)  # equal service: in turn is as good as one queue for all
    mean, error = queueing.mean_and_error(split)
    assert abs(mean - load / (2 * (1 - load))) < 3.0 * error


def test_shares_by_hand():
    """Replica 0 has one request from 0 to 4 s, a second from 1 to 3 s, replica 1 one from 2 to 10 s; until 5 s."""
    table = queueing.RequestTable.of(np.array([0.0, 1.0, 2.0, 5.0]), 1, 1, qps=1.0)
    found = queueing.shares(table, np.array([0, 0, 1, 0]), np.array([4.0, 3.0, 10.0, 6.0]), 2)
    assert found[:3].tolist() == [(3 + 3) / 8, 2 / 8, 0.0]  # counted from 1 s on
