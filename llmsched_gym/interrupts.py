"""Interrupts of a command: Ctrl-C, and SIGTERM, by which schedulers of jobs and containers ask a process to end."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
