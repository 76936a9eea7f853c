"""Forming a batch: what fits, what it is predicted to cost, and the two ways to add to it.

All functions are kernels on a :class:`~llmsched_gym.engine.state.Lane`; schedulers are written with them. They stand in
one file, as asking whether something fits and adding it go by the same sums.
"""

from __future__ import annotations

import math

from llmsched_gym.engine import surface
from llmsched_gym.engine.blocks import (
    BY_PROMPT,
    blocks_to_admit,
    blocks_to_hold,
    free,
    known_computed,
    stays_within,
    take,
)
from llmsched_gym.engine.due import decode_due_s
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.records import RUNNING, WAITING
from llmsched_gym.engine.surface import has_surface


@kernel()
def batch_s(linear_s, coef_s, num_tokens, pairs, kv_tokens):
    """Seconds of a batch on an additive profile: linear layers and overhead by tokens, attention by pairs and KV."""
    return linear_s[num_tokens] + coef_s[0] * pairs + coef_s[1] * kv_tokens


@kernel()
def is_prefill(request):
    """Whether a request has prompt tokens left to compute."""
    return request.num_computed_tokens < request.prefill_tokens


@kernel()
def remaining_prefill(request):
    """Prompt tokens of a request that are still to compute, whatever is cached."""
    return request.prefill_tokens - request.num_computed_tokens


@kernel()
def uncached_prefill(lane, r):
    """Prompt tokens of `r` that it has to compute: of a waiting one without those that it would find cached."""
    return lane.requests[r].prefill_tokens - known_computed(lane, r)


@kernel()
def waiting_prefill(lane, most):
    """Prompt tokens that the waiting requests have to compute, without cached ones; counted up to about `most`."""
    if not lane.sim.prefix_caching:
        return lane.sim.waiting_tokens
    tokens = 0
    for i in range(lane.sim.num_waiting):
        if tokens >= most:
            break
        tokens += uncached_prefill(lane, lane.waiting[i])
    return tokens


@kernel()
def open_batch(lane):
    """Start an empty batch under the knobs' token budget and time cap."""
    sim, batch = lane.sim, lane.batch
    batch.num_items = 0
    batch.num_tokens = 0
    batch.num_decodes = 0
    batch.num_admitted = 0
    batch.num_preempt = 0
    batch.num_refuse = 0
    batch.is_marked = 1
    batch.num_started = -1
    batch.first_started = -1
    batch.num_deferred = 0
    batch.smallest_tbt_slo_s = -1.0
    batch.token_room = max(0, min(lane.knobs.token_budget, sim.max_num_batched_tokens))
    batch.free_blocks = sim.free_blocks
    clear_sums(batch)
    batch.margin, batch.order = lane.knobs.margin, lane.knobs.order
    batch.limit, batch.hold = lane.knobs.limit, lane.knobs.hold
    set_cap(lane, lane.knobs.cap)


@kernel()
def set_cap(lane, cap):
    """Cap the predicted time of the open batch, as a share of the TBT SLOs and deadlines of running decodes."""
    batch = lane.batch
    batch.cap, batch.cap_s = cap, math.inf
    if cap < math.inf:
        batch.cap_s = cap * min(smallest_tbt_slo_s(lane), batch.deadline_s)


@kernel()
def smallest_tbt_slo_s(lane):
    """Smallest TBT SLO among running decodes; the strict class's when none runs."""
    if lane.batch.smallest_tbt_slo_s < 0.0:
        _find_deadlines(lane)
    return lane.batch.smallest_tbt_slo_s


@kernel()
def _find_deadlines(lane):
    """Look through the running decodes, once per batch, for the smallest TBT SLO and the first deadline.

    The first deadline is that of a token that can still be in time, in seconds from now and at least a strict user's
    TBT SLO. When the last strict decode finishes, the cap grows from one batch to the next; a decode that was deferred
    under the small cap would be late by the end of a batch as long as the large one allows.
    """
    smallest_s = earliest_s = math.inf
    now_s = lane.sim.clock_s
    for i in range(lane.sim.num_running):
        request = lane.requests[lane.running[i]]
        if is_prefill(request):
            continue
        smallest_s = min(smallest_s, request.tbt_slo_s)
        ahead_s = decode_due_s(request) - now_s
        if ahead_s > 0.0:
            earliest_s = min(earliest_s, ahead_s)
    strict_s = lane.episode.strict_tbt_slo_s
    lane.batch.smallest_tbt_slo_s = smallest_s if smallest_s < math.inf else strict_s
    lane.batch.deadline_s = max(earliest_s, strict_s)


