"""Hopeless prompts that age into service: the oldest first, with a share of each batch once one has waited too long.

A prompt is late here if it can no longer make its TTFT SLO, even served alone. Late ones go by arrival: shortest first
the longest would wait for ever.
"""

from __future__ import annotations

import math

from llmsched_gym.engine.batch import add_chunk, can_admit, chunk_room, is_prefill, predicted_s
from llmsched_gym.engine.blocks import blocks_to_hold, take
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.predict import can_make_ttft
from llmsched_gym.engine.records import RUNNING
from llmsched_gym.engine.surface import recount


@kernel()
def _older(lane, best, r, waited_s):
    """`r` if it is late, has waited so long, is not in the batch yet and came before `best`; else `best`."""
    request = lane.requests[r]
    if request.num_scheduled_tokens != 0 or not is_prefill(request):
        return best
    if best >= 0 and lane.requests[best].arrival_s <= request.arrival_s:
        return best
    if lane.sim.clock_s - request.arrival_s < waited_s or can_make_ttft(lane, r):
        return best
    return r


@kernel()
def oldest_late(lane, waited_s):
    """The late prompt that came first among those that have waited at least so long; -1 if there is none."""
    best = -1
    for i in range(lane.sim.num_running):
        best = _older(lane, best, lane.running[i], waited_s)
    for i in range(lane.sim.num_waiting):
        best = _older(lane, best, lane.waiting[i], waited_s)
    return best


@kernel()
def add_late(lane, waited_s, share):
    """Give late prompts that have waited so long a share (0 to 1) of the tokens and the time that are left, by age."""
    batch = lane.batch
    cap_s = batch.cap_s
    kept = int((1.0 - share) * batch.token_room)
    batch.token_room -= kept
    if kept > 0 and cap_s < math.inf:
        batch.cap_s -= (1.0 - share) * max(0.0, cap_s - predicted_s(lane))
    for _ in range(lane.sim.max_num_seqs):
        r = oldest_late(lane, waited_s) if batch.token_room > 0 else -1
        n = chunk_room(lane, r) if r >= 0 else 0
        if n <= 0 or (lane.requests[r].phase != RUNNING and not can_admit(lane, r, n)):
            break
        add_chunk(lane, r, n)
    batch.token_room += kept
    batch.cap_s = cap_s


@kernel()
def grow_chunk(lane, i):
    """Give item `i` of the batch, a chunk, the room that is left now."""
    batch, item = lane.batch, lane.items[i]
    request, n = lane.requests[item.request], item.tokens
    computed = request.num_computed_tokens
    batch.num_tokens -= n
    batch.token_room += n
    batch.pairs -= n * (computed + (n + 1) * 0.5)
    batch.kv_tokens -= computed + n
    request.num_scheduled_tokens = 0
    recount(batch, lane.items, lane.requests, lane.coef_s)
    more = max(n, chunk_room(lane, item.request))
    batch.num_tokens += more
    batch.token_room -= more
    batch.pairs += more * (computed + (more + 1) * 0.5)
    batch.kv_tokens += computed + more
    item.tokens = request.num_scheduled_tokens = more
    recount(batch, lane.items, lane.requests, lane.coef_s)
    batch.free_blocks -= blocks_to_hold(lane.sim, request, more) - blocks_to_hold(lane.sim, request, n)
    if lane.sim.prefix_caching:
        take(lane, item.request, more)
