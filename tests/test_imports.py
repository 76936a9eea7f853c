"""Imports run one way, from config up to the command line; the core never reaches for baselines, agents or torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module may import its own package and packages of lower levels; of a package in a package the longer name counts.
ORDER = (
    ("config", "sources", "text", "help_text", "interrupts", "paper.constants"),
    ("files",),
    ("workload", "cost"),
    ("fluid",),
    ("engine", "report"),  # a report reads rows, whoever made them
    ("scheduler",),
    ("cluster",),
    ("env",),
    ("policies",),  # a learned policy sees what the environment shows
    ("baselines",),
    ("registry",),  # names to schedulers, learned ones too
    ("evaluation",),
    ("theory", "real_backend", "agents", "serving"),
    ("real_backend.calibration",),
    ("real_backend.sim2real",),
    ("real_backend.gpu_check",),
    ("paper",),
    ("cli",),
    ("reproduce",),
    ("__main__",),
)
LEVELS = {f"llmsched_gym.{name}": level for level, names in enumerate(ORDER) for name in names}
# Folders beside the package, subpackages of it; resolved by name when asked for, never imported by the core.
BESIDE = ("baselines", "agents", "real_backend")
FOLDERS = ("llmsched_gym", *BESIDE)
# What only the extras install, and the adapters that exist for it.
OPTIONAL = (
    "torch",
    "stable_baselines3",
    "sb3_contrib",
    "transformers",
    "tensorboard",
    "ray",
    "aiohttp",
    "prometheus_client",
    "optuna",
)
ADAPTERS = (
    "llmsched_gym/env/sb3.py",
    *(f"llmsched_gym/serving/{name}.py" for name in ("bench", "client", "prometheus")),
)


def sources(*packages):
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def imports(path):
    """(line, module) of every import statement, inside functions too; TYPE_CHECKING ones count as well."""
    package = [*parts_of(path.with_suffix(""))]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level], *filter(None, [base])])
            if not all(f"{base}.{alias.name}" in LEVELS for alias in node.names):
                yield node.lineno, base
            # `from package import module` names a module too
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def parts_of(path):
    """The names that lead to a file: those of its place in an installed package."""
    parts = path.relative_to(ROOT).parts
    return ("llmsched_gym", *parts) if parts[0] in BESIDE else parts


def unit(module):
    """The package or top module of LEVELS that `module` belongs to."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 1, -1))
    return next((name for name in names if name in LEVELS), None)


def module_name(path):
    parts = parts_of(path.with_suffix(""))
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def violations(path):
    own = module_name(path)
    own = unit(own)
    if own is None:  # llmsched_gym itself, which registers environments by name
        return []
    found = []
    for line, module in imports(path):
        other = unit(module)
        if other is not None and other != own and LEVELS[other] >= LEVELS[own]:
            found.append(f"{path.relative_to(ROOT)}:{line}: {own} imports {module}")
    return found


def test_every_module_has_a_level():
    for path in sources(*FOLDERS):
        name = module_name(path)
        assert name == "llmsched_gym" or unit(name) is not None, f"{name} has no level in LEVELS"


def test_imports_run_from_low_to_high():
    files = sources(*FOLDERS)
    assert len(files) > 30
    assert [v for path in files for v in violations(path)] == []


def test_the_core_imports_no_folder_beside_it_and_nobody_by_a_short_name():
    for path in sources(*FOLDERS, "benchmarks", "examples", "tests"):
        core = path.relative_to(ROOT).parts[0] == "llmsched_gym"
        for line, module in imports(path):
            parts = module.split(".")
            where = f"{path.relative_to(ROOT)}:{line} imports {module}"
            assert parts[0] not in BESIDE, where
            assert not (core and parts[0] == "llmsched_gym" and parts[1:2] and parts[1] in BESIDE), where


def test_only_adapters_name_what_the_extras_install():
    for path in sources("llmsched_gym", "baselines"):
        if str(path.relative_to(ROOT)) in ADAPTERS:
            continue
        for line, module in imports(path):
            assert module.split(".")[0] not in OPTIONAL, f"{path.relative_to(ROOT)}:{line} imports {module}"


def test_a_wrong_import_would_be_found(tmp_path, monkeypatch):
    folder = tmp_path / "llmsched_gym" / "engine"
    folder.mkdir(parents=True)
    file = folder / "wrong.py"
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for text, bad in {
        "from llmsched_gym.config import SLO": False,
        "from llmsched_gym.engine.state import State": False,
        "from . import state": False,
        "from llmsched_gym import scheduler": True,
        "from ..scheduler import install": True,
        "def f():\n    import llmsched_gym.env.core": True,
        "if TYPE_CHECKING:\n    from llmsched_gym.baselines.slai import DYNAMIC": True,
    }.items():
        file.write_text(text)
        assert bool(violations(file)) is bad, text


def test_a_report_loads_no_engine_and_what_is_slow_to_load_only_when_it_is_used():
    modules = [module_name(path) for path in sources("llmsched_gym/report")]
    assert len(modules) > 12 and "llmsched_gym.report.write" in modules
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
kept_out = ("numba", "scipy", "matplotlib", "llmsched_gym.engine", "llmsched_gym.registry", "llmsched_gym.evaluation")
print([name for name in kept_out if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["llmsched_gym", "baselines"])
def test_all_of_the_core_imports_without_the_extras(package):
    modules = [
        module_name(path)
        for path in sources(package)
        if str(path.relative_to(ROOT)) not in ADAPTERS and path.name != "__main__.py"
    ]
    code = f"""
import importlib, sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None  # an import of it fails
for name in {modules!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
