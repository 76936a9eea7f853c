"""How commands end: exit codes, interrupts, and one line for what cannot be done."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmsched_gym.config import ConfigError, UnknownField
from llmsched_gym.report import console
from llmsched_gym.text import no_memory

USAGE, FAILURE = 2, 1

ENV_PREFIX = "LLMSCHED"  # of variables that stand for options

GO_ON_WITH_OUT = ("evaluate", "capacity", "serve-bench")  # after an interrupt, if they have a folder
GO_ON = ("compare", "arena", "reproduce", "calibrate", "sim2real")  # these always have one
RESUME = ("train", "ppo", "tune", "search")  # with --resume


def interrupted(words: Sequence[str]) -> str:
    """What to say of an interrupt: commands that keep what is done in their folder can go on from it."""
    command = next((word for word in words if not word.startswith("-")), "")
    out = _value_of("--out", words) or os.environ.get(f"{ENV_PREFIX}_{command.upper().replace('-', '_')}_OUT")
    if command in GO_ON or (command in GO_ON_WITH_OUT and out is not None):
        return "interrupted: the same command goes on where it stopped"
    if command in RESUME and Path(out or f"runs/{command}", "config.json").exists():
        return "interrupted: with --resume the same command goes on from its last checkpoint"
    return "interrupted"


def _value_of(option: str, words: Sequence[str]) -> str | None:
    """What a command line says for an option; the last counts."""
    found = None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == option:
            found = value if equals else following
    return found


@contextmanager
def remarks() -> Iterator[None]:
    """Print our own warnings as lines of ours, each once."""
    shown: set[str] = set()
    usual = warnings.showwarning

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if not category.__module__.startswith("llmsched_gym."):
            usual(message, category, *where, **more)
        elif str(message) not in shown:
            shown.add(str(message))
            console.remark(str(message))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def explain(error: Exception) -> int:
    """Say in one line what was wrong; an error that nobody foresaw goes on as it is."""
    if hasattr(error, "format_message"):  # of the command line itself
        return fail(error.format_message() or "expected a command; see llmsched --help", USAGE)
    usage, failure = _known_errors()
    if not isinstance(error, (*usage, *failure)):
        raise error
    what = f"set: {error.told}" if isinstance(error, UnknownField) else str(error)
    what = no_memory(error) if isinstance(error, MemoryError) else what
    return fail(what, USAGE if isinstance(error, usage) else FAILURE)


def _known_errors() -> tuple[tuple[type[Exception], ...], tuple[type[Exception], ...]]:
    """Errors of what was asked for, and of a policy or the machine while it runs."""
    from concurrent.futures import BrokenExecutor

    from llmsched_gym.cost import ProfileError
    from llmsched_gym.engine import IllegalBatch, StalledScheduler
    from llmsched_gym.scheduler import PolicyError
    from llmsched_gym.workload import TraceError

    backend_error = importlib.import_module("llmsched_gym.real_backend").BackendError
    return (ConfigError, PolicyError, TraceError, ProfileError, backend_error), (
        IllegalBatch,
        StalledScheduler,
        BrokenExecutor,
        MemoryError,
        OSError,
    )


def fail(message: str, code: int) -> int:
    """Say on one line what went wrong; returns the code."""
    print("llmsched:", " ".join(message.split()), file=sys.stderr)
    return code
