"""The real backend: the engine's hybrid batches on a transformers model with a paged KV cache.

Importing this package needs neither torch nor transformers; :func:`make_backend` does.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from llmsched_gym.real_backend.errors import BackendError

if TYPE_CHECKING:
    from llmsched_gym.config import Scenario

__all__ = ["BackendError", "make_backend"]

if __name__ == "real_backend":  # a clone's spelling of the same package
    sys.modules[__name__] = importlib.import_module("llmsched_gym.real_backend")
    for _room in ("calibration", "gpu_check", "sim2real"):
        sys.modules[f"{__name__}.{_room}"] = importlib.import_module(f"llmsched_gym.real_backend.{_room}")


def make_backend(scenario: Scenario, model: Any = "random:tiny", device: str | None = None, **options: Any) -> Any:
    """A backend for ``Engine(scenario, ..., backend=...)``; arguments: see ``make_backend`` in backend.py.

    With ``backend="vllm"`` in the scenario it is vLLM, see vllm/backend.py, which places the model itself.
    """
    if scenario.backend == "vllm":
        try:
            from llmsched_gym.real_backend.vllm.backend import make_backend as make_vllm
        except ImportError as error:
            needs = "the vllm backend needs vLLM in an environment of its own: benchmarks/vllm_env.sh DIR"
            raise BackendError(f"{needs} ({error})") from None
        return make_vllm(scenario, model, **options)
    try:
        from llmsched_gym.real_backend import backend
    except ImportError as error:
        needs = "the transformers backend needs torch and transformers: pip install '.[real]'"
        raise BackendError(f"{needs} ({error})") from None
    return backend.make_backend(scenario, model, device, **options)
