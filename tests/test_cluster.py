"""Replicas behind a router: nothing is lost, whatever fails; one of them alone is the single engine."""

import hashlib
import math
import re

import numpy as np
import pytest
from clusters import Anywhere, Named, Replicas, with_sessions
from helpers import TICK_S, profile, request
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_determinism import fresh_process
from test_engine_sessions import root, turn

from llmsched_gym.cluster import Cluster, CompiledRouter
from llmsched_gym.cluster.events import OVER, ROUTE
from llmsched_gym.cluster.invariants import check
from llmsched_gym.cluster.router import seed_dice
from llmsched_gym.cluster.state import Route, allocate
from llmsched_gym.config import ADMISSIONS, ConfigError, scenario
from llmsched_gym.config.cluster import ClusterScenario
from llmsched_gym.engine import Engine, InvariantError
from llmsched_gym.engine.blocks import NAMED, owner_of, slot_of
from llmsched_gym.engine.records import (
    ABANDONED,
    CANCELLED,
    FINISHED,
    PENDING,
    REFUSED,
    REJECTED,
    REQUEST,
    RUNNING,
    WAITING,
)
from llmsched_gym.engine.rows import rows_of
from llmsched_gym.registry import make_router, routers
from llmsched_gym.scheduler import PolicyError, install, make_scheduler
from llmsched_gym.workload import make_table

DEVICES = [
    profile((5.0 * f, 5.4 * f), kv_ms=0.001, pair_ms=1e-4, kv_blocks=n) for f, n in ((1, 40), (3, 16), (0.5, 12))
]
ROLES = (("prefill", "decode"), ("both", "prefill", "decode"), ("prefill", "prefill", "decode", "decode", "both"))

SMALL_CLUSTERS = st.fixed_dictionaries(
    {
        "watermark": st.sampled_from([0.0, 0.05, 0.2]),
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.sampled_from([16, 60, 400]),
        "max_model_len": st.sampled_from([200, 500]),
        "patience_s": st.sampled_from([0.05, 0.4, 3.0, math.inf]),
        "jitter": st.sampled_from([0.0, 0.3]),
        "allow_refusal": st.booleans(),
        "idle_step_s": st.sampled_from([0.01, 0.1]),
        "router_staleness_s": st.sampled_from([0.0, 0.05, 0.4, 2.0]),
        "drain_s": st.sampled_from([0.2, math.inf]),
    }
)
SCHEDULERS = ("sarathi", "slai[refuse=true]", "vllm-v0", "vllm-v1", "rad", "on-time", "random")
REQUESTS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.0, 0.005, 0.03, 0.3]),  # gap to the one before
        st.integers(1, 220),
        st.integers(1, 30),
        st.sampled_from([0.02, 0.1, 0.5]),
        st.sampled_from([0.01, 0.3, 2.0]),
    ),
    min_size=1,
    max_size=14,
)
FAILURES = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.01, 0.05, 0.3]), st.sampled_from([0.004, 0.1, 1.0, math.inf])),
    max_size=5,
)


def failures_of(drawn, num_replicas):
    """Failures that follow each other: each begins so long after the one before of the same replica was over."""
    found, until_s = [], dict.fromkeys(range(num_replicas), 0.0)
    for replica, after_s, lasts_s in drawn:
        if replica < num_replicas and until_s[replica] < math.inf:
            fails_s = until_s[replica] + after_s
            until_s[replica] = fails_s + lasts_s
            found.append((replica, fails_s, until_s[replica]))
    return tuple(found)


def rows_from(drawn):
    times = np.cumsum([gap for gap, *_ in drawn])
    return [request(float(t), *rest) for t, (_, *rest) in zip(times, drawn, strict=True)]


def check_end(run):
    """What must hold at the end of any run, whoever has failed."""
    phases, rows = run.phases, run.requests
    assert np.isin(phases, (PENDING, WAITING, RUNNING, FINISHED, REJECTED, REFUSED, ABANDONED, CANCELLED)).all()
    finished = phases == FINISHED
    assert (rows["num_output_tokens"][finished] == run.table.output_tokens[finished]).all()
    for r in np.flatnonzero(finished):  # every token once, in order: the gaps fill the time
        lasted_s = rows["last_token_s"][r] - rows["first_token_s"][r]
        assert sum(run.gaps(r)) == pytest.approx(lasted_s, rel=1e-5, abs=1e-6)
        assert rows["first_token_s"][r] > rows["arrival_s"][r]
    route = run.cluster.nodes.routes[0]
    if math.isinf(run.scenario.drain_s) and not any(math.isinf(back_s) for *_, back_s in run.scenario.replica_failures):
        assert not np.isin(phases, (PENDING, WAITING, RUNNING)).any(), "somebody was forgotten"
        assert route.num_held == route.num_moving == 0
        assert (run.sims["free_blocks"] == run.sims["total_blocks"]).all()


