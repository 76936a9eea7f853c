"""The fluid capacity where requests come in sessions: the work of a session, less what a cache finds of it."""

import math

import numpy as np
import pytest
from test_sessions import hand
from test_trace_sessions import mooncake
from test_traces import SIMULATED, write

from llmsched_gym.config import Scenario
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.fluid import fluid_capacity
from llmsched_gym.fluid.work import mean_work, scenario_work


def test_the_work_of_a_session_by_hand(tmp_path):
    """Prompts of 50 and 62 with outputs of 7; roots find 32 of 40 shared tokens, turns 48 of 57."""
    world = Scenario(workload=hand(tmp_path))
    plain = scenario_work(world, 1000)
    assert (plain.prefill_tokens, plain.decode_tokens, plain.batches) == (112.0, 12.0, 14.0)
    assert plain.pairs == (50 * 51 + 62 * 63) / 2
    assert plain.held_blocks == 4 + 6 * 4 + 4 + (2 * 4 + 4 * 5)  # 50 to 56 and 62 to 68 tokens, in blocks of 16
    found = scenario_work(world.replace(prefix_caching=True), 1000)
    assert found.prefill_tokens == 50 - 32 + 62 - 48
    assert found.pairs == pytest.approx(plain.pairs - (32 * 33 + 48 * 49) / 2, rel=1e-9)
    assert found.decode_tokens == 12.0 and found.kv_tokens == plain.kv_tokens
    assert found.held_blocks == plain.held_blocks - 14 * 2  # in each batch others hold the system prompt, too


def test_the_work_of_traces(tmp_path):
    waits = scenario_work(Scenario(trace=str(write(tmp_path, SIMULATED))), 1000)
    assert (waits.prefill_tokens, waits.decode_tokens) == ((10 + 20 + 30) / 2, (1 + 2 + 3) / 2)  # of two sessions
    path = write(tmp_path, mooncake((0, 600, 1, [1, 2]), (1000, 700, 1, [1, 3])))
    kept = Scenario(trace=str(path), prefix_caching=True)
    assert scenario_work(kept, 1000).prefill_tokens == (600 + 700 - 512) / 2
    for apart in (kept.replace(prefix_caching=False), kept.replace(trace_arrivals="poisson")):
        assert scenario_work(apart, 1000) == mean_work(np.array([600, 700]), np.array([1, 1]), apart, 1000)


@pytest.mark.parametrize("caching", [False, True])
def test_nobody_serves_more_sessions(caching):
    """Sessions that come much too fast, all served: never faster than the bound, and not far below it."""
    world = Scenario(
        workload="chat",
        profile="h100-mistral-7b",
        prefix_caching=caching,
        qps=40.0,
        num_requests=10_000,
        warmup_s=0.0,
        drain_s=math.inf,
        arrivals_continue=False,
        patience_s=math.inf,
        jitter=0.0,
    )
    bound = fluid_capacity(world)
    sim = simulate(world, "sarathi", 0).sim
    assert sim.num_finished >= 10_000
    served = sim.num_finished / 3.57 / sim.clock_s
    assert 0.3 * bound.qps < served < bound.qps
