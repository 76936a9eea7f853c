"""Batches formed while the one before them executes, by hand; `test_engine_properties` has random worlds of them.

`benchmarks/conformance_vllm.py --async` compares them with vLLM's own.
"""

import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers import TICK_S, Run, Scripted, request, table

from llmsched_gym.config import ClusterScenario, ConfigError, EnvConfig, RouteConfig, scenario
from llmsched_gym.engine import Batch, Engine, Execution, check
from llmsched_gym.engine.records import FINISHED, RUNNING, WAITING
from llmsched_gym.env.single import LLMSchedEnv
from llmsched_gym.env.vector import LLMSchedVectorEnv
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.scheduler import install, make_scheduler

A_TICK_IN = TICK_S / 2


def lagging(policy, rows, *, known=True, **fields):
    """A run with `async_lag`; with `known`, clients say how many tokens they want."""
    given = table(rows)
    if known:
        given = replace(given, max_output_tokens=given.output_tokens)
    return Run(policy, given, async_lag=True, **fields)


def test_a_batch_is_formed_before_the_tokens_of_the_one_before_it():
    run = lagging("vllm-v1", [request(prompt=40, output=3)])
    assert run.step() == {0: 40}  # nothing was in flight: it takes off at once
    row = run.requests[0]
    assert (run.clock_s, row.num_computed_tokens, row.num_output_tokens) == (0.0, 40, 0)
    assert run.step() == {0: 1}
    assert (run.clock_s, row.num_computed_tokens, row.num_output_tokens) == (TICK_S, 41, 1)
    assert run.step() == {0: 1}
    assert run.step() == {}  # three tokens were asked for, and the third is in flight
    assert (run.clock_s, row.phase, row.resolved_s) == (3 * TICK_S, FINISHED, 3 * TICK_S)
    assert run.gaps(0) == [TICK_S, TICK_S]


def test_a_stop_token_that_nobody_foresees_costs_one_token():
    run = lagging("vllm-v1", [request(prompt=40, output=3)], known=False)
    assert run.steps(4) == [{0: 40}, {0: 1}, {0: 1}, {0: 1}]
    assert (run.requests[0].phase, run.clock_s) == (FINISHED, 3 * TICK_S)
    assert (run.sim.free_blocks, run.sim.tokens_emitted) == (run.sim.total_blocks, 3)
    # the last batch executes all the same, and emits nothing
    assert run.sim.in_flight
    run.engine.decide(run.scheduler)
    run.engine.execute()
    assert (check(run.engine.state), run.sim.num_batches, run.sim.tokens_emitted) == (4 * TICK_S, 4, 3)


def test_the_limit_of_the_model_is_foreseen_too():
    run = lagging("vllm-v1", [request(prompt=40, output=3)], known=False, max_model_len=43)
    assert run.drain() == [{0: 40}, {0: 1}, {0: 1}, {}]


@pytest.mark.parametrize("known", [True, False])
def test_a_slot_is_free_one_batch_later(known):
    rows = [request(prompt=16, output=2), request(prompt=16, output=1)]
    assert Run("vllm-v1", rows, max_num_seqs=1).drain() == [{0: 16}, {0: 1}, {1: 16}]
    between = {} if known else {0: 1}
    assert lagging("vllm-v1", rows, known=known, max_num_seqs=1).steps(4) == [{0: 16}, {0: 1}, between, {1: 16}]


def test_blocks_are_free_one_batch_later():
    rows = [request(prompt=30, output=2), request(prompt=30, output=2)]
    assert lagging("vllm-v1", rows, num_kv_blocks=3).steps(5) == [{0: 30}, {0: 1}, {}, {1: 30}, {1: 1}]


def test_an_arrival_comes_one_batch_later():
    rows = [request(prompt=16, output=9), request(A_TICK_IN, prompt=16, output=2)]
    assert Run("vllm-v1", rows).steps(2) == [{0: 16}, {0: 1, 1: 16}]
    run = lagging("vllm-v1", rows)
    # the batch that executes from the first tick on was formed before the request came
    assert run.steps(3) == [{0: 16}, {0: 1}, {0: 1, 1: 16}]
    run.step()
    assert run.requests[1].first_token_s == 3 * TICK_S


def test_a_preempted_request_keeps_its_token_in_flight():
    run = lagging(Scripted({0: 40}, {0: 1}, Batch(preempt=[0]), {0: 42}), [request(prompt=40, output=5)])
    run.steps(2)
    assert run.step() == {}
    row = run.requests[0]
    assert (row.phase, row.num_output_tokens, row.prefill_tokens) == (WAITING, 2, 42)
    assert (run.sim.waiting_tokens, run.sim.num_preemptions, run.clock_s) == (42, 1, 2 * TICK_S)
    assert run.step() == {0: 42}
    assert (row.phase, row.num_computed_tokens) == (RUNNING, 42)


def test_a_preempted_request_may_end_with_its_token_in_flight():
    run = lagging(Scripted({0: 40}, {0: 1}, Batch(preempt=[0])), [request(prompt=40, output=2)], known=False)
    run.steps(3)
    assert (run.requests[0].phase, run.sim.num_waiting, run.sim.waiting_tokens) == (FINISHED, 0, 0)


