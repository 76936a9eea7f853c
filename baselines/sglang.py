"""SGLang's scheduler: batches of prompts only as long as there are any that fit, else all decodes.

Source, read: SGLang 0.5.23, `sglang/srt/managers`: `schedule_policy.py` (orders, `PrefillAdder`), `scheduler.py`
(`get_next_batch_to_run`), `schedule_batch.py` (`retract_decode`), `scheduler_components/new_token_ratio_tracker.py`.

- *Orders.* `fcfs`; `lpm`, longest cached prefix first; `hrrn`, most prompt tokens processed since arrival per own
  uncached token; `shortest-prefill-first`, fewest uncached tokens, which also take from the chunk of a longer prompt
  that is under way. With more than 128 waiting `lpm` and `hrrn` are `fcfs`.
- *Memory.* A prompt enters if its uncached tokens and all output it may have (at most 4,096 tokens are reserved) fit
  beside a share of what each running request may still emit. The share is 0.7 at first and after idling, falls with
  each batch of decodes to 0.098 in 600 of them, and is estimated anew when blocks run out. Once somebody did not fit,
  nobody is asked until a request has left.
- *Retraction.* When the next tokens of all decodes find no blocks, those with the fewest outputs, then the longest
  prompts, give theirs up, and stand at the end of the line.

Guessed or unlike SGLang: a request without a limit on its output may fill the model's context, as with SGLang's
OpenAI server. At most `consecutive` batches of prompts in a row (none by default) is told of SGLang; 0.5.23 has a
number of decode batches after each batch of prompts instead, off by default. Memory is counted in the engine's blocks.
An equal prefix of two waiting prompts needs no care, as here a prompt finds what another of its batch computes.
What is retracted stays cached until its place is needed. Without prefix caching SGLang has only `fcfs`; here `hrrn`
and `shortest-prefill-first` go by whole prompts then. An empty engine takes whoever is first.
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
    remaining_prefill,
    uncached_prefill,
)
from llmsched_gym.engine.blocks import blocks_for, blocks_to_admit, known_computed
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.pack import add_all_decodes, admission_filters, keep_going
from llmsched_gym.engine.predict import can_make_ttft
from llmsched_gym.scheduler import SGLANG_CHUNK, Compiled, Own, not_negative_int

ORDERS = ("fcfs", "lpm", "hrrn", "shortest-prefill-first")
FCFS, LPM, HRRN, SHORTEST = range(len(ORDERS))
OWN = (Own("consecutive", 0, not_negative_int, "whole number of batches, 0 for no limit"),)
CONSECUTIVE = 0  # most batches of prompts in a row while there are decodes
MOST_SORTED = 128  # waiting requests; `lpm` and `hrrn` are `fcfs` above
MOST_RESERVED = 4096  # output tokens of one request
FIRST_RATIO, LEAST_RATIO, DECAY_BATCHES = 0.7, 0.7 * 0.14, 600
RETRACT_TOKENS = 20  # that each request left is expected to emit, at least, after a retraction
# Places in the lane's memory.
IN_A_ROW = 0  # batches of prompts since the last of decodes
DECAYED = 1  # the first ratio less the one now
PROCESSED = 2  # prompt tokens so far
SEEN = 3  # batches, when these were counted
LEFT = 4  # requests that had left running at the last batch
IS_FULL = 5  # whether somebody did not fit, and nobody has left since


@kernel()
def allowed_output(sim, request):
    """Output tokens that a request may have: its client's limit, at most what the context leaves."""
    return min(request.max_output_tokens, sim.max_model_len - request.prompt_tokens)


@kernel()
def output_left(sim, request):
    """Output tokens that may still come, as far as they are reserved."""
    return min(max(allowed_output(sim, request) - request.num_output_tokens, 0), MOST_RESERVED)


@kernel()
def take_stock(lane):
    """Count what the last batch computed and who has left; forget it all where nobody runs."""
    sim, memory = lane.sim, lane.memory
    if memory[SEEN] != sim.num_batches:
        memory[PROCESSED] += sim.last_batch_tokens - sim.last_batch_decodes
        memory[SEEN] = sim.num_batches
    left = sim.num_finished + sim.num_abandoned + sim.num_preemptions
    if left != memory[LEFT]:
        memory[LEFT], memory[IS_FULL] = left, 0.0
    if sim.num_running == 0:
        memory[IS_FULL] = memory[DECAYED] = 0.0
    if lane.knobs.order == HRRN:
        for i in range(sim.num_waiting - 1, -1, -1):
            request = lane.requests[lane.waiting[i]]
            if not math.isnan(request.lst_s):
                break
            request.lst_s = memory[PROCESSED]


