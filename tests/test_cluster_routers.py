"""Routers by hand."""

import re

import numpy as np
import pytest
from clusters import Named, Replicas
from helpers import request

from llmsched_gym.cluster import CompiledRouter
from llmsched_gym.cluster.router import seed_dice
from llmsched_gym.cluster.state import Route, allocate
from llmsched_gym.engine.records import (
    REQUEST,
)
from llmsched_gym.registry import make_router
from llmsched_gym.scheduler import PolicyError


def candidates(**columns):
    """What a router gets: one row a replica, all legal unless said otherwise."""
    n = len(next(iter(columns.values())))
    nodes = allocate(1, n, 1, num_changes=0, num_moving=0, num_records=0, columns=8)
    nodes.candidates["is_legal"] = nodes.candidates["is_up"] = 1
    nodes.candidates["tokens_per_s"] = 1000.0
    nodes.routes["last_replica"] = -1
    for name, values in columns.items():
        nodes.candidates[name] = values
    seed_dice(nodes, 0, 7)
    return nodes


def ask(spec, nodes, *, prompt=1000, last=-1, times=1):
    """The replicas that a router names for a prompt, asked so many times."""
    router = make_router(spec)
    router.install(nodes, 0)
    nodes.routes["last_replica"] = last
    asked = np.zeros(1, REQUEST)
    asked["prompt_tokens"] = asked["prefill_tokens"] = prompt
    route = Route(nodes.routes[0], asked[0], nodes.candidates, nodes.memory[0, 0], nodes.options[0, 0])
    return [int(router.kernel(route)) for _ in range(times)]


def test_round_robin_leaves_out_who_may_not():
    assert ask("round-robin", candidates(num_waiting=[9, 0, 0]), times=4) == [0, 1, 2, 0]
    assert ask("round-robin", candidates(is_legal=[1, 0, 1, 1]), times=4) == [0, 2, 3, 0]


def test_random_and_power_of_two_draw_from_those_that_may():
    named = ask("random", candidates(is_legal=[1, 0, 1, 1]), times=3000)
    counts = np.bincount(named, minlength=4)
    assert counts[1] == 0 and (abs(counts[[0, 2, 3]] - 1000) < 150).all()
    # of two different ones the shorter queue: the longest is never taken, the shortest by two of three pairs
    named = ask("power-of-two", candidates(num_waiting=[1, 5, 2, 0], is_legal=[1, 1, 1, 0]), times=3000)
    counts = np.bincount(named, minlength=4)
    assert counts[1] == counts[3] == 0 and abs(counts[0] - 2000) < 150 and abs(counts[2] - 1000) < 150
    assert ask("power-of-two", candidates(is_legal=[0, 1]), times=3) == [1, 1, 1]
    ties = np.bincount(ask("power-of-two", candidates(num_waiting=[3, 3]), times=2000))
    assert abs(ties[0] - 1000) < 150


