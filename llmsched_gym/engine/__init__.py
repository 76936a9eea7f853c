"""The one engine: state, packing kernel, step kernels, views, the invariant checker."""

from llmsched_gym.engine.core import Backend, Engine, Execution, StalledScheduler
from llmsched_gym.engine.invariants import InvariantError, check
from llmsched_gym.engine.told import ScheduledBatch
from llmsched_gym.engine.view import Batch, IllegalBatch, View

__all__ = [
    "Backend",
    "Batch",
    "Engine",
    "Execution",
    "IllegalBatch",
    "InvariantError",
    "ScheduledBatch",
    "StalledScheduler",
    "View",
    "check",
]
