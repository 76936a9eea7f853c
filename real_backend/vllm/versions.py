"""Which vLLM this is made for: its scheduler's interface is not public, and moves between minor versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmsched_gym.real_backend.errors import BackendError

SUPPORTED = ("0.32", "0.33")


def check_version(version: str) -> None:
    """Raises BackendError, one line, for a vLLM that nobody has tried."""
    if ".".join(version.split(".")[:2]) not in SUPPORTED:
        known = " and ".join(f"{minor}.x" for minor in SUPPORTED)
        raise BackendError(f"vllm {version}: the scheduler plug-in is made for {known}; pip install 'vllm==0.32.*'")


def let_vllm_look_at_llvmlite() -> None:
    """vLLM 0.32's workers on a CPU look into the ``__dict__`` of all that is imported; llvmlite has one that is none.

    Without this a worker ends with an AttributeError wherever numba was imported before it started.
    """
    try:
        from vllm.triton_utils import dispatcher
    except ImportError:  # other versions look elsewhere, or at nothing
        return

    def attributes(value: Any) -> Any:
        found = getattr(value, "__dict__", {})
        return found if isinstance(found, Mapping) else {}

    dispatcher.vars = attributes  # type: ignore[attr-defined]
