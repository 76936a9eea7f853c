"""The packing kernel: order, offset, cap and budget -> batch.

Sarathi-Serve, the SLAI family, srpt-capped, feasible-first and the ``knobs`` action are settings of it.
"""

from __future__ import annotations

import math

from llmsched_gym.config import BLOCK_SIZE
from llmsched_gym.engine.batch import (
    add_chunk,
    add_decode,
    can_admit,
    can_make_ttft,
    chunk_room,
    decode_fits,
    is_prefill,
    open_batch,
    refuse,
    remaining_prefill,
    smallest_tbt_slo_s,
)
from llmsched_gym.engine.jit import kernel

ORDERS = ("fcfs", "spf", "class", "srpt", "edf", "feasible")
FCFS, SPF, CLASS, SRPT, EDF, FEASIBLE = range(6)
# From here on a waiting prompt may overtake a started one between two chunks.
_FIRST_PREEMPTIVE_ORDER = SRPT

_LATER = 1e12  # added to a key: behind everything without it


@kernel()
def key_emitted_tokens(lane):
    """Give every decode of the last batch its last schedulable time, once (arXiv 2508.01002, SLAI)."""
    sim, knobs = lane.sim, lane.knobs
    offset = knobs.offset if sim.kv_cache_usage < knobs.usage_switch else knobs.offset_full
    lead_s = offset * sim.mean_batch_s if offset < math.inf else math.inf
    for i in range(sim.num_running):
        request = lane.requests[lane.running[i]]
        if math.isnan(request.lst_s) and not is_prefill(request):
            request.lst_s = request.last_token_s + request.tbt_slo_s - lead_s


@kernel()
def _urgency(lane, r, margin_s):
    """The time from which decode `r` is critical."""
    request = lane.requests[r]
    if math.isnan(margin_s):
        return request.lst_s
    return request.last_token_s + request.tbt_slo_s - margin_s


@kernel()
def _is_critical(lane, r, margin_s):
    if math.isnan(margin_s):
        return lane.sim.clock_s >= lane.requests[r].lst_s
    return _urgency(lane, r, margin_s) < lane.sim.clock_s


@kernel()
def _sort_by_urgency(lane, count, margin_s):
    """Sort ``lane.scratch[:count]`` by urgency, ties by request index: insertion, for lists nearly sorted already."""
    scratch = lane.scratch
    for i in range(1, count):
        r = scratch[i]
        key = _urgency(lane, r, margin_s)
        j = i - 1
        while j >= 0:
            other = _urgency(lane, scratch[j], margin_s)
            if other < key or (other == key and scratch[j] < r):
                break
            scratch[j + 1] = scratch[j]
            j -= 1
        scratch[j + 1] = r


@kernel()
def add_decodes(lane, margin_s, critical):
    """Add the critical (or the other) decodes in order of urgency while tokens last; the cap binds the others only."""
    batch, requests = lane.batch, lane.requests
    count = 0
    new_blocks = 0
    for i in range(lane.sim.num_running):
        r = lane.running[i]
        request = requests[r]
        if is_prefill(request) or request.num_scheduled_tokens != 0:
            continue
        if _is_critical(lane, r, margin_s) == critical:
            lane.scratch[count] = r
            count += 1
            new_blocks += request.num_computed_tokens >= request.num_blocks * BLOCK_SIZE
    if count == 0 or batch.token_room <= 0:
        return
    # A batch is a set: the order matters only where not everybody gets in.
    if count > batch.token_room or new_blocks > batch.free_blocks or (not critical and batch.cap_s < math.inf):
        _sort_by_urgency(lane, count, margin_s)
    for i in range(min(count, batch.token_room)):
        r = lane.scratch[i]
        if not critical and not decode_fits(lane, r):
            break
        add_decode(lane, r)


@kernel()
def _key(lane, r, order):
    """Sort key of a prompt; the smallest goes first, ties by position."""
    request = lane.requests[r]
    if order == FCFS:
        return 0.0
    if order == SPF:
        return float(request.prefill_tokens)
    if order == CLASS:
        return request.prefill_tokens + (0.0 if request.slo_class == 0 else _LATER)
    if order == EDF:
        return request.arrival_s + request.ttft_slo_s
    key = float(remaining_prefill(request))
    if order == FEASIBLE and not can_make_ttft(lane, r):
        key += _LATER
    return key


