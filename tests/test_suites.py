"""Suites of one's own: TOML files, and what is wrong with one in one line."""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import llmsched_gym  # noqa: F401
from llmsched_gym import cli
from llmsched_gym.agents.run_folder import open_run, start_run
from llmsched_gym.config import (
    CLUSTER_SUITES,
    SUITES,
    ClusterScenario,
    ConfigError,
    env_config,
    find_suite,
    route_config,
    scenario,
    suite_text,
)
from llmsched_gym.evaluation.grid import evaluate
from llmsched_gym.report.settings import command

EXAMPLE = Path(__file__).parents[1] / "examples" / "suite.toml"
SHORT = {"num_requests": 6, "warmup_s": 0.0, "jitter": 0.0}


def write(folder, text, name="my.toml"):
    path = folder / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", [*SUITES, *CLUSTER_SUITES])
def test_every_suite_as_a_file_is_the_same_suite(tmp_path, name, capsys):
    assert cli.main(["suite", name]) == 0
    path = write(tmp_path, capsys.readouterr().out)
    found, known = find_suite(path), find_suite(name)
    assert found.scenario == known.scenario.replace(suite=path) and found.what == known.what
    assert type(found.scenario) is type(known.scenario) and suite_text(found) == suite_text(known)


def test_an_environments_id_is_its_suite():
    assert scenario("LLMSched-Drift-v0") == SUITES["drift"].scenario
    assert route_config("LLMRoute-Disagg-v0").roles == CLUSTER_SUITES["disagg"].scenario.roles


def test_the_example_is_a_suite_of_environments_and_evaluations():
    env, plain = gym.make("LLMSched-v0", suite=str(EXAMPLE)), gym.make("LLMSched-Burst-v0")
    assert env.unwrapped.config.patience_s == 20.0 and env.unwrapped.config.arrivals == "gamma"
    seen, _ = env.reset(seed=0)
    assert seen in env.observation_space and not np.array_equal(seen, plain.reset(seed=0)[0])
    assert env.unwrapped.config.suite == str(EXAMPLE)
    (row,) = evaluate(scenario(str(EXAMPLE), **SHORT), ["slai"], seeds=1)
    assert row["suite"] == str(EXAMPLE) and 1.0 <= row["qps"] <= 1.8
    by_hand = SUITES["burst"].scenario.replace(qps_range=(1.0, 1.8), strict_share=0.1, **SHORT)
    assert row["ttft_p50_s"] == evaluate(by_hand, ["slai"], seeds=1)[0]["ttft_p50_s"]


def test_the_page_quotes_the_example():
    page = Path(__file__).parents[1] / "docs" / "formats.md"
    assert f"```toml\n{EXAMPLE.read_text()}```" in page.read_text()


def test_a_suite_of_replicas(tmp_path):
    path = write(tmp_path, 'base = "disagg"\n[scenario]\nkv_link_bytes_per_s = inf\nreplica_failures = [[0, 1, 2.5]]\n')
    world = scenario(path)
    assert isinstance(world, ClusterScenario) and world.kv_link_bytes_per_s == math.inf
    assert world.replica_failures == ((0, 1, 2.5),)
    assert gym.make("LLMRoute-v0", suite=path).unwrapped.config.roles == world.roles
    alone = write(tmp_path, "[scenario]\nnum_replicas = 2\n", "alone.toml")
    assert scenario(alone) == ClusterScenario(suite=alone, num_replicas=2)


