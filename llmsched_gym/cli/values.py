"""What options say: scenarios, names, numbers, and where runs take place."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from llmsched_gym.config import ConfigError, Scenario, scenario, split_names


def split_policies(texts: Sequence[str], what: str = "policy") -> list[str]:
    """Names separated by commas, those inside brackets left alone."""
    names = split_names(texts, what)
    sys.path.append(os.getcwd())  # module:Class may lie where the user is
    return names


def scenario_of(options: dict[str, Any]) -> Scenario:
    """The suite's scenario with the fields that were given."""
    if options["trace"] is not None and options["workload"] is not None:
        raise ConfigError("workload: expected one of --workload and --trace, got both")
    for name in ("trace_arrivals", "trace_invalid"):
        if options["trace"] is None and options[name] is not None:
            raise ConfigError(f"{name}: needs --trace")
    names = (
        "profile workload trace trace_arrivals trace_invalid num_requests strict_share jitter cost_scale length_hint"
    )
    names += " tbt_rule backend model prefix_caching"
    fields = _parsed_fields(options["config"] or [])
    fields |= {name: options[name] for name in names.split() if options.get(name) is not None}
    if options["patience"] is not None:
        fields["patience_s"] = options["patience"]
    if options["ttft_slo"] is not None:
        fields["ttft_slo_s"], fields["ttft_slo_per_token_s"] = _one_or_two("ttft_slo", options["ttft_slo"], 0.0)
    if options["tbt_slo"] is not None:
        fields["strict_tbt_slo_s"], fields["relaxed_tbt_slo_s"] = _one_or_two("tbt_slo", options["tbt_slo"])
    for name in ("allow_refusal", "count_host_time"):
        if options.get(name):
            fields[name] = True
    return scenario(options["suite"], **fields | _parsed_fields(options["set_"] or []))


def _parsed_fields(texts: Sequence[str]) -> dict[str, Any]:
    """Fields of a scenario from FIELD=VALUE."""
    fields: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"set: expected FIELD=VALUE, got {text!r}")
        if name == "suite":
            raise ConfigError("set: suite is no field of the scenario; use --suite")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = float(value) if value == "inf" else value
        if isinstance(fields[name], list):
            fields[name] = tuple(fields[name])
    return fields


def places_of(options: dict[str, Any]) -> AbstractContextManager[Any]:
    """Where the runs of a command take place, with the files that its options name."""
    from llmsched_gym.evaluation.spread import choose

    files = split_names([*options["policy"], *([options["router"]] if options["router"] else [])])
    files += [str(options[name]) for name in ("profile", "workload", "trace") if options[name] is not None]
    files += [text.partition("=")[2] for text in options["set_"] or ()]
    return choose(options["workers"], options["ray"], options["ray_address"], files)


def read_numbers(name: str, text: str) -> list[float]:
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
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name}: expected whole numbers separated by commas, got {text!r}") from None
