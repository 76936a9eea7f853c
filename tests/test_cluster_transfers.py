"""Transfers of KV between replicas, and replicas that fail."""

import math

import pytest
from clusters import Named, Replicas, Zero, with_sessions
from helpers import TICK_S, profile, request
from test_engine_sessions import root, turn

from llmsched_gym.cluster import Cluster
from llmsched_gym.cluster.events import OVER, ROUTE
from llmsched_gym.cluster.invariants import check
from llmsched_gym.config import scenario
from llmsched_gym.config.cluster import ClusterScenario
from llmsched_gym.engine.records import (
    ABANDONED,
    FINISHED,
    REJECTED,
    WAITING,
)

DISAGG = {"roles": ("prefill", "decode"), "num_replicas": 2}
BYTES = profile().model.kv_bytes_per_token


def test_the_second_token_waits_for_the_transfer():
    link = 64 * BYTES / (2.0 * TICK_S)  # four blocks take two ticks
    run = Replicas([request(0.0, 60, 3)], Named(0), kv_link_bytes_per_s=link, **DISAGG)
    run.decide()
    run.send(0)
    held = set()
    while run.event() != OVER:
        held.add((run.now_s, *(run.sims["total_blocks"] - run.sims["free_blocks"])[:2].tolist()))
    assert (TICK_S, 4, 4) in held, "both sides hold the blocks meanwhile"
    row = run.requests[0]
    assert row["first_token_s"] == TICK_S, "the first token is the prefill replica's"
    assert run.gaps(0) == pytest.approx([3 * TICK_S, TICK_S])
    assert run.sims["tokens_emitted"].tolist() == [1, 2]
    assert run.cluster.nodes.routes[0].num_transfers == 1


def test_a_request_with_one_token_is_not_moved():
    run = Replicas([request(0.0, 60, 1)], Named(0), **DISAGG).drain()
    assert run.all_finished() and run.cluster.nodes.routes[0].num_transfers == 0


def test_clients_leave_while_their_kv_waits():
    run = Replicas([request(0.0, 60, 9, tbt=0.1)], Named(0), kv_link_bytes_per_s=1.0, patience_s=0.5, **DISAGG)
    run.drain()
    assert run.phases[0] == ABANDONED and run.requests[0]["num_output_tokens"] == 1
    assert (run.sims["free_blocks"] == run.sims["total_blocks"]).all()


def test_a_decoder_that_cannot_hold_a_request_rejects_it():
    small = profile(kv_blocks=5)
    run = Replicas([request(0.0, 60, 40), request(0.0, 60, 9)], Named(0), devices=[profile(), small], **DISAGG).drain()
    assert run.phases.tolist() == [REJECTED, FINISHED]


def test_a_prefill_replica_needs_no_room_for_the_output():
    small = profile(kv_blocks=5)
    rows = [request(0.0, 60, 400), request(0.0, 90, 9)]
    run = Replicas(rows, Named(0), devices=[small, profile()], **DISAGG).drain()
    assert run.phases.tolist() == [FINISHED, REJECTED], "nobody can ever compute the second prompt"


def test_decoders_that_come_back_are_waited_for():
    run = Replicas([request(0.0, 60, 9)], Named(0), replica_failures=((1, 0.0, 5.0),), **DISAGG).drain()
    assert run.all_finished() and 5.0 < run.requests[0]["resolved_s"] < 5.0 + 10 * TICK_S


@pytest.mark.parametrize("failing", [0, 1])
def test_the_source_or_the_target_of_a_transfer_fails(failing):
    link = 64 * BYTES / (4.0 * TICK_S)
    fails_s = 3 * TICK_S  # in the middle of the transfer
    failures = ((failing, fails_s, fails_s + TICK_S),)
    run = Replicas([request(0.0, 60, 3)], Named(0), kv_link_bytes_per_s=link, replica_failures=failures, **DISAGG)
    run.drain()
    assert run.all_finished() and run.requests[0]["first_token_s"] == TICK_S
    # the source loses the KV, which is computed again, its next token with it; else only the transfer is
    if failing == 0:
        assert run.gaps(0) == pytest.approx([4 * TICK_S, 5 * TICK_S])
    else:
        assert run.gaps(0) == pytest.approx([8 * TICK_S, TICK_S])
    assert run.sims["tokens_emitted"].tolist() == ([2, 1] if failing == 0 else [1, 2])


