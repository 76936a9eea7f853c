"""Interrupts of a command: Ctrl-C, and SIGTERM, by which schedulers of jobs and containers ask a process to end."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # exit codes, as shells have them


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """The interrupts that came, by number of their signal; each raises KeyboardInterrupt.

    numba turns one that comes while it compiles into whatever error it causes there. What the process does at such a
    signal is only changed where that is Python's own doing, and in the main thread.
    """
    seen: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    def unraisable(ignored: Any) -> None:
        if not issubclass(ignored.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(ignored)

    usual: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    ours = [number for number, handler in usual.items() if signal.getsignal(number) is handler]
    if threading.current_thread() is not threading.main_thread() or not ours:
        yield seen
        return
    hook = sys.unraisablehook
    for number in ours:
        signal.signal(number, interrupt)
    sys.unraisablehook = unraisable
    try:
        yield seen
    finally:
        for number in ours:
            signal.signal(number, usual[number])
        sys.unraisablehook = hook


def code_of(seen: list[int]) -> int:
    """The exit code after the interrupts that came; INTERRUPTED where somebody else heard of it."""
    return 128 + seen[-1] if seen else int(INTERRUPTED)


def leave(code: int) -> NoReturn:
    """End the process; after an interrupt at once, as Python takes seconds to free compiled kernels one by one.

    A second Ctrl-C changes nothing of that, though it may have kept a pool from ending its workers.
    """
    if code in (INTERRUPTED, TERMINATED):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        for child in multiprocessing.active_children():
            child.terminate()
        atexit._run_exitfuncs()
        with suppress(OSError, ValueError):
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
        os._exit(code)
    sys.exit(code)


@contextmanager
def unheard() -> Iterator[None]:
    """Processes that start meanwhile do not hear SIGINT, which a terminal sends to all, before they let it through."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
