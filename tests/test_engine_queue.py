"""The waiting list's index finds whom a walk along the list finds, whatever has happened to the line."""

import math

import numpy as np
import pytest
from helpers import Run, request
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_properties import DEVICE, KNOBS, SMALL_WORLDS, RandomLegal, rows_of

from llmsched_gym.config import scenario
from llmsched_gym.engine import Engine, check
from llmsched_gym.engine.batch import insert_sorted, is_prefill, remaining_prefill
from llmsched_gym.engine.due import left_s
from llmsched_gym.engine.invariants import InvariantError
from llmsched_gym.engine.pack import (
    CLASS,
    EDF,
    FCFS,
    FEASIBLE,
    LPM,
    ORDERS,
    SPF,
    _any_feasible,
    _any_within_limit,
    next_waiting,
)
from llmsched_gym.engine.predict import can_make_ttft
from llmsched_gym.engine.promise import promise
from llmsched_gym.engine.records import NONE
from llmsched_gym.engine.state import lane_of
from llmsched_gym.scheduler import Compiled, install, make_scheduler

CROWDS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.005, 0.03]),  # gap to the one before
        st.integers(1, 260),
        st.integers(1, 40),
        st.sampled_from([0.05, 0.5]),
        st.sampled_from([0.01, 0.05, 0.3, 2.0]),
    ),
    min_size=12,
    max_size=40,
)


def line(lane):
    """(request index, record) of everybody who waits, in order."""
    return [(int(r), lane.requests[r]) for r in lane.waiting[: lane.sim.num_waiting]]


def key(lane, r, order):
    """A prompt's sort key as docs/schedulers.md words the orders."""
    row = lane.requests[r]
    if order in (FCFS, LPM):  # without prefix caching
        return 0.0
    if order == SPF:
        return row.prefill_tokens
    if order == CLASS:
        return (row.slo_class != 0, row.prefill_tokens)
    if order == EDF:
        fresh = row.num_output_tokens == 0
        return row.arrival_s + row.ttft_slo_s if fresh else row.last_token_s + row.tbt_slo_s
    return (order == FEASIBLE and not can_make_ttft(lane, r), remaining_prefill(row))


def first_in_line(lane, order, hold, limit):
    """What `next_waiting` is to find, by looking at everybody."""
    free = [r for r, row in line(lane) if row.num_scheduled_tokens == 0]
    free = [r for r in free if not limit or lane.requests[r].prefill_tokens <= lane.batch.limit]
    free = [r for r in free if not hold or can_make_ttft(lane, r)]
    if order in (FCFS, LPM):
        return free[0] if free else -1
    return min(free, key=lambda r: (key(lane, r, order), r), default=-1)


def same(lane, seed):
    """Compare every question that is asked of the line, with some of it in the batch already; returns how many wait."""
    rng = np.random.default_rng(seed)
    for r, row in line(lane):
        row.num_scheduled_tokens = rng.choice([-1, 1]) if rng.random() < 0.25 else 0
        assert lane.requests[r].num_scheduled_tokens == row.num_scheduled_tokens
    lane.batch.limit = int(rng.integers(1, 300))
    free = [row for _, row in line(lane) if row.num_scheduled_tokens == 0]
    for order in range(len(ORDERS)):
        for hold in (False, True):
            for limit in (False, True):
                expected = first_in_line(lane, order, hold, limit)
                assert next_waiting(lane, order, hold, limit) == expected, (ORDERS[order], hold, limit)
    running = [r for r in lane.running[: lane.sim.num_running] if is_prefill(lane.requests[r])]
    feasible = [r for r, row in line(lane) if row.num_scheduled_tokens == 0 and can_make_ttft(lane, r)]
    assert _any_feasible(lane) == (bool(feasible) or any(can_make_ttft(lane, r) for r in running))
    assert _any_within_limit(lane) == any(row.prefill_tokens <= lane.batch.limit for row in free)
    for _, row in line(lane):
        row.num_scheduled_tokens = 0
    return lane.sim.num_waiting


def drive(run, seed, most=60):
    """Step, asking all questions of the line after each; returns how long it was and how many of it had expired."""
    longest = expired = 0
    for k in range(most):
        if run.engine.is_over():
            break
        run.step()
        lane = lane_of(run.engine.state, 0)
        longest = max(longest, same(lane, seed + k))
        expired = max(expired, sum(left_s(lane.requests[r], lane.sim.clock_s) <= 0.0 for r, _ in line(lane)))
    return longest, expired


