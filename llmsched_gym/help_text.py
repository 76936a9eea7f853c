"""Help of commands: options in groups, and examples that can be copied."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand

OPTIONS, ARGUMENTS = "Options", "Arguments"
NO_TEXT = "expected some text, got ''"
WIDTH = 76  # of an example's line: 80 columns less what help indents it by


class GroupedCommand(TyperCommand):
    """A command whose help lists its options by group, in the order in which groups are first named.

    Text that is empty, which as a path would be the folder one is in, is no value of an option or argument.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        parameters: list[Any] = self.params
        for parameter in parameters:
            parameter.process_value = _with_text(parameter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section a group; the options of none come last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            usual = ARGUMENTS if parameter.param_type_name == "argument" else OPTIONS
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(record)
        for title in sorted(groups, key=lambda title: title == OPTIONS):
            with formatter.section(title):
                formatter.write_dl(groups[title])


def _with_text(parameter: Any) -> Callable[[Any, Any], Any]:
    """How an option or argument takes its value, but BadParameter where that is empty text that somebody gave."""
    usual = parameter.process_value

    def process(context: Any, value: Any) -> Any:
        empty = value == "" or (isinstance(value, list | tuple) and "" in value)
        if empty and value != parameter.default:  # of some options no text is what nobody has to say
            raise typer.BadParameter(NO_TEXT, context, param=parameter)
        return usual(context, value)

    return process


class ExamplesKept(argparse.HelpFormatter):
    """Help of argparse that wraps what is said and leaves examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(("Example:", "Examples:")) else super()._fill_text(text, width, indent)


class OneLineParser(argparse.ArgumentParser):
    """A parser of argparse that says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        self.exit(2, f"error: {message}\n")


def place(text: str) -> Path:
    """The file or folder that an option of argparse names."""
    if not text:
        raise argparse.ArgumentTypeError(NO_TEXT)
    return Path(text)


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer takes it: parameters that are dataclasses of options become these options.

    A dataclass's options stand in the group of help that its docstring names.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    kinds: dict[str, Any] = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        parameters += _options(kinds[name]) if name in kinds else [parameter.replace(annotation=hints[name])]

    def run(**given: Any) -> None:
        for name, kind in kinds.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in dataclasses.fields(kind)})
        command(**given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    named = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    run.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in named}
    return run


def _options(kind: Any) -> list[inspect.Parameter]:
    """The fields of a dataclass of options as parameters."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found = []
    for field in dataclasses.fields(kind):
        for info in hints[field.name].__metadata__:
            info.rich_help_panel = kind.__doc__.rstrip(".")
        found.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
            )
        )
    return found


def examples(*lines: str) -> str:
    """The end of a command's help: commands that can be copied, broken where they are longer than a terminal."""
    return "\n".join(["Example:" if len(lines) == 1 else "Examples:", *(f"  {_broken(line)}" for line in lines)])


def epilog(*lines: str) -> str:
    """The same for typer, which leaves what follows a backspace as it is."""
    return "\b\n" + examples(*lines)


def _broken(line: str) -> str:
    """The line in several, broken before options, with a backslash at the end of all but the last."""
    lines = [""]
    for part in re.split(r" (?=-)", line):
        if lines[-1] and len(lines[-1]) + len(part) + 3 > WIDTH:
            lines.append("   ")
        lines[-1] += f" {part}" if lines[-1] else part
    return " \\\n  ".join(lines)
