"""Variants of a profile, named in brackets behind it: `NAME[mixing=2]`, `FILE.json[additive=true,mixing=2]`."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from llmsched_gym.cost.surface import ProfileError

EXPECTED = "additive=true or mixing=FACTOR"


class Variant(NamedTuple):
    """What is changed, in this order: the surface taken away, then the price of mixing multiplied."""

    additive: bool = False
    mixing: float | None = None  # None: as it is


def split_name(name: str) -> tuple[str, Variant]:
    """The name or file in front of the brackets, and what they say; :class:`ProfileError` where that is unknown."""
    found = re.fullmatch(r"(.+)\[([^\[\]]*)\]", name)
    if name.endswith(".json") or ("[" not in name and "]" not in name):
        return name, Variant()
    if found is None:
        raise ProfileError(f"profile {name!r}: expected NAME[{EXPECTED}]")
    fields: dict[str, bool | float] = {}
    for part in found[2].split(","):
        key, equals, text = (piece.strip() for piece in part.partition("="))
        if key not in Variant._fields or not equals or key in fields:
            raise ProfileError(f"profile {name!r}: expected {EXPECTED} in brackets, each once, got {part.strip()!r}")
        fields[key] = _boolean(name, text) if key == "additive" else _factor(name, text)
    return found[1], Variant(**fields)  # type: ignore[arg-type]


def _boolean(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ProfileError(f"profile {name!r}: additive: expected true or false, got {text!r}")
    return text.lower() == "true"


def _factor(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value < math.inf:
        raise ProfileError(f"profile {name!r}: mixing: expected a finite number >= 0, got {text!r}")
    return value
