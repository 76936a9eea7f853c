"""Several replicas of one episode: they share its requests and its averages, and nothing else."""

import math

import numpy as np
from helpers import TICK_S, profile, request, table

from llmsched_gym.config import scenario
from llmsched_gym.engine import run as kernels
from llmsched_gym.engine.lifecycle import deliver, enter
from llmsched_gym.engine.load import load_table
from llmsched_gym.engine.state import Replica, allocate, env_of, episode_of, lane_of, make_handle
from llmsched_gym.scheduler import default_knobs, make_scheduler

ROWS = [request(prompt=40, output=4), request(prompt=90, output=6), request(prompt=50, output=3)]


def make(num_replicas, rows, num_envs=1):
    world = scenario("paper", watermark=0.0, num_requests=len(rows))
    replicas = num_replicas * [Replica(num_kv_blocks=100, max_num_seqs=128)]
    state = allocate(num_envs, len(rows), world, (profile(),), (profile(),), replicas)
    for env in range(num_envs):
        load_table(state, env, table(rows), world, replicas)
    state.knobs[:] = default_knobs()
    return state


def test_a_lane_knows_its_environment():
    state = make(3, ROWS, num_envs=2)
    assert [env_of(state, k) for k in range(6)] == [0, 0, 0, 1, 1, 1]
    assert len(state.sims) == len(state.waiting) == 6 and len(state.episodes) == len(state.requests) == 2


def test_requests_are_delivered_to_the_lane_that_is_named():
    state = make(2, ROWS, num_envs=2)
    of = episode_of(state, 1)
    assert state.requests[1]["prompt_tokens"].tolist() == [0, 0, 0]
    for r, k in ((0, 2), (1, 3), (2, 2)):
        assert enter(of, r)
        deliver(lane_of(state, k), r)
    assert state.requests[1]["prompt_tokens"].tolist() == [40, 90, 50]
    assert state.sims["num_waiting"].tolist() == [0, 0, 2, 1]
    assert state.waiting[2, :2].tolist() == [0, 2] and state.waiting[3, 0] == 1
    assert state.episodes["num_arrived"].tolist() == [0, 3]


def test_replicas_run_on_their_own_profiles():
    state = make(2, ROWS)
    for name in ("linear_s", "own_linear_s"):
        state = state._replace(**{name: np.concatenate([getattr(state, name), 3.0 * getattr(state, name)])})
    for name in ("coef_s", "own_coef_s"):
        state = state._replace(**{name: np.repeat(getattr(state, name), 2, axis=0)})
    state.sims[1].profile = 1
    of = episode_of(state, 0)
    for r, k in ((0, 0), (1, 1)):
        assert enter(of, r)
        deliver(lane_of(state, k), r)
    state.worlds[0].next_arrival_s = math.inf
    handle, kernel = make_handle(state), make_scheduler("sarathi").kernel
    for k in (0, 1):
        kernels.with_scheduler("run")(handle, k, kernel, 1, 100)
    assert state.sims["last_batch_s"].tolist() == state.sims["last_predicted_s"].tolist() == [TICK_S, 3.0 * TICK_S]


def run_alone(rows):
    state = make(1, rows)
    handle = make_handle(state)
    kernels.start(handle, 0)
    kernels.with_scheduler("run")(handle, 0, make_scheduler("sarathi").kernel, 100, 100)
    return state


def test_a_replica_serves_its_own_requests_as_an_engine_of_its_own_would():
    state = make(2, ROWS)
    of = episode_of(state, 0)
    for r, k in enumerate((0, 1, 0)):
        assert enter(of, r)
        deliver(lane_of(state, k), r)
    state.worlds[0].next_arrival = len(ROWS)  # they have been routed
    state.worlds[0].next_arrival_s = math.inf
    handle, kernel = make_handle(state), make_scheduler("sarathi").kernel
    step = kernels.with_scheduler("run")
    while state.worlds[0].num_unresolved:  # one batch after the other
        for k in (0, 1):
            if state.sims[k].num_waiting + state.sims[k].num_running:
                step(handle, k, kernel, 1, 100)
    for k, mine in ((0, [0, 2]), (1, [1])):
        alone = run_alone([ROWS[r] for r in mine])
        for name in ("first_token_s", "resolved_s", "num_output_tokens", "first_scheduled_s"):
            assert state.requests[0][name][mine].tolist() == alone.requests[0][name].tolist(), name
        for name in ("clock_s", "num_batches", "free_blocks", "tokens_emitted", "num_finished"):
            assert state.sims[k][name] == alone.sims[0][name], name
    assert np.sort(state.resolved[0]).tolist() == [0, 1, 2]
    assert state.sims[1].clock_s == 6 * TICK_S
