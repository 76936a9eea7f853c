"""vLLM's policy `priority`: the lower value first, ties by arrival; whoever comes last in that order gives way.

Source, read: `vllm/v1/core/sched/scheduler.py`, 0.33. As `vllm-v1`, with two differences. Waiting requests enter by
(priority, arrival), and where a running one finds no block the victim is the running request with the largest
(priority, arrival), also one that was given tokens in this very step: they go back to the budget. Nobody is preempted
for anything but blocks. A request that gives itself up does not end the step (it does in 0.32).

Guessed: a request's priority, which there its client names, is its SLO class, strict users (0) before relaxed ones.
"""

import math

from llmsched_gym.baselines.vllm_v1 import OWN, enter, next_chunk
from llmsched_gym.engine.batch import (
    add_chunk,
    add_decode,
    decode_fits,
    is_free,
    is_prefill,
    open_batch,
    preempt,
    uncached_prefill,
)
from llmsched_gym.engine.blocks import blocks_to_hold, give_back
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.pack import admission_filters, keep_going
from llmsched_gym.engine.predict import can_make_ttft
from llmsched_gym.engine.surface import recount
from llmsched_gym.scheduler import VLLM_TOKEN_BUDGET, Compiled


@kernel()
def goes_before(a, b):
    """Whether request `a` goes before `b`: by priority, then by arrival."""
    return a.slo_class < b.slo_class or (a.slo_class == b.slo_class and a.arrival_s < b.arrival_s)


@kernel()
def next_victim(lane):
    """The running request that comes last by priority and arrival, of those not preempted yet; -1 if there is none."""
    worst = -1
    for i in range(lane.sim.num_running + lane.sim.num_ending):
        r = lane.running[i]
        if lane.requests[r].num_scheduled_tokens < 0:
            continue
        if worst < 0 or not goes_before(lane.requests[r], lane.requests[worst]):
            worst = r
    return worst


@kernel()
def take_back(lane, r):
    """Take running request `r` out of the batch again, its tokens and blocks with it."""
    sim, batch, request = lane.sim, lane.batch, lane.requests[r]
    n = request.num_scheduled_tokens
    at = 0
    for i in range(batch.num_items):
        if lane.items[i].request == r:
            at = i
    for i in range(at, batch.num_items - 1):
        item, following = lane.items[i], lane.items[i + 1]
        item.request, item.tokens = following.request, following.tokens
    if sim.prefix_caching:
        before = sim.free_blocks
        give_back(lane, r)
        batch.free_blocks += sim.free_blocks - before
    else:
        batch.free_blocks += blocks_to_hold(sim, request, n) - request.num_blocks
    batch.num_items -= 1
    batch.num_tokens -= n
    batch.token_room += n
    batch.kv_tokens -= request.num_computed_tokens + n
    if is_prefill(request):
        batch.pairs -= n * (request.num_computed_tokens + (n + 1) * 0.5)
    else:
        batch.num_decodes -= 1
    request.num_scheduled_tokens = 0
    recount(batch, lane.items, lane.requests, lane.coef_s)


@kernel()
def make_room(lane, r, need):
    """Preempt whom it takes until `need` blocks are free, or `r` itself is gone."""
    sim, batch, requests = lane.sim, lane.batch, lane.requests
    for _ in range(sim.num_running + sim.num_ending):
        if batch.free_blocks >= need or requests[r].num_scheduled_tokens < 0:
            break
        victim = next_victim(lane)
        if requests[victim].num_scheduled_tokens > 0:
            take_back(lane, victim)
        preempt(lane, victim)


@kernel()
def next_by_priority(lane, hold, limit):
    """The waiting request that goes first; -1 if there is none."""
    best = -1
    for i in range(lane.sim.num_waiting):
        r = lane.waiting[i]
        if not is_free(lane, r) or (limit and uncached_prefill(lane, r) > lane.batch.limit):
            continue
        if hold and not can_make_ttft(lane, r):
            continue
        if best < 0 or goes_before(lane.requests[r], lane.requests[best]):
            best = r
    return best


def vllm_priority(lane):
    """Running requests in admission order, the last by priority giving way; then waiting ones by priority."""
    open_batch(lane)
    sim, batch, requests = lane.sim, lane.batch, lane.requests
    for i in range(sim.num_running):
        r = lane.running[i]
        if requests[r].num_scheduled_tokens < 0 or batch.token_room <= 0:
            continue
        prefill = is_prefill(requests[r])
        n = next_chunk(lane, r) if prefill else 1
        if n <= 0 or (not prefill and batch.cap_s < math.inf and not decode_fits(lane, r) and batch.num_items > 0):
            continue
        make_room(lane, r, blocks_to_hold(sim, requests[r], n) - requests[r].num_blocks)
        if requests[r].num_scheduled_tokens < 0:
            continue
        if prefill:
            add_chunk(lane, r, n)
        else:
            add_decode(lane, r)
    if batch.num_preempt > 0:
        return
    hold, limit = admission_filters(lane)
    for _ in range(sim.max_num_seqs):
        r = next_by_priority(lane, hold, limit) if batch.token_room > 0 else -1
        if r < 0 or not enter(lane, r):
            break
    keep_going(lane)


SCHEDULERS = {
    "vllm-priority": Compiled(
        "vLLM V1 by priority, here the SLO class: strict users enter first and are preempted last (vLLM 0.33)",
        vllm_priority,
        {"token_budget": VLLM_TOKEN_BUDGET},
        admission="prompt-check",
        options=("reserve",),
        own=OWN,
    ),
}
