"""KV blocks: how many a request needs, and with prefix caching which ones it gets, shares and leaves behind.

Without prefix caching blocks are a number. With it each has a place, and a full block an identity: the request whose
own token is its last, and its position. As a request's prompt is the beginning of another one's tokens
(``shares_with``, ``shared_tokens``) and its own, these two name all tokens up to the block's end; nobody stores a list.

The rules are those of vLLM's KV cache manager (0.32, `vllm/v1/core`: kv_cache_manager.py, block_pool.py):

- a request finds the longest run of cached blocks from its first on, short of its last known token;
- a full block can be found as soon as it is scheduled; equal blocks are not merged, the oldest place is found;
- a block that nobody uses stays where it is until its place is needed: places without identity are given away first,
  then those left longest ago, a request's last blocks before its first.

Schedulers ask (:func:`blocks_to_admit`, :func:`find`) and then act (:func:`allocate`, :func:`free`). Kernels act while
they form a batch, so that a prompt finds what an earlier one of the same batch computes.
"""

from __future__ import annotations

import numpy as np

from llmsched_gym.config import ADMISSIONS
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.records import BLOCK, NONE, RUNNING

BY_PROMPT, BY_CHUNK, BY_PROMPT_CHECK = range(len(ADMISSIONS))
_OWNERS, _POSITIONS = 1_640_531_527, 1_540_483_477  # below 2**31, so that no sum of products leaves 64 bits
_MOST_VERSIONS = 0x7FFFFFFF


# --- numbers of blocks


@kernel()
def blocks_for(sim, num_tokens):
    """KV blocks of so many tokens."""
    return (num_tokens + sim.block_size - 1) >> sim.block_bits


@kernel()
def blocks_to_hold(sim, request, num_tokens):
    """KV blocks of the request after computing `num_tokens` more (rule 4)."""
    held = request.num_computed_tokens + num_tokens
    if sim.admission == BY_PROMPT:
        held = max(held, request.prefill_tokens)
    return blocks_for(sim, held)


@kernel()
def blocks_to_admit(lane, r, num_tokens):
    """Free KV blocks that must be there for waiting request `r` to enter with `num_tokens` (rule 4)."""
    sim, request = lane.sim, lane.requests[r]
    found = find(lane, r) if sim.prefix_caching else 0
    tokens = request.prefill_tokens
    if sim.admission == BY_CHUNK:
        tokens = (found << sim.block_bits) + num_tokens
    return blocks_for(sim, tokens) - (num_in_use(lane, r, found) if found > 0 else 0)


@kernel()
def blocks_to_take(lane, r, num_tokens):
    """Free KV blocks that `r` takes to compute `num_tokens` more."""
    sim, request = lane.sim, lane.requests[r]
    if sim.prefix_caching and request.block_row == NONE:
        found = find(lane, r)
        held = min((found << sim.block_bits) + num_tokens, request.prefill_tokens)
        if sim.admission == BY_PROMPT:
            held = request.prefill_tokens
        return blocks_for(sim, held) - num_in_use(lane, r, found)
    return blocks_to_hold(sim, request, num_tokens) - request.num_blocks


@kernel()
def known_computed(lane, r):
    """Tokens of `r` that need not be computed: its own computed ones; while it waits, those it would find cached."""
    request = lane.requests[r]
    if lane.sim.prefix_caching and request.block_row == NONE:
        return find(lane, r) << lane.sim.block_bits
    return request.num_computed_tokens


# --- identity


@kernel()
def owner_of(requests, r, position, block_bits):
    """The request whose own token is the last of the block at `position` of request `r`."""
    last = ((position + 1) << block_bits) - 1
    for _ in range(r):
        if last >= requests[r].shared_tokens:
            break
        r = requests[r].shares_with
    return r


@kernel()
def _home(blocks, owner, position):
    mixed = int(owner) * _OWNERS + int(position) * _POSITIONS
    return (mixed ^ (mixed >> 29)) & (blocks.shape[0] - 1)


@kernel()
def _slot_of(blocks, owner, position):
    """Where the table of identities names the first block of that identity, or would name it."""
    slot = _home(blocks, owner, position)
    for _ in range(blocks.shape[0]):
        b = blocks[slot].named
        if b == NONE or (blocks[b].owner == owner and blocks[b].position == position):
            break
        slot = (slot + 1) & (blocks.shape[0] - 1)
    return slot


