"""The price of mixing as a dimension of what cost models get wrong: which worlds there are, and their tables."""

import importlib
import json

import pytest

from llmsched_gym.agents import robustness
from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.cost import load_profile
from llmsched_gym.paper import reproduce as rep


def test_every_pair_of_profiles_is_run_both_ways():
    worlds = robustness.worlds()
    assert len(worlds) == 54 + 3 * len(robustness.pairs())
    believed = {(world.profile, world.scheduler_profile) for _, world in worlds}
    for hybrid, additive in robustness.pairs():
        assert {(hybrid, None), (hybrid, additive), (additive, hybrid)} <= believed
        assert load_profile(additive).surface is None
        batch = [(1000, 448)], [2600] * 64
        assert load_profile(hybrid).predict_s(*batch) > 1.1 * load_profile(additive).predict_s(*batch)
    assert {world.cost_scale for _, world in worlds} == set(robustness.COST_SCALES)


def test_a_table_of_worlds_that_predictions_get_wrong(monkeypatch, tmp_path):
    chosen = [w for w in robustness.worlds() if w[1].profile.endswith("[mixing=4]")]
    monkeypatch.setattr(robustness, "worlds", lambda: chosen)
    policy = "srpt-capped[cap=0.9,budget=4096]"
    settings = {"policy": policy, "seeds": 2, "requests": 150, "workers": 1}
    cells = robustness.robustness(robustness.Config(**settings, out=str(tmp_path / "found.json")))
    known, hidden = cells
    assert (known["predicted"], hidden["predicted"]) == (None, robustness.BASE)
    assert known["qps"] == hidden["qps"]
    assert sum(known["mean_utility"][policy]) > sum(hidden["mean_utility"][policy])
    assert known["mean_utility"]["sarathi"] == hidden["mean_utility"]["sarathi"]  # it predicts nothing
    assert json.loads((tmp_path / "found.json").read_text())["cells"] == cells
    text = robustness.markdown(cells, "sarathi")
    name = f"{robustness.BASE}[mixing=4]"
    assert f"| {name}, cost scale 1 |" in text
    assert f"| {name}, predicted as {robustness.BASE}, cost scale 1 |" in text


def test_the_papers_evaluation_has_worlds_of_both_kinds():
    worlds = rep.mixing_worlds()
    for factor in rep.MIXING_FACTORS:
        known, hidden = (worlds[f"decodes beside prompts {factor} times as dear, {how}"] for how in ("known", "hidden"))
        assert known["profile"] == hidden["profile"] and "scheduler_profile" not in known
    for fields in worlds.values():
        world = scenario("paper", **fields)
        executing, predicting = world.profile, world.scheduler_profile
        assert load_profile(executing) != (load_profile(predicting) if predicting else None)
    additive = [f for f in worlds.values() if load_profile(f["profile"]).surface is None]
    assert len(additive) == 3 and all(load_profile(f["scheduler_profile"]).surface for f in additive)


@pytest.mark.parametrize("name", ["decodes beside prompts 3 times as dear, hidden", "vLLM on an RTX 4090, known"])
def test_its_piece_runs_them(name, monkeypatch, tmp_path):
    monkeypatch.setattr(rep, "BOUNDED_POLICIES", ("sarathi", "srpt-capped"))
    wanted = {name: rep.mixing_worlds()[name]}
    monkeypatch.setattr(rep, "mixing_worlds", lambda: wanted)
    plan = rep.Plan(scenario("paper"), tmp_path, workers=1, seeds=1, short_requests=40)
    found = rep.robustness(plan, lambda text: None)
    assert found[-1]["world"] == name
    assert found[-1]["qps"] < found[0]["qps"] and len(found[-1]["attainment"]["sarathi"]) == 1


@pytest.mark.parametrize("module", ["headroom", "robustness", "route_headroom", "tune_route"])
def test_what_lies_where_a_table_is_to_be_written_is_left_alone(module, tmp_path):
    command = importlib.import_module(f"llmsched_gym.agents.{module}")
    run = getattr(command, {"tune_route": "tune", "route_headroom": "headroom"}.get(module, module))
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    for place, line in (
        ("notes.json", "is a file of something else"),
        (".", "expected a file to write, got the folder"),
    ):
        with pytest.raises(ConfigError, match=line):
            run(command.Config(out=str(tmp_path / place)))
    assert (tmp_path / "notes.json").read_text() == '{"mine": 1}'
