"""A cluster's arrays beside the engine's, and their handle for kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.np.numpy_support import from_dtype

from llmsched_gym.cluster.records import CANDIDATE, NODE, REPORT, ROUTE, TRANSFER
from llmsched_gym.engine.handles import as_handle, handle_type
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.records import NONE, REQUEST

ROUTER_MEMORY = 8
PROMPTS, DECODES = range(2)  # which of the two routers: the one that prompts go by, and `decode_router`


class Nodes(NamedTuple):
    """All arrays of clusters side by side; num_lanes = num_envs x num_replicas."""

    routes: Any  # (num_envs,) ROUTE
    nodes: Any  # (num_lanes,) NODE
    reports: Any  # (num_lanes,) REPORT, the last of each
    candidates: Any  # (num_lanes,) CANDIDATE, for the request that is decided on
    tree: Any  # (num_envs, 2 x power of two) int32: which replica of each subtree has the next event
    changes_s: Any  # (num_envs, num_replicas, num_changes) float64: when it fails, is back, fails, ...; inf behind them
    replica_of: Any  # (num_envs, capacity) int32: where a request was delivered last; NONE
    before: Any  # (num_envs, capacity) int32: the request of its session before it; NONE
    held: Any  # (num_envs, capacity) int32: requests at the router, first come first
    moving: Any  # (num_envs, room for transfers) TRANSFER
    memory: Any  # (num_envs, 2, ROUTER_MEMORY) float64, a router's own
    options: Any  # (num_envs, 2, ROUTER_MEMORY) float64, its settings
    identities: Any  # (num_lanes, blocks, columns) int32: blocks as reported; without staleness or caching no rows


class Route(NamedTuple):
    """One decision, as compiled routers get it."""

    route: Any  # ROUTE
    request: Any  # REQUEST, the one to be routed
    candidates: Any  # (num_replicas,) CANDIDATE
    memory: Any  # (ROUTER_MEMORY,) float64, its own
    options: Any  # (ROUTER_MEMORY,) float64, its settings in the order in which it declares them


def _array(dtype: Any, ndim: int) -> Any:
    return types.Array(from_dtype(dtype) if isinstance(dtype, np.dtype) else dtype, ndim, "C")


_TYPES = {
    "routes": _array(ROUTE, 1),
    "nodes": _array(NODE, 1),
    "reports": _array(REPORT, 1),
    "candidates": _array(CANDIDATE, 1),
    "tree": _array(types.int32, 2),
    "changes_s": _array(types.float64, 3),
    "replica_of": _array(types.int32, 2),
    "before": _array(types.int32, 2),
    "held": _array(types.int32, 2),
    "moving": _array(TRANSFER, 2),
    "memory": _array(types.float64, 3),
    "options": _array(types.float64, 3),
    "identities": _array(types.int32, 3),
}
NODES_TYPE = types.NamedTuple([_TYPES[name] for name in Nodes._fields], Nodes)
ROUTE_TYPE = types.NamedTuple(
    [from_dtype(ROUTE), from_dtype(REQUEST), _array(CANDIDATE, 1), _array(types.float64, 1), _array(types.float64, 1)],
    Route,
)
ROUTE_SIGNATURE = types.int64(ROUTE_TYPE)
"""Signature of a compiled router: it returns the replica."""
ROUTER_TYPE = types.FunctionType(ROUTE_SIGNATURE)
NODES_HANDLE_TYPE = handle_type(NODES_TYPE)


@kernel(NODES_HANDLE_TYPE(NODES_TYPE), counted=True)
def handle_of(arrays):
    """What kernels take for these arrays."""
    return as_handle(arrays)


def allocate(
    num_envs: int,
    num_replicas: int,
    capacity: int,
    *,
    num_changes: int,
    num_moving: int,
    num_records: int,
    columns: int,
) -> Nodes:
    """Zeroed arrays for `num_envs` clusters of `num_replicas` each and up to `capacity` requests."""
    lanes, leaves = num_envs * num_replicas, 1 << (num_replicas - 1).bit_length()
    return Nodes(
        routes=np.zeros(num_envs, ROUTE),
        nodes=np.zeros(lanes, NODE),
        reports=np.zeros(lanes, REPORT),
        candidates=np.zeros(lanes, CANDIDATE),
        tree=np.full((num_envs, 2 * leaves), num_replicas, np.int32),  # nobody plays where there is none
        changes_s=np.full((num_envs, num_replicas, num_changes + 1), np.inf),
        replica_of=np.full((num_envs, capacity), NONE, np.int32),
        before=np.full((num_envs, capacity), NONE, np.int32),
        held=np.zeros((num_envs, capacity), np.int32),
        moving=np.zeros((num_envs, num_moving), TRANSFER),
        memory=np.zeros((num_envs, 2, ROUTER_MEMORY)),
        options=np.zeros((num_envs, 2, ROUTER_MEMORY)),
        identities=np.zeros((lanes, num_records, columns), np.int32),
    )
