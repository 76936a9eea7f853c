"""The real backend behind the commands: evaluate, calibrate, sim2real and agents.train, on a model of two layers."""

import csv
import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from llmsched_gym.cli import main
from llmsched_gym.config import ConfigError, env_config, scenario
from llmsched_gym.evaluation.run import make_backend, simulate

ROOT = Path(__file__).parents[1]
REAL = ["--backend", "transformers", "--model", "random:tiny"]
SHORT = ["--suite", "paper", "--qps", "2", "--seeds", "1", "--num-requests", "2", "--set", "max_model_len=1024"]


@pytest.fixture
def one_thread():
    torch = pytest.importorskip("torch", reason="the real backend needs torch")
    pytest.importorskip("transformers", reason="the real backend needs transformers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def one_line(capsys):
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("llmsched: "), err
    return err


# --- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--backend", "cuda"], "backend: expected one of simulated, transformers"),
        (["--backend", "transformers"], "model: expected a folder, a hub id or random:tiny"),
        (["--model", "random:tiny"], "model: needs backend='transformers'"),
        (["--count-host-time"], "count_host_time: needs backend='transformers'"),
        ([*REAL, "--workers", "2"], "workers: expected 1 with backend='transformers'"),
        ([*REAL, "--jitter", "0.1"], "jitter: expected 0 with backend='transformers', whose times are measured"),
        ([*REAL, "--cost-scale", "2"], "cost_scale: expected 1"),
    ],
)
def test_a_wrong_choice_is_one_line(options, expected, capsys):
    assert main(["evaluate", "--policy", "slai", *options]) == 2
    assert expected in one_line(capsys)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("./nowhere", "'./nowhere': no such folder"),
        ("random:nothing", "expected one of random:mistral-7b, random:tiny"),
    ],
)
def test_a_missing_model_is_one_line(model, expected, capsys, one_thread, tmp_path):
    assert main(["evaluate", "--policy", "slai", "--backend", "transformers", "--model", model]) == 2
    assert expected in one_line(capsys)
    assert main(["calibrate", "--model", model, "--out", str(tmp_path / "p.json")]) == 2
    assert expected in one_line(capsys)


def test_a_model_that_is_too_short_says_what_to_set(capsys, one_thread):
    assert main(["evaluate", "--policy", "slai", *REAL, "--set", "max_model_len=65536"]) == 2
    assert "knows 32768 positions; set max_model_len=32768" in one_line(capsys)


