"""Who holds which KV block: the bookkeeping of a paged cache, on the host, without torch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from llmsched_gym.config import BLOCK_SIZE, blocks_needed
from llmsched_gym.engine.jit import entry, kernel
from llmsched_gym.real_backend.errors import BackendError

SCRATCH = 0
"""Block that nobody holds: padding reads and writes it."""
FIRST = 1
"""The first block that somebody may hold."""
NOBODY = -1
BLOCKS, ROWS = 0, 1
"""Places of the numbers of free blocks and free rows."""
DONE, NO_KV, NO_BLOCKS, NO_ROWS, TOO_LONG, UNKNOWN = range(6)
"""What came of taking blocks."""


class PlacedBlocks(NamedTuple):
    """Blocks that the engine has chosen, with prefix caching: those of a batch's items, a row each."""

    blocks: np.ndarray  # the i-th block of each row, SCRATCH behind the last; (items, most blocks of one) int64


class BlockTable:
    """Blocks 1..num_blocks, handed out one by one to requests that occupy a row each.

    A request takes blocks as its tokens are computed, so it never holds more than the engine has booked for it.

    Attributes:
        row_of: row of each request, NOBODY without one; (num_requests,) int64
        owner: request of each row; (max_num_seqs,) int64
        num_tokens: tokens whose KV each row holds; (max_num_seqs,) int64
        held: blocks of each row; (max_num_seqs,) int64
        blocks: the i-th block of each row, SCRATCH behind the last; (max_num_seqs, most blocks of a sequence) int64
    """

    def __init__(self, num_blocks: int, max_num_seqs: int, max_model_len: int) -> None:
        self.num_blocks = num_blocks
        self.owner = np.full(max_num_seqs, NOBODY, np.int64)
        self.num_tokens = np.zeros(max_num_seqs, np.int64)
        self.held = np.zeros(max_num_seqs, np.int64)
        self.blocks = np.full((max_num_seqs, blocks_needed(max_model_len)), SCRATCH, np.int64)
        self._free = np.zeros(num_blocks, np.int64)  # stacks, of which the first `_left` entries count
        self._free_rows = np.zeros(max_num_seqs, np.int64)
        self._left = np.zeros(2, np.int64)
        self.clear(0)

    def clear(self, num_requests: int) -> None:
        """Take all blocks back; requests are 0..num_requests-1 from now on."""
        self.row_of = np.full(num_requests, NOBODY, np.int64)
        self.owner[:] = NOBODY
        self.num_tokens[:] = 0
        self.held[:] = 0
        self.blocks[:] = SCRATCH
        self._free[:] = np.arange(self.num_blocks, 0, -1)
        self._free_rows[:] = np.arange(len(self.owner) - 1, -1, -1)
        self._left[:] = self.num_blocks, len(self.owner)
        owned = self.row_of, self.owner, self.num_tokens, self.held, self.blocks
        self._arrays = *owned, self._free, self._free_rows, self._left

    @property
    def num_free(self) -> int:
        return int(self._left[BLOCKS])

    @property
    def requests(self) -> list[int]:
        """Those that have a row."""
        return sorted(self.owner[self.owner != NOBODY].tolist())

    def take(self, requests: np.ndarray, num_tokens: np.ndarray, num_computed: np.ndarray) -> np.ndarray:
        """Rows and blocks for `num_tokens` more tokens of each request, behind the `num_computed` it has; (num,) each.

        A request that starts over, with nothing computed, gives its old blocks back first. Returns request, row, tokens
        and computed tokens, (4, num) int64. What cannot be is a :class:`BackendError`, and no block has been taken.
        """
        items = np.empty((4, len(requests)), np.int64)
        outcome, i = _take(requests, num_tokens, num_computed, items, *self._arrays)
        if outcome != DONE:
            raise BackendError(self._why_not(outcome, int(requests[i]), int(num_tokens[i]), int(num_computed[i])))
        return items

    def _why_not(self, outcome: int, request: int, num_tokens: int, num_computed: int) -> str:
        if outcome == NO_BLOCKS:
            return f"the cache has {self.num_blocks} blocks, fewer than the engine counts on"
        if outcome == NO_ROWS:
            return f"request {request}: expected at most {len(self.owner)} running requests (max_num_seqs)"
        if outcome == UNKNOWN:
            return f"request {request}: expected 0 to {len(self.row_of) - 1}, the episode's requests"
        if outcome == TOO_LONG:
            room = self.blocks.shape[1] * BLOCK_SIZE
            return f"request {request}: {num_computed + num_tokens} tokens, the cache's rows have room for {room}"
        row = self.row_of[request]
        held = 0 if row == NOBODY else self.num_tokens[row]
        return f"request {request}: {num_computed} tokens count as computed, the cache holds {held}"

    def release(self, requests: np.ndarray) -> None:
        """Take back the blocks and the rows of those of the requests that have one."""
        _release_all(requests, *self._arrays)

    def keep_only(self, requests: np.ndarray) -> None:
        """Release everybody but `requests`."""
        _keep_only(requests, *self._arrays)

    def check(self) -> None:
        """Raise AssertionError unless every block is free or held once, and every row holds just what it needs."""
        taken = np.flatnonzero(self.owner != NOBODY)
        free, free_rows = self._free[: self._left[BLOCKS]], self._free_rows[: self._left[ROWS]]
        assert sorted([*taken.tolist(), *free_rows.tolist()]) == list(range(len(self.owner))), "a row is lost"
        assert np.array_equal(self.row_of[self.owner[taken]], taken), "a request and its row disagree"
        assert np.count_nonzero(self.row_of != NOBODY) == len(taken), "a request's row belongs to another"
        held = [b for row in taken for b in self.blocks[row, : self.held[row]].tolist()]
        assert sorted(held + free.tolist()) == list(range(1, self.num_blocks + 1)), "a block is lost or held twice"
        assert np.count_nonzero(self.blocks) == len(held), "a block is named behind a row's last"
        assert np.array_equal(self.held, blocks_needed(self.num_tokens)), "a row holds more or less than it needs"