@settings(max_examples=40)
@given(
    SMALL_CLUSTERS,
    st.integers(1, 5),
    st.sampled_from(SCHEDULERS),
    st.sampled_from(["python", *routers()]),
    REQUESTS,
    FAILURES,
    st.integers(0, 9),
)
def test_nothing_is_lost_or_doubled(fields, n, scheduler, router, drawn, failures, seed):
    devices = [DEVICES[(seed + j) % len(DEVICES)] for j in range(n)]
    run = Replicas(
        rows_from(drawn),
        Anywhere(seed) if router == "python" else make_router(router),
        devices=devices,
        scheduler=scheduler,
        num_replicas=n,
        replica_failures=failures_of(failures, n),
        **fields,
    )
    check_end(run.drain(to_the_end=seed % 2 == 0))


@settings(max_examples=30)
@given(
    SMALL_CLUSTERS,
    st.sampled_from(ROLES),
    st.sampled_from(["sarathi", "slai", "vllm-v1"]),
    REQUESTS,
    FAILURES,
    st.sampled_from([1e6, 1e8, 50e9]),
    st.sampled_from(["least-kv", "round-robin", "session[slack=2]"]),
    st.integers(0, 9),
)
def test_nothing_is_lost_between_prefill_and_decode(fields, roles, scheduler, drawn, failures, link, decode, seed):
    n = len(roles)
    run = Replicas(
        rows_from(drawn),
        Anywhere(seed),
        devices=[DEVICES[(seed + j) % len(DEVICES)] for j in range(n)],
        scheduler=scheduler,
        num_replicas=n,
        roles=roles,
        decode_router=decode,
        kv_link_bytes_per_s=link,
        replica_failures=failures_of(failures, n),
        **fields,
    )
    check_end(run.drain())


def random_sessions(rng, count=12):
    """Sessions that fork, with turns that follow at once."""
    rows, known = [], []
    for r in range(count):
        prompt, output = int(rng.integers(1, 90)), int(rng.integers(1, 25))
        if r > 0 and rng.random() < 0.7:
            first = max(i for i, row in enumerate(rows) if not row[0])
            parent = int(rng.integers(first, r))
            rows.append(turn(parent, float(rng.choice([0.0, 0.01, 0.2])), known[parent] + prompt, output))
        else:
            when = rows and max(row[1] for row in rows if not row[0])
            rows.append(root(float(when or 0.0) + float(rng.choice([0.0, 0.02, 0.1])), prompt, output))
        known.append(rows[-1][3] + output)
    return with_sessions(*rows)


@settings(max_examples=25)
@given(
    SMALL_CLUSTERS,
    st.integers(1, 4),
    st.sampled_from(["prefix-affinity", "session", "python"]),
    FAILURES,
    st.integers(0, 99),
)
def test_sessions_and_their_caches(fields, n, router, failures, seed):
    rng = np.random.default_rng(seed)
    run = Replicas(
        random_sessions(rng),
        Anywhere(seed) if router == "python" else make_router(router),
        devices=[DEVICES[(seed + j) % len(DEVICES)] for j in range(n)],
        scheduler=("sarathi", "vllm-v1", "random")[seed % 3],
        num_replicas=n,
        replica_failures=failures_of(failures, n),
        prefix_caching=True,
        **fields,
    )
    check_end(run.drain())


def test_the_checker_notices():
    """A request that is nowhere, and one that is in two places."""
    run = Replicas([request(0.0, 40, 5), request(0.0, 30, 5), request(9.0, 10, 2)], Named(0, 1, 0))
    for _ in range(6):
        run.event()
        if run.cluster.deciding() >= 0:
            run.send(run.router.route(run.cluster.view()))
    run.sims[0].num_running, kept = 0, int(run.sims[0].num_running)
    assert kept == 1
    with pytest.raises(InvariantError, match="running count"):
        check(run.cluster)
    run.sims[0].num_running = kept
    check(run.cluster)
    run.cluster.state.running[1, 0] = run.cluster.state.running[0, 0]
    with pytest.raises(InvariantError, match="two places"):
        check(run.cluster)


