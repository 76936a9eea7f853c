"""Worker processes end with the process that started them, killed or interrupted, whatever they are at."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmsched_gym.evaluation.workers import Workers

pytestmark = pytest.mark.usefixtures("interruptible")

SCRIPT = '''
import os, re, sys, time
from llmsched_gym.evaluation.spread import run_cells


def sleep(folder):
    open(os.path.join(folder, str(os.getpid())), "w").close()
    time.sleep(60)


def compute(folder):
    """Holds Python's lock for longer than anybody waits, as a compiled run does."""
    open(os.path.join(folder, str(os.getpid())), "w").close()
    re.match("(a+)+$", 40 * "a" + "b")


if __name__ == "__main__":
    function = {"sleep": sleep, "compute": compute}[sys.argv[1]]
    run_cells(function, [(sys.argv[2],)] * 2, 2, print)
'''


def terminate(process):
    process.send_signal(signal.SIGTERM)


def press_ctrl_c_twice(process):
    """As a terminal tells of it: all processes."""
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")
@pytest.mark.parametrize(("ask", "code"), [(terminate, 143), (press_ctrl_c_twice, 130)])
def test_a_command_that_is_asked_to_end_ends_its_workers_and_says_how_to_go_on(ask, code, tmp_path):
    """Without what multiprocessing says of semaphores that nobody freed."""
    words = "--quiet evaluate --policy slai --suite paper --num-requests 1000000 --seeds 4 --workers 2 --out out"
    command = [sys.executable, "-m", "llmsched_gym.cli", *words.split()]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        started = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        assert wait_for(lambda: len(started.read_text().split()) >= 3, 60)  # the tracker of semaphores, too
        pids = [int(pid) for pid in started.read_text().split()]
        ask(process)
        _, said = process.communicate(timeout=20)
        assert wait_for(lambda: not any(map(alive, pids)), 5)
    finally:
        process.kill()
    lines = said.splitlines()
    assert lines == ["llmsched: interrupted: the same command goes on where it stopped"]
    assert process.returncode == code


def test_a_worker_that_starts_does_not_hear_ctrl_c():
    with Workers(1) as pool:
        answer = pool.submit(abs, -3)
        (process,) = set(multiprocessing.active_children())
        os.kill(process.pid, signal.SIGINT)
        assert answer.result(60) == 3


def alive(pid):
    """Whether it runs: one that has ended and that nobody has waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("work", ["sleep", "compute"])
def test_workers_do_not_outlive_their_parent(how, work, tmp_path):
    script, folder = tmp_path / "script.py", tmp_path / "pids"
    script.write_text(SCRIPT)
    folder.mkdir()
    process = subprocess.Popen([sys.executable, str(script), work, str(folder)], stderr=subprocess.PIPE, text=True)
    pids = []
    try:
        assert wait_for(lambda: len(list(folder.iterdir())) == 2, 60)
        pids = [int(path.name) for path in folder.iterdir()]
        assert all(map(alive, pids))
        process.send_signal(how)
        assert wait_for(lambda: not any(map(alive, pids)), 5)
        _, said = process.communicate(timeout=5)
        assert said.count("Traceback") <= 1  # an interrupt's, the parent's own
    finally:
        for pid in filter(alive, [process.pid, *pids]):
            os.kill(pid, signal.SIGKILL)
        process.communicate()
