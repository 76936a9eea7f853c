"""Niyama: prompts by deadline and remaining work blended, in chunks as large as the slack of decodes allows.

Source: arXiv 2503.22562, its abstract alone. Every decode is in every batch. The chunks beside them are as large as the
batch may grow with each decode in time. Prompts go by deadline + `alpha` * predicted time of what is left of them,
which is earliest deadline first for `alpha` = 0 and shortest remaining first for a large one; prompts that cannot be in
time any more are relegated behind all others.

Guessed: all of how this is done. `alpha` = 1; the slack is `cap` = 0.8 of the smallest TBT SLO or, if that is sooner,
of the time to the next deadline of a decode (see `cap`), in at most 8,192 tokens; a prompt overtakes a started one
between two chunks; relegated prompts go by deadline.
"""

import math

from llmsched_gym.engine.batch import (
    is_free,
    is_prefill,
    open_batch,
    uncached_prefill,
)
from llmsched_gym.engine.due import next_due_s
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.pack import add_all_decodes, add_prompts_by, keep_going
from llmsched_gym.engine.predict import can_make_ttft, time_alone_s
from llmsched_gym.engine.records import NONE
from llmsched_gym.scheduler import Compiled, Own, not_negative

OWN = (Own("alpha", 1.0, not_negative, "seconds of deadline a second of work >= 0"),)
ALPHA = 0
_LATEST, _LATER = 1e11, 1e12  # the largest key, and what is added to it of the relegated


@kernel()
def key(lane, r):
    """Sort key of a prompt; the smallest goes first."""
    due_s = min(next_due_s(lane.requests[r]), _LATEST)
    if not can_make_ttft(lane, r):
        return due_s + _LATER
    alpha = lane.knobs.own[ALPHA]
    return min(due_s + alpha * time_alone_s(lane, r), _LATEST) if alpha > 0.0 else due_s


@kernel()
def next_prompt(lane, admitting, hold, limit):
    """The prompt with the smallest key that is not in the batch, started or, if `admitting`, waiting; -1 if none."""
    best, best_key = -1, math.inf
    for i in range(lane.sim.num_running):
        r = lane.running[i]
        if not is_prefill(lane.requests[r]) or not is_free(lane, r) or (hold and not can_make_ttft(lane, r)):
            continue
        own = key(lane, r)
        if best < 0 or own < best_key or (own == best_key and r < best):
            best, best_key = r, own
    if not admitting:
        return best
    # all who can be in time are in the open part of the line; the others are there by deadline
    r = lane.sim.first_open
    for _ in range(lane.sim.num_waiting + 1):
        if r == NONE:
            break
        if is_free(lane, r) and not (limit and uncached_prefill(lane, r) > lane.batch.limit):
            own = key(lane, r)
            is_held = hold and own >= _LATER
            if not is_held and (best < 0 or own < best_key or (own == best_key and r < best)):
                best, best_key = r, own
        r = lane.requests[r].later
    if hold or (best >= 0 and best_key < _LATER):
        return best
    r = lane.sim.first_expired
    for _ in range(lane.sim.num_waiting + 1):
        if r == NONE:
            break
        if is_free(lane, r) and not (limit and uncached_prefill(lane, r) > lane.batch.limit):
            return r if best < 0 or key(lane, r) < best_key else best
        r = lane.requests[r].later
    return best


def niyama(lane):
    """Every decode, then prompts by blended priority as long as the decodes' slack lasts."""
    open_batch(lane)
    add_all_decodes(lane)
    add_prompts_by(lane, next_prompt)
    keep_going(lane)


SCHEDULERS = {
    "niyama": Compiled(
        "Niyama: prompts by deadline and remaining work, chunks by the slack of decodes (arXiv 2503.22562)",
        niyama,
        {"token_budget": 8192, "cap": 0.8},
        own=OWN,
    ),
}
