"""`kernel`: numba's `njit` with an on-disk cache that notices edits in *any* file that kernels depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from numba import types
from numba.core import config
from numba.core.registry import CPUDispatcher

from llmsched_gym.engine.cache import cache_dir
from llmsched_gym.engine.compiling import KERNELS, watch_compiling

numba_config: Any = config
njit: Any = numba.njit
JIT_ENABLED = not numba_config.DISABLE_JIT

watch_compiling()


class _Inner(CPUDispatcher):
    """A kernel that other kernels call. Without what Python would need to call it, it takes half the time to compile.

    From Python it runs as plain Python. Small whole numbers and constants come as 64 bits, so that one compilation does
    for all its callers.
    """

    def __call__(self, *args: Any) -> Any:
        return self.py_func(*args)

    def get_call_template(self, args: Any, kws: Any) -> Any:
        return super().get_call_template([_widened(types.unliteral(arg)) for arg in args], kws)


def _widened(arg: Any) -> Any:
    return types.int64 if arg in (types.int8, types.int16, types.int32) else arg


def kernel(
    signature: Any = None, *, inline: str = "never", outline: bool = False, counted: bool = False, nogil: bool = False
) -> Callable[[Callable], Any]:
    """Decorate a function as a compiled, cached kernel; with a signature it is compiled at once.

    Kernels on a lane allocate nothing and keep nothing, so references are not counted in them, which makes the engine
    1.7 times as fast; those that unpack a handle (see :func:`entry`) need the counts. Only these can be called from
    Python in their compiled form. All others are inlined by LLVM, whatever it thinks of their size, which makes the
    engine another 1.4 times as fast: a lane is 700 bytes, and a kernel that stays a function gets them by value. With
    `outline` LLVM decides: for what is large and seldom called.
    """

    def decorate(function: Callable) -> Any:
        if not JIT_ENABLED:
            return function
        KERNELS.add(function)
        previous = numba_config.CACHE_DIR
        numba_config.CACHE_DIR = cache_dir()
        options: dict[str, Any] = {"inline": inline, "error_model": "numpy", "_nrt": counted, "nogil": nogil}
        if not counted:
            options |= {"no_cpython_wrapper": True, "no_cfunc_wrapper": signature is None, "forceinline": not outline}
        try:
            args = () if signature is None else (signature,)
            dispatcher = njit(*args, cache=True, **options)(function)
        finally:
            numba_config.CACHE_DIR = previous
        if not counted:
            dispatcher.__class__ = _Inner
        return dispatcher

    return decorate


def entry(signature: Any = None, *, nogil: bool = False) -> Callable[[Callable], Any]:
    """A kernel that takes the handle of a state: what Python code calls; `nogil` lets other threads run meanwhile."""
    return kernel(signature, counted=True, nogil=nogil)
