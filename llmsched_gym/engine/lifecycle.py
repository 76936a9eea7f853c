"""A request's life: it enters, is delivered, admitted, preempted, refused, loses patience; and the clock behind it."""

from __future__ import annotations

import math

from llmsched_gym.engine.blocks import allocate, blocks_for, free
from llmsched_gym.engine.due import next_due_s, open_lateness_s
from llmsched_gym.engine.eviction import forsake, keep
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.queue import expire, join_waiting, leave_waiting, return_to_waiting
from llmsched_gym.engine.records import ABANDONED, NONE, REFUSED, REJECTED, RUNNING, WAITING
from llmsched_gym.engine.state import Episode
from llmsched_gym.engine.turns import first_to_come, follow, pop_due, skip_turns


@kernel()
def _remove(array, count, value):
    """Take `value` out of ``array[:count]``, keeping the order."""
    for i in range(count):
        if array[i] == value:
            for j in range(i, count - 1):
                array[j] = array[j + 1]
            return


@kernel()
def take_off_running(lane, r):
    """Take `r` off the list of running requests; what it holds and its phase are left to the caller."""
    _remove(lane.running, lane.sim.num_running, r)
    lane.sim.num_running -= 1


@kernel()
def leave_running(lane, r):
    """Take `r` off the list of running requests and free its blocks; its phase is left to the caller."""
    take_off_running(lane, r)
    free(lane, r)


@kernel()
def resolve(of, world, r, phase, now_s):
    """Request `r`, `of` a lane or an Episode, is done with."""
    episode, request = of.episode, of.requests[r]
    request.phase = phase
    request.resolved_s = now_s
    of.resolved[episode.num_resolved] = r
    episode.num_resolved += 1
    if world.cohort_start <= r < world.cohort_stop:
        world.num_unresolved -= 1


@kernel()
def tell_prefix(of, r):
    """What the prompt of `r` begins with becomes known."""
    prefix, given = of.prefixes[r], of.arrivals[r]
    prefix.shares_with = given.shares_with
    prefix.shared_tokens = given.shared_tokens
    prefix.turn = given.turn


@kernel()
def tell(episode, request, given):
    """What the client of a request asks for becomes known."""
    request.arrival_s = given.arrival_s
    request.ttft_slo_s = given.ttft_slo_s
    request.tbt_slo_s = given.tbt_slo_s
    request.length_hint = given.length_hint
    request.session_id = given.session_id
    request.slo_class = given.slo_class
    request.prompt_tokens = given.prompt_tokens
    request.prefill_tokens = given.prompt_tokens
    request.max_output_tokens = given.max_output_tokens
    episode.num_arrived += 1
    episode.arrived_tokens += given.prompt_tokens


@kernel()
def enter(of, r):
    """Request `r` `of` an Episode comes: its row is written, and what can never fit is rejected (rule 7).

    Returns whether it is to be delivered to a replica.
    """
    episode, given = of.episode, of.arrivals[r]
    tell(episode, of.requests[r], given)
    if of.prefixes.shape[0] > 0:
        tell_prefix(of, r)
    if given.prompt_tokens + of.output_tokens[r] > episode.largest_request:
        episode.num_rejected += 1
        resolve(of, of.world, r, REJECTED, given.arrival_s)
        return False
    return True


@kernel()
def deliver(lane, r):
    """Put request `r`, which has entered, at the end of a replica's line."""
    sim, request = lane.sim, lane.requests[r]
    request.phase = WAITING
    sim.new_arrivals += 1
    sim.new_tokens += request.prompt_tokens
    join_waiting(lane, r)
    sim.next_departure_s = min(sim.next_departure_s, next_due_s(request) + lane.episode.patience_s)
    keep(lane, r)


@kernel()
def let_in(lane, of, now_s):
    """All requests of the table that are due by `now_s` enter and, there being one replica, are delivered to it."""
    world = of.world
    if world.has_turns:
        _let_turns_in(lane, of, now_s)
        return
    for r in range(world.next_arrival, world.table_size):
        world.next_arrival_s = of.arrivals[r].arrival_s
        if world.next_arrival_s > now_s:
            return
        world.next_arrival += 1
        if enter(of, r):
            deliver(lane, r)
    world.next_arrival_s = math.inf


@kernel()
def _let_turns_in(lane, of, now_s):
    """:func:`let_in` for roots and turns, in the order in which they come."""
    world = of.world
    skip_turns(of)
    for _ in range(world.table_size + 1):
        r = first_to_come(of)
        if r == NONE or world.next_arrival_s > now_s:
            break
        if of.arrivals[r].parent == NONE:
            world.next_arrival += 1
            skip_turns(of)
        else:
            pop_due(of)
        if enter(of, r):
            deliver(lane, r)
        else:
            forsake(lane, r)
    follow(of)  # who is rejected takes its turns with it


@kernel()
def take_next(of):
    """Take the request that comes next, root or turn, off the table or the due turns; NONE if nobody is to come.

    ``world.next_arrival_s`` then says when the one behind it comes.
    """
    world = of.world
    if world.has_turns:
        skip_turns(of)
        r = first_to_come(of)
        if r == NONE:
            return r
        if of.arrivals[r].parent == NONE:
            world.next_arrival += 1
            skip_turns(of)
        else:
            pop_due(of)
        first_to_come(of)
        return r
    if world.next_arrival >= world.table_size:
        return NONE
    r = world.next_arrival
    world.next_arrival += 1
    world.next_arrival_s = math.inf
    if world.next_arrival < world.table_size:
        world.next_arrival_s = of.arrivals[world.next_arrival].arrival_s
    return r


