"""Every scheduler and every action space goes the way that is on file, bit for bit; see `trajectories`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trajectories

INTERPRETED = os.environ.get("NUMBA_DISABLE_JIT") == "1"
EXPECTED = json.loads(trajectories.FILE.read_text())
ARITHMETIC = EXPECTED.pop("arithmetic")
same_arithmetic = pytest.mark.skipif(
    trajectories.arithmetic() != ARITHMETIC, reason="this machine rounds otherwise than the one that wrote the file"
)


def differing(found):
    return [name for name, value in found if EXPECTED.get(name) != value]


def test_the_file_names_every_scheduler_and_every_action_space():
    names = {tuple(name.split("/")[:3]) for name in EXPECTED}
    for suite in trajectories.SUITES:
        wanted = {*trajectories.POLICIES, *trajectories.RULES}
        if suite not in trajectories.RULE_SUITES:
            wanted -= {*trajectories.RULES, trajectories.IN_PYTHON}
        assert {p for kind, s, p in names if (kind, s) == ("engine", suite)} == wanted
        for kind in ("single", "vector"):
            assert {p for k, s, p in names if (k, s) == (kind, suite)} == set(trajectories.ENVIRONMENTS)
    assert len(set(EXPECTED.values())) > 0.95 * len(EXPECTED)  # some schedulers agree with each other here and there


@same_arithmetic
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="takes an hour uncompiled")
def test_all_trajectories_are_those_on_file():
    assert differing(trajectories.full()) == []


@same_arithmetic
def test_the_small_trajectories_are_those_on_file():
    assert differing(trajectories.small()) == []


UNCOMPILED = "import json, trajectories; print(json.dumps(dict(trajectories.small())))"


@same_arithmetic
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the test above has done it")
def test_the_small_trajectories_are_the_same_uncompiled():
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", UNCOMPILED], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert differing(json.loads(done.stdout.splitlines()[-1]).items()) == []
