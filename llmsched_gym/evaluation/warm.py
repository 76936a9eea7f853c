"""Kernels compiled once per node: of the workers that need the same ones, one compiles and the others wait for it.

numba looks for a kernel on disk and, where there is none, compiles it, whoever else is at it: as many workers as there
are cores would each compile the same for 15-20 s.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba

from llmsched_gym.config import Scenario
from llmsched_gym.engine.cache import cache_dir
from llmsched_gym.engine.jit import JIT_ENABLED
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate

REQUESTS = 4  # of the run that asks for the kernels
_warm: set[str] = set()  # what this process has asked for


def warm(scenario: Scenario, policy: str) -> None:
    """Return when the kernels of such runs are on this node's disk, compiled by this process or another."""

    def ask() -> None:
        row(simulate(scenario.replace(num_requests=REQUESTS), policy, 0))

    name = re.sub(r"\[[^\[\]]*\]", "", policy)
    once((type(scenario).__name__, name, scenario.prefix_caching, scenario.async_lag), ask)


def once(selects: tuple, ask: Callable[[], Any]) -> None:
    """Call `ask`, which needs the kernels that `selects` names, unless this node has them; one process at a time.

    Two names for the same kernels cost a call of `ask`, one name for two a compilation in several workers.
    """
    text = repr((*selects, numba.__version__))
    if not JIT_ENABLED or text in _warm:
        return
    _warm.add(text)
    done = Path(cache_dir(), f"warm-{hashlib.sha256(text.encode()).hexdigest()[:16]}")
    if done.exists():
        return
    with _alone(Path(cache_dir(), "warm.lock")):
        if done.exists():
            return
        try:
            ask()
        except Exception:
            return  # whoever needs the kernels will meet it
        done.touch()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the file's lock, which ends with this process; a file system without locks is used without one."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield
    finally:
        os.close(handle)
