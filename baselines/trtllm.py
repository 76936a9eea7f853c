"""TensorRT-LLM's scheduler: all decodes, then chunks of prompts, and nobody enters who might have to be preempted.

Sources: `GUARANTEED_NO_EVICT` (the default) and the batches read in the C++ and Python code of the repository
(`capacityScheduler.cpp`, `scheduledBlocksManager.h`, `pyexecutor/scheduler.py`); the order and the starvation bound of
1.4.0rc4 read in its API reference only (`SchedulerConfig.context_scheduling_policy`, `context_starvation_iterations`).

- A prompt enters if the blocks of it and of all output that it may have are free, beside those that the running
  requests may still take; the first that does not fit keeps the others out.
- A batch takes every decode, then chunks of prompts, those under way first, up to `budget` = 8,192 tokens. A chunk
  that does not end a prompt ends with a block.
- `order=shortest-uncached-first` admits by the prompt tokens that are not cached; with `starvation` = n those that
  have been seen waiting by n batches go before all others, the oldest first (none by default).

Guessed: that a starved request goes before all others and by age, and that batches are what is counted; that chunks
are allowed, which is off by default there. A request without a limit on its output may fill the model's context.
Blocks that others use cost nothing, and cached ones that nobody uses their place. TensorRT-LLM lets a prompt wait
whose next block another prompt is to compute; here it finds that block in the same batch. An empty engine takes
whoever is first, alone.
"""

import math

from llmsched_gym.engine.batch import (
    add_chunk,
    chunk_room,
    is_free,
    is_prefill,
    open_batch,
    uncached_prefill,
)
from llmsched_gym.engine.blocks import blocks_for, blocks_to_admit
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.pack import add_all_decodes, admission_filters, keep_going
from llmsched_gym.engine.predict import can_make_ttft
from llmsched_gym.scheduler import Compiled, Own, not_negative_int

ORDERS = ("fcfs", "shortest-uncached-first")
FCFS, SHORTEST = range(len(ORDERS))
OWN = (Own("starvation", 0, not_negative_int, "whole number of batches, 0 for none"),)
STARVATION = 0  # batches that a prompt may wait before it goes first


@kernel()
def most_blocks(sim, request):
    """KV blocks of a request once it has all the output that it may have."""
    output = min(request.max_output_tokens, sim.max_model_len - request.prompt_tokens)
    return blocks_for(sim, request.prompt_tokens + output)


@kernel()
def blocks_to_spare(lane):
    """Free blocks that no running request may come to need; below 0 if one was let in that may need more than all."""
    spare = lane.batch.free_blocks
    for i in range(lane.sim.num_running):
        request = lane.requests[lane.running[i]]
        spare -= max(0, most_blocks(lane.sim, request) - request.num_blocks)
    return spare


@kernel()
def blocks_to_finish(lane, r):
    """Free blocks that waiting request `r` may come to need."""
    sim, request = lane.sim, lane.requests[r]
    prompt = blocks_to_admit(lane, r, uncached_prefill(lane, r))
    return prompt + max(0, most_blocks(sim, request) - blocks_for(sim, request.prefill_tokens))


@kernel()
def chunk(lane, r):
    """Tokens for the prompt `r`: all that are left of it, or as many as fit and end with a block."""
    n, left = chunk_room(lane, r), uncached_prefill(lane, r)
    if n >= left:
        return n
    computed = lane.requests[r].prefill_tokens - left
    return max(0, ((computed + n) >> lane.sim.block_bits << lane.sim.block_bits) - computed)


@kernel()
def note_arrivals(lane):
    """Note with newcomers how many batches there had been: nobody else needs the `lst_s` of those that wait."""
    for i in range(lane.sim.num_waiting - 1, -1, -1):
        request = lane.requests[lane.waiting[i]]
        if not math.isnan(request.lst_s):
            break
        request.lst_s = float(lane.sim.num_batches)


@kernel()
def next_in_line(lane, hold, limit):
    """The waiting prompt that goes first, -1 if there is none: the oldest starved one, else by order."""
    sim, most, order = lane.sim, lane.knobs.own[STARVATION], lane.knobs.order
    best, best_key = -1, math.inf
    for i in range(sim.num_waiting):
        r = lane.waiting[i]
        if not is_free(lane, r) or (limit and uncached_prefill(lane, r) > lane.batch.limit):
            continue
        if hold and not can_make_ttft(lane, r):
            continue
        if order == FCFS or (most > 0 and sim.num_batches - lane.requests[r].lst_s >= most):
            return r  # the line is by arrival
        left = float(uncached_prefill(lane, r))
        if left < best_key:
            best, best_key = r, left
    return best


def trtllm(lane):
    """Every decode, then prompts under way, then those that can be served to their end whatever comes."""
    open_batch(lane)
    sim, batch = lane.sim, lane.batch
    if lane.knobs.own[STARVATION] > 0:
        note_arrivals(lane)
    spare = blocks_to_spare(lane) if sim.num_waiting > 0 else 0
    add_all_decodes(lane)
    for i in range(sim.num_running):
        r = lane.running[i]
        if batch.token_room <= 0:
            break
        if is_prefill(lane.requests[r]):
            n = chunk(lane, r)
            if n > 0:
                add_chunk(lane, r, n)
    hold, limit = admission_filters(lane)
    for _ in range(sim.max_num_seqs - sim.num_running):
        r = next_in_line(lane, hold, limit) if batch.token_room > 0 and sim.num_waiting > 0 else -1
        if r < 0:
            break
        need, is_first = blocks_to_finish(lane, r), sim.num_running == 0 and batch.num_items == 0
        n = chunk(lane, r)
        if n <= 0 or (need > spare and not is_first):
            break
        spare -= need
        add_chunk(lane, r, n)
    keep_going(lane)


SCHEDULERS = {
    "trtllm": Compiled(
        "TensorRT-LLM: all decodes, then prompts whose whole possible output has blocks, so nobody is ever preempted",
        trtllm,
        {"token_budget": 8192, "order": FCFS},
        options=("order",),
        own=OWN,
        orders=ORDERS,
    ),
}
