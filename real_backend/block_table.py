"""Who holds which KV block: the bookkeeping of a paged cache, on the host, without torch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from llmsched_gym.config import blocks_needed

SCRATCH = 0
"""Block that nobody holds: padding reads and writes it."""
FIRST = 1
"""The first block that somebody may hold."""
NOBODY = -1


class PlacedBlocks(NamedTuple):
    """Blocks that the engine has chosen, with prefix caching: those of a batch's items, a row each."""

    blocks: np.ndarray  # the i-th block of each row, SCRATCH behind the last; (items, most blocks of one) int64


class BlockTable:
    """Blocks 1..num_blocks, handed out one by one to requests that occupy a row each.

    A request takes blocks as its tokens are computed, so it never holds more than the engine has booked for it.

    Attributes:
        row_of: row of each request, NOBODY without one; (num_requests,)
        owner: request of each row; (max_num_seqs,)
        num_tokens: tokens whose KV each row holds; (max_num_seqs,)
        held: blocks of each row; (max_num_seqs,)
        blocks: the i-th block of each row, SCRATCH behind the last; (max_num_seqs, most blocks of a sequence)
    """

    def __init__(self, num_blocks: int, max_num_seqs: int, max_model_len: int) -> None:
        self.num_blocks = num_blocks
        self.owner = np.full(max_num_seqs, NOBODY, np.int64)
        self.num_tokens = np.zeros(max_num_seqs, np.int64)
        self.held = np.zeros(max_num_seqs, np.int64)
        self.blocks = np.full((max_num_seqs, blocks_needed(max_model_len)), SCRATCH, np.int64)
        self.clear(0)

    def clear(self, num_requests: int) -> None:
        """Take all blocks back; requests are 0..num_requests-1 from now on."""
        self.row_of = np.full(num_requests, NOBODY, np.int64)
        self.owner[:] = NOBODY
        self.num_tokens[:] = 0
        self.held[:] = 0
        self.blocks[:] = SCRATCH
        self._free = list(range(self.num_blocks, 0, -1))
        self._free_rows = list(range(len(self.owner) - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def requests(self) -> list[int]:
        """Those that have a row."""
        return sorted(self.owner[self.owner != NOBODY].tolist())

    def occupy(self, requests: np.ndarray) -> np.ndarray:
        """The rows of requests, fresh ones for those that have none; shape (num,)."""
        rows = self.row_of[requests]
        for i in np.flatnonzero(rows == NOBODY).tolist():
            row, request = self._free_rows.pop(), int(requests[i])
            self.row_of[request], self.owner[row], rows[i] = row, request, row
        return rows

    def can_grow(self, rows: np.ndarray, num_tokens: np.ndarray) -> bool:
        """Whether there are blocks for rows to hold so many tokens each."""
        return int(np.maximum(self._needed(rows, num_tokens), 0).sum()) <= len(self._free)

    def grow(self, rows: np.ndarray, num_tokens: np.ndarray) -> None:
        """Let rows hold so many tokens each; ask :meth:`can_grow` first."""
        needed = self._needed(rows, num_tokens)
        for i in np.flatnonzero(needed > 0).tolist():
            row, n = int(rows[i]), int(needed[i])
            start = int(self.held[row])
            self.blocks[row, start : start + n] = [self._free.pop() for _ in range(n)]
            self.held[row] += n
        self.num_tokens[rows] = num_tokens

    def release(self, request: int) -> None:
        """Take back the blocks and the row of a request that has one."""
        row = int(self.row_of[request])
        n = int(self.held[row])
        self._free.extend(self.blocks[row, :n][::-1].tolist())
        self.blocks[row, :n] = SCRATCH
        self.held[row] = self.num_tokens[row] = 0
        self.owner[row] = self.row_of[request] = NOBODY
        self._free_rows.append(row)

    def keep_only(self, requests: np.ndarray) -> None:
        """Release everybody but `requests`."""
        gone = self.owner != NOBODY
        rows = self.row_of[requests]
        gone[rows[rows != NOBODY]] = False
        for request in self.owner[gone].tolist():
            self.release(request)

    def check(self) -> None:
        """Raise AssertionError unless every block is free or held once, and every row holds just what it needs."""
        taken = np.flatnonzero(self.owner != NOBODY)
        assert sorted([*taken.tolist(), *self._free_rows]) == list(range(len(self.owner))), "a row is lost"
        assert np.array_equal(self.row_of[self.owner[taken]], taken), "a request and its row disagree"
        assert np.count_nonzero(self.row_of != NOBODY) == len(taken), "a request's row belongs to another"
        held = [b for row in taken for b in self.blocks[row, : self.held[row]].tolist()]
        assert sorted(held + self._free) == list(range(1, self.num_blocks + 1)), "a block is lost or held twice"
        assert np.count_nonzero(self.blocks) == len(held), "a block is named behind a row's last"
        assert np.array_equal(self.held, blocks_needed(self.num_tokens)), "a row holds more or less than it needs"

    def _needed(self, rows: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
        return blocks_needed(num_tokens) - self.held[rows]