@kernel()
def _release(row, row_of, owner, num_tokens, held, blocks, free, free_rows, left):
    for i in range(held[row] - 1, -1, -1):  # the first one comes to lie on top
        free[left[BLOCKS]] = blocks[row, i]
        left[BLOCKS] += 1
        blocks[row, i] = SCRATCH
    held[row] = 0
    num_tokens[row] = 0
    row_of[owner[row]] = NOBODY
    owner[row] = NOBODY
    free_rows[left[ROWS]] = row
    left[ROWS] += 1


@entry()
def _release_all(requests, row_of, owner, num_tokens, held, blocks, free, free_rows, left):
    for i in range(requests.shape[0]):
        row = row_of[requests[i]]
        if row != NOBODY:
            _release(row, row_of, owner, num_tokens, held, blocks, free, free_rows, left)


@entry()
def _keep_only(requests, row_of, owner, num_tokens, held, blocks, free, free_rows, left):
    kept = 0
    for i in range(requests.shape[0]):
        kept += row_of[requests[i]] != NOBODY
    if kept == owner.shape[0] - left[ROWS]:
        return  # everybody who has a row
    for i in range(requests.shape[0]):
        row = row_of[requests[i]]
        if row != NOBODY:
            num_tokens[row] = ~num_tokens[row]  # marked; no row holds fewer than 0 tokens
    for row in range(owner.shape[0]):
        if num_tokens[row] < 0:
            num_tokens[row] = ~num_tokens[row]
        elif owner[row] != NOBODY:
            _release(row, row_of, owner, num_tokens, held, blocks, free, free_rows, left)


@entry()
def _take(requests, more, computed, items, row_of, owner, num_tokens, held, blocks, free, free_rows, left):
    """Returns what came of it, and of which item."""
    rows, needed = 0, 0
    for i in range(requests.shape[0]):
        r = requests[i]
        if r < 0 or r >= row_of.shape[0]:
            return UNKNOWN, i
        row = row_of[r]
        if row != NOBODY and num_tokens[row] != computed[i] and computed[i] == 0:
            _release(row, row_of, owner, num_tokens, held, blocks, free, free_rows, left)
            row = NOBODY
        has = 0 if row == NOBODY else num_tokens[row]
        if has != computed[i]:
            return NO_KV, i
        most = (computed[i] + more[i] + BLOCK_SIZE - 1) // BLOCK_SIZE
        if most > blocks.shape[1]:
            return TOO_LONG, i
        rows += row == NOBODY
        needed += most - (0 if row == NOBODY else held[row])
        if rows > left[ROWS]:
            return NO_ROWS, i
        if needed > left[BLOCKS]:
            return NO_BLOCKS, i
    for i in range(requests.shape[0]):
        r = requests[i]
        row = row_of[r]
        if row == NOBODY:
            left[ROWS] -= 1
            row = free_rows[left[ROWS]]
            row_of[r] = row
            owner[row] = r
        total = computed[i] + more[i]
        for k in range(held[row], (total + BLOCK_SIZE - 1) // BLOCK_SIZE):
            left[BLOCKS] -= 1
            blocks[row, k] = free[left[BLOCKS]]
            held[row] = k + 1
        num_tokens[row] = total
        items[0, i] = r
        items[1, i] = row
        items[2, i] = more[i]
        items[3, i] = computed[i]
    return DONE, 0
