"""One map of a function over cells, wherever they run: in this process, in worker processes, on a Ray cluster.

A *pool* is where cells run: :class:`Here`, :class:`~llmsched_gym.evaluation.workers.Workers` or
:class:`~llmsched_gym.evaluation.ray_pool.RayPool`. Cells are plain arguments; results come as they are done, and
none of them depends on the pool.
"""

from __future__ import annotations

import argparse
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from llmsched_gym.evaluation.workers import Workers

AHEAD = 4
"""Calls that are handed over for each that can run at once: enough that no worker waits for this process."""


class Pool(Protocol):
    """Where cells run; a context manager that ends its workers."""

    is_here: bool  # whether its workers write to this machine's files

    @property
    def count(self) -> int:
        """Calls that run at a time, as of now."""

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        """Call it with `args`, there."""

    def where(self) -> str:
        """What runs the calls, for people: nothing for processes of this machine."""

    def __enter__(self) -> Any: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None: ...


Places = int | Pool
"""A number of processes, or a pool that is open already."""


class Here:
    """A pool of this process alone: a call is done when `submit` returns."""

    is_here, count = True, 1

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        """Call it now; what it raises is the future's."""
        future: Future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def where(self) -> str:
        """Nothing: it is here."""
        return ""

    def __enter__(self) -> Here:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None: ...


def opened(places: Places) -> AbstractContextManager[Pool]:
    """The pool itself, which stays open, or so many processes, ended on leaving; 1 is this process."""
    if not isinstance(places, int):
        return nullcontext(places)
    pool: Pool = Here() if places == 1 else Workers(places)
    return pool


def spread(pool: Pool, function: Callable[..., Any], cells: Sequence[tuple]) -> Iterator[tuple[int, Any]]:
    """(place, ``function(*cell)``) of every cell, as they are done; the first error ends it.

    No more than `AHEAD` calls a worker are handed over at a time, so that cells may be a million.
    """
    done: queue.SimpleQueue[tuple[int, Future]] = queue.SimpleQueue()
    left, running = iter(enumerate(cells)), 0

    def hand_over() -> bool:
        place, cell = next(left, (-1, ()))
        if place < 0:
            return False
        pool.submit(function, *cell).add_done_callback(lambda future: done.put((place, future)))
        return True

    while True:
        ahead = 1 if isinstance(pool, Here) else AHEAD * pool.count
        while running < ahead and hand_over():
            running += 1
        if not running:
            return
        place, future = done.get()
        running -= 1
        yield place, future.result()


def run_cells(
    function: Callable[..., Any],
    cells: Sequence[tuple],
    places: Places,
    note: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Any]:
    """``function(*cell)`` of every cell in its order; a note on each that is done, and how many are, of how many."""
    found: list[Any] = [None] * len(cells)
    with opened(places) as pool:
        for i, (place, result) in enumerate(spread(pool, function, cells)):
            found[place] = result
            note(f"{i + 1}/{len(cells)} {pool.where()}".rstrip())
            progress(i + 1, len(cells))
    return found


def choose(
    workers: int | None, ray: bool = False, address: str | None = None, files: Sequence[str] = ()
) -> AbstractContextManager[Any]:
    """What ``--workers``, ``--ray`` and ``--ray-address`` ask for.

    Args:
        workers: processes; of a Ray started here, so many at a time. None: one per core.
        ray: start Ray on this machine.
        address: of a Ray cluster that runs, such as ``auto`` or ``HOST:6379``.
        files: names that may mean files here, which the cluster's workers are to find (see `ray_pool.staged`).
    """
    if not ray and not address:
        return nullcontext(workers)
    from llmsched_gym.evaluation.ray_pool import RayPool

    return RayPool(workers or os.cpu_count() or 1, address or None, files)


def count_of(places: Places) -> int:
    """How many cells run at a time."""
    return places if isinstance(places, int) else places.count


def where(places: Places | None) -> Callable[[], str]:
    """What says, whenever it is asked, what runs the cells; nothing for processes of this machine."""
    return (lambda: "") if places is None or isinstance(places, int) else places.where


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--ray`` and ``--ray-address``, for `choose`."""
    parser.add_argument("--ray", action="store_true", help="run on a Ray started here, of --workers processes")
    parser.add_argument("--ray-address", metavar="A", help="run on the Ray cluster at this address")
