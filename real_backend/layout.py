"""A hybrid batch as the model takes it, laid out by one kernel in one array that goes to the device in one copy.

The array holds, one behind the other: token, position and slot of each row of the batch; the rows whose logits are
wanted; for the portable attention, of each group of decodes the lengths and blocks of its sequences, of each chunk its
blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from llmsched_gym.config import BLOCK_SIZE
from llmsched_gym.engine.jit import entry, kernel
from llmsched_gym.real_backend.attention import Chunk, DecodeGroup

if TYPE_CHECKING:
    from llmsched_gym.real_backend.block_table import BlockTable, PlacedBlocks
    from llmsched_gym.real_backend.tokens import TokenStore

MAX_PADDED_TOKENS = 1 << 16
"""KV tokens, padding included, that one group of decodes gathers at a time: bounds the portable path's memory."""
PART_COLUMNS = 4
"""Of a group of decodes or a chunk: its first row, the one behind its last, blocks of a sequence; computed tokens of a
chunk, -1 of a group."""
SIZE, TOKENS, WANTED, GROUPS, PARTS, NUM_COUNTS = range(6)
"""What the kernel counts: values in all, rows, rows whose logits are wanted, groups, groups and chunks."""
LACKS_ROOM, CHANGED, SAME = range(3)
"""What the kernel returns: nothing is written, or it is, to other places than the last batch or to the same ones."""


class Work(NamedTuple):
    """Items of one forward pass; arrays of shape (num_items,)."""

    request: np.ndarray  # int64, request index
    row: np.ndarray  # int64, its row in the table of blocks
    num_tokens: np.ndarray  # int64, tokens to compute
    num_computed: np.ndarray  # int64, tokens whose KV is held already
    emits: np.ndarray  # bool, whether a token is wanted

    def take(self, order: np.ndarray | slice) -> Work:
        return Work(*(part[order] for part in self))


class LaidOut(NamedTuple):
    """Where a batch lies on the device, int64 all; views that the next one overwrites."""

    ids: torch.Tensor  # (1, tokens)
    positions: torch.Tensor  # (1, tokens)
    slots: torch.Tensor  # (tokens,), block * BLOCK_SIZE + offset
    wanted: torch.Tensor  # (num_emitting,), rows
    decodes: list[DecodeGroup]
    chunks: list[Chunk]
    emitting: np.ndarray  # (num_emitting,) int64 on the host, request index
    order: np.ndarray  # (num_items,) int64 on the host: single tokens first, by the blocks of their sequences


class Layout:
    """The array on the host, pinned for a GPU, and its copy on the device; both grow with the largest batch."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._counts = np.zeros(NUM_COUNTS, np.int64)
        self._buckets = np.zeros(0, np.int64)
        self._order, self._parts = np.zeros(0, np.int64), np.zeros((0, PART_COLUMNS), np.int64)
        self._views: tuple[torch.Tensor, ...] = ()
        self._rows: list[list[int]] = []  # of the parts
        self._grow(1 << 12)

    def _grow(self, size: int) -> None:
        self._pinned = torch.empty(size, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        self._host = self._pinned.numpy()
        self._there = self._pinned
        if self._device.type != "cpu":
            self._there = torch.empty(size, dtype=torch.int64, device=self._device)

    def fill(self, work: Work, table: BlockTable | PlacedBlocks, tokens: TokenStore, portable: bool) -> LaidOut:
        """Lay a batch out, its parts too if the attention is the `portable` one; blocks and prompts must be there."""
        num_items, counts = len(work.request), self._counts
        if len(self._order) < num_items:
            self._order, self._parts = np.zeros(num_items, np.int64), np.zeros((num_items, PART_COLUMNS), np.int64)
            self._counts[:] = 0
        if len(self._buckets) < table.blocks.shape[1] + 2:
            self._buckets = np.zeros(table.blocks.shape[1] + 2, np.int64)
        if self._copied is not None:
            self._copied.synchronize()  # the last batch's copy reads the array
        emitting = np.empty(num_items, np.int64)
        arrays = table.blocks, tokens.start, tokens.ids, self._buckets, self._order, emitting, self._parts, counts
        outcome = _lay_out(*work, *arrays, self._host, portable)
        if outcome == LACKS_ROOM:
            self._grow(2 * int(counts[SIZE]))
            outcome = _lay_out(*work, *arrays, self._host, portable)
        if outcome != SAME:
            self._cut()
        if self._copied is not None:
            size = int(counts[SIZE])
            self._there[:size].copy_(self._pinned[:size], non_blocking=True)
            self._copied.record(torch.cuda.current_stream(self._device))
        ids, positions, slots, wanted, *others = self._views
        decodes, chunks = [], []
        for (start, stop, _, computed), lengths, blocks in zip(self._rows, others[::2], others[1::2], strict=True):
            if computed < 0:
                decodes.append(DecodeGroup(start, stop, blocks, lengths))
            else:
                chunks.append(Chunk(start, stop, computed, blocks))
        return LaidOut(ids, positions, slots, wanted, decodes, chunks, emitting[: len(wanted)], self._order[:num_items])

    def _cut(self) -> None:
        """Views of the array's parts; as long as batches differ in their numbers alone these stay."""
        size, num_tokens, num_wanted, num_groups, num_parts = self._counts.tolist()
        self._rows = self._parts[:num_parts].tolist()
        sizes = [num_tokens, num_tokens, num_tokens, num_wanted]
        for k, (start, stop, width, _) in enumerate(self._rows):
            sequences = stop - start if k < num_groups else 0
            sizes += (sequences, max(sequences, 1) * width)
        ids, positions, slots, wanted, *others = self._there[:size].split(sizes)
        for k, (_, _, width, _) in enumerate(self._rows):
            others[2 * k + 1] = others[2 * k + 1].view(-1, width)
        self._views = (ids[None], positions[None], slots, wanted, *others)


