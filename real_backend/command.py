"""Command lines of this package: results on stdout, progress on stderr, and what cannot be done in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from llmsched_gym.config import ConfigError
from llmsched_gym.cost import ProfileError
from llmsched_gym.help_text import GroupedCommand, epilog, grouped
from llmsched_gym.interrupts import code_of, interrupts
from llmsched_gym.real_backend.errors import BackendError
from llmsched_gym.report import console
from llmsched_gym.scheduler import PolicyError

USAGE = 2
ModelName = Annotated[
    str, typer.Option(rich_help_panel="The model", help="Local folder, hub id, random:mistral-7b or random:tiny.")
]
Device = Annotated[str | None, typer.Option(rich_help_panel="The model", help="cuda or cpu; the GPU if there is one.")]
Threads = Annotated[
    int | None,
    typer.Option(rich_help_panel="The model", min=1, help="CPU threads of torch; its own choice unless given."),
]
Clock = Annotated[
    str, typer.Option(rich_help_panel="The model", help="wall; cpu on a CPU that others use too, with --threads 1.")
]
Backend = Annotated[
    str,
    typer.Option(rich_help_panel="The model", help="What runs the model: transformers, or vllm where it is installed."),
]


def call(
    function: Callable[..., None], program: str, argv: Sequence[str] | None = None, lines: Sequence[str] = ()
) -> int:
    """Run one typer command whose help ends with the examples `lines`; returns its exit code, raises what is wrong."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(cls=GroupedCommand, epilog=epilog(*lines) if lines else None)(grouped(function))
    code = typer.main.get_command(app).main(args=argv, prog_name=program, standalone_mode=False)
    return code if isinstance(code, int) else 0


def run(function: Callable[..., None], program: str, argv: Sequence[str] | None = None) -> int:
    """Run one typer command and say in one line what is wrong; returns its exit code."""
    with interrupts() as seen:
        try:
            return _run(function, program, argv)
        except BaseException as error:
            if not seen and not isinstance(error, KeyboardInterrupt | typer.Abort):
                raise
        print("interrupted; what is measured is kept, and the same command goes on from there", file=sys.stderr)
        return code_of(seen)


def _run(function: Callable[..., None], program: str, argv: Sequence[str] | None) -> int:
    try:
        return call(function, program, argv)
    except (BackendError, ConfigError, PolicyError, ProfileError) as error:
        return _fail(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}")
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return _fail(error.format_message())


def _fail(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return USAGE


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr where that is a terminal, moved by calls with the number done and of all."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    stderr = Console(stderr=True)
    with Progress(*columns, console=stderr, disable=console.quiet or not stderr.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def backend_name(text: str) -> str:
    """A backend with a real model; ConfigError for another."""
    if text not in ("transformers", "vllm"):
        raise ConfigError(f"backend: expected transformers or vllm, got {text!r}")
    return text
