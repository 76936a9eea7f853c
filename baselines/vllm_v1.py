"""vLLM V1's scheduler (`vllm/v1/core/sched/scheduler.py`, 0.32): one token budget, no distinction of phases.

Every batch of the real one equals ours on one clock: `benchmarks/conformance_vllm.py`.
"""

import math

from llmsched_gym.engine.batch import (
    add_chunk,
    add_decode,
    chunk_room,
    decode_fits,
    finds_room,
    is_prefill,
    is_thrashing,
    open_batch,
    preempt,
)
from llmsched_gym.engine.blocks import blocks_to_hold
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.pack import FCFS, admission_filters, keep_going, next_waiting
from llmsched_gym.scheduler import VLLM_TOKEN_BUDGET, Compiled, Own, not_negative_int

OWN = (Own("threshold", 0, not_negative_int, "whole number of tokens, 0 for none"),)
THRESHOLD = 0  # largest chunk of a prompt while there is another request


@kernel()
def next_chunk(lane, r):
    """Prompt tokens of `r` in this batch: what room there is, below the threshold unless `r` is all alone."""
    n, most = chunk_room(lane, r), int(lane.knobs.own[THRESHOLD])
    sim = lane.sim
    return min(n, most) if most > 0 and sim.num_running + sim.num_ending + sim.num_waiting > 1 else n


@kernel()
def next_victim(lane, last, last_ending):
    """Who was admitted last of ``running[:last]`` and, of those that end with the batch in flight, the first so many.

    Returns the request and both numbers without it.
    """
    running, requests = lane.running, lane.requests
    if last_ending > 0:
        r = running[lane.sim.num_running + last_ending - 1]
        if requests[running[last - 1]].place < requests[r].place:
            return r, last, last_ending - 1
    return running[last - 1], last - 1, last_ending


@kernel()
def serve_running(lane, prompts, decodes):
    """Running requests in admission order, chunks of `prompts`, one token each of `decodes`; who is last gives way.

    Where a block is missing the request admitted last is preempted, the one that needs it if it is that one itself.
    """
    sim, batch = lane.sim, lane.batch
    last, last_ending = sim.num_running, sim.num_ending  # those behind have been preempted
    for i in range(sim.num_running):
        if i >= last or batch.token_room <= 0:
            break
        r = lane.running[i]
        prefill = is_prefill(lane.requests[r])
        if not (prompts if prefill else decodes):
            continue
        n = next_chunk(lane, r) if prefill else 1
        if n <= 0 or (not prefill and not decode_fits(lane, r) and batch.num_items > 0):
            continue
        need = blocks_to_hold(sim, lane.requests[r], n) - lane.requests[r].num_blocks
        for _ in range(sim.num_running + sim.num_ending):
            if batch.free_blocks >= need or last <= i:
                break
            victim, last, last_ending = next_victim(lane, last, last_ending)
            preempt(lane, victim)
        if last <= i:
            break
        if prefill:
            add_chunk(lane, r, n)
        else:
            add_decode(lane, r)


@kernel()
def enter(lane, r):
    """Let waiting request `r` in with its chunk; False if it finds no tokens or no room, and so does nobody behind."""
    n = next_chunk(lane, r)
    if n <= 0 or not finds_room(lane, r, n):
        return False
    if lane.batch.cap_s < math.inf and is_thrashing(lane):  # without a cap, the first of running always goes on
        return False
    add_chunk(lane, r, n)
    return True


@kernel()
def fill_v1(lane, most):
    """Fill an open batch as vLLM does: who runs, then up to `most` of those that wait, first come first served."""
    serve_running(lane, True, True)
    if lane.batch.num_preempt > 0:
        return
    hold, limit = admission_filters(lane)
    for _ in range(min(most, lane.sim.max_num_seqs)):
        r = next_waiting(lane, FCFS, hold, limit)
        if r < 0 or not enter(lane, r):
            break
    keep_going(lane)


def vllm_v1(lane):
    """Running requests in admission order, a decode or a chunk each; then waiting ones, first come first served.

    Blocks are taken chunk by chunk; where one is missing the request admitted last is preempted, and nobody is admitted
    in such a step. Admission asks that all known tokens of a request would fit now, and reserves nothing.
    """
    open_batch(lane)
    fill_v1(lane, lane.sim.max_num_seqs)


SCHEDULERS = {
    "vllm-v1": Compiled(
        "vLLM V1 since 0.19: running requests in admission order, then waiting ones; budget by GPU, 2,048 tokens",
        vllm_v1,
        {"token_budget": VLLM_TOKEN_BUDGET},
        admission="prompt-check",
        options=("reserve",),
        own=OWN,
    ),
}
