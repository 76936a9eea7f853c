"""What descriptions are made of: errors that name a field, values in Python's own types, checks of fields."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from typing import Any

import numpy as np

MOST = 2**31 - 1
"""Of whole numbers: records hold them in 32 bits."""


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line that names the field and what was expected."""


class UnknownField(ConfigError, TypeError):
    """A field that does not exist: to Python an unexpected keyword argument, for which some libraries wait."""

    @property
    def told(self) -> str:
        """The same for an option or a file that names the field."""
        return f"the scenario has no field {str(self).partition('argument ')[2]}"


def plain(value: Any) -> Any:
    """`value` in Python's own types: NumPy's scalars and arrays become numbers and tuples, lists tuples."""
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.floating):
        return float(value)
    if isinstance(value, np.ndarray):
        return plain(value[()]) if value.ndim == 0 else tuple(plain(v) for v in value)
    if isinstance(value, list | tuple):
        return tuple(plain(v) for v in value)
    if isinstance(value, str | os.PathLike):
        return str(os.fspath(value))
    return value


def plain_fields(instance: Any) -> None:
    """Turn the fields of a frozen dataclass that is being made into Python's own types."""
    for f in dataclasses.fields(instance):
        object.__setattr__(instance, f.name, plain(getattr(instance, f.name)))


OF_THE_VECTOR = ("num_envs", "num_threads", "autoreset_mode")
"""Arguments of the native vector environment that no configuration has."""


def check_names(cls: type, fields: dict[str, Any]) -> None:
    """Raise one clear error for a field that `cls` does not have."""
    names = [f.name for f in dataclasses.fields(cls)]
    for name in fields:
        if name in OF_THE_VECTOR:
            whose = (
                "only LLMSchedVectorEnv has it (gym.make_vec with vectorization_mode='vector_entry_point', its default)"
            )
            raise UnknownField(f"{cls.__name__} got an unexpected keyword argument {name!r}; {whose}")
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UnknownField(f"{cls.__name__} got an unexpected keyword argument {name!r}{hint}")


class Checked:
    """What the fields of frozen descriptions are checked by: one line that names the field and what was expected."""

    def _check_number(
        self, name: str, low: float, high: float = math.inf, *, open_low: bool = False, none: bool = False
    ) -> None:
        value = getattr(self, name)
        if none and value is None:
            return
        ok = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        if not ok or (open_low and value == low):
            bound = f"a number {'>' if open_low else '>='} {low:g}" + (f" and <= {high:g}" if high < math.inf else "")
            raise ConfigError(f"{name}: expected {bound}, got {value!r}")

    def _check_integer(self, name: str, low: int, *, most: int = MOST, none: bool = False) -> None:
        value = getattr(self, name)
        if none and value is None:
            return
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ConfigError(f"{name}: expected a whole number >= {low}, got {value!r}")
        if value > most:
            raise ConfigError(f"{name}: expected a whole number <= {most:,}, got {value!r}")

    def _check_interval(self, name: str, low: float, high: float = math.inf, *, scalar: bool = False) -> None:
        value = getattr(self, name)
        if scalar and isinstance(value, int | float) and not isinstance(value, bool):
            value = (value, value)
        ok = isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(v, int | float) for v in value)
        if not ok or not low <= value[0] <= value[1] <= high or math.isinf(value[1]):
            what = "a number or a pair" if scalar else "a pair"
            bounds = f"[{low:g}, {high:g}]"
            raise ConfigError(f"{name}: expected {what} (low, high) within {bounds}, got {getattr(self, name)!r}")

    def _check_choice(self, name: str, options: tuple[str, ...], prefix: str = "", high: float = 0.0) -> None:
        """One of `options`, or ``prefix:NUMBER`` with a number from 0 to `high`."""
        value = getattr(self, name)
        if isinstance(value, str) and value in options:
            return
        try:
            if prefix and value.startswith(prefix + ":") and 0.0 <= float(value.split(":")[1]) <= high:
                return
        except (ValueError, AttributeError):
            pass
        known = ", ".join((*options, f"{prefix}:NUMBER") if prefix else options)
        raise ConfigError(f"{name}: expected one of {known}, got {value!r}")
