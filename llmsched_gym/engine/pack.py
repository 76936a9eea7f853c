"""The packing kernel: order, offset, cap and budget -> batch.

Sarathi-Serve, the SLAI family, srpt-capped, feasible-first and the ``knobs`` action are settings of it. Long, as it is
one procedure: each function is a stage or a key of it, and every setting concerns several.
"""

from __future__ import annotations

import math

from llmsched_gym.engine.batch import (
    add_chunk,
    add_decode,
    add_decodes,
    batch_s,
    can_admit,
    chunk_room,
    decode_fits,
    insert_sorted,
    is_free,
    is_prefill,
    open_batch,
    refuse,
    smallest_tbt_slo_s,
    uncached_prefill,
)
from llmsched_gym.engine.blocks import known_computed
from llmsched_gym.engine.due import decode_due_s, next_due_s
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.predict import can_make_ttft
from llmsched_gym.engine.queue import is_shorter, shortest_expired
from llmsched_gym.engine.records import NONE, RUNNING, WAITING
from llmsched_gym.engine.surface import has_surface, with_decodes_s

ORDERS = ("fcfs", "spf", "class", "srpt", "edf", "feasible", "lpm")
FCFS, SPF, CLASS, SRPT, EDF, FEASIBLE, LPM = range(len(ORDERS))
"""Orders of prompts. Without prefix caching the longest cached prefix (LPM) is nobody's, and it is FCFS."""
HOLDS = ("false", "true", "always")
"""Whether prompts that cannot make their TTFT SLO any more wait: never; for those that can; for decodes as well.

The last holds for prompts above the limit too.
"""
HOLD_ALWAYS = 2
_LATER = 1e12  # added to a key: behind everything without it


@kernel()
def _is_preemptive(order):
    """Whether a waiting prompt may overtake a started one between two chunks."""
    return SRPT <= order <= FEASIBLE


@kernel()
def _urgency(lane, r, margin_s):
    """The time from which decode `r` is critical."""
    request = lane.requests[r]
    if math.isnan(margin_s):
        return request.lst_s
    return decode_due_s(request) - margin_s


@kernel()
def _is_critical(lane, r, margin_s):
    if math.isnan(margin_s):
        return lane.sim.clock_s >= lane.requests[r].lst_s
    return _urgency(lane, r, margin_s) < lane.sim.clock_s


@kernel()
def _sort_by_urgency(lane, count, margin_s):
    """Sort ``lane.scratch[:count]`` by urgency, ties by request index."""
    for i in range(count):
        r = lane.scratch[i]
        insert_sorted(lane, i, r, _urgency(lane, r, margin_s))


@kernel()
def _lead_s(lane):
    """How long before its deadline a token emitted in the last batch becomes critical: offset * mean batch time."""
    sim, knobs = lane.sim, lane.knobs
    offset = knobs.offset if sim.kv_cache_usage < knobs.usage_switch else knobs.offset_full
    return offset * sim.mean_batch_s if offset < math.inf else math.inf


@kernel()
def add_critical_decodes(lane, margin_s):
    """Add the critical decodes in order of urgency while tokens last; takes stock of the running list on its way.

    Every decode of the last batch is given its last schedulable time here, once (arXiv 2508.01002, SLAI).
    """
    sim, batch, requests = lane.sim, lane.batch, lane.requests
    lead_s = _lead_s(lane)
    # A batch is a set: the order matters only where not everybody may get in.
    everybody_fits = sim.num_running <= batch.token_room and sim.num_running <= batch.free_blocks
    now_s = sim.clock_s
    by_lst = math.isnan(margin_s)
    first_started, started, deferred, critical = -1, 0, 0, 0
    for i in range(sim.num_running):
        r = lane.running[i]
        request = requests[r]
        if request.num_computed_tokens < request.prefill_tokens:
            first_started = r if started == 0 else first_started
            started += 1
            continue
        due_s = decode_due_s(request)
        if math.isnan(request.lst_s):
            request.lst_s = due_s - lead_s
        if now_s >= request.lst_s if by_lst else due_s - margin_s < now_s:
            lane.scratch[critical] = r
            critical += 1
        else:
            deferred += 1
    batch.first_started, batch.num_started, batch.num_deferred = first_started, started, deferred
    if not everybody_fits:
        _sort_by_urgency(lane, critical, margin_s)
    add_decodes(lane, min(critical, batch.token_room))


