"""MC-SF and A_min: the shortest outputs first, as many as the memory holds at each moment to come.

Sources, second-hand: arXiv 2502.07115 (MC-SF) and arXiv 2508.14544 (A_min).

`mc-sf` is told output lengths. Where they are true running requests are never stopped; where they are hints that fall
short, memory can run out, and the engine preempts as for everybody. Waiting ones go by output length, each of which
enters if at every batch in which one of the chosen ends, the KV of all that are there then fits; the first that does
not keeps the others out.

`a-min` is told as much, but believes a lower bound: `low` = 0.5 times the length, raised to what was generated and one.
Where the next tokens of all decodes find no blocks, decodes with the smallest bound are thrown out until they do; they
keep their tokens and come back with the bound raised.

Guessed: that the first which does not fit ends the search (so that nobody starves); of equal bounds the last admitted
is thrown out; a prompt takes one batch of up to `budget` = 8,192 tokens, and prompts under way count in full. An empty
engine takes whoever is first. Where no length is told it is one token more than was generated.
"""

import math

from llmsched_gym.engine.batch import (
    add_chunk,
    can_admit,
    chunk_room,
    is_free,
    is_prefill,
    open_batch,
    preempt,
    uncached_prefill,
)
from llmsched_gym.engine.blocks import blocks_for
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.pack import add_all_decodes, admission_filters, keep_going
from llmsched_gym.engine.predict import can_make_ttft
from llmsched_gym.engine.records import WAITING
from llmsched_gym.scheduler import Compiled, Own


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise ValueError
    return value


OWN = (Own("low", 0.5, _share, "share of the output length > 0, at most 1"),)
LOW = 0  # 0 without the parameter: lengths are what they are told to be


@kernel()
def bound(lane, r):
    """Output tokens that a request is believed to have: its length, or a lower bound of it."""
    request, low = lane.requests[r], lane.knobs.own[LOW]
    hint = request.length_hint * (low if low > 0.0 else 1.0)
    least = request.num_output_tokens + 1.0
    return max(math.ceil(hint), least) if hint == hint else least


@kernel()
def batches_left(lane, r):
    """Batches until a request is believed to end, this one included; its prompt takes the first."""
    return int(bound(lane, r)) - lane.requests[r].num_output_tokens


@kernel()
def blocks_at(lane, r, batches):
    """Blocks that a request holds in the batch that is the `batches`-th from now, 0 once it has ended."""
    request, left = lane.requests[r], batches_left(lane, r)
    if batches > left:
        return 0
    tokens = max(request.prefill_tokens, request.num_computed_tokens + 1) + batches - 1
    return blocks_for(lane.sim, tokens)


@kernel()
def fits_with(lane, r, chosen):
    """Whether the KV of ``lane.scratch[:chosen]`` and of `r` fits whenever one of them ends."""
    scratch, usable = lane.scratch, lane.sim.total_blocks - lane.sim.watermark_blocks
    end = batches_left(lane, r)
    for i in range(chosen + 1):
        at = end if i == chosen else batches_left(lane, scratch[i])
        if at > end:
            continue  # once r has ended nothing is different from before
        blocks = blocks_at(lane, r, at)
        for j in range(chosen):
            blocks += blocks_at(lane, scratch[j], at)
        if blocks > usable:
            return False
    return True


@kernel()
def next_shortest(lane, hold, limit):
    """The waiting request with the smallest bound that is not in the batch; -1 if there is none."""
    best, best_bound = -1, math.inf
    for i in range(lane.sim.num_waiting):
        r = lane.waiting[i]
        if not is_free(lane, r) or (limit and uncached_prefill(lane, r) > lane.batch.limit):
            continue
        own = bound(lane, r)
        if own < best_bound and not (hold and not can_make_ttft(lane, r)):
            best, best_bound = r, own
    return best


@kernel()
def throw_out(lane):
    """Preempt decodes with the smallest bound until the next tokens of the others find blocks, or one is left."""
    sim, batch, requests = lane.sim, lane.batch, lane.requests
    need = decodes = 0
    for i in range(sim.num_running):
        request = requests[lane.running[i]]
        if not is_prefill(request):
            decodes += 1
            need += request.num_computed_tokens >= request.num_blocks << sim.block_bits
    for _ in range(sim.num_running):
        if need <= batch.free_blocks or decodes < 2:
            break
        worst, worst_bound = -1, math.inf
        for i in range(sim.num_running):
            r = lane.running[i]
            if is_prefill(requests[r]) or not is_free(lane, r):
                continue
            own = bound(lane, r)
            if own <= worst_bound:
                worst, worst_bound = r, own
        need -= requests[worst].num_computed_tokens >= requests[worst].num_blocks << sim.block_bits
        decodes -= 1
        preempt(lane, worst)


def mc_sf(lane):
    """Every decode and prompt under way, then the shortest outputs that fit at each end to come."""
    open_batch(lane)
    sim, batch = lane.sim, lane.batch
    if lane.knobs.own[LOW] > 0.0:
        throw_out(lane)
    add_all_decodes(lane)
    for i in range(sim.num_running):
        r = lane.running[i]
        if is_prefill(lane.requests[r]) and is_free(lane, r):
            n = chunk_room(lane, r)
            if n > 0:
                add_chunk(lane, r, n)
    if batch.num_preempt == 0 and sim.num_waiting > 0 and batch.token_room > 0:
        hold, limit = admission_filters(lane)
        chosen = sim.num_running
        for i in range(chosen):
            lane.scratch[i] = lane.running[i]
        for _ in range(sim.max_num_seqs - sim.num_running):
            r = next_shortest(lane, hold, limit) if batch.token_room > 0 else -1
            n = chunk_room(lane, r) if r >= 0 else 0
            if n <= 0 or lane.requests[r].phase != WAITING or not can_admit(lane, r, n):
                break
            if chosen > 0 and not fits_with(lane, r, chosen):
                break
            add_chunk(lane, r, n)
            lane.scratch[chosen] = r
            chosen += 1
    keep_going(lane)


SCHEDULERS = {
    "mc-sf": Compiled(
        "MC-SF: knows output lengths; the shortest that fit at every end to come (arXiv 2502.07115, second-hand)",
        mc_sf,
        {"token_budget": 8192},
        clairvoyant=True,
    ),
    "a-min": Compiled(
        "A_min: mc-sf on a lower bound of the output length, throwing out the shortest (arXiv 2508.14544, second-hand)",
        mc_sf,
        {"token_budget": 8192},
        clairvoyant=True,
        own=OWN,
    ),
}
