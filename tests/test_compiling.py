"""Compiled kernels: what their cache depends on, where it lies, what is removed, and what is said meanwhile."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmsched_gym import sources
from llmsched_gym.engine import cache, compiling
from llmsched_gym.engine.cache import KEPT, KEPT_S, KERNELS, remove_old

ROOT = Path(__file__).parents[1]
FOLDERS = ("llmsched_gym", "agents", "baselines", "real_backend")

DIGESTS = """
import json, os, sys
from pathlib import Path
os.environ["NUMBA_CACHE_DIR"] = sys.argv[1]
from llmsched_gym.config import scenario
from llmsched_gym.engine import cache
from llmsched_gym.evaluation.store import grid_config
from llmsched_gym.paper.reproduce import code_digest

def digests():
    cache.cache_dir.cache_clear()
    cache.kernels_digest.cache_clear()
    return [cache.cache_dir(), grid_config(scenario("paper"), ["slai"])["code"], code_digest()]

was, changed = digests(), {}
for line in sys.stdin:
    file = Path(line.strip())
    text = file.read_bytes()
    file.write_bytes(text + b"# edited\\n")
    changed[file.as_posix()] = [a != b for a, b in zip(digests(), was)]
    file.write_bytes(text)
assert digests() == was
print(json.dumps(changed))
"""


def module_of(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "llmsched_gym" else ("llmsched_gym", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_an_edit_of_a_file_that_they_depend_on_changes_the_three_digests(tmp_path):
    """In a copy of the tree files are edited, one at a time."""
    for name in ("pyproject.toml", *FOLDERS):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    always, results, paper, never = [True] * 3, [False, True, True], [False, False, True], [False] * 3
    kernels = ("config/scenario", "scheduler", "engine/pack", "env/features", "cost/profile", "workload/table")
    expected = {f"llmsched_gym/{name}.py": always for name in kernels} | {"baselines/slai.py": always}
    expected |= {f"llmsched_gym/evaluation/{name}.py": results for name in ("run", "gaps")}
    expected |= {f"llmsched_gym/{name}.py": paper for name in ("paper/reproduce", "fluid/mixed", "theory/stability")}
    expected |= {"llmsched_gym/paper/page/text.py": never, "llmsched_gym/report/plots.py": never}
    expected |= {"agents/train.py": never}
    done = subprocess.run(
        [sys.executable, "-c", DIGESTS, str(tmp_path / "cache")],
        input="\n".join(expected),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == expected


def test_every_module_with_kernels_counts_for_their_cache():
    behind = set(sources.files_behind(KERNELS))
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            names = sources.imported(file.read_text())
            if {f"llmsched_gym.engine.jit.{name}" for name in ("entry", "kernel")} & names:
                assert module_of(file) in behind, file


def test_imports_are_read_as_python_reads_them():
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            found = set()
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llmsched_gym"):
                    found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
                elif isinstance(node, ast.Import):
                    found |= {alias.name for alias in node.names if alias.name.startswith("llmsched_gym")}
                assert not (isinstance(node, ast.ImportFrom) and node.level), f"{file}: relative imports are not read"
            assert found <= sources.imported(file.read_text()), file


def folder_of(monkeypatch, **variables):
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    return Path(cache.cache_dir.__wrapped__())


def test_where_the_cache_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    home = {"HOME": tmp_path / "home"}
    assert folder_of(monkeypatch, **home).parent == tmp_path / "home/.cache/llmsched_gym"
    assert folder_of(monkeypatch, **home, XDG_CACHE_HOME=tmp_path / "x").parent == tmp_path / "x/llmsched_gym"
    for text in ("", "relative"):
        assert folder_of(monkeypatch, **home, XDG_CACHE_HOME=text).parent == tmp_path / "home/.cache/llmsched_gym"
    assert folder_of(monkeypatch, **home, NUMBA_CACHE_DIR=tmp_path / "n").parent == tmp_path / "n"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no HOME, and nobody in the passwd file
    own = folder_of(monkeypatch)
    assert own.parent == tmp_path / f"llmsched_gym-{os.getuid()}" and own.parent.stat().st_mode & 0o077 == 0
    assert not list(tmp_path.glob("kernels-*")) and not (tmp_path / "relative").exists()
    shutil.rmtree(own.parent)
    own.parent.symlink_to(tmp_path / "x")  # somebody else's trap
    assert folder_of(monkeypatch).parent != own.parent and not list((tmp_path / "x").glob("kernels-*"))


def test_old_caches_are_removed(tmp_path):
    names = [f"kernels-{i:016x}" for i in range(KEPT + 3)]
    for i, name in enumerate(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / "code.nbc").write_text("x")
        os.utime(tmp_path / name, (time.time() - i,) * 2)
    old, other = tmp_path / f"kernels-{'f' * 16}", tmp_path / "of_another_program"
    for path in (old, other):
        path.mkdir()
        os.utime(path, (time.time() - KEPT_S - 60,) * 2)
    (tmp_path / f"{old.name}.123.removed").mkdir()  # by a process that was ended
    remove_old(tmp_path / names[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names[: KEPT + 1], other.name]
    os.utime(tmp_path / names[1], (time.time() - KEPT_S - 60,) * 2)
    remove_old(tmp_path / names[0])
    assert not (tmp_path / names[1]).exists() and (tmp_path / names[2]).exists()


SLOWLY = """
import sys, time
from llmsched_gym.engine import compiling
from llmsched_gym.engine.jit import entry
compiling.QUIET_S = float(sys.argv[1])

@entry()
def twice(x):
    return 2 * x

assert twice(3) == 6
"""


@pytest.mark.skipif(os.environ.get("NUMBA_DISABLE_JIT") == "1", reason="nothing is compiled")
def test_compiling_is_announced_once_on_stderr_and_a_warm_cache_is_silent(tmp_path):
    (tmp_path / "slowly.py").write_text(SLOWLY)
    said = []
    for quiet_s in ("0.0", "0.0", "600"):
        if quiet_s == "600":
            own = [*(tmp_path / "cache").rglob("*twice*")]  # alone: what importing compiles may take its time
            assert len(own) == 2
            for path in own:
                path.unlink()
        done = subprocess.run(
            [sys.executable, tmp_path / "slowly.py", quiet_s],
            env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "LLMSCHED_SAY_COMPILING": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0 and done.stdout == "", done.stderr
        said.append(done.stderr)
    # one that importing compiles may have been there before, or be counted, too
    assert re.fullmatch(r"compiling kernels, once per machine: ([12])/\1 \.\.\.\n", said[0]) and said[1:] == ["", ""]


def test_only_our_kernels_are_spoken_of():
    watch = compiling._Compiling()

    foreign = SimpleNamespace(data={"dispatcher": SimpleNamespace(py_func=print)})
    watch.on_start(foreign)
    assert watch.kernels == watch.depth == 0
    watch.on_end(foreign)
    assert watch.depth == 0
