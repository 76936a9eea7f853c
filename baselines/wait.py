"""WAIT and Nested WAIT: nothing runs until enough requests of each type wait, then all stages advance by one.

Source: arXiv 2504.11320 and its authors' code, as this project's notes on them state the rules. A request's stage is
the number of its tokens so far; a request of n output tokens goes through n stages, the first of which is its prompt.

`wait` is told output lengths. Types j are bins of them (`bins` = 8, equal in the logarithm up to the model's context).
With lambda_j the share of arrivals and s_j the mean stages of type j, and B the memory over the mean context,
n_j = B lambda_j / sum(lambda s) prompts, at least one. Nothing runs until every type has n_j prompts waiting; then n_j
of each enter and all later stages advance by one.

`nested-wait` knows no lengths. Boundaries at `first` = 64 tokens, 128, 256 and so on cut stages into `segments` = 4.
n_(k+1) / n_k is the share of those that came through segment k and went on, plus `margin` = 0.1; n_1 is B over the mean
stages of finished requests. A segment runs if n_k requests wait at its entry or it is full, lets up to n_k in and
advances all that are inside.

Both idle on purpose. `flush_s` = 0.1 seconds after the last arrival everybody runs who can, first come first served,
until the next one comes. With it the rules end on every workload; a large one is the rules as they are written.

Guessed: contexts are counted in blocks, as the mean of a request's first and last stage, over all arrivals so far; a
turn whose prompts exceed `budget` = 8,192 tokens takes several batches, in each of which decodes advance; prompts that
find no blocks miss their turn; preempted requests enter with the next turn. A segment is full with n_k times its length
inside; the last is as long as all before it.
"""

import math

from llmsched_gym.baselines.rad import expected_output
from llmsched_gym.engine.batch import add_chunk, add_decode, can_admit, chunk_room, is_free, is_prefill, open_batch
from llmsched_gym.engine.blocks import blocks_for
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.pack import FCFS, add_all_decodes, add_prompts, admission_filters, keep_going, next_waiting
from llmsched_gym.scheduler import Compiled, Own, not_negative, positive_int

MOST_TYPES = 8


def _up_to_eight(text: str) -> int:
    value = positive_int(text)
    if value > MOST_TYPES:
        raise ValueError
    return value


def _seconds(text: str) -> float:
    value = not_negative(text)
    if math.isinf(value):
        raise ValueError  # with nobody to come the engine would stand still for ever
    return value


FLUSH_S = Own("flush_s", 0.1, _seconds, "seconds >= 0, finite")
OWN_WAIT = (FLUSH_S, Own("bins", 8, _up_to_eight, f"whole number from 1 to {MOST_TYPES}"))
FLUSH, BINS = range(len(OWN_WAIT))
OWN_NESTED = (
    FLUSH_S,
    Own("segments", 4, _up_to_eight, f"whole number from 1 to {MOST_TYPES}"),
    Own("first", 64, positive_int, "whole number of tokens >= 1"),
    Own("margin", 0.1, not_negative, "share >= 0"),
)
SEGMENTS, FIRST, MARGIN = range(1, len(OWN_NESTED))
# Places in the lane's memory; from the second on MOST_TYPES each.
LAST_S = 0  # when somebody had last come
BLOCK_STAGES = 1  # sum over arrivals of stages times mean blocks
COUNTS = 8  # arrivals of a type; who has entered a segment
NOW = 16  # of those that wait, how many are of a type; who is inside a segment
TURN = 24  # of this turn, how many of a type are still to enter; who waits at a segment's entry


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
    fits = next_waiting(lane, FCFS, hold, limit) >= 0
    for i in range(sim.num_waiting):
        r = lane.waiting[i]
        j = type_of(lane, r)
        is_back = lane.requests[r].num_preemptions > 0
        if batch.token_room <= 0 or not fits:
            break
        if not is_free(lane, r) or not (is_back or memory[TURN + j] > 0.0):
            continue
        n = chunk_room(lane, r)
        fits = n > 0 and can_admit(lane, r, n)
        if fits:
            add_chunk(lane, r, n)
            if not is_back:
                memory[TURN + j] -= 1.0
    if not fits:  # nobody overtakes: the rest of the turn is missed
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


@kernel()
def segment_of(lane, stage):
    """The segment of a stage; one that equals a boundary is behind it."""
    k, boundary = 0, lane.knobs.own[FIRST]
    for _ in range(int(lane.knobs.own[SEGMENTS]) - 1):
        if stage < boundary:
            break
        k += 1
        boundary *= 2.0
    return k


