"""A request's life: arrival, admission, preemption, refusal, the end of patience; and the clock that drives it."""

from __future__ import annotations

import math

from llmsched_gym.config import BLOCK_SIZE
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.records import ABANDONED, REFUSED, REJECTED, RUNNING, WAITING


@kernel()
def _remove(array, count, value):
    """Take `value` out of ``array[:count]``, keeping the order."""
    for i in range(count):
        if array[i] == value:
            for j in range(i, count - 1):
                array[j] = array[j + 1]
            return


@kernel()
def leave_waiting(lane, r):
    _remove(lane.waiting, lane.sim.num_waiting, r)
    lane.sim.num_waiting -= 1
    lane.sim.waiting_tokens -= lane.requests[r].prefill_tokens


@kernel()
def leave_running(lane, r):
    _remove(lane.running, lane.sim.num_running, r)
    lane.sim.num_running -= 1
    lane.sim.free_blocks += lane.requests[r].num_blocks
    lane.requests[r].num_blocks = 0


@kernel()
def resolve(lane, world, r, phase, now_s):
    lane.requests[r].phase = phase
    lane.requests[r].resolved_s = now_s
    lane.resolved[lane.sim.num_resolved] = r
    lane.sim.num_resolved += 1
    if world.cohort_start <= r < world.cohort_stop:
        world.num_unresolved -= 1


@kernel()
def arrive(lane, world, output_tokens):
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
            resolve(lane, world, r, REJECTED, request.arrival_s)
            continue
        request.phase = WAITING
        lane.waiting[sim.num_waiting] = r
        sim.num_waiting += 1
        sim.waiting_tokens += request.prefill_tokens
        departure_s = request.arrival_s + request.ttft_slo_s + sim.patience_s
        sim.next_departure_s = min(sim.next_departure_s, departure_s)


@kernel()
def admit(lane, r):
    sim = lane.sim
    leave_waiting(lane, r)
    request = lane.requests[r]
    request.phase = RUNNING
    lane.running[sim.num_running] = r
    sim.num_running += 1
    if math.isnan(request.first_scheduled_s):
        request.first_scheduled_s = sim.clock_s


@kernel()
def preempt(lane, r):
    """Free the blocks of running `r` and put it at the head of waiting; its KV is to be computed again (rule 5)."""
    sim, request = lane.sim, lane.requests[r]
    leave_running(lane, r)
    request.phase = WAITING
    request.num_computed_tokens = 0
    request.num_cached_tokens = 0
    request.prefill_tokens = request.prompt_tokens + request.num_output_tokens
    request.num_preemptions += 1
    sim.num_preemptions += 1
    if sim.tokens_emitted != sim.preempted_at_token:
        sim.vain_preemptions = 0
    sim.preempted_at_token = sim.tokens_emitted
    sim.vain_preemptions += 1
    for i in range(sim.num_waiting, 0, -1):
        lane.waiting[i] = lane.waiting[i - 1]
    lane.waiting[0] = r
    sim.num_waiting += 1
    sim.waiting_tokens += request.prefill_tokens


@kernel()
def refuse(lane, world, r):
    leave_waiting(lane, r)
    lane.sim.num_refused += 1
    resolve(lane, world, r, REFUSED, lane.sim.clock_s)


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
        leave_running(lane, r)
    else:
        leave_waiting(lane, r)
    request.lateness_s = sim.patience_s
    sim.num_abandoned += 1
    resolve(lane, world, r, ABANDONED, sim.clock_s)


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
def move_clock(lane, world, output_tokens, now_s):
    """Set the clock; clients leave and come."""
    sim = lane.sim
    elapsed_s = now_s - sim.clock_s
    sim.clock_s = now_s
    before, tokens_before = sim.num_arrived, sim.arrived_tokens
    arrive(lane, world, output_tokens)
    _depart(lane, world)  # after it: who came early in a long batch may have left again
    keep_10s, keep_60s = math.exp(-elapsed_s / 10.0), math.exp(-elapsed_s / 60.0)
    arrivals, tokens = sim.num_arrived - before, sim.arrived_tokens - tokens_before
    sim.arrivals_10s = sim.arrivals_10s * keep_10s + arrivals / 10.0
    sim.arrivals_60s = sim.arrivals_60s * keep_60s + arrivals / 60.0
    sim.arrived_tokens_10s = sim.arrived_tokens_10s * keep_10s + tokens / 10.0
    sim.arrived_tokens_60s = sim.arrived_tokens_60s * keep_60s + tokens / 60.0
