"""A pool of worker processes that end with the process that started them, however that ends."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import connection
from typing import Any

from llmsched_gym.engine.compiling import speak_if_first
from llmsched_gym.interrupts import unheard
from llmsched_gym.workload import TraceWarning

SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux' prctl(2)


class Workers:
    """A pool of `count` spawned processes, started with the first call; a context manager.

    Left by an exception, an interrupt too, it ends what they are at; else it waits for them.
    """

    is_here = True

    def __init__(self, count: int) -> None:
        self.count, self.started = count, False
        self._before = set(multiprocessing.active_children())
        context = multiprocessing.get_context("spawn")
        # The signal comes when the *thread* that started a process ends, so it is not for threads that end before.
        signalled = threading.current_thread() is threading.main_thread()
        self._executor = ProcessPoolExecutor(
            count, mp_context=context, initializer=start_worker, initargs=(context.Lock(), signalled)
        )

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        """Call it with `args` in one of the processes."""
        self.started = True
        with unheard():  # until `start_worker` is imported and called
            return self._executor.submit(function, *args)

    def where(self) -> str:
        """Nothing: it is this machine."""
        return ""

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self._executor.shutdown()
            return
        self._executor.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - self._before:
            child.terminate()


def start_worker(speaker: Any, signalled: bool) -> None:
    """Leave interrupts and remarks on traces to the parent, and do not outlive it; one of all tells of compiling."""
    speak_if_first(speaker)
    warnings.simplefilter("ignore", TraceWarning)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if signalled and sys.platform == "linux":
        # A thread that watches gets no turn before a compiled run of minutes is over.
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
