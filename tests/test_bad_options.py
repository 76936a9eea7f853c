"""Options that no run can have: one line that names the option, exit code 2, and nothing written."""

import dataclasses
import importlib
import math
import os
import sys

import gymnasium as gym
import numpy as np
import pytest

import llmsched_gym  # noqa: F401  registers the environments
from llmsched_gym.agents import headroom, route_headroom, training_run
from llmsched_gym.agents.options import fail_in_one_line, parse
from llmsched_gym.agents.tune import Config
from llmsched_gym.cli import main
from llmsched_gym.cli.entry import typer_group
from llmsched_gym.cli.options import Clients, World
from llmsched_gym.cli.values import scenario_of
from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.cost import ProfileError, check_reach, load_profile
from llmsched_gym.engine import Engine
from llmsched_gym.real_backend.command import progress_bar as measuring
from llmsched_gym.report import console
from llmsched_gym.text import read_value

for module in ("stable_baselines3", "sb3_contrib", "tensorboard", "cma"):
    pytest.importorskip(module, reason=f"{module} is not installed")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder that one is in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(argv, capsys, folder):
    """The line by which a command refuses its options."""
    before = sorted(folder.rglob("*"))
    if argv[0] == "llmsched":
        code = main(argv[1:])
    else:
        module = importlib.import_module(f"llmsched_gym.agents.{argv[0]}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", argv)
            code = module.main()
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1 and "Traceback" not in err, err
    assert sorted(folder.rglob("*")) == before
    return err.partition(": ")[2].rstrip("\n")


# Rates next to 0


@pytest.mark.parametrize(
    "argv",
    [
        ["evaluate", "--policy", "slai", "--qps", "1e-300", "--out", "o"],
        ["capacity", "--policy", "slai", "--criterion", "paper", "--qps", "1e-300,1", "--out", "o"],
        ["ppo", "--set", "qps=1e-300"],
        ["train", "--set", "qps=1e-300"],
        ["tune", "--set", "qps=1e-300"],
        ["imitate", "--set", "qps=1e-300"],
    ],
)
def test_rates_next_to_0_are_refused_by_every_command(argv, here, capsys):
    assert "qps: expected a number >= 1e-06 and <= 1e+06, got 1e-300" in refused(["llmsched", *argv], capsys, here)


def test_rates_next_to_0_are_refused_by_every_environment():
    message = "^qps: expected a number >= 1e-06 and <= 1e"
    for make in (gym.make, lambda id, **more: gym.make_vec(id, num_envs=2, **more)):
        for id in ("LLMSched-v0", "LLMSched-Drift-v0", "LLMRoute-v0"):
            with pytest.raises(ConfigError, match=message):
                make(id, qps=1e-300)


# Values of --set, which may be written as in JSON, TOML or Python


def test_every_command_reads_values_alike():
    texts = ("true", "True", "false", "False", "null", "None", "inf", "1e-3", "[1, 2]", "none", "'x'", "x", '"')
    values = [True, True, False, False, None, None, math.inf, 1e-3, [1, 2], "none", "x", "x", '"']
    texts, values = (*texts, "[1, -inf]", "(+inf, 'inf')"), [*values, [1, -math.inf], (math.inf, "inf")]
    others = ("{[1]}", "{{}}", "...", "b'x'", "{1, 2}", "1+2j", "[1, infinite]")  # what no field can be stays text
    texts, values = (*texts, *others), [*values, *others]
    words = [word for i, text in enumerate(texts) for word in ("--set", f"f{i}={text}")]
    assert list(parse(Config, words, None).set.values()) == values
    assert math.isnan(read_value("nan")) and math.isnan(read_value("[nan]")[0])
    world = World(set_=["async_lag=True", "num_requests=None", "qps_range=(1, 2)"])
    assert scenario_of(world, Clients(), None) == scenario(async_lag=True, num_requests=None, qps_range=(1, 2))


# Empty text, which as a path is the folder that one is in


