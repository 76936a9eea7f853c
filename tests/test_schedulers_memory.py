"""Who enters by the memory that will be needed, or by how many run: mc-sf, a-min, gate, tbt-control; and niyama."""

import numpy as np
import pytest
from helpers import TICK_S, Durations, Run, profile, request
from scipy.optimize import linprog

from llmsched_gym.baselines.gate import TARGETS, fluid_rates
from llmsched_gym.baselines.tbt_control import HIGH, LOW
from llmsched_gym.registry import make_scheduler
from llmsched_gym.scheduler import PolicyError

# --- mc-sf

OUTPUTS = [request(prompt=16, output=18), request(prompt=16, output=2), request(prompt=16, output=40)]
"""At their ends they hold 3, 2 and 4 blocks; when 1 ends all hold 2, when 0 ends 2 has 3."""


def test_the_shortest_that_fit_at_every_end_to_come():
    assert Run("mc-sf", OUTPUTS, num_kv_blocks=6).step() == {1: 16, 0: 16, 2: 16}
    # a batch later 2 holds one block when 1 ends, and two when 0 does
    assert Run("mc-sf", OUTPUTS, num_kv_blocks=5).steps(2) == [{1: 16, 0: 16}, {0: 1, 1: 1, 2: 16}]
    # 0 will end with three blocks, so that 2 enters in its last batch
    run = Run("mc-sf", OUTPUTS, num_kv_blocks=4)
    assert run.steps(18) == [{1: 16, 0: 16}, {0: 1, 1: 1}, *[{0: 1}] * 15, {0: 1, 2: 16}]
    run.drain()
    assert run.sim.num_preemptions == 0


def test_nobody_overtakes_the_shortest_that_does_not_fit():
    # 1 needs four blocks of five while 0 has two at its end; 2, with two, would fit
    rows = [request(prompt=16, output=10), request(1e-9, prompt=60, output=2), request(1e-9, prompt=16, output=3)]
    assert Run("mc-sf", rows, num_kv_blocks=5).steps(12) == [{0: 16}, *[{0: 1}] * 9, {1: 60}, {1: 1, 2: 16}]


# --- a-min


def test_overflow_throws_out_the_smallest_bound():
    # believed to end with 20 tokens and 3 blocks each, which 6 hold; at 48 tokens both want a fourth
    run = Run("a-min[low=0.5]", [request(prompt=16, output=40)] * 2, num_kv_blocks=6)
    assert run.steps(33) == [{0: 16, 1: 16}, *[{0: 1, 1: 1}] * 32]
    assert run.step() == {0: 1}  # of equal bounds the last admitted
    # 1 has 16 and 33 emitted, four blocks beside the four of 0
    assert run.drain()[:7] == [*[{0: 1}] * 6, {1: 49}]
    # 30 and 45 tokens are believed, 34 and 45 when both want a fourth block
    rows = [request(prompt=16, output=40), request(prompt=16, output=60)]
    run = Run("a-min[low=0.75]", rows, num_kv_blocks=6)
    assert run.steps(34) == [{0: 16, 1: 16}, *[{0: 1, 1: 1}] * 32, {1: 1}]
    run.drain()
    assert run.requests["num_preemptions"][:2].tolist() == [1, 0] and run.sim.num_finished == 2


def test_with_exact_bounds_it_is_mc_sf():
    for blocks in (4, 5, 6):
        assert (
            Run("a-min[low=1]", OUTPUTS, num_kv_blocks=blocks).drain()
            == Run("mc-sf", OUTPUTS, num_kv_blocks=blocks).drain()
        )


# --- gate


def test_the_fluid_program_is_solved():
    rng = np.random.default_rng(0)
    for _ in range(200):
        most, work, kv = rng.uniform(0.01, 3, 2), rng.uniform(0.05, 2, 2), rng.uniform(1, 100, 2)
        memory = rng.uniform(1, 200)
        found = linprog([-1, -1], A_ub=[work, kv], b_ub=[1, memory], bounds=[(0, most[0]), (0, most[1])])
        x = fluid_rates(*most, *work, *kv, memory)
        assert sum(x) == pytest.approx(-found.fun, rel=1e-6)
        assert x[0] <= most[0] + 1e-9 and x[1] <= most[1] + 1e-9
        assert work @ x <= 1 + 1e-9 and kv @ x <= memory * (1 + 1e-9)


