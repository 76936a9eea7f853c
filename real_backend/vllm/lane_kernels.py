"""Kernels on a lane whose batches somebody else executes and whose requests come and go one by one.

The steps are the engine's own (:mod:`llmsched_gym.engine.step`, :mod:`llmsched_gym.engine.lifecycle`); what differs is
who says when: a server adds and ends requests, and with two batches in flight a batch is booked by an estimate of its
end, which is put right when the end is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llmsched_gym.engine.batch import clear_sums, is_prefill, predicted_s
from llmsched_gym.engine.blocks import BY_PROMPT, blocks_for, blocks_to_hold
from llmsched_gym.engine.handles import unpack
from llmsched_gym.engine.jit import entry, kernel
from llmsched_gym.engine.lifecycle import admit, average, deliver, leave_running, preempt, tell
from llmsched_gym.engine.queue import expire, leave_waiting, return_to_waiting
from llmsched_gym.engine.records import ABANDONED, FINISHED, PENDING, RUNNING, WAITING
from llmsched_gym.engine.run import address_of, schedule_at
from llmsched_gym.engine.state import lane_of
from llmsched_gym.engine.step import COST_RATIO_STEP, apply_batch, clear_batch, commit
from llmsched_gym.engine.surface import recount

ROWS, TOKENS, PREEMPTED = range(3)  # of the array that `apply_live` fills
LAST_S, FIRST_S, MAX_GAP_S, NUM_GAPS, NUM_LATE = range(5)  # of what each row was served, by measured times
NUM_SERVED = 5


@entry()
def arrive(s, k, r):
    """Request `r`, whose row and arrival are written, joins the line of lane `k`."""
    state = unpack(s)
    lane = lane_of(state, k)
    tell(lane.episode, lane.requests[r], state.arrivals[k, r])
    deliver(lane, r)


@entry()
def begin(s, k, now_s, free_blocks, most_seqs, server_running, most_tokens):
    """A step of lane `k` begins at `now_s`.

    The server has `free_blocks`: what running prompts have been promised of them is not free to the scheduler. Of its
    `most_seqs` sequences `server_running` run, with those that the lane does not know of or has booked as finished.
    """
    lane = lane_of(unpack(s), k)
    sim = lane.sim
    elapsed_s = now_s - sim.clock_s
    sim.clock_s = now_s
    if now_s >= sim.next_expiry_s:
        expire(lane)
    average(sim, elapsed_s)
    promised = 0
    if sim.admission == BY_PROMPT:
        for i in range(sim.num_running):
            request = lane.requests[lane.running[i]]
            promised += max(0, request.num_blocks - blocks_for(sim, request.num_computed_tokens))
    sim.free_blocks = free_blocks - promised
    sim.max_num_seqs = max(1, most_seqs - (server_running - sim.num_running))
    sim.max_num_batched_tokens = most_tokens


@entry()
def apply_live(s, k, formed):
    """Apply the decided batch; fills `formed`, int32 of shape (3, max_num_seqs): requests, tokens, who was preempted.

    Returns how many items there are, how many requests were admitted (the last of ``running``), how many preempted and
    refused, and how many run now.
    """
    state = unpack(s)
    lane, world = lane_of(state, k), state.worlds[k]
    before = lane.sim.num_running
    for i in range(before):
        formed[PREEMPTED, i] = lane.running[i]
    apply_batch(lane, world)
    preempted = 0
    for i in range(before):
        r = formed[PREEMPTED, i]
        if lane.requests[r].phase == WAITING:
            formed[PREEMPTED, preempted] = r
            preempted += 1
    count = 0
    for i in range(lane.batch.num_items):
        r = lane.items[i].request
        if lane.requests[r].num_scheduled_tokens > 0:
            formed[ROWS, count] = r
            formed[TOKENS, count] = lane.requests[r].num_scheduled_tokens
            count += 1
    running = lane.sim.num_running
    return count, running - (before - preempted), preempted, lane.batch.num_refuse, running


@entry()
def expect(s, k):
    """Seconds that the applied batch is expected to take."""
    lane = lane_of(unpack(s), k)
    return predicted_s(lane) * lane.sim.cost_ratio


@entry()
def commit_live(s, k, duration_s, emitted):
    """Book the applied batch; fills `emitted` with the requests that get a token and returns how many.

    A request whose last token this is, as far as it has a largest number of tokens, is finished.
    """
    state = unpack(s)
    lane, world, episode = lane_of(state, k), state.worlds[k], state.episodes[k]
    count = 0
    for i in range(lane.batch.num_items):
        r = lane.items[i].request
        request = lane.requests[r]
        n = request.num_scheduled_tokens
        if n > 0 and request.num_computed_tokens + n >= request.prefill_tokens:
            emitted[count] = r
            count += 1
    patience_s = episode.patience_s
    episode.patience_s = math.inf  # who is served is the server's business
    end_s = commit(lane, world, state.output_tokens[k], state.gaps[k], state.arrivals[k], duration_s)
    episode.patience_s = patience_s
    lane.sim.next_departure_s = math.inf
    episode.num_resolved = 0  # nobody settles them
    return count, end_s


@entry()
def work_of(s, k):
    """Tokens, query-key pairs and KV tokens of the batch in hand."""
    batch = lane_of(unpack(s), k).batch
    return batch.num_tokens, batch.pairs, batch.kv_tokens


@entry()
def clear_live(s, k):
    """Forget the batch of lane `k`, also one that has been applied: nothing of it runs."""
    lane = lane_of(unpack(s), k)
    for i in range(lane.batch.num_items):
        lane.requests[lane.items[i].request].num_scheduled_tokens = 0
    clear_batch(lane)


@entry()
def leave(s, k, r, finished):
    """Request `r` is gone: `finished` with a token in the last batch, or by its client's wish."""
    lane = lane_of(unpack(s), k)
    sim, request = lane.sim, lane.requests[r]
    request.num_scheduled_tokens = 0
    if request.phase == RUNNING:
        leave_running(lane, r)
    elif request.phase == WAITING:
        leave_waiting(lane, r)
    else:
        return
    request.phase = FINISHED if finished else ABANDONED
    if finished:
        sim.num_finished += 1
        sim.output_length_sum += request.num_output_tokens
    else:
        sim.num_abandoned += 1


