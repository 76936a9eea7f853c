"""EB and EB+: turns of prompts and decodes by hand, the share of free slots against a solver, and when mixing pays."""

import math

import pytest
from helpers import Run, profile, request
from scipy.optimize import brentq

from llmsched_gym.baselines.eb import AT_ONCE, SLOTS, free_share
from llmsched_gym.registry import make_scheduler
from llmsched_gym.scheduler import PolicyError


def test_prompts_come_when_so_many_slots_are_free():
    rows = [request(prompt=10, output=n) for n in (2, 3, 4, 9, 2, 2)]
    assert Run("eb[k=2]", rows, max_num_seqs=4).steps(6) == [
        {0: 10, 1: 10},
        {2: 10, 3: 10},
        {0: 1, 1: 1, 2: 1, 3: 1},  # 0 ends: one slot is free
        {1: 1, 2: 1, 3: 1},  # 1 ends
        {4: 10, 5: 10},
        {2: 1, 3: 1, 4: 1, 5: 1},
    ]
    assert Run("eb[k=1]", rows, max_num_seqs=4).steps(6)[4:] == [{0: 1, 1: 1, 2: 1, 3: 1}, {4: 10}]


def test_a_turn_takes_as_many_batches_as_its_prompts_need():
    rows = [request(prompt=60, output=9)] * 5
    # no slot is free before one ends; the last waits for three
    assert Run("eb[k=3,budget=100]", rows, max_num_seqs=4).steps(5) == [
        {0: 60},
        {1: 60},
        {2: 60},
        *[{0: 1, 1: 1, 2: 1}] * 2,
    ]


def test_who_is_alone_does_not_wait_for_others():
    assert Run("eb[k=9]", [request(prompt=30, output=2)]).drain() == [{0: 30}, {0: 1}]


@pytest.mark.parametrize("cost", [1e-6, 0.002, 0.306853, 5.0])
def test_the_share_of_free_slots_solves_its_equation(cost):
    expected = brentq(lambda theta: theta / (1 - theta) + math.log(1 - theta) - cost, 1e-9, 1 - 1e-9)
    assert free_share(cost) == pytest.approx(expected, rel=1e-6)
    if cost == 0.306853:
        assert free_share(cost) == pytest.approx(0.5, abs=1e-5)


def test_the_share_follows_from_costs_and_outputs():
    # all batches cost the same; 512 tokens before anybody has finished, and 16,000 hold 30 requests: theta = 0.060;
    # once one has finished with 2 tokens a decode ends its request with probability 1/2: theta = 0.58
    run = Run("eb", [request(prompt=10, output=2), request(1.0, prompt=10, output=2)], max_num_seqs=100)
    run.step()
    assert run.engine.state.memory[0, [AT_ONCE, SLOTS]].tolist() == [2, 30]
    assert 0.059 < free_share(1 / 512) < 0.061 and 0.57 < free_share(1 / 2) < 0.59
    run = Run("eb", [request(prompt=10, output=2), request(1.0, prompt=10, output=2)], max_num_seqs=20)
    run.drain()
    assert run.engine.state.memory[0, [AT_ONCE, SLOTS]].tolist() == [12, 20]


def test_eb_plus_mixes_where_one_batch_is_cheaper_than_two():
    rows = [request(prompt=30, output=3), request(prompt=600, output=2)]
    assert Run("eb+", rows).steps(3) == [{0: 30, 1: 482}, {0: 1, 1: 118}, {0: 1, 1: 1}]
    assert Run("eb[k=2]", rows).steps(2) == [{0: 30, 1: 600}, {0: 1, 1: 1}]


def test_eb_plus_keeps_phases_apart_where_mixing_costs_more():
    device = profile((0.5, 0.9), kv_ms=0.02, pair_ms=1e-4).with_mixing(50.0)
    rows = [request(prompt=30, output=30)] * 40
    for batch in Run("eb+", rows, device=device, max_num_seqs=20).drain():
        assert len({n > 1 for n in batch.values()}) == 1


def test_a_bad_parameter_is_one_clear_line():
    with pytest.raises(PolicyError, match=r"eb\[k=-1\]': k: expected whole number of prompts, 0 for the share"):
        make_scheduler("eb[k=-1]")
