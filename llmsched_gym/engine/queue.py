"""The waiting list, and its index: what a scheduler looks for in a long line without walking along it.

``lane.waiting`` lists a replica's waiting requests, those preempted at its head, the others by arrival. Under overload
nearly all of them have missed their TTFT SLO for good: nothing that a scheduler asks of them changes any more. So the
line has two parts, linked through the requests' records:

- *open*: requests whose first token can still come in time, as far as the clock knows, and those that have one. In the
  order of ``lane.waiting``, to be looked at one by one, because predictions about them change from batch to batch.
- *expired*: those without a token whose TTFT SLO is over, which is so until they leave. By deadline, and in two search
  trees by length, one of class 0, one of the rest. The trees are treaps (Aragon and Seidel, FOCS 1989): a request's
  rank in its tree is a hash of its index, so that trees are balanced whatever the order of lengths.

With prefix caching what a request has to compute changes with what is cached: then all are open.

Joining, expiring and leaving take time in the logarithm of the line's length, but for the list itself, whose indices
move up by one.
"""

from __future__ import annotations

import math

from llmsched_gym.engine.due import left_s, next_due_s
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.records import NONE


@kernel()
def is_shorter(requests, a, b):
    """Whether waiting request `a` has the shorter prompt, or, as long as `b`, the smaller index."""
    length_a, length_b = requests[a].prefill_tokens, requests[b].prefill_tokens
    return length_a < length_b or (length_a == length_b and a < b)


@kernel()
def rank(r):
    """The root of each subtree has its highest rank."""
    return (int(r) * 2654435761) & 0xFFFFFFFF


@kernel()
def _root(sim, strict):
    return sim.expired_strict if strict else sim.expired_others


@kernel()
def _hang(sim, requests, strict, parent, longer, node):
    """Make `node` a child of `parent`: its longer or its shorter side; without a parent it is the tree's root."""
    if parent == NONE:
        if strict:
            sim.expired_strict = node
        else:
            sim.expired_others = node
    elif longer:
        requests[parent].longer = node
    else:
        requests[parent].shorter = node


@kernel()
def _plant(sim, requests, r):
    """Put expired request `r` into the tree of its class."""
    strict = requests[r].slo_class == 0
    parent, longer, node = NONE, False, _root(sim, strict)
    for _ in range(sim.num_waiting + 1):
        if node == NONE or rank(node) < rank(r):
            break
        parent, longer = node, is_shorter(requests, node, r)
        node = requests[node].longer if longer else requests[node].shorter
    _hang(sim, requests, strict, parent, longer, r)
    # what was there is split into those shorter and those longer than r
    below, above = r, r
    for _ in range(sim.num_waiting + 1):
        if node == NONE:
            break
        if is_shorter(requests, node, r):
            _hang(sim, requests, strict, below, below != r, node)
            below = node
            node = requests[node].longer
        else:
            _hang(sim, requests, strict, above, above == r, node)
            above = node
            node = requests[node].shorter
    _hang(sim, requests, strict, below, below != r, NONE)
    _hang(sim, requests, strict, above, above == r, NONE)


@kernel()
def _uproot(sim, requests, r):
    """Take expired request `r` out of its tree."""
    strict = requests[r].slo_class == 0
    parent, longer, node = NONE, False, _root(sim, strict)
    for _ in range(sim.num_waiting + 1):
        if node == r:
            break
        parent, longer = node, is_shorter(requests, node, r)
        node = requests[node].longer if longer else requests[node].shorter
    below, above = requests[r].shorter, requests[r].longer
    for _ in range(sim.num_waiting + 1):
        if below == NONE or above == NONE:
            break
        if rank(below) >= rank(above):
            _hang(sim, requests, strict, parent, longer, below)
            parent, longer, below = below, True, requests[below].longer
        else:
            _hang(sim, requests, strict, parent, longer, above)
            parent, longer, above = above, False, requests[above].shorter
    _hang(sim, requests, strict, parent, longer, below if below != NONE else above)


@kernel()
def shortest_expired(lane, strict, behind):
    """The shortest expired request of its tree behind request `behind`, or of all (NONE); NONE if there is none."""
    requests, found, node = lane.requests, NONE, _root(lane.sim, strict)
    for _ in range(lane.sim.num_waiting + 1):
        if node == NONE:
            break
        if behind == NONE or is_shorter(requests, behind, node):
            found, node = node, requests[node].shorter
        else:
            node = requests[node].longer
    return found


