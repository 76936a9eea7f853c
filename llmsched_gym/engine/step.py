"""One step of the engine: apply the batch, execute it, commit its tokens, move the clock, let clients come and go."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from numba import types

from llmsched_gym.config import BLOCK_SIZE
from llmsched_gym.engine.batch import batch_s, blocks_to_hold, is_prefill
from llmsched_gym.engine.jit import JIT_ENABLED, entry, kernel
from llmsched_gym.engine.state import (
    ABANDONED,
    FINISHED,
    HANDLE_TYPE,
    REFUSED,
    REJECTED,
    RUNNING,
    SCHEDULE_TYPE,
    WAITING,
    lane_of,
)

VICTIMS = ("latest-arrival", "latest-lst", "authors")
LATEST_ARRIVAL, LATEST_LST, AUTHORS = range(3)
COST_RATIO_STEP = 0.05  # weight of the newest batch in the moving average of measured over predicted time


# --- lists -----------------------------------------------------------------------------------------------------------


@kernel()
def _remove(array, count, value):
    """Take `value` out of ``array[:count]``, keeping the order."""
    for i in range(count):
        if array[i] == value:
            for j in range(i, count - 1):
                array[j] = array[j + 1]
            return


@kernel()
def _leave_waiting(lane, r):
    _remove(lane.waiting, lane.sim.num_waiting, r)
    lane.sim.num_waiting -= 1
    lane.sim.waiting_tokens -= lane.requests[r].prefill_tokens


@kernel()
def _leave_running(lane, r):
    _remove(lane.running, lane.sim.num_running, r)
    lane.sim.num_running -= 1
    lane.sim.free_blocks += lane.requests[r].num_blocks
    lane.requests[r].num_blocks = 0


# --- a request's life ------------------------------------------------------------------------------------------------


@kernel()
def _resolve(lane, world, r, phase, now_s):
    lane.requests[r].phase = phase
    lane.requests[r].resolved_s = now_s
    lane.resolved[lane.sim.num_resolved] = r
    lane.sim.num_resolved += 1
    if world.cohort_start <= r < world.cohort_stop:
        world.num_unresolved -= 1


@kernel()
def _arrive(lane, world, output_tokens):
    """Let everybody in whose arrival has come; reject what can never fit (rule 7)."""
    sim, requests = lane.sim, lane.requests
    for r in range(sim.num_arrived, world.num_requests):
        request = requests[r]
        if request.arrival_s > sim.clock_s:
            break
        sim.num_arrived += 1
        sim.arrived_tokens += request.prompt_tokens
        total = request.prompt_tokens + output_tokens[r]
        blocks = (total + BLOCK_SIZE - 1) // BLOCK_SIZE
        if total > sim.max_model_len or blocks + sim.watermark_blocks > sim.total_blocks:
            sim.num_rejected += 1
            _resolve(lane, world, r, REJECTED, request.arrival_s)
            continue
        request.phase = WAITING
        lane.waiting[sim.num_waiting] = r
        sim.num_waiting += 1
        sim.waiting_tokens += request.prefill_tokens
        departure_s = request.arrival_s + request.ttft_slo_s + sim.patience_s
        sim.next_departure_s = min(sim.next_departure_s, departure_s)


@kernel()
def _admit(lane, r):
    sim = lane.sim
    _leave_waiting(lane, r)
    request = lane.requests[r]
    request.phase = RUNNING
    lane.running[sim.num_running] = r
    sim.num_running += 1
    if math.isnan(request.first_scheduled_s):
        request.first_scheduled_s = sim.clock_s


@kernel()
def _preempt(lane, r):
    """Free the blocks of running `r` and put it at the head of waiting; its KV is to be computed again (rule 5)."""
    sim, request = lane.sim, lane.requests[r]
    _leave_running(lane, r)
    request.phase = WAITING
    request.num_computed_tokens = 0
    request.num_cached_tokens = 0
    request.prefill_tokens = request.prompt_tokens + request.num_output_tokens
    request.num_preemptions += 1
    sim.num_preemptions += 1
    for i in range(sim.num_waiting, 0, -1):
        lane.waiting[i] = lane.waiting[i - 1]
    lane.waiting[0] = r
    sim.num_waiting += 1
    sim.waiting_tokens += request.prefill_tokens


@kernel()
def _refuse(lane, world, r):
    _leave_waiting(lane, r)
    lane.sim.num_refused += 1
    _resolve(lane, world, r, REFUSED, lane.sim.clock_s)


@kernel()
def open_lateness_s(request, now_s):
    """Late seconds of the wait that is open at `now_s`: for the first token, or for the next (rule 12)."""
    if request.num_output_tokens == 0:
        return max(0.0, now_s - request.arrival_s - request.ttft_slo_s)
    return max(0.0, now_s - request.last_token_s - request.tbt_slo_s)


@kernel()
def _abandon(lane, world, r):
    """The client of `r` has lost patience: free what it holds."""
    sim, request = lane.sim, lane.requests[r]
    if request.phase == RUNNING:
        _leave_running(lane, r)
    else:
        _leave_waiting(lane, r)
    request.lateness_s = sim.patience_s
    sim.num_abandoned += 1
    _resolve(lane, world, r, ABANDONED, sim.clock_s)


@kernel()
def _depart(lane, world):
    """Let everybody leave whose patience is over; skipped while nobody's can be."""
    sim, requests = lane.sim, lane.requests
    if sim.clock_s < sim.next_departure_s:
        return
    earliest = math.inf
    for running in range(2):
        i = 0
        for _ in range(sim.num_running + sim.num_waiting):
            if i >= (sim.num_running if running else sim.num_waiting):
                break
            r = lane.running[i] if running else lane.waiting[i]
            request = requests[r]
            if request.lateness_s + open_lateness_s(request, sim.clock_s) >= sim.patience_s:
                _abandon(lane, world, r)
                continue
            i += 1
            if request.num_output_tokens == 0:
                due_s = request.arrival_s + request.ttft_slo_s
            else:
                due_s = request.last_token_s + request.tbt_slo_s
            earliest = min(earliest, due_s + sim.patience_s - request.lateness_s)
    sim.next_departure_s = earliest