@kernel()
def clear_sums(batch):
    """No work in the batch: what its time is told from."""
    batch.pairs = 0.0
    batch.kv_tokens = 0.0
    batch.longest = 0
    batch.num_chunks = 0
    batch.chunk_kv_tokens = 0.0
    batch.chunks_s = 0.0
    batch.price_s = -1.0


@kernel()
def predicted_s(lane):
    """What the scheduler's own profile says of the batch as it stands."""
    batch = lane.batch
    if has_surface(lane.coef_s):
        return surface.predicted_s(batch, lane.linear_s, lane.coef_s)
    return batch_s(lane.linear_s, lane.coef_s, batch.num_tokens, batch.pairs, batch.kv_tokens)


@kernel()
def _predicted_with_s(lane, computed, n):
    batch = lane.batch
    return batch_s(
        lane.linear_s,
        lane.coef_s,
        batch.num_tokens + n,
        batch.pairs + n * (computed + (n + 1) * 0.5),
        batch.kv_tokens + computed + n,
    )


@kernel()
def chunk_room(lane, r):
    """Prompt tokens of `r` that still fit: at most its remaining prompt, the token budget and the time cap."""
    batch, computed = lane.batch, known_computed(lane, r)
    n = min(lane.requests[r].prefill_tokens - computed, batch.token_room)
    if n <= 0 or batch.cap_s == math.inf:
        return max(n, 0)
    if has_surface(lane.coef_s):
        return surface.chunk_room(batch, lane.linear_s, lane.coef_s, computed, n)
    if _predicted_with_s(lane, computed, n) <= batch.cap_s:
        return n
    low, high = 0, n  # low fits (nothing always does), high does not
    for _ in range(32):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        if _predicted_with_s(lane, computed, middle) <= batch.cap_s:
            low = middle
        else:
            high = middle
    return low


@kernel()
def decode_fits(lane, r):
    """Whether one more decode keeps the batch within its token budget and time cap."""
    batch = lane.batch
    if batch.token_room <= 0:
        return False
    if batch.cap_s == math.inf:
        return True
    context = lane.requests[r].num_computed_tokens + 1
    if has_surface(lane.coef_s):
        alone = float(context)
        return surface.with_decodes_s(batch, lane.linear_s, lane.coef_s, 1, alone, alone) <= batch.cap_s
    kv_tokens = batch.kv_tokens + context
    return batch_s(lane.linear_s, lane.coef_s, batch.num_tokens + 1, batch.pairs, kv_tokens) <= batch.cap_s


@kernel()
def is_thrashing(lane):
    """Whether requests take the blocks from each other in turn, and nobody has come to a token for it.

    Then nobody may enter while anybody runs: the running ones only become fewer, until one has the blocks it needs.
    """
    sim = lane.sim
    if sim.preempted_at_token != sim.tokens_emitted or sim.num_running + lane.batch.num_admitted == 0:
        return False
    return sim.vain_preemptions > sim.num_running + sim.num_waiting


@kernel()
def can_admit(lane, r, num_tokens):
    """Whether waiting request `r` may enter now with `num_tokens`."""
    return finds_room(lane, r, num_tokens) and not is_thrashing(lane)


@kernel()
def finds_room(lane, r, num_tokens):
    """Whether waiting request `r` finds a sequence slot and, watermark left, its blocks."""
    sim, batch = lane.sim, lane.batch
    if sim.num_running + batch.num_admitted >= sim.max_num_seqs:
        return False
    spare = sim.watermark_blocks if sim.admission == BY_PROMPT else 0
    return batch.free_blocks - blocks_to_admit(lane, r, num_tokens) >= spare


