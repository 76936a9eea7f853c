"""Worker processes end with the process that started them, killed or interrupted, whatever they are at."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")
def test_a_command_that_is_asked_to_end_ends_its_workers_and_says_how_to_go_on(tmp_path):
    """Without what multiprocessing says of semaphores that nobody freed."""
    words = "evaluate --policy slai --suite paper --num-requests 1000000 --seeds 4 --workers 2 --out out"
    command = [sys.executable, "-m", "llmsched_gym.cli", *words.split()]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        started = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        assert wait_for(lambda: len(started.read_text().split()) >= 3, 60)  # the tracker of semaphores, too
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
    lines = [line for line in said.splitlines() if "compiling" not in line]
    assert lines == ["llmsched: interrupted: the same command goes on where it stopped"]
    assert process.returncode == 143


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
