"""The engine's state: structured arrays, of an episode's requests and of the replicas that serve them.

Requests belong to an environment's episode, queues and batches to a replica: a lane, whose index is environment x
replicas + replica. Columns are read as ``state.requests["num_computed_tokens"]`` (shape (num_envs, capacity)); kernels
read one record at a time as ``lane.requests[r].num_computed_tokens``. Storing a request's fields side by side keeps a
batch of 30 scattered requests in 30 places of memory instead of 600. Long, as the arrays, their compiled types and
their first values name the same fields and change together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.np.numpy_support import from_dtype

from llmsched_gym.config import MOST, Scenario, blocks_needed
from llmsched_gym.cost import Profile, check_reach
from llmsched_gym.engine.blocks import NUM_COLUMNS, num_records
from llmsched_gym.engine.handles import as_handle, handle_type
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.records import (
    ARRIVAL,
    BATCH,
    CACHE_LINE,
    EPISODE,
    FLIGHT,
    FLYING,
    ITEM,
    KNOBS,
    NONE,
    PREFIX,
    REPLICA,
    REQUEST,
    STEP,
    WORLD,
)

OWN_MEMORY = 32
ACTION_MEMORY = 64  # for one score of each visible slot
MIN_SCRATCH = 64  # an environment sorts its visible slots there


class State(NamedTuple):
    """All arrays of a batch of environments on one engine; num_lanes = num_envs x replicas."""

    sims: Any  # (num_lanes,) REPLICA
    episodes: Any  # (num_envs,) EPISODE
    worlds: Any  # (num_envs,) WORLD, hidden
    requests: Any  # (num_envs, capacity) REQUEST; of those to come, nothing is told
    prefixes: Any  # (num_envs, capacity; without prefix caching 0) PREFIX
    arrivals: Any  # (num_envs, capacity) ARRIVAL, hidden
    output_tokens: Any  # (num_envs, capacity) int32, hidden
    due: Any  # (num_envs, capacity) int32, turns to come, see engine.turns; hidden
    waiting: Any  # (num_lanes, capacity) int32; by arrival, preempted ones at the head
    running: Any  # (num_lanes, max_num_seqs) int32; by admission
    knobs: Any  # (num_lanes,) KNOBS
    memory: Any  # (num_lanes, OWN_MEMORY + ACTION_MEMORY) float64, a scheduler's own; an action's
    batches: Any  # (num_lanes,) BATCH
    items: Any  # (num_lanes, max_num_seqs) ITEM
    preempt: Any  # (num_lanes, max_num_seqs) int32
    refuse: Any  # (num_lanes, capacity) int32
    scratch: Any  # (num_lanes, max_num_seqs or MIN_SCRATCH) int32
    keys: Any  # (num_lanes, max_num_seqs) float64, sort keys of scratch
    resolved: Any  # (num_envs, capacity) int32, requests in the order they were resolved
    noise: Any  # (num_lanes, 1 or NOISE_BLOCK) float64, factors on batch times
    # costs of the profiles that replicas run on, the row that REPLICA names; coefficients: Profile.coefficients
    linear_s: Any  # (num_profiles, max_num_batched_tokens + 1) float64, the executing profiles
    coef_s: Any  # (num_profiles, 5 or more) float64
    own_linear_s: Any  # the schedulers' profiles
    own_coef_s: Any
    gaps: Any  # (num_envs, num_gaps) float32, recorded gaps between tokens
    steps: Any  # (num_lanes, log_size) STEP
    blocks: Any  # (num_lanes, num_records, NUM_COLUMNS) int32, see engine.blocks; without prefix caching one record
    flights: Any  # (num_lanes,) FLIGHT, the batch in flight, see engine.lag
    flying: Any  # (num_lanes, max_num_seqs; without async_lag 0) FLYING, its items


class Lane(NamedTuple):
    """One replica's slice of the state, as schedulers get it: nothing in it is hidden from them by rule 6."""

    sim: Any  # REPLICA
    requests: Any
    waiting: Any
    running: Any
    knobs: Any
    memory: Any
    batch: Any
    items: Any
    preempt: Any
    refuse: Any
    scratch: Any
    keys: Any
    resolved: Any
    linear_s: Any
    coef_s: Any
    episode: Any  # EPISODE
    blocks: Any  # int32
    prefixes: Any


class Episode(NamedTuple):
    """One environment's requests and what of them is hidden from schedulers: for the engine's own kernels."""

    episode: Any  # EPISODE
    world: Any  # WORLD
    requests: Any  # (capacity,) REQUEST
    resolved: Any  # (capacity,) int32
    prefixes: Any  # (capacity or 0,) PREFIX
    arrivals: Any  # (capacity,) ARRIVAL
    output_tokens: Any  # (capacity,) int32
    due: Any  # (capacity,) int32