# --- one replica of several is the single engine


class Zero:
    def route(self, view):
        return 0


@pytest.mark.parametrize(
    ("suite", "policy", "fields"),
    [
        ("default", "slai", {"num_requests": 150, "qps": 2.5, "num_kv_blocks": 2000}),
        ("default", "vllm-v1", {"num_requests": 150, "qps": 2.5, "max_model_len": 900, "patience_s": 5.0}),
        ("paper", "sarathi", {"num_requests": 150, "qps": 1.4}),
        ("paper", "slai[refuse=true]", {"num_requests": 150, "qps": 3.0, "allow_refusal": True}),
        ("chat", "on-time", {"num_requests": 100, "qps": 0.6}),
        ("agents", "slai", {"num_requests": 100, "qps": 0.15}),
        ("tenants", "random", {"num_requests": 12, "qps": 1.5, "warmup_s": 0.0, "arrivals_continue": False}),
    ],
)
def test_a_router_that_names_replica_0_is_the_single_engine(suite, policy, fields):
    scheduler = make_scheduler(policy)
    world = scenario(suite, **fields).replace(admission=getattr(scheduler, "admission", "prompt"))
    given = make_table(world, 3)
    gaps = int(given.output_tokens.sum()) - len(given)
    alone = Engine(world, len(given), num_gaps=gaps, num_steps=500)
    alone.reset(given)
    install(scheduler, alone.state, seed=3)
    alone.run(scheduler)
    for staleness_s in (0.0, 0.7):
        of = ClusterScenario(**world.to_dict(), num_replicas=3, router_staleness_s=staleness_s)
        cluster = Cluster(of, len(given), scheduler=policy, num_gaps=gaps, num_steps=500)
        cluster.reset(given)
        cluster.run(Zero())
        check(cluster)
        for name, theirs, ours in (
            ("requests", rows_of(alone.state, 0, given), rows_of(cluster.state, 0, given)),
            ("sims", alone.state.sims[:1], cluster.state.sims[:1]),
            ("steps", alone.state.steps[0], cluster.state.steps[0]),
        ):
            for field in theirs.dtype.names:
                np.testing.assert_array_equal(theirs[field], ours[field], err_msg=f"{name}.{field}")
        assert alone.state.gaps[0].tobytes() == cluster.state.gaps[0].tobytes()


def test_a_turn_that_follows_at_once_is_there_before_the_next_batch():
    given = with_sessions(root(0.0, 40, 3), turn(0, 0.0, 60, 2), root(0.0, 30, 9))
    alone = Engine(scenario("paper", watermark=0.0), 3, profile=profile())
    alone.reset(given)
    scheduler = make_scheduler("sarathi")
    install(scheduler, alone.state)
    alone.run(scheduler)
    run = Replicas(given, Zero()).drain()
    assert run.requests["first_token_s"].tolist() == alone.state.requests[0]["first_token_s"].tolist()
    assert run.requests["first_token_s"][1] == run.requests["resolved_s"][0] + TICK_S


# --- the order of events, by hand: every batch takes one tick


def test_at_equal_times_requests_enter_before_batches_end_and_replicas_go_by_index():
    rows = [request(0.0, 16, 2), request(0.0, 16, 2), request(TICK_S, 16, 1), request(TICK_S, 16, 1)]
    run = Replicas(rows, Named(1, 0, 0, 1), num_steps=9).drain()
    views = run.router.views
    assert [view.now_s for view in views] == [0.0, 0.0, TICK_S, TICK_S]
    # at one tick both replicas' first batches are still under way, and the third request is at replica 0
    assert views[2].replicas.num_running.tolist() == [1, 1] and views[2].replicas.num_waiting.tolist() == [0, 0]
    assert views[3].replicas.num_waiting.tolist() == [1, 0]
    # they were there when the next batches began: all were done two ticks after
    assert run.requests["first_token_s"].tolist() == [TICK_S, TICK_S, 2 * TICK_S, 2 * TICK_S]
    assert run.requests["resolved_s"].tolist() == [2 * TICK_S] * 4
    assert run.cluster.state.resolved[0, :4].tolist() in ([1, 2, 0, 3], [2, 1, 3, 0])
    assert set(run.cluster.state.resolved[0, :2].tolist()) == {1, 2}, "replica 0 comes first"


