"""Whether trajectories are the same bit for bit elsewhere: other Pythons, both ends of numpy and numba, no compiler.

    python -m benchmarks.determinism [--names small/engine/paper] [--pythons 3.11,3.12,3.13]

makes a virtual environment a row in a temporary folder, with what the core needs and nothing else, and compares the
hashes of `tests/trajectories.py` with those on file. Prints a Markdown table; a row that cannot be made says why. The
first row has the oldest numpy and numba that `pyproject.toml` allows, the others the newest that fit. Rows whose
mathematical functions round otherwise than those that wrote the file (`trajectories.arithmetic`) are compared with the
first that rounds alike.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PINNED = ("numpy", "numba")
HASHES = """
import json, platform, sys
import numba, numpy, trajectories
wanted = sys.argv[1]
found = {name: make() for name, make in trajectories._small() if name.startswith(wanted)}
versions = [platform.python_version(), numpy.__version__, numba.__version__]
print(json.dumps([versions, trajectories.arithmetic(), found]))
"""


def lowest() -> dict[str, str]:
    """The lower ends of what `pyproject.toml` allows, by package."""
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    found = {}
    for name in PINNED:
        (need,) = (need for need in needs if re.match(rf"{name}\b", need))
        low = re.search(r">=([\d.]+)", need)[1]  # type: ignore[index]
        found[name] = low if "." in low else f"{low}.0"
    return found


def interpreter(version: str) -> str | None:
    """A Python of that version on this machine: of pyenv, or on the path."""
    places = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    return str(places[-1]) if places else shutil.which(f"python{version}")


def make(folder: Path, python: str, pins: dict[str, str]) -> Path:
    """A virtual environment with the core's dependencies; returns its Python."""
    subprocess.run([python, "-m", "venv", folder], check=True, capture_output=True, text=True)
    own = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    exact = [f"{name}=={version}.*" for name, version in pins.items()]
    subprocess.run([own, "-m", "pip", "install", "-q", *needs, *exact], check=True, capture_output=True, text=True)
    return own


def hashes(python: Path, names: str, compiled: bool, cache: Path) -> tuple[list[str], str, dict[str, str]]:
    """Versions, arithmetic, and hashes by trajectory, from a process of that Python."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    own = {"PYTHONPATH": path, "NUMBA_CACHE_DIR": str(cache), "NUMBA_DISABLE_JIT": "0" if compiled else "1"}
    command = [python, "-c", HASHES, names]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, check=True)
    versions, arithmetic, found = json.loads(done.stdout.splitlines()[-1])
    return versions, arithmetic, found


def main() -> int:
    """Print the table; 1 if a hash differs."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.determinism", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--names", default="small/engine/paper", help="beginning of the trajectories' names; all: small"
    )
    parser.add_argument("--pythons", default="3.11,3.12,3.13", help="versions to look for")
    args = parser.parse_args()
    known = json.loads((ROOT / "tests/data/trajectories.json").read_text(encoding="utf-8"))
    rows: list[tuple[str, dict[str, str]]] = []
    rows += [(version, {}) for version in args.pythons.split(",")]
    rows.insert(0, (args.pythons.split(",")[0], lowest()))
    failed, first = 0, {}
    print("| Python | numpy | numba | compiled | trajectories | differ |\n|---|---|---|---|---:|---:|", flush=True)
    for version, pins in rows:
        python = interpreter(version)
        if python is None:
            print(f"| {version} | | | | | no such interpreter here |", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                own = make(Path(folder, "venv"), python, pins)
                for compiled in (True, False):
                    failed += _row(hashes(own, args.names, compiled, Path(folder, "cache")), known, first, compiled)
            except subprocess.CalledProcessError as error:
                failed += 1
                said = (error.stderr or "").strip().splitlines() or ["no word"]
                print(f"| {version} | {pins.get('numpy', '')} | {pins.get('numba', '')} | | | {said[-1]} |", flush=True)
    return 1 if failed else 0


def _row(
    found: tuple[list[str], str, dict[str, str]], known: dict[str, str], first: dict[str, Any], compiled: bool
) -> int:
    versions, arithmetic, mine = found
    expected = known if arithmetic == known["arithmetic"] else first.setdefault(arithmetic, mine)
    note = "" if expected is known else " (from the first that rounds so)"
    differ = sum(expected.get(name) != value for name, value in mine.items())
    print(f"| {' | '.join(versions)} | {'yes' if compiled else 'no'} | {len(mine)} | {differ}{note} |", flush=True)
    return differ


if __name__ == "__main__":
    sys.exit(main())
