"""What a suite is, and suites of one's own: TOML files that name the fields of their scenario.

::

    base = "default"                # the suite whose fields it has where it names none; none: a Scenario's own
    what = "short prompts, bursty"  # one line

    [scenario]
    arrivals = "gamma"
    burstiness = 0.5

With a field of :class:`~llmsched_gym.config.ClusterScenario`, or such a base, it is a suite of replicas. What has no
value (None) is left out.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from llmsched_gym.config.cluster import ClusterScenario
from llmsched_gym.config.fields import ConfigError
from llmsched_gym.config.scenario import Scenario

SUFFIX = ".toml"
TOP = ("base", "what", "scenario")
FILES = ("profile", "scheduler_profile", "workload", "trace", "replica_profiles")
"""Fields that may name files: one beside the suite's file is meant before one where the program runs."""


@dataclass(frozen=True)
class Suite:
    """A named scenario and the rates that reports show it at."""

    scenario: Scenario
    what: str
    env_id: str
    report_qps: tuple[float, ...] = field(default=())
    reward_threshold: float | None = None  # what `slai` earns in an episode, a mean of 20: benchmarks.thresholds


def read_suite(path: str, known: Mapping[str, Suite]) -> Suite:
    """The suite in a TOML file, which is called by `path`; `known` are those that it can be based on.

    Raises :class:`ConfigError` of one line that names the file, and the field.
    """
    try:
        with open(path, "rb") as file:
            data = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"suite: cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # what tomllib, or the decoder of UTF-8, finds
        raise ConfigError(f"suite: {path}: not a TOML file: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"suite: {path}: not a TOML file: nested too deeply") from None
    _known(path, "", data, TOP)
    base, what, own = data.get("base"), data.get("what", ""), data.get("scenario", {})
    if base is not None and (not isinstance(base, str) or base not in known):
        raise ConfigError(f"suite: {path}: base: expected one of {', '.join(known)}, got {base!r}")
    if not isinstance(what, str) or "\n" in what:
        raise ConfigError(f"suite: {path}: what: expected one line of text, got {what!r}")
    if not isinstance(own, dict):
        raise ConfigError(f"suite: {path}: scenario: expected a table, [scenario], got {own!r}")
    of_one, of_many = ([f.name for f in fields(cls) if f.name != "suite"] for cls in (Scenario, ClusterScenario))
    start = known[base].scenario if base is not None else None
    has_replicas = isinstance(start, ClusterScenario) or (start is None and not own.keys() <= set(of_one))
    _known(path, "scenario.", own, of_many if has_replicas else of_one)
    if start is None:
        start = ClusterScenario() if has_replicas else Scenario()
    try:
        found = start.replace(suite=path, **{name: _found(path, name, value) for name, value in own.items()})
    except ConfigError as error:
        raise ConfigError(f"suite: {path}: scenario: {error}") from None
    return Suite(found, what, "LLMRoute-v0" if has_replicas else "LLMSched-v0")


def _known(path: str, where: str, table: Iterable[str], names: Iterable[str]) -> None:
    for name in table:
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f", expected {', '.join(names)}" if not where else ""
            raise ConfigError(f"suite: {path}: {where}{name}: unknown field{hint}")


def _found(path: str, name: str, value: Any) -> Any:
    """A field's value, a file's name as it is seen from where the program runs."""
    if name not in FILES:
        return value
    if isinstance(value, list):
        return [_found(path, name, entry) for entry in value]
    if not isinstance(value, str):
        return value
    file, bracket, options = value.partition("[")
    beside = Path(path).parent / file
    is_path = "/" in file or Path(file).suffix != ""
    return f"{beside}{bracket}{options}" if is_path and beside.exists() else value


def suite_text(suite: Suite) -> str:
    """A suite as TOML, every field of its scenario that has a value: what :func:`read_suite` reads as the same."""
    lines = [f"what = {_toml(suite.what)}", "", "[scenario]"]
    values = suite.scenario.to_dict()
    lines += [f"{name} = {_toml(value)}" for name, value in values.items() if value is not None and name != "suite"]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool | str):
        return json.dumps(value)
    return repr(value)
