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
from numba.experimental import structref
from numba.np.numpy_support import from_dtype

from llmsched_gym.config import ADMISSIONS, MOST, Scenario, blocks_needed
from llmsched_gym.cost import Profile
from llmsched_gym.engine.blocks import NUM_COLUMNS, load_blocks, num_records, table_size
from llmsched_gym.engine.jit import JIT_ENABLED, entry, kernel
from llmsched_gym.engine.records import (
    ARRIVAL,
    BATCH,
    CACHE_LINE,
    CANCELLED,
    EPISODE,
    FLIGHT,
    FLYING,
    ITEM,
    KNOBS,
    NONE,
    PENDING,
    PREFIX,
    REPLICA,
    REQUEST,
    STEP,
    WORLD,
)
from llmsched_gym.workload import Request, RequestTable

OWN_MEMORY = 8
ACTION_MEMORY = 64  # for one score of each visible slot
MIN_SCRATCH = 64  # an environment sorts its visible slots there

TABLE_COLUMNS = ("arrival_s", "ttft_slo_s", "tbt_slo_s", "length_hint", "session_id", "prompt_tokens", "slo_class")
"""Of a request table and of ARRIVAL: what becomes known of a request when it arrives."""
IDENTITY_COLUMNS = ("shares_with", "shared_tokens")
TURN_COLUMNS = ("parent", "think_s", "turn", "first_turn", "next_turn")
ROOT = (NONE, 0.0, 0, NONE, NONE)  # of a request that stands alone


def _to_come() -> np.ndarray:
    """The row of a request that has not arrived; shape () REQUEST."""
    row = np.zeros((), REQUEST)
    for name in ("first_scheduled_s", "first_token_s", "last_token_s", "resolved_s", "lst_s"):
        row[name] = np.nan
    row["deadline_miss_s"] = -np.inf
    return row


TO_COME = _to_come()
NOTHING_SHARED = np.array((NONE, 0, NONE, 0, 0, 0, 0, 0), PREFIX)


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


@structref.register
class HandleType(types.StructRef):
    """A compiled reference to the arrays of a :class:`State`."""


class Handle(structref.StructRefProxy):
    """The state as compiled kernels take it: passing it costs a pointer, where a tuple of 20 arrays costs 50 us."""


structref.define_boxing(HandleType, Handle)
HANDLE_TYPE = HandleType([(name, _array_type(name)) for name in State._fields])


@entry(HANDLE_TYPE(STATE_TYPE))
def _make_handle(state):
    s = structref.new(HANDLE_TYPE)
    s.sims, s.episodes, s.worlds, s.requests = state.sims, state.episodes, state.worlds, state.requests
    s.prefixes, s.arrivals, s.output_tokens, s.due = state.prefixes, state.arrivals, state.output_tokens, state.due
    s.waiting, s.running, s.knobs, s.memory = state.waiting, state.running, state.knobs, state.memory
    s.batches, s.items, s.preempt, s.refuse = state.batches, state.items, state.preempt, state.refuse
    s.scratch, s.keys, s.resolved, s.noise = state.scratch, state.keys, state.resolved, state.noise
    s.gaps, s.steps = state.gaps, state.steps
    s.blocks, s.flights, s.flying = state.blocks, state.flights, state.flying
    s.linear_s, s.coef_s, s.own_linear_s, s.own_coef_s = (
        state.linear_s,
        state.coef_s,
        state.own_linear_s,
        state.own_coef_s,
    )
    return s


@kernel(inline="always")
def unpack(s):
    """The state behind a handle, once per call: each array taken from a handle counts its references atomically."""
    return State(
        s.sims,
        s.episodes,
        s.worlds,
        s.requests,
        s.prefixes,
        s.arrivals,
        s.output_tokens,
        s.due,
        s.waiting,
        s.running,
        s.knobs,
        s.memory,
        s.batches,
        s.items,
        s.preempt,
        s.refuse,
        s.scratch,
        s.keys,
        s.resolved,
        s.noise,
        s.linear_s,
        s.coef_s,
        s.own_linear_s,
        s.own_coef_s,
        s.gaps,
        s.steps,
        s.blocks,
        s.flights,
        s.flying,
    )


