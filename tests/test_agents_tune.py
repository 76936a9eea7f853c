"""Tuned opponents and imitation: what they write is what they found, and interrupted searches go on."""

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
pytest.importorskip("tensorboard", reason="tensorboard is not installed")
pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("cma", reason="cma is not installed")

from agents.imitate import Config as ImitateConfig
from agents.imitate import imitate
from agents.tune import Config, KnobRules, tune
from llmsched_gym.config import ConfigError, env_config
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.policies import read_folder
from llmsched_gym.scheduler import Compiled, make_scheduler

TINY = Config(
    steps=4000,
    action_repeat=4,
    episodes=2,
    requests=20,
    population=4,
    eval_every=1500,
    eval_seeds=1,
    eval_requests=20,
    set={"qps": 1.5, "warmup_s": 0.0, "drain_s": 60.0},
)


@pytest.mark.parametrize("kind", ["constant", "linear"])
def test_a_candidates_value_is_the_utility_of_the_folder_it_becomes(tmp_path, kind):
    rules = KnobRules(replace(TINY, kind=kind))
    x = rules.start + 0.2 * np.random.default_rng(0).standard_normal(len(rules.start))
    values, decisions = rules.utilities([rules.start, x], [1000, 1001])
    world = env_config("default", num_requests=20, **TINY.set)
    for candidate, value in zip((rules.start, x), values, strict=True):
        folder = rules.write(candidate, tmp_path / kind, {})
        expected = np.mean([row(simulate(world, folder, seed))["mean_utility"] for seed in (1000, 1001)])
        assert value == pytest.approx(expected, abs=1e-6)
    assert decisions > 100


@pytest.mark.parametrize("kind", ["constant", "linear"])
def test_an_interrupted_search_goes_on_as_it_would_have(tmp_path, kind):
    whole = replace(TINY, kind=kind, out=str(tmp_path / "whole"))
    policy = tune(whole)
    assert policy == str(tmp_path / "whole" / "policy")
    make_scheduler(policy)
    out, seen = tmp_path / "broken", []

    def interrupt(line):
        seen.append(line)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(replace(whole, out=str(out)), interrupt)
    tune(Config(out=str(out), resume=True), seen.append)
    first = [json.loads(line) for line in (tmp_path / "whole" / "progress.jsonl").read_text().splitlines()]
    again = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]
    assert again == first
    ours, theirs = read_folder(out / "policy")[1], read_folder(tmp_path / "whole" / "policy")[1]
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    if kind == "constant":
        assert isinstance(make_scheduler(policy), Compiled)


def test_any_schedulers_parameters_can_be_tuned(tmp_path):
    template = "slai[budget=int:128..1024,offset=0..10]"
    name = tune(replace(TINY, template=template, out=str(tmp_path / "t"), steps=3000))
    scheduler = make_scheduler(name)
    assert 128 <= scheduler.settings["token_budget"] <= 1024 and 0 <= scheduler.settings["offset"] <= 10
    assert json.loads((tmp_path / "t" / "policy.json").read_text())["policy"] == name
    with pytest.raises(ConfigError, match="expected a range"):
        tune(replace(TINY, template="slai", out=str(tmp_path / "u")))


@pytest.mark.parametrize("observation", ["features", "slots"])
def test_a_student_learns_its_teacher(tmp_path, observation):
    config = ImitateConfig(
        teacher="slai",
        out=str(tmp_path / "s"),
        observation=observation,
        set={"qps": 1.5, "horizon_s": 30.0},
        rounds=1,
        steps=40,
        num_envs=8,
        epochs=15,
        batch_size=64,
        learning_rate=5e-3,
        eval_seeds=1,
        eval_requests=20,
        width=16,
    )
    folder = imitate(config)
    lines = [json.loads(line) for line in (tmp_path / "s" / "progress.jsonl").read_text().splitlines()]
    assert lines[-1]["agreement"] > 0.99
    world = env_config("default", num_requests=40, qps=1.5, warmup_s=0.0)
    student, teacher = (row(simulate(world, policy, 7)) for policy in (f"{folder}[decision_s=0]", "slai"))
    for key in ("ttft_mean_s", "iterations", "mean_utility"):
        assert student[key] == pytest.approx(teacher[key], rel=0.02)
    # the student of a student: a policy folder teaches too
    again = replace(config, teacher=str(folder), out=str(tmp_path / "again"), rounds=0)
    imitate(again)


def test_what_cannot_teach(tmp_path):
    for teacher in ("rad", "srpt-capped[budget=333]"):
        with pytest.raises(ConfigError, match="teacher"):
            imitate(ImitateConfig(teacher=teacher, out=str(tmp_path), num_envs=2))