@kernel()
def _move_clock(lane, world, output_tokens, now_s):
    """Set the clock; clients leave and come."""
    sim = lane.sim
    elapsed_s = now_s - sim.clock_s
    sim.clock_s = now_s
    before, tokens_before = sim.num_arrived, sim.arrived_tokens
    _arrive(lane, world, output_tokens)
    _depart(lane, world)  # after it: who came early in a long batch may have left again
    keep_10s, keep_60s = math.exp(-elapsed_s / 10.0), math.exp(-elapsed_s / 60.0)
    arrivals, tokens = sim.num_arrived - before, sim.arrived_tokens - tokens_before
    sim.arrivals_10s = sim.arrivals_10s * keep_10s + arrivals / 10.0
    sim.arrivals_60s = sim.arrivals_60s * keep_60s + arrivals / 60.0
    sim.arrived_tokens_10s = sim.arrived_tokens_10s * keep_10s + tokens / 10.0
    sim.arrived_tokens_60s = sim.arrived_tokens_60s * keep_60s + tokens / 60.0


# --- the batch -------------------------------------------------------------------------------------------------------


@kernel()
def _victim(lane, current):
    """Whom to evict when `current` finds no block (rule 5). See VICTIMS and docs/schedulers.md."""
    rule = lane.knobs.victim
    best = -1
    best_key, best_due_s = -math.inf, -math.inf
    for i in range(lane.sim.num_running):
        r = lane.running[i]
        request = lane.requests[r]
        key, due_s = request.arrival_s, 0.0
        if rule == AUTHORS and not is_prefill(request):
            continue
        if rule == LATEST_LST:
            # a started prompt has no deadline between tokens: it is the least urgent
            key = math.inf
            if not is_prefill(request):
                # where nobody is deferred no decode has an LST, or all have -inf: then the deadline decides
                key = -math.inf if math.isnan(request.lst_s) else request.lst_s
                due_s = request.last_token_s + request.tbt_slo_s
        if best >= 0 and key == best_key:
            if due_s < best_due_s or (due_s == best_due_s and r < best):
                continue
        elif key < best_key:
            continue
        best, best_key, best_due_s = r, key, due_s
    return best if best >= 0 else current


