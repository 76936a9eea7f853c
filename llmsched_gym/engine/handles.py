"""Handles: compiled references to a named tuple of arrays, which cost a kernel's caller in Python one pointer.

Passing the tuple itself, with its thirty arrays, costs 50 us a call.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from numba import types
from numba.experimental import structref
from numba.extending import overload

from llmsched_gym.engine.jit import kernel


@structref.register
class HandleType(types.StructRef):
    """Numba's type of handles: of one field, ``arrays``, whose type tells one kind of handle from another."""


class Handle(structref.StructRefProxy):
    """A handle as Python has it: nothing to look into, only to hand over."""


structref.define_boxing(HandleType, Handle)


def handle_type(arrays_type: Any) -> Any:
    """The numba type of handles of a named tuple of arrays, of that type."""
    return HandleType([("arrays", arrays_type)])


def as_handle(arrays: Any) -> Any:
    """A handle of a named tuple of arrays, for one kernel of each kind of them to return.

    One each: of closures that one function makes numba (0.68.1) reads all that is cached at once, with the modules that
    their types are from, and does not always find them again in the next process.
    """
    return SimpleNamespace(arrays=arrays)


@overload(as_handle)
def _as_handle(arrays: Any) -> Any:
    made = handle_type(arrays)

    def build(arrays: Any) -> Any:
        handle: Any = structref.new(made)  # type: ignore[call-arg]
        handle.arrays = arrays
        return handle

    return build


@kernel(inline="always")
def unpack(handle):
    """The arrays behind a handle, for a kernel to take once: of each of them the references are counted atomically."""
    return handle.arrays
