"""One name for each module, however it comes: a clone, uninstalled or installed from, a wheel, an editable install."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("llmsched_gym", "agents", "baselines", "real_backend")
LIBRARIES = sysconfig.get_paths()["purelib"]

PROBE = """
import json, sys
from pathlib import Path
from llmsched_gym.engine.jit import cache_dir
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.scheduler import make_scheduler
from llmsched_gym.config import scenario
import llmsched_gym.agents.options, llmsched_gym.real_backend.calibration.sweep
attained = [simulate(scenario("paper", num_requests=2), policy, 0).sim.num_finished for policy in ("slai", "learned")]
named = "config baselines.slai agents.options real_backend.calibration.sweep"
print(json.dumps({
    "attained": [int(n) for n in attained],
    "files": [sys.modules["llmsched_gym." + name].__file__ for name in named.split()],
    "short": [name for name in sys.modules if name.split(".")[0] in ("agents", "baselines", "real_backend")],
    "cache": Path(cache_dir()).name,
}))
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A source tree that nothing has been installed from."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in (*FOLDERS, "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def installed(clone, tmp_path_factory):
    """A folder as `pip install .` in the clone fills it, without the dependencies."""
    target = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "tree"
    shutil.copytree(clone, source)  # a build leaves folders behind
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps", "-w", target]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=200)
    if done.returncode != 0 and not os.environ.get("CI"):
        pytest.skip(f"no wheel: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = target.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def run(*command, cwd, path=(), timeout=200):
    """Python with `path` before this environment's libraries, whose own install of the project is not seen."""
    env = {k: v for k, v in os.environ.items() if k != "LLMSCHED_DATA_DIR"}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, (*path, LIBRARIES))), "NUMBA_DISABLE_JIT": "1"}
    command = [sys.executable, "-S", *map(str, command)]  # -S: .pth files are not read
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


