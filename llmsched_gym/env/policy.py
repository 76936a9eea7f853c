"""The bridges between schedulers and agents by the name that users import: they lie in `llmsched_gym.policies.bridge`.

They stand above the environment, which imports nothing of them: they are looked up when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["PolicyScheduler", "SchedulerPolicy"]  # noqa: F822 - found by __getattr__


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("llmsched_gym.policies.bridge"), name)
