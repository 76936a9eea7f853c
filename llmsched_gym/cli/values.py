"""What options say: scenarios, names, numbers, and where runs take place."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from llmsched_gym.cli import options as opt
from llmsched_gym.config import ConfigError, Scenario, UnknownField, scenario, split_names
from llmsched_gym.text import read_value


def split_policies(texts: Sequence[str], what: str = "policy") -> list[str]:
    """Names separated by commas, those inside brackets left alone."""
    names = split_names(texts, what)
    sys.path.append(os.getcwd())  # module:Class may lie where the user is
    return names


def scenario_of(
    world: opt.World, clients: opt.Clients, config: Any, engine: opt.Engine | None = None, **more: Any
) -> Scenario:
    """The suite's scenario with the fields that were given.

    Args:
        world, clients, engine: options of the command line.
        config: fields that the file of --config has, FIELD=VALUE; what was given apart counts before them.
        more: fields by name, None where they were not given.
    """
    if world.trace is not None and world.workload is not None:
        raise ConfigError("workload: expected one of --workload and --trace, got both")
    given = dataclasses.asdict(world) | dataclasses.asdict(clients) | more
    given |= {} if engine is None else dataclasses.asdict(engine)
    for name in ("trace_arrivals", "trace_invalid"):
        if world.trace is None and given[name] is not None:
            raise ConfigError(f"{name}: needs --trace")
    for name in ("allow_refusal", "count_host_time"):  # a flag that was not given leaves what the suite says
        given[name] = given.get(name) or None
    given["patience_s"] = clients.patience
    if clients.ttft_slo is not None:
        given["ttft_slo_s"], given["ttft_slo_per_token_s"] = _one_or_two("ttft_slo", clients.ttft_slo, 0.0)
    if clients.tbt_slo is not None:
        given["strict_tbt_slo_s"], given["relaxed_tbt_slo_s"] = _one_or_two("tbt_slo", clients.tbt_slo)
    for name in ("suite", "set_", "patience", "ttft_slo", "tbt_slo"):
        del given[name]
    fields = _parsed_fields(config or []) | {name: value for name, value in given.items() if value is not None}
    try:
        return scenario(world.suite, **fields | _parsed_fields(world.set_ or []))
    except UnknownField as error:  # which speaks of Python's arguments
        raise ConfigError(f"set: {error.told}") from None


def _parsed_fields(texts: Sequence[str]) -> dict[str, Any]:
    """Fields of a scenario from FIELD=VALUE."""
    fields: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"set: expected FIELD=VALUE, got {text!r}")
        if name == "suite":
            raise ConfigError("set: suite is no field of the scenario; use --suite")
        fields[name] = read_value(value)
    return fields


def places_of(
    places: opt.Places, names: Sequence[str], world: opt.World, engine: opt.Engine
) -> AbstractContextManager[Any]:
    """Where the runs of a command take place, with the files that policies, routers and other options name."""
    from llmsched_gym.evaluation.spread import choose

    files = split_names(names)
    files += [str(name) for name in (engine.profile, world.workload, world.trace) if name is not None]
    files += [text.partition("=")[2] for text in world.set_ or ()]
    return choose(places.workers, places.ray, places.ray_address, files)


def read_numbers(name: str, text: str) -> list[float]:
    """Numbers with commas between; ConfigError names the option."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name}: expected numbers separated by commas, got {text!r}") from None


def _one_or_two(name: str, text: str, second: float | None = None) -> tuple[float, float]:
    """Two numbers; where only one is given the other is `second`, or the same."""
    numbers = read_numbers(name, text)
    if len(numbers) > 2:
        raise ConfigError(f"{name}: expected one or two numbers, got {text!r}")
    return numbers[0], numbers[1] if len(numbers) == 2 else numbers[0] if second is None else second


def read_whole_numbers(name: str, text: str) -> list[int]:
    """Whole numbers with commas between; ConfigError names the option."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name}: expected whole numbers separated by commas, got {text!r}") from None