def test_a_class_enters_below_its_target():
    # 320 tokens of memory, 16 + 512 / 2 a request: a target of 1.18, below which a second is let in, not a third
    rows = [request(prompt=16, output=3)] * 3
    run = Run("gate", rows, num_kv_blocks=20)
    assert run.steps(4) == [{0: 16, 1: 16}, {0: 1, 1: 1}, {0: 1, 1: 1}, {2: 16}]
    assert run.engine.state.memory[0, TARGETS + 1] == pytest.approx(320 / 272)


def test_a_full_class_is_passed_by():
    # both classes alike, 2 of each at the start: half of the memory each, that is 1 request and a bit
    rows = [request(prompt=16, output=9)] * 3 + [request(prompt=16, output=9, tbt=0.1)] * 3
    run = Run("gate", rows, num_kv_blocks=34)  # 544 tokens, 272 a request
    assert run.step() == {0: 16, 3: 16}


# --- tbt-control


def test_running_requests_are_capped_by_memory():
    # 1520 of 1600 tokens, 100 + 512 a request: two, though blocks are free for all
    assert Run("tbt-control", [request(prompt=100, output=2)] * 3, num_kv_blocks=100).step() == {0: 100, 1: 100}


def test_running_requests_are_capped_by_their_gaps():
    rows = [request(prompt=10, output=60)] * 9
    run = Run("tbt-control", rows, max_num_seqs=9)  # the middle of 1 and 9
    assert [len(batch) for batch in run.steps(12)] == [5] * 11 + [7]
    assert run.engine.state.memory[0, [LOW, HIGH]].tolist() == [5, 9]
    run = Run("tbt-control", rows, max_num_seqs=9, backend=Durations(0.6))
    assert [len(batch) for batch in run.steps(12)] == [5] * 12
    assert run.engine.state.memory[0, [LOW, HIGH]].tolist() == [1, 5]


# --- niyama


def first_of(spec, *rows):
    return next(iter(Run(spec, list(rows)).step()))


def test_niyama_blends_deadline_and_work():
    # due after 10 and 11 batches, with 3 and 1 to compute
    rows = [request(prompt=300, output=1, ttft=10 * TICK_S), request(prompt=100, output=1, ttft=11 * TICK_S)]
    assert first_of("niyama[budget=100,alpha=0]", *rows) == 0
    assert first_of("niyama[budget=100,alpha=0.4]", *rows) == 0
    assert first_of("niyama[budget=100,alpha=0.6]", *rows) == 1
    assert first_of("niyama[budget=100]", *rows) == 1


def test_niyama_relegates_what_cannot_be_in_time():
    rows = [request(prompt=300, output=1, ttft=2 * TICK_S), request(prompt=100, output=1, ttft=9 * TICK_S)]
    assert Run("niyama[budget=100]", rows).drain() == [{1: 100}, {0: 100}, {0: 100}, {0: 100}]
    rows[0] = request(prompt=300, output=1, ttft=3 * TICK_S)
    assert Run("niyama[budget=100]", rows).drain() == [{0: 100}, {0: 100}, {0: 100}, {1: 100}]


def test_niyama_takes_the_slack_of_decodes_for_its_chunks():
    # a millisecond a token: 80 within 0.8 of a strict user's 0.1 s, 400 within 0.8 of 0.5 s
    device = profile((1.0, 2.0, 1000.0), tokens=(1, 2, 1000))
    rows = [request(prompt=10, output=99, tbt=0.1, ttft=9.0), request(prompt=900, output=1, ttft=99.0)]
    assert Run("niyama", rows, device=device).steps(2) == [{0: 10, 1: 70}, {0: 1, 1: 79}]


@pytest.mark.parametrize(
    ("spec", "message"),
    {
        "a-min[low=0]": "low: expected share of the output length > 0, at most 1, got '0'",
        "mc-sf[low=0.5]": "unknown parameter 'low'",
        "niyama[alpha=-1]": "alpha: expected seconds of deadline a second of work >= 0",
        "tbt-control[slack=x]": "slack: expected share of the TBT SLO >= 0",
    }.items(),
)
def test_a_bad_parameter_is_one_clear_line(spec, message):
    with pytest.raises(PolicyError, match=message):
        make_scheduler(spec)