@kernel()
def _all_fit(lane, count):
    """Whether the decodes ``lane.scratch[:count]`` fit in whatever order they come: then none needs to be found."""
    batch = lane.batch
    if count > batch.token_room or count > batch.free_blocks:
        return False
    if batch.cap_s == math.inf:
        return True
    return _all_within_cap(batch, lane.scratch, lane.requests, lane.linear_s, lane.coef_s, count)


@kernel()
def _all_within_cap(batch, scratch, requests, linear_s, coef_s, count):
    context = longest = 0
    most_s = 0.0  # of the linear layers: a staircase may fall, so the largest on the way
    for i in range(count):
        tokens = requests[scratch[i]].num_computed_tokens + 1
        context += tokens
        longest = max(longest, tokens)
        most_s = max(most_s, linear_s[batch.num_tokens + 1 + i])
    if not has_surface(coef_s):
        return most_s + coef_s[0] * batch.pairs + coef_s[1] * (batch.kv_tokens + context) <= batch.cap_s
    if count == 0:
        return True
    fall_s = most_s - linear_s[batch.num_tokens + count]
    full_s = with_decodes_s(batch, linear_s, coef_s, count, float(context), float(longest))
    return full_s + fall_s <= batch.cap_s


@kernel()
def add_deferred_decodes(lane, margin_s):
    """Add the other decodes in order of urgency while tokens and time last."""
    batch = lane.batch
    if batch.num_deferred == 0 or batch.token_room <= 0:
        return
    if has_surface(lane.coef_s):
        least_s = with_decodes_s(batch, lane.linear_s, lane.coef_s, 1, 0.0, 0.0)
    else:
        least_s = batch_s(lane.linear_s, lane.coef_s, batch.num_tokens + 1, batch.pairs, batch.kv_tokens)
    if least_s > batch.cap_s:
        return  # prompts have filled the batch: not even a decode without a context fits
    count = 0
    for i in range(lane.sim.num_running):
        r = lane.running[i]
        request = lane.requests[r]
        if not is_prefill(request) and request.num_scheduled_tokens == 0 and not _is_critical(lane, r, margin_s):
            lane.scratch[count] = r
            count += 1
    if _all_fit(lane, count):
        add_decodes(lane, count)
        return
    _sort_by_urgency(lane, count, margin_s)
    for i in range(count):
        if not decode_fits(lane, lane.scratch[i]):
            break
        add_decode(lane, lane.scratch[i])


@kernel()
def add_all_decodes(lane):
    """Add every decode while tokens last, by admission."""
    count = 0
    for i in range(lane.sim.num_running):
        r = lane.running[i]
        request = lane.requests[r]
        if not is_prefill(request) and request.num_scheduled_tokens == 0:
            lane.scratch[count] = r
            count += 1
    add_decodes(lane, min(count, lane.batch.token_room))


@kernel()
def _key_if_feasible(lane, r, order):
    """Sort key of a prompt that can make its TTFT SLO."""
    request = lane.requests[r]
    if order == FCFS:
        return 0.0
    if order == CLASS:
        return uncached_prefill(lane, r) + (0.0 if request.slo_class == 0 else _LATER)
    if order == EDF:
        return next_due_s(request)
    if order == LPM:
        return -float(known_computed(lane, r))
    return float(uncached_prefill(lane, r))  # SPF, SRPT, FEASIBLE


@kernel()
def _key(lane, r, order):
    """Sort key of a prompt; the smallest goes first, ties by index."""
    key = _key_if_feasible(lane, r, order)
    if order == FEASIBLE and not can_make_ttft(lane, r):
        key += _LATER
    return key


@kernel()
def _any_feasible(lane):
    for i in range(lane.sim.num_running):
        r = lane.running[i]
        if is_prefill(lane.requests[r]) and can_make_ttft(lane, r):
            return True
    r = lane.sim.first_open
    for _ in range(lane.sim.num_waiting + 1):
        if r == NONE:
            break
        if lane.requests[r].num_scheduled_tokens == 0 and can_make_ttft(lane, r):
            return True
        r = lane.requests[r].later
    return False


