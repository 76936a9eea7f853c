"""Whole steps and runs in compiled code, and their halves for batches that are formed or executed outside.

Kernels that take the whole state, 1.5 kB by value, are inlined into the loop that calls them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llmsched_gym.engine.batch import batch_s
from llmsched_gym.engine.handles import unpack
from llmsched_gym.engine.jit import JIT_ENABLED, entry, kernel
from llmsched_gym.engine.lag import foresee, forget_foreseen, land, settle, take_off
from llmsched_gym.engine.lifecycle import average, deliver, enter, let_in, lose_patience, pass_time, remember
from llmsched_gym.engine.queue import expire
from llmsched_gym.engine.state import (
    HANDLE_TYPE,
    SCHEDULE_SIGNATURE,
    SCHEDULE_TYPE,
    env_of,
    episode_of,
    lane_of,
)
from llmsched_gym.engine.step import apply_batch, clear_batch, commit, count_usage, has_work, idle, is_over
from llmsched_gym.engine.surface import ID, has_surface, predicted_s, recount


@kernel(inline="always")
def execute_s(s, k, lane, world):
    """Duration of the applied batch on the simulated device (rule 13)."""
    batch, profile = lane.batch, lane.sim.profile
    linear_s, coef_s = s.linear_s[profile], s.coef_s[profile]
    if has_surface(coef_s):
        own_coef_s = s.own_coef_s[profile]
        if own_coef_s[ID] != coef_s[ID]:
            recount(batch, lane.items, lane.requests, coef_s)  # the chunks have the scheduler's own prices
            seconds = predicted_s(batch, linear_s, coef_s)
            recount(batch, lane.items, lane.requests, own_coef_s)
        else:
            seconds = batch.price_s = predicted_s(batch, linear_s, coef_s)
    else:
        seconds = batch_s(linear_s, coef_s, batch.num_tokens, batch.pairs, batch.kv_tokens)
    noise = s.noise[k]  # two blocks; the caller refills one while the other is in use
    return seconds * world.cost_scale * noise[(lane.sim.num_batches + lane.sim.in_flight) % noise.shape[0]]


@kernel(inline="always")
def noise_due(s, k):
    """Whether the batch just done was the last of its noise block."""
    size = s.noise.shape[1]
    return size > 1 and s.sims[k].num_batches % (size // 2) == 0


@kernel()
def log_step(s, k, lane, start_s, duration_s):
    """Write the batch that has just been booked into the lane's log, as long as there is room."""
    i = lane.sim.num_batches - 1
    if i < s.steps.shape[1]:
        step = s.steps[k, i]
        step.start_s = start_s
        step.duration_s = duration_s
        step.predicted_s = lane.sim.last_predicted_s
        step.kv_cache_usage = s.flights[k].kv_cache_usage if lane.sim.async_lag else lane.sim.kv_cache_usage
        step.decode_tokens = lane.sim.last_batch_decodes
        step.prefill_tokens = lane.sim.last_batch_tokens - lane.sim.last_batch_decodes
        step.num_running = lane.sim.num_running
        step.num_waiting = lane.sim.num_waiting


@kernel(inline="always")
def book(s, k, lane, world, duration_s):
    """Commit the applied batch, or idle if it is empty, and let time pass; returns whether a batch ran."""
    env = env_of(s, k)
    arrivals, output_tokens = s.arrivals[env], s.output_tokens[env]
    start_s, ran = lane.sim.clock_s, lane.batch.num_tokens > 0
    if ran:
        end_s = commit(lane, world, output_tokens, s.gaps[env], arrivals, duration_s + lane.sim.decision_s)
    else:
        end_s = idle(lane, world)
    pass_time(lane, world, arrivals, output_tokens, s.due[env], end_s)
    if ran and s.steps.shape[1] > 0:
        log_step(s, k, lane, start_s, duration_s)
    return ran


@kernel(inline="always")
def see_flight(s, k, lane):
    """Before a decision: let schedulers see the batch in flight as if it had landed, if there is one."""
    if lane.sim.async_lag:
        foresee(lane, s.flights[k], s.flying[k])