@kernel()
def is_at_entry(lane, stage):
    """Whether a stage is the entry of a segment behind the first."""
    k = segment_of(lane, stage)
    return k > 0 and stage == lane.knobs.own[FIRST] * 2.0 ** (k - 1)


@kernel()
def count_segments(lane):
    """Count who is inside each segment and who waits at its entry."""
    memory = lane.memory
    for k in range(MOST_TYPES):
        memory[NOW + k] = memory[TURN + k] = 0.0
    memory[TURN] = lane.sim.num_waiting
    for i in range(lane.sim.num_running):
        stage = lane.requests[lane.running[i]].num_output_tokens
        memory[(TURN if is_at_entry(lane, stage) else NOW) + segment_of(lane, stage)] += 1.0


@kernel()
def first_threshold(lane):
    """n_1: requests a stage of which the memory holds, by mean prompt and mean output."""
    output = max(1, int(expected_output(lane.sim)))
    prompt = lane.episode.arrived_tokens // max(1, lane.episode.num_arrived)
    return usable_blocks(lane.sim) / (output * mean_blocks(lane.sim, max(1, prompt), output))


@kernel()
def went_on(lane, k):
    """Share of those that came through segment k and went on to the next, plus the margin; at most 1."""
    memory = lane.memory
    through = memory[COUNTS + k] - memory[NOW + k]
    reached = memory[COUNTS + k + 1] + memory[TURN + k + 1]
    share = min(1.0, reached / through) if through > 0.0 else 1.0
    return min(1.0, share + lane.knobs.own[MARGIN])


@kernel()
def add_segment(lane, k, most):
    """Advance all decodes inside segment k, and up to `most` that wait at its entry."""
    entered = 0
    for i in range(lane.sim.num_running):
        r, request = lane.running[i], lane.requests[lane.running[i]]
        if is_prefill(request) or lane.batch.token_room <= 0 or segment_of(lane, request.num_output_tokens) != k:
            continue
        if is_at_entry(lane, request.num_output_tokens):
            if entered >= most:
                continue
            entered += 1
        add_decode(lane, r)
    lane.memory[COUNTS + k] += entered


@kernel()
def admit_first(lane, most):
    """Let up to `most` prompts in, first come first served."""
    sim, batch = lane.sim, lane.batch
    hold, limit = admission_filters(lane)
    for _ in range(most):
        r = next_waiting(lane, FCFS, hold, limit) if batch.token_room > 0 else -1
        n = chunk_room(lane, r) if r >= 0 and sim.num_running + batch.num_admitted < sim.max_num_seqs else 0
        if n <= 0 or not can_admit(lane, r, n):
            break
        add_chunk(lane, r, n)
        lane.memory[COUNTS] += lane.requests[r].num_preemptions == 0


def nested_wait(lane):
    """Each segment with enough at its entry, or full; everybody if nobody comes; else nothing."""
    open_batch(lane)
    note_arrivals(lane, False)
    count_segments(lane)
    memory, started = lane.memory, 0
    for i in range(lane.sim.num_running):
        started += is_prefill(lane.requests[lane.running[i]])
    everybody, ran = is_quiet(lane), False
    n, length, behind = first_threshold(lane), lane.knobs.own[FIRST], 0.0
    segments = int(lane.knobs.own[SEGMENTS])
    for k in range(segments):
        most = max(1, int(n))
        is_full = memory[NOW + k] >= most * length
        if everybody or memory[TURN + k] >= most or is_full or (k == 0 and started > 0):
            ran = True
            most = lane.sim.max_num_seqs if everybody else most
            add_segment(lane, k, most)
            if k == 0:
                add_started(lane)
                admit_first(lane, most)
        if k + 1 < segments:
            n *= went_on(lane, k)
        behind += length
        length = behind
    if ran:
        keep_going(lane)


SCHEDULERS = {
    "wait": Compiled(
        "WAIT: nothing runs until enough prompts of each output length wait; knows the lengths (arXiv 2504.11320)",
        wait,
        {"token_budget": 8192},
        clairvoyant=True,
        own=OWN_WAIT,
    ),
    "nested-wait": Compiled(
        "Nested WAIT: a segment of output lengths runs when enough wait at its entry (arXiv 2504.11320)",
        nested_wait,
        {"token_budget": 8192},
        own=OWN_NESTED,
    ),
}