@kernel()
def _any_decode(lane):
    for i in range(lane.sim.num_running):  # noqa: SIM110 - a kernel
        if not is_prefill(lane.requests[lane.running[i]]):
            return True
    return False


@kernel()
def _any_within_limit(lane):
    r = lane.sim.first_open
    for _ in range(lane.sim.num_waiting + 1):
        if r == NONE:
            break
        request = lane.requests[r]
        if request.num_scheduled_tokens == 0 and uncached_prefill(lane, r) <= lane.batch.limit:
            return True
        r = request.later
    return _next_expired(lane, SPF, True) >= 0


@kernel()
def next_started(lane, order, hold):
    """The running prompt to continue, -1 if there is none: the first admitted, or the best key if preemptive."""
    batch = lane.batch
    if batch.num_started == 0:
        return -1
    if batch.num_started == 1 or (batch.num_started > 0 and not _is_preemptive(order) and not hold):
        r = batch.first_started
        if lane.requests[r].num_scheduled_tokens == 0:
            return -1 if hold and not can_make_ttft(lane, r) else r
        if batch.num_started == 1:
            return -1
    best = -1
    best_key = math.inf
    for i in range(lane.sim.num_running):
        r = lane.running[i]
        request = lane.requests[r]
        if not is_prefill(request) or request.num_scheduled_tokens != 0:
            continue
        if hold and not can_make_ttft(lane, r):
            continue
        if not _is_preemptive(order):
            return r
        key = _key(lane, r, order)
        if best < 0 or key < best_key or (key == best_key and r < best):
            best, best_key = r, key
    return best


@kernel()
def next_waiting(lane, order, hold, limit):
    """The waiting prompt at the head of the line under `order`, -1 if there is none."""
    if order == LPM and not lane.sim.prefix_caching:
        order = FCFS
    if order == FCFS and not hold:
        for i in range(lane.sim.num_waiting):
            r = lane.waiting[i]
            if is_free(lane, r) and not (limit and uncached_prefill(lane, r) > lane.batch.limit):
                return r
        return -1
    best = -1
    best_key = math.inf
    following = lane.sim.first_open
    for _ in range(lane.sim.num_waiting + 1):
        if following == NONE:
            break
        r, request = following, lane.requests[following]
        following = request.later
        if request.num_scheduled_tokens != 0 or (limit and uncached_prefill(lane, r) > lane.batch.limit):
            continue
        # predictions take time: only of those who would go first if they can make it
        key = _key_if_feasible(lane, r, order)
        if best >= 0 and (key > best_key or (key == best_key and r > best)):
            continue
        if (hold or order == FEASIBLE) and not can_make_ttft(lane, r):
            if hold:
                continue
            key += _LATER
        if order == FCFS:
            return r
        if best < 0 or key < best_key or (key == best_key and r < best):
            best, best_key = r, key
    late = -1 if hold else _next_expired(lane, order, limit)
    if late >= 0 and best >= 0:
        key = _key(lane, late, order)
        return late if key < best_key or (key == best_key and late < best) else best
    return max(best, late)


@kernel()
def _shortest_expired(lane, strict, limit):
    """The shortest expired prompt of a class that is not in the batch yet, -1 if there is none or it is too long."""
    r = shortest_expired(lane, strict, NONE)
    for _ in range(lane.sim.num_waiting + 1):
        if r == NONE or lane.requests[r].num_scheduled_tokens == 0:
            break
        r = shortest_expired(lane, strict, r)
    return -1 if r != NONE and limit and lane.requests[r].prefill_tokens > lane.batch.limit else r