def test_files_beside_the_suite_are_meant(tmp_path, monkeypatch):
    folder = tmp_path / "deep"
    folder.mkdir()
    (folder / "trace.csv").write_text("num_prefill_tokens,num_decode_tokens\n" + "100,5\n" * 4)
    path = write(folder, '[scenario]\ntrace = "trace.csv"\nprofile = "a100-mistral-7b"\n')
    monkeypatch.chdir(tmp_path)
    assert scenario("deep/my.toml").trace == "deep/trace.csv" and scenario(path).profile == "a100-mistral-7b"
    assert evaluate(scenario("deep/my.toml", **SHORT), ["sarathi"], seeds=1)[0]["workload"] == "trace.csv"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[scenario]\nburstines = 0.5\n", "scenario.burstines: unknown field; did you mean 'burstiness'?"),
        ('base = "default"\n[scenario]\nnum_replicas = 2\n', "scenario.num_replicas: unknown field"),
        ("qps = 3\n", "qps: unknown field, expected base, what, scenario"),
        ('[scenario]\nqps = "fast"\n', "scenario: qps: expected a number >= 1e-06 and <= 1e+06, got 'fast'"),
        ("[scenario]\nqps_range = 3\n", "scenario: qps_range: expected"),
        ('[scenario]\nsuite = "default"\n', "scenario.suite: unknown field"),
        ("[scenario]\nprefix_caching = 1\n", "scenario: prefix_caching: expected True or False, got 1"),
        ('base = "nope"\n', "base: expected one of paper, default"),
        ("what = 3\n", "what: expected one line of text, got 3"),
        ("scenario = 3\n", "scenario: expected a table, [scenario], got 3"),
        ("[scenario\n", "not a TOML file: "),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line_that_names_file_and_field(tmp_path, text, words, capsys):
    path = write(tmp_path, text)
    for make in (scenario, env_config, route_config):
        with pytest.raises(ConfigError) as error:
            make(path)
        assert str(error.value).startswith(f"suite: {path}: {words}") and "\n" not in str(error.value)
    assert cli.main(["evaluate", "--policy", "slai", "--suite", path, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_file_that_is_none_and_one_of_the_other_kind(tmp_path):
    with pytest.raises(ConfigError, match=r"^suite: cannot read .*none.toml: No such file"):
        scenario(str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match=r"^suite: expected one of paper.*or a .toml file, got 'my.yaml'$"):
        scenario("my.yaml")
    path = write(tmp_path, "[scenario]\nnum_replicas = 2\n")
    with pytest.raises(ConfigError, match=r"^suite: expected one of paper.*my.toml', which is not of one engine$"):
        env_config(path)
    with pytest.raises(ConfigError, match=r"'drift', which is not of several replicas$"):
        route_config("drift")


def test_a_folder_of_results_does_not_go_on_with_a_changed_file(tmp_path, capsys):
    path, out = write(tmp_path, "[scenario]\nqps = 1.5\n"), tmp_path / "out"
    args = ["evaluate", "--policy", "sarathi", "--suite", path, "--seeds", "1", "--num-requests", "5", "--no-bound"]
    args += ["--workers", "1", "--set", "warmup_s=0", "--out", str(out)]
    assert cli.main(args) == 0 and cli.main(args) == 0
    told = command(json.loads((out / "config.json").read_text()), out)
    assert told is not None and f"--suite {path} " in told and "--set warmup_s=0" in told and "qps" not in told
    held = (out / "runs.parquet").read_bytes()
    write(tmp_path, "[scenario]\nqps = 1.6\n")
    capsys.readouterr()
    assert cli.main(args) == 2
    assert "holds results of another configuration (it differs in " in capsys.readouterr().err
    assert (out / "runs.parquet").read_bytes() == held


@dataclass(frozen=True)
class Training:
    suite: str
    out: str
    resume: bool = False
    set: dict = field(default_factory=dict)


def test_a_training_goes_on_by_the_words_it_began_with(tmp_path):
    began = Training("default", str(tmp_path / "run"), set={"qps_range": (1.6, 2.2)})  # a list in config.json
    start_run(began)
    assert open_run(replace(began, resume=True)).set == {"qps_range": [1.6, 2.2]}
    with pytest.raises(ConfigError, match=r"--set: the run in .* goes on as it began"):
        open_run(replace(began, resume=True, set={"qps_range": (1.6, 2.0)}))


def test_a_training_does_not_go_on_with_a_changed_file(tmp_path):
    path = write(tmp_path, "[scenario]\nqps = 1.5\n")
    start_run(Training(path, str(tmp_path / "run")))
    assert open_run(Training(path, str(tmp_path / "run"), True)).suite == path
    write(tmp_path, "[scenario]\nqps = 1.5\njitter = 0\n")
    with pytest.raises(ConfigError, match=r"my.toml is not what the run in .* began with"):
        open_run(Training(path, str(tmp_path / "run"), True))
    start_run(Training("default", str(tmp_path / "other")))
    assert json.loads((tmp_path / "other" / "config.json").read_text()) == {"suite": "default", "set": {}}
