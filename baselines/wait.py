"""WAIT: nothing runs until enough requests of each type wait, then all stages advance by one.

Source: arXiv 2504.11320 and its authors' code, as this project's notes on them state the rule. A request's stage is the
number of its tokens so far; a request of n output tokens goes through n stages, the first of which is its prompt.

The rule is told output lengths. Types j are bins of them (`bins` = 8, equal in the logarithm, up to the context limit).
With lambda_j the share of arrivals and s_j the mean stages of type j, and B the memory over the mean context,
n_j = B lambda_j / sum(lambda s) prompts, at least one. Nothing runs until every type has n_j prompts waiting; then n_j
of each enter and all later stages advance by one.

It idles on purpose. `flush_s` = 0.1 seconds after the last arrival everybody runs who can, first come first served,
until the next one comes. With it the rule ends on every workload; a large one is the rule as it is written.

Guessed: contexts are counted in blocks, as the mean of a request's first and last stage, over all arrivals so far; a
turn whose prompts exceed `budget` = 8,192 tokens takes several batches, in each of which decodes advance; prompts that
find no blocks miss their turn; preempted requests enter with the next turn.
"""

import math

from llmsched_gym.engine.batch import (
    add_chunk,
    can_admit,
    chunk_room,
    is_free,
    is_prefill,
    open_batch,
    uncached_prefill,
)
from llmsched_gym.engine.blocks import blocks_for
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.pack import FCFS, add_all_decodes, add_prompts, admission_filters, keep_going
from llmsched_gym.engine.predict import can_make_ttft
from llmsched_gym.scheduler import Compiled, Own, not_negative, positive_int

MOST_TYPES = 8
MOST_IDLE_S = 3600


def up_to_eight(text: str) -> int:
    """A whole number from 1 to MOST_TYPES; ValueError otherwise."""
    value = positive_int(text)
    if value > MOST_TYPES:
        raise ValueError
    return value


def _seconds(text: str) -> float:
    value = not_negative(text)
    if value > MOST_IDLE_S:
        raise ValueError  # with nobody to come the engine would be taken to stand still
    return value


FLUSH_S = Own("flush_s", 0.1, _seconds, f"seconds from 0 to {MOST_IDLE_S:,}")
OWN_WAIT = (FLUSH_S, Own("bins", 8, up_to_eight, f"whole number from 1 to {MOST_TYPES}"))
FLUSH, BINS = range(len(OWN_WAIT))
# Places in the lane's memory; from the third on MOST_TYPES each.
LAST_S = 0  # when somebody had last come
BLOCK_STAGES = 1  # sum over arrivals of stages times mean blocks
COUNTS = 8  # arrivals of a type
NOW = 16  # of those that wait, how many are of a type
TURN = 24  # of this turn, how many of a type are still to enter


@kernel()
def type_of(lane, r):
    """The bin of a request's output length."""
    bins, hint = int(lane.knobs.own[BINS]), lane.requests[r].length_hint
    if not hint > 1.0:  # one token, or no hint
        return 0
    return min(bins - 1, int(bins * math.log(hint) / math.log(max(2.0, float(lane.sim.max_model_len)))))


@kernel()
def mean_blocks(sim, prompt, stages):
    """Blocks that a request holds, as the mean of its first and last stage."""
    return 0.5 * (blocks_for(sim, prompt) + blocks_for(sim, prompt + max(1, stages) - 1))


@kernel()
def note_arrivals(lane, by_type):
    """Count newcomers, the end of the line; nobody else needs the `lst_s` of those that wait."""
    sim, memory = lane.sim, lane.memory
    for i in range(sim.num_waiting - 1, -1, -1):
        r, request = lane.waiting[i], lane.requests[lane.waiting[i]]
        if not math.isnan(request.lst_s) or request.num_preemptions > 0:
            break
        request.lst_s = memory[LAST_S] = sim.clock_s
        if by_type:
            stages = max(1, int(request.length_hint)) if request.length_hint >= 1.0 else 1
            memory[COUNTS + type_of(lane, r)] += 1.0
            memory[BLOCK_STAGES] += stages * mean_blocks(sim, request.prompt_tokens, stages)


