"""The fluid program over compositions: by hand, beside the additive one, and against runs in overload."""

import dataclasses
import math

import numpy as np
import pytest
from helpers import profile

from llmsched_gym.config import scenario
from llmsched_gym.cost import PROFILES, load_profile
from llmsched_gym.cost.surface import Surface
from llmsched_gym.fluid import exclusive_capacity, exclusive_factor, fluid_capacity, mean_work, work
from llmsched_gym.fluid.mixed import attention, by_composition, compositions, numbers_of_decodes
from llmsched_gym.theory import stability

PAPER = scenario("paper", num_kv_blocks=15_000)
ADDITIVE = [name for name in PROFILES if load_profile(name).surface is None]
MEASURED = [name for name in PROFILES if load_profile(name).surface is not None]


def flat(decode_ms, chunk_ms, hybrid_ms, **fields):
    """A surface whose tables are the same everywhere."""
    shape = {"sequences": (1, 2), "context": (1, 2), "chunk": (1, 2), "prefix": (0, 1, 2)}
    tables = {
        "decode_ms": ((decode_ms,) * 2,) * 2,
        "chunk_ms": ((chunk_ms,) * 3,) * 2,
        "hybrid_ms": (((hybrid_ms,) * 2,) * 2,) * 2,
        "floor_ms": (0.0, 0.0),
    }
    return Surface(**{**shape, **tables, **fields})


def device(surface, **fields):
    return dataclasses.replace(profile(10.0, tokens=(1, 8192), **fields), surface=surface)


def one_length(monkeypatch, p, d):
    monkeypatch.setattr(work, "lengths", lambda scenario: (np.array([p]), np.array([d])))


def test_by_hand(monkeypatch):
    """Prompts of one token and 100 decodes each, at most ten requests in a batch."""
    one_length(monkeypatch, 1, 101)
    world = PAPER.replace(max_num_seqs=10, max_num_batched_tokens=10, num_kv_blocks=100_000)
    # ten decodes alone take 10 + 5 ms, ten prompts 10 + 2, nine decodes and a prompt 10 + 2 + 5 * factor
    base = device(flat(5.0, 2.0, 5.0, launch_ms=2.0))
    apart_ms = 100 / 10 * 15 + 12 / 10
    assert exclusive_capacity(world, base).qps == pytest.approx(1000 / apart_ms)
    free = fluid_capacity(world, base.with_mixing(0.0))
    assert free.qps == pytest.approx(1000 / (12 + 91 / 10 * 15))
    assert free.mixed_share == pytest.approx(9 / 100) and free.batch_tokens == (10,)
    assert fluid_capacity(world, base).qps == pytest.approx(1000 / apart_ms)
    # nine decodes alone are 9 / 10 of 15 ms, a prompt alone a tenth of 12: together 2.7 of the 5 are worth it
    assert exclusive_factor(world, base) == pytest.approx(2.7 / 5, abs=0.011)
    dear = fluid_capacity(world.replace(max_num_batched_tokens=20), base.with_mixing(8.0))
    assert dear.mixed_share == 0.0 and dear.limited_by == "max_num_seqs"


def test_prompts_alone(monkeypatch):
    one_length(monkeypatch, 160, 1)
    world = PAPER.replace(max_num_batched_tokens=160)
    found = fluid_capacity(world, device(flat(5.0, 2.0, 5.0, launch_ms=2.0, chunk_batch_ms=3.0, sequence_ms=(1.0,))))
    assert found.qps == pytest.approx(1000 / (10 + 2 + 3 + 1)) and found.mixed_share == 0.0
    assert found.linear_share == pytest.approx(14 / 16)


