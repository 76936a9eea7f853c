"""Capacities of clusters: each pair on each number of replicas, between rates that the fluid capacity tells."""

import pytest

from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.evaluation import cluster_capacity as clusters
from llmsched_gym.evaluation.capacity import Search
from llmsched_gym.evaluation.criteria import criterion
from llmsched_gym.fluid import fluid_capacity

PAIRS = clusters.pairs(("jsq", "prefix-affinity[weight=2]"), ("slai", "on-time"))


def searching(world, policies, judged, *, qps, seeds=range(3), out=None):
    """A search whose runs attain everything up to 2 sessions/s a replica, half as many in turn."""

    def simulate(policy, runs):
        share = 1.0 if policy.startswith("jsq") else 0.5
        most = 2.0 * world.num_replicas * share
        rows = []
        for rate, _ in runs:
            attained = min(1.0, 0.95 * most / rate)
            rest = {f"{name}_by_decile": [None] * 10 for name in ("attained", "refused", "abandoned")}
            rows.append({"slo_attainment": attained, "num_refused": 0, "num_abandoned": 0, "num_requests": 1, **rest})
        return rows

    search = Search(criterion(judged), simulate, seeds, qps)
    return [search.find(policy) for policy in policies]


def test_pairs_are_named_as_evaluations_name_them():
    assert PAIRS == ["jsq+slai", "jsq+on-time", "prefix-affinity[weight=2]+slai", "prefix-affinity[weight=2]+on-time"]


def test_each_pair_on_each_number_of_replicas():
    found = clusters.by_replicas(scenario("cluster"), PAIRS, "attainment:0.95", (2, 4), search=searching)
    assert [(n, item.policy) for n, item in found] == [(n, pair) for n in (2, 4) for pair in PAIRS]
    for n, item in found:
        assert item.qps == pytest.approx(2.0 * n * (1.0 if item.policy.startswith("jsq") else 0.5), rel=0.02)


def test_rates_are_searched_past_the_fluid_capacity():
    many = clusters.with_replicas(scenario("cluster"), 16)
    assert clusters.searched_rates(many) == (0.1, pytest.approx(1.5 * fluid_capacity(many).qps))
    one = clusters.with_replicas(many, 1)
    assert clusters.searched_rates(one) == (pytest.approx(0.05 * fluid_capacity(one).qps), 16.0)
    assert clusters.searched_rates(scenario()) == (0.1, 16.0)
    fast = scenario("paper", profile="h100-mistral-7b", workload="sharegpt", cost_scale=0.25)
    assert clusters.searched_rates(fast) == (0.1, pytest.approx(1.5 * fluid_capacity(fast).qps))
    assert clusters.searched_rates(fast)[1] > 16.0
    assert clusters.searched_rates(scenario("paper", backend="transformers", model="random:tiny")) == (0.1, 16.0)


def test_results_of_several_numbers_lie_apart(tmp_path):
    folders = []

    def search(world, policies, judged, *, qps, out):
        folders.append((world.num_replicas, out))
        return []

    for numbers in ((2, 4), (4,)):
        clusters.by_replicas(scenario("cluster"), PAIRS, "paper", numbers, out=tmp_path, search=search)
    assert folders == [(2, tmp_path / "replicas-2"), (4, tmp_path / "replicas-4"), (4, tmp_path)]


@pytest.mark.parametrize(
    "suite, replicas, message",
    [
        ("default", (2,), "replicas: expected a suite of several replicas, got 'default'"),
        ("cluster", (), "replicas: expected at least one number"),
        ("cluster", (2, 0), "num_replicas: expected"),
        ("hetero", (4,), "replicas: expected 8, as suite 'hetero' names replica_profiles, got 4"),
    ],
)
def test_what_no_cluster_is(suite, replicas, message):
    def search(*given, **more):
        raise AssertionError("nothing is run")

    with pytest.raises(ConfigError, match=message):
        clusters.by_replicas(scenario(suite), PAIRS, "paper", replicas, search=search)
