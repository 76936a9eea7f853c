"""Searches: ranges, the study that goes on, and the finals. CI skips it: its time is used up, so it has no optuna."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
pytest.importorskip("tensorboard", reason="tensorboard is not installed")
pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("optuna", reason="optuna is not installed: pip install '.[search]'")

import optuna

from llmsched_gym.agents import train as training
from llmsched_gym.agents.options import parse
from llmsched_gym.agents.search import command, judges, search, training_seeds
from llmsched_gym.agents.search_space import RANGES, read, space_of
from llmsched_gym.agents.search_trials import Config, open_study, trial_folder
from llmsched_gym.cli import main
from llmsched_gym.config import ConfigError, env_config
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate

TINY = Config(
    set={"qps": 1.5, "warmup_s": 0.0, "drain_s": 60.0},
    hidden=(8,),
    num_envs=4,
    n_steps=16,
    batch_size=64,
    steps=256,
    eval_every=64,
    eval_seeds=1,
    eval_requests=20,
    space={"learning_rate": "default", "hidden": "8/16,8", "epochs": "1..4"},
    trials=4,
    startup=2,
    finals=1,
    final_seeds=2,
    final_eval_seeds=1,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A search from beginning to end: its settings and what it found."""
    config = replace(TINY, out=str(tmp_path_factory.mktemp("search") / "whole"))
    return config, search(config)


def histories(config):
    trials = [t for t in open_study(config).get_trials() if "interrupted" not in t.user_attrs]
    return [(t.state.name, t.params, t.intermediate_values, t.value) for t in trials]


def test_the_first_trial_has_the_given_settings_and_the_value_of_its_training(whole, tmp_path):
    config, _ = whole
    state, params, seen, value = histories(config)[0]
    assert state == "COMPLETE" and params == {"learning_rate": 5e-4, "hidden": "8", "epochs": 4}
    heard = {}
    own = {name: getattr(config, name) for name in training.Config.__dataclass_fields__}
    training.train(training.Config(**{**own, "out": str(tmp_path / "t")}), heard.__setitem__)
    assert list(heard) == [64, 128, 192, 256] and value == max(heard.values())
    assert seen == {i + 1: heard[step] for i, step in enumerate([64, 128, 192])}


def test_the_winner_is_the_best_of_trainings_with_seeds_of_their_own(whole):
    config, found = whole
    assert json.loads((Path(config.out) / "best.json").read_text())["command"] == found["command"]
    assert training_seeds(config) == [1, 2] and judges(config) == [2001]
    means = {final["candidate"]: final["mean_utility"] for final in found["finals"]}
    assert "given" in means and found["winner"] == max(means, key=means.get)
    world = env_config("default", num_requests=20, **training.Config(set=TINY.set).world())
    for final in found["finals"]:
        assert final["mean_utility"] == np.mean(final["by_training_seed"])
        for seed, value in zip((1, 2), final["by_training_seed"], strict=True):
            folder = Path(config.out) / "finals" / f"{final['candidate'].replace(' ', '-')}-seed-{seed}"
            assert json.loads((folder / "config.json").read_text())["seed"] == seed
            assert row(simulate(world, str(folder / "best"), 2001))["mean_utility"] == value


def test_the_printed_command_trains_with_the_winners_settings(whole):
    config, found = whole
    words = shlex.split(found["command"])
    assert words[:2] == ["llmsched", "train"]
    asked = parse(training.Config, words[2:], None)
    assert asked.steps == config.steps and asked.set == config.set and not Path(asked.out).exists()
    for name in TINY.space:
        assert getattr(asked, name) == found["settings"].get(name, getattr(config, name))


def test_a_study_killed_in_a_trial_goes_on_as_it_would_have(whole, tmp_path, monkeypatch):
    config, found = whole
    broken = replace(config, out=str(tmp_path / "broken"))
    train, begun = training.train, []

    def interrupted(asked, evaluated=None):
        begun.append(asked)

        def heard(step, utility):
            evaluated(step, utility)
            if len(begun) == 3:
                raise KeyboardInterrupt

        return train(asked, heard)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            search(broken)
    assert open_study(broken).trials[2].state == optuna.trial.TrialState.RUNNING
    again = search(Config(out=broken.out, resume=True))
    assert histories(broken) == histories(config)
    failed = open_study(broken).trials[2]
    assert failed.state == optuna.trial.TrialState.FAIL and failed.user_attrs == {"interrupted": True}
    assert not trial_folder(broken, 2).exists()
    named = {"candidate": "trials after the third have the next number"}
    assert [final | named for final in again["finals"]] == [final | named for final in found["finals"]]
    assert again["study"]["interrupted"] == 1 and again["study"]["fail"] == 1
    # once more changes nothing: all is there
    assert search(Config(out=broken.out, resume=True)) == again