@kernel()
def add_decode(lane, r):
    """Let a running request with a complete prompt decode one token."""
    batch, request, item = lane.batch, lane.requests[r], lane.items[lane.batch.num_items]
    item.request = r
    item.tokens = 1
    batch.num_items += 1
    batch.num_tokens += 1
    batch.num_decodes += 1
    batch.token_room -= 1
    batch.kv_tokens += request.num_computed_tokens + 1
    if has_surface(lane.coef_s):
        batch.longest = max(batch.longest, request.num_computed_tokens + 1)
    batch.free_blocks -= request.num_computed_tokens >= request.num_blocks << lane.sim.block_bits
    request.num_scheduled_tokens = 1
    if lane.sim.prefix_caching and not stays_within(lane.sim, request, 1):
        take(lane, r, 1)


@kernel()
def add_decodes(lane, count):
    """:func:`add_decode` for all of ``lane.scratch[:count]``, with the sums in registers."""
    batch = lane.batch
    first, block_bits = batch.num_items, lane.sim.block_bits
    context = new_blocks = 0
    for i in range(count):
        r = lane.scratch[i]
        request, item = lane.requests[r], lane.items[first + i]
        item.request = r
        item.tokens = 1
        context += request.num_computed_tokens + 1
        new_blocks += request.num_computed_tokens >= request.num_blocks << block_bits
        request.num_scheduled_tokens = 1
    batch.num_items += count
    batch.num_tokens += count
    batch.num_decodes += count
    batch.token_room -= count
    batch.kv_tokens += context
    if has_surface(lane.coef_s):
        surface.see_longest(batch, lane.requests, lane.scratch, count)
    batch.free_blocks -= new_blocks
    if lane.sim.prefix_caching:
        for i in range(count):
            if not stays_within(lane.sim, lane.requests[lane.scratch[i]], 1):
                take(lane, lane.scratch[i], 1)


@kernel()
def add_chunk(lane, r, n):
    """Give request `r`, running or waiting, `n` tokens of its prompt; a waiting one is admitted."""
    batch, request, item = lane.batch, lane.requests[r], lane.items[lane.batch.num_items]
    if lane.sim.prefix_caching:
        batch.free_blocks -= take(lane, r, n)
    else:
        batch.free_blocks -= blocks_to_hold(lane.sim, request, n) - request.num_blocks
    item.request = r
    item.tokens = n
    batch.num_items += 1
    batch.num_tokens += n
    batch.token_room -= n
    batch.pairs += n * (request.num_computed_tokens + (n + 1) * 0.5)
    batch.kv_tokens += request.num_computed_tokens + n
    if has_surface(lane.coef_s):
        surface.see_chunk(batch, lane.coef_s, request.num_computed_tokens, n)
    batch.num_admitted += request.phase == WAITING
    request.num_scheduled_tokens = n


@kernel()
def preempt(lane, r):
    """Name running request `r` as preempted before this batch; it must not be in the batch."""
    batch = lane.batch
    lane.preempt[batch.num_preempt] = r
    batch.num_preempt += 1
    if lane.sim.prefix_caching:
        batch.free_blocks += free(lane, r)
    else:
        batch.free_blocks += lane.requests[r].num_blocks
    lane.requests[r].num_scheduled_tokens = -1  # not available to this batch


@kernel()
def refuse(lane, r):
    """Refuse waiting request `r`, which has no token yet; needs ``allow_refusal``."""
    batch = lane.batch
    lane.refuse[batch.num_refuse] = r
    batch.num_refuse += 1
    lane.requests[r].num_scheduled_tokens = -1


@kernel()
def insert_sorted(lane, count, r, key):
    """Insert `r` into ``lane.scratch[:count]``, sorted by key with ties by request index."""
    scratch, keys = lane.scratch, lane.keys
    j = count - 1
    while j >= 0 and (keys[j] > key or (keys[j] == key and scratch[j] > r)):
        scratch[j + 1] = scratch[j]
        keys[j + 1] = keys[j]
        j -= 1
    scratch[j + 1] = r
    keys[j + 1] = key


@kernel()
def is_free(lane, r):
    """Whether `r` is not yet part of this batch."""
    return lane.requests[r].num_scheduled_tokens == 0


@kernel()
def is_decoding(lane, r):
    """Whether running request `r` has its whole prompt computed."""
    request = lane.requests[r]
    return request.phase == RUNNING and not is_prefill(request)
