"""Data sets for offline learning: what is stored is what was stepped."""

import os
import sys

import numpy as np
import pytest

pytest.importorskip("minari", reason="needs minari")

from llmsched_gym.agents.record import MIXTURE, RANDOM, Config, makers, play, run
from llmsched_gym.cli import main
from llmsched_gym.config import ConfigError

WORLD = {"horizon_s": 8.0, "qps": 2.0}


def test_stored_actions_give_the_stored_steps(tmp_path, monkeypatch):
    import minari

    config = Config(
        policy="mixed,slai[hold=true]", out=str(tmp_path), set=WORLD, episodes=len(MIXTURE), random_share=0.3
    )
    names = run(config)
    assert names == ["llmsched/default-knobs/mixed-v0", "llmsched/default-knobs/slai-hold-true-v0"]
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    mixed, own = (minari.load_dataset(name) for name in names)
    env = own.recover_environment()
    for data, i in ((mixed, 0), (mixed, len(MIXTURE) - 1), (own, 1)):
        episode = data[i]
        observation, _ = env.reset(seed=config.first_seed + i)
        assert np.array_equal(observation, episode.observations[0])
        for k, action in enumerate(episode.actions):
            observation, reward, terminated, truncated, info = env.step(action)
            assert np.array_equal(observation, episode.observations[k + 1]) and reward == episode.rewards[k]
            assert episode.infos["discount"][k + 1] == pytest.approx(info["discount"], rel=1e-6)
            assert episode.infos["duration_s"][k + 1] == info["duration_s"] > 0.0
            assert (episode.terminations[k], episode.truncations[k]) == (terminated, truncated)
        assert terminated or truncated
    with pytest.raises(ConfigError, match="llmsched/default-knobs/mixed-v0 is there already"):
        run(config)


def test_the_mixture_is_what_the_actions_can_express():
    assert makers(Config(episodes=14), "mixed") == [*MIXTURE, *MIXTURE]
    able = makers(Config(action="preset", episodes=20), "mixed")
    assert RANDOM in able and "on-time" not in able and len(set(able)) > 3
    drawn = play("default", {**WORLD, "action": "preset", "action_repeat": 8}, RANDOM, 3, 0.0)
    assert len(set(drawn["actions"].tolist())) > 3


@pytest.mark.parametrize(
    "options, what",
    [
        (["--policy", "slay"], "policy 'slay' is unknown"),
        (["--policy", "rad"], "rad: no action of this environment does what it does"),
        (["--random-share", "1.5"], "--random-share: expected a number from 0 to 1, got 1.5"),
        (["--suite", "nowhere"], "suite"),
    ],
)
def test_what_cannot_be_recorded_is_one_line(tmp_path, capsys, options, what):
    assert main(["record", "--out", str(tmp_path / "d"), "--episodes", "1", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert what in line and not (tmp_path / "d").exists()


def test_a_file_is_no_folder_to_record_into(tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    assert main(["record", "--out", str(tmp_path / "mine"), "--episodes", "1", "--policy", "slai"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "out: cannot write to " in line and (tmp_path / "mine").read_text() == "mine"


def test_a_folder_of_something_else_is_not_recorded_into(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert main(["record", "--out", str(tmp_path), "--episodes", "1", "--policy", "slai"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"out: {tmp_path} holds files of something else (config.json), and no data set of Minari" in line
    assert os.listdir(tmp_path) == ["config.json"]


def test_without_minari_it_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "minari", None)
    assert main(["record", "--out", str(tmp_path), "--episodes", "1", "--policy", "slai"]) == 2
    assert "pip install '.[record]'" in capsys.readouterr().err