def with_out():
    """Commands of `llmsched` whose --out typer reads, and what else they need."""
    for name, command in typer_group().commands.items():
        if any("--out" in parameter.opts for parameter in command.params):
            yield name


NEEDED = {
    "evaluate": ["--policy", "slai"],
    "capacity": ["--policy", "slai", "--criterion", "paper"],
    "replay": ["run.csv", "--profile", "rtx6000ada-mistral-7b"],
    "serve-bench": ["--url", "http://127.0.0.1:9", "--label", "x"],
    "report": ["folder"],
    "arena": [],
    "fit": ["--batches", "measured.csv", "--model", "mistral-7b", "--device", "h100-sxm"],
    "roofline": ["mistral-7b", "h100-sxm"],
    "calibrate": ["--model", "random:tiny"],
    "sim2real": ["--model", "random:tiny"],
}


def test_every_command_with_an_out_is_tried():
    assert {*with_out()} <= {*NEEDED}


@pytest.mark.parametrize("command", NEEDED)
def test_an_out_of_no_text_is_not_the_folder_one_is_in(command, here, capsys):
    line = refused(["llmsched", command, *NEEDED[command], "--out", ""], capsys, here)
    assert "'--out': expected some text, got ''" in line


def test_an_options_file_is_no_way_around_it(here, capsys):
    (here / "o.toml").write_text('policy = "slai"\nout = ""\n')
    assert "expected some text, got ''" in refused(["llmsched", "evaluate", "--config", "o.toml"], capsys, here)


AGENTS = ("train", "ppo", "tune", "imitate", "compare")


@pytest.mark.parametrize("command", AGENTS)
@pytest.mark.parametrize("name", ["out", "suite"])
def test_nor_is_one_of_a_training(command, name, here, capsys):
    assert refused(["llmsched", command, f"--{name}", ""], capsys, here) == f"--{name}: expected some text, got ''"


@pytest.mark.parametrize("module", ["robustness", "headroom", "benchmark", "tune_route", "imitate_route"])
def test_nor_is_one_of_a_module(module, here, capsys):
    assert refused([module, "--out="], capsys, here) == "--out: expected some text, got ''"


# What trainings cannot have


@pytest.mark.parametrize("command", ["train", "ppo", "imitate"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--hidden", ","], "--hidden: expected whole numbers separated by commas, got ','"),
        (["--hidden", "64,,64"], "--hidden: expected whole numbers separated by commas, got '64,,64'"),
        (["--hidden", "999999999"], "--hidden: expected whole numbers from 1 to 16,384, got 999999999"),
        (["--num-envs", "1e12"], "--num-envs: expected a whole number <= 65,536, got 1000000000000"),
        (["--set", "nope=1"], "set: the scenario has no field 'nope'"),
        (["--set", "qpss=1"], "set: the scenario has no field 'qpss'; did you mean 'qps'?"),
        (["--set", "suite=paper"], "--set: suite is no field of the scenario; use the option of that name"),
        (["--set", "burstiness=1e-300"], "burstiness: expected a number >= 0.001"),
        (["--eval-requests", "1e9"], "qps: about 1e+09 requests in one episode"),
        (["--eval-requests", "1e4", "--set", "qps=1e-6"], "arrival_s: expected times below"),
        (["--eval-seeds", "1001"], "--eval-seeds: expected at most 1,000, as many as there are seeds, got 1001"),
        (["--out", "file"], "out: cannot write to file: file is no folder"),
        (["--out", "file/x"], "out: cannot write to file/x: "),
    ],
)
def test_what_no_training_can_have(command, options, words, here, capsys):
    (here / "file").write_text("mine")
    assert words in refused(["llmsched", command, *options], capsys, here)


