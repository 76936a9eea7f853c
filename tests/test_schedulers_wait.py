"""WAIT and Nested WAIT by hand: the authors' instance, types, segments, and that nobody waits for ever."""

import pytest
from helpers import TICK_S, Run, request

from llmsched_gym.registry import make_scheduler
from llmsched_gym.scheduler import PolicyError

UNIT = [request(prompt=16, output=2)] * 48
"""One block after prefill, two in their decode: of 12 blocks, 4 prefills and 4 decodes take 4 + 8."""


def test_four_prefills_and_four_decodes_for_ever():
    run = Run("wait[flush_s=1000]", UNIT, num_kv_blocks=12)
    batches = run.steps(12)
    assert batches[0] == dict.fromkeys(range(4), 16)
    for i, batch in enumerate(batches[1:], 1):
        assert batch == dict.fromkeys(range(4 * i - 4, 4 * i), 1) | dict.fromkeys(range(4 * i, 4 * i + 4), 16)
    assert run.sim.num_finished == 44 and run.sim.num_preemptions == 0
    assert run.sim.kv_cache_usage == 1.0


def test_first_come_first_served_overflows_on_it():
    """Twelve prefills fill the memory; half of them are thrown out, and computed again with the token they have.

    By the authors' count an evicted request begins anew, and it is 3 a batch. Here it keeps its token, and its second
    prefill is its decode too: 12 every three batches, at 25 tokens each where WAIT needs 17.
    """
    run = Run("sarathi", UNIT, num_kv_blocks=12)
    tokens = [sum(batch.values()) for batch in run.steps(12)]
    assert run.sim.num_finished == 48 and run.sim.num_preemptions == 24
    assert int(run.sim.batch_tokens_sum) == 48 * 25
    assert tokens[0] == 192


def test_each_type_has_its_number():
    # 2 tokens: mean 1.5 blocks in 2 stages; 64 tokens: mean 3 blocks in 64; 6 * 3 + 2 * 192 = 402 block stages
    rows = [request(prompt=16, output=2)] * 6 + [request(prompt=16, output=64)] * 2
    assert len(Run("wait", rows, num_kv_blocks=402).step()) == 8
    assert Run("wait", rows, num_kv_blocks=401).step() == dict.fromkeys([0, 1, 2, 3, 4, 6], 16)
    # in one bin: 8 of them, of which 401 blocks hold 7, first come first served
    assert Run("wait[bins=1]", rows, num_kv_blocks=401).step() == dict.fromkeys(range(7), 16)


def test_nothing_runs_until_every_type_waits_or_nobody_comes():
    rows = [request(prompt=16, output=2), request(prompt=16, output=64), request(1.5 * TICK_S, prompt=16, output=2)]
    run = Run("wait[flush_s=0.25]", rows, num_kv_blocks=20)
    assert run.step() == {0: 16, 1: 16}
    batches = []
    while not batches or not batches[-1]:
        batches.append(run.decide())
        run.engine.execute()
        if not batches[-1]:
            started_s = float(run.sim.clock_s)
    # 2 is seen when the first empty step has ended, at its arrival
    assert batches[-1] == {0: 1, 1: 1, 2: 16}
    assert started_s == pytest.approx(1.5 * TICK_S + 0.25, abs=0.01)
    assert run.drain()[0] == {1: 1, 2: 1}


def test_a_turn_waits_for_its_long_prompts():
    rows = [request(prompt=150, output=2)] * 4
    run = Run("wait[budget=100,flush_s=1000]", rows, num_kv_blocks=80)  # 80 / (2 * 10) = 4 of them
    assert run.steps(7) == [
        {0: 100},
        {0: 50, 1: 50},
        {0: 1, 1: 99},
        {1: 1, 2: 99},
        {1: 1, 2: 51, 3: 48},
        {2: 1, 3: 99},
        {3: 3},
    ]


def test_segments_run_by_who_waits_at_their_entry():
    # 512 tokens are expected: 17 blocks on average, 512 * 17 = 8704 block stages, so that n_1 = n_2 = 2
    rows = [request(prompt=16, output=4)] * 5
    run = Run("nested-wait[segments=2,first=2,flush_s=0.5]", rows, num_kv_blocks=17_408)
    assert run.steps(4) == [
        {0: 16, 1: 16},
        {0: 1, 1: 1, 2: 16, 3: 16},
        {0: 1, 1: 1},  # one waits: the first segment stands still, and 0 and 1 have entered the second
        {},
    ]
    batches = [batch for batch in run.drain() if batch]
    assert batches[0] == {0: 1, 1: 1, 2: 1, 3: 1, 4: 16}
    assert run.sim.num_finished == 5


def test_a_full_segment_runs():
    # n_1 = 1 and two stages: with two inside it is full, though nobody waits at its entry
    rows = [request(prompt=16, output=9)] * 2
    run = Run("nested-wait[segments=1,first=1,flush_s=1000]", rows, num_kv_blocks=8704)
    assert run.steps(4) == [{0: 16}, {0: 1, 1: 16}, {0: 1, 1: 1}, {0: 1, 1: 1}]


def test_who_was_preempted_does_not_keep_decodes_from_running():
    # two decodes and a prompt that do not fit together, and chunks that would use all tokens of a batch
    rows = [request(prompt=80, output=60)] * 3
    run = Run("nested-wait[admission=chunk,budget=16,first=8,flush_s=0]", rows, num_kv_blocks=18, max_model_len=200)
    batches = run.drain()
    assert run.sim.num_finished == 3 and run.sim.num_preemptions > 0
    assert len(batches) < 400


@pytest.mark.parametrize(
    ("spec", "message"),
    {
        "wait[flush_s=inf]": "flush_s: expected seconds from 0 to 3,600, got 'inf'",
        "wait[bins=9]": "bins: expected whole number from 1 to 8, got '9'",
        "nested-wait[segments=0]": "segments: expected whole number from 1 to 8",
        "nested-wait[bins=2]": "unknown parameter 'bins'",
    }.items(),
)
def test_a_bad_parameter_is_one_clear_line(spec, message):
    with pytest.raises(PolicyError, match=message):
        make_scheduler(spec)