@kernel()
def _drop_item(lane, r):
    """Take an evicted request out of the batch again."""
    batch, request = lane.batch, lane.requests[r]
    n = request.num_scheduled_tokens
    if n <= 0:
        return
    request.num_scheduled_tokens = 0
    batch.num_tokens -= n
    batch.kv_tokens -= request.num_computed_tokens + n
    if is_prefill(request):
        batch.pairs -= n * (request.num_computed_tokens + (n + 1) * 0.5)
    else:
        batch.num_decodes -= 1


@kernel()
def apply_batch(lane, world):
    """Preempt, refuse, admit and take blocks; where a running request finds none, evict until it does."""
    sim, batch, requests = lane.sim, lane.batch, lane.requests
    for i in range(batch.num_preempt):
        requests[lane.preempt[i]].num_scheduled_tokens = 0
        _preempt(lane, lane.preempt[i])
    for i in range(batch.num_refuse):
        requests[lane.refuse[i]].num_scheduled_tokens = 0
        _refuse(lane, world, lane.refuse[i])
    for i in range(batch.num_items):
        r = lane.items[i].request
        request = requests[r]
        n = request.num_scheduled_tokens
        if n <= 0:
            continue  # evicted for an earlier item
        if request.phase == WAITING:
            _admit(lane, r)
        elif request.num_computed_tokens + n <= request.num_blocks * BLOCK_SIZE:
            continue
        need = blocks_to_hold(sim, request, n) - request.num_blocks
        for _ in range(sim.max_num_seqs):
            if need <= sim.free_blocks:
                break
            victim = _victim(lane, r)
            _drop_item(lane, victim)
            _preempt(lane, victim)
            if victim == r:
                break
        if request.num_scheduled_tokens > 0:
            request.num_blocks += need
            sim.free_blocks -= need


@kernel()
def _emit(sim, request, gaps, end_s):
    """Hand one token to the request's client at `end_s`; False if its patience ran out before.

    Takes records instead of the lane: this is the innermost loop, and a lane is 700 bytes.
    """
    late_s = open_lateness_s(request, end_s)
    if request.lateness_s + late_s >= sim.patience_s:
        sim.next_departure_s = min(sim.next_departure_s, end_s)  # _depart lets the client go at the end of this step
        return False
    request.lateness_s += late_s
    k = request.num_output_tokens
    if k == 0:
        request.first_token_s = end_s
        request.ttft_missed = end_s - request.arrival_s > request.ttft_slo_s
        # a token well ahead of the TTFT SLO brings the client's next deadline forward
        sim.next_departure_s = min(sim.next_departure_s, end_s + request.tbt_slo_s + sim.patience_s - late_s)
    else:
        gap_s = end_s - request.last_token_s
        request.max_gap_s = max(request.max_gap_s, gap_s)
        request.num_late_gaps += gap_s > request.tbt_slo_s
        if request.gap_start >= 0:
            gaps[request.gap_start + k - 1] = gap_s
    due_s = request.arrival_s + request.ttft_slo_s + k * request.tbt_slo_s
    request.deadline_miss_s = max(request.deadline_miss_s, end_s - due_s)
    request.last_token_s = end_s
    request.lst_s = math.nan
    request.num_output_tokens = k + 1
    return True


@kernel()
def _finish(lane, world, r, end_s):
    sim = lane.sim
    _leave_running(lane, r)
    sim.num_finished += 1
    sim.output_length_sum += lane.requests[r].num_output_tokens
    _resolve(lane, world, r, FINISHED, end_s)


