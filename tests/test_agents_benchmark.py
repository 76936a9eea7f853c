"""Standard results: presets and what is refused, one preset with two seeds from training to table, going on, scores."""

import json
import math
import os

import numpy as np
import pytest

from llmsched_gym.config import ConfigError

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
pytest.importorskip("tensorboard", reason="tensorboard is not installed")
pytest.importorskip("torch", reason="torch is not installed")

from llmsched_gym.agents import benchmark
from llmsched_gym.agents.benchmark_learners import Training, learn, utilities
from llmsched_gym.agents.benchmark_presets import FOLDER, LEARNERS, find_presets, read_preset
from llmsched_gym.agents.benchmark_scores import Reference, estimate, lines_of, markdown, score
from llmsched_gym.evaluation.store import lock_folder
from llmsched_gym.policies import read_folder

TINY = """
learner = "a2c"
[world]
action = "preset"
action_repeat = 1
qps = 2.0
horizon_s = 4.0
warmup_s = 0.0
drain_s = 6.0
arrivals_continue = false
max_backlog = 8
[settings]
num_envs = 2
n_steps = 4
hidden = [8]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.mark.parametrize("field", ["profile", "workload", "trace"])
def test_a_world_that_cannot_run_is_refused_before_there_is_a_folder(field, file, tmp_path):
    file.write_text(TINY.replace("[settings]", f"{field} = '/nope'\n[settings]"))
    with pytest.raises(ConfigError, match=r"^presets: tiny: world: .*nope") as error:
        benchmark.benchmark(benchmark.Config(presets=str(file), out=str(tmp_path / "out")))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_every_preset_is_an_environment_that_its_learner_can_act_in():
    presets = find_presets("*")
    assert [preset.name for preset in presets] == sorted(path.stem for path in FOLDER.glob("*.toml"))
    assert {preset.learner for preset in presets} == set(LEARNERS)
    for preset in presets:
        assert preset.name == f"{preset.suite}-{preset.config.action}-{preset.learner}"
    assert [preset.learner for preset in find_presets("default-preset-*dqn")] == ["dqn", "qr-dqn"]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"a2c"', '"a3c"', "learner: expected one of own-ppo"),
        ('"preset"', '"priority"', "world.action: expected knobs or preset for a2c, got 'priority'"),
        ("qps", "rate", "rate"),
        ("n_steps", "steps", "settings.steps: expected one of"),
        ("[world]", "[world", "not a TOML file"),
        ('"a2c"', '["a2c"]', "learner: expected one of own-ppo"),
        ("num_envs = 2", "num_envs = 0", "settings.num_envs: expected at least 1, got 0"),
        ("num_envs = 2", "num_envs = '2'", "settings.num_envs: expected a whole number, got '2'"),
        ("n_steps = 4", "n_quantiles = 5", "settings.n_quantiles: expected one of"),
        ("[8]", "8", "settings.hidden: expected a list of whole numbers, got 8"),
        ("[8]", "[-8]", "settings.hidden: expected at least 1, got -8"),
        ("n_steps = 4", "learning_rate = 'fast'", "settings.learning_rate: expected a number, got 'fast'"),
        ("n_steps = 4", "learning_rate = -1.0", "settings.learning_rate: expected a number from 0 to 1e+12, got -1.0"),
        ("n_steps = 4", "gamma = 7.0", "settings.gamma: expected a number from 0 to 1, got 7.0"),
        ("n_steps = 4", "rollout_buffer_class = 'x'", "settings.rollout_buffer_class: expected one of"),
        ("[8]", "[1000000]", "settings.hidden: expected widths up to 16,384, got 1000000"),
        ("qps = 2.0", "suite = 'paper'", "world.suite: stands above the tables"),
        ("n_steps = 4", "learning_rate = nan", "settings.learning_rate: expected a number, got nan"),
        ("num_envs = 2", "num_envs = 1000000000000", "settings.num_envs: expected a whole number from -1 to 65,536"),
        ("n_steps = 4", "n_steps = 1000000000000", "settings.n_steps: expected a whole number from -1 to 1,048,576"),
        ("n_steps = 4", "normalize_advantage = 'no'", "settings.normalize_advantage: expected true or false, got 'no'"),
    ],
)
def test_a_wrong_preset_is_one_line_that_names_the_file_and_the_field(file, old, new, told):
    file.write_text(TINY.replace(old, new))
    with pytest.raises(ConfigError) as error:
        read_preset(file)
    assert str(file) in str(error.value) and told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("learner", "setting", "told"),
    [
        ("sac", "ent_coef = 'x'", "settings.ent_coef: expected a number, auto or auto_NUMBER, got 'x'"),
        ("sac", "target_entropy = true", "settings.target_entropy: expected text or a number, got True"),
        ("recurrent", "target_kl = 'x'", "settings.target_kl: expected a number, got 'x'"),
        ("recurrent", "clip_range_vf = -1.0", "settings.clip_range_vf: expected a number from 0 to"),
        ("dqn", "max_grad_norm = '5'", "settings.max_grad_norm: expected a number, got '5'"),
    ],
)
def test_so_is_a_wrong_setting_of_other_algorithms(file, learner, setting, told):
    kept = TINY.replace('"a2c"', f'"{learner}"').replace("n_steps = 4", setting)
    file.write_text(kept)
    with pytest.raises(ConfigError) as error:
        read_preset(file)
    assert str(file) in str(error.value) and told in str(error.value) and "\n" not in str(error.value)


def test_settings_of_sb3_may_be_of_any_of_their_kinds(file):
    sac = TINY.replace('"a2c"', '"sac"').replace('"preset"', '"priority"')
    for setting in ("ent_coef = 0.1", "ent_coef = 'auto_0.1'", "target_entropy = -3.0", "train_freq = [1, 'episode']"):
        file.write_text(sac.replace("n_steps = 4", setting))
        read_preset(file)
    file.write_text(TINY.replace('"a2c"', '"dqn"').replace("n_steps = 4", "max_grad_norm = 0.5"))
    read_preset(file)


@pytest.mark.parametrize(
    ("learner", "setting", "told"),
    [
        ("a2c", "use_sde = true", "settings: "),
        ("own-ppo", "group = 3", "group: expected a divisor of the 2 environments, got 3"),
        ("own-ppo", "prior = 'nope'", "prior: policy 'nope' is unknown"),
        ("own-ppo", "warm_start = 'FILE'", "warm_start: .*expected a run"),
    ],
)
def test_what_no_training_of_a_preset_could_have_is_refused_before_there_is_a_folder(
    learner, setting, told, file, tmp_path, monkeypatch
):
    monkeypatch.setattr(benchmark, "check", lambda *_: None)
    setting = setting.replace("FILE", str(file))
    file.write_text(TINY.replace('"a2c"', f'"{learner}"').replace("n_steps = 4", setting))
    with pytest.raises(ConfigError, match=f"^presets: tiny: {told}") as error:
        benchmark.benchmark(benchmark.Config(presets=str(file), out=str(tmp_path / "out")))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("activation = 'gelu'", "settings.activation: expected one of tanh, relu, got 'gelu'"),
        ("anneal = 'no'", "settings.anneal: expected true or false, got 'no'"),
        ("batch_size = 0", "settings.batch_size: expected a whole number >= 1, got 0"),
        ("learning_rate = nan", "settings.learning_rate: expected a number >= 0, got nan"),
        ("hidden = '8'", "settings.hidden: expected a list of whole numbers, got '8'"),
        ("eval_every = 5", "settings.eval_every: expected one of"),
        ("warm_start = '/nope'", "settings.warm_start: /nope: no such file or folder"),
        ("num_envs = 1000000000000", "settings.num_envs: expected a whole number <= 65,536, got"),
    ],
)
def test_so_is_a_wrong_setting_of_our_learners(file, setting, told):
    kept = TINY.replace('"a2c"', '"own-ppo"').replace("num_envs = 2", "")
    file.write_text(kept.replace("hidden = [8]", setting))
    with pytest.raises(ConfigError) as error:
        read_preset(file)
    assert str(file) in str(error.value) and told in str(error.value) and "\n" not in str(error.value)


def test_presets_of_two_worlds_under_one_name_are_not_scored_together(file, tmp_path):
    other = tmp_path / "faster.toml"
    other.write_text(TINY.replace("qps = 2.0", "qps = 3.0"))
    with pytest.raises(ConfigError, match="tiny and faster differ in qps of the world"):
        find_presets(f"{file},{other}")
    other.write_text(TINY.replace("action_repeat = 1", "action_repeat = 2"))
    assert len(find_presets(f"{file},{other}")) == 2


def test_a_world_may_say_how_long_a_training_s_episodes_are(file):
    file.write_text(TINY.replace("qps = 2.0", "num_requests = 5"))
    assert read_preset(file).scenario(8).num_requests == 8


def test_a_preset_without_a_rhythm_decides_at_every_batch_whoever_learns(file, tmp_path):
    lines = TINY.replace('"a2c"', '"own-ppo"').replace("n_steps = 4", "n_steps = 8").splitlines()
    file.write_text("\n".join(line for line in lines if "action_repeat" not in line))
    trained = learn(read_preset(file), Training(16, 0, tmp_path / "out", eval_requests=1, eval_every=16))
    assert read_folder(tmp_path / "out" / "policy")[0].action["repeat"] == 1 and trained.greedy is not None


def test_an_unfinished_training_is_not_gone_on_with_under_other_settings(file, tmp_path, monkeypatch):
    sizes = {"seeds": 1, "steps": 64, "eval_seeds": 1, "requests": 8, "eval_requests": 4}
    config = benchmark.Config(presets=str(file), out=str(tmp_path / "out"), **sizes)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark.benchmark(config)
    file.write_text(TINY.replace("n_steps = 4\n", ""))
    monkeypatch.setattr(benchmark, "learn", lambda *_: pytest.fail("trained"))
    with pytest.raises(ConfigError, match="preset tiny has changed; choose another folder"):
        benchmark.benchmark(config)


def test_two_commands_do_not_write_to_one_folder(file, tmp_path):
    config = benchmark.Config(presets=str(file), out=str(tmp_path / "out"))
    store = benchmark.Results(config)
    lock = lock_folder(store.out)
    with pytest.raises(ConfigError, match="another process is writing to"):
        benchmark.benchmark(config)
    os.close(lock)


def test_presets_that_are_not_there_are_refused():
    for wanted in ("nobody", "", "missing.toml"):
        with pytest.raises(ConfigError, match="presets"):
            find_presets(wanted)


def test_scores_are_between_random_and_the_best_rule(file):
    reference = Reference(0.2, "slai", 0.7)
    assert [score(utility, reference) for utility in (0.2, 0.45, 0.7)] == pytest.approx([0.0, 0.5, 1.0])
    with pytest.raises(ConfigError, match="above random"):
        score(0.5, Reference(0.7, "slai", 0.7))
    preset = read_preset(file)
    rows = [{"greedy": [0.45, 0.45], "sampled": [0.2, 0.2]}, {"greedy": [0.8, 0.8], "sampled": [0.7, 0.7]}]
    (line,) = lines_of([(preset, rows)], {"tiny": reference})
    text = markdown([line], {"tiny": reference}, "told")
    assert line["greedy"]["scores"] == pytest.approx([0.5, 1.2]) and line["greedy"]["above"] == 1
    assert line["sampled"]["estimate"] == (pytest.approx(0.5), None, None)  # two seeds: no interval
    assert "| default, preset | A2C | 2 | 0.625 | 0.850 | 0.500 | 1 of 2 |" in text


def test_the_interquartile_mean_and_an_interval_of_strata():
    scores = np.array([[0.1], [0.5], [0.6], [0.9]])
    middle, low, high = estimate(scores)
    assert middle == pytest.approx(0.55) and 0.1 <= low < 0.55 < high <= 0.9
    assert estimate(scores) == (middle, low, high)
    assert estimate(scores[:2]) == (pytest.approx(0.3), None, None)
    far = np.hstack([np.full((4, 1), 0.0), np.full((4, 1), 10.0)])  # two environments: seeds never change places
    assert estimate(far) == pytest.approx((5.0, 5.0, 5.0))


OFF_POLICY = "learning_starts = 32\nbatch_size = 8\nbuffer_size = 256"


@pytest.mark.parametrize(
    ("learner", "settings", "world"),
    [
        ("recurrent", "n_steps = 16\nbatch_size = 16\nlstm_hidden_size = 8", {}),
        ("qr-dqn", f"{OFF_POLICY}\nn_quantiles = 5", {}),
        ("sac", OFF_POLICY, {'"preset"': '"priority"\nobservation = "slots"'}),
    ],
)
def test_other_algorithms_learn_in_the_worlds_that_they_fit(file, tmp_path, learner, settings, world):
    text = TINY.replace('"a2c"', f'"{learner}"').replace("n_steps = 4", settings)
    for old, new in world.items():
        text = text.replace(old, new)
    file.write_text(text)
    trained = learn(read_preset(file), Training(64, 0, tmp_path / "run", 32, 4))
    world = read_preset(file).config.replace(num_requests=6)
    steps = [step for step, _ in trained.curve]
    assert steps == sorted(set(steps)) and steps[-1] >= 64
    first, other = (utilities(world, trained.greedy, [seed]) for seed in (3000, 3001))
    assert np.isfinite(first + other + utilities(world, trained.sampled, [3000])).all()
    assert utilities(world, trained.greedy, [3000]) == first  # whatever was run before: no state is left over


def test_a_preset_from_training_to_table_and_nothing_is_done_twice(file, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "RULES", ("sarathi", "slai"))
    out = tmp_path / "out"
    config = benchmark.Config(
        presets=str(file), seeds=2, steps=64, eval_seeds=1, requests=8, eval_requests=4, out=str(out)
    )
    text = benchmark.benchmark(config)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [0, 1] and "A2C" in text and "64 decisions" in text
    for row in rows:
        assert all(math.isfinite(value) for value in row["greedy"] + row["sampled"])
        steps = [step for step, _ in row["curve"]]
        assert steps == sorted(set(steps)) and steps[-1] == 64
        assert (out / "tiny" / f"seed-{row['seed']}" / "best.zip").is_file()
    assert (out / "curves.png").stat().st_size > 1000
    assert json.loads((out / "benchmark.json").read_text())["lines"][0]["training_seeds"] == 2

    with open(out / "results.jsonl", "a") as lines:
        lines.write('{"preset": "ti')  # cut off by a kill
    monkeypatch.setattr(benchmark, "learn", lambda *_: pytest.fail("trained twice"))
    assert benchmark.benchmark(config) == text
    with pytest.raises(ConfigError, match=r"--steps: the results in .* have 64, got 65"):
        benchmark.Results(benchmark.Config(steps=65, eval_seeds=1, requests=8, eval_requests=4, out=str(out)))
    file.write_text(TINY.replace("[8]", "[9]"))
    with pytest.raises(ConfigError, match="preset tiny has changed"):
        benchmark.benchmark(config)
