"""Schedulers and routers by name: what ``baselines`` lists, parameters in brackets, users' classes, policy folders.

Names are resolved when asked for: ``slai``, ``slai[hold=true,limit=6500]``, ``module:Class``, ``./policy_folder``.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from llmsched_gym.cluster.router import CompiledRouter, Router
from llmsched_gym.cluster.state import ROUTER_MEMORY
from llmsched_gym.policies import load_policy
from llmsched_gym.policies.routers import load_router
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
    name, options = match[1].strip(), parse_options(spec, match[2] or "")
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
        entry = imported(spec, name)
        return with_options(spec, entry, options) if isinstance(entry, Compiled) else _instantiate(spec, entry, options)
    close = difflib.get_close_matches(name, registry(), 1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise PolicyError(
        f"policy {name!r} is unknown{hint}: expected a name of `llmsched policies`, module:Class or a policy folder"
    )


def parse_options(spec: str, text: str) -> dict[str, str]:
    """Parameters in brackets, by name, as text."""
    options = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            raise PolicyError(f"policy {spec!r}: expected key=value in brackets, got {part!r}")
        if key.strip() in options:
            raise PolicyError(f"policy {spec!r}: {key.strip()!r} is given twice")
        options[key.strip()] = re.sub(r"^np\.\w+\((.*)\)$", r"\1", value.strip())  # how a NumPy scalar shows itself
    return options


def imported(spec: str, name: str, kind: str = "policy") -> Any:
    """The class, or whatever else, that ``module:name`` means; modules in the working directory are found too."""
    module, _, attribute = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError:
        raise PolicyError(f"{kind} {spec!r}: {module!r} has no {attribute!r}") from None
    except Exception as error:  # whatever a user's module raises, a syntax error included
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PolicyError(f"{kind} {spec!r}: cannot import {module!r}: {reason}") from None


def _instantiate(spec: str, entry: Any, options: dict[str, str]) -> Any:
    try:
        scheduler = entry(**options)
    except (TypeError, ValueError) as error:
        raise PolicyError(f"policy {spec!r}: {error}") from None
    if not isinstance(scheduler, Scheduler | Compiled) and not hasattr(scheduler, "decide"):
        raise PolicyError(f"policy {spec!r}: expected an object with schedule(view), got {type(scheduler).__name__}")
    return scheduler


@cache
def routers() -> dict[str, CompiledRouter]:
    """All registered routers by name: what the modules of ``baselines.routers`` list in ``ROUTERS``."""
    found: dict[str, CompiledRouter] = {}
    package = importlib.import_module("llmsched_gym.baselines.routers")
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        entries = getattr(importlib.import_module(f"llmsched_gym.baselines.routers.{module}"), "ROUTERS", {})
        for name, entry in entries.items():
            assert len(entry.own) <= ROUTER_MEMORY, name
            found[name] = replace(entry, name=name)
    return found


def make_router(spec: str) -> Any:
    """The router that `spec` names: a registered name, ``module:Class`` or a folder, with ``[parameters]``.

    Raises :class:`PolicyError` with one line for an unknown name or a bad parameter.
    """
    match = re.fullmatch(r"([^\[\]]+)(?:\[([^\[\]]*)\])?", spec.strip())
    if not match:
        raise PolicyError(f"router {spec!r}: expected NAME or NAME[key=value,...]")
    name, options = match[1].strip(), parse_options(spec, match[2] or "")
    entry = routers().get(name)
    if entry is None and Path(name).is_dir():
        return load_router(name, **options)
    if entry is None and ("/" in name or "\\" in name or name.startswith("~")):
        what = "expected a router folder, got a file" if Path(name).is_file() else "no such router folder"
        raise PolicyError(f"router {name!r}: {what}")
    if entry is None and ":" in name:
        made = imported(spec, name, "router")
        entry = made if isinstance(made, CompiledRouter) else None
        if entry is None:
            return _instantiate_router(spec, made, options)
    if entry is None:
        close = difflib.get_close_matches(name, routers(), 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise PolicyError(
            f"router {name!r} is unknown{hint}: expected a name of `llmsched routers`, module:Class or a folder"
        )
    return _with_router_options(spec, entry, options)


def _with_router_options(spec: str, entry: CompiledRouter, options: Mapping[str, str]) -> CompiledRouter:
    own, settings = {parameter.name: parameter for parameter in entry.own}, dict(entry.settings)
    for key, text in options.items():
        if key not in own:
            known = f"expected one of {', '.join(own)}" if own else "it has none"
            raise PolicyError(f"router {spec!r}: unknown parameter {key!r}, {known}")
        try:
            settings[key] = own[key].read(text)
        except (ValueError, KeyError):
            raise PolicyError(f"router {spec!r}: {key}: expected {own[key].expected}, got {text!r}") from None
    return replace(entry, name=spec, settings=settings)


def _instantiate_router(spec: str, entry: Any, options: dict[str, str]) -> Any:
    try:
        router = entry(**options)
    except (TypeError, ValueError) as error:
        raise PolicyError(f"router {spec!r}: {error}") from None
    if not isinstance(router, Router):
        raise PolicyError(f"router {spec!r}: expected an object with route(view), got {type(router).__name__}")
    return router