@kernel()
def commit(lane, world, output_tokens, gaps, duration_s):
    """Book an applied, non-empty batch that took `duration_s` and everything that happened meanwhile."""
    sim, batch, requests = lane.sim, lane.batch, lane.requests
    end_s = sim.clock_s + duration_s
    sim.num_batches += 1
    sim.num_idle_steps = 0
    # as a clock would measure it, rounding included: the authors' mean to the last bit
    sim.mean_batch_s += (end_s - sim.clock_s - sim.mean_batch_s) / sim.num_batches
    sim.last_batch_s = duration_s
    sim.last_predicted_s = batch_s(lane.linear_s, lane.coef_s, batch.num_tokens, batch.pairs, batch.kv_tokens)
    sim.last_batch_tokens = batch.num_tokens
    sim.last_batch_decodes = batch.num_decodes
    sim.batch_tokens_sum += batch.num_tokens
    sim.busy_s += duration_s
    sim.kv_cache_usage = (sim.total_blocks - sim.free_blocks) / sim.total_blocks
    sim.kv_cache_usage_max = max(sim.kv_cache_usage_max, sim.kv_cache_usage)
    for i in range(batch.num_items):
        r = lane.items[i].request
        request = requests[r]
        n = request.num_scheduled_tokens
        if n <= 0:
            continue
        request.num_scheduled_tokens = 0
        request.num_computed_tokens += n
        if not is_prefill(request) and _emit(sim, request, gaps, end_s):
            sim.tokens_emitted += 1
            if request.num_output_tokens == output_tokens[r]:
                _finish(lane, world, r, end_s)
    batch.is_marked = 0
    if sim.last_predicted_s > 0.0:
        sim.cost_ratio += COST_RATIO_STEP * (duration_s / sim.last_predicted_s - sim.cost_ratio)
    _move_clock(lane, world, output_tokens, end_s)


@kernel()
def clear_batch(lane):
    """An empty batch; also forgets the marks of one that was never run."""
    batch = lane.batch
    if batch.is_marked:
        for i in range(batch.num_items):
            lane.requests[lane.items[i].request].num_scheduled_tokens = 0
        for i in range(batch.num_preempt):
            lane.requests[lane.preempt[i]].num_scheduled_tokens = 0
        for i in range(batch.num_refuse):
            lane.requests[lane.refuse[i]].num_scheduled_tokens = 0
        batch.is_marked = 0
    batch.num_items = 0
    batch.num_tokens = 0
    batch.num_decodes = 0
    batch.num_preempt = 0
    batch.num_refuse = 0
    batch.pairs = 0.0
    batch.kv_tokens = 0.0


@kernel()
def idle(lane, world, output_tokens):
    """Move the clock past an empty batch: to the next arrival, or one idle step while work is pending (rule 8)."""
    sim = lane.sim
    clear_batch(lane)
    target_s = math.inf
    if sim.num_arrived < world.num_requests:
        target_s = lane.requests[sim.num_arrived].arrival_s
    if sim.num_waiting + sim.num_running > 0:
        target_s = min(target_s, sim.clock_s + sim.idle_step_s)
        sim.num_idle_steps += 1
    target_s = min(target_s, world.stop_s)
    if target_s == math.inf:
        return
    _move_clock(lane, world, output_tokens, max(sim.clock_s, target_s))


@kernel()
def is_over(lane, world):
    """Whether the run has ended: its cohort is resolved (finite runs) or its time is up."""
    if lane.sim.clock_s >= world.stop_s:
        return True
    return world.drain_all != 0 and world.num_unresolved == 0


@kernel()
def has_work(lane):
    return lane.sim.num_waiting + lane.sim.num_running > 0


@entry()
def execute_s(s, env, lane, world):
    """Duration of the applied batch on the simulated device (rule 13)."""
    batch = lane.batch
    seconds = batch_s(s.linear_s, s.coef_s, batch.num_tokens, batch.pairs, batch.kv_tokens)
    noise = s.noise[env]  # two blocks; the caller refills one while the other is in use
    return seconds * world.cost_scale * noise[lane.sim.num_batches % noise.shape[0]]


