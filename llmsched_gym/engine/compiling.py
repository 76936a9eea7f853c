"""While numba compiles: one line on stderr after a second, so that the first step is not silent, and no collector.

numba makes millions of small objects that live on; looking through them for garbage again and again takes a seventh of
the time. LLMSCHED_SAY_COMPILING=0 keeps the line away.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from numba.core import event

KERNELS: set[Callable] = set()
"""The Python functions that were made kernels."""

QUIET_S = 1.0  # compiling shorter than that is not worth a word


class _Compiling(event.Listener):
    """Adds up the time of the outermost compilations, speaks once, and holds the garbage collector off."""

    def __init__(self) -> None:
        self.depth, self.kernels, self.spent_s, self.said = 0, 0, 0.0, False
        self.expected, self.busy, self.collected = 0, False, False
        self._start_s = 0.0
        self._timer: threading.Timer | None = None

    def on_start(self, event: Any) -> None:
        if self.depth == 0 and event.data["dispatcher"].py_func not in KERNELS:
            return  # somebody else's function
        self.depth += 1
        if self.depth > 1:
            return
        self.busy, self.collected = True, gc.isenabled()
        gc.disable()
        self.kernels += 1
        if self.said:
            return
        self._start_s = time.perf_counter()
        self._timer = threading.Timer(max(0.0, QUIET_S - self.spent_s), self.say)
        self._timer.daemon = True
        self._timer.start()

    def on_end(self, event: Any) -> None:
        self.depth = max(0, self.depth - 1)
        if self.depth > 0 or not self.busy:
            return
        self.busy = False
        if self.collected:
            gc.enable()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self.spent_s += time.perf_counter() - self._start_s

    def say(self) -> None:
        if self.said or sys.stderr is None or os.environ.get("LLMSCHED_SAY_COMPILING") == "0":
            return
        self.said = True
        of = f"{self.kernels}/{max(self.expected, self.kernels)}"
        print(f"compiling kernels, once per machine: {of} ...", file=sys.stderr, flush=True)


_compiling = _Compiling()


def watch_compiling() -> None:
    """Listen to numba from now on."""
    event.register("numba:compile", _compiling)


def expect_kernels(count: int) -> None:
    """Say how many kernels will be called from Python next, for the line to count against."""
    _compiling.expected = max(_compiling.expected, _compiling.kernels + count)


def speak_if_first(speaker: Any) -> None:
    """In a worker process: of all that share the lock `speaker`, one speaks."""
    _compiling.said = not speaker.acquire(block=False)
