"""The engine's state: structured arrays over the request table, one row of arrays per environment.

Columns are read as ``state.requests["num_computed_tokens"]`` (shape (num_envs, capacity)); kernels read one record at
a time as ``lane.requests[r].num_computed_tokens``. Storing a request's fields side by side keeps a batch of 30
scattered requests in 30 places of memory instead of 600.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.experimental import structref
from numba.np.numpy_support import from_dtype

from llmsched_gym.config import ADMISSIONS, Scenario
from llmsched_gym.cost import Profile
from llmsched_gym.engine.jit import JIT_ENABLED, entry, kernel
from llmsched_gym.engine.records import BATCH, CACHE_LINE, ITEM, KNOBS, REQUEST, SIM, STEP, WORLD
from llmsched_gym.workload import RequestTable

MEMORY_SIZE = 8
MIN_SCRATCH = 64  # an environment sorts its visible slots there


class State(NamedTuple):
    """All arrays of a batch of environments (leading axis) on one engine."""

    sims: Any  # (num_envs,) SIM
    worlds: Any  # (num_envs,) WORLD
    requests: Any  # (num_envs, capacity) REQUEST
    output_tokens: Any  # (num_envs, capacity) int32, hidden
    waiting: Any  # (num_envs, capacity) int32; by arrival, preempted ones at the head
    running: Any  # (num_envs, max_num_seqs) int32; by admission
    knobs: Any  # (num_envs,) KNOBS
    memory: Any  # (num_envs, MEMORY_SIZE) float64, a scheduler's own
    batches: Any  # (num_envs,) BATCH
    items: Any  # (num_envs, max_num_seqs) ITEM
    preempt: Any  # (num_envs, max_num_seqs) int32
    refuse: Any  # (num_envs, capacity) int32
    scratch: Any  # (num_envs, max_num_seqs or MIN_SCRATCH) int32
    keys: Any  # (num_envs, max_num_seqs) float64, sort keys of scratch
    resolved: Any  # (num_envs, capacity) int32, requests in the order they were resolved
    noise: Any  # (num_envs, 1 or NOISE_BLOCK) float64, factors on batch times
    linear_s: Any  # (max_num_batched_tokens + 1,) float64, the executing profile
    coef_s: Any  # (5 or more,) float64, see Profile.coefficients
    own_linear_s: Any  # the scheduler's profile
    own_coef_s: Any
    gaps: Any  # (num_envs, num_gaps) float32, recorded gaps between tokens
    steps: Any  # (num_envs, log_size) STEP


class Lane(NamedTuple):
    """One environment's slice of the state, as schedulers get it: nothing in it is hidden from them by rule 6."""

    sim: Any
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


_F8, _I4 = types.float64, types.int32
_STATE_FIELDS = {
    "sims": (SIM, 1),
    "worlds": (WORLD, 1),
    "requests": (REQUEST, 2),
    "output_tokens": (_I4, 2),
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
    "linear_s": (_F8, 1),
    "coef_s": (_F8, 1),
    "own_linear_s": (_F8, 1),
    "own_coef_s": (_F8, 1),
    "gaps": (types.float32, 2),
    "steps": (STEP, 2),
}


def _numba_type(dtype: Any) -> Any:
    return from_dtype(dtype) if isinstance(dtype, np.dtype) else dtype


def _array_type(field: str, drop: int = 0) -> Any:
    dtype, ndim = _STATE_FIELDS[field]
    return types.Array(_numba_type(dtype), ndim - drop, "C") if ndim > drop else _numba_type(dtype)


STATE_TYPE = types.NamedTuple([_array_type(name) for name in State._fields], State)
_LANE_SOURCES = ["sims", "requests", "waiting", "running", "knobs", "memory", "batches", "items"]
_LANE_SOURCES += ["preempt", "refuse", "scratch", "keys", "resolved"]
LANE_TYPE = types.NamedTuple(
    [_array_type(name, drop=1) for name in _LANE_SOURCES] + [_array_type("own_linear_s"), _array_type("own_coef_s")],
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
    s.sims, s.worlds, s.requests, s.output_tokens = state.sims, state.worlds, state.requests, state.output_tokens
    s.waiting, s.running, s.knobs, s.memory = state.waiting, state.running, state.knobs, state.memory
    s.batches, s.items, s.preempt, s.refuse = state.batches, state.items, state.preempt, state.refuse
    s.scratch, s.keys, s.resolved, s.noise = state.scratch, state.keys, state.resolved, state.noise
    s.gaps, s.steps = state.gaps, state.steps
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
        s.worlds,
        s.requests,
        s.output_tokens,
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
    )


def make_handle(state: State) -> Any:
    """What kernels take for `state`; without compilation the state itself."""
    return _make_handle(state) if JIT_ENABLED else state


@kernel(inline="always")  # a compiled function cannot return records
def lane_of(s, env):
    """The slice of one environment, without what schedulers must not see."""
    return Lane(
        s.sims[env],
        s.requests[env],
        s.waiting[env],
        s.running[env],
        s.knobs[env],
        s.memory[env],
        s.batches[env],
        s.items[env],
        s.preempt[env],
        s.refuse[env],
        s.scratch[env],
        s.keys[env],
        s.resolved[env],
        s.own_linear_s,
        s.own_coef_s,
    )


