"""Options of a command from a file: TOML or JSON of names, or what an earlier run wrote, config.json or capacities.

The command line counts before the file, and the file before defaults.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.files import encode, parse
from llmsched_gym.text import shown

SET = "set"
NOT_IN_A_FILE = ("config", "set_")  # another file, and what the table `set` is for
OF_A_RUN = ("policies", "scenario")  # what every config.json has
OF_A_CAPACITY = ("config", "results")  # and what every capacity-CRITERION.json


@dataclass(frozen=True)
class FileOptions:
    """What a file says."""

    options: dict[str, Any] = field(default_factory=dict)  # by the name of the command's parameter
    fields: list[str] = field(default_factory=list)  # of the scenario, FIELD=VALUE


def read_options(path: Path, parameters: Collection[str]) -> FileOptions:
    """Options for a command that has these parameters.

    Raises:
        ConfigError: one line, if the file cannot be read or names an option that the command does not have.
    """
    data = _read(path)
    if all(name in data for name in OF_A_CAPACITY) and isinstance(data["config"], dict):
        if "criterion" not in parameters:
            raise ConfigError(f"{path}: expected options or the config.json of a run, got what llmsched capacity found")
        data = data["config"]
    parameters = [name for name in parameters if name not in NOT_IN_A_FILE]
    if all(name in data for name in OF_A_RUN):
        return _of_a_run(path, data, parameters)
    fields = data.pop(SET, {})
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{path}: {SET}: expected a table of fields of the scenario, got {shown(fields)}")
    options = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in parameters:
            near = get_close_matches(name, parameters, 1)
            hint = f" (did you mean {near[0].replace('_', '-')!r}?)" if near else ""
            raise ConfigError(f"{path}: {key!r} is no option of this command{hint}")
        options[name] = _value(path, key, value)
    return FileOptions(options, _fields(fields))


READ: dict[str, tuple[str, Callable[[str], Any]]] = {".toml": ("TOML", tomllib.loads), ".json": ("JSON", parse)}


def _read(path: Path) -> dict[str, Any]:
    if path.suffix not in READ:
        raise ConfigError(f"config: expected {' or '.join(READ)}, got {path}")
    kind, read = READ[path.suffix]
    try:
        data = read(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected {kind}: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected options by name, got {shown(data)}")
    return data


def _value(path: Path, key: str, value: Any) -> Any:
    """A list is what the command line has with commas."""
    if isinstance(value, list) and all(isinstance(v, str | int | float) for v in value):
        return ",".join(map(str, value)) if key != "policy" else [str(v) for v in value]
    if not isinstance(value, str | int | float | bool):
        raise ConfigError(f"{path}: {key}: expected text, a number, true, false or a list of such, got {shown(value)}")
    return [value] if key == "policy" else value


def _of_a_run(path: Path, data: dict[str, Any], parameters: Collection[str]) -> FileOptions:
    """The run again: its suite, the fields in which its scenario differs from that, policies, rates and seeds."""
    try:
        wanted, policies = dict(data["scenario"]), [str(name) for name in data["policies"]]
        suite = wanted.pop("suite")
        usual = encode(scenario(suite).to_dict())
        if not policies:  # of folders that were compared
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{path}: expected the config.json of a run of evaluate") from None
    options: dict[str, Any] = {"suite": suite, "policy": policies}
    if any("+" in name for name in policies):
        routers, schedulers = (
            list(dict.fromkeys(part)) for part in zip(*(p.split("+", 1) for p in policies), strict=True)
        )
        options |= {"router": ",".join(routers), "policy": schedulers}
    if data.get("qps") is not None and ("criterion" in data) == (
        "criterion" in parameters
    ):  # rates, or where to search
        options["qps"] = ",".join(map(str, data["qps"]))
    options |= {name: data[name] for name in ("seeds", "first_seed", "criterion") if name in data}
    differing = {name: value for name, value in wanted.items() if usual.get(name) != value}
    return FileOptions({k: v for k, v in options.items() if k in parameters}, _fields(differing))


def _fields(fields: Mapping[str, Any]) -> list[str]:
    return [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in fields.items()]
