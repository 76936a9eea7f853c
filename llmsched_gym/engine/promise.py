"""Which prompts can all be on time, and how much slack they leave: Moore's algorithm on the prompts of a lane.

Moore (Management Science 15, 1968; with Hodgson) minimises the number of late jobs on one machine: go through the jobs
by deadline, and whenever one would be late drop the longest so far. Here jobs are the prompts that can still make their
TTFT SLO, and their times what the scheduler's own profile predicts of them alone, times how much longer than predicted
batches have taken lately, stretched for what runs beside them.
"""

from __future__ import annotations

import math

from llmsched_gym.engine.batch import insert_sorted, is_prefill, uncached_prefill
from llmsched_gym.engine.due import left_s
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.predict import time_alone_s
from llmsched_gym.engine.records import NONE, WAITING

STRETCH = 1.3  # chosen on selection seeds of the drift suite
NONE_DROPPED = 1 << 30


@kernel()
def _add_candidate(lane, count, r):
    """Sort `r` into ``lane.scratch[:count]`` by its TTFT SLO's end if it can make it; returns how many there are."""
    request = lane.requests[r]
    if request.num_output_tokens > 0 or not is_prefill(request) or count >= lane.sim.max_num_seqs:
        return count
    time_s = left_s(request, lane.sim.clock_s)
    if time_s > 0.0 and time_alone_s(lane, r) <= time_s:
        insert_sorted(lane, count, r, time_s)
        return count + 1
    return count


@kernel()
def _length(lane, r):
    """Prompt tokens that `r` has to compute in all: those that it finds, or has found, cached are none of them."""
    request = lane.requests[r]
    return uncached_prefill(lane, r) if request.phase == WAITING else request.prefill_tokens - request.num_cached_tokens


@kernel()
def _drop_longest(lane, count):
    """Take back the longest of the first `count` promises; returns its time alone."""
    worst, longest_s = -1, -1.0
    for i in range(count):
        if lane.keys[i] < math.inf:
            alone_s = time_alone_s(lane, lane.scratch[i])
            if alone_s > longest_s:
                worst, longest_s = i, alone_s
    lane.keys[worst] = math.inf
    return longest_s


@kernel()
def promise(lane, stretch):
    """Promise as many prompts as can be on time; uses ``lane.scratch`` and ``lane.keys``.

    Returns (promised, dropped, slack_s, work_s, shortest): how many prompts are promised, how many could be on time but
    not with the others, the least time that a promised one has left when it and all before it are served, the seconds
    that serving them takes alone, and how many tokens the shortest dropped prompt has to compute, NONE_DROPPED if there
    is none.
    """
    count = 0
    for i in range(lane.sim.num_running):
        count = _add_candidate(lane, count, lane.running[i])
    r = lane.sim.first_open
    for _ in range(lane.sim.num_waiting + 1):
        if r == NONE:
            break
        count = _add_candidate(lane, count, r)
        r = lane.requests[r].later
    stretch *= lane.sim.cost_ratio
    keys, work_s, dropped = lane.keys, 0.0, 0
    for i in range(count):
        work_s += time_alone_s(lane, lane.scratch[i])
        if work_s * stretch > keys[i]:
            work_s -= _drop_longest(lane, i + 1)
            dropped += 1
    shortest, slack_s, work_s = NONE_DROPPED, math.inf, 0.0
    for i in range(count):
        r = lane.scratch[i]
        if keys[i] == math.inf:
            shortest = min(shortest, _length(lane, r))
        else:
            work_s += time_alone_s(lane, r)
            slack_s = min(slack_s, keys[i] - work_s * stretch)
    return count - dropped, dropped, slack_s, work_s, shortest
