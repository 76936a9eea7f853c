"""Asking the processor for memory before it is needed: what the next step of another environment will read.

With many environments their records are far from the processor, and a step's loops wait for one line after the other. A
prefetch does not wait: the lines of the environments that come next arrive while one is being stepped.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import as_dtype

from llmsched_gym.engine.jit import JIT_ENABLED, kernel
from llmsched_gym.engine.records import BATCH, CACHE_LINE, EPISODE, KNOBS, REPLICA, WORLD


def _compiled_prefetch(context: Any, array: Any, index: Any, offset: Any) -> tuple[Any, Any]:
    byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)

    def codegen(target: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = target.make_array(signature.args[0])(target, builder, args[0]).data
        size = target.get_constant(types.intp, as_dtype(signature.args[0].dtype).itemsize)
        at = builder.add(builder.mul(args[1], size), args[2])
        place = builder.gep(builder.bitcast(data, byte), [at])
        function_type = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
        builder.call(function, [place, number(1), number(3), number(1)])  # to write, to keep, data
        return target.get_dummy_value()

    return types.void(array, types.intp, types.intp), codegen


def _no_prefetch(array: Any, index: int, offset: int) -> None:
    """Without compilation there is nothing to gain."""


prefetch: Any = intrinsic(_compiled_prefetch) if JIT_ENABLED else _no_prefetch
"""``prefetch(array, index, offset)``: the cache line `offset` bytes behind the start of ``array[index]``, C-ordered."""

_REPLICA, _EPISODE, _WORLD = REPLICA.itemsize, EPISODE.itemsize, WORLD.itemsize
_LINES = 4  # of the list of running requests
_FIRST_WAITING = 16
_KNOBS, _BATCH, _HOT = KNOBS.itemsize, BATCH.itemsize, 2 * CACHE_LINE  # _HOT: of a request, what every step reads


@kernel(inline="always")
def prefetch_queues(s, k, env):
    """Ask for a lane's scalars and the beginnings of its lists."""
    for offset in range(0, _REPLICA, CACHE_LINE):
        prefetch(s.sims, k, offset)
    for offset in range(0, _EPISODE, CACHE_LINE):
        prefetch(s.episodes, env, offset)
    for offset in range(0, _KNOBS, CACHE_LINE):
        prefetch(s.knobs, k, offset)
    for offset in range(0, _BATCH, CACHE_LINE):
        prefetch(s.batches, k, offset)
    prefetch(s.worlds, env, 0)
    for line in range(_LINES):
        prefetch(s.running, k * s.running.shape[1], line * CACHE_LINE)
    prefetch(s.waiting, k * s.waiting.shape[1], 0)


@kernel(inline="always")
def prefetch_requests(s, k, env):
    """Ask for the records of a lane's running requests and of the first that wait; its lists are to be near by now."""
    first, sim, width = env * s.requests.shape[1], s.sims[k], s.running.shape[1]
    for i in range(sim.num_running):
        r = s.running[k, i]
        for offset in range(0, _HOT, CACHE_LINE):
            prefetch(s.requests, first + r, offset)
    for i in range(0, sim.num_running, 8):
        prefetch(s.items, k * width + i, 0)
        prefetch(s.output_tokens, first + s.running[k, i], 0)
        prefetch(s.scratch, k * s.scratch.shape[1] + i, 0)
    for i in range(min(sim.num_waiting, _FIRST_WAITING)):
        for offset in range(0, _HOT, CACHE_LINE):
            prefetch(s.requests, first + s.waiting[k, i], offset)