def make_handle(state: State) -> Any:
    """What kernels take for `state`; without compilation the state itself."""
    return _make_handle(state) if JIT_ENABLED else state


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


def _row_blocks(scenario: Scenario, num_kv_blocks: int) -> int:
    """Most blocks of a request."""
    return min(num_kv_blocks, blocks_needed(scenario.max_model_len, scenario.block_size))


def _records(scenario: Scenario, replica: Replica) -> int:
    return num_records(replica.num_kv_blocks, replica.max_num_seqs, _row_blocks(scenario, replica.num_kv_blocks))


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


def load_table(
    state: State,
    env: int,
    table: RequestTable,
    scenario: Scenario,
    replicas: Sequence[Replica],
    *,
    record_gaps: bool = False,
) -> None:
    """Put environment `env` at time 0 before the requests of `table`; a table larger than the arrays is an error."""
    n = len(table)
    if n > state.requests.shape[1]:
        raise ValueError(f"table: expected at most {state.requests.shape[1]} requests, got {n}")
    state.requests[env, :n] = TO_COME
    state.prefixes[env, :n] = NOTHING_SHARED
    arrivals = state.arrivals[env]
    for name in TABLE_COLUMNS:
        arrivals[name][:n] = getattr(table, name)
    for name, column in zip(IDENTITY_COLUMNS, table.identity(), strict=True):
        arrivals[name][:n] = column
    arrivals["gap_start"][:n] = table.gap_start
    state.output_tokens[env, :n] = table.output_tokens
    turns: tuple[Any, ...] = ROOT if table.parent is None else _turns(table)
    for name, values in zip(TURN_COLUMNS, turns, strict=True):
        arrivals[name][:n] = values
    arrivals["is_cancelled"][:n] = 0
    arrivals["max_output_tokens"][:n] = MOST if table.max_output_tokens is None else table.max_output_tokens
    _load_episode(state, env, table, scenario, record_gaps)
    for k, replica in enumerate(replicas, env * len(replicas)):
        load_replica(state, k, scenario, replica)
        state.episodes[env].largest_request = max(state.episodes[env].largest_request, state.sims[k].largest_request)


def _turns(table: RequestTable) -> tuple[np.ndarray, ...]:
    """TURN_COLUMNS of a table with sessions; each of shape (num_requests,)."""
    parent, n = table.parent, len(table)
    turn, first, following = np.zeros(n, np.int32), np.full(n, NONE, np.int32), np.full(n, NONE, np.int32)
    assert parent is not None
    for r in range(n - 1, -1, -1):  # from the last, so that each parent's first turn is linked first
        if parent[r] >= 0:
            following[r] = first[parent[r]]
            first[parent[r]] = r
    for r in np.flatnonzero(parent >= 0).tolist():
        turn[r] = turn[parent[r]] + 1
    return parent, np.zeros(n) if table.think_s is None else table.think_s, turn, first, following


def _load_episode(state: State, env: int, table: RequestTable, scenario: Scenario, record_gaps: bool) -> None:
    n = len(table)
    state.episodes[env] = np.zeros((), EPISODE)
    episode, world = state.episodes[env], state.worlds[env]
    episode.patience_s = scenario.patience_s
    episode.strict_tbt_slo_s = scenario.strict_tbt_slo_s
    world.cost_scale = table.cost_scale
    world.num_requests = world.table_size = n
    world.next_arrival = world.num_past = table.num_past
    world.has_turns = table.parent is not None
    world.num_due = world.num_followed = world.num_cancelled = 0
    world.next_arrival_s = table.arrival_s[table.num_past] if n > table.num_past else math.inf
    world.records_gaps = record_gaps
    world.cohort_start, world.cohort_stop = table.cohort_start, table.cohort_stop
    world.num_unresolved = table.cohort_stop - table.cohort_start
    world.drain_all = scenario.num_requests is not None
    if scenario.num_requests is None:
        world.stop_s = scenario.horizon_s
    else:
        world.stop_s = table.last_root_s + table.longest_session_s + scenario.drain_s


