"""Batches formed one ahead: while one executes, the next is formed on what is known before its tokens are.

vLLM's async scheduling (0.32, `vllm/v1/core/sched/async_scheduler.py`, `vllm/v1/engine/core.py`): of a batch *in
flight* the KV counts as computed and its blocks are held; its tokens, the slots and blocks of who ends with it and the
requests that arrive while it executes come one batch later. A step forms the next batch, then lets the one in flight
land, then the next one takes off:

- ``take_off``: the formed batch is in flight; who is foreseen to end with it is hidden from schedulers, as it needs no
  further token: it stands behind the others in ``lane.running`` and keeps its slot and its blocks;
- ``foresee``, before a decision: requests whose token is in flight look as if it had come when the batch is predicted
  to end, so that a scheduler that goes by deadlines does not see a deadline that is as good as met;
- ``settle``, behind it: everything is again as it is, and victims are looked for among all who run;
- ``land``: tokens are handed out, also to who was preempted meanwhile. Who ends with a token that was not foreseen to
  be its last one leaves a place in the batch that takes off next: computed in vain.

Where nothing is in flight the batch that is formed takes off at once, and the clock stands still.
"""

from __future__ import annotations

import math

from llmsched_gym.engine.batch import is_prefill, predicted_s
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.lifecycle import leave_running, resolve
from llmsched_gym.engine.queue import leave_waiting
from llmsched_gym.engine.records import FINISHED, RUNNING, WAITING
from llmsched_gym.engine.step import NO_GAPS, compare_cost, count_batch, count_finished, emit


@kernel(outline=True)
def foresee(lane, flight, flying):
    """Let a scheduler see the batch in flight as if it had landed, as far as can be foreseen; twice is once."""
    sim, requests = lane.sim, lane.requests
    if not sim.in_flight or flight.is_foreseen:
        return
    flight.is_foreseen = 1
    sim.max_num_seqs -= sim.num_ending  # slots that nobody can have yet
    lands_s = sim.clock_s + flight.price_s * sim.cost_ratio
    for i in range(flight.num_items):
        if flying[i].emits:
            request = requests[flying[i].request]
            flying[i].last_token_s = request.last_token_s
            request.last_token_s = lands_s
            request.lst_s = math.nan
            request.num_output_tokens += 1


@kernel(outline=True)
def forget_foreseen(lane, flight, flying):
    """Undo :func:`foresee`."""
    if not flight.is_foreseen:
        return
    flight.is_foreseen = 0
    lane.sim.max_num_seqs += lane.sim.num_ending
    for i in range(flight.num_items):
        if flying[i].emits:
            request = lane.requests[flying[i].request]
            request.last_token_s = flying[i].last_token_s
            request.num_output_tokens -= 1


@kernel(outline=True)
def settle(lane, flight, flying):
    """Undo :func:`foresee`, and put who is hidden back into the list of running requests, at its place."""
    sim, requests, running = lane.sim, lane.requests, lane.running
    forget_foreseen(lane, flight, flying)
    for i in range(sim.num_running, sim.num_running + sim.num_ending):
        r = running[i]
        j = i
        while j > 0 and requests[running[j - 1]].place > requests[r].place:
            running[j] = running[j - 1]
            j -= 1
        running[j] = r
    sim.num_running += sim.num_ending
    sim.num_ending = 0


@kernel(outline=True)
def land(lane, world, flight, flying, output_tokens, gaps, arrivals, duration_s):
    """The batch in flight, which took `duration_s`, has ended: hand out its tokens; returns when that is."""
    sim, requests = lane.sim, lane.requests
    end_s = count_batch(sim, flight.num_tokens, flight.num_decodes, flight.price_s, duration_s)
    for i in range(flight.num_items):
        if not flying[i].emits:
            continue
        r = flying[i].request
        request = requests[r]
        gap_start = arrivals[r].gap_start if world.records_gaps else NO_GAPS
        if not emit(sim, lane.episode.patience_s, request, gaps, gap_start, end_s):
            continue
        sim.tokens_emitted += 1
        if request.num_output_tokens == output_tokens[r]:
            if request.phase == RUNNING:
                leave_running(lane, r)
            else:
                leave_waiting(lane, r)
            count_finished(sim, request)
            resolve(lane, world, r, FINISHED, end_s)
        elif request.phase == WAITING:  # preempted on the way: its token has come, and its KV is to be computed
            request.prefill_tokens += 1
            sim.waiting_tokens += 1
    sim.in_flight = 0
    compare_cost(sim)
    return end_s


@kernel(outline=True)
def take_off(lane, flight, flying, duration_s):
    """The applied batch is in flight from now on, for `duration_s`; who has left on the way is computed in vain."""
    sim, batch, requests = lane.sim, lane.batch, lane.requests
    flight.duration_s = duration_s
    flight.price_s = batch.price_s if batch.price_s >= 0.0 else predicted_s(lane)
    flight.num_tokens, flight.num_decodes = batch.num_tokens, batch.num_decodes
    flight.kv_cache_usage = sim.kv_cache_usage
    flight.num_items = 0
    for i in range(batch.num_items):
        r = lane.items[i].request
        request = requests[r]
        n = request.num_scheduled_tokens
        if n <= 0:
            continue
        request.num_scheduled_tokens = 0
        if request.phase != RUNNING:
            continue
        request.num_computed_tokens += n
        item = flying[flight.num_items]
        item.request = r
        item.emits = not is_prefill(request)
        flight.num_items += 1
    batch.is_marked = 0
    sim.in_flight = 1
    _hide_ending(lane, flight, flying)


@kernel(outline=True)
def _hide_ending(lane, flight, flying):
    """Move who is foreseen to end with the batch in flight behind the other running requests."""
    sim, requests, running = lane.sim, lane.requests, lane.running
    ending = 0
    for i in range(flight.num_items):
        if flying[i].emits:
            request = requests[flying[i].request]
            most = min(request.max_output_tokens, sim.max_model_len - request.prompt_tokens)
            if request.num_output_tokens + 1 >= most:
                request.num_scheduled_tokens = -1
                ending += 1
    if ending == 0:
        return
    kept = hidden = 0
    for i in range(sim.num_running):
        r = running[i]
        requests[r].place = i
        if requests[r].num_scheduled_tokens < 0:
            requests[r].num_scheduled_tokens = 0
            lane.scratch[hidden] = r
            hidden += 1
        else:
            running[kept] = r
            kept += 1
    for i in range(hidden):
        running[kept + i] = lane.scratch[i]
    sim.num_running, sim.num_ending = kept, hidden
