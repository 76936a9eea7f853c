"""benchmarks.variance: which trainings, resuming, and the table; learning itself is tests/test_agents_variance.py's."""

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
pytest.importorskip("tensorboard", reason="tensorboard is not installed")
pytest.importorskip("torch", reason="torch is not installed")

from benchmarks import variance
from benchmarks.variance import Job, Trial, area, benchmark, chosen, config_of, difference, final, read
from llmsched_gym.config import ConfigError


@pytest.fixture
def config(tmp_path):
    return Trial(
        suites="default", variants="group; average", seeds=3, steps=1000, workers=1, out=str(tmp_path), num_envs=8
    )


@pytest.fixture
def runs(monkeypatch):
    """The trainings that were asked for; what they find grows with their seed, and by 0.1 with an option."""
    made = []

    def learn(config):
        made.append(config)
        gain = 0.1 * (config.group > 1) + 0.05 * config.average * (config.seed + 1)
        rows = [(0, 0.0, 0.0, np.nan), (500, 0.2, 0.1, 1.0), (1000, 0.4 + 0.1 * config.seed + gain, 0.3, 0.5)]
        return np.array(rows), 2.0

    monkeypatch.setattr(variance, "learn", learn)
    monkeypatch.setattr(variance, "utility", lambda rule, config: 0.9)
    return made


def test_every_variant_is_trained_once_and_compared_by_seed(config, runs, tmp_path):
    told = []
    text = benchmark(config, told.append)
    assert len(runs) == len(told) == 9 and told[-1].startswith("9/9 default, ")
    assert [(run.group, run.average, run.seed, run.set) for run in runs[:3]] == [
        (1, False, 0, {"qps": 1.8}),
        (8, False, 0, {"qps": 1.8}),
        (1, True, 0, {"qps": 1.8}),
    ]
    assert "| group | 0.600 | +0.100 | 0.250 | +0.025 |" in text  # the same for each seed: no interval
    assert "| average | 0.600 | +0.100 ±0.124 | 0.250 | +0.025 ±0.031 |" in text
    assert "`slai` 0.900" in text and (tmp_path / "variance.md").read_text() == text
    assert benchmark(config, told.append) == text and len(runs) == 9


def test_what_a_kill_cut_off_is_trained_again(config, runs, tmp_path):
    text = benchmark(config, lambda line: None)
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text()[:-30])
    assert benchmark(config, lambda line: None) == text and len(runs) == 10
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 9


def test_results_of_other_settings_are_refused(config, runs):
    benchmark(config, lambda line: None)
    with pytest.raises(ConfigError, match="results of other settings; choose another folder"):
        read(variance.Path(config.out) / "results.jsonl", replace(config, learning_rate=5e-4))
    assert len(read(variance.Path(config.out) / "results.jsonl", replace(config, workers=3, seeds=9, threads=2))) == 9


def test_variants_are_those_of_the_action():
    assert "prior" in chosen(Trial()) and "work-conserving" not in chosen(Trial())
    assert "work-conserving" in chosen(Trial(action="request")) and "prior" not in chosen(Trial(action="request"))
    assert chosen(Trial(variants="group")) == ["baseline", "group"]
    with pytest.raises(ConfigError, match="--variants: expected some of baseline; group;"):
        chosen(Trial(variants="gruop"))
    config = config_of(Job("group, prior", "burst", 7), Trial(set={"qps": 2.0, "jitter": 0.0}))
    assert (config.suite, config.seed, config.prior, config.set) == (
        "burst",
        7,
        "tuned-constant",
        {"qps": 2.0, "jitter": 0.0},
    )


def test_measures_by_hand():
    curve = np.array([[0, 0.0, 1.0], [100, 1.0, 1.0], [400, 0.0, 1.0]])
    assert area(curve).tolist() == [0.5, 1.0] and final(curve).tolist() == [0.0, 1.0]
    assert difference(np.array([1.0, 2.0]), np.array([0.0, 0.0])) == "+1.500"
    assert difference(np.array([1.0, 2.0, 3.0]), np.zeros(3)) == "+2.000 ±2.484"  # 4.303 / sqrt(3)