# --- reports


def state_of(run, j):
    """What replica `j` would report now, from its lists."""
    state, sim = run.cluster.state, run.sims[j]
    waiting = run.requests[state.waiting[j][: sim.num_waiting]]
    running = run.requests[state.running[j][: sim.num_running]]
    left = np.maximum(running["prefill_tokens"] - running["num_computed_tokens"], 0)
    return {
        "num_waiting": len(waiting),
        "num_running": len(running),
        "num_strict": int((waiting["slo_class"] == 0).sum() + (running["slo_class"] == 0).sum()),
        "free_blocks": int(sim.free_blocks),
        "kv_usage": 1.0 - sim.free_blocks / sim.total_blocks,
        "prompt_tokens_left": float(waiting["prefill_tokens"].sum() + left.sum()),
    }


def busy_rows(count=60, seed=5):
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(0.01, count))
    return [
        request(float(t), int(rng.integers(9, 200)), int(rng.integers(1, 30)), rng.choice([0.1, 0.5])) for t in times
    ]


def test_fresh_reports_are_the_state():
    run = Replicas(busy_rows(), devices=DEVICES, num_replicas=3, max_num_seqs=4, patience_s=1.0)
    router, decisions = Anywhere(1), 0
    while (view := run.decide()) is not None:
        for j, seen in enumerate(view.replicas):
            for name, value in state_of(run, j).items():
                assert seen[name] == pytest.approx(value), name
            assert seen.age_s == 0.0 and seen.num_dispatched == 0
        run.send(router.route(view))
        decisions += 1
    assert decisions == 60


@pytest.mark.parametrize("staleness_s", [0.03, 0.1, 2.0])
def test_reports_have_an_age(staleness_s):
    """Between two reports of a replica only what was sent there since changes; each has a phase of its own."""
    n = 3
    run = Replicas(busy_rows(), devices=DEVICES, num_replicas=n, max_num_seqs=4, router_staleness_s=staleness_s)
    states, sent, due = [{} for _ in range(n)], [[] for _ in range(n)], np.full(n, -1.0)
    router, ages = Anywhere(1), []
    kept = [state_of(run, j) for j in range(n)]

    def notice(until_s):
        """What was so up to `until_s` is what reports that fell due by then tell."""
        for j in range(n):
            number = math.floor(until_s / staleness_s - j / n)
            if number >= 0 and number > due[j]:
                due[j], states[j], sent[j] = number, kept[j], []

    for _ in range(5000):
        code = run.event()
        notice(run.now_s)
        if code == OVER:
            break
        if code == ROUTE:
            view = run.cluster.view()
            for j, seen in enumerate(view.replicas):
                report_s = (due[j] + j / n) * staleness_s if due[j] >= 0 else 0.0
                assert seen.age_s == pytest.approx(view.now_s - report_s, abs=1e-12)
                assert seen.num_dispatched == len(sent[j])
                told = states[j] or {"num_waiting": 0, "num_running": 0, "num_strict": 0, "prompt_tokens_left": 0}
                assert seen.num_running == told["num_running"]
                assert seen.num_waiting == told["num_waiting"] + len(sent[j])
                tokens = sum(int(run.requests[r]["prompt_tokens"]) for r in sent[j])
                assert seen.prompt_tokens_left == told["prompt_tokens_left"] + tokens
                strict = sum(int(run.requests[r]["slo_class"] == 0) for r in sent[j])
                assert seen.num_strict == told["num_strict"] + strict
                ages.append(seen.age_s)
            j = router.route(view)
            run.send(j)
            if run.phases[view.index] != REJECTED:  # by a replica that cannot hold its output
                sent[j].append(view.index)
        kept = [state_of(run, j) for j in range(n)]
    assert len(ages) == 60 * n and (max(ages) <= staleness_s * 2 or staleness_s == 2.0)


