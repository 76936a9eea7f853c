"""What a backend is told of the batch that was applied: whose tokens, behind how many, who holds KV and who lost it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from llmsched_gym.engine.handles import unpack
from llmsched_gym.engine.jit import entry, kernel
from llmsched_gym.engine.places import places_of
from llmsched_gym.engine.records import WAITING
from llmsched_gym.engine.run import apply_formed
from llmsched_gym.engine.state import State, lane_of


class ScheduledBatch(NamedTuple):
    """The applied batch as a backend gets it; arrays of shape (num_items,), by order of scheduling."""

    request: np.ndarray  # int32, request index
    num_tokens: np.ndarray  # int32, tokens to compute
    num_computed: np.ndarray  # int32, tokens whose KV is held already
    emits: np.ndarray  # bool, whether the pass produces a token
    preempted: np.ndarray  # int32, requests whose KV was freed before this batch
    running: np.ndarray  # int32, all requests that hold KV; whoever left since the last batch is not among them
    # with prefix caching int32 (num_items, most blocks of an item), NONE behind an item's last: places of its blocks,
    # those that this batch fills included; what is computed already lies there, whoever computed it. Else None.
    blocks: np.ndarray | None = None


REQUEST, TOKENS, COMPUTED, RUNS, LOST, LOST_BEFORE, NUM_ROWS = range(7)
"""Rows of what kernels tell of a batch; LOST_BEFORE are preemptions before it."""


def apply_told(state: State, handle: Any, k: int) -> ScheduledBatch | None:
    """Apply the decided batch of lane `k`; what it is, or None if nothing is left of it."""
    told, emits = _room(state)
    num_items, num_running, num_lost = apply_told_env(handle, k, told, emits)
    return _scheduled(state, k, told, emits, num_items, num_running, num_lost) if num_items else None


def tell(state: State, handle: Any, k: int) -> ScheduledBatch:
    """The applied batch of lane `k`, without those that were preempted for it."""
    told, emits = _room(state)
    num_items, num_running = tell_env(handle, k, told, emits)
    return _scheduled(state, k, told, emits, num_items, num_running, 0)


def _room(state: State) -> tuple[np.ndarray, np.ndarray]:
    seqs = state.running.shape[1]
    return np.empty((NUM_ROWS, 2 * seqs), np.int32), np.empty(seqs, np.bool_)  # running ones and admitted ones


def _scheduled(
    state: State, k: int, told: np.ndarray, emits: np.ndarray, num_items: int, num_running: int, num_lost: int
) -> ScheduledBatch:
    request, num_tokens, computed = told[:RUNS, :num_items]
    has_places = state.prefixes.shape[1] > 0  # with prefix caching
    blocks = places_of(state, k, request, computed + num_tokens) if has_places else None
    running, lost = told[RUNS, :num_running], told[LOST, :num_lost]
    return ScheduledBatch(request, num_tokens, computed, emits[:num_items], lost, running, blocks)


@kernel()
def _watch(lane, told):
    """Note how often those were preempted whom the batch may preempt; returns their number."""
    count = lane.sim.num_running
    for i in range(count):
        told[LOST, i] = lane.running[i]
    for i in range(lane.batch.num_items):
        r = lane.items[i].request
        if lane.requests[r].phase == WAITING:
            told[LOST, count] = r
            count += 1
    for i in range(count):
        told[LOST_BEFORE, i] = lane.requests[told[LOST, i]].num_preemptions
    return count


@kernel()
def _keep_lost(lane, told, count):
    """Of those who were watched keep whom the batch has preempted, by index; returns their number."""
    lost = 0
    for i in range(count):
        r = told[LOST, i]
        if lane.requests[r].num_preemptions > told[LOST_BEFORE, i]:
            at = lost
            while at > 0 and told[LOST, at - 1] > r:
                told[LOST, at] = told[LOST, at - 1]
                at -= 1
            told[LOST, at] = r
            lost += 1
    return lost


@kernel()
def _tell(lane, told, emits):
    """Write down the applied batch, evicted requests left out; returns the numbers of its items and of who runs."""
    count = 0
    for i in range(lane.batch.num_items):
        r = lane.items[i].request
        request = lane.requests[r]
        n = request.num_scheduled_tokens
        if n > 0:
            told[REQUEST, count] = r
            told[TOKENS, count] = n
            told[COMPUTED, count] = request.num_computed_tokens
            emits[count] = request.num_computed_tokens + n >= request.prefill_tokens
            count += 1
    for i in range(lane.sim.num_running):
        told[RUNS, i] = lane.running[i]
    return count, lane.sim.num_running


@entry()
def apply_told_env(s, k, told, emits):
    """Apply the batch of lane `k` and write it down; returns how many items, who run, who lost KV."""
    state = unpack(s)
    lane = lane_of(state, k)
    count = _watch(lane, told)
    apply_formed(state, k, lane)
    num_items, num_running = _tell(lane, told, emits)
    return num_items, num_running, _keep_lost(lane, told, count)


@entry()
def tell_env(s, k, told, emits):
    """Write down the applied batch of lane `k`; returns the numbers of its items and of who runs."""
    return _tell(lane_of(unpack(s), k), told, emits)
