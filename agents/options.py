"""A dataclass as command line and help: every field is an option, its metadata the help text."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from llmsched_gym.config import ConfigError, UnknownField
from llmsched_gym.cost import ProfileError
from llmsched_gym.help_text import NO_TEXT, ExamplesKept, examples
from llmsched_gym.interrupts import code_of, interrupts
from llmsched_gym.scheduler import PolicyError
from llmsched_gym.text import no_memory, read_value
from llmsched_gym.workload import TraceError

MOST = 1e12
"""Of numbers: what is infinite, or nearly, no file of a run can tell, no memory hold and no learner bear."""
OF_AGENTS = ("action", "observation", "action_repeat", "reward_scale", "tau_s", "backend", "model")
"""Fields of the environment that commands which have them as options look at there."""
MOST_ENVS = 1 << 16
"""Side by side; each takes some 200 kB."""
MOST_N_STEPS = 1 << 20
"""Decisions of an environment in an iteration, all of which are kept."""
MOST_WIDTH = 1 << 14
"""Of a layer of a network; torch says in many lines that it cannot have much wider ones."""
MOST_SEEDS = 1000
"""Of runs that are all listed before the first."""
MOST_WORKERS = 1024
"""Processes that one machine is asked for; there are as many as runs, where those are fewer."""
MOST_SEED = 2**31 - 1
"""The generators of torch and CMA-ES take 32 bits, and some seeds are counted on from."""


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field with its default and its line of help; whole numbers with a default >= 1 are >= `low`, 1 unless given.

    `most` is the largest that a number may be: 1e12 unless given, of a seed 2^31 - 1. `positive` numbers are no 0.
    """
    metadata["help"] = help
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


class _Formatter(ExamplesKept, argparse.ArgumentDefaultsHelpFormatter):
    """Says defaults, too."""


_EXAMPLE = re.compile(r":?\s*``((?:llmsched|python -m)\s[^`]*?\s-[^`]*)``")


def _described(doc: str) -> str:
    """The first paragraph, without its examples, which stand at the end of help."""
    return _EXAMPLE.sub("", doc.split("\n\n")[0])


def _examples(doc: str) -> str | None:
    """The command lines that a docstring has between double backticks, as the end of help."""
    lines = [" ".join(line.split()) for line in _EXAMPLE.findall(doc)]
    return examples(*lines) if lines else None


def _groups(cls: type) -> dict[str, str]:
    """The group of help in which each field's option stands: what its `group` says, or what the class calls itself.

    A dataclass that another one is made of has its group as its docstring; other fields have none.
    """
    found: dict[str, str] = {}
    for base in cls.__mro__[:0:-1]:
        title = (base.__doc__ or "").rstrip(".")
        if title.startswith(f"{base.__name__}("):  # what dataclasses call those that have no docstring
            continue
        found |= {name: title for name in vars(base).get("__annotations__", {})}
    return {field.name: field.metadata.get("group", found.get(field.name, "")) for field in dataclasses.fields(cls)}


def parse(cls: type, argv: Sequence[str] | None, doc: str | None, program: str | None = None) -> Any:
    """An instance of the dataclass from a command line that the first paragraph of `doc` describes.

    Raises :class:`ConfigError` where the command line is wrong.
    """
    parser = _Parser(
        prog=program,
        usage="%(prog)s [OPTIONS]",
        description=_described(doc or ""),
        epilog=_examples(doc or ""),
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    hints, headings = typing.get_type_hints(cls), _groups(cls)
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(headings.values()) if title}
    for field in dataclasses.fields(cls):
        group = groups.get(headings[field.name], parser)
        flag, kind = flag_of(field.name), hints[field.name]
        help = field.metadata["help"]
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=help)
        elif kind == dict[str, Any]:
            group.add_argument(flag, action="append", type=_pair, metavar="FIELD=VALUE", help=help)
        elif kind == tuple[int, ...]:
            text = ",".join(map(str, field.default))  # type: ignore[arg-type]
            group.add_argument(flag, type=integers, default=text, metavar="N,N,...", help=help)
        else:
            choices = field.metadata.get("choices")
            read = whole if kind is int else kind
            group.add_argument(flag, type=read, default=field.default, choices=choices, help=help)
    values = vars(parser.parse_args(argv))
    for name, kind in hints.items():
        if kind == dict[str, Any]:
            values[name] = dict(values[name] or ())
            if name == "set" and "suite" in values["set"]:
                raise ConfigError("--set: suite is no field of the scenario; use the option of that name")
            for own in OF_AGENTS:
                if name == "set" and own in values["set"] and own in hints:
                    raise ConfigError(f"--set: {own} has an option of its own, {flag_of(own)}")
    check_numbers(cls, values, flag_of)
    return cls(**values)


