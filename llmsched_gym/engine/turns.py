"""Sessions: turns enter some time after their parent has finished, and never if it does not.

A request's turns are known to the episode alone (`ARRIVAL`, hidden). When it finishes, each of them is given its
arrival and joins those that are *due*, a binary heap by arrival (ties by index). When it is rejected or refused, or its
client leaves, all its descendants are *cancelled*: they never come.
"""

from __future__ import annotations

import math

from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.records import FINISHED, NONE


@kernel()
def _is_earlier(arrivals, a, b):
    a_s, b_s = arrivals[a].arrival_s, arrivals[b].arrival_s
    return a_s < b_s or (a_s == b_s and a < b)


@kernel()
def _push(of, r):
    due, arrivals = of.due, of.arrivals
    i = of.world.num_due
    of.world.num_due += 1
    for _ in range(32):
        parent = (i - 1) >> 1
        if i == 0 or not _is_earlier(arrivals, r, due[parent]):
            break
        due[i] = due[parent]
        i = parent
    due[i] = r


@kernel()
def pop_due(of):
    """Take the first of the due turns out of their heap; there must be one."""
    due, arrivals, first = of.due, of.arrivals, of.due[0]
    of.world.num_due -= 1
    count = of.world.num_due
    last, i = due[count], 0
    for _ in range(32):
        child = 2 * i + 1
        if child >= count:
            break
        if child + 1 < count and _is_earlier(arrivals, due[child + 1], due[child]):
            child += 1
        if not _is_earlier(arrivals, due[child], last):
            break
        due[i] = due[child]
        i = child
    due[i] = last
    return first


@kernel()
def _cancel_turns(of, r):
    """Cancel all descendants of `r`: a session's requests stand side by side, parents before their turns."""
    world, arrivals = of.world, of.arrivals
    for turn in range(r + 1, world.table_size):
        parent = arrivals[turn].parent
        if parent == NONE:
            break
        # a session may fork, and a sibling have cancelled this one before
        if not arrivals[turn].is_cancelled and (parent == r or arrivals[parent].is_cancelled):
            arrivals[turn].is_cancelled = 1
            world.num_cancelled += 1
            if world.cohort_start <= turn < world.cohort_stop:
                world.num_unresolved -= 1


@kernel()
def follow(of):
    """Let the turns of whoever was resolved since the last call be due, or cancel them."""
    episode, world, arrivals = of.episode, of.world, of.arrivals
    for i in range(world.num_followed, episode.num_resolved):
        r = of.resolved[i]
        turn = arrivals[r].first_turn
        if turn == NONE:
            continue
        if of.requests[r].phase != FINISHED:
            _cancel_turns(of, r)
            continue
        for _ in range(world.table_size):
            if turn == NONE:
                break
            arrivals[turn].arrival_s = of.requests[r].resolved_s + arrivals[turn].think_s
            _push(of, turn)
            turn = arrivals[turn].next_turn
    world.num_followed = episode.num_resolved
    if world.num_due > 0:
        world.next_arrival_s = min(world.next_arrival_s, arrivals[of.due[0]].arrival_s)


@kernel()
def skip_turns(of):
    """Let `next_arrival` name the next root of the table."""
    world = of.world
    for _ in range(world.next_arrival, world.table_size):
        if of.arrivals[world.next_arrival].parent == NONE:
            break
        world.next_arrival += 1


@kernel()
def first_to_come(of):
    """The request that comes next, root or turn, NONE if nobody is known to; sets when that is."""
    world, arrivals, found = of.world, of.arrivals, NONE
    world.next_arrival_s = math.inf
    if world.next_arrival < world.table_size:
        found = world.next_arrival
    if world.num_due > 0 and (found == NONE or _is_earlier(arrivals, of.due[0], found)):
        found = of.due[0]
    if found != NONE:
        world.next_arrival_s = arrivals[found].arrival_s
    return found
