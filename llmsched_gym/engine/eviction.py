"""Which cached blocks that nobody uses are given away first, see `engine.blocks`: a rule of whoever schedules.

`lru` is vLLM's: those left longest ago. `session` goes by the session's last sign of life rather than the block's last
user. When a turn arrives, what it finds cached counts as left just now, so that who waits keeps its context and the
sessions give theirs, whole, that were idle longest. When a turn is refused, rejected or abandoned, its session is taken
for over: no turn can follow, and what is cached of it goes first. In a session that forks, its other branches lose
that, too.
"""

from __future__ import annotations

from llmsched_gym.engine.blocks import NAMED, PREVIOUS, USERS, find, link, slot_of, unlink
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.records import NONE

EVICTIONS = ("lru", "session")
LRU, SESSION = range(len(EVICTIONS))


@kernel()
def keep(lane, r):
    """Request `r` has arrived: what it would find cached is wanted."""
    if lane.sim.prefix_caching and lane.knobs.evict == SESSION:
        _move(lane.sim, lane.requests, lane.prefixes, lane.blocks, r, False)


@kernel()
def forsake(lane, r):
    """Request `r`, which holds nothing, is lost and its session with it."""
    if lane.sim.prefix_caching and lane.knobs.evict == SESSION:
        _move(lane.sim, lane.requests, lane.prefixes, lane.blocks, r, True)


@kernel(outline=True)
def _move(sim, requests, prefixes, blocks, r, to_front):
    """Put the blocks that `r` finds and nobody uses to the end of the line, or, of its session alone, to the front."""
    request, mask = requests[r], sim.table_mask
    stop = find(sim, request.prompt_tokens + request.num_output_tokens, prefixes, blocks, r)
    owner = r
    first = end = sim.total_blocks  # the head of the line of free blocks, and its end
    for _ in range(r + 1):
        start = prefixes[owner].shared_tokens >> sim.block_bits
        for position in range(stop - 1, start - 1, -1):
            b = blocks[slot_of(blocks, mask, owner, position), NAMED]
            if blocks[b, USERS] > 0:
                continue
            unlink(blocks, b)
            if to_front:
                link(blocks, b, first)
                first = b
            else:
                blocks[b, USERS] = -sim.num_releases  # as if the last one had left it
                link(blocks, b, blocks[end, PREVIOUS])
        stop = min(stop, start)
        if stop == 0:
            break
        owner = prefixes[owner].shares_with
        if to_front and (request.session_id == NONE or requests[owner].session_id != request.session_id):
            break  # others begin with it, too