_F8, _I4 = types.float64, types.int32
_STATE_FIELDS = {
    "sims": (REPLICA, 1),
    "episodes": (EPISODE, 1),
    "worlds": (WORLD, 1),
    "requests": (REQUEST, 2),
    "prefixes": (PREFIX, 2),
    "arrivals": (ARRIVAL, 2),
    "output_tokens": (_I4, 2),
    "due": (_I4, 2),
    "waiting": (_I4, 2),
    "running": (_I4, 2),
    "knobs": (KNOBS, 1),
    "memory": (_F8, 2),
    "batches": (BATCH, 1),
    "items": (ITEM, 2),
    "preempt": (_I4, 2),
    "refuse": (_I4, 2),
    "scratch": (_I4, 2),
    "keys": (_F8, 2),
    "resolved": (_I4, 2),
    "noise": (_F8, 2),
    "linear_s": (_F8, 2),
    "coef_s": (_F8, 2),
    "own_linear_s": (_F8, 2),
    "own_coef_s": (_F8, 2),
    "gaps": (types.float32, 2),
    "steps": (STEP, 2),
    "blocks": (_I4, 3),
    "flights": (FLIGHT, 1),
    "flying": (FLYING, 2),
}


def _numba_type(dtype: Any) -> Any:
    return from_dtype(dtype) if isinstance(dtype, np.dtype) else dtype


def _array_type(field: str, drop: int = 0) -> Any:
    dtype, ndim = _STATE_FIELDS[field]
    return types.Array(_numba_type(dtype), ndim - drop, "C") if ndim > drop else _numba_type(dtype)


STATE_TYPE = types.NamedTuple([_array_type(name) for name in State._fields], State)
_LANE_SOURCES = ["sims", "requests", "waiting", "running", "knobs", "memory", "batches", "items"]
_LANE_SOURCES += [
    "preempt",
    "refuse",
    "scratch",
    "keys",
    "resolved",
    "own_linear_s",
    "own_coef_s",
    "episodes",
    "blocks",
    "prefixes",
]
LANE_TYPE = types.NamedTuple(
    [_array_type(name, drop=1) for name in _LANE_SOURCES],
    Lane,
)
SCHEDULE_SIGNATURE = types.void(LANE_TYPE)
"""Signature of a compiled scheduler: it reads the lane and fills `batch`, `items` and `preempt` of it."""
SCHEDULE_TYPE = types.FunctionType(SCHEDULE_SIGNATURE)


HANDLE_TYPE = handle_type(STATE_TYPE)


@kernel(HANDLE_TYPE(STATE_TYPE), counted=True)
def make_handle(arrays):
    """What kernels take for a state."""
    return as_handle(arrays)


@kernel(inline="always")
def env_of(s, k):
    """The environment whose requests lane `k` serves."""
    num_lanes, num_envs = s.sims.shape[0], s.episodes.shape[0]
    return k if num_lanes == num_envs else k // (num_lanes // num_envs)


@kernel(inline="always")  # a compiled function cannot return records
def lane_of(s, k):
    """The slice of lane `k`, without what schedulers must not see; with one replica `k` is the environment."""
    env, profile = env_of(s, k), s.sims[k].profile
    return Lane(
        s.sims[k],
        s.requests[env],
        s.waiting[k],
        s.running[k],
        s.knobs[k],
        s.memory[k],
        s.batches[k],
        s.items[k],
        s.preempt[k],
        s.refuse[k],
        s.scratch[k],
        s.keys[k],
        s.resolved[env],
        s.own_linear_s[profile],
        s.own_coef_s[profile],
        s.episodes[env],
        s.blocks[k],
        s.prefixes[env],
    )


@kernel(inline="always")
def episode_of(s, env):
    """One environment's requests, the hidden part with them."""
    return Episode(
        s.episodes[env],
        s.worlds[env],
        s.requests[env],
        s.resolved[env],
        s.prefixes[env],
        s.arrivals[env],
        s.output_tokens[env],
        s.due[env],
    )


def aligned_zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros that start at a cache line: a request's record is then read with as few lines as it has."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % CACHE_LINE
    return raw[start : start + size].view(dtype).reshape(shape)


def aligned(state: State) -> State:
    """The same state with the arrays that :func:`aligned_zeros` makes where it makes them, as copies are not."""
    fields = state._asdict()
    for name in ("requests", "blocks"):
        fields[name] = aligned_zeros(fields[name].shape, fields[name].dtype)
        fields[name].reshape(-1).view(np.uint8)[:] = getattr(state, name).reshape(-1).view(np.uint8)
    return State(**fields)


def empty_line(sims: Any) -> None:
    """Nobody stands in the waiting line's index: also before the first table, where 0 would be a request."""
    for name in ("first_open", "last_open", "first_expired", "last_expired", "expired_strict", "expired_others"):
        sims[name] = NONE