CLUSTER = ["--policy", "slai", "--suite", "cluster", "--seeds", "1", "--out", "o"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["ppo", "--set", "mask_in_observation=rllib"], "mask_in_observation: expected None for compiled rollouts"),
        (["ppo", "--gae-lambda", "1.5"], "--gae-lambda: expected a number <= 1, got 1.5"),
        (["train", "--set", "observation=slots"], "--set: observation has an option of its own, --observation"),
        (["tune", "--set", "action=priority"], "action: expected 'knobs' where knobs are tuned, got 'priority'"),
        (["tune", "--set", "observation=slots"], "observation: expected 'features' where knobs are tuned, got 'slots'"),
        (["tune", "--set", "profile=nope"], "profile: expected one of"),
        (["tune", "--set", "scheduler_profile=nope"], "profile: expected one of"),
        (["ppo", "--n-steps", "1e12"], "--n-steps: expected a whole number <= 1,048,576, got"),
        (["train", "--env", "route", "--num-envs", "1e12"], "--num-envs: expected a whole number <= 65,536, got"),
        (["train", "--env", "route", "--set", "replica_scheduler=nope"], "replica_scheduler: policy 'nope' is unknown"),
        (["train", "--env", "route", "--set", "decode_router=nope"], "decode_router: router 'nope' is unknown"),
        (["train", "--env", "route", "--warm-start", "nope"], "warm_start: nope: no such file or folder"),
        (["evaluate", *CLUSTER, "--set", "replica_scheduler=nope"], "replica_scheduler: policy 'nope' is unknown"),
        (["evaluate", *CLUSTER, "--set", "decode_router=nope"], "decode_router: router 'nope' is unknown"),
        (["train", "--batch-size", "1"], "batch_size: expected 2 or more, as advantages are normalised, got 1"),
        (["train", "--num-envs", "1", "--n-steps", "1"], "num_envs * n_steps: expected 2 or more"),
        (
            ["train", "--env", "route", "--batch-size", "1"],
            "batch_size: expected 2 or more, as advantages are normalised",
        ),
        (["train", "--env", "route", "--num-envs", "1", "--n-steps", "1"], "num_envs * n_steps: expected 2 or more"),
        (["train", "--gamma", "2"], "--gamma: expected a number <= 1, got 2"),
        (["train", "--width", "1e9"], "--width: expected a whole number <= 16,384, got"),
    ],
)
def test_what_one_training_cannot_have(argv, words, here, capsys):
    assert words in refused(["llmsched", *argv], capsys, here)


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc")
@pytest.mark.parametrize("argv", [["llmsched", "tune"], ["headroom"], ["tune_route"]])
def test_a_place_in_which_nobody_can_make_a_folder(argv, here, capsys):
    line = refused([*argv, "--out", "/proc/nope/x"], capsys, here)
    assert line.startswith("out: cannot write to /proc/nope") and ": /proc " in line


@pytest.mark.parametrize("argv", [["llmsched", "ppo"], ["robustness"], ["benchmark"]])
def test_a_name_that_is_too_long(argv, here, capsys):
    assert "out: cannot write to xxx" in refused([*argv, "--out", "x" * 300], capsys, here)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to(here, capsys):
    (here / "closed").mkdir(mode=0o500)
    assert "closed may not be written to" in refused(["llmsched", "ppo", "--out", "closed/x"], capsys, here)


# Settings of a run that goes on


@pytest.mark.parametrize("command", ["train", "ppo", "tune"])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ('{"steps": "x"}', "steps: expected a whole number, got 'x'"),
        ('{"seed": null}', "seed: expected a whole number, got None"),
        ('{"set": [1]}', "set: expected a table, got [1]"),
        ('{"eval_every": 0}', "eval_every: expected a whole number >= 1, got 0"),
        ('{"steps": -5}', "steps: expected a whole number >= 1, got -5"),
    ],
)
def test_settings_that_no_run_has_are_not_gone_on_with(command, settings, words, here, capsys):
    (here / "run").mkdir()
    (here / "run" / "config.json").write_text(settings)
    line = refused(["llmsched", command, "--resume", "--out", "run"], capsys, here)
    assert line == f"out: run/config.json: {words}"


