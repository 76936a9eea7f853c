"""An event loop for one coroutine, whose interrupts come between callbacks."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def run_to_end(coroutine: Coroutine[Any, Any, T]) -> T:
    """What `coroutine` returns; KeyboardInterrupt, with all of its tasks cancelled, if an interrupt comes.

    An interrupt raised inside a callback of aiohttp would become the failure of one request, so that none is raised
    there: the loop is told. Threads that look up names of hosts, which nothing can end, are left to themselves.
    """
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    usual = {number: handler for number, handler in usual.items() if callable(handler)}
    interrupted: list[int] = []

    async def main() -> T:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None

        def interrupt(number: int) -> None:
            interrupted.append(number)
            loop.set_default_executor(ThreadPoolExecutor(1))  # the one that the loop, as it ends, waits for
            task.cancel()

        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # on Windows, or in a thread
            for number in usual:
                loop.add_signal_handler(number, interrupt, number)
        return await coroutine

    try:
        result = asyncio.run(main())
        if not interrupted:
            return result
    except (Exception, asyncio.CancelledError):  # what an interrupt makes of the rest is nobody's concern
        if not interrupted:
            raise
    finally:
        for number, handler in usual.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)
    signal.raise_signal(interrupted[0])  # for whoever counts interrupts
    raise KeyboardInterrupt