@kernel()
def _name(blocks, b, owner, position):
    """Give block `b` its identity: it can be found from now on, behind those that have the same."""
    block, slot = blocks[b], _slot_of(blocks, owner, position)
    block.owner, block.position = owner, position
    block.same, block.last = NONE, b
    first = blocks[slot].named
    if first == NONE:
        blocks[slot].named = b
    else:
        blocks[blocks[first].last].same = b
        blocks[first].last = b


@kernel()
def _forget(blocks, b):
    """Take the identity of block `b`, if it has one."""
    block = blocks[b]
    if block.owner == NONE:
        return
    slot = _slot_of(blocks, block.owner, block.position)
    first = blocks[slot].named
    if first != b:
        before = first
        for _ in range(blocks.shape[0]):
            if blocks[before].same == b:
                break
            before = blocks[before].same
        blocks[before].same = block.same
        if blocks[first].last == b:
            blocks[first].last = before
    elif block.same != NONE:
        blocks[slot].named = block.same
        blocks[block.same].last = block.last
    else:
        _empty_slot(blocks, slot)
    block.owner = NONE


@kernel()
def _empty_slot(blocks, gap):
    """Empty a slot of the table, and move those behind it that would no longer be found."""
    mask = blocks.shape[0] - 1
    slot = gap
    for _ in range(mask):
        slot = (slot + 1) & mask
        b = blocks[slot].named
        if b == NONE:
            break
        home = _home(blocks, blocks[b].owner, blocks[b].position)
        if (slot - home) & mask >= (slot - gap) & mask:
            blocks[gap].named = b
            gap = slot
    blocks[gap].named = NONE


@kernel()
def find(lane, r):
    """Number of cached blocks that waiting request `r` would share: a run from its first one on."""
    sim, requests, blocks = lane.sim, lane.requests, lane.blocks
    request = requests[r]
    if request.found_version == sim.blocks_version:
        return request.found_blocks
    found = stop = (request.prefill_tokens - 1) >> sim.block_bits
    owner = r
    for _ in range(r + 1):  # from its own tokens back to those of the root: the first block that is missing counts
        first = requests[owner].shared_tokens >> sim.block_bits
        for position in range(first, stop):
            if blocks[_slot_of(blocks, owner, position)].named == NONE:
                found = position
                break
        stop = min(stop, first)
        if stop == 0:
            break
        owner = requests[owner].shares_with
    request.found_version = sim.blocks_version
    request.found_blocks = found
    return found


@kernel()
def num_in_use(lane, r, found):
    """How many of the first `found` blocks of `r`, which are cached, somebody uses: they cost no free block."""
    requests, blocks = lane.requests, lane.blocks
    count, owner, stop = 0, r, found
    for _ in range(r + 1):
        first = requests[owner].shared_tokens >> lane.sim.block_bits
        for position in range(first, stop):
            count += blocks[blocks[_slot_of(blocks, owner, position)].named].users > 0
        stop = min(stop, first)
        if stop == 0:
            break
        owner = requests[owner].shares_with
    return count


# --- places


@kernel()
def _link(blocks, b, before):
    """Put block `b` into the line of free ones, behind `before`."""
    after = blocks[before].next
    blocks[b].next, blocks[b].previous = after, before
    blocks[before].next = blocks[after].previous = b


@kernel()
def _unlink(blocks, b):
    after, before = blocks[b].next, blocks[b].previous
    blocks[before].next, blocks[after].previous = after, before


@kernel()
def _changed(sim):
    """What was found before may no longer be there."""
    sim.blocks_version = sim.blocks_version % _MOST_VERSIONS + 1


@kernel()
def _share(lane, r):
    """Give request `r`, which holds nothing, a row and the cached blocks that it finds."""
    sim, request, blocks = lane.sim, lane.requests[r], lane.blocks
    found, row = find(lane, r), sim.free_row
    sim.free_row = lane.held[row, 0]
    request.block_row = row
    owner, stop = r, found
    for _ in range(r + 1):
        first = lane.requests[owner].shared_tokens >> sim.block_bits
        for position in range(first, stop):
            b = blocks[_slot_of(blocks, owner, position)].named
            if blocks[b].users == 0:
                _unlink(blocks, b)
                sim.free_blocks -= 1
            blocks[b].users += 1
            lane.held[row, position] = b
        stop = min(stop, first)
        if stop == 0:
            break
        owner = lane.requests[owner].shares_with
    request.num_blocks = found
    request.num_computed_tokens = found << sim.block_bits
    if request.num_preemptions == 0:
        request.num_cached_tokens = request.num_computed_tokens
    else:
        request.num_recached_tokens += request.num_computed_tokens