@pytest.mark.parametrize(
    ("spec", "columns", "expected"),
    [
        ("jsq", {"num_waiting": [3, 1, 0], "num_running": [0, 1, 3]}, 1),
        ("jsq", {"num_waiting": [2, 1, 0], "num_running": [0, 1, 2]}, 0),
        ("jsq", {"num_waiting": [0, 1, 1], "is_legal": [0, 1, 1]}, 1),
        ("least-tokens", {"prompt_tokens_left": [10.0, 30.0], "output_tokens_left": [50.0, 20.0]}, 1),
        ("least-tokens", {"prompt_tokens_left": [40.0, 40.0], "output_tokens_left": [9.0, 9.0]}, 0),
        ("least-kv", {"kv_usage": [0.5, 0.2, 0.3]}, 1),
        ("least-kv", {"kv_usage": [0.2, 0.2, 0.3], "num_waiting": [2, 1, 0]}, 1),
        ("least-kv", {"kv_usage": [0.2, 0.2], "num_waiting": [1, 1]}, 0),
        ("slo-aware", {"predicted_ttft_s": [0.5, 0.2, 0.3]}, 1),
        ("slo-aware", {"predicted_ttft_s": [0.2, 0.2], "prompt_tokens_left": [9.0, 3.0]}, 1),
        # (100 + 900) / 1000 = 1 s against (500 + 1000) / 2000 = 0.75 s
        (
            "rad-route",
            {"prompt_tokens_left": [100.0, 500.0], "uncached_tokens": [900, 1000], "tokens_per_s": [1e3, 2e3]},
            1,
        ),
        ("rad-route", {"prompt_tokens_left": [100.0, 100.0], "uncached_tokens": [900, 900]}, 0),
        # 1 x 0.4 - 2 / 4 = -0.1 against 0 - 1 / 4 = -0.25 and -1
        ("prefix-affinity", {"cached_tokens": [400, 0, 0], "num_waiting": [2, 1, 4]}, 0),
        ("prefix-affinity[weight=0.5]", {"cached_tokens": [400, 0, 0], "num_waiting": [2, 1, 4]}, 1),
        ("prefix-affinity[imbalance=2]", {"cached_tokens": [400, 0, 0], "num_waiting": [2, 1, 4]}, 1),
        ("prefix-affinity[imbalance=3]", {"cached_tokens": [400, 0, 0], "num_waiting": [2, 1, 4]}, 0),
        ("prefix-affinity", {"num_waiting": [1, 1], "prompt_tokens_left": [9.0, 3.0]}, 1),
        ("prefix-affinity", {"num_waiting": [1, 1], "prompt_tokens_left": [9.0, 9.0]}, 0),
    ],
)
def test_routers_by_hand(spec, columns, expected):
    assert ask(spec, candidates(**columns)) == [expected]


def test_session_stays_while_load_allows_it():
    nodes = candidates(num_waiting=[20, 5, 4], prompt_tokens_left=[100.0, 5.0, 50.0])
    assert ask("session", nodes, last=0) == [0], "16 more than the least loaded"
    assert ask("session[slack=15]", nodes, last=0) == [1], "else the fewest tokens"
    assert ask("session", nodes) == [1]
    assert ask("session", candidates(num_waiting=[1, 0, 9], is_legal=[0, 1, 1]), last=0) == [1]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("jqs", "router 'jqs' is unknown (did you mean 'jsq'?)"),
        ("jsq[weight=1]", "unknown parameter 'weight', it has none"),
        ("session[weight=1]", "unknown parameter 'weight', expected one of slack"),
        ("prefix-affinity[weight=-1]", "weight: expected number >= 0, 0 for load alone, got '-1'"),
        ("prefix-affinity[weight]", "expected key=value in brackets"),
        ("session[slack=nan]", "slack: expected requests >= 0"),
        ("nowhere:Router", "cannot import 'nowhere'"),
        ("clusters:table", "router 'clusters:table'"),
        ("helpers:TICK_S", "router 'helpers:TICK_S'"),
        ("]", "expected NAME"),
    ],
)
def test_bad_routers_are_one_line(spec, words):
    with pytest.raises(PolicyError, match=re.escape(words)) as error:
        make_router(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("named", [1, 2, -1, 0.5, None, True, "0"])
def test_a_router_that_names_a_replica_that_is_not_there_or_down(named):
    run = Replicas([request(0.0, 16, 2)], replica_failures=((1, 0.0, 9.0),))
    with pytest.raises(PolicyError, match="router 'Named': ") as error:
        run.cluster.run(Named(named))
    assert "\n" not in str(error.value)


def nobody(route):
    """Names a replica that is not there."""
    return 99


def test_a_compiled_router_is_checked_too():
    run = Replicas([request(0.0, 16, 2)])
    with pytest.raises(PolicyError, match="expected a replica from 0 to 1, got 99"):
        run.cluster.run(CompiledRouter("names nobody", nobody, name="nobody"))


def test_the_decode_router_has_its_own_settings_and_memory():
    """In turn for prompts and in turn for decodes: one does not count for the other."""
    roles = ("prefill", "prefill", "decode", "decode")
    rows = [request(0.5 * r, 16, 2) for r in range(4)]
    run = Replicas(rows, make_router("round-robin"), roles=roles, num_replicas=4, decode_router="round-robin").drain()
    assert run.nodes["num_delivered"].tolist() == [2, 2, 2, 2]
    settings_of = make_router("session[slack=3]")
    run = Replicas(rows, settings_of, roles=roles, num_replicas=4, decode_router="session[slack=5]")
    assert run.cluster.nodes.options[0, :, 0].tolist() == [3.0, 5.0]
