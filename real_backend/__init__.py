"""The real backend: the engine's hybrid batches on a transformers model with a paged KV cache.

Importing this package needs neither torch nor transformers; :func:`make_backend` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from real_backend.errors import BackendError

if TYPE_CHECKING:
    from llmsched_gym.config import Scenario
    from real_backend.backend import TransformersBackend

__all__ = ["BackendError", "make_backend"]


def make_backend(
    scenario: Scenario, model: Any = "random:tiny", device: str | None = None, **options: Any
) -> TransformersBackend:
    """A backend for ``Engine(scenario, ..., backend=...)``; see :func:`real_backend.backend.make_backend`."""
    try:
        from real_backend import backend
    except ImportError as error:
        needs = "the transformers backend needs torch and transformers: pip install 'llmsched-gym[real]'"
        raise BackendError(f"{needs} ({error})") from None
    return backend.make_backend(scenario, model, device, **options)