def test_who_ends_is_preempted_like_any_other():
    # request 1 came last and ends with the batch in flight: request 0 takes its block all the same
    rows = [request(prompt=15, output=9), request(prompt=15, output=2)]
    run = lagging("vllm-v1", rows, num_kv_blocks=2)
    assert run.steps(2) == [{0: 15, 1: 15}, {0: 1, 1: 1}]
    assert (run.sim.num_running, run.sim.num_ending) == (1, 1)
    assert run.step() == {0: 1}
    assert (run.requests[1].phase, run.requests[1].num_preemptions) == (FINISHED, 1)


def test_a_decode_in_flight_is_not_late_for_the_token_that_is_coming():
    """A scheduler sees its token as emitted when the batch is predicted to land."""
    seen = []

    class Watching(Scripted):
        def schedule(self, view):
            seen.append((view.now_s, view.running.num_output_tokens.tolist(), view.running.last_token_s.tolist()))
            return super().schedule(view)

    run = lagging(Watching({0: 40}, {0: 1}, {}), [request(prompt=40, output=9)])
    run.steps(3)
    assert seen == [(0.0, [], []), (0.0, [1], [TICK_S]), (TICK_S, [2], [2 * TICK_S])]
    assert run.requests[0].last_token_s == 2 * TICK_S


def test_the_time_of_a_decision_passes_beside_the_batch():
    run = lagging("vllm-v1", [request(prompt=40, output=3)])
    run.sim.decision_s = TICK_S / 4
    run.drain()
    # the first batch waits for its decision, the others' were made while the one before them executed
    assert run.requests[0].resolved_s == 3 * TICK_S + TICK_S / 4


def test_a_recording_is_asked_for_the_same_batches():
    class Device:
        def __init__(self):
            self.batches = []

        def execute(self, batch):
            self.batches.append(dict(zip(batch.request.tolist(), batch.num_computed.tolist(), strict=True)))
            return Execution(TICK_S)

    device = Device()
    lagging("vllm-v1", [request(prompt=40, output=3)], backend=device).drain()
    assert device.batches == [{0: 0}, {0: 40}, {0: 41}]


def last_rows(policy):
    """Requests at the end of a run, and its clock."""
    world = scenario("default", qps=1.8, num_requests=40, warmup_s=0.0, async_lag=True, num_kv_blocks=1500)
    simulation = simulate(world, policy, 0)
    rows = simulation.requests
    return [float(np.nansum(rows[name])) for name in ("resolved_s", "lateness_s", "max_gap_s", "num_preemptions")]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["vllm-v1", "on-time"])
def test_compiled_and_plain_kernels_agree(policy):
    code = f"import test_engine_async; print(test_engine_async.last_rows({policy!r}))"
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    plain = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert plain.stdout.strip() == str(last_rows(policy))


@pytest.mark.parametrize("action", ["knobs", "preset", "priority"])
def test_environments_step_under_the_checker(action):
    env = LLMSchedEnv(async_lag=True, action=action, horizon_s=5.0)
    env.reset(seed=0)
    env.action_space.seed(0)
    state, clock_s, over, flights = env.unwrapped.core.engine.state, -math.inf, False, 0
    while not over:
        _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        over = terminated or truncated
        clock_s = check(state, 0, clock_s)
        flights += int(state.sims[0].in_flight)
        assert math.isfinite(reward)
    assert flights > 10


def test_vector_environments_are_single_ones():
    fields = {"async_lag": True, "horizon_s": 3.0}
    vector, single = LLMSchedVectorEnv(2, **fields), LLMSchedEnv(**fields)
    vector.reset(seed=[5, 6])
    observation, _ = single.reset(seed=6)
    action = np.zeros(single.action_space.shape, np.int64)
    for _ in range(30):
        observation, reward, *_ = single.step(action)
        observations, rewards, *_ = vector.step(np.stack([action, action]))
        np.testing.assert_array_equal(observations[1], observation)
        assert rewards[1] == reward


def test_it_says_where_it_does_not_go():
    for kind, fields, what in (
        (scenario, {"prefix_caching": True}, "prefix_caching=True"),
        (EnvConfig, {"action": "request"}, "action='request'"),
        (ClusterScenario, {}, "replicas"),
        (RouteConfig, {}, "replicas"),
        (EnvConfig, {"backend": "transformers", "model": "random:tiny", "jitter": 0.0}, "backend='transformers'"),
    ):
        with pytest.raises(ConfigError, match=f"^async_lag: expected False .*{what}, got True$"):
            kind("paper", async_lag=True, **fields) if kind is scenario else kind(async_lag=True, **fields)
    with pytest.raises(ConfigError, match=r"^async_lag: expected True or False, got 1$"):
        scenario("paper", async_lag=1)


def test_a_backend_cannot_end_requests():
    class Ends:
        def execute(self, batch):
            return Execution(TICK_S, ended=[0])

    world = scenario("paper", async_lag=True, watermark=0.0)
    engine = Engine(world, 1, backend=Ends())
    engine.reset(table([request()]))
    scheduler = make_scheduler("vllm-v1")
    install(scheduler, engine.state)
    with pytest.raises(ConfigError, match=r"^async_lag: expected False with a backend that ends requests, got True$"):
        engine.step(scheduler)
