"""Variants of profiles in brackets: what they change, where they are taken, and what is said of bad ones."""

import json

import pytest
from typer.testing import CliRunner

from llmsched_gym import cli
from llmsched_gym.config import scenario
from llmsched_gym.cost import PROFILES, ProfileError, load_profile, split_name
from llmsched_gym.evaluation.grid import evaluate
from llmsched_gym.evaluation.store import grid_config

RTX, VLLM = "rtx6000ada-mistral-7b", "rtxpro6000-llama-3.1-8b-vllm"
HYBRID = [(1000, 472)], [1500] * 40


def test_the_price_of_mixing():
    base, dear = load_profile(RTX), load_profile(f"{RTX}[mixing=2]")
    assert dear.name == f"{RTX}[mixing=2]" and dear.basis == "supposed, not measured"
    extra_s = base.kv_s * sum(HYBRID[1])
    assert dear.predict_s(*HYBRID) == pytest.approx(base.predict_s(*HYBRID) + extra_s)
    assert load_profile(f"{RTX}[ mixing = 2.0 ]") == load_profile(f"{RTX}[mixing=2]")
    assert load_profile(f"{RTX}[mixing=2]") is load_profile(f"{RTX}[mixing=2]")
    assert load_profile(RTX).surface is None


@pytest.mark.parametrize("name", [name for name in PROFILES if load_profile(name).surface is not None])
def test_an_additive_twin_is_right_about_decodes_alone_and_wrong_about_mixing(name):
    own, twin = load_profile(name), load_profile(f"{name}[additive=true]")
    assert twin.surface is None and twin.linear == own.linear and twin.num_kv_blocks == own.num_kv_blocks
    for n, k in ((1, 500), (8, 1000), (40, 2000), (100, 3000)):
        assert twin.predict_s([], [k] * n) == pytest.approx(own.predict_s([], [k] * n), rel=0.06)
    assert twin.predict_s([(1000, 448)], [2600] * 64) < 0.85 * own.predict_s([(1000, 448)], [2600] * 64)
    priced = load_profile(f"{name}[mixing=2, additive=true]")
    assert priced.name == f"{name}[additive=true,mixing=2]"
    assert priced.predict_s(*HYBRID) == pytest.approx(twin.predict_s(*HYBRID) + twin.kv_s * sum(HYBRID[1]))


def test_an_additive_profile_is_its_own_twin():
    twin = load_profile(f"{RTX}[additive=true]")
    assert twin.predict_s(*HYBRID) == load_profile(RTX).predict_s(*HYBRID)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (f"{RTX}[mixing=-1]", "mixing: expected a finite number >= 0, got '-1'"),
        (f"{RTX}[mixing=much]", "mixing: expected a finite number >= 0, got 'much'"),
        (f"{RTX}[additive=2]", "additive: expected true or false, got '2'"),
        (f"{RTX}[mix=2]", "expected additive=true or mixing=FACTOR in brackets, each once, got 'mix=2'"),
        (f"{RTX}[mixing=2,mixing=3]", "each once, got 'mixing=3'"),
        (f"{RTX}[]", "got ''"),
        (f"{RTX}[mixing=2", "expected NAME"),
        ("b200[mixing=2]", "got 'b200'"),
    ],
)
def test_bad_variants(name, what, capsys):
    with pytest.raises(ProfileError) as error:
        load_profile(name)
    assert what in str(error.value) and "\n" not in str(error.value)
    assert cli.main(["evaluate", "--policy", "sarathi", "--profile", name, "--qps", "1"]) == 2
    said = capsys.readouterr().err
    assert what in said and said.count("\n") == 1


def test_of_a_file(tmp_path):
    path = tmp_path / "own[1].json"
    load_profile(RTX).to_json(path)
    assert load_profile(path) == load_profile(RTX)
    assert load_profile(f"{path}[mixing=3]").name == f"{RTX}[mixing=3]"
    assert split_name(f"{path}[mixing=3]") == (str(path), (False, 3.0))
    world = scenario("paper", profile=f"{path}[mixing=3]", num_requests=20, qps=1.0)
    before = grid_config(world, ["sarathi"])
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"overhead_ms": 9.0}))
    after = grid_config(world, ["sarathi"])
    assert after["code"] != before["code"] and after["fluid"]["qps"] < before["fluid"]["qps"]


def test_a_grid_on_one_and_predictions_of_another():
    world = scenario("paper", profile=f"{RTX}[mixing=4]", num_requests=150)
    (told,) = evaluate(world, ["srpt-capped"], qps=[1.4], seeds=1)
    (misled,) = evaluate(world.replace(scheduler_profile=RTX), ["srpt-capped"], qps=[1.4], seeds=1)
    assert told["profile"] == f"{RTX}[mixing=4]"
    assert told["slo_attainment"] > misled["slo_attainment"]


def test_the_list_says_so():
    result = CliRunner().invoke(cli.app, ["profiles"])
    assert result.exit_code == 0 and "NAME[mixing=FACTOR]" in result.stdout
    json.loads(CliRunner().invoke(cli.app, ["profiles", "--json"]).stdout)