@kernel()
def _link(lane, r, earlier, expired):
    """Put `r` behind `earlier` in its part of the line."""
    sim, requests = lane.sim, lane.requests
    first = sim.first_expired if expired else sim.first_open
    later = first if earlier == NONE else requests[earlier].later
    requests[r].has_expired, requests[r].earlier, requests[r].later = expired, earlier, later
    if earlier != NONE:
        requests[earlier].later = r
    elif expired:
        sim.first_expired = r
    else:
        sim.first_open = r
    if later != NONE:
        requests[later].earlier = r
    elif expired:
        sim.last_expired = r
    else:
        sim.last_open = r


@kernel()
def _unlink(lane, r):
    """Take `r` out of its part of the line."""
    sim, requests = lane.sim, lane.requests
    earlier, later, expired = requests[r].earlier, requests[r].later, requests[r].has_expired
    if earlier != NONE:
        requests[earlier].later = later
    elif expired:
        sim.first_expired = later
    else:
        sim.first_open = later
    if later != NONE:
        requests[later].earlier = earlier
    elif expired:
        sim.last_expired = earlier
    else:
        sim.last_open = earlier


@kernel()
def _count(lane, r, place, earlier):
    """`r`, written into the list, is one of the open requests."""
    sim, request = lane.sim, lane.requests[r]
    request.place = place
    sim.num_waiting += 1
    sim.waiting_tokens += request.prefill_tokens
    _link(lane, r, earlier, False)
    if request.num_output_tokens == 0 and not sim.prefix_caching:
        sim.next_expiry_s = min(sim.next_expiry_s, next_due_s(request))


@kernel()
def join_waiting(lane, r):
    """Put `r` at the end of the line."""
    sim = lane.sim
    lane.waiting[sim.num_waiting] = r
    sim.last_place += 1
    _count(lane, r, sim.last_place, sim.last_open)


@kernel()
def return_to_waiting(lane, r):
    """Put preempted request `r` at the head of the line."""
    sim = lane.sim
    for i in range(sim.num_waiting, 0, -1):
        lane.waiting[i] = lane.waiting[i - 1]
    lane.waiting[0] = r
    sim.first_place -= 1
    _count(lane, r, sim.first_place, NONE)


@kernel()
def leave_waiting(lane, r):
    """Take `r` out of the line."""
    sim, requests, waiting = lane.sim, lane.requests, lane.waiting
    low, high = 0, sim.num_waiting - 1
    while low < high:
        middle = (low + high) // 2
        if requests[waiting[middle]].place < requests[r].place:
            low = middle + 1
        else:
            high = middle
    for i in range(low, sim.num_waiting - 1):
        waiting[i] = waiting[i + 1]
    sim.num_waiting -= 1
    sim.waiting_tokens -= requests[r].prefill_tokens
    _unlink(lane, r)
    if requests[r].has_expired:
        _uproot(sim, requests, r)


@kernel()
def has_expired(request, now_s):
    """Whether a request's TTFT SLO is over before its first token: it will not make it any more, whatever comes."""
    return request.num_output_tokens == 0 and left_s(request, now_s) <= 0.0


@kernel()
def expire(lane):
    """Move all open requests whose TTFT SLO is over by now to the expired ones."""
    sim, requests = lane.sim, lane.requests
    earliest_s, r = math.inf, sim.first_open
    for _ in range(sim.num_waiting + 1):
        if r == NONE:
            break
        request, following = requests[r], requests[r].later
        if has_expired(request, sim.clock_s):
            _unlink(lane, r)
            _link(lane, r, _due_before(lane, r), True)
            _plant(sim, requests, r)
        elif request.num_output_tokens == 0:
            earliest_s = min(earliest_s, next_due_s(request))
        r = following
    sim.next_expiry_s = earliest_s


@kernel()
def _due_before(lane, r):
    """Behind whom `r` stands among the expired: found from the end, as requests expire about by deadline."""
    requests, before, due_s = lane.requests, lane.sim.last_expired, next_due_s(lane.requests[r])
    for _ in range(lane.sim.num_waiting + 1):
        if before == NONE:
            break
        other_s = next_due_s(requests[before])
        if other_s < due_s or (other_s == due_s and before < r):
            break
        before = requests[before].earlier
    return before