@kernel()
def remember(lane, of, part, parts):
    """Let the cache of a replica hold what requests that are past have left there, as far as memory goes.

    With several replicas each was sent the sessions of its part: every `parts`-th one.
    """
    sim = lane.sim
    for r in range(of.world.num_past):
        if of.arrivals[r].session_id % parts != part:
            continue
        tell_prefix(of, r)
        request = lane.requests[r]
        request.session_id = of.arrivals[r].session_id
        known = of.arrivals[r].prompt_tokens + of.output_tokens[r] - 1  # nobody has computed its last token
        if blocks_for(sim, known) <= min(sim.total_blocks, sim.row_blocks):
            request.prefill_tokens = known
            allocate(lane, r, known)
            request.num_computed_tokens = known
            free(lane, r)
        request.prefill_tokens = request.num_computed_tokens = request.num_cached_tokens = 0


@kernel()
def admit(lane, r):
    """Move waiting `r` to the end of the running ones, and note the time if it is the first time."""
    sim = lane.sim
    leave_waiting(lane, r)
    request = lane.requests[r]
    request.phase = RUNNING
    lane.running[sim.num_running] = r
    sim.num_running += 1
    if math.isnan(request.first_scheduled_s):
        request.first_scheduled_s = sim.clock_s


@kernel()
def preempt(lane, r):
    """Free the blocks of running `r` and put it at the head of waiting; its KV is to be computed again (rule 5)."""
    sim, request = lane.sim, lane.requests[r]
    leave_running(lane, r)
    request.phase = WAITING
    request.num_computed_tokens = 0
    request.prefill_tokens = request.prompt_tokens + request.num_output_tokens
    request.num_preemptions += 1
    sim.num_preemptions += 1
    if sim.tokens_emitted != sim.preempted_at_token:
        sim.vain_preemptions = 0
    sim.preempted_at_token = sim.tokens_emitted
    sim.vain_preemptions += 1
    return_to_waiting(lane, r)


@kernel()
def refuse(lane, world, r):
    """Take waiting `r` off the line: it is done with, as refused."""
    leave_waiting(lane, r)
    forsake(lane, r)
    lane.sim.num_refused += 1
    resolve(lane, world, r, REFUSED, lane.sim.clock_s)


@kernel()
def _abandon(lane, world, r):
    """The client of `r` has lost patience: free what it holds."""
    sim, request = lane.sim, lane.requests[r]
    if request.phase == RUNNING:
        leave_running(lane, r)
    else:
        leave_waiting(lane, r)
    forsake(lane, r)
    request.lateness_s = lane.episode.patience_s
    sim.num_abandoned += 1
    resolve(lane, world, r, ABANDONED, sim.clock_s)


@kernel()
def depart(lane, world):
    """Let everybody leave whose patience is over; before ``next_departure_s`` nobody's is."""
    sim, requests, patience_s = lane.sim, lane.requests, lane.episode.patience_s
    earliest = math.inf
    for running in range(2):
        i = 0
        for _ in range(sim.num_running + sim.num_waiting):
            if i >= (sim.num_running if running else sim.num_waiting):
                break
            r = lane.running[i] if running else lane.waiting[i]
            request = requests[r]
            if request.lateness_s + open_lateness_s(request, sim.clock_s) >= patience_s:
                _abandon(lane, world, r)
                continue
            i += 1
            earliest = min(earliest, next_due_s(request) + patience_s - request.lateness_s)
    sim.next_departure_s = earliest


@kernel()
def average(sim, elapsed_s):
    """Take who came to a replica in the last `elapsed_s` seconds into its averages."""
    arrivals, tokens = sim.new_arrivals, sim.new_tokens
    sim.new_arrivals = sim.new_tokens = 0
    keep_10s, keep_60s = math.exp(-elapsed_s / 10.0), math.exp(-elapsed_s / 60.0)
    sim.arrivals_10s = sim.arrivals_10s * keep_10s + arrivals / 10.0
    sim.arrivals_60s = sim.arrivals_60s * keep_60s + arrivals / 60.0
    sim.arrived_tokens_10s = sim.arrived_tokens_10s * keep_10s + tokens / 10.0
    sim.arrived_tokens_60s = sim.arrived_tokens_60s * keep_60s + tokens / 60.0


@kernel(inline="always")
def pass_time(lane, world, arrivals, output_tokens, due, now_s):
    """Set the clock of an episode's one replica: clients come and leave."""
    elapsed_s = now_s - lane.sim.clock_s
    lane.sim.clock_s = now_s
    of = Episode(lane.episode, world, lane.requests, lane.resolved, lane.prefixes, arrivals, output_tokens, due)
    if world.has_turns:
        follow(of)
    if now_s >= world.next_arrival_s:
        let_in(lane, of, now_s)
    lose_patience(lane, of, now_s)  # after it: who came early in a long batch may have left again
    average(lane.sim, elapsed_s)


@kernel()
def lose_patience(lane, of, now_s):
    """At a replica's time `now_s` clients leave, their turns with them, and deadlines are over."""
    if now_s >= lane.sim.next_departure_s:
        depart(lane, of.world)
        if of.world.has_turns:
            follow(of)
    if now_s >= lane.sim.next_expiry_s:
        expire(lane)
