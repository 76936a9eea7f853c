"""One step of the engine: apply the batch, commit its tokens, or idle past an empty one."""

from __future__ import annotations

import math

from llmsched_gym.engine.batch import clear_sums, is_prefill, predicted_s
from llmsched_gym.engine.blocks import allocate, blocks_to_take, give_back, shares_uncomputed, stays_within
from llmsched_gym.engine.due import decode_due_s, kth_due_s, open_lateness_s
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.lifecycle import (
    admit,
    leave_running,
    preempt,
    refuse,
    resolve,
)
from llmsched_gym.engine.records import FINISHED, NONE, RUNNING, WAITING
from llmsched_gym.engine.surface import recount

VICTIMS = ("latest-arrival", "latest-lst", "authors")
LATEST_ARRIVAL, LATEST_LST, AUTHORS = range(3)
NO_GAPS = -1
COST_RATIO_STEP = 0.05  # weight of the newest batch in the moving average of measured over predicted time


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
                due_s = decode_due_s(request)
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
    recount(batch, lane.items, lane.requests, lane.coef_s)


@kernel()
def _drop_sharers(lane, victim):
    """Take out of the batch, and preempt or let wait, who has found blocks that an evicted one will not compute."""
    for i in range(lane.batch.num_items):
        r = lane.items[i].request
        if r == victim or lane.requests[r].num_scheduled_tokens <= 0 or not shares_uncomputed(lane, victim, r):
            continue
        _drop_item(lane, r)
        if lane.requests[r].phase == RUNNING:
            preempt(lane, r)
        else:
            give_back(lane, r)


@kernel()
def _leave_out_cached(lane, i):
    """Item `i`, a prompt planned from its first token on, begins behind those that it has found cached."""
    batch, item = lane.batch, lane.items[i]
    request = lane.requests[item.request]
    computed, n = request.num_computed_tokens, request.num_scheduled_tokens
    left = min(n, request.prefill_tokens - computed)
    batch.num_tokens += left - n
    batch.kv_tokens += computed + left - n
    batch.pairs += left * (computed + (left + 1) * 0.5) - n * (n + 1) * 0.5
    item.tokens = request.num_scheduled_tokens = left
    recount(batch, lane.items, lane.requests, lane.coef_s)


@kernel()
def apply_batch(lane, world):
    """Preempt, refuse, admit and take blocks; where a running request finds none, evict until it does."""
    sim, batch, requests = lane.sim, lane.batch, lane.requests
    for i in range(batch.num_preempt):
        requests[lane.preempt[i]].num_scheduled_tokens = 0
        preempt(lane, lane.preempt[i])
    for i in range(batch.num_refuse):
        requests[lane.refuse[i]].num_scheduled_tokens = 0
        refuse(lane, world, lane.refuse[i])
    for i in range(batch.num_items):
        r = lane.items[i].request
        request = requests[r]
        n = request.num_scheduled_tokens
        if n <= 0:
            continue  # evicted for an earlier item
        if request.phase == WAITING:
            admit(lane, r)
        elif stays_within(sim, request, n):
            continue
        need = blocks_to_take(lane, r, n)
        for _ in range(sim.max_num_seqs):
            if need <= sim.free_blocks:
                break
            victim = _victim(lane, r)
            _drop_item(lane, victim)
            if sim.prefix_caching:
                _drop_sharers(lane, victim)
            preempt(lane, victim)
            if request.num_scheduled_tokens <= 0:
                break
            if sim.prefix_caching:
                need = blocks_to_take(lane, r, n)
        if request.num_scheduled_tokens > 0 and sim.prefix_caching:
            is_planned = lane.prefixes[r].row == NONE  # by a scheduler in Python; kernels have taken blocks already
            allocate(lane, r, n)
            if is_planned and request.num_computed_tokens > 0:
                _leave_out_cached(lane, i)
        elif request.num_scheduled_tokens > 0:
            request.num_blocks += need
            sim.free_blocks -= need


@kernel(inline="always")
def emit(sim, patience_s, request, gaps, gap_start, end_s):
    """Hand one token to the request's client at `end_s`; False if its patience ran out before.

    Takes records instead of the lane: this is the innermost loop, and a lane is 700 bytes.
    """
    late_s = open_lateness_s(request, end_s)
    if request.lateness_s + late_s >= patience_s:
        sim.next_departure_s = min(sim.next_departure_s, end_s)  # depart lets the client go at the end of this step
        return False
    request.lateness_s += late_s
    k = request.num_output_tokens
    if k == 0:
        request.first_token_s = end_s
        request.ttft_missed = late_s > 0.0
        # a token well ahead of the TTFT SLO brings the client's next deadline forward
        sim.next_departure_s = min(sim.next_departure_s, end_s + request.tbt_slo_s + patience_s - late_s)
    else:
        gap_s = end_s - request.last_token_s
        request.max_gap_s = max(request.max_gap_s, gap_s)
        request.num_late_gaps += late_s > 0.0
        if gap_start >= 0:
            gaps[gap_start + k - 1] = gap_s
    request.deadline_miss_s = max(request.deadline_miss_s, end_s - kth_due_s(request, k))
    request.last_token_s = end_s
    request.lst_s = math.nan
    request.num_output_tokens = k + 1
    return True


