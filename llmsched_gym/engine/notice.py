"""One line on stderr where compiling takes longer than a second, so that the first step is not silent."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from numba.core import event

QUIET_S = 1.0  # compiling shorter than that is not worth a word


class _Notice(event.Listener):
    """Adds up the time of the outermost compilations, and speaks once."""

    def __init__(self) -> None:
        self.depth, self.kernels, self.spent_s, self.said = 0, 0, 0.0, False
        self.expected = 0
        self._start_s = 0.0
        self._timer: threading.Timer | None = None

    def on_start(self, event: Any) -> None:
        self.depth += 1
        if self.depth > 1 or self.said:
            return
        self.kernels += 1
        self._start_s = time.perf_counter()
        self._timer = threading.Timer(max(0.0, QUIET_S - self.spent_s), self.say)
        self._timer.daemon = True
        self._timer.start()

    def on_end(self, event: Any) -> None:
        self.depth -= 1
        if self.depth == 0 and self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self.spent_s += time.perf_counter() - self._start_s

    def say(self) -> None:
        if self.said or sys.stderr is None:
            return
        self.said = True
        of = f"{self.kernels}/{max(self.expected, self.kernels)}"
        print(f"compiling kernels, once per machine: {of} ...", file=sys.stderr, flush=True)


_notice = _Notice()


def announce_compiling() -> None:
    """Listen to numba from now on."""
    event.register("numba:compile", _notice)


def expect_kernels(count: int) -> None:
    """Say how many kernels will be called from Python next, for the line to count against."""
    _notice.expected = max(_notice.expected, _notice.kernels + count)


def speak_if_first(speaker: Any) -> None:
    """In a worker process: of all that share the lock `speaker`, one speaks."""
    _notice.said = not speaker.acquire(block=False)
