"""Options from a file, from the environment, and those of all commands."""

import json

import pytest

from llmsched_gym.cli import main
from llmsched_gym.cli.options_file import read_options
from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.files import encode

PARAMETERS = ("policy", "suite", "router", "qps", "seeds", "first_seed", "num_requests", "as_json")


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_options_by_name(tmp_path):
    text = 'policy = ["slai[budget=256,offset=1]", "sarathi"]\nqps = [1.2, 1.6]\nnum-requests = 20\n'
    text += "[set]\npatience_s = 3.0\n"
    found = read_options(written(tmp_path / "a.toml", text), PARAMETERS)
    assert found.options == {"policy": ["slai[budget=256,offset=1]", "sarathi"], "qps": "1.2,1.6", "num_requests": 20}
    assert found.fields == ["patience_s=3.0"]
    found = read_options(written(tmp_path / "a.json", '{"policy": "slai", "set": {"trace": "a b.csv"}}'), PARAMETERS)
    assert found.options == {"policy": ["slai"]} and found.fields == ["trace=a b.csv"]


@pytest.mark.parametrize(
    "name, text, what",
    [
        ("a.toml", "sedes = 3", r"'sedes' is no option of this command \(did you mean 'seeds'\?\)"),
        ("a.toml", "seeds = ", "expected TOML: "),
        ("a.json", "{", "expected JSON: "),
        ("a.json", "[1]", r"expected options by name, got \[1\]"),
        ("a.toml", "set = 3", "set: expected a table of fields of the scenario, got 3"),
        ("a.toml", "seeds = [[1]]", "seeds: expected text, a number, true, false or a list of such"),
        ("a.json", '{"scenario": {}, "policies": []}', "expected the config.json of a run of evaluate"),
        ("a.yaml", "seeds: 3", r"config: expected \.toml or \.json, got .*a\.yaml$"),
        ("a", "seeds = 3", r"config: expected \.toml or \.json, got .*/a$"),
        ("a.json", '{"scenario": {"suite": "paper"}, "policies": []}', "expected the config.json of a run of evaluate"),
        ("a.toml", "config = 'b.toml'", "'config' is no option of this command"),
        ("a.toml", "set_ = 'qps=1'", "'set_' is no option of this command"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name, text, what):
    with pytest.raises(ConfigError, match=what) as error:
        read_options(written(tmp_path / name, text), [*PARAMETERS, "config", "set_"])
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_the_config_of_a_run_is_the_run(tmp_path):
    world = scenario("hetero", num_requests=9, router_staleness_s=2.0)
    config = {"scenario": encode(world.to_dict()), "policies": ["jsq+slai", "jsq+sarathi"], "qps": [3.0], "seeds": 2}
    found = read_options(written(tmp_path / "config.json", json.dumps(config)), PARAMETERS)
    assert found.options == {
        "suite": "hetero",
        "router": "jsq",
        "policy": ["slai", "sarathi"],
        "qps": "3.0",
        "seeds": 2,
    }
    assert found.fields == ["num_requests=9", "router_staleness_s=2.0"]


def rows(capsys, *arguments):
    assert main(["--quiet", "evaluate", *arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert not err
    untimed = [{k: v for k, v in row.items() if k != "wall_time_s"} for row in json.loads(out)]
    return untimed


def test_a_run_again_and_what_counts_before_what(tmp_path, capsys, monkeypatch):
    asked = ["--policy", "sarathi", "--num-requests", "12", "--qps", "1.4", "--workers", "1", "--strict-share", "0.4"]
    monkeypatch.setenv("LLMSCHED_EVALUATE_SEEDS", "2")
    first = rows(capsys, *asked, "--set", "relaxed_tbt_slo_s=0.3", "--no-bound", "--out", str(tmp_path / "out"))
    assert len(first) == 2
    config = ["--config", str(tmp_path / "out" / "config.json"), "--workers", "1"]
    assert rows(capsys, *config) == first
    own = rows(capsys, *config, "--seeds", "1", "--strict-share", "1")
    assert len(own) == 1 and own[0]["num_requests_by_class"] == {"strict": 12, "relaxed": 0}
    assert own[0]["tbt_slo_s_by_class"]["relaxed"] == 0.3


@pytest.mark.parametrize(
    "asked",
    [
        "--policy sarathi,slai[budget=1024,offset=1] --qps 1.2,1.6 --ttft-slo 1,0.001 --tbt-slo 0.2 --patience inf",
        "--suite chat --policy slai --qps 0.5 --no-prefix-caching --allow-refusal --length-hint noisy:0.5",
        "--suite cluster --policy slai --router jsq --replicas 2 --staleness 0.5 --qps 2.5 --set warmup_s=1.0",
    ],
)
def test_the_config_json_of_any_run_gives_the_same_run(asked, tmp_path, capsys):
    usual = ["--seeds", "1", "--first-seed", "3", "--num-requests", "12", "--workers", "1"]
    first = rows(capsys, *asked.split(), *usual, "--out", str(tmp_path))  # with the bound, where there is one
    again = rows(capsys, "--config", str(tmp_path / "config.json"), "--workers", "1", "--out", str(tmp_path / "again"))
    assert again == first and first[0]["seed"] == 3
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tmp_path / "again")]
    assert configs[0] == configs[1]


def test_what_a_capacity_wrote_gives_the_same_capacity(tmp_path, capsys):
    asked = "--policy sarathi --suite paper --criterion attainment:0.9 --qps 0.5,8 --seeds 1 --num-requests 50"
    run = ["--quiet", "capacity", "--workers", "1", "--json"]
    assert main([*run, *asked.split(), "--jitter", "0.1", "--out", str(tmp_path)]) == 0
    first = json.loads(capsys.readouterr().out)
    file = str(tmp_path / "capacity-attainment-0.9.json")
    assert main([*run, "--config", file]) == 0
    assert json.loads(capsys.readouterr().out) == first and first[0]["capacity_qps"] is not None
    assert main(["evaluate", "--config", file]) == 2  # a capacity is no grid
    assert "got what llmsched capacity found" in capsys.readouterr().err


def test_versions_help_and_no_command(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("llmsched-gym ")
    assert main(["evaluate", "-h"]) == 0
    out = capsys.readouterr().out
    assert "--config FILE" in out and "env var" not in out