@kernel()
def queued(request):
    """What grows with the time at which a waiting request joined the line: nobody else needs its `lst_s` there."""
    return request.arrival_s if math.isnan(request.lst_s) else request.lst_s


@kernel()
def key(lane, r, order):
    """Sort key of a waiting prompt; the smallest goes first, ties by who joined the line first."""
    if order == LPM:
        return -float(known_computed(lane, r))
    if order == HRRN:
        return -(lane.memory[PROCESSED] - queued(lane.requests[r])) / uncached_prefill(lane, r)
    return float(uncached_prefill(lane, r)) if order == SHORTEST else 0.0


@kernel()
def next_in_line(lane, order, hold, limit):
    """The waiting prompt that goes first, -1 if there is none."""
    best, best_key, best_queued = -1, math.inf, math.inf
    for i in range(lane.sim.num_waiting):
        r, request = lane.waiting[i], lane.requests[lane.waiting[i]]
        if not is_free(lane, r) or (limit and uncached_prefill(lane, r) > lane.batch.limit):
            continue
        if hold and not can_make_ttft(lane, r):
            continue
        own_key, own_queued = key(lane, r, order), queued(request)
        if best < 0 or own_key < best_key or (own_key == best_key and own_queued < best_queued):
            best, best_key, best_queued = r, own_key, own_queued
        if order == FCFS and request.num_preemptions == 0:
            break  # only preempted ones stand before those that came earlier
    return best


@kernel()
def order_now(lane):
    order, sim = lane.knobs.order, lane.sim
    if order == LPM and not sim.prefix_caching:
        return FCFS
    return FCFS if order in (LPM, HRRN) and sim.num_waiting > MOST_SORTED else order


@kernel()
def admit_next(lane, r, reserved, may_split):
    """Give waiting request `r` what it gets of the batch; returns the tokens to reserve from now on, -1 if none."""
    sim, batch, request = lane.sim, lane.batch, lane.requests[r]
    left, output = uncached_prefill(lane, r), output_left(sim, request)
    is_first = sim.num_running == 0 and batch.num_items == 0
    revived = blocks_to_admit(lane, r, left) - blocks_for(sim, left)  # cached blocks that nobody uses cost free ones
    tokens = left + output + sim.block_size * (1 + revived)
    if not is_first and tokens >= batch.free_blocks * sim.block_size - reserved:
        lane.memory[IS_FULL] = 1.0
        return -1.0
    n = chunk_room(lane, r)
    if n <= 0 or (n < left and not may_split) or not can_admit(lane, r, n):
        return -1.0
    add_chunk(lane, r, n)
    return reserved + sim.block_size + (output if n == left else 0)


@kernel()
def add_started(lane, r, reserved):
    """Go on with the prompt that is under way; returns the tokens to reserve from now on, -1 if it found no room."""
    sim, batch, request = lane.sim, lane.batch, lane.requests[r]
    n, left = chunk_room(lane, r), batch.free_blocks * sim.block_size - reserved
    if left > 0:
        n = min(n, int(left))
    n = min(n, (request.num_blocks + batch.free_blocks) * sim.block_size - request.num_computed_tokens)
    if n <= 0:
        return -1.0
    ends = n == remaining_prefill(request)
    add_chunk(lane, r, n)
    return reserved + sim.block_size + (output_left(sim, request) if ends else 0)


@kernel()
def add_prompts(lane, started):
    """Fill the batch with prompts: the one under way, then those that wait and fit."""
    sim, batch, memory = lane.sim, lane.batch, lane.memory
    reserved, ratio = 0.0, FIRST_RATIO - memory[DECAYED]
    for i in range(sim.num_running):
        request = lane.requests[lane.running[i]]
        if not is_prefill(request):
            reserved += ratio * output_left(sim, request)
    order = order_now(lane)
    hold, limit = admission_filters(lane)
    admits = sim.num_waiting > 0 and memory[IS_FULL] == 0.0
    if started >= 0:
        if order == SHORTEST and admits:
            reserved = add_shorter(lane, started, reserved, hold, limit)
        reserved = add_started(lane, started, reserved)
    unfinished = started >= 0 and lane.requests[started].num_scheduled_tokens < remaining_prefill(
        lane.requests[started]
    )
    for _ in range(sim.max_num_seqs):
        if not admits or reserved < 0.0 or batch.token_room <= 0:
            break
        if sim.num_running + batch.num_admitted >= sim.max_num_seqs:
            memory[IS_FULL] = 1.0
            break
        r = next_in_line(lane, order, hold, limit)
        if r < 0:
            break
        reserved = admit_next(lane, r, reserved, not unfinished)