@kernel()
def _by_blocks(num_tokens, num_computed, buckets, order):
    """Order of items: single tokens by the blocks of their sequences, then the others; returns how many are single."""
    buckets[:] = 0
    num_single = 0
    for i in range(num_tokens.shape[0]):
        if num_tokens[i] == 1:
            buckets[num_computed[i] // BLOCK_SIZE + 1] += 1
            num_single += 1
    for b in range(1, buckets.shape[0]):
        buckets[b] += buckets[b - 1]  # of each number of blocks, where the next one goes
    at = num_single
    for i in range(num_tokens.shape[0]):
        if num_tokens[i] == 1:
            blocks = num_computed[i] // BLOCK_SIZE
            order[buckets[blocks]] = i
            buckets[blocks] += 1
        else:
            order[at] = i
            at += 1
    return num_single


@kernel()
def _group(num_computed, order, num_single, parts):
    """Slices of decodes in which padding at most doubles what is read, from the longest on.

    Returns how many there are, and whether they are others than the last batch's.
    """
    count, stop, changed = 0, num_single, False
    for _ in range(num_single):
        if stop <= 0:
            break
        widest = num_computed[order[stop - 1]] // BLOCK_SIZE + 1
        first = max(stop - max(MAX_PADDED_TOKENS // (widest * BLOCK_SIZE), 1), 0)
        start = stop - 1
        while start > first and 2 * (num_computed[order[start - 1]] // BLOCK_SIZE + 1) >= widest:
            start -= 1
        changed |= _note(parts, count, start, stop, widest, -1)
        count += 1
        stop = start
    return count, changed


@kernel()
def _note(parts, at, start, stop, width, computed):
    """Write a part down; returns whether another one stood there."""
    part = parts[at]
    changed = part[0] != start or part[1] != stop or part[2] != width or part[3] != computed
    part[0], part[1], part[2], part[3] = start, stop, width, computed
    return changed


@entry()
def _lay_out(
    request,
    row,
    num_tokens,
    num_computed,
    emits,
    blocks,
    token_start,
    token_ids,
    buckets,
    order,
    emitting,
    parts,
    counts,
    out,
    portable,
):
    """Order the items, count, and write the batch to `out` if it has room; `parts` and `counts` hold the last one's."""
    num_items = request.shape[0]
    num_single = _by_blocks(num_tokens, num_computed, buckets, order)
    groups, changed = 0, False
    if portable:
        groups, changed = _group(num_computed, order, num_single, parts)
    num_parts = groups
    total, wanted, others, at = num_single, 0, 0, num_single
    for g in range(groups):
        others += (parts[g, 1] - parts[g, 0]) * (1 + parts[g, 2])
    for k in range(num_single, num_items):
        i = order[k]
        total += num_tokens[i]
        if portable:
            width = (num_computed[i] + num_tokens[i] + BLOCK_SIZE - 1) // BLOCK_SIZE
            changed |= _note(parts, num_parts, at, total, width, num_computed[i])
            num_parts += 1
            others += width
        at = total
    for i in range(num_items):
        wanted += emits[i]
    size = 3 * total + wanted + others
    changed |= counts[TOKENS] != total or counts[WANTED] != wanted or counts[GROUPS] != groups
    changed |= counts[PARTS] != num_parts
    counts[TOKENS], counts[WANTED], counts[GROUPS], counts[PARTS] = total, wanted, groups, num_parts
    counts[SIZE] = size
    if size > out.shape[0]:
        counts[TOKENS] = 0  # the next call finds no batch to compare with
        return LACKS_ROOM
    at, to = 0, 3 * total
    for k in range(num_items):
        i = order[k]
        first = token_start[request[i]]
        for position in range(num_computed[i], num_computed[i] + num_tokens[i]):
            out[at] = token_ids[first + position]
            out[total + at] = position
            block = blocks[row[i], position // BLOCK_SIZE]
            out[2 * total + at] = block * BLOCK_SIZE + position % BLOCK_SIZE
            at += 1
        if emits[i]:
            emitting[to - 3 * total] = request[i]
            out[to] = at - 1
            to += 1
    for p in range(groups):
        start, stop = parts[p, 0], parts[p, 1]
        for k in range(start, stop):
            out[to] = num_computed[order[k]] + 1
            to += 1
        for k in range(start, stop):
            for b in range(parts[p, 2]):
                out[to] = blocks[row[order[k]], b]
                to += 1
    for p in range(groups, num_parts):
        i = order[num_single + p - groups]
        for b in range(parts[p, 2]):
            out[to] = blocks[row[i], b]
            to += 1
    return CHANGED if changed else SAME
