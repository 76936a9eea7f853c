"""Fields of a profile's file: which there are, and what their values can be."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from llmsched_gym.cost.surface import ProfileError


def section(data: Any, where: str, required: list[str], known: list[str]) -> dict[str, Any]:
    """The object `data` without its kind, checked for missing and unknown fields."""
    if not isinstance(data, dict):
        raise ProfileError(f"{where}: expected a JSON object, got {type(data).__name__}")
    prefix = "" if where == "profile" else where + "."
    for name in required:
        if name not in data:
            raise ProfileError(f"{prefix}{name}: missing")
    for name in data:
        if name not in known:
            raise ProfileError(f"{prefix}{name}: unknown field")
    return {name: value for name, value in data.items() if name != "kind"}


def names(cls: type[Any], required: bool = False) -> list[str]:
    """Names of a dataclass's fields, or of those without a default."""
    return [f.name for f in dataclasses.fields(cls) if not required or f.default is dataclasses.MISSING]


def is_whole(value: Any) -> bool:
    """Whether it is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_number(name: str, value: Any, open_low: bool = False, most: float = math.inf) -> None:
    """ProfileError where a field is no finite number >= 0, or > 0, or above `most` milliseconds."""
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or value < 0 or (open_low and value == 0):
        raise ProfileError(f"{name}: expected a finite number {'>' if open_low else '>='} 0, got {value!r}")
    if value > most:
        raise ProfileError(f"{name}: expected milliseconds <= {most:g}, got {value!r}")