WITHOUT_THE_EXTRA = """
import sys
for name in ("torch", "transformers"):
    sys.modules[name] = None  # an import of it fails
from llmsched_gym.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["evaluate", "--policy", "slai", *REAL], 2),
        (["calibrate", "--model", "random:tiny", "--out", "p.json"], 2),
        (["sim2real", "--model", "random:tiny", "--out", "p"], 2),
        (["calibrate", "--help"], 0),
        (["sim2real", "--help"], 0),
    ],
)
def test_without_the_extra_one_line_says_how_to_install_it(command, code):
    run = [sys.executable, "-c", WITHOUT_THE_EXTRA, *command]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    if code:
        assert done.stdout == "" and done.stderr.count("\n") == 1 and "pip install '.[real]'" in done.stderr
    else:
        assert done.stdout.startswith(f"Usage: llmsched {command[0]}") and "--model" in done.stdout


# --- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate_on_a_model(capsys, one_thread, tmp_path):
    out = tmp_path / "real"
    command = ["evaluate", "--policy", "slai,sarathi", *REAL, *SHORT, "--out", str(out), "--json"]
    assert main(command) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["policy"], r["backend"], r["model"]) for r in rows] == [
        (policy, "transformers", "random:tiny") for policy in ("slai", "sarathi")
    ]
    assert all(r["num_finished"] + r["num_rejected"] == 2 and r["iterations"] > 0 and r["jitter"] == 0.0 for r in rows)
    steps = pd.read_parquet(out / "steps.parquet")
    assert len(set(steps["duration_s"])) > len(steps) / 2, "measured times are hardly ever equal"
    config = json.loads((out / "config.json").read_text())
    assert "torch" in config["setup"] and config["scenario"]["model"] == "random:tiny"

    # a folder of measured runs takes no simulated ones, and is complete for the command that made it
    simulated = [word for word in command if word not in REAL]
    assert main(simulated) == 2
    assert "another configuration (it differs in" in one_line(capsys)
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == rows

    # the report's own command names the same runs
    [line] = [s for s in (out / "report.md").read_text().splitlines() if s.startswith("llmsched evaluate")]
    words = shlex.split(line)[1:-1]  # a folder by its name: here it is told in full
    assert main([*words, str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == rows


def test_an_interrupted_grid_goes_on(one_thread, tmp_path):
    from llmsched_gym.evaluation.grid import evaluate

    world = scenario("paper", backend="transformers", model="random:tiny", num_requests=1, max_model_len=512)

    def stop(done, total):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(world, ["slai", "sarathi"], qps=[2.0], seeds=1, out=tmp_path, progress=stop)
    [first] = [json.loads(line)["row"] for line in (tmp_path / "partial" / "rows.jsonl").read_text().splitlines()]
    rows = evaluate(world, ["slai", "sarathi"], qps=[2.0], seeds=1, out=tmp_path)
    assert rows[0] == first and rows[1]["policy"] == "sarathi"


# --- the scheduler's own time ----------------------------------------------------------------------------------------


class Recorder:
    """A backend of constant times that keeps what it was given."""

    def __init__(self):
        self.batches = []

    def reset(self, table):
        self.batches.clear()

    def execute(self, batch):
        from llmsched_gym.engine import Execution

        self.batches.append(batch)
        return Execution(0.01)


class Deliberate:
    """Sarathi-Serve that claims to need a while."""

    decision_s = 0.25

    def __init__(self):
        from llmsched_gym.scheduler import make_scheduler

        self.inner, self.resets = make_scheduler("sarathi"), 0

    def reset(self, seed):
        self.resets += 1

    def decide(self, engine, env=0):
        engine.decide(self.inner, env)


def test_a_declared_decision_time_does_not_count_beside_a_measured_one():
    world = scenario("paper", backend="transformers", model="none", num_requests=3, qps=2.0)
    clocks, batches = [], []
    for count in (False, True):
        recorder, policy = Recorder(), Deliberate()
        episode = simulate(world.replace(count_host_time=count), policy, 0, backend=recorder, num_steps=10)
        assert policy.resets == 1 + count, "the steps that load kernels leave no trace"
        clocks.append(np.diff(episode.steps["start_s"][:3]).max())
        batches.append(int(episode.sim.num_batches))
        assert len(recorder.batches) == batches[-1]
    assert clocks[0] > 0.2 and clocks[1] < 0.2


def test_count_host_time_reaches_the_backend(one_thread):
    for count in (False, True):
        world = scenario(
            "paper",
            backend="transformers",
            model="random:tiny",
            max_model_len=512,
            num_kv_blocks=64,
            count_host_time=count,
        )
        backend = make_backend(world)
        assert backend.count_host_time is count and backend.num_kv_blocks == 64


# --- worlds ----------------------------------------------------------------------------------------------------------


def test_a_suite_on_a_model_has_no_simulated_noise():
    world = scenario("drift", backend="transformers", model="random:tiny")
    assert (world.jitter, world.cost_scale, world.straggler_share) == (0.0, 1.0, 0.0)
    assert env_config("default", backend="transformers", model="random:tiny").jitter == 0.0
    assert scenario("default").jitter == 0.05
    with pytest.raises(ConfigError, match="jitter: expected 0"):
        scenario("default").replace(backend="transformers", model="random:tiny")
    with pytest.raises(ConfigError, match="backend: expected what make_backend gives"):
        simulate(world, "slai", 0)


# --- calibrate and sim2real ------------------------------------------------------------------------------------------


def test_calibrate_then_compare(capsys, one_thread, tmp_path):
    out = tmp_path / "tiny.json"
    command = ["calibrate", "--model", "random:tiny", "--device", "cpu", "--out", str(out), "--threads", "1"]
    command += ["--max-tokens", "48", "--max-context", "64", "--max-seqs", "8", "--mixtures", "25"]
    assert main([*command, "--rounds", "1", "--repeats", "1"]) == 0
    assert "held-out batches" in capsys.readouterr().out
    with out.with_suffix(".csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) > 25

    page = tmp_path / "page"
    command = ["sim2real", "--model", "random:tiny", "--device", "cpu", "--out", str(page), "--profile", str(out)]
    command += ["--policy", "slai,sarathi", "--loads", "0.5", "--num-requests", "4", "--seeds", "1"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["steps"] > 0 and (page / "report.html").is_file()
    assert main(["sim2real", "--model", "random:tiny", "--out", str(page), "--loads", "x"]) == 2
    assert "loads: expected numbers > 0" in one_line(capsys)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated_run(tmp_path_factory):
    """A run folder of agents.train, in simulation, and its settings."""
    for name in ("stable_baselines3", "sb3_contrib", "tensorboard"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    from llmsched_gym.agents.train import Config, train

    world = {"qps": 1.5, "warmup_s": 0.0, "drain_s": 5.0, "arrivals_continue": False}
    config = Config(
        out=str(tmp_path_factory.mktemp("runs") / "sim"),
        steps=64,
        num_envs=4,
        n_steps=8,
        action_repeat=2,
        hidden=(8,),
        eval_seeds=1,
        eval_requests=1,
        set={**world, "horizon_s": 5.0, "max_backlog": 2, "max_model_len": 512},
    )
    train(config)
    return config


@pytest.mark.parametrize("source", ["", "best"])
def test_training_goes_on_on_a_model(simulated_run, source, one_thread, tmp_path):
    from llmsched_gym.agents.checkpoint import load_checkpoint
    from llmsched_gym.agents.train import Config, train
    from llmsched_gym.policies import read_folder

    start = Path(simulated_run.out) / source
    out = tmp_path / "real"
    config = replace(
        simulated_run, out=str(out), backend="transformers", model="random:tiny", num_envs=128, warm_start=str(start)
    )
    config = replace(config, steps=16, checkpoint_every=8, learning_rate=0.0)
    train(config)
    (_, before), (spec, after) = read_folder(Path(simulated_run.out) / "policy"), read_folder(out / "policy")
    if source == "":
        saved = load_checkpoint(start)["policy"]
        assert np.allclose(saved["action_net.bias"].numpy(), after["out.bias"])
    else:
        assert all(np.allclose(before[name], after[name]) for name in before), "nothing was learned at a rate of 0"
    assert spec.training["model"] == "random:tiny" and spec.training["warm_start"] is True
    assert [json.loads(line)["step"] for line in (out / "progress.jsonl").read_text().splitlines()] == [8, 16]

    path = out / "config.json"  # as if it had been stopped half way
    path.write_text(json.dumps({**json.loads(path.read_text()), "steps": 24}))
    train(Config(out=str(out), resume=True))
    assert [json.loads(line)["step"] for line in (out / "progress.jsonl").read_text().splitlines()] == [8, 16, 24]


def test_what_a_warm_start_cannot_use_is_one_line(simulated_run, one_thread, tmp_path):
    from llmsched_gym.agents.train import train
    from llmsched_gym.scheduler import PolicyError

    best = str(Path(simulated_run.out) / "best")
    base = replace(simulated_run, out=str(tmp_path / "x"), warm_start=best)
    (tmp_path / "model.zip").write_bytes(b"PK")
    for changes, error, expected in (
        ({"hidden": (4,)}, PolicyError, r"out.weight is \(\d+, 8\), this training's network \(\d+, 4\)"),
        ({"action_repeat": 4}, PolicyError, "action.repeat is 2, this training's 4"),
        ({"activation": "relu"}, PolicyError, "architecture.activation is tanh, this training's relu"),
        ({"warm_start": str(tmp_path / "none")}, ConfigError, "warm_start: .*none: no such file or folder"),
        ({"warm_start": str(tmp_path / "model.zip")}, ConfigError, "agents.export makes one of an SB3 zip"),
        ({"backend": "transformers"}, ConfigError, "model: expected a folder, a hub id or random:tiny"),
        ({"model": "random:tiny"}, ConfigError, "model: needs backend='transformers'"),
    ):
        with pytest.raises(error, match=expected) as caught:
            train(replace(base, **changes))
        assert "\n" not in str(caught.value) and not (tmp_path / "x").exists()
