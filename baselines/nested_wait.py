"""Nested WAIT: segments of stages, each of which runs when enough requests wait at its entry; knows no lengths.

Source: arXiv 2504.11320 and its authors' code, as this project's notes on them state the rule. Boundaries at `first` =
64 output tokens, 128, 256 and so on cut the stages of requests into `segments` = 4 (see `wait`). n_(k+1) / n_k is the
share of those that came through segment k and went on, plus `margin` = 0.1; n_1 is the memory over the mean context and
the mean stages of finished requests. A segment runs if n_k requests wait at its entry or it is full, lets up to n_k in
and advances all that are inside.

It idles on purpose, at most `flush_s` = 0.1 seconds behind the last arrival, as `wait` does. Until those that were
preempted have their KV again all decodes run, so that memory comes free: the rule as it is written has no preemption.

Guessed: a segment is full with n_k times its length inside, and the last is as long as all before it; thresholds are
rounded down, and at least 1; contexts are counted in blocks, as the mean of the first and last stage of a request with
the mean prompt and output.
"""

from llmsched_gym.baselines.rad import expected_output
from llmsched_gym.baselines.wait import (
    COUNTS,
    FLUSH_S,
    MOST_TYPES,
    NOW,
    TURN,
    add_started,
    is_quiet,
    mean_blocks,
    note_arrivals,
    up_to_eight,
    usable_blocks,
)
from llmsched_gym.engine.batch import add_chunk, add_decode, can_admit, chunk_room, is_prefill, open_batch
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.pack import FCFS, admission_filters, keep_going, next_waiting
from llmsched_gym.scheduler import Compiled, Own, not_negative, positive_int

# In the lane's memory COUNTS are those that have entered a segment, NOW those inside, TURN those at its entry.
OWN_NESTED = (
    FLUSH_S,
    Own("segments", 4, up_to_eight, f"whole number from 1 to {MOST_TYPES}"),
    Own("first", 64, positive_int, "whole number of tokens >= 1"),
    Own("margin", 0.1, not_negative, "share >= 0"),
)
SEGMENTS, FIRST, MARGIN = range(1, len(OWN_NESTED))


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
    is_short = lane.sim.num_waiting > 0 and lane.requests[lane.waiting[0]].num_preemptions > 0
    for i in range(lane.sim.num_running):
        request = lane.requests[lane.running[i]]
        started += is_prefill(request)
        is_short = is_short or (is_prefill(request) and request.num_preemptions > 0)
    everybody, ran, to_enter = is_quiet(lane), False, 0
    n, length, behind = first_threshold(lane), lane.knobs.own[FIRST], 0.0
    segments = int(lane.knobs.own[SEGMENTS])
    for k in range(segments):
        most = max(1, int(n))
        is_full = memory[NOW + k] >= most * length
        runs = everybody or memory[TURN + k] >= most or is_full or (k == 0 and started > 0)
        if runs or is_short:
            ran = True
            most = lane.sim.max_num_seqs if everybody or is_short else most
            add_segment(lane, k, most)
            if k == 0 and runs:
                to_enter = most
        if k + 1 < segments:
            n *= went_on(lane, k)
        behind += length
        length = behind
    if to_enter > 0:  # behind the decodes, which would find no tokens left
        add_started(lane)
        admit_first(lane, to_enter)
    if ran:
        keep_going(lane)


SCHEDULERS = {
    "nested-wait": Compiled(
        "Nested WAIT: a segment of output lengths runs when enough wait at its entry (arXiv 2504.11320)",
        nested_wait,
        {"token_budget": 8192},
        own=OWN_NESTED,
    ),
}