@kernel(inline="always")
def count_finished(sim, request):
    """Take a finished request into the replica's sums."""
    sim.num_finished += 1
    sim.output_length_sum += request.num_output_tokens


@kernel()
def _finish(lane, world, r, end_s):
    leave_running(lane, r)
    count_finished(lane.sim, lane.requests[r])
    resolve(lane, world, r, FINISHED, end_s)


@kernel(inline="always")
def count_batch(sim, num_tokens, num_decodes, expected_s, duration_s):
    """Take a batch of `duration_s`, expected to take `expected_s`, into the replica's means; returns its end."""
    end_s = sim.clock_s + duration_s
    sim.num_batches += 1
    sim.num_idle_steps = 0
    # as a clock would measure it, rounding included: the authors' mean to the last bit
    sim.mean_batch_s += (end_s - sim.clock_s - sim.mean_batch_s) / sim.num_batches
    sim.last_batch_s = duration_s
    sim.last_predicted_s = expected_s
    sim.last_batch_tokens = num_tokens
    sim.last_batch_decodes = num_decodes
    sim.batch_tokens_sum += num_tokens
    sim.busy_s += duration_s
    return end_s


@kernel(inline="always")
def compare_cost(sim):
    """Take what the last batch took beside what was expected of it into their mean ratio."""
    if sim.last_predicted_s > 0.0:
        sim.cost_ratio += COST_RATIO_STEP * (sim.last_batch_s / sim.last_predicted_s - sim.cost_ratio)


@kernel(inline="always")
def count_usage(sim):
    """Note what share of the blocks is held, with those of the batch that is to run."""
    sim.kv_cache_usage = (sim.total_blocks - sim.free_blocks) / sim.total_blocks
    sim.kv_cache_usage_max = max(sim.kv_cache_usage_max, sim.kv_cache_usage)


@kernel()
def commit(lane, world, output_tokens, gaps, arrivals, duration_s):
    """Book the tokens of an applied, non-empty batch that took `duration_s`; returns when it ended.

    The clock is left to :func:`~llmsched_gym.engine.lifecycle.pass_time`.
    """
    sim, batch, requests = lane.sim, lane.batch, lane.requests
    patience_s, records_gaps = lane.episode.patience_s, world.records_gaps
    expected_s = batch.price_s if batch.price_s >= 0.0 else predicted_s(lane)
    end_s = count_batch(sim, batch.num_tokens, batch.num_decodes, expected_s, duration_s)
    count_usage(sim)
    for i in range(batch.num_items):
        r = lane.items[i].request
        request = requests[r]
        n = request.num_scheduled_tokens
        if n <= 0:
            continue
        request.num_scheduled_tokens = 0
        request.num_computed_tokens += n
        gap_start = arrivals[r].gap_start if records_gaps else NO_GAPS
        if not is_prefill(request) and emit(sim, patience_s, request, gaps, gap_start, end_s):
            sim.tokens_emitted += 1
            if request.num_output_tokens == output_tokens[r]:
                _finish(lane, world, r, end_s)
    batch.is_marked = 0
    compare_cost(sim)  # behind the loop: a division that nothing waits for
    return end_s


@kernel()
def clear_batch(lane):
    """An empty batch; also forgets the marks of one that was never run."""
    batch = lane.batch
    if batch.is_marked:
        for i in range(batch.num_items):
            lane.requests[lane.items[i].request].num_scheduled_tokens = 0
            if lane.sim.prefix_caching:
                give_back(lane, lane.items[i].request)
        for i in range(batch.num_preempt):
            r = lane.preempt[i]
            lane.requests[r].num_scheduled_tokens = 0
            if lane.requests[r].phase == RUNNING and lane.sim.prefix_caching and lane.prefixes[r].row == NONE:
                preempt(lane, r)  # its blocks are gone
        for i in range(batch.num_refuse):
            lane.requests[lane.refuse[i]].num_scheduled_tokens = 0
        batch.is_marked = 0
    batch.num_items = 0
    batch.num_tokens = 0
    batch.num_decodes = 0
    batch.num_preempt = 0
    batch.num_refuse = 0
    clear_sums(batch)


@kernel()
def idle(lane, world):
    """Book an empty batch; returns its end: the next arrival, or an idle step on while work is pending (rule 8).

    Where neither is to come the clock stands still.
    """
    sim = lane.sim
    clear_batch(lane)
    target_s = world.next_arrival_s
    if sim.num_waiting + sim.num_running > 0:
        target_s = min(target_s, sim.clock_s + sim.idle_step_s)
        sim.num_idle_steps += 1
    target_s = min(target_s, world.stop_s)
    return max(sim.clock_s, target_s) if target_s < math.inf else sim.clock_s


@kernel()
def is_over(lane, world):
    """Whether the run has ended: its cohort is resolved (finite runs) or its time is up."""
    if lane.sim.clock_s >= world.stop_s:
        return True
    return world.drain_all != 0 and world.num_unresolved == 0


@kernel()
def has_work(lane):
    """Whether any request of the lane waits or runs."""
    return lane.sim.num_waiting + lane.sim.num_running > 0
