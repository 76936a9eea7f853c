"""Whatever happens to replicas, nothing is lost or doubled, and the checker would notice."""

import math

import numpy as np
import pytest
from clusters import DEVICES, Anywhere, Named, Replicas, random_sessions
from helpers import request
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsched_gym.cluster.invariants import check
from llmsched_gym.engine import InvariantError
from llmsched_gym.engine.records import (
    ABANDONED,
    CANCELLED,
    FINISHED,
    PENDING,
    REFUSED,
    REJECTED,
    RUNNING,
    WAITING,
)
from llmsched_gym.registry import make_router, routers

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