class Replica(NamedTuple):
    """What replicas of an episode may differ in."""

    num_kv_blocks: int
    max_num_seqs: int
    profile: int = 0  # which of the profiles it runs on


def allocate(
    num_envs: int,
    capacity: int,
    scenario: Scenario,
    profiles: Sequence[Profile],
    own_profiles: Sequence[Profile],
    replicas: Sequence[Replica],
    *,
    noise_size: int = 1,
    num_gaps: int = 0,
    num_steps: int = 0,
    room: int | None = None,
) -> State:
    """Zeroed arrays for `num_envs` environments of up to `capacity` requests and as many lanes as `replicas` each.

    Up to `room` requests can wait at a lane; None: all. Schedulers go by `own_profiles`, one for each of `profiles`.
    """
    lanes, seqs = num_envs * len(replicas), max(replica.max_num_seqs for replica in replicas)
    room = capacity if room is None else room
    limit = scenario.max_num_batched_tokens
    records = max(_records(scenario, replica) for replica in replicas) if scenario.prefix_caching else 1
    for replica in replicas:
        shared = MOST if scenario.prefix_caching else replica.num_kv_blocks * scenario.block_size
        for profile in (profiles[replica.profile], own_profiles[replica.profile]):
            check_reach(profile, replica.max_num_seqs, scenario.max_model_len, shared)
    sims = np.zeros(lanes, REPLICA)
    empty_line(sims)
    return State(
        sims=sims,
        episodes=np.zeros(num_envs, EPISODE),
        worlds=np.zeros(num_envs, WORLD),
        requests=aligned_zeros((num_envs, capacity), REQUEST),
        prefixes=np.zeros((num_envs, capacity if scenario.prefix_caching else 0), PREFIX),
        arrivals=np.zeros((num_envs, capacity), ARRIVAL),
        output_tokens=np.zeros((num_envs, capacity), np.int32),
        due=np.zeros((num_envs, capacity), np.int32),
        waiting=np.zeros((lanes, room), np.int32),
        running=np.zeros((lanes, seqs), np.int32),
        knobs=np.zeros(lanes, KNOBS),
        memory=np.zeros((lanes, OWN_MEMORY + ACTION_MEMORY)),
        batches=np.zeros(lanes, BATCH),
        items=np.zeros((lanes, seqs), ITEM),
        preempt=np.zeros((lanes, seqs), np.int32),
        refuse=np.zeros((lanes, room), np.int32),
        scratch=np.zeros((lanes, max(seqs, MIN_SCRATCH)), np.int32),
        keys=np.zeros((lanes, seqs)),
        resolved=np.zeros((num_envs, capacity), np.int32),
        noise=np.ones((lanes, noise_size)),
        linear_s=np.array([profile.linear_table_s(limit) for profile in profiles]),  # copies, as kernels write
        coef_s=_side_by_side([profile.coefficients(seqs) for profile in profiles]),
        own_linear_s=np.array([profile.linear_table_s(limit) for profile in own_profiles]),
        own_coef_s=_side_by_side([profile.coefficients(seqs) for profile in own_profiles]),
        gaps=np.zeros((num_envs, max(num_gaps, 1)), np.float32),
        steps=np.zeros((lanes, num_steps), STEP),
        blocks=aligned_zeros((lanes, records, NUM_COLUMNS), np.int32),
        flights=np.zeros(lanes, FLIGHT),
        flying=np.zeros((lanes, seqs if scenario.async_lag else 0), FLYING),
    )


def row_blocks(scenario: Scenario, num_kv_blocks: int) -> int:
    """Most blocks of a request."""
    return min(num_kv_blocks, blocks_needed(scenario.max_model_len, scenario.block_size))


def _records(scenario: Scenario, replica: Replica) -> int:
    return num_records(replica.num_kv_blocks, replica.max_num_seqs, row_blocks(scenario, replica.num_kv_blocks))


def _side_by_side(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of different lengths, zeros behind the shorter ones."""
    out = np.zeros((len(rows), max(map(len, rows))))
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out


def grow(state: State, capacity: int, num_gaps: int = 0, room: int | None = None) -> State:
    """The same state with room for `capacity` requests and `num_gaps` recorded gaps an environment.

    Up to `room` can wait at a lane; None: all.
    """
    fields = state._asdict()
    sizes = dict.fromkeys(("requests", "arrivals", "output_tokens", "due", "resolved"), capacity)
    sizes |= dict.fromkeys(("waiting", "refuse"), capacity if room is None else room) | {"gaps": num_gaps}
    if state.prefixes.shape[1] > 0:
        sizes["prefixes"] = capacity
    for name, size in sizes.items():
        old = fields[name]
        if size > old.shape[1]:
            fields[name] = aligned_zeros((old.shape[0], size), old.dtype)
            fields[name][:, : old.shape[1]] = old
    return State(**fields)