def probe(folder, own=False, **options):
    """What the probe says, run as a script in `folder`, beside modules of the user's own if asked."""
    script = folder / "probe_script.py"
    script.write_text(PROBE)
    if own:
        for name in FOLDERS[1:]:
            (folder / f"{name}.py").write_text("raise SystemExit('this is mine')\n")
    done = run(script, cwd=folder, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def expected(root, where):
    """Files of the probe's four modules in a clone, or in a folder that the package is installed to."""
    beside = root if where == "clone" else root / "llmsched_gym"
    files = [root / "llmsched_gym/config/__init__.py", beside / "baselines/slai.py", beside / "agents/options.py"]
    return [str(file) for file in (*files, beside / "real_backend/calibration/sweep.py")]


@pytest.fixture(scope="module")
def cache():
    """Name of the cache folder in this process: an editable install, or a clone's tests."""
    from llmsched_gym.engine.jit import cache_dir

    return Path(cache_dir()).name


def test_a_clone_works_uninstalled(clone, cache, tmp_path):
    found = probe(tmp_path, path=[clone], own=True)
    assert found == {"attained": [2, 2], "files": expected(clone, "clone"), "short": [], "cache": cache}


def test_a_wheel_works_elsewhere(installed, cache, tmp_path):
    found = probe(tmp_path, path=[installed], own=True)
    assert found == {"attained": [2, 2], "files": expected(installed, "site"), "short": [], "cache": cache}


def test_a_clone_goes_before_what_was_installed_from_it(clone, installed, cache, tmp_path):
    found = probe(tmp_path, path=[clone, installed])
    assert found == {"attained": [2, 2], "files": expected(clone, "clone"), "short": [], "cache": cache}


def test_an_editable_install_works_elsewhere(cache, tmp_path):
    if str(ROOT) in os.environ.get("PYTHONPATH", "") or not list(Path(LIBRARIES).glob("__editable__*llmsched*")):
        pytest.skip("this environment has no editable install")
    for name in FOLDERS[1:]:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this is mine')\n")
    script = tmp_path / "probe_script.py"
    script.write_text(PROBE)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found == {"attained": [2, 2], "files": expected(ROOT, "clone"), "short": [], "cache": cache}


def test_a_wheel_holds_nothing_that_would_be_anybody_elses(installed):
    (top,) = installed.glob("*.dist-info/top_level.txt")
    assert top.read_text().split() == ["llmsched_gym"]
    names = {file.relative_to(installed).parts[0] for file in installed.rglob("*.py")}
    assert names == {"llmsched_gym"} and (installed / "llmsched_gym/py.typed").is_file()
    folders = {path.name for path in (installed / "llmsched_gym").iterdir()}
    assert folders >= set(FOLDERS[1:]) and not folders & {"tests", "benchmarks", "examples", "pyproject.toml"}


def test_the_examples_are_found_in_a_clone_and_are_not_needed_in_a_wheel(clone, installed, tmp_path):
    code = "from llmsched_gym.scheduler import make_scheduler; make_scheduler('{}:ShortestFirst')"
    in_clone = run("-c", code.format("examples.custom_scheduler"), cwd=clone)
    assert in_clone.returncode == 0, in_clone.stderr[-2000:]
    elsewhere = run("-c", code.format("examples.custom_scheduler"), cwd=tmp_path, path=[installed])
    assert "cannot import 'examples.custom_scheduler'" in elsewhere.stderr
    shutil.copy(ROOT / "examples/custom_scheduler.py", tmp_path / "mine.py")
    own = run("-c", code.format("mine"), cwd=tmp_path, path=[installed])
    assert own.returncode == 0, own.stderr[-2000:]


AS_COMMAND = """
import runpy, sys
sys.argv = [{name!r}, "--help"]
try:
    runpy.run_module({name!r}, run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code
short = {{n: m for n, m in sys.modules.items() if n.split(".")[0] in ("agents", "baselines", "real_backend")}}
assert all(m is sys.modules["llmsched_gym." + n] for n, m in short.items()), short
assert "llmsched_gym." + {name!r} in sys.modules, "the module ran as a copy of itself"
"""


AS_COMMANDS = [
    "agents.compare",
    "agents.robustness",
    *(f"real_backend.{n}" for n in ("calibration", "gpu_check", "sim2real")),
]


@pytest.mark.parametrize("name", AS_COMMANDS)
def test_a_clones_spelling_runs_the_module_of_the_long_name(clone, name):
    done = run("-c", AS_COMMAND.format(name=name), cwd=clone)
    assert done.returncode == 0 and "--help" in done.stdout, done.stderr[-2000:]


def test_a_second_name_for_a_scheduler_is_refused(clone):
    done = run("-c", "import baselines.slai", cwd=clone)
    assert "baselines is llmsched_gym.baselines: import it by that name" in done.stderr


def test_training_commands_say_in_one_line_what_is_missing(clone, tmp_path):
    code = "import sys; sys.modules.update(torch=None, stable_baselines3=None, cma=None, scipy=None)\n"
    code += "from llmsched_gym.cli import main\nsys.exit(main([{!r}, '--out', 'here']))"
    for command in ("train", "tune", "imitate", "compare"):
        done = run("-c", code.format(command), cwd=tmp_path, path=[clone])
        assert done.returncode == 2 and done.stdout == "", done.stderr[-2000:]
        assert done.stderr.startswith(f"llmsched: llmsched {command} needs ") and done.stderr.count("\n") == 1
        assert done.stderr.endswith("pip install '.[agents]'\n") and not list(tmp_path.iterdir())
    code = code.replace("torch=None, stable_baselines3=None, cma=None, scipy=None", "optuna=None")
    done = run("-c", code.format("search"), cwd=tmp_path, path=[clone])
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr == "llmsched: llmsched search needs optuna: pip install '.[agents,search]'\n"


def test_the_command_line_imports_torch_only_to_train(clone):
    code = "import sys; from llmsched_gym.cli import main; main(['suites']); assert 'torch' not in sys.modules"
    assert run("-c", code, cwd=clone).returncode == 0