@kernel()
def _next_expired(lane, order, limit):
    """The first of the expired prompts under `order`, -1 if there is none; all but FCFS."""
    if order == EDF:
        r = lane.sim.first_expired
        for _ in range(lane.sim.num_waiting + 1):
            if r == NONE:
                break
            request = lane.requests[r]
            if request.num_scheduled_tokens == 0 and not (limit and request.prefill_tokens > lane.batch.limit):
                return r
            r = request.later
        return -1
    # hopeless as they are and with nothing computed, all of them go by length under every other order
    strict = _shortest_expired(lane, True, limit)
    if strict >= 0 and order == CLASS:
        return strict
    other = _shortest_expired(lane, False, limit)
    if strict >= 0 and other >= 0:
        return strict if is_shorter(lane.requests, strict, other) else other
    return max(strict, other)


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
    batch = lane.batch
    busy = batch.hold == HOLD_ALWAYS and _any_decode(lane)
    hold = batch.hold != 0 and (busy or _any_feasible(lane))
    limit = batch.limit < lane.sim.max_model_len and (busy or _any_within_limit(lane))
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
        if admitting and (started < 0 or _is_preemptive(order)):
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


@kernel(inline="always")
def add_prompts_by(lane, next_prompt):
    """Give prompts the room that is left, in the order of a kernel ``next_prompt(lane, admitting, hold, limit)``.

    It returns who goes first of those not in the batch, started or, if `admitting`, waiting; -1 for none. A prompt that
    finds no blocks keeps the others out.
    """
    sim, batch = lane.sim, lane.batch
    hold, limit = admission_filters(lane)
    admitting = sim.num_waiting > 0
    for _ in range(2 * sim.max_num_seqs):
        if batch.token_room <= 0:
            break
        r = next_prompt(lane, admitting and sim.num_running + batch.num_admitted < sim.max_num_seqs, hold, limit)
        n = chunk_room(lane, r) if r >= 0 else 0
        if n <= 0:
            break
        if lane.requests[r].phase == WAITING and not can_admit(lane, r, n):
            admitting = False
            continue
        add_chunk(lane, r, n)


@kernel()
def keep_going(lane):
    """Call it last: no batch stays empty while there is work, whatever is held back, limited or above the cap.

    What an empty batch waits for need not ever come: a prompt that is held back may hold the blocks that the head of
    the line needs. So the most urgent decode runs, else a started prompt, else the first that waits; with a cap below
    every batch, one token of it.
    """
    sim, batch, requests = lane.sim, lane.batch, lane.requests
    if batch.num_items > 0 or batch.num_preempt > 0:
        return
    decode, prompt = -1, -1
    earliest_s = math.inf
    for i in range(sim.num_running):
        r = lane.running[i]
        if is_prefill(requests[r]):
            prompt = r if prompt < 0 else prompt
        elif decode < 0 or decode_due_s(requests[r]) < earliest_s:
            decode, earliest_s = r, decode_due_s(requests[r])
    if decode >= 0:
        add_decode(lane, decode)
        return
    for i in range(sim.num_waiting):
        if prompt >= 0:
            break
        if requests[lane.waiting[i]].num_scheduled_tokens == 0:
            prompt = lane.waiting[i]
    n = max(1, chunk_room(lane, prompt)) if prompt >= 0 else 0
    if n > 0 and (requests[prompt].phase == RUNNING or can_admit(lane, prompt, n)):
        add_chunk(lane, prompt, n)


@kernel()
def margin_in_s(lane):
    """How long before its deadline a decode is critical, in seconds; nan: by its last schedulable time."""
    cap, margin = lane.knobs.cap, lane.batch.margin
    if math.isnan(margin):
        return math.nan
    return margin * cap * smallest_tbt_slo_s(lane) if cap < math.inf else math.inf


@kernel()
def fill(lane):
    """Critical decodes, started prompts, admissions, the other decodes: into an open batch, by its settings."""
    knobs, batch = lane.knobs, lane.batch
    margin_s = margin_in_s(lane)
    add_critical_decodes(lane, margin_s)
    if knobs.refuse and lane.sim.allow_refusal:
        refuse_hopeless(lane)
    add_prompts(lane, batch.order)
    add_deferred_decodes(lane, margin_s)
    if batch.num_items == 0:  # asked here as well: in the hot path the call alone costs 2 %
        keep_going(lane)


@kernel()
def pack(lane):
    """A batch by the knobs."""
    open_batch(lane)
    fill(lane)
