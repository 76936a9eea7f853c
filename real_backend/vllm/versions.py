"""Which vLLM this is made for: its scheduler's interface is not public, and moves between minor versions."""

from __future__ import annotations

from llmsched_gym.real_backend.errors import BackendError

SUPPORTED = ("0.32", "0.33")


def check_version(version: str) -> None:
    """Raises BackendError, one line, for a vLLM that nobody has tried."""
    if ".".join(version.split(".")[:2]) not in SUPPORTED:
        known = " and ".join(f"{minor}.x" for minor in SUPPORTED)
        raise BackendError(f"vllm {version}: the scheduler plug-in is made for {known}; pip install 'vllm==0.32.*'")