@kernel()
def is_quiet(lane):
    """Whether nobody has come for so long that everybody may run."""
    return lane.sim.clock_s - lane.memory[LAST_S] >= lane.knobs.own[FLUSH]


@kernel()
def run_all(lane):
    """Every decode, then prompts, first come first served."""
    add_all_decodes(lane)
    add_prompts(lane, FCFS)
    keep_going(lane)


@kernel()
def add_started(lane):
    """Go on with the prompts under way; returns how many there are."""
    count = 0
    for i in range(lane.sim.num_running):
        r = lane.running[i]
        if is_prefill(lane.requests[r]):
            count += 1
            n = chunk_room(lane, r)
            if n > 0:
                add_chunk(lane, r, n)
    return count


@kernel()
def usable_blocks(sim):
    """KV blocks that admission may use."""
    return max(1, sim.total_blocks - sim.watermark_blocks)


@kernel()
def begin_turn(lane):
    """If every type has its prompts waiting, note how many of each are to enter; returns whether that is so."""
    memory = lane.memory
    bins = int(lane.knobs.own[BINS])
    for j in range(bins):
        memory[NOW + j] = 0.0
    for i in range(lane.sim.num_waiting):
        if lane.requests[lane.waiting[i]].num_preemptions == 0:
            memory[NOW + type_of(lane, lane.waiting[i])] += 1.0
    for j in range(bins):
        share = memory[COUNTS + j] / max(1.0, memory[BLOCK_STAGES])
        memory[TURN + j] = max(1.0, math.floor(usable_blocks(lane.sim) * share)) if memory[COUNTS + j] > 0 else 0.0
    is_ready = lane.sim.num_waiting > 0
    for j in range(bins):
        is_ready = is_ready and memory[NOW + j] >= memory[TURN + j]
    if not is_ready:
        for j in range(bins):
            memory[TURN + j] = 0.0
    return is_ready


@kernel()
def left_of_turn(memory):
    """Prompts of this turn that are still to enter."""
    left = 0.0
    for j in range(MOST_TYPES):
        left += memory[TURN + j]
    return left


@kernel()
def enter_turn(lane):
    """Let in whose turn it is, and the preempted, as long as tokens, slots and blocks last."""
    sim, batch, memory = lane.sim, lane.batch, lane.memory
    hold, limit = admission_filters(lane)
    fits = True
    for i in range(sim.num_waiting):
        r = lane.waiting[i]
        j = type_of(lane, r)
        is_back = lane.requests[r].num_preemptions > 0
        if batch.token_room <= 0 or not fits:
            break
        if not is_free(lane, r) or not (is_back or memory[TURN + j] > 0.0):
            continue
        if (limit and uncached_prefill(lane, r) > batch.limit) or (hold and not can_make_ttft(lane, r)):
            continue
        n = chunk_room(lane, r)
        fits = n > 0 and can_admit(lane, r, n)
        if fits:
            add_chunk(lane, r, n)
            if not is_back:
                memory[TURN + j] -= 1.0
    if batch.token_room > 0:  # nobody overtakes one that finds no blocks: the rest of the turn is missed
        for j in range(MOST_TYPES):
            memory[TURN + j] = 0.0


def wait(lane):
    """A turn if every type has enough waiting, or is under way; everybody if nobody comes; else nothing."""
    open_batch(lane)
    note_arrivals(lane, True)
    if is_quiet(lane):
        for j in range(MOST_TYPES):
            lane.memory[TURN + j] = 0.0
        run_all(lane)
        return
    started = 0
    for i in range(lane.sim.num_running):
        started += is_prefill(lane.requests[lane.running[i]])
    if left_of_turn(lane.memory) == 0.0 and started == 0 and not begin_turn(lane):
        return
    add_all_decodes(lane)
    add_started(lane)
    enter_turn(lane)
    keep_going(lane)


SCHEDULERS = {
    "wait": Compiled(
        "WAIT: nothing runs until enough prompts of each output length wait; knows the lengths (arXiv 2504.11320)",
        wait,
        {"token_budget": 8192},
        clairvoyant=True,
        own=OWN_WAIT,
    ),
}
