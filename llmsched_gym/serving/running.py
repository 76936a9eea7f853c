"""An event loop for one coroutine, whose interrupts come between callbacks."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_to_end(coroutine: Coroutine[Any, Any, T]) -> T:
    """What `coroutine` returns; KeyboardInterrupt, with all of its tasks cancelled, if an interrupt comes.

    An interrupt raised inside a callback of aiohttp would become the failure of one request, so that none is raised
    there: the loop is told.
    """
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    usual = {number: handler for number, handler in usual.items() if callable(handler)}
    interrupted: list[int] = []

    async def main() -> T:
        task = asyncio.current_task()
        assert task is not None

        def interrupt(number: int) -> None:
            interrupted.append(number)
            task.cancel()

        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # on Windows, or in a thread
            for number in usual:
                asyncio.get_running_loop().add_signal_handler(number, interrupt, number)
        return await coroutine

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        if not interrupted:
            raise
    finally:
        for number, handler in usual.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)
    signal.raise_signal(interrupted[0])  # for whoever counts interrupts
    raise KeyboardInterrupt
