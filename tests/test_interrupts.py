"""Ctrl-C in the middle of long commands: they end at once, say how to go on, and go on to the same result."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from llmsched_gym.agents.options import fail_in_one_line
from llmsched_gym.cli import main
from llmsched_gym.config import scenario
from llmsched_gym.evaluation import cells
from llmsched_gym.evaluation.capacity import capacity
from llmsched_gym.evaluation.cluster_capacity import searched_rates
from llmsched_gym.serving.running import run_to_end

pytestmark = pytest.mark.usefixtures("interruptible")

WORLD = "--set qps=2.0 --set warmup_s=0.0 --set drain_s=30.0"
LEARNER = f"--num-envs 8 --n-steps 32 --batch-size 64 --epochs 2 --action-repeat 2 --threads 1 {WORLD}"
LEARNER += " --set horizon_s=4.0 --hidden 16,16 --eval-seeds 1 --eval-requests 10 --eval-every 2048"
TUNER = "--kind constant --action-repeat 4 --episodes 2 --requests 20 --population 4 --eval-seeds 1 --eval-requests 20"
COMMANDS = {
    "capacity": "--policy sarathi --suite paper --criterion ttft-median --seeds 3 --num-requests 500 --workers 1",
    "train": f"{LEARNER} --steps 4096 --checkpoint-every 512",
    "ppo": f"{LEARNER} --steps 8192 --checkpoint-every 512",
    "tune": f"{TUNER} {WORLD} --steps 60000 --eval-every 10000",
}


def words(command, out, *more):
    return ["--quiet", command, *COMMANDS[command].split(), "--out", str(out), *more]


def interrupt(command, out, pattern):
    """Run it until a file of that pattern with something in it lies in its folder; (what it said, how long it took)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llmsched_gym.cli", *words(command, out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if any(path.stat().st_size for path in out.glob(pattern)):
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    out, err = process.communicate(timeout=30)
    took_s = time.monotonic() - begun
    assert process.returncode == 130, (out, err)
    assert "Traceback" not in err and out == ""
    (said,) = [line for line in err.splitlines() if line.startswith("llmsched:")]
    return said, took_s


def test_an_interrupted_capacity_goes_on_to_the_same_result(tmp_path, monkeypatch):
    counted, run_cell = [], cells.run_cell
    monkeypatch.setattr(cells, "run_cell", lambda *given: counted.append(given[1]) or run_cell(*given))
    said, took_s = interrupt("capacity", tmp_path / "a", ".search-*.jsonl")
    assert said == "llmsched: interrupted: the same command goes on where it stopped" and took_s < 2.0
    (kept,) = (tmp_path / "a").iterdir()
    num_kept = len(kept.read_text().splitlines())
    assert main(words("capacity", tmp_path / "a")) == 0
    num_left = len(counted)
    world = scenario("paper", num_requests=500)
    capacity(world, ["sarathi"], "ttft-median", qps=searched_rates(world), seeds=3, out=tmp_path / "b")
    num_whole = len(counted) - num_left
    assert 0 < num_kept < num_whole and num_left == num_whole - num_kept
    assert not kept.exists()
    found, whole = (json.loads((tmp_path / name / "capacity-ttft-median.json").read_text()) for name in ("a", "b"))
    assert found == whole


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_modules_and_loops_of_events_end_at_either_signal(number, code, capsys):
    async def wait():
        asyncio.get_running_loop().call_soon(signal.raise_signal, number)
        await asyncio.sleep(60)

    for ended in (lambda: signal.raise_signal(number), lambda: run_to_end(wait())):
        usual = signal.getsignal(number)
        assert fail_in_one_line(ended, "interrupted") == code and capsys.readouterr() == ("", "interrupted\n")
        assert signal.getsignal(number) is usual


@pytest.mark.parametrize("command", ["train", "ppo", "tune"])
def test_an_interrupted_training_goes_on_to_the_same_result(command, tmp_path):
    for module in ("stable_baselines3", "sb3_contrib", "tensorboard", "cma"):
        pytest.importorskip(module)
    said, took_s = interrupt(command, tmp_path / "a", "checkpoint-*")
    assert said == "llmsched: interrupted: with --resume the same command goes on from its last checkpoint"
    assert took_s < 2.0
    steps = json.loads((tmp_path / "a" / "progress.jsonl").read_text().splitlines()[-1])["step"]
    assert main(words(command, tmp_path / "a", "--resume")) == 0
    assert main(words(command, tmp_path / "b")) == 0
    lines = {}
    for name in ("a", "b"):
        rows = [json.loads(line) for line in (tmp_path / name / "progress.jsonl").read_text().splitlines()]
        lines[name] = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
    assert lines["a"] == lines["b"] and steps < lines["b"][-1]["step"]
    tensors = [(tmp_path / name / "policy" / "policy.safetensors").read_bytes() for name in ("a", "b")]
    assert tensors[0] == tensors[1]


def test_loops_of_events_wait_neither_for_look_ups_of_names_nor_lose_an_interrupt_to_another_end(monkeypatch):
    async def looks_up():
        asyncio.get_running_loop().call_later(0.1, signal.raise_signal, signal.SIGINT)
        await asyncio.get_running_loop().getaddrinfo("nowhere.invalid", 80)

    async def ends():
        try:
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise OSError("closed") from None

    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait(30) and [])
    try:
        for coroutine in (looks_up, ends):
            begun = time.monotonic()
            assert fail_in_one_line(lambda coroutine=coroutine: run_to_end(coroutine()), "interrupted") == 130
            assert time.monotonic() - begun < 10.0
    finally:
        released.set()