def test_a_bad_trial_is_pruned_and_settings_that_cannot_train_fail_alone(tmp_path, monkeypatch, capsys):
    config = replace(TINY, out=str(tmp_path / "s"), space={"learning_rate": "default"}, trials=4, startup=1)
    begun, ended = [], []

    def train(asked, evaluated):
        begun.append(asked)
        if len(begun) == 2:
            raise ConfigError("heads: 3 do not divide the width")
        for step, utility in ((64, 0.1 * (4 - len(begun))), (128, 0.0), (256, 0.9)):
            evaluated(step, utility)
        ended.append(asked.out)

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr("llmsched_gym.agents.search.run_final", lambda asked, seeds: float(asked.learning_rate))
    found = search(config)
    states = [t.state.name for t in open_study(config).trials]
    assert states == ["COMPLETE", "FAIL", "PRUNED", "PRUNED"] and len(ended) == 1
    assert found["study"] | {"complete": 1, "pruned": 2, "fail": 1, "best_value": 0.9} == found["study"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[1].startswith("llmsched: trial 1: fail (heads: 3 do not divide the width); 2 of 4, best 0.9000;")
    assert lines[2].startswith("llmsched: trial 2: pruned; 3 of 4, best 0.9000;")


def test_a_search_in_which_nothing_can_train_says_why(tmp_path, monkeypatch):
    def train(asked, evaluated):
        raise ConfigError("heads: 3 do not divide the width")

    monkeypatch.setattr(training, "train", train)
    with pytest.raises(ConfigError, match="no trial came to its end; the last that failed: heads: 3 do not divide"):
        search(replace(TINY, out=str(tmp_path / "s"), trials=2))


def test_trials_run_side_by_side(tmp_path):
    found = search(replace(TINY, out=str(tmp_path / "s {100 %}"), workers=2, trials=3, steps=128, final_seeds=2))
    assert found["study"]["complete"] + found["study"]["pruned"] == 3 and found["study"]["fail"] == 0


def test_every_setting_has_a_range_and_training_takes_its_values():
    space = space_of(Config(), dict.fromkeys(RANGES, "default"))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        drawn = study.ask(space).params
        config = training.Config(**{name: read(name, value) for name, value in drawn.items()})
        assert isinstance(config.hidden, tuple) and isinstance(config.layers, int) and 0 <= config.clip <= 0.3
    assert "tau_s" in space_of(Config(), {}) and "gamma" not in space_of(Config(), {})
    assert "gamma" in space_of(Config(discount="step"), {}) and "tau_s" not in space_of(Config(discount="step"), {})
    assert "action_repeat" not in space_of(Config(action="request", algorithm="maskable"), {})
    assert {"width", "layers"} <= space_of(Config(observation="slots"), {}).keys()
    assert "hidden" not in space_of(Config(warm_start="runs/first"), {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--space", "suite=a/b"], "space: expected one of learning_rate, n_steps"),
        (["--space", "clip=0.3..0.1"], "space: clip: expected a lower and a higher number, got '0.3..0.1'"),
        (["--space", "entropy=log:0..0.1"], "space: entropy: a range in logarithms begins above 0, got 'log:0..0.1'"),
        (["--space", "epochs=1.5..3"], "space: epochs: expected LOW..HIGH, log:LOW..HIGH or A/B/... of its values"),
        (["--space", "epochs=0..3"], "space: epochs: expected a whole number >= 1, got 0"),
        (["--space", "epochs=3"], "space: epochs: expected two or more different values, got '3'"),
        (["--space", "hidden=64,x/32"], "space: hidden: expected A/B/... of its values, got '64,x/32'"),
        (["--space", "hidden=64/0"], "space: hidden: expected values widths such as 64,64, got '0'"),
        (["--space", "activation=tanh/gelu"], "space: activation: expected values of tanh, relu, got 'gelu'"),
        (["--env", "route"], "argument --env: invalid choice: 'route'"),
        (["--trials", "0"], "--trials: expected a whole number >= 1, got 0"),
        (["--final-seeds", "1"], "--final-seeds: expected a whole number >= 2, got 1"),
        (["--eval-every", "2e5"], "eval-every: expected less than the 200000 steps of a training"),
        (["--final-eval-seeds", "1000"], "eval-seeds: there are 1000 selection seeds, for trials and finals together"),
        (["--backend", "transformers", "--model", "random:tiny"], "backend: a search trains in simulation"),
        (["--action", "request"], "algorithm: expected maskable for request actions, got ppo"),
        (["--warm-start", "nowhere"], "warm_start: nowhere: no such file or folder"),
        (["--resume"], "out: nothing to resume"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(options, message, tmp_path, capsys):
    out = tmp_path / "s"
    assert main(["search", "--out", str(out), *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"llmsched: {message}") and said.count("\n") == 1 and not out.exists()


def test_a_folder_that_holds_a_run_is_refused(whole):
    with pytest.raises(ConfigError, match="holds a run already; say --resume"):
        command(["--out", whole[0].out])
