"""KV blocks of other sizes than vLLM's default: what is held, admitted, rejected and evicted."""

import numpy as np
import pytest
from helpers import Run, profile, request

from llmsched_gym.config import ConfigError, blocks_needed, scenario
from llmsched_gym.engine import Engine
from llmsched_gym.engine.blocks import blocks_for
from llmsched_gym.fluid import fluid_capacity
from llmsched_gym.workload import make_table


def test_tokens_need_whole_blocks():
    assert [blocks_needed(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert blocks_needed(np.array([0, 64, 65]), 64).tolist() == [0, 1, 2]
    sim = Run("sarathi", [request(prompt=100, output=3)], block_size=64, num_kv_blocks=8).sim
    assert [blocks_for(sim, n) for n in (0, 64, 65)] == [0, 1, 2]


@pytest.mark.parametrize(("size", "held"), [(1, [100, 101]), (16, [7, 7]), (64, [2, 2]), (128, [1, 1])])
def test_a_request_holds_whole_blocks(size, held):
    run = Run("sarathi", [request(prompt=100, output=3)], block_size=size, num_kv_blocks=512)
    found = []
    for _ in range(2):
        run.step()
        found.append(int(run.requests[0].num_blocks))
    assert found == held
    assert run.engine.view().block_size == size


def test_a_decode_takes_a_block_when_its_last_is_full():
    run = Run("sarathi", [request(prompt=64, output=3)], block_size=64, num_kv_blocks=8)
    run.step()
    assert run.requests[0].num_blocks == 1
    run.step()
    assert run.requests[0].num_blocks == 2


def test_what_the_blocks_cannot_hold_is_rejected():
    rows = [request(prompt=126, output=2), request(prompt=126, output=3)]
    run = Run("sarathi", rows, block_size=64, num_kv_blocks=2)
    run.drain()
    assert (run.episode.num_rejected, run.sim.num_finished) == (1, 1)


@pytest.mark.parametrize("size", [1, 32, 128])
@pytest.mark.parametrize("policy", ["slai", "vllm-v1", "rad", "random", "orca"])
def test_the_rules_hold_where_memory_is_short(policy, size):
    world = scenario("default", num_requests=40, warmup_s=0.0, qps=4.0, strict_share=0.2)
    fields = {"block_size": size, "num_kv_blocks": 9000 // size, "watermark": 0.01, "patience_s": 9.0}
    run = Run(policy, make_table(world, 2), device=profile(60.0), **fields)
    run.drain(4000)
    assert run.sim.num_finished > 2


def test_a_profile_has_as_many_tokens_in_blocks_of_any_size():
    blocks = [Engine(scenario("paper", block_size=size), 1).num_kv_blocks for size in (16, 64)]
    assert blocks[1] == blocks[0] // 4
    assert (
        fluid_capacity(scenario("paper", block_size=64)).work.held_blocks
        < fluid_capacity(scenario("paper")).work.held_blocks
    )


@pytest.mark.parametrize("size", [0, 24, 16.0, True])
def test_a_size_is_a_power_of_two(size):
    with pytest.raises(ConfigError, match="block_size: expected a"):
        scenario("paper", block_size=size)


def test_the_transformers_backend_has_its_own():
    with pytest.raises(ConfigError, match="block_size: expected 16"):
        scenario("paper", backend="transformers", model="random:tiny", block_size=32)