# What modules of agents cannot have


@pytest.mark.parametrize("module", ["headroom", "route_headroom", "robustness", "tune_route"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seeds", "1e9"], "--seeds: expected "),
        (["--out", "/dev/null/x"], "out: cannot write to /dev/null"),
    ],
)
def test_what_no_module_can_have(module, options, words, here, capsys):
    assert refused([module, *options], capsys, here).startswith(words)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["headroom", "--constant", "nope"], "policy 'nope' is unknown"),
        (["headroom", "--selection-seeds", "1001"], "--selection-seeds: expected at most 1,000"),
        (["headroom", "--set", "profile=nope"], "profile: expected one of"),
        (["route_headroom", "--scheduler", "nope"], "policy 'nope' is unknown"),
        (["route_headroom", "--also", "nope"], "'nope'"),
        (["route_headroom", "--load", "0"], "--load: expected a number above 0, got 0"),
        (["robustness", "--baseline", "nope"], "policy 'nope' is unknown"),
        (["robustness", "--share", "0"], "--share: expected a number above 0, got 0"),
        (["tune_route", "--scheduler", "slai[budget=0]"], "budget"),
        (["tune_route", "--set", "workload=nope"], "workload"),
        (["headroom", "--planner", "--interval-s", "0"], "--interval-s: expected a number above 0, got 0"),
        (["headroom", "--planner", "--profiles", "nope", "--loads", "own"], "profile: expected one of"),
        (["benchmark", "--eval-seeds", "1001"], "--eval-seeds: expected at most 1,000"),
        (["headroom", "--suite", "cluster"], "suite: expected one of one engine, got 'cluster'"),
        (["headroom", "--workers", "1e6"], "--workers: expected a whole number <= 1,024, got 1000000"),
        (["route_headroom", "--set", "num_requests=0"], "num_requests: expected a whole number >= 1, got 0"),
        (["imitate_route"], "weights: expected a file of agents.tune_route, got ''"),
    ],
)
def test_what_one_module_cannot_have(argv, words, here, capsys):
    assert words in refused(argv, capsys, here)


PRESET = 'learner = "{}"\n[world]\naction = "preset"\n{}\n[settings]\n{}\n'


@pytest.mark.parametrize(
    ("learner", "world", "settings", "words"),
    [
        ("dqn", 'mask_in_observation = "rllib"', "", "world.mask_in_observation: expected None for dqn, got 'rllib'"),
        ("own-ppo", 'observation = "slots"', "", "world.observation: expected 'features' for own-ppo, got 'slots'"),
        ("dqn", "", "gradient_steps = -5", "settings.gradient_steps: expected a whole number from -1 to"),
    ],
)
def test_presets_that_no_training_can_have(learner, world, settings, words, here, capsys):
    (here / "mine.toml").write_text(PRESET.format(learner, world, settings))
    assert refused(["benchmark", "--presets", "mine.toml"], capsys, here).startswith(f"presets: mine.toml: {words}")


def test_settings_of_a_preset_that_do_not_go_together_are_one_line(here):
    from llmsched_gym.agents.benchmark_learners import Training, learn
    from llmsched_gym.agents.benchmark_presets import read_preset

    (here / "mine.toml").write_text(PRESET.format("a2c", "", "use_sde = true"))
    with pytest.raises(ConfigError, match=r"^presets: mine: settings: .*[^\n]$"):
        learn(read_preset(here / "mine.toml"), Training(16, 0, here / "out" / "seed-0", 16, 4))


def test_a_search_refuses_what_no_trial_could_have_and_folders_of_trainings(here, capsys):
    pytest.importorskip("optuna", reason="needs optuna")
    from llmsched_gym.agents.run_folder import start_run
    from llmsched_gym.agents.train import Config

    (here / "file").write_text("mine")
    assert "warm_start: file: expected a run" in refused(["llmsched", "search", "--warm-start", "file"], capsys, here)
    start_run(Config(out="run"))
    line = refused(["llmsched", "search", "--resume", "--out", "run"], capsys, here)
    assert line == "out: run holds a training, and no search; choose another folder"