def test_under_random_legal_batches():
    most = [0, 0, 0]

    @settings(max_examples=25)
    @given(fields=SMALL_WORLDS, drawn=CROWDS, seed=st.integers(0, 2**31))
    def agree(fields, drawn, seed):
        run = Run(RandomLegal(seed, fields["admission"]), rows_of(drawn), device=DEVICE, seed=seed, **fields)
        longest, expired = drive(run, seed)
        happened = [longest, expired, int(run.sim.num_preemptions)]
        most[:] = [max(a, b) for a, b in zip(most, happened, strict=True)]

    agree()
    assert min(most) > 4, "nobody waited, expired or was preempted"


@settings(max_examples=25)
@given(fields=SMALL_WORLDS, drawn=CROWDS, knobs=KNOBS, seed=st.integers(0, 2**31))
def test_under_random_knobs(fields, drawn, knobs, seed):
    run = Run(Compiled("random knobs"), rows_of(drawn), device=DEVICE, **fields)
    for name, value in knobs.items():
        run.engine.state.knobs[0][name] = value
    drive(run, seed)


def test_promises_are_those_of_the_whole_line():
    rng = np.random.default_rng(1)
    rows = [
        request(0.02 * i, int(rng.integers(1, 300)), 20, 0.1, float(rng.choice([0.2, 0.4, 2.0]))) for i in range(60)
    ]
    run = Run("on-time", rows, device=DEVICE, num_kv_blocks=60, max_num_seqs=5)
    some = 0
    for _ in range(200):
        run.step()
        lane = lane_of(run.engine.state, 0)
        count = 0
        candidates = [*lane.running[: lane.sim.num_running], *lane.waiting[: lane.sim.num_waiting]]
        for r in candidates:  # the first max_num_seqs of them in this order
            fresh = lane.requests[r].num_output_tokens == 0 and is_prefill(lane.requests[r])
            if fresh and can_make_ttft(lane, r) and count < lane.sim.max_num_seqs:
                insert_sorted(lane, count, r, left_s(lane.requests[r], lane.sim.clock_s))
                count += 1
        expected = lane.scratch[:count].tolist()
        promised, dropped, *_ = promise(lane, 1.3)
        assert promised + dropped == count
        assert lane.scratch[:count].tolist() == expected
        some = max(some, count)
    assert some == 5


@pytest.mark.parametrize("lengths", ["rising", "falling", "equal"])
def test_a_tree_stays_balanced_in_whatever_order_lengths_come(lengths):
    n = 1000
    prompts = {"rising": np.arange(n) + 20, "falling": n - np.arange(n) + 20, "equal": np.full(n, 50)}[lengths]
    first = request(0.0, 16, 1000, 0.5, math.inf)
    run = Run("sarathi", [first, *(request(0.001 * (i + 1), int(prompts[i]), 2, 0.5, 0.1) for i in range(n))])
    sim = run.sim
    sim.max_num_seqs = 1
    while sim.clock_s < 2.0:
        run.step()
    requests, depth = run.engine.state.requests[0], {-1: 0}
    level, depth = [int(sim.expired_others)], 0
    while level:
        depth += 1
        level = [int(c) for r in level for c in (requests[r].shorter, requests[r].longer) if c >= 0]
    assert sim.num_waiting == n
    assert depth < 5 * math.log2(n)


@pytest.mark.parametrize("field", ["place", "later", "earlier", "shorter", "longer"])
def test_the_checker_notices_a_broken_link(field):
    rows = [request(0.0, 100 + i, 5, 0.5, 0.1) for i in range(20)]
    run = Run("sarathi", rows, max_num_seqs=1)
    while run.sim.clock_s < 0.5:
        run.step()
    state = run.engine.state
    requests, waiting = state.requests[0], state.waiting[0][: run.sim.num_waiting]
    r = next(r for r in waiting if requests[r][field] >= 0)
    requests[r][field] = -1 if field != "place" else requests[r][field] + 2
    with pytest.raises(InvariantError, match=r"list|tree"):
        check(state)


@pytest.mark.parametrize("policy", ["on-time", "slai", "feasible-first", "edf"])
def test_before_the_first_table_nobody_waits(policy):
    engine = Engine(scenario("paper", num_requests=5, qps=1.0), 5)
    scheduler = make_scheduler(policy)
    install(scheduler, engine.state)
    sim = engine.state.sims[0]
    assert (sim.num_waiting, sim.first_open, sim.last_open, sim.first_expired, sim.expired_others) == (0, *[NONE] * 4)
    engine.decide(scheduler)
    assert engine.state.batches[0].num_items == 0