@kernel()
def allocate(lane, r, num_tokens):
    """Let `r` hold the blocks to compute `num_tokens` more; the full ones can be found from now on.

    A request that holds nothing takes the cached blocks that it finds first, and computes only what is behind them.
    Needs :func:`blocks_to_take` free blocks, and prefix caching. Doing it twice changes nothing.
    """
    sim, request, blocks = lane.sim, lane.requests[r], lane.blocks
    if request.block_row == NONE:
        _share(lane, r)
        num_tokens = min(num_tokens, request.prefill_tokens - request.num_computed_tokens)
        _changed(sim)
    row = request.block_row
    for position in range(request.num_blocks, blocks_to_hold(sim, request, num_tokens)):
        b = blocks[sim.total_blocks].next
        _unlink(blocks, b)
        _forget(blocks, b)
        blocks[b].users = 1
        lane.held[row, position] = b
        request.num_blocks = position + 1
        sim.free_blocks -= 1
        _changed(sim)
    computed = request.num_computed_tokens
    for position in range(computed >> sim.block_bits, (computed + num_tokens) >> sim.block_bits):
        b = lane.held[row, position]
        if blocks[b].owner == NONE:
            _name(blocks, b, owner_of(lane.requests, r, position, sim.block_bits), position)
            _changed(sim)


@kernel()
def release(lane, r, keep):
    """Let `r` hold only its first `keep` blocks. What it has not computed can no longer be found."""
    sim, request, blocks = lane.sim, lane.requests[r], lane.blocks
    computed = request.num_computed_tokens >> sim.block_bits
    first = end = sim.total_blocks  # the head of the line of free blocks, and its end
    for position in range(request.num_blocks - 1, keep - 1, -1):
        b = lane.held[request.block_row, position]
        if position >= computed:
            _forget(blocks, b)
        blocks[b].users -= 1
        if blocks[b].users == 0:
            sim.free_blocks += 1
            if blocks[b].owner == NONE:
                _link(blocks, b, first)
                first = b
            else:
                _link(blocks, b, blocks[end].previous)
    request.num_blocks = min(request.num_blocks, keep)
    _changed(sim)


@kernel()
def free(lane, r):
    """Let `r` hold nothing."""
    sim, request = lane.sim, lane.requests[r]
    if not sim.prefix_caching:
        sim.free_blocks += request.num_blocks
        request.num_blocks = 0
    elif request.block_row != NONE:
        release(lane, r, 0)
        lane.held[request.block_row, 0] = sim.free_row
        sim.free_row = request.block_row
        request.block_row = NONE


@kernel()
def give_back(lane, r):
    """Undo what :func:`allocate` did for `r` in a batch that is not to run; what was evicted for it stays evicted."""
    sim, request, blocks = lane.sim, lane.requests[r], lane.blocks
    if request.block_row == NONE:
        return
    if request.phase == RUNNING:
        for position in range(request.num_computed_tokens >> sim.block_bits, request.num_blocks):
            _forget(blocks, lane.held[request.block_row, position])
        release(lane, r, blocks_to_hold(sim, request, 0))
        return
    free(lane, r)
    if request.num_preemptions == 0:
        request.num_cached_tokens = 0
    else:
        request.num_recached_tokens -= request.num_computed_tokens
    request.num_computed_tokens = 0


@kernel()
def shares_uncomputed(lane, r, other):
    """Whether `other` holds a block that `r` is to compute in this batch."""
    request, another = lane.requests[r], lane.requests[other]
    position = request.num_computed_tokens >> lane.sim.block_bits
    if request.block_row == NONE or another.block_row == NONE:
        return False
    if position >= request.num_blocks or position >= another.num_blocks:
        return False
    return lane.held[request.block_row, position] == lane.held[another.block_row, position]


def num_records(num_blocks: int) -> int:
    """Records for so many blocks: a power of two, at least twice as many, for they hold the table of identities too."""
    return 1 << (2 * num_blocks).bit_length()


def load_blocks(blocks: np.ndarray, held: np.ndarray, num_blocks: int) -> None:
    """Empty a lane's arrays, shape (num_records,) BLOCK and (max_num_seqs, most blocks of a request) int32.

    Record `num_blocks` is both ends of the line of free blocks, and rows that nobody has are linked by their first
    entry.
    """
    blocks[:] = np.zeros((), BLOCK)
    for name in ("owner", "named", "same", "last"):
        blocks[name] = NONE
    places = np.arange(num_blocks + 1)
    blocks["next"][: num_blocks + 1] = (places + 1) % (num_blocks + 1)
    blocks["previous"][: num_blocks + 1] = (places - 1) % (num_blocks + 1)
    held[:, 0] = np.arange(1, len(held) + 1)