@entry()
def noise_due(s, env):
    """Whether the batch just done was the last of its noise block."""
    size = s.noise.shape[1]
    return size > 1 and s.sims[env].num_batches % (size // 2) == 0


@entry()
def log_step(s, env, lane, start_s, duration_s):
    k = lane.sim.num_batches - 1
    if k < s.steps.shape[1]:
        step = s.steps[env, k]
        step.start_s = start_s
        step.duration_s = duration_s
        step.predicted_s = lane.sim.last_predicted_s
        step.kv_cache_usage = lane.sim.kv_cache_usage
        step.decode_tokens = lane.batch.num_decodes
        step.prefill_tokens = lane.batch.num_tokens - lane.batch.num_decodes
        step.num_running = lane.sim.num_running
        step.num_waiting = lane.sim.num_waiting


@entry()
def book(s, env, lane, duration_s):
    """Commit the applied batch, or idle if it is empty; returns whether a batch ran."""
    world, output_tokens = s.worlds[env], s.output_tokens[env]
    if lane.batch.num_tokens == 0:
        idle(lane, world, output_tokens)
        return False
    start_s = lane.sim.clock_s
    commit(lane, world, output_tokens, s.gaps[env], duration_s + lane.sim.decision_s)
    if s.steps.shape[1] > 0:
        log_step(s, env, lane, start_s, duration_s)
    return True


@entry()
def advance(s, env, lane):
    """Run the scheduled batch on the simulated device: the part of a step behind the decision."""
    world = s.worlds[env]
    apply_batch(lane, world)
    return book(s, env, lane, execute_s(s, env, lane, world))


@entry()
def start(s, env):
    """Let the requests of time 0 in."""
    lane = lane_of(s, env)
    _arrive(lane, s.worlds[env], s.output_tokens[env])


@entry()
def apply_env(s, env):
    """First half of a step whose batch was formed outside compiled code; returns the tokens that are to run."""
    lane = lane_of(s, env)
    apply_batch(lane, s.worlds[env])
    return lane.batch.num_tokens


@entry()
def execute_env(s, env):
    """Duration of the applied batch on the simulated device."""
    return execute_s(s, env, lane_of(s, env), s.worlds[env])


@entry()
def commit_env(s, env, duration_s):
    """Second half of a step: `duration_s` is what the batch took; an empty one idles. Returns whether a batch ran."""
    return book(s, env, lane_of(s, env), duration_s)


@entry()
def is_over_env(s, env):
    return is_over(lane_of(s, env), s.worlds[env])


@entry()
def clear_batch_env(s, env):
    clear_batch(lane_of(s, env))


@entry()
def schedule_env(s, env, schedule):
    """Let a compiled scheduler form the next batch."""
    lane = lane_of(s, env)
    clear_batch(lane)
    if has_work(lane):
        schedule(lane)


@entry()
def run(s, env, schedule, max_steps, max_idle_steps):
    """Step until the run is over, `max_steps` are done, a noise block is used up or nothing moves any more.

    Returns the number of steps done. An idle engine skips the scheduler and jumps to the next arrival.
    """
    lane = lane_of(s, env)
    world = s.worlds[env]
    for i in range(max_steps):
        if is_over(lane, world) or lane.sim.num_idle_steps > max_idle_steps:
            return i
        clear_batch(lane)
        if has_work(lane):
            schedule(lane)
        if advance(s, env, lane) and noise_due(s, env):
            return i + 1
    return max_steps


_POINTER_SIGNATURES = {
    "schedule_env": types.void(HANDLE_TYPE, types.int64, SCHEDULE_TYPE),
    "run": types.int64(HANDLE_TYPE, types.int64, SCHEDULE_TYPE, types.int64, types.int64),
}


@cache
def with_scheduler(name: str) -> Any:
    """The kernel `run` or `schedule_env`, compiled once for schedulers as function pointers.

    Left to itself numba compiles it for each scheduler, and no later process finds that in the cache.
    """
    function = globals()[name]
    if JIT_ENABLED:
        function.compile(_POINTER_SIGNATURES[name])
        function.disable_compile()
    return function
