"""Replicas behind a router: the single engine, the order of events, bad settings, and the same run again."""

import hashlib
import math
import re

import numpy as np
import pytest
from clusters import Named, Replicas, Zero, with_sessions
from helpers import TICK_S, profile, request
from test_engine_determinism import fresh_process
from test_engine_sessions import root, turn

from llmsched_gym.cluster import Cluster
from llmsched_gym.cluster.invariants import check
from llmsched_gym.config import ADMISSIONS, ConfigError, scenario
from llmsched_gym.config.cluster import ClusterScenario
from llmsched_gym.engine import Engine
from llmsched_gym.engine.rows import rows_of
from llmsched_gym.registry import make_router
from llmsched_gym.scheduler import install, make_scheduler
from llmsched_gym.workload import make_table


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
