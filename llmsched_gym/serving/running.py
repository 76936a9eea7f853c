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
    previous = signal.getsignal(signal.SIGINT)
    interrupted = False

    async def main() -> T:
        task = asyncio.current_task()
        assert task is not None

        def interrupt() -> None:
            nonlocal interrupted
            interrupted = True
            task.cancel()

        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # on Windows, or in a thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupt)
        return await coroutine

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        if interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        if signal.getsignal(signal.SIGINT) != previous and previous is not None:
            signal.signal(signal.SIGINT, previous)
