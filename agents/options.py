"""A dataclass as command line and help: every field is an option, its metadata the help text."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from llmsched_gym.config import ConfigError
from llmsched_gym.cost import ProfileError
from llmsched_gym.help_text import ExamplesKept, examples
from llmsched_gym.scheduler import PolicyError
from llmsched_gym.workload import TraceError


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field with its default and its line of help; whole numbers with a default >= 1 are >= `low`, 1 unless given."""
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
        flag, kind = "--" + field.name.replace("_", "-"), hints[field.name]
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
    check_numbers(cls, values)
    return cls(**values)


def check_numbers(cls: type, values: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` where a number of `values`, fields of the dataclass, is too low for its option."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name not in values:
            continue
        name, value = field.name.replace("_", "-"), values[field.name]
        if hints[field.name] is int and isinstance(field.default, int) and field.default >= 1:
            low = field.metadata.get("low", 0 if field.name.endswith("seed") else 1)
            if value < low:
                raise ConfigError(f"--{name}: expected a whole number >= {low}, got {value}")
        if hints[field.name] is float and not value >= 0.0:  # nan, too
            raise ConfigError(f"--{name}: expected a number >= 0, got {value}")


def command_line(cls: type, config: Any) -> list[str]:
    """The options that :func:`parse` reads `config`'s values of the dataclass's fields from; defaults are left out."""
    found = []
    for field in dataclasses.fields(cls):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        flag, value = field.name.replace("_", "-"), getattr(config, field.name)
        if value == default:
            continue
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, dict):
            found += [part for name, v in value.items() for part in (f"--{flag}", f"{name}={v!r}")]
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            found += [f"--{flag}", text]
    return found


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected FIELD=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


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
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers separated by commas, got {text!r}") from None


def fail_in_one_line(main: Callable[[], Any]) -> int:
    """Run `main`; what a user got wrong becomes one line and exit code 2."""
    backend_error = importlib.import_module("llmsched_gym.real_backend").BackendError
    try:
        main()
    except (ConfigError, PolicyError, ProfileError, TraceError, backend_error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0
