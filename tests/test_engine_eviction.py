"""Eviction by session: small instances by hand, and where it is `lru`."""

import math
from dataclasses import replace

import numpy as np
import pytest
from helpers import Run, request, table

from llmsched_gym.config import scenario
from llmsched_gym.engine import check
from llmsched_gym.engine.records import ABANDONED, REFUSED
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.registry import make_scheduler
from llmsched_gym.scheduler import PolicyError

RULES = ("lru", "session")


def sessions(rule, rows, *, parents, shared, sessions=None, think_s=2.0, **fields):
    """A run of requests given as rows of `request`, whose prompts begin with so many tokens of their parents'."""
    given = table(rows)
    parent = np.array(parents, np.int32)
    is_root = parent < 0
    given = replace(
        given,
        arrival_s=np.where(is_root, given.arrival_s, np.nan),
        parent=parent,
        think_s=np.where(is_root, 0.0, think_s),
        shares_with=parent,
        shared_tokens=np.array(shared, np.int32),
        session_id=np.maximum.accumulate(np.where(is_root, np.arange(len(parent)), 0)).astype(np.int64),
    )
    return Run(f"sarathi[evict={rule}]", given, prefix_caching=True, **fields)


def cached(run):
    return run.requests["num_cached_tokens"].tolist()


def waiting_turn(rule):
    """The older session's second turn arrives while a third one, which has the only sequence, needs more memory."""
    rows = [
        request(0.0, 64, 1),  # A, over after a tick
        request(prompt=80, output=1),  # A's second turn arrives at 2 s
        request(0.5, 64, 1),  # B
        request(1.5, 64, 32),  # C runs for 32 ticks, a second, and takes its sixth block after 17 of them
    ]
    run = sessions(
        rule,
        rows,
        parents=[-1, 0, -1, -1],
        shared=[0, 64, 0, 0],
        num_kv_blocks=13,
        max_num_seqs=1,
        think_s=2.0 - 1 / 32,
    )
    run.drain()
    return run


def test_who_waits_keeps_its_context():
    """Of 13 blocks A and B have left four each; C's sixth is the last of those that were left longest ago.

    By blocks that is one of A's, although its turn waits for it. By session it is one of B's.
    """
    assert cached(waiting_turn("lru"))[1] == 48
    assert cached(waiting_turn("session"))[1] == 64


def lost_turn(rule, **fields):
    """A's second turn gives up; B, which has been idle longer, comes back after C has taken blocks."""
    rows = [
        request(0.0, 64, 1),  # B
        request(prompt=80, output=1),  # B's second turn, at 9 s
        request(0.5, 64, 1),  # A
        request(prompt=80, output=1, ttft=0.25),  # A's second turn, at 2 s, when D has all sequences
        request(1.5, 16, 64),  # D runs for 2 s, with five blocks at its end
        request(5.0, 48, 1),  # C
    ]
    run = sessions(
        rule,
        rows,
        parents=[-1, 0, -1, 2, -1, -1],
        shared=[0, 64, 0, 64, 0, 0],
        think_s=np.array([0.0, 9.0, 0.0, 1.5, 0.0, 0.0]),
        num_kv_blocks=13,
        max_num_seqs=1,
        **fields,
    )
    run.drain()
    return run


def test_a_lost_session_goes_first():
    """13 blocks: B's four, A's four, D's five. C takes D's last, which is not full, and two more of those left.

    By blocks these are B's. By session they are A's, whose turn has left.
    """
    for rule, found in (("lru", 32), ("session", 64)):
        run = lost_turn(rule, patience_s=0.5)
        assert run.requests["phase"][3] == ABANDONED
        assert cached(run)[1] == found


def test_a_refused_turn_is_lost_too():
    run = lost_turn("session,refuse=true", patience_s=math.inf, allow_refusal=True)
    assert run.requests["phase"][3] == REFUSED
    assert cached(run)[1] == 64


@pytest.mark.parametrize("policy", ["slai", "on-time", "vllm-v1"])
def test_every_compiled_scheduler_takes_it_and_by_default_it_is_lru(policy):
    assert make_scheduler(policy).knobs["evict"] == make_scheduler(f"{policy}[evict=lru]").knobs["evict"] == 0
    assert make_scheduler(f"{policy}[evict=session]").knobs["evict"] == 1


def test_a_crowded_engine_keeps_the_rules():
    """The checker runs every 50 steps."""
    from llmsched_gym.engine import Engine
    from llmsched_gym.scheduler import install
    from llmsched_gym.workload import make_table

    world = scenario("chat", num_requests=60, qps=2.0, warmup_s=0.0, num_kv_blocks=900, patience_s=3.0)
    given, scheduler = make_table(world, 2), make_scheduler("slai[evict=session]")
    engine = Engine(world, len(given))
    engine.reset(given)
    install(scheduler, engine.state)
    engine.prepare(scheduler)
    for _ in range(40):
        if engine.run(scheduler, max_steps=50):
            break
        check(engine.state)
    assert engine.state.sims[0].num_abandoned > 0


def test_without_prefix_caching_nothing_is_evicted():
    world = scenario("paper", num_requests=80, qps=2.5)
    one, other = (simulate(world, f"slai[evict={rule}]", 0).requests["first_token_s"] for rule in RULES)
    np.testing.assert_array_equal(one, other)


def test_an_unknown_rule_is_one_line():
    with pytest.raises(PolicyError, match="evict: expected one of lru, session, got 'lfu'"):
        make_scheduler("slai[evict=lfu]")