@kernel()
def apply_lagging(s, k, lane, world):
    """:func:`~llmsched_gym.engine.step.apply_batch` while another batch is in flight."""
    settle(lane, s.flights[k], s.flying[k])
    apply_batch(lane, world)
    if lane.batch.num_tokens > 0:
        count_usage(lane.sim)


@kernel()
def book_lagging(s, k, lane, world, duration_s):
    """Let the batch in flight land and time pass, then the applied one take off; returns whether one has landed."""
    env, flight, flying = env_of(s, k), s.flights[k], s.flying[k]
    sim, arrivals, output_tokens = lane.sim, s.arrivals[env], s.output_tokens[env]
    start_s, landed, follows = sim.clock_s, sim.in_flight != 0, lane.batch.num_tokens > 0
    if landed:
        # the decision ran beside the batch; the tokens are looked at when both are over
        took_s = max(flight.duration_s, sim.decision_s)
        end_s = land(lane, world, flight, flying, output_tokens, s.gaps[env], arrivals, took_s)
        pass_time(lane, world, arrivals, output_tokens, s.due[env], end_s)
        if s.steps.shape[1] > 0:
            log_step(s, k, lane, start_s, flight.duration_s)
    elif not follows:
        end_s = idle(lane, world)
        pass_time(lane, world, arrivals, output_tokens, s.due[env], end_s)
    if follows:
        take_off(lane, flight, flying, duration_s if landed else duration_s + sim.decision_s)
        if not landed:
            expire(lane)  # as no time has passed: who was let in and preempted at once stands in line again
    else:
        clear_batch(lane)
    return landed


@kernel(inline="always")
def advance(s, k, lane):
    """Run the scheduled batch on the simulated device: the part of a step behind the decision."""
    world = s.worlds[env_of(s, k)]
    if lane.sim.async_lag:
        apply_lagging(s, k, lane, world)
        return book_lagging(s, k, lane, world, execute_s(s, k, lane, world))
    apply_batch(lane, world)
    return book(s, k, lane, world, execute_s(s, k, lane, world))


@entry()
def start(s, k):
    """Fill the cache with what is past, and let the requests of time 0 in."""
    state = unpack(s)
    lane, of = lane_of(state, k), episode_of(state, env_of(state, k))
    if lane.sim.prefix_caching:
        remember(lane, of, 0, 1)
    let_in(lane, of, 0.0)
    lane.sim.new_arrivals = lane.sim.new_tokens = 0  # who is there from the start tells nothing of the rate


@entry()
def enter_env(s, k, r):
    """Let request `r`, which is not of the table, in now and deliver it to lane `k`."""
    state = unpack(s)
    lane, of = lane_of(state, k), episode_of(state, env_of(state, k))
    if enter(of, r):
        deliver(lane, r)
        lose_patience(lane, of, lane.sim.clock_s)  # it may have arrived long ago
    average(lane.sim, 0.0)


@kernel()
def apply_formed(s, k, lane):
    """Apply the batch that was formed for lane `k`, with or without another one under way."""
    if lane.sim.async_lag:
        apply_lagging(s, k, lane, s.worlds[env_of(s, k)])
    else:
        apply_batch(lane, s.worlds[env_of(s, k)])


@entry()
def apply_env(s, k):
    """First half of a step whose batch was formed outside compiled code; returns the tokens that are to run."""
    state = unpack(s)
    lane = lane_of(state, k)
    apply_formed(state, k, lane)
    return lane.batch.num_tokens


@entry()
def execute_env(s, k):
    """Duration of the applied batch on the simulated device."""
    state = unpack(s)
    return execute_s(state, k, lane_of(state, k), state.worlds[env_of(state, k)])