@kernel()
def add_shorter(lane, started, reserved, hold, limit):
    """Before the prompt under way, add those that wait and are shorter; a block's worth of room is left to it."""
    sim, batch = lane.sim, lane.batch
    remaining = remaining_prefill(lane.requests[started])
    for _ in range(sim.max_num_seqs - sim.num_running):
        r = next_in_line(lane, SHORTEST, hold, limit)
        if r < 0 or uncached_prefill(lane, r) >= min(remaining, batch.token_room - sim.block_size + 1):
            break
        coming = min(remaining, batch.token_room)
        more = admit_next(lane, r, reserved + coming, False)
        if more < 0.0:
            break
        reserved = more - coming
    return reserved


@kernel()
def retract(lane):
    """Preempt decodes until the next tokens of the others find blocks, or one is left; sets the ratio anew."""
    sim, batch, requests = lane.sim, lane.batch, lane.requests
    need = decodes = 0
    for i in range(sim.num_running):
        request = requests[lane.running[i]]
        if not is_prefill(request):
            decodes += 1
            need += request.num_computed_tokens >= request.num_blocks << sim.block_bits
    if need <= batch.free_blocks or decodes < 2:
        lane.memory[DECAYED] = min(
            lane.memory[DECAYED] + (FIRST_RATIO - LEAST_RATIO) / DECAY_BATCHES, FIRST_RATIO - LEAST_RATIO
        )
        return
    for _ in range(sim.num_running):
        if need <= batch.free_blocks or decodes < 2:
            break
        worst = -1
        for i in range(sim.num_running):
            r, request = lane.running[i], requests[lane.running[i]]
            if is_prefill(request) or not is_free(lane, r):
                continue
            fewer = worst < 0 or request.num_output_tokens < requests[worst].num_output_tokens
            equal = worst >= 0 and request.num_output_tokens == requests[worst].num_output_tokens
            if fewer or (equal and request.prompt_tokens >= requests[worst].prompt_tokens):
                worst = r
        request = requests[worst]
        need -= request.num_computed_tokens >= request.num_blocks << sim.block_bits
        decodes -= 1
        request.lst_s = lane.memory[PROCESSED] if lane.knobs.order == HRRN else sim.clock_s
        preempt(lane, worst)
    emitted = allowed = 0
    for i in range(sim.num_running):
        request = requests[lane.running[i]]
        if not is_prefill(request) and is_free(lane, lane.running[i]):
            emitted += request.num_output_tokens + RETRACT_TOKENS
            allowed += allowed_output(sim, request)
    lane.memory[DECAYED] = FIRST_RATIO - min(1.0, emitted / (allowed + 1))


def sglang(lane):
    """Prompts as long as there are any that fit, at most `consecutive` batches in a row; else every decode."""
    open_batch(lane)
    sim, batch, memory, most = lane.sim, lane.batch, lane.memory, lane.knobs.own[CONSECUTIVE]
    take_stock(lane)
    started, decodes = -1, 0
    for i in range(sim.num_running):
        if not is_prefill(lane.requests[lane.running[i]]):
            decodes += 1
        elif started < 0:
            started = lane.running[i]
    waits = sim.num_waiting > 0 and memory[IS_FULL] == 0.0
    if (waits or started >= 0) and (most == 0 or memory[IN_A_ROW] < most or decodes == 0):
        add_prompts(lane, started)
        if batch.num_items > 0:
            memory[IN_A_ROW] += 1.0
            return
    memory[IN_A_ROW] = 0.0
    if decodes > 0:
        retract(lane)
        room, batch.token_room = batch.token_room, sim.max_num_batched_tokens  # a chunk's size limits prompts alone
        add_all_decodes(lane)
        batch.token_room = room
    keep_going(lane)


SCHEDULERS = {
    "sglang": Compiled(
        "SGLang: chunks of prompts before decodes, never together; admission by memory that outputs will need",
        sglang,
        {"token_budget": SGLANG_CHUNK, "order": FCFS},
        admission="chunk",
        options=("order", "chunk"),
        own=OWN,
        orders=ORDERS,
    ),
}
