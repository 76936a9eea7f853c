"""Tuned opponents and imitation: what they write is what they found, and interrupted searches go on."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
pytest.importorskip("tensorboard", reason="tensorboard is not installed")
pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("cma", reason="cma is not installed")

from llmsched_gym.agents.compare import Config as CompareConfig
from llmsched_gym.agents.compare import compare, interquartile_mean, winners
from llmsched_gym.agents.envs import TrainingEnv
from llmsched_gym.agents.imitate import Config as ImitateConfig
from llmsched_gym.agents.imitate import imitate, make_teacher
from llmsched_gym.agents.options import parse
from llmsched_gym.agents.tune import Config, KnobRules, TemplateRules, new_search, selection, tune
from llmsched_gym.agents.tune_route import Config as RouteConfig
from llmsched_gym.agents.tune_route import tune as tune_route
from llmsched_gym.cli import main
from llmsched_gym.config import ConfigError, env_config, scenario
from llmsched_gym.env.actions.knobs import CAP, KNOBS, MARGIN
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.evaluation.spread import Here
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


@pytest.mark.parametrize("beta", [0.5, 0.0, 3.0])
@pytest.mark.parametrize("kind", ["constant", "linear"])
def test_a_candidates_value_is_the_utility_of_the_folder_it_becomes(tmp_path, kind, beta):
    settings = {**TINY.set, "beta": beta, "qps": 2.5, "patience_s": 3.0, "drain_s": 600.0}
    rules = KnobRules(replace(TINY, kind=kind, set=settings))
    x = rules.start + 0.2 * np.random.default_rng(0).standard_normal(len(rules.start))
    values, decisions = rules.utilities([rules.start, x], [1000, 1001])
    world = env_config("default", num_requests=20, **settings)
    for candidate, value in zip((rules.start, x), values, strict=True):
        folder = rules.write(candidate, tmp_path / kind, {})
        expected = np.mean([row(simulate(world, folder, seed))["mean_utility"] for seed in (1000, 1001)])
        assert value == pytest.approx(expected, abs=1e-6)
        chosen = selection(folder, replace(TINY, set=settings))["mean_utility"]
        assert chosen == row(simulate(world, folder, 2000))["mean_utility"]
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


class Pair:
    """A pool of two workers, which are this process."""

    is_here, count = False, 2

    def submit(self, function, *args):
        return Here().submit(function, *args)

    def where(self):
        return ""


@pytest.mark.parametrize("template", ["", "slai[budget=int:128..1024]"])
def test_a_population_is_worth_the_same_wherever_it_runs(template):
    config = replace(TINY, kind="linear", template=template)
    rules = TemplateRules(config) if template else KnobRules(config)
    candidates = [rules.start + 0.1 * i for i in range(3)]
    here, there = (rules.utilities(candidates, [1000, 1001], places) for places in (1, Pair()))
    np.testing.assert_array_equal(here[0], there[0])
    assert here[1] == there[1]


def test_any_schedulers_parameters_can_be_tuned(tmp_path):
    template = "slai[budget=int:128..1024,offset=0..10]"
    name = tune(replace(TINY, template=template, out=str(tmp_path / "t"), steps=3000))
    scheduler = make_scheduler(name)
    assert 128 <= scheduler.settings["token_budget"] <= 1024 and 0 <= scheduler.settings["offset"] <= 10
    assert json.loads((tmp_path / "t" / "policy.json").read_text())["policy"] == name
    with pytest.raises(ConfigError, match="expected a range"):
        tune(replace(TINY, template="slai", out=str(tmp_path / "u")))
    assert not (tmp_path / "u").exists()


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
    with pytest.raises(ConfigError, match=r"out: .*again holds a run already; choose another folder"):
        imitate(again)


def test_a_teacher_that_is_told_the_cost_scale_divides_its_cap_by_it():
    env = TrainingEnv(6, "drift", 1, action_repeat=4)
    teacher = make_teacher("sarathi[order=feasible,hold=true,cap=0.8]", env, told=True)
    labels = teacher(env, env.reset())
    scale = env.env.core.engine.state.worlds["cost_scale"]
    assert len(set(scale.tolist())) > 1
    for label, cap in zip(labels, 0.8 / scale, strict=True):
        chosen = KNOBS[CAP].values[label[CAP]]
        assert all(abs(cap - chosen) <= abs(cap - value) for value in KNOBS[CAP].values)
    untold = make_teacher("sarathi[order=feasible,hold=true,cap=0.8]", env)(env, env.reset())
    assert set(untold[:, CAP].tolist()) == {KNOBS[CAP].values.index(0.8)}
    assert np.array_equal(np.delete(labels, CAP, 1), np.delete(untold, CAP, 1))


def test_a_teacher_that_plans_is_asked_for_every_batch():
    env = TrainingEnv(16, "drift", 2, action_repeat=1)
    teacher, seen = make_teacher("on-time", env), set()
    observations = env.reset()
    for _ in range(60):
        labels = teacher(env, observations)
        seen |= {tuple(label) for label in labels.tolist()}
        observations = env.step(labels)[0]
    assert len({label[MARGIN] for label in seen}) == 2
    assert len({label[CAP] for label in seen}) > 1  # corrected by what batches really take


def test_what_cannot_teach(tmp_path):
    for teacher in ("rad", "srpt-capped[budget=333]", "slai[offset_full=4]", "on-time[budget=333]"):
        with pytest.raises(ConfigError, match="teacher"):
            imitate(ImitateConfig(teacher=teacher, out=str(tmp_path / "out"), num_envs=2))
    assert not (tmp_path / "out").exists()


def test_a_converged_search_starts_again_with_twice_the_population(tmp_path):
    # steps so small that all candidates are the same constant: a flat fitness ends the search
    lines = []
    tune(
        replace(TINY, sigma=1e-9, steps=16_000, out=str(tmp_path / "flat")), lambda line: lines.append(json.loads(line))
    )
    assert [line["restarts"] for line in lines if "restarts" in line][:1] == [1]
    sizes = [new_search(KnobRules(TINY), TINY, restarts).popsize for restarts in (0, 1, 2)]
    assert sizes == [4, 8, 16]


def test_agents_are_compared_with_the_best_opponent_on_the_same_seeds(tmp_path):
    config = CompareConfig(
        agents="sarathi-spf,slai",
        opponents="faster-transformer,sarathi",
        beside="on-time[cap=0.8,budget=512]",
        suite="paper",
        set={"qps": 1.8},
        seeds=10,
        requests=100,
        workers=1,
        out=str(tmp_path / "compare"),
    )
    text = compare(config)
    assert text == compare(config) == (tmp_path / "compare" / "table.md").read_text()
    found = json.loads((tmp_path / "compare" / "table.json").read_text())
    lines = {line["policy"]: line for line in found["lines"]}
    assert found["best_opponent"] == "sarathi" and lines["sarathi"]["difference"] == 0.0
    beside = lines["on-time[cap=0.8,budget=512]"]
    assert beside["difference"] > 0.0 and not beside["agent"]  # shown, but no opponent
    world = scenario("paper", qps=1.8, num_requests=100)
    ours = [row(simulate(world, "slai", seed))["mean_utility"] for seed in range(3000, 3010)]
    base = [row(simulate(world, "sarathi", seed))["mean_utility"] for seed in range(3000, 3010)]
    assert lines["slai"]["difference"] == pytest.approx(np.mean(ours) - np.mean(base))
    low, high = lines["slai"]["difference_interval"]
    assert low < lines["slai"]["difference"] < high
    assert winners(found, -1.0) == sum(line["difference_interval"][0] > 0 for line in found["lines"] if line["agent"])
    assert winners(found, 1.0) == 0
    assert interquartile_mean([0.0, 1.0, 2.0, 10.0]) == 1.5
    with pytest.raises(ConfigError, match="agents: expected policies that are named once"):
        compare(replace(config, agents="sarathi"))


def test_counts_below_one_are_refused_before_anything_is_written(tmp_path):
    from llmsched_gym.agents import train

    for name in ("steps", "num-envs", "eval-seeds"):
        with pytest.raises(ConfigError, match=f"--{name}: expected a whole number >= 1, got -5"):
            train.command([f"--{name}=-5", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--population", "1"], "--population: expected at least 2, or 0, got 1"),
        (["--population", "-1"], "--population: expected a whole number >= 0, got -1"),
        (["--sigma", "0"], "--sigma: expected a number above 0, got 0"),
        (["--sigma", "inf"], "--sigma: expected a number <= 1e+12, got inf"),
        (["--episodes", "1001"], "--episodes: expected at most 1,000, as many as there are seeds, got 1001"),
        (["--eval-seeds", "1001"], "--eval-seeds: expected at most 1,000, as many as there are seeds, got 1001"),
        (["--seed", "-1"], "--seed: expected a whole number >= 0, got -1"),
        (["--seed", "1e10"], "--seed: expected a whole number <= 2,147,483,647, got 10000000000"),
        (["--template", "nope[a=0..1]"], "policy 'nope' is unknown"),
        (["--template", "slai[nope=0..1]"], "policy 'slai[nope=0.5]': unknown parameter 'nope'"),
        (["--template", "slai[budget=int:5..1]"], "template: expected LOW..HIGH, got 5..1 in 'slai[budget=int:5..1]'"),
    ],
)
def test_what_no_search_can_do_with_is_said_in_one_line_and_leaves_no_folder(options, message, tmp_path, capsys):
    out = tmp_path / "t"
    assert main(["tune", "--out", str(out), *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"llmsched: {message}") and said.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--population", "1"], "--population: expected at least 2, got 1"),
        (["--sigma", "0"], "--sigma: expected a number above 0, got 0"),
        (["--seeds", "1001"], "--seeds: expected at most 1,000, as many as there are seeds, got 1001"),
    ],
)
def test_so_it_is_with_the_weights_of_a_router(options, message):
    with pytest.raises(ConfigError, match=message):
        tune_route(parse(RouteConfig, options, None))


def test_a_quiet_search_says_nothing_on_stderr(tmp_path, capsys):
    few = ["--steps", "10", "--requests", "5", "--eval-requests", "5", "--eval-seeds", "1", "--episodes", "1"]
    options = [*few, "--population", "2", "--template", "slai[budget=int:256..2048]", "--out", str(tmp_path / "t")]
    assert main(["--quiet", "tune", *options]) == 0
    assert capsys.readouterr().err == ""
    assert "LLMSCHED_SAY_COMPILING" not in os.environ