@entry()
def commit_env(s, k, duration_s):
    """Second half of a step: `duration_s` is what the batch took; an empty one idles. Returns whether a batch ran."""
    state = unpack(s)
    if state.sims[k].async_lag:
        return book_lagging(state, k, lane_of(state, k), state.worlds[env_of(state, k)], duration_s)
    return book(state, k, lane_of(state, k), state.worlds[env_of(state, k)], duration_s)


@entry()
def is_over_env(s, k):
    """Whether the run of lane `k` has ended, for Python."""
    state = unpack(s)
    return is_over(lane_of(state, k), state.worlds[env_of(state, k)])


@entry()
def clear_batch_env(s, k):
    """Empty the batch of lane `k`, for Python."""
    clear_batch(lane_of(unpack(s), k))


@entry()
def schedule_env(s, k, schedule):
    """Let a compiled scheduler form the next batch."""
    state = unpack(s)
    lane = lane_of(state, k)
    clear_batch(lane)
    if has_work(lane):
        see_flight(state, k, lane)
        schedule(lane)


@entry()
def see_flight_env(s, k):
    """:func:`see_flight` of lane `k`, for Python."""
    state = unpack(s)
    see_flight(state, k, lane_of(state, k))


@entry()
def forget_flight_env(s, k):
    """Undo :func:`see_flight` of lane `k`, for Python: no batch has come of it."""
    state = unpack(s)
    forget_foreseen(lane_of(state, k), state.flights[k], state.flying[k])


def _code_at(context: Any, address: Any) -> Any:
    """For numba: the compiled scheduler whose code begins at `address`."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function: Any = cgutils.create_struct_proxy(SCHEDULE_TYPE)(context, builder)
        function.jit_addr = builder.inttoptr(args[0], cgutils.voidptr_t)
        return function._getvalue()

    return SCHEDULE_TYPE(types.intp), build


_scheduler_at: Any = intrinsic(_code_at) if JIT_ENABLED else lambda schedule: schedule


@cache
def address_of(schedule: Any) -> Any:
    """Where the code of a compiled scheduler begins, which costs nothing to hand over; itself without compilation."""
    if not JIT_ENABLED:
        return schedule
    done = schedule.get_compile_result(SCHEDULE_SIGNATURE)
    return done.library.get_pointer_to_function(done.fndesc.llvm_func_name)


@entry()
def schedule_at(s, k, address):
    """:func:`schedule_env` for Python, with the scheduler's :func:`address_of`."""
    schedule_env(s, k, _scheduler_at(address))


@kernel(inline="always")
def run_lane(s, k, schedule, max_steps, max_idle_steps):
    """:func:`run` on an unpacked state, for kernels to inline: the one loop of whole runs, whoever decides."""
    lane, world = lane_of(s, k), s.worlds[env_of(s, k)]
    for i in range(max_steps):
        if is_over(lane, world) or lane.sim.num_idle_steps > max_idle_steps:
            return i
        clear_batch(lane)
        if has_work(lane):
            see_flight(s, k, lane)
            schedule(lane)
        if advance(s, k, lane) and noise_due(s, k):
            return i + 1
    return max_steps


@kernel()
def _run(s, k, schedule, max_steps, max_idle_steps):
    return run_lane(s, k, schedule, max_steps, max_idle_steps)


@entry()
def run(s, k, schedule, max_steps, max_idle_steps):
    """Step until the run is over, `max_steps` are done, a noise block is used up or nothing moves any more.

    Returns the number of steps done. An idle engine skips the scheduler and jumps to the next arrival.
    """
    return _run(unpack(s), k, schedule, max_steps, max_idle_steps)


_POINTER_SIGNATURES = {"run": types.int64(HANDLE_TYPE, types.int64, SCHEDULE_TYPE, types.int64, types.int64)}


@cache
def with_scheduler(name: str) -> Any:
    """The kernel `run`, compiled once for schedulers as function pointers.

    Left to itself numba compiles it for each scheduler, and no later process finds that in the cache.
    """
    function = globals()[name]
    if JIT_ENABLED:
        function.compile(_POINTER_SIGNATURES[name])
        function.disable_compile()
    return function