def test_what_a_failed_replica_had_goes_back_to_the_router():
    """Running ones first; time to first token counts from the arrival; who has tokens keeps them."""
    rows = [request(0.0, 16, 4), request(2.5 * TICK_S, 16, 2)]
    fails_s = 3.25 * TICK_S
    run = Replicas(rows, Named(0, 0, 1), replica_failures=((0, fails_s, 9.0),), num_steps=9).drain()
    views = run.router.views
    assert [view.index for view in views] == [0, 1, 0, 1]
    assert [view.now_s for view in views] == [0.0, 2.5 * TICK_S, fails_s, fails_s]
    assert views[2].request.num_output_tokens == 3 and views[2].request.prefill_tokens == 19
    assert views[2].legal.tolist() == [False, True] and not views[2].replicas[0].is_up
    assert run.all_finished()
    assert run.requests["first_token_s"].tolist() == [TICK_S, fails_s + TICK_S]
    assert run.gaps(0) == pytest.approx([TICK_S, TICK_S, 1.25 * TICK_S])
    assert run.sims["num_batches"].tolist() == [3, 2], "the batch under way is lost"
    assert run.cluster.nodes.routes[0].num_handed_back == 2


def test_all_replicas_are_down_at_once():
    rows = [request(0.0, 16, 4), request(1.0, 16, 4, ttft=1.0), request(1.0, 16, 4)]
    failures = ((0, 0.1, 9.0), (1, 0.05, 20.0))
    run = Replicas(rows, Named(0), replica_failures=failures, patience_s=2.0).drain()
    assert run.phases.tolist() == [ABANDONED, ABANDONED, FINISHED]
    assert run.requests["first_token_s"][2] == 9.0 + TICK_S
    run = Replicas(rows, Named(0), replica_failures=((0, 0.1, math.inf), (1, 0.0, math.inf)), drain_s=5.0).drain()
    assert run.phases.tolist() == [WAITING] * 3 and run.now_s == 6.0, "they have waited up to the end"


def test_an_impatient_client_leaves_the_replica_that_it_was_sent_to_anew():
    """The token that it has came long before its first one was due: that deadline does not hold it any more."""
    rows = [request(0.0, 16, 9, tbt=0.1, ttft=50.0), request(0.0, 2000, 2)]
    slow = profile((1e3 * TICK_S, 1e3 * TICK_S), pair_ms=0.0)
    run = Replicas(
        rows, Named(0, 1, 1), devices=[slow, profile(5000.0)], patience_s=1.0, replica_failures=((0, 0.05, 90.0),)
    )
    run.drain()
    assert run.phases[0] == ABANDONED and run.requests[0]["resolved_s"] < 6.0


def test_the_last_replica_of_a_session_is_that_of_the_turn_before():
    rows = (root(0.0, 16, 1), turn(0, 9.0, 20, 1), turn(0, 1.0, 20, 1), turn(2, 1.0, 30, 1))
    run = Replicas(with_sessions(*rows), Named(1, 0, 0)).drain()
    assert [(v.index, v.last_replica) for v in run.router.views] == [(0, -1), (2, 1), (3, 0), (1, 1)]


def test_many_transfers_wait_for_one_seat():
    """More than seats: each is bounded by memory alone."""
    run = Replicas([request(0.0, 16, 3) for _ in range(40)], Named(0), max_num_seqs=2, **DISAGG)
    most = 0
    while (code := run.event()) != OVER:
        if code == ROUTE:
            run.send(0)
        most = max(most, int(run.cluster.nodes.routes[0].num_moving))
    assert run.all_finished() and most > 4


def test_lines_and_tables_grow():
    world = ClusterScenario(**{**scenario("paper").to_dict(), "num_replicas": 2})
    cluster = Cluster(world, 3, scheduler="sarathi")
    assert cluster.state.waiting.shape[1] == 3
    for count in (3, 50):
        given = Replicas([request(0.0, 16, 2) for _ in range(count)]).table
        cluster.reserve(count)
        cluster.reset(given)
        cluster.run(Zero())
        check(cluster)
        assert (cluster.state.requests[0]["phase"][:count] == FINISHED).all()