def load_replica(state: State, k: int, scenario: Scenario, replica: Replica) -> None:
    """Put lane `k` at time 0: nobody is there, nothing is cached."""
    state.sims[k] = np.zeros((), REPLICA)
    sim, num_kv_blocks = state.sims[k], replica.num_kv_blocks
    sim.profile = replica.profile
    sim.block_size, sim.block_bits = scenario.block_size, scenario.block_size.bit_length() - 1
    sim.total_blocks = sim.free_blocks = num_kv_blocks
    sim.watermark_blocks = int(scenario.watermark * num_kv_blocks)
    sim.max_model_len = scenario.max_model_len
    sim.max_num_seqs = replica.max_num_seqs
    sim.max_num_batched_tokens = scenario.max_num_batched_tokens
    sim.admission = ADMISSIONS.index(scenario.admission)
    sim.allow_refusal = scenario.allow_refusal
    sim.prefix_caching = scenario.prefix_caching
    sim.async_lag = scenario.async_lag
    if scenario.prefix_caching:
        sim.blocks_version = 1  # 0 is that of requests that have not been looked up
        sim.table_mask = table_size(num_kv_blocks) - 1
        sim.row_blocks = _row_blocks(scenario, num_kv_blocks)
        load_blocks(state.blocks[k], num_kv_blocks, int(sim.max_num_seqs), int(sim.row_blocks))
    sim.idle_step_s = scenario.idle_step_s
    sim.next_departure_s = sim.next_expiry_s = math.inf
    empty_line(sim)
    sim.cost_ratio = 1.0
    sim.largest_request = min(sim.max_model_len, int(sim.total_blocks - sim.watermark_blocks) * int(sim.block_size))
    state.memory[k] = 0.0
    state.batches[k] = np.zeros((), BATCH)
    state.flights[k] = np.zeros((), FLIGHT)


def append_request(state: State, env: int, request: Request, arrival_s: float) -> int:
    """Write a request behind those that environment `env` has; returns its index. It is still to enter."""
    world, arrivals, outputs = state.worlds[env], state.arrivals[env], state.output_tokens[env]
    r = int(world.num_requests)
    state.requests[env, r] = TO_COME
    state.prefixes[env, r : r + 1] = NOTHING_SHARED
    for name in (*TABLE_COLUMNS, *IDENTITY_COLUMNS):
        arrivals[name][r] = getattr(request, name)
    for name, value in zip(TURN_COLUMNS, ROOT, strict=True):
        arrivals[name][r] = value
    arrivals["is_cancelled"][r] = 0
    arrivals["max_output_tokens"][r] = MOST
    arrivals[r].arrival_s = arrival_s
    arrivals[r].gap_start = arrivals[r - 1].gap_start + outputs[r - 1] - 1 if r > 0 else 0
    outputs[r] = request.output_tokens
    world.num_requests += 1
    if world.cohort_stop == r:
        world.cohort_stop += 1
        world.num_unresolved += 1
    return r


def phases_of(state: State, env: int, count: int) -> np.ndarray:
    """Phases of the first `count` requests, CANCELLED for turns that will never come; int8 of shape (count,)."""
    cancelled = state.arrivals[env]["is_cancelled"][:count] != 0
    return np.where(cancelled, np.int8(CANCELLED), state.requests[env]["phase"][:count])


def rows_of(state: State, env: int, table: RequestTable) -> np.ndarray:
    """Copies of the records of the requests of `table`, those to come included; shape (num_requests,) REQUEST."""
    rows = state.requests[env, : len(table)].copy()
    to_come = rows["phase"] == PENDING
    for name in TABLE_COLUMNS:
        rows[name][to_come] = getattr(table, name)[to_come]
    rows["prefill_tokens"][to_come] = rows["prompt_tokens"][to_come]
    rows["phase"] = phases_of(state, env, len(table))
    return rows