@entry()
def preempt_live(s, k, r):
    """Running request `r` was preempted by others than its scheduler."""
    lane = lane_of(unpack(s), k)
    lane.requests[r].num_scheduled_tokens = 0
    preempt(lane, r)


@entry()
def take_back(s, k, r):
    """Request `r`, just admitted, was not: it waits again, at the head of the line, as if nothing had been."""
    lane = lane_of(unpack(s), k)
    request = lane.requests[r]
    request.num_scheduled_tokens = 0
    leave_running(lane, r)
    request.phase = WAITING
    request.num_computed_tokens = 0
    return_to_waiting(lane, r)


@entry()
def rebook(s, k, given, count):
    """The batch that runs is this one, int32 of shape (3, count or more): requests, computed tokens, tokens to compute.

    Waiting ones are admitted, in order.
    """
    lane = lane_of(unpack(s), k)
    batch, requests = lane.batch, lane.requests
    for i in range(batch.num_items):
        requests[lane.items[i].request].num_scheduled_tokens = 0
    clear_batch(lane)
    batch.is_marked = 1
    clear_sums(batch)
    for i in range(count):
        r, computed, n = given[0, i], given[1, i], given[2, i]
        request = requests[r]
        if request.phase == WAITING:
            admit(lane, r)
        request.num_computed_tokens = computed
        request.prefill_tokens = max(request.prefill_tokens, computed + n) if n > 1 else request.prefill_tokens
        request.num_blocks = max(request.num_blocks, blocks_to_hold(lane.sim, request, n))
        request.num_scheduled_tokens = n
        lane.items[i].request = r
        lane.items[i].tokens = n
        batch.num_tokens += n
        batch.kv_tokens += computed + n
        if is_prefill(request):
            batch.pairs += n * (computed + (n + 1) * 0.5)
        else:
            batch.num_decodes += 1
    batch.num_items = count
    recount(batch, lane.items, requests, lane.coef_s)


@kernel()
def _serve(served, request, r, end_s):
    """Book a token at `end_s` by measured time."""
    row = served[r]
    if math.isnan(row[FIRST_S]):
        row[FIRST_S] = end_s
    else:
        gap_s = end_s - row[LAST_S]
        row[MAX_GAP_S] = max(row[MAX_GAP_S], gap_s)
        row[NUM_GAPS] += 1.0
        row[NUM_LATE] += gap_s > request.tbt_slo_s
    row[LAST_S] = end_s


@entry()
def observe(s, k, served, emitted, born, births, count, end_s, booked_s, start_s):
    """The batch whose `count` requests in `emitted` got a token began at `start_s` and ended at `end_s`.

    It was booked as ending at `booked_s`. `born` says which request had each row then and `births` which has it now.
    """
    lane = lane_of(unpack(s), k)
    sim, shift_s = lane.sim, end_s - booked_s
    for i in range(count):
        r = emitted[i]
        if births[r] != born[i]:
            continue
        request = lane.requests[r]
        _serve(served, request, r, end_s)
        if shift_s != 0.0 and request.last_token_s == booked_s:
            request.last_token_s = end_s
            request.lst_s += shift_s  # nan stays nan
            if request.first_token_s == booked_s:
                request.first_token_s = end_s
    if shift_s != 0.0 and sim.num_batches > 0:
        sim.mean_batch_s += shift_s / sim.num_batches
        sim.last_batch_s = end_s - start_s
        if sim.last_predicted_s > 0.0:
            sim.cost_ratio += COST_RATIO_STEP * shift_s / sim.last_predicted_s


@entry()
def forget(s, k, served, r):
    """Row `r` is empty."""
    lane = lane_of(unpack(s), k)
    lane.requests[r].phase = PENDING
    served[r, FIRST_S] = math.nan
    served[r, LAST_S] = math.nan
    served[r, MAX_GAP_S] = 0.0
    served[r, NUM_GAPS] = 0.0
    served[r, NUM_LATE] = 0.0


def make_decider(schedule: Any) -> Callable[[Any, int], None]:
    """What forms batches by the compiled scheduler `schedule`: a function of a handle and a lane."""
    address = address_of(schedule)  # handing over a function costs Python 40 us each time
    return lambda s, k: schedule_at(s, k, address)
