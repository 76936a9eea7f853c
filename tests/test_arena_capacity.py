"""Capacities of an arena's schedulers: one file each, found again, and no other configuration's."""

import json

import pytest

from llmsched_gym.config import ConfigError
from llmsched_gym.evaluation import arena_capacity
from llmsched_gym.evaluation.arena import Arena
from llmsched_gym.evaluation.capacity import Capacity
from llmsched_gym.fluid import fluid_capacity

ARENA = Arena(("sarathi", "slai"), suites=("paper",), profiles=("own",), reference="sarathi", seeds=2, num_requests=20)
JUDGED = "attainment:0.9"


def search(asked):
    """What searches in place of the real one: the capacity of a scheduler is the length of its name."""

    def capacity(scenario, policies, judged, *, qps, seeds, first_seed, workers):
        asked.append((policies, judged, qps, seeds))
        return [Capacity(policies[0], judged, float(len(policies[0])))]

    return capacity


def test_each_is_searched_once_up_to_beyond_the_fluid_capacity(tmp_path, monkeypatch):
    asked, told = [], []
    monkeypatch.setattr(arena_capacity, "capacity", search(asked))
    rows = arena_capacity.capacities_of(
        ARENA, JUDGED, tmp_path, progress=lambda done, total: told.append((done, total))
    )
    assert [(r["arena_suite"], r["arena_profile"], r["policy"], r["capacity_qps"]) for r in rows] == [
        ("paper", "own", "sarathi", 7.0),
        ("paper", "own", "slai", 4.0),
    ]
    assert told == [(1, 2), (2, 2)]
    most_qps = 1.5 * fluid_capacity(ARENA.world("paper", "own")).qps
    assert [(policies, qps[1], seeds) for policies, _, qps, seeds in asked] == [
        (["sarathi"], pytest.approx(most_qps), 2),
        (["slai"], pytest.approx(most_qps), 2),
    ]
    assert arena_capacity.capacities_of(ARENA, JUDGED, tmp_path) == rows
    assert len(asked) == 2  # both were found in the folder


@pytest.mark.parametrize(
    "damage", [lambda kept: kept | {"config": {}}, lambda kept: {"result": 1}, lambda kept: 5, None]
)
def test_a_file_of_another_configuration_is_one_line(damage, tmp_path, monkeypatch):
    monkeypatch.setattr(arena_capacity, "capacity", search([]))
    arena_capacity.capacities_of(ARENA, JUDGED, tmp_path)
    path = min(tmp_path.rglob("*.json"))
    path.write_text("{" if damage is None else json.dumps(damage(json.loads(path.read_text()))))
    before = path.read_text()
    with pytest.raises(ConfigError, match=rf"^out: {path} holds a capacity of another configuration") as error:
        arena_capacity.capacities_of(ARENA, JUDGED, tmp_path)
    assert "\n" not in str(error.value) and path.read_text() == before