@pytest.mark.parametrize("name", MEASURED)
def test_a_composition_takes_what_the_profile_predicts(name):
    """With a prompt of 1,000 tokens and an output of 1 + 2, contexts are 1,001.5 and a chunk of 200 is behind 400."""
    own = load_profile(name)
    work = mean_work(np.array([1000]), np.array([3]), PAPER, 15_000)
    for n, c in ((0, 200), (3, 0), (3, 200), (70, 700), (1, 1000)):
        head_s, rest_s = attention(own, work, np.array([float(n)]), np.array([float(c)]))
        # whole contexts around the mean; every one as long as the other, for the longest is left out
        chunks = [((1000 - c) // 2, c)] if c else []
        around = [own.predict_s(chunks, [k] * n) for k in (1001, 1002)]
        linear_s = own.linear_table_s(2048)[n + c]
        assert float(head_s[0] + rest_s[0] + linear_s) == pytest.approx(np.mean(around), rel=2e-4)


@pytest.mark.parametrize("name", ADDITIVE)
def test_without_a_price_of_mixing_it_is_the_additive_one(name):
    base = load_profile(name)
    additive, found = fluid_capacity(PAPER, base), fluid_capacity(PAPER, base.with_mixing(1.0))
    # chunks read earlier ones' KV again, which the additive program leaves out
    assert additive.qps * 0.99 < found.qps <= additive.qps * (1 + 1e-9)
    assert found.mean_batch_tokens == pytest.approx(additive.mean_batch_tokens, rel=0.05)
    assert found.limited_by == additive.limited_by
    assert found.memory_price == pytest.approx(additive.memory_price, abs=0.03)
    assert found.linear_share == pytest.approx(additive.linear_share, abs=0.01)
    assert (additive.mixed_share, found.mixed_share) == (None, pytest.approx(1.0))


def test_it_falls_with_the_price_of_mixing_until_exclusive_batches_are_best():
    base = load_profile("rtx6000ada-mistral-7b")
    edge = exclusive_factor(PAPER)
    assert 1.3 < edge < 1.45
    alone = exclusive_capacity(PAPER)
    factors = [0.5, 1.0, 1.2, edge - 0.05, edge + 0.01, 2.0, 4.0]
    found = [fluid_capacity(PAPER, base.with_mixing(f)) for f in factors]
    rates = [fluid.qps for fluid in found]
    assert rates[0] > rates[1] > rates[2] > rates[3] > alone.qps
    assert rates[4:] == pytest.approx([alone.qps] * 3, rel=1e-6)
    assert [fluid.mixed_share for fluid in found[4:]] == pytest.approx([0.0] * 3, abs=1e-6)
    assert alone.mixed_share == 0.0


def test_a_factor_that_no_price_reaches(monkeypatch):
    one_length(monkeypatch, 16, 101)
    free = device(flat(5.0, 2.0, 0.0))  # whatever it is multiplied with
    assert exclusive_factor(PAPER.replace(max_num_seqs=10), free) == math.inf


def test_scale_and_noise_take_their_share():
    base = load_profile(MEASURED[0])
    one = fluid_capacity(PAPER, base).qps
    assert fluid_capacity(PAPER.replace(cost_scale=1.25), base).qps == pytest.approx(one / 1.25)
    assert fluid_capacity(PAPER, base.scaled(2.0)).qps == pytest.approx(one / 2, rel=1e-6)


def test_prices_are_elasticities():
    world = PAPER.replace(profile="rtxpro6000-llama-3.1-8b-vllm")
    found, more = fluid_capacity(world), fluid_capacity(world.replace(num_kv_blocks=15_150))
    assert found.limited_by == "memory"
    assert (more.qps / found.qps - 1) / 0.01 == pytest.approx(found.memory_price, rel=0.05)


def test_numbers_of_decodes_end_where_memory_does():
    found = numbers_of_decodes(88.9)
    assert found[:16].tolist() == list(range(1, 17)) and found[-1] == 88.9 and (np.diff(found) > 0).all()
    assert numbers_of_decodes(0.7).size == 0
    assert numbers_of_decodes(3.5).tolist() == [1.0, 2.0, 3.0, 3.5]
    work = mean_work(np.array([100]), np.array([50]), PAPER, 15_000)
    both = compositions(load_profile(MEASURED[0]), work, 15_000, 128, 512, exclusive=False)
    assert (both.decodes + both.chunk_tokens).max() == 512
    with pytest.raises(ValueError, match="expected a profile with a surface"):
        by_composition(PAPER, load_profile(ADDITIVE[0]), work, 15_000)


@pytest.mark.parametrize(
    ("device_name", "policies"),
    [
        ("rtx6000ada-mistral-7b-vllm", ("sarathi", "vllm-v0", "rad-512")),
        ("rtx6000ada-mistral-7b", ("sarathi", "vllm-v0", "orca")),
    ],
)
def test_nobody_serves_more_in_overload(device_name, policies):
    """Also those that never mix, which lie closest where mixing is dear."""
    base = load_profile(device_name)
    own = base if base.surface is not None else base.with_mixing(2.0)
    world = PAPER.replace(profile=device_name)
    qps = 1.1 * fluid_capacity(world, own).qps
    served = {}
    for policy in policies:
        found = stability.drift(world, policy, qps, seeds=(0, 1, 2), num_requests=8000, profile=own)
        served[policy] = 1.1 * (1 - found.mean)
    assert max(served.values()) < 1.015, served  # seeds differ in how much work they bring
    assert served["vllm-v0"] > 0.85, served