def flag_of(name: str) -> str:
    """The option of a field."""
    return "--" + name.replace("_", "-")


def check_numbers(cls: type, values: Mapping[str, Any], called: Callable[[str], str] = str) -> None:
    """Raise :class:`ConfigError` where a number of `values`, by field of the dataclass, is none of its option.

    The message names the field as it is `called`: by its own name, as files have it, or by its :func:`flag_of`.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name not in values:
            continue
        name, value, kind = called(field.name), values[field.name], hints[field.name]
        if kind is int and isinstance(field.default, int):
            is_seed = field.name.endswith("seed")
            low = field.metadata.get("low", 0 if is_seed or field.default == 0 else 1)
            if value < low:
                raise ConfigError(f"{name}: expected a whole number >= {low}, got {value}")
            usual = MOST_SEED if is_seed else MOST_WORKERS if field.name == "workers" else int(MOST)
            most = field.metadata.get("most", usual)
            if value > most:
                raise ConfigError(f"{name}: expected a whole number <= {most:,}, got {value}")
        if kind is float and not value >= 0.0:  # nan, too
            raise ConfigError(f"{name}: expected a number >= 0, got {value}")
        if kind is float and field.metadata.get("positive") and value == 0.0:
            raise ConfigError(f"{name}: expected a number above 0, got {value:g}")
        if kind is float and value > (most := field.metadata.get("most", MOST)):
            raise ConfigError(f"{name}: expected a number <= {most:g}, got {value}")
        if kind is str and value == "" and field.default != "":
            raise ConfigError(f"{name}: {NO_TEXT}")
        if kind == tuple[int, ...] and any(not 1 <= number <= MOST_WIDTH for number in value):
            given = ",".join(map(str, value))
            raise ConfigError(f"{name}: expected whole numbers from 1 to {MOST_WIDTH:,}, got {given}")


def check_values(cls: type, values: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` where a value of `values`, a file's, is none that :func:`parse` could have made."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name not in values:
            continue
        name, value, kind = field.name, values[field.name], hints[field.name]
        if kind in KINDS and not is_of_kind(value, kind):
            raise ConfigError(f"{name}: expected {KINDS[kind]}, got {value!r}")
        choices = field.metadata.get("choices")
        if choices is not None and value not in choices:
            raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    check_numbers(cls, values)


KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple[int, ...]: "a list of whole numbers",
    dict[str, Any]: "a table",
}
"""Types of values, and what each is called."""


def is_of_kind(value: Any, kind: Any) -> bool:
    """Whether a value is of one of KINDS."""
    if kind == dict[str, Any]:
        return isinstance(value, dict)
    if kind == tuple[int, ...]:
        return isinstance(value, tuple) and all(is_of_kind(number, int) for number in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def command_line(cls: type, config: Any) -> list[str]:
    """The options that :func:`parse` reads `config`'s values of the dataclass's fields from; defaults are left out."""
    found = []
    for field in dataclasses.fields(cls):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        flag, value = flag_of(field.name), getattr(config, field.name)
        if value == default:
            continue
        if isinstance(value, bool):
            found.append(flag if value else f"--no-{flag.removeprefix('--')}")
        elif isinstance(value, dict):
            found += [part for name, v in value.items() for part in (flag, f"{name}={v!r}")]
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            found += [flag, text]
    return found


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected FIELD=VALUE, got {text!r}")
    return name, read_value(value)


def whole(text: str) -> int:
    """The whole number that a text such as 2e6 is."""
    try:
        value = float(text)
        if value == int(value):
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")


def integers(text: str) -> tuple[int, ...]:
    """The whole numbers that a text such as 64,64 lists."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers separated by commas, got {text!r}") from None


RESUMES = "interrupted; --resume goes on from the last checkpoint"


def fail_in_one_line(main: Callable[[], Any], interrupted: str = RESUMES) -> int:
    """Run `main`; what a user got wrong becomes one line and exit code 2, an interrupt the line `interrupted`."""
    with interrupts() as seen:
        try:
            code = _run_in_one_line(main)
        except BaseException as error:
            if not seen and not isinstance(error, KeyboardInterrupt):
                raise
            print(interrupted, file=sys.stderr)
            code = code_of(seen)
    return code


def _run_in_one_line(main: Callable[[], Any]) -> int:
    backend_error = importlib.import_module("llmsched_gym.real_backend").BackendError
    try:
        main()
    except (ConfigError, PolicyError, ProfileError, TraceError, backend_error) as error:
        print(f"error: set: {error.told}" if isinstance(error, UnknownField) else f"error: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"error: {no_memory(error)}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, say
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