@pytest.mark.parametrize("staleness_s", [0.0, 0.3])
def test_what_is_cached_is_found_as_by_looking_at_every_block(staleness_s):
    found = 0
    for seed in range(3):
        rng = np.random.default_rng(seed)
        run = Replicas(
            random_sessions(rng, 40),
            devices=[DEVICES[j % 3] for j in range(3)],
            num_replicas=3,
            prefix_caching=True,
            router_staleness_s=staleness_s,
            max_model_len=500,
        )
        router = Anywhere(seed)
        while (view := run.decide()) is not None:
            state, nodes, r = run.cluster.state, run.cluster.nodes, view.index
            for k in range(3):
                blocks = nodes.identities[k] if staleness_s else state.blocks[k]
                sim, count = state.sims[k], 0
                if staleness_s == 0.0 or nodes.nodes[k].report >= 0:
                    for i in range((int(run.requests[r]["prefill_tokens"]) - 1) >> int(sim.block_bits)):
                        owner = owner_of(state.prefixes[0], r, i, sim.block_bits)
                        if blocks[slot_of(blocks, sim.table_mask, owner, i), NAMED] < 0:
                            break
                        count += 1
                assert view.replicas[k].cached_tokens == count << sim.block_bits
                assert view.replicas[k].uncached_tokens == run.requests[r]["prefill_tokens"] - (count << sim.block_bits)
                found += count
            run.send(router.route(view))
    assert found > 50


# --- transfers and failures

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


# --- the same seed, the same run


def digest(num_envs=1, env=0):
    """Hash of a run with failures, noise, reports of an age and a router that draws."""
    world = ClusterScenario(
        **{
            **scenario("default", num_requests=40, warmup_s=0.0, qps=6.0, num_kv_blocks=700, patience_s=20.0).to_dict(),
            "num_replicas": 3,
            "router_staleness_s": 0.2,
            "replica_failures": ((1, 3.0, 6.0),),
            "drain_s": 5.0,
        }
    )
    given = make_table(world, 4)
    cluster = Cluster(world, 400, num_envs=num_envs, scheduler="slai")
    for i in range(num_envs):
        cluster.reset(given if i == env else make_table(world, 9), i)
    for i in range(num_envs):
        cluster.run(make_router("power-of-two"), i)
    check(cluster, env)
    lanes = cluster.lanes(env)
    parts = (cluster.state.requests[env], cluster.state.sims[lanes[0] : lanes[-1] + 1])
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def test_environments_side_by_side_are_single_ones():
    assert digest() == digest(4, 2) == digest(4, 0)


def test_compiled_and_interpreted_runs_agree():
    code = "import json, test_cluster; print(json.dumps(test_cluster.digest()))"
    assert fresh_process(code, NUMBA_DISABLE_JIT="1") == digest()


# --- routers


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


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_replicas": 0}, "num_replicas: expected"),
        ({"num_replicas": 2, "replica_profiles": ("h100-mistral-7b",)}, "replica_profiles: expected 2 names"),
        ({"num_replicas": 2, "roles": ("prefill", "prefill")}, "roles: expected at least one replica that decodes"),
        ({"num_replicas": 2, "roles": ("decode", "decode")}, "roles: expected at least one replica that computes"),
        ({"num_replicas": 2, "roles": ("prefill", "cook")}, "roles: expected both, prefill, decode"),
        ({"num_replicas": 2, "roles": ("prefill", "decode"), "prefix_caching": True}, "prefix_caching: expected False"),
        ({"router_staleness_s": -1.0}, "router_staleness_s: expected"),
        ({"router_staleness_s": math.inf}, "router_staleness_s: expected a finite"),
        ({"kv_link_bytes_per_s": 0.0}, "kv_link_bytes_per_s: expected"),
        ({"replica_failures": ((9, 1.0, 2.0),)}, "replica_failures: expected a replica from 0 to 3"),
        ({"replica_failures": ((0, 2.0, 1.0),)}, "replica_failures: expected 0 <= fails_s < back_s"),
        ({"replica_failures": ((0, 1.0, 3.0), (0, 2.0, 4.0))}, "fails again at 2 s"),
        ({"replica_failures": (1.0,)}, "replica_failures: expected"),
    ],
)
def test_bad_clusters_are_one_line(fields, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as error:
        ClusterScenario(**{**scenario("paper").to_dict(), **fields})
    assert "\n" not in str(error.value)


def test_replicas_go_by_their_schedulers_admission_rule():
    run = Replicas([request(0.0, 400, 2)], scheduler="vllm-v1")
    assert run.sims["admission"].tolist() == [ADMISSIONS.index(make_scheduler("vllm-v1").admission)] * 2
    assert make_scheduler("vllm-v1").admission != "prompt"
