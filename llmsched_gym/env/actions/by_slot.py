"""Adding the request of a visible slot to the batch: what priority and request actions share."""

from __future__ import annotations

from llmsched_gym.engine.batch import (
    add_chunk,
    add_decode,
    can_admit,
    chunk_room,
    decode_fits,
    is_decoding,
    is_free,
    uncached_prefill,
)
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.records import WAITING
from llmsched_gym.env.slots import NUM_SLOTS, slot_request


@kernel()
def add_slot(lane, slot, tile):
    """Add the request of a slot to the batch: a decode, or as much of its prompt as fits; returns whether it fitted.

    A chunk that does not finish its prompt is rounded down to a multiple of `tile`.
    """
    r = slot_request(lane, slot)
    if not is_free(lane, r):
        return False
    if is_decoding(lane, r):
        if not decode_fits(lane, r):
            return False
        add_decode(lane, r)
        return True
    n = chunk_room(lane, r)
    if n < uncached_prefill(lane, r) and n > tile:
        n -= n % tile
    if n <= 0 or (lane.requests[r].phase == WAITING and not can_admit(lane, r, n)):
        return False
    add_chunk(lane, r, n)
    return True


@kernel()
def add_hidden_decodes(lane):
    """Add the running decodes beyond the visible slots, each one that fits."""
    for i in range(NUM_SLOTS, lane.sim.num_running):
        r = lane.running[i]
        if is_free(lane, r) and is_decoding(lane, r) and decode_fits(lane, r):
            add_decode(lane, r)


@kernel()
def can_add(lane, slot, tile):
    """Whether :func:`add_slot` would succeed."""
    r = slot_request(lane, slot)
    if not is_free(lane, r):
        return False
    if is_decoding(lane, r):
        return decode_fits(lane, r)
    n = chunk_room(lane, r)
    if n < uncached_prefill(lane, r) and n > tile:
        n -= n % tile
    return n > 0 and (lane.requests[r].phase != WAITING or can_admit(lane, r, n))
