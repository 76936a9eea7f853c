"""Schedulers by name: what ``baselines`` lists, parameters in brackets, classes of users and policy folders.

Names are resolved when asked for: ``slai``, ``slai[hold=true,limit=6500]``, ``module:Class``, ``./policy_folder``.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from llmsched_gym.policies import load_policy
from llmsched_gym.scheduler import Compiled, PolicyError, Scheduler, with_options


@cache
def registry() -> dict[str, Any]:
    """All registered schedulers by name: what the modules of ``baselines`` list in ``SCHEDULERS``.

    A value is a :class:`Compiled` or a class whose instances are schedulers.
    """
    found: dict[str, Any] = {}
    package = importlib.import_module("llmsched_gym.baselines")
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        entries = getattr(importlib.import_module(f"llmsched_gym.baselines.{module}"), "SCHEDULERS", {})
        for name, entry in entries.items():
            found[name] = replace(entry, name=name) if isinstance(entry, Compiled) else entry
    return found


def make_scheduler(spec: str) -> Any:
    """The scheduler that `spec` names: a registered name, ``module:Class`` or a policy folder, with ``[parameters]``.

    Raises :class:`PolicyError` with one line for an unknown name or a bad parameter.
    """
    match = re.fullmatch(r"([^\[\]]+)(?:\[([^\[\]]*)\])?", spec.strip())
    if not match:
        raise PolicyError(f"policy {spec!r}: expected NAME or NAME[key=value,...]")
    name, options = match[1].strip(), _parse_options(spec, match[2] or "")
    entry = registry().get(name)
    if isinstance(entry, Compiled):
        return with_options(spec, entry, options)
    if entry is not None:
        return _instantiate(spec, entry, options)
    if Path(name).is_dir() or name.endswith(".zip"):
        return load_policy(name, **options)
    if "/" in name or "\\" in name or name.startswith("~"):  # no name and no module has them
        what = "expected a policy folder, got a file" if Path(name).is_file() else "no such policy folder"
        raise PolicyError(f"policy {name!r}: {what}")
    if ":" in name:
        entry = _import_attribute(spec, name)
        return with_options(spec, entry, options) if isinstance(entry, Compiled) else _instantiate(spec, entry, options)
    close = difflib.get_close_matches(name, registry(), 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise PolicyError(
        f"policy {name!r} is unknown{hint}: expected a name of `llmsched policies`, module:Class or a policy folder"
    )


def _parse_options(spec: str, text: str) -> dict[str, str]:
    options = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            raise PolicyError(f"policy {spec!r}: expected key=value in brackets, got {part!r}")
        options[key.strip()] = re.sub(r"^np\.\w+\((.*)\)$", r"\1", value.strip())  # how a NumPy scalar shows itself
    return options


def _import_attribute(spec: str, name: str) -> Any:
    """The class or :class:`Compiled` that ``module:name`` means; modules in the working directory are found too."""
    module, _, attribute = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError:
        raise PolicyError(f"policy {spec!r}: {module!r} has no {attribute!r}") from None
    except Exception as error:  # whatever a user's module raises, a syntax error included
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PolicyError(f"policy {spec!r}: cannot import {module!r}: {reason}") from None


def _instantiate(spec: str, entry: Any, options: dict[str, str]) -> Any:
    try:
        scheduler = entry(**options)
    except (TypeError, ValueError) as error:
        raise PolicyError(f"policy {spec!r}: {error}") from None
    if not isinstance(scheduler, Scheduler | Compiled) and not hasattr(scheduler, "decide"):
        raise PolicyError(f"policy {spec!r}: expected an object with schedule(view), got {type(scheduler).__name__}")
    return scheduler
