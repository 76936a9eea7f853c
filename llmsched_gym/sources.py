"""Which files code depends on, and one digest of them: for compiled kernels, results and the paper's evaluation.

The list is derived from the imports that the files themselves state, so that none has to be kept by hand.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path

_ROOT_PACKAGE = __name__.partition(".")[0]
_NAME = rf"({_ROOT_PACKAGE}[\w.]*)"
_IMPORT = re.compile(rf"^[ \t]*(?:from {_NAME} import (\([^)]*\)|[^#\n]*)|import {_NAME})", re.MULTILINE)


def imported(text: str) -> set[str]:
    """Names in this package that a file's import statements, anywhere in it, may mean: modules, and names in them."""
    found = set()
    for module, names, plain in _IMPORT.findall(text):
        found.add(module or plain)
        for name in re.sub(r"[()\s]|#.*", " ", names).split(","):
            if name.strip():
                found.add(f"{module}.{name.split()[0]}")
    return found


def files_behind(modules: Iterable[str], without: Iterable[str] = ()) -> dict[str, Path]:
    """The files of `modules` (a package means all in it) and of all that they import, by module name.

    Modules that `without` names, and packages, are left out, with what only they import.
    """
    left_out = tuple(without)
    found: dict[str, Path] = {}
    seen: set[str] = set()
    todo = [name for module in modules for name in _whole(module)]
    while todo:
        name = todo.pop()
        if name in seen or any(name == other or name.startswith(other + ".") for other in left_out):
            continue
        seen.add(name)
        path = _file(name)
        if path is None:  # a function or a class of a module
            continue
        found[name] = path
        todo += imported(path.read_text(encoding="utf-8"))
        todo.append(name.rpartition(".")[0])  # its package runs first
    found.pop(_ROOT_PACKAGE, None)
    return found


def digest(modules: Iterable[str], without: Iterable[str] = (), data: Iterable[Path] = ()) -> str:
    """16 hexadecimal digits that change with any file behind `modules`, and any in `data` (files or folders)."""
    found = hashlib.sha256()
    for name, path in sorted(files_behind(modules, without).items()):
        _add(found, name, path)
    for source in data:
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if path.is_file() and path.suffix != ".pyc":
                _add(found, path.name, path)
    return found.hexdigest()[:16]


def _add(found: hashlib._Hash, name: str, path: Path) -> None:
    content = path.read_bytes()
    found.update(f"{name} {len(content)}\n".encode())
    found.update(content)


def _file(module: str) -> Path | None:
    head, _, rest = module.partition(".")
    if head != _ROOT_PACKAGE:
        return None
    for base in sys.modules[_ROOT_PACKAGE].__path__:
        stem = Path(base, *rest.split(".")) if rest else Path(base)
        for path in (stem / "__init__.py", stem.with_suffix(".py")):
            if path.is_file() and (rest or path.parent == Path(__file__).parent):
                return path
    return None


def _whole(module: str) -> list[str]:
    path = _file(module)
    if path is None or path.name != "__init__.py":
        return [module]
    inside = sorted(file.relative_to(path.parent).with_suffix("").parts for file in path.parent.rglob("*.py"))
    return [
        module,
        *(".".join((module, *parts)).removesuffix(".__init__") for parts in inside if parts != ("__init__",)),
    ]