@kernel()
def _any_feasible(lane):
    for i in range(lane.sim.num_running):
        r = lane.running[i]
        if is_prefill(lane.requests[r]) and can_make_ttft(lane, r):
            return True
    for i in range(lane.sim.num_waiting):
        r = lane.waiting[i]
        if lane.requests[r].num_scheduled_tokens == 0 and can_make_ttft(lane, r):
            return True
    return False


@kernel()
def _any_within_limit(lane):
    for i in range(lane.sim.num_waiting):
        request = lane.requests[lane.waiting[i]]
        if request.num_scheduled_tokens == 0 and request.prefill_tokens <= lane.knobs.limit:
            return True
    return False


@kernel()
def next_started(lane, order, hold):
    """The running prompt to continue, -1 if there is none: the first admitted, or the best key if preemptive."""
    best = -1
    best_key = math.inf
    for i in range(lane.sim.num_running):
        r = lane.running[i]
        request = lane.requests[r]
        if not is_prefill(request) or request.num_scheduled_tokens != 0:
            continue
        if hold and not can_make_ttft(lane, r):
            continue
        if order < _FIRST_PREEMPTIVE_ORDER:
            return r
        key = _key(lane, r, order)
        if key < best_key or (key == best_key and r < best):
            best, best_key = r, key
    return best


@kernel()
def next_waiting(lane, order, hold, limit):
    """The waiting prompt at the head of the line under `order`, -1 if there is none."""
    best = -1
    best_key = math.inf
    for i in range(lane.sim.num_waiting):
        r = lane.waiting[i]
        request = lane.requests[r]
        if request.num_scheduled_tokens != 0 or (limit and request.prefill_tokens > lane.knobs.limit):
            continue
        if hold and not can_make_ttft(lane, r):
            continue
        if order == FCFS:
            return r
        key = _key(lane, r, order)
        if key < best_key or (key == best_key and r < best):
            best, best_key = r, key
    return best


@kernel()
def refuse_hopeless(lane):
    """Refuse every waiting prompt without a token that can no longer make its TTFT SLO."""
    for i in range(lane.sim.num_waiting):
        r = lane.waiting[i]
        if lane.requests[r].num_output_tokens == 0 and not can_make_ttft(lane, r):
            refuse(lane, r)


@kernel()
def admission_filters(lane):
    """(hold, limit): whether hopeless prompts are held back now, and whether long ones are."""
    hold = lane.knobs.hold != 0 and _any_feasible(lane)
    limit = lane.knobs.limit < lane.sim.max_model_len and _any_within_limit(lane)
    return hold, limit


@kernel()
def add_prompts(lane, order):
    """Give prompts the room that is left: started ones and head-of-line admission, by `order`."""
    batch = lane.batch
    if batch.token_room <= 0:
        return
    hold, limit = admission_filters(lane)
    admitting = lane.sim.num_waiting > 0
    for _ in range(lane.sim.max_num_seqs):
        if batch.token_room <= 0:
            return
        started = next_started(lane, order, hold)
        r = started
        if admitting and (started < 0 or order >= _FIRST_PREEMPTIVE_ORDER):
            waiting = -1
            if lane.sim.num_running + batch.num_admitted < lane.sim.max_num_seqs:
                waiting = next_waiting(lane, order, hold, limit)
            if waiting < 0:
                admitting = False
            elif started < 0 or _key(lane, waiting, order) < _key(lane, started, order):
                r = waiting
        if r < 0:
            return
        n = chunk_room(lane, r)
        if n <= 0:
            return
        if r != started and not can_admit(lane, r, n):
            admitting = False  # head-of-line: nobody overtakes a prompt that finds no blocks
            continue
        add_chunk(lane, r, n)


@kernel()
def pack(lane):
    """Critical decodes, started prompts, admissions, the other decodes."""
    knobs = lane.knobs
    open_batch(lane)
    key_emitted_tokens(lane)
    margin_s = math.nan
    if not math.isnan(knobs.margin):
        margin_s = knobs.margin * knobs.cap * smallest_tbt_slo_s(lane) if knobs.cap < math.inf else math.inf
    add_decodes(lane, margin_s, True)
    if knobs.refuse and lane.sim.allow_refusal:
        refuse_hopeless(lane)
    add_prompts(lane, knobs.order)
    add_decodes(lane, margin_s, False)