def test_an_error_of_the_system_is_one_line(here, capsys, monkeypatch):
    def fail(*args, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(headroom, "run_cells", fail)
    monkeypatch.setattr(sys, "argv", ["headroom", "--workers", "1"])
    assert headroom.main() == 1
    assert capsys.readouterr() == ("", "error: [Errno 28] No space left on device\n")


def test_what_there_is_no_memory_for_is_said_in_few_words(capsys):
    assert fail_in_one_line(lambda: np.zeros(1 << 50, [(f"field{i}", "f8") for i in range(99)])) == 1
    assert len(capsys.readouterr().err) < 120


# What goes wrong, or is to be quiet, among runs


@pytest.mark.parametrize("module", [headroom, route_headroom])
def test_an_error_among_runs_leaves_no_bar(module, here, capsys, monkeypatch):
    def run_cells(*cells, **more):
        raise ConfigError("qps: too much")

    monkeypatch.setattr(module, "run_cells", run_cells)
    monkeypatch.setattr(sys, "argv", [module.__name__, "--workers", "1"])
    assert module.main() == 2
    assert capsys.readouterr() == ("", "error: qps: too much\n")


def test_a_bar_of_a_training_or_a_model_stands_on_terminals_alone(capsys, monkeypatch):
    for shown in (False, True):
        if shown:
            monkeypatch.setenv("FORCE_COLOR", "1")  # stderr counts as a terminal
        with training_run._bar(True) as bar:
            bar.add_task("training", total=1, best="-")
        with measuring("batches") as progress:
            progress(1, 1)
        assert bool(capsys.readouterr().err) == shown


def test_who_wants_quiet_gets_no_bar(here, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # stderr counts as a terminal
    monkeypatch.setattr(headroom, "run_cells", lambda function, cells, *more, **kept: [0.0] * len(cells))
    for quiet in (False, True):
        monkeypatch.setattr(console, "quiet", quiet)
        headroom.headroom(headroom.Config(seeds=2, settings=3, workers=1))
        assert ("runs" in capsys.readouterr().err) != quiet


# Surfaces whose last trend falls


def falling(**tables):
    """The measured surface with its times at the last knots of context lower than before them."""
    profile = load_profile("rtx4090-llama-3.1-8b-vllm")
    return dataclasses.replace(profile, surface=dataclasses.replace(profile.surface, **tables), fit=None)


def test_decodes_that_take_no_time_past_the_last_knots_are_refused_by_the_engine():
    surface = load_profile("rtx4090-llama-3.1-8b-vllm").surface
    rows = tuple((*row[:-1], 0.5 * row[-2]) for row in surface.decode_ms)
    bent = falling(decode_ms=rows)
    Engine(scenario(max_model_len=surface.context[-1]), 4, profile=bent)
    world = scenario(max_model_len=1 << 20, num_kv_blocks=1 << 18)
    with pytest.raises(ProfileError, match=r"surface\.decode_ms: expected times that do not fall below 0, ") as error:
        Engine(world, 4, profile=bent)
    assert "\n" not in str(error.value)
    steep = tuple(tuple((*row[:-1], 0.0) for row in plane) for plane in surface.hybrid_ms)
    with pytest.raises(ProfileError, match=r"surface\.hybrid_ms: expected times that do not fall below 0, "):
        Engine(world, 4, profile=falling(hybrid_ms=steep))


@pytest.mark.parametrize("name", ["rtx4090-llama-3.1-8b-vllm", "rtx6000ada-mistral-7b-vllm"])
def test_what_was_measured_takes_time_at_any_length_and_number(name):
    check_reach(load_profile(name), 1024, 1 << 17, 1 << 31)
