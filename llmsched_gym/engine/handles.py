"""Handles: compiled references to a named tuple of arrays, which cost a kernel's caller in Python one pointer.

Passing the tuple itself, with its thirty arrays, costs 50 us a call.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from numba import types
from numba.experimental import structref

from llmsched_gym.engine.jit import JIT_ENABLED, kernel


@structref.register
class HandleType(types.StructRef):
    """Numba's type of handles: of one field, ``arrays``, whose type tells one kind of handle from another."""


class Handle(structref.StructRefProxy):
    """A handle as Python has it: nothing to look into, only to hand over."""


structref.define_boxing(HandleType, Handle)


def handle_maker(arrays_type: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Of the numba type of a named tuple of arrays: the type of its handles, and what makes one of such a tuple."""
    handle_type = HandleType([("arrays", arrays_type)])
    if not JIT_ENABLED:
        return handle_type, lambda arrays: SimpleNamespace(arrays=arrays)

    def make_handle(arrays):
        handle = structref.new(handle_type)
        handle.arrays = arrays
        return handle

    # a file of its own in the cache of compiled code: reading it imports what all types in it are made of
    make_handle.__qualname__ += f".{arrays_type.instance_class.__name__}"
    return handle_type, kernel(handle_type(arrays_type), counted=True)(make_handle)


@kernel(inline="always")
def unpack(handle):
    """The arrays behind a handle, for a kernel to take once: of each of them the references are counted atomically."""
    return handle.arrays