def aligned_zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros that start at a cache line: a request's record is then read with as few lines as it has."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % CACHE_LINE
    return raw[start : start + size].view(dtype).reshape(shape)


def allocate(
    num_envs: int,
    capacity: int,
    scenario: Scenario,
    profile: Profile,
    own_profile: Profile | None = None,
    *,
    noise_size: int = 1,
    num_gaps: int = 0,
    num_steps: int = 0,
) -> State:
    """Zeroed arrays for `num_envs` environments of up to `capacity` requests each."""
    n, seqs = num_envs, scenario.max_num_seqs or profile.device.max_num_seqs
    own = own_profile or profile
    limit = scenario.max_num_batched_tokens
    return State(
        sims=np.zeros(n, SIM),
        worlds=np.zeros(n, WORLD),
        requests=aligned_zeros((n, capacity), REQUEST),
        output_tokens=np.zeros((n, capacity), np.int32),
        waiting=np.zeros((n, capacity), np.int32),
        running=np.zeros((n, seqs), np.int32),
        knobs=np.zeros(n, KNOBS),
        memory=np.zeros((n, MEMORY_SIZE)),
        batches=np.zeros(n, BATCH),
        items=np.zeros((n, seqs), ITEM),
        preempt=np.zeros((n, seqs), np.int32),
        refuse=np.zeros((n, capacity), np.int32),
        scratch=np.zeros((n, max(seqs, MIN_SCRATCH)), np.int32),
        keys=np.zeros((n, seqs)),
        resolved=np.zeros((n, capacity), np.int32),
        noise=np.ones((n, noise_size)),
        linear_s=np.array(profile.linear_table_s(limit)),  # a copy: kernels take writeable arrays only
        coef_s=profile.coefficients(seqs),
        own_linear_s=np.array(own.linear_table_s(limit)),
        own_coef_s=own.coefficients(seqs),
        gaps=np.zeros((n, max(num_gaps, 1)), np.float32),
        steps=np.zeros((n, num_steps), STEP),
    )


def grow(state: State, capacity: int, num_gaps: int = 0) -> State:
    """The same state with room for `capacity` requests and `num_gaps` recorded gaps an environment."""
    fields = state._asdict()
    sizes = dict.fromkeys(("requests", "output_tokens", "waiting", "refuse", "resolved"), capacity) | {"gaps": num_gaps}
    for name, size in sizes.items():
        old = fields[name]
        if size > old.shape[1]:
            fields[name] = aligned_zeros((old.shape[0], size), old.dtype)
            fields[name][:, : old.shape[1]] = old
    return State(**fields)


def load_table(
    state: State, env: int, table: RequestTable, scenario: Scenario, num_kv_blocks: int, *, record_gaps: bool = False
) -> None:
    """Put environment `env` at time 0 before the requests of `table`; a table larger than the arrays is an error."""
    n = len(table)
    if n > state.requests.shape[1]:
        raise ValueError(f"table: expected at most {state.requests.shape[1]} requests, got {n}")
    requests = state.requests[env]
    requests[:n] = np.zeros((), REQUEST)
    for name in ("arrival_s", "ttft_slo_s", "tbt_slo_s", "length_hint", "session_id", "prompt_tokens", "slo_class"):
        requests[name][:n] = getattr(table, name)
    requests["prefill_tokens"][:n] = table.prompt_tokens
    for name in ("first_scheduled_s", "first_token_s", "last_token_s", "resolved_s", "lst_s"):
        requests[name][:n] = np.nan
    requests["deadline_miss_s"][:n] = -np.inf
    requests["gap_start"][:n] = -1
    if record_gaps:
        ends = np.cumsum(table.output_tokens.astype(np.int64) - 1)
        requests["gap_start"][:n] = ends - (table.output_tokens - 1)
    state.output_tokens[env, :n] = table.output_tokens

    sim = state.sims[env]
    state.sims[env] = np.zeros((), SIM)
    sim.total_blocks = sim.free_blocks = num_kv_blocks
    sim.watermark_blocks = int(scenario.watermark * num_kv_blocks)
    sim.max_model_len = scenario.max_model_len
    sim.max_num_seqs = state.running.shape[1]
    sim.max_num_batched_tokens = scenario.max_num_batched_tokens
    sim.admission = ADMISSIONS.index(scenario.admission)
    sim.allow_refusal = scenario.allow_refusal
    sim.patience_s = scenario.patience_s
    sim.idle_step_s = scenario.idle_step_s
    sim.strict_tbt_slo_s = scenario.strict_tbt_slo_s
    sim.next_departure_s = math.inf
    sim.cost_ratio = 1.0
    world = state.worlds[env]
    world.cost_scale = table.cost_scale
    world.num_requests = n
    world.cohort_start, world.cohort_stop = table.cohort_start, table.cohort_stop
    world.num_unresolved = table.cohort_stop - table.cohort_start
    world.drain_all = scenario.num_requests is not None
    if scenario.num_requests is None:
        world.stop_s = scenario.horizon_s
    else:
        world.stop_s = table.arrival_s[table.cohort_stop - 1] + scenario.drain_s
    state.memory[env] = 0.0
    state.batches[env] = np.zeros((), BATCH)
