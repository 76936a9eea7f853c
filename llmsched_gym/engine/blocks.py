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
they form a batch, so that a prompt finds what an earlier one of the same batch computes. What only prefix caching needs
is outlined and takes arrays instead of the lane, so that it costs next to nothing where it is off. Long, as the line of
free places, the table of identities and requests' lists hold the same blocks and change together.
"""

from __future__ import annotations

import numpy as np

from llmsched_gym.config import ADMISSIONS
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.records import NONE, RUNNING

BY_PROMPT, BY_CHUNK, BY_PROMPT_CHECK = range(len(ADMISSIONS))
_OWNERS, _POSITIONS = 1_640_531_527, 1_540_483_477  # below 2**31, so that no sum of products leaves 64 bits
# Columns of a lane's array of blocks: one place a row, and behind them the lists of what requests hold.
NUM_COLUMNS = 8
OWNER, POSITION = 0, 1  # the request whose own token is the block's last, and where: NONE, it cannot be found
USERS = 2  # requests that hold it; below 0, nobody: less the number of the release that left it
NEXT, PREVIOUS = 3, 4  # in the line of free blocks
SAME = 5  # the next oldest block of the same identity; NONE
LAST = 6  # of the oldest: the newest of the same identity; NONE for the others
NAMED = 7  # a slot of the table of identities, not of the block here: the oldest block of one; NONE
_MOST = 0x7FFFFFFF


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
    if sim.prefix_caching:
        whole = sim.admission != BY_CHUNK
        return _unshared(sim, request.prefill_tokens, lane.prefixes, lane.blocks, r, num_tokens, whole)
    tokens = num_tokens if sim.admission == BY_CHUNK else request.prefill_tokens
    return blocks_for(sim, tokens)


@kernel()
def blocks_to_take(lane, r, num_tokens):
    """Free KV blocks that `r` takes to compute `num_tokens` more."""
    sim, request = lane.sim, lane.requests[r]
    if sim.prefix_caching and lane.prefixes[r].row == NONE:
        whole = sim.admission == BY_PROMPT
        return _unshared(sim, request.prefill_tokens, lane.prefixes, lane.blocks, r, num_tokens, whole)
    return blocks_to_hold(sim, request, num_tokens) - request.num_blocks


@kernel()
def _unshared(sim, prompt, prefixes, blocks, r, num_tokens, whole):
    """Free KV blocks of the first `num_tokens` that waiting request `r` has to compute, or of its `whole` prompt."""
    found = find(sim, prompt, prefixes, blocks, r)
    if prefixes[r].users_version != sim.users_version:
        found = _look_up(sim, prompt, prefixes, blocks, r)
    tokens = prompt if whole else min((found << sim.block_bits) + num_tokens, prompt)
    return blocks_for(sim, tokens) - prefixes[r].found_in_use


@kernel()
def known_computed(lane, r):
    """Tokens of `r` that need not be computed: its own computed ones; while it waits, those it would find cached."""
    sim, request = lane.sim, lane.requests[r]
    if sim.prefix_caching and lane.prefixes[r].row == NONE:
        return find(sim, request.prefill_tokens, lane.prefixes, lane.blocks, r) << sim.block_bits
    return request.num_computed_tokens


# --- identity


@kernel()
def owner_of(prefixes, r, position, block_bits):
    """The request whose own token is the last of the block at `position` of request `r`."""
    last = ((position + 1) << block_bits) - 1
    for _ in range(r):
        if last >= prefixes[r].shared_tokens:
            break
        r = prefixes[r].shares_with
    return r


@kernel()
def _home(mask, owner, position):
    """Eight neighbours of a chain lie side by side in the table, as they are looked for one after the other."""
    mixed = int(owner) * _OWNERS + int(position >> 3) * _POSITIONS
    return (((mixed ^ (mixed >> 29)) << 3) + int(position & 7)) & int(mask)


@kernel()
def slot_of(blocks, mask, owner, position):
    """Where the table of identities names the first block of that identity, or would name it."""
    slot = _home(mask, owner, position)
    for _ in range(mask + 1):
        b = blocks[slot, NAMED]
        if b == NONE or (blocks[b, OWNER] == owner and blocks[b, POSITION] == position):
            break
        slot = (slot + 1) & mask
    return slot


@kernel()
def _name(blocks, mask, b, owner, position):
    """Give block `b` its identity: it can be found from now on, behind those that have the same."""
    slot = slot_of(blocks, mask, owner, position)
    blocks[b, OWNER], blocks[b, POSITION] = owner, position
    first = blocks[slot, NAMED]
    blocks[b, SAME] = NONE
    if first == NONE:
        blocks[slot, NAMED] = blocks[b, LAST] = b
    else:
        blocks[b, LAST] = NONE
        blocks[blocks[first, LAST], SAME] = b
        blocks[first, LAST] = b


@kernel()
def _forget(blocks, mask, b):
    """Take the identity of block `b`."""
    slot = slot_of(blocks, mask, blocks[b, OWNER], blocks[b, POSITION])
    first = blocks[slot, NAMED]
    if first != b:
        before = first
        for _ in range(mask + 1):
            if blocks[before, SAME] == b:
                break
            before = blocks[before, SAME]
        blocks[before, SAME] = blocks[b, SAME]
        if blocks[first, LAST] == b:
            blocks[first, LAST] = before
    elif blocks[b, SAME] != NONE:
        blocks[slot, NAMED] = blocks[b, SAME]
        blocks[blocks[b, SAME], LAST] = blocks[b, LAST]
    else:
        _empty_slot(blocks, mask, slot)
    blocks[b, OWNER] = NONE


@kernel()
def _empty_slot(blocks, mask, gap):
    """Empty a slot of the table, and move those behind it that would no longer be found."""
    slot = gap
    for _ in range(mask):
        slot = (slot + 1) & mask
        b = blocks[slot, NAMED]
        if b == NONE:
            break
        home = _home(mask, blocks[b, OWNER], blocks[b, POSITION])
        if (slot - home) & mask >= (slot - gap) & mask:
            blocks[gap, NAMED] = b
            gap = slot
    blocks[gap, NAMED] = NONE


@kernel()
def _behind(blocks, mask, before, owner, position):
    """The first block of that identity, NONE if there is none; `before` is the one before it in a chain, or any.

    Who left a chain left its last block first, so that most often the line of free blocks says where the next one is.
    """
    b = blocks[before, PREVIOUS]
    if blocks[b, OWNER] == owner and blocks[b, POSITION] == position and blocks[b, LAST] != NONE:
        return b
    return blocks[slot_of(blocks, mask, owner, position), NAMED]


@kernel()
def find(sim, prompt, prefixes, blocks, r):
    """Number of cached blocks that waiting request `r`, of `prompt` tokens, would share, from its first one on.

    What was found is kept while it is still true: none of these blocks may have been evicted since (the release that
    left it, or would leave it, is later than those that left evicted blocks), and the one that was missing still is.
    So in most batches a long prompt that waits is not looked up block by block.
    """
    prefix, mask = prefixes[r], sim.table_mask
    if prefix.found_version != sim.blocks_version or prefix.found_left <= sim.last_evicted:
        return _look_up(sim, prompt, prefixes, blocks, r)
    found = prefix.found_blocks
    if found == (prompt - 1) >> sim.block_bits:
        return found
    missing = slot_of(blocks, mask, owner_of(prefixes, r, found, sim.block_bits), found)
    return found if blocks[missing, NAMED] == NONE else _look_up(sim, prompt, prefixes, blocks, r)


@kernel(outline=True)
def _look_up(sim, prompt, prefixes, blocks, r):
    """What :func:`find` returns; of these ``prefixes[r].found_in_use`` are held by somebody, and cost no free block.

    All found but the first are noted in the list that nobody has, for who looked last.
    """
    prefix = prefixes[r]
    found = stop = (prompt - 1) >> sim.block_bits
    later = sim.num_releases + 1  # the release that leaves what is held now, at the earliest
    owner, in_use, left = r, 0, later
    for _ in range(r + 1):  # from its own tokens back to those of the root: the first block that is missing counts
        first = prefixes[owner].shared_tokens >> sim.block_bits
        used, earliest = 0, later
        b = sim.total_blocks
        for position in range(first, stop):
            b = _behind(blocks, sim.table_mask, b, owner, position)
            if b == NONE:
                found, in_use, left = position, 0, later
                break
            if blocks[b, USERS] > 0:
                used += 1
            else:
                earliest = min(earliest, -blocks[b, USERS])
            if position > 0:
                _list(sim, blocks, sim.free_row, position, b)
        in_use += used
        left = min(left, earliest)
        stop = min(stop, first)
        if stop == 0:
            break
        owner = prefixes[owner].shares_with
    sim.last_to_find = r
    prefix.found_version, prefix.users_version = sim.blocks_version, sim.users_version
    prefix.found_blocks, prefix.found_in_use, prefix.found_left = found, in_use, left
    return found


# --- places


@kernel()
def listed(sim, blocks, row, position):
    """The block at `position` of those that the request with this row holds."""
    i = ((sim.table_mask + 1) << 3) + row * sim.row_blocks + position
    return blocks[i >> 3, i & 7]


@kernel()
def _list(sim, blocks, row, position, b):
    i = ((sim.table_mask + 1) << 3) + row * sim.row_blocks + position
    blocks[i >> 3, i & 7] = b


@kernel()
def link(blocks, b, before):
    """Put block `b` into the line of free ones, behind `before`."""
    after = blocks[before, NEXT]
    blocks[b, NEXT], blocks[b, PREVIOUS] = after, before
    blocks[before, NEXT] = blocks[after, PREVIOUS] = b


@kernel()
def unlink(blocks, b):
    """Take block `b` out of the line of free ones."""
    after, before = blocks[b, NEXT], blocks[b, PREVIOUS]
    blocks[before, NEXT], blocks[after, PREVIOUS] = after, before


@kernel()
def users_changed(sim):
    """Others hold blocks now: how many of those that were found are in use is to be counted again."""
    sim.users_version = sim.users_version % _MOST + 1


@kernel()
def _disown(sim, blocks, b):
    """Take the identity of a block that somebody may have found, and nobody is to compute: all is looked up again."""
    if blocks[b, OWNER] != NONE:
        _forget(blocks, sim.table_mask, b)
        sim.blocks_version = sim.blocks_version % _MOST + 1


@kernel()
def _share(sim, requests, prefixes, blocks, r):
    """Give request `r`, which holds nothing, a row and the cached blocks that it finds."""
    request, prefix, row = requests[r], prefixes[r], sim.free_row
    found = find(sim, request.prefill_tokens, prefixes, blocks, r)
    is_noted = sim.last_to_find == r and prefix.users_version == sim.users_version  # in the row that is free still
    sim.free_row = listed(sim, blocks, row, 0)
    prefix.row = row
    owner, stop = r, found
    for _ in range(r + 1):
        first = prefixes[owner].shared_tokens >> sim.block_bits
        for position in range(first, stop):
            if is_noted and position > 0:
                b = listed(sim, blocks, row, position)
            else:
                b = blocks[slot_of(blocks, sim.table_mask, owner, position), NAMED]
            if blocks[b, USERS] <= 0:
                unlink(blocks, b)
                sim.free_blocks -= 1
                blocks[b, USERS] = 0
            blocks[b, USERS] += 1
            _list(sim, blocks, row, position, b)
        stop = min(stop, first)
        if stop == 0:
            break
        owner = prefixes[owner].shares_with
    users_changed(sim)
    request.num_blocks = found
    request.num_computed_tokens = found << sim.block_bits
    if request.num_preemptions == 0:
        request.num_cached_tokens = request.num_computed_tokens
    else:
        prefix.num_recached_tokens += request.num_computed_tokens


@kernel()
def allocate(lane, r, num_tokens):
    """Let `r` hold the blocks to compute `num_tokens` more; the full ones can be found from now on.

    A request that holds nothing takes the cached blocks that it finds first, and computes only what is behind them.
    Needs :func:`blocks_to_take` free blocks, and prefix caching. Doing it twice changes nothing.
    """
    _allocate(lane.sim, lane.requests, lane.prefixes, lane.blocks, r, num_tokens)


@kernel(outline=True)
def _allocate(sim, requests, prefixes, blocks, r, num_tokens):
    request, prefix = requests[r], prefixes[r]
    if prefix.row == NONE:
        _share(sim, requests, prefixes, blocks, r)
        num_tokens = min(num_tokens, request.prefill_tokens - request.num_computed_tokens)
    row = prefix.row
    for position in range(request.num_blocks, blocks_to_hold(sim, request, num_tokens)):
        b = blocks[sim.total_blocks, NEXT]
        unlink(blocks, b)
        if blocks[b, OWNER] != NONE:
            sim.last_evicted = max(sim.last_evicted, -blocks[b, USERS])
            _forget(blocks, sim.table_mask, b)
        blocks[b, USERS] = 1
        _list(sim, blocks, row, position, b)
        request.num_blocks = position + 1
        sim.free_blocks -= 1
    computed = request.num_computed_tokens
    for position in range(computed >> sim.block_bits, (computed + num_tokens) >> sim.block_bits):
        b = listed(sim, blocks, row, position)
        if blocks[b, OWNER] == NONE:
            _name(blocks, sim.table_mask, b, owner_of(prefixes, r, position, sim.block_bits), position)


@kernel()
def take(lane, r, num_tokens):
    """:func:`allocate` if the blocks are free, else the engine will evict for them; returns how many it needs."""
    need = blocks_to_take(lane, r, num_tokens)
    if need <= lane.sim.free_blocks:
        allocate(lane, r, num_tokens)
    return need


@kernel()
def stays_within(sim, request, num_tokens):
    """Whether to compute `num_tokens` more takes no block and fills none, so that there is nothing to allocate."""
    computed, bits = request.num_computed_tokens, sim.block_bits
    fills = (computed + num_tokens) >> bits > computed >> bits
    return computed + num_tokens <= request.num_blocks << bits and not (sim.prefix_caching and fills)


@kernel()
def _release(sim, requests, prefixes, blocks, r, keep):
    """Let `r` hold only its first `keep` blocks. What it has not computed can no longer be found."""
    request, row = requests[r], prefixes[r].row
    computed = request.num_computed_tokens >> sim.block_bits
    first = end = sim.total_blocks  # the head of the line of free blocks, and its end
    sim.num_releases += 1
    for position in range(request.num_blocks - 1, keep - 1, -1):
        b = listed(sim, blocks, row, position)
        if position >= computed:
            _disown(sim, blocks, b)
        blocks[b, USERS] -= 1
        if blocks[b, USERS] == 0:
            sim.free_blocks += 1
            blocks[b, USERS] = -sim.num_releases
            if blocks[b, OWNER] == NONE:
                link(blocks, b, first)
                first = b
            else:
                link(blocks, b, blocks[end, PREVIOUS])
    request.num_blocks = min(request.num_blocks, keep)
    users_changed(sim)


@kernel()
def free(lane, r):
    """Let `r` hold nothing; returns how many blocks nobody else holds."""
    if lane.sim.prefix_caching:
        return _leave(lane.sim, lane.requests, lane.prefixes, lane.blocks, r)
    num_blocks = lane.requests[r].num_blocks
    lane.sim.free_blocks += num_blocks
    lane.requests[r].num_blocks = 0
    return num_blocks


@kernel(outline=True)
def _leave(sim, requests, prefixes, blocks, r):
    """Let `r` hold nothing, not even a list."""
    prefix, before = prefixes[r], sim.free_blocks
    if prefix.row != NONE:
        _release(sim, requests, prefixes, blocks, r, 0)
        _list(sim, blocks, prefix.row, 0, sim.free_row)
        sim.free_row = prefix.row
        prefix.row = NONE
    return sim.free_blocks - before


@kernel()
def give_back(lane, r):
    """Undo what :func:`allocate` did for `r` in a batch that is not to run; what was evicted for it stays evicted."""
    _give_back(lane.sim, lane.requests, lane.prefixes, lane.blocks, r)


@kernel(outline=True)
def _give_back(sim, requests, prefixes, blocks, r):
    request, prefix = requests[r], prefixes[r]
    if prefix.row == NONE:
        return
    if request.phase == RUNNING:
        for position in range(request.num_computed_tokens >> sim.block_bits, request.num_blocks):
            _disown(sim, blocks, listed(sim, blocks, prefix.row, position))
        _release(sim, requests, prefixes, blocks, r, blocks_to_hold(sim, request, 0))
        return
    _leave(sim, requests, prefixes, blocks, r)
    if request.num_preemptions == 0:
        request.num_cached_tokens = 0
    else:
        prefix.num_recached_tokens -= request.num_computed_tokens
    request.num_computed_tokens = 0


@kernel()
def shares_uncomputed(lane, r, other):
    """Whether `other` holds a block that `r` is to compute in this batch."""
    sim, blocks, request = lane.sim, lane.blocks, lane.requests[r]
    row, another = lane.prefixes[r].row, lane.prefixes[other].row
    position = request.num_computed_tokens >> sim.block_bits
    if row == NONE or another == NONE:
        return False
    if position >= request.num_blocks or position >= lane.requests[other].num_blocks:
        return False
    return listed(sim, blocks, row, position) == listed(sim, blocks, another, position)


def table_size(num_blocks: int) -> int:
    """Slots of the table of identities of so many blocks: a power of two, at least twice as many."""
    return 1 << (2 * num_blocks).bit_length()


def num_records(num_blocks: int, max_num_seqs: int, row_blocks: int) -> int:
    """Rows of a lane's array of blocks: its table's, and of lists of up to `row_blocks`, one more than may be held."""
    return table_size(num_blocks) + -(-(max_num_seqs + 1) * row_blocks // NUM_COLUMNS)


def load_blocks(blocks: np.ndarray, num_blocks: int, max_num_seqs: int, row_blocks: int) -> None:
    """Empty a lane's array, shape (num_records, NUM_COLUMNS) int32.

    Row `num_blocks` is both ends of the line of free blocks; lists that nobody has are linked by their first entry.
    """
    size, places = table_size(num_blocks), np.arange(num_blocks + 1)
    blocks[:] = 0
    blocks[:size, [OWNER, SAME, LAST, NAMED]] = NONE
    blocks[: num_blocks + 1, NEXT] = (places + 1) % (num_blocks + 1)
    blocks[: num_blocks + 1, PREVIOUS] = (places - 1) % (num_blocks + 1)
    blocks[size:].reshape(-1)[: max_num_seqs * row_blocks : row_blocks] = np.arange(1, max_num_seqs + 1)
