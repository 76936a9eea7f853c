"""The core in a virtual environment of its own: installs from the checkout, brings no torch, and its command works."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("llmsched_gym", "agents", "baselines", "real_backend")
CLONE_ONLY = ("tests", "benchmarks", "examples")
NO_NETWORK = re.compile(
    "No matching distribution|Could not find a version|name resolution|[Cc]onnection|timed out|retries"
)

pytestmark = pytest.mark.slow


def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_core_depends_on_nothing_of_the_extras():
    config = pyproject()["project"]
    core = {re.match(r"[\w-]+", name)[0].lower() for name in config["dependencies"]}
    known = (
        "gymnasium, numpy, numba, pandas, pyarrow, scipy, matplotlib, plotly, jinja2, typer, rich, safetensors, pillow"
    )
    assert core == set(known.split(", "))
    assert {"agents", "real", "ray", "rllib", "bench", "docs", "dev"} <= set(config["optional-dependencies"])


def test_constraints_pin_every_direct_dependency():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(re.fullmatch(r"([\w.-]+)==(\S+)", line).groups() for line in lines if line and not line.startswith("#"))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    config = pyproject()["project"]
    wanted = [*config["dependencies"]]
    for extra in ("agents", "real", "serve", "dev"):
        wanted += config["optional-dependencies"][extra]
    for requirement in wanted:
        name = re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-")
        assert name in pins, f"constraints.txt lacks {name}"
    assert pins["torch"] == "2.13.0"
    assert not [name for name in pins if name.startswith(("nvidia", "cuda", "triton"))]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folder of a virtual environment with the core, installed from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("core")
    source, venv = folder / "source", folder / "venv"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "venv", venv], check=True, timeout=60)
    pip = [venv / "bin/python", "-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, str(source), "-c", ROOT / "constraints.txt"], capture_output=True, text=True, timeout=400
    )
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1]
        if NO_NETWORK.search(done.stderr) and not os.environ.get("CI"):
            pytest.skip(f"pip cannot fetch the core's dependencies: {reason}")
        pytest.fail(f"pip install of the core failed: {done.stderr[-2000:]}")
    yield venv
    subprocess.Popen(["rm", "-rf", str(folder)])  # 800 MB; nobody waits for it


def run(venv, tmp_path, *command):
    env = {"PATH": f"{venv}/bin:/usr/bin:/bin", "HOME": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)


def test_installing_the_core_brings_no_torch(installed, tmp_path):
    listed = run(installed, tmp_path, "python", "-m", "pip", "list", "--format", "json")
    names = {package["name"].lower() for package in json.loads(listed.stdout)}
    assert "llmsched-gym" in names and "numba" in names
    assert not {"torch", "stable-baselines3", "sb3-contrib", "transformers", "tensorboard", "ray", "pytest"} & names
    failed = run(installed, tmp_path, "python", "-c", "import torch")
    assert "No module named 'torch'" in failed.stderr


def test_the_command_works_in_it(installed, tmp_path):
    policies = run(installed, tmp_path, "llmsched", "policies")
    assert policies.returncode == 0, policies.stderr
    for name in ("sarathi", "slai", "rad", "vllm-v1", "feasible-first", "random"):
        assert name in policies.stdout
    for command in ("suites", "workloads", "profiles"):  # data files are there
        done = run(installed, tmp_path, "llmsched", command)
        assert done.returncode == 0 and done.stdout, done.stderr


def test_what_the_wheel_ships(installed, tmp_path):
    code = "from importlib.util import find_spec; import llmsched_gym; print([n for n in {!r} if find_spec(n)])"
    long = [f"llmsched_gym.{name}" for name in (*FOLDERS[1:], *CLONE_ONLY)]
    done = run(installed, tmp_path, "python", "-c", code.format((*FOLDERS, *CLONE_ONLY, *long)))
    assert done.stdout.strip() == str(["llmsched_gym", *long[: len(FOLDERS) - 1]])


def test_every_package_is_listed_and_every_listed_one_is_there():
    folders = {path.parent.relative_to(ROOT) for name in FOLDERS for path in (ROOT / name).rglob("__init__.py")}
    names = {".".join(f.parts if f.parts[0] == "llmsched_gym" else ("llmsched_gym", *f.parts)) for f in folders}
    assert names == set(pyproject()["tool"]["setuptools"]["packages"])


def test_the_sdist_holds_what_its_tests_need(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="the sdist needs setuptools 77")
    source = tmp_path / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(
            ".*env*", ".git", "out", "runs", "*.egg-info", "__pycache__", ".*cache", "shared"
        ),
    )
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    with tarfile.open(source / "dist" / done.stdout.splitlines()[-1]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("docs", *CLONE_ONLY, *FOLDERS)
    needed = {str(file.relative_to(ROOT)) for folder in folders for file in (ROOT / folder).rglob("*.*")}
    needed |= {"Makefile", "constraints.txt", "CHANGELOG.md", "CONTRIBUTING.md", "README.md", "LICENSE", ".ci/run"}
    assert not {name for name in needed if "__pycache__" not in name} - held
