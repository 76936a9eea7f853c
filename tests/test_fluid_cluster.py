"""The fluid capacity of a cluster: sums over replicas, the least of two pools and the link, and nobody above it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from helpers import profile

from llmsched_gym.cluster.core import Cluster
from llmsched_gym.config import CLUSTER_SUITES, ClusterScenario, ConfigError, scenario
from llmsched_gym.cost import load_profile
from llmsched_gym.fluid import cluster_fluid, fluid_capacity
from llmsched_gym.registry import make_router
from llmsched_gym.workload import make_table

MS = 1000  # tokens/s of the device by hand: a token takes a millisecond


@pytest.fixture
def world(tmp_path):
    """Prompts of 100 tokens and outputs of 11 on devices of a millisecond a token: 100 ms and 10 ms of work."""
    lengths = tmp_path / "lengths.json"
    lengths.write_text(
        json.dumps(
            {
                "name": "constant",
                "source": "by hand",
                "max_total_tokens": 200,
                "prompt": {"probs": [0, 1], "tokens": [100, 100]},
                "output": {"probs": [0, 1], "tokens": [[11, 11]]},
            }
        )
    )
    device = tmp_path / "device.json"
    profile((1.0, 1000.0), tokens=(1, 1000), kv_blocks=10_000).to_json(device)
    return ClusterScenario(
        workload=str(lengths),
        profile=str(device),
        num_replicas=1,
        max_num_seqs=500,
        max_num_batched_tokens=1000,
        jitter=0,
    )


def split(world, prefill=0, decode=0, both=0, **fields):
    roles = ("prefill",) * prefill + ("decode",) * decode + ("both",) * both
    return cluster_fluid(world.replace(num_replicas=len(roles), roles=roles, **fields))


def test_pools_by_hand(world):
    assert fluid_capacity(world).qps == pytest.approx(MS / 110, rel=1e-6)
    one = split(world, prefill=1, decode=1)
    assert (one.qps, one.limited_by) == (pytest.approx(10.0, rel=1e-6), "prefill")
    assert (one.prefill_qps, one.decode_qps) == (pytest.approx(10.0), pytest.approx(100.0))
    many = split(world, prefill=12, decode=1)
    assert (many.qps, many.limited_by) == (pytest.approx(100.0, rel=1e-6), "decode")
    assert len(one.used) == len(many.used) == 1
    lent = split(world, prefill=1, both=1)  # a tenth of its time decodes for the other
    assert lent.qps == pytest.approx(10.0 + 0.9 * MS / 110, rel=1e-6)
    unused = split(world, decode=1, both=1)  # nobody has anything to hand over
    assert (unused.qps, unused.limited_by) == (pytest.approx(MS / 110, rel=1e-6), "replicas")


def test_the_link_ends_what_blocks_on_their_way_leave_no_room_for(world):
    """100 tokens are 6.25 of 10,000 blocks: 1,600 requests can be on their way."""
    bytes_per_token = load_profile(world.profile).model.kv_bytes_per_token
    slow = split(world, prefill=1, decode=1, kv_link_bytes_per_s=100 * bytes_per_token / 320.0)  # 320 s a request
    assert (slow.qps, slow.limited_by) == (pytest.approx(1600 / 320.0), "link")
    fast = split(world, prefill=1, decode=1, kv_link_bytes_per_s=100 * bytes_per_token)
    assert fast.limited_by == "prefill" and fast.link_qps == pytest.approx(1600.0)


def test_outputs_of_one_token_leave_nothing_to_decode(world, tmp_path):
    data = json.loads(Path(world.workload).read_text())
    data["output"]["tokens"] = [[1, 1]]
    path = tmp_path / "one.json"
    path.write_text(json.dumps(data))
    found = split(world, prefill=1, decode=1, workload=str(path))
    assert found.decode_qps == math.inf and found.qps == pytest.approx(10.0, rel=1e-6)


@pytest.mark.parametrize("suite", ["cluster", "hetero"])
def test_replicas_that_do_all_work_add_up(suite):
    world = scenario(suite)
    alone = [fluid_capacity(world, load_profile(name)) for name in world.profiles]
    found, whole = cluster_fluid(world), fluid_capacity(world)
    assert found.qps == whole.qps == pytest.approx(sum(f.qps for f in alone))
    assert found.limited_by == "replicas" and found.used == tuple(alone)
    assert whole.batches_per_s == pytest.approx(sum(f.batches_per_s for f in alone))
    assert sum(whole.batch_share) == pytest.approx(1.0)
    low, high = sorted(f.memory_price for f in alone)[:: len(alone) - 1]
    assert low - 1e-9 <= whole.memory_price <= high + 1e-9


def test_a_profile_with_a_surface_has_pools_too():
    world = ClusterScenario(profile="rtxpro6000-llama-3.1-8b-vllm", num_replicas=2)
    parts = cluster_fluid(world.replace(roles=("prefill", "decode")))
    assert 0.5 * fluid_capacity(world).qps < parts.prefill_qps + parts.decode_qps < math.inf
    assert parts.qps == min(parts.prefill_qps, parts.decode_qps)


@pytest.mark.parametrize("suite", list(CLUSTER_SUITES))
def test_rates_of_the_suites_are_shares_of_the_capacity(suite):
    world = scenario(suite)
    capacity = fluid_capacity(world).qps
    assert world.qps_range == pytest.approx((0.6 * capacity, 1.1 * capacity), rel=0.02)


@pytest.mark.parametrize("suite", ["cluster", "disagg"])
def test_nobody_serves_more(suite):
    """Requests that come twice as fast as they can be served, all served."""
    world = scenario(suite)
    bound = fluid_capacity(world).qps
    fields = {"patience_s": math.inf, "jitter": 0.0, "num_requests": 6000, "warmup_s": 0.0, "drain_s": math.inf}
    world = world.replace(qps=2.0 * bound, arrivals_continue=False, arrivals="poisson", **fields)
    table = make_table(world, 0)
    cluster = Cluster(world, len(table), scheduler="sarathi")
    cluster.reset(table)
    cluster.run(make_router("prefix-affinity"))
    requests = cluster.state.requests[0, : len(table)]
    assert (requests["phase"] == 3).all()
    num_arrivals = len(table) if table.parent is None else np.count_nonzero(table.parent < 0)
    served = num_arrivals / cluster.state.sims["clock_s"].max()
    assert 0.1 * bound < served < bound


def test_caches_and_split_roles_do_not_go_together_yet():
    with pytest.raises(ConfigError, match="prefix_caching: expected False where some replicas prefill"):
        scenario("disagg", prefix_caching=True)
