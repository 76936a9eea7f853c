"""Attention of a hybrid batch over the paged cache in one Triton kernel, for prompt chunks and decodes alike.

A program takes a tile: consecutive query tokens of one sequence, with all query heads that share one KV head, so that
keys and values are read once for the group. It walks the sequence's blocks with the online softmax of FlashAttention
(arXiv 2205.14135). Walks much longer than what would fill the device evenly, as with few long sequences, are split over
several programs and a second kernel joins the parts by their log-sum-exp (Flash-Decoding, Dao et al. 2023). Block
tables are those of PagedAttention (arXiv 2309.06180). What each program does stands in a list of work items on the
device, so that a recorded launch serves any batch whose list fits.

Importing this module needs triton; TRITON_INTERPRET=1, set before, runs the kernels on the CPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from llmsched_gym.config import BLOCK_SIZE

ITEM_COLUMNS = 6
"""Of a work item: its tile's first row in the batch, number of rows, the first one's position, its sequence; which part
of the walk the item is, and of how many."""
MIN_ROWS = 16
"""Query rows (tokens times grouped heads) of a program, at least: the least that matrix units take."""
PROGRAMS_PER_UNIT = 2
"""Programs per multiprocessor that walks are split for."""
MAX_PARTS = 32


class Tuning(NamedTuple):
    """How a program of the kernel is shaped; :mod:`llmsched_gym.real_backend.gpu_check` measures others."""

    rows: int  # query rows of a program, at least
    columns: int  # KV tokens that it reads at a time
    warps: int
    stages: int  # of the software pipeline


DECODES, CHUNKS = Tuning(MIN_ROWS, 64, 4, 2), Tuning(64, 64, 4, 2)


@dataclass
class Launch:
    """Work items of one shape."""

    items: torch.Tensor  # (num_items, ITEM_COLUMNS) int32; parts of one tile lie side by side
    tile_tokens: int  # query tokens of a full tile
    has_parts: bool  # whether some tile's walk is split
    tuning: Tuning


@dataclass
class PagedBatch:
    """A hybrid batch as the kernel gets it."""

    block_table: torch.Tensor  # (sequences, blocks) int32
    launches: list[Launch]


def tile_tokens(group: int, prefill: bool) -> int:
    """Query tokens of a tile whose KV head serves `group` query heads."""
    return max(CHUNKS.rows // group, 1) if prefill else 1


def spare_items(kv_heads: int, num_units: int) -> int:
    """Items that a list may have beyond its tiles."""
    return PROGRAMS_PER_UNIT * num_units // kv_heads


def work_items(
    starts: np.ndarray,  # (sequences,) first row of each in the batch
    num_tokens: np.ndarray,  # (sequences,) its rows
    num_computed: np.ndarray,  # (sequences,) KV tokens before them
    sequences: np.ndarray,  # (sequences,) row of each in the block table
    tokens: int,
    columns: int,
    spare: int,
) -> np.ndarray:
    """Items (num_items, ITEM_COLUMNS) int32 for tiles of at most `tokens` rows, at most `spare` more than tiles.

    Walks are cut into parts of equal length, about as long for all, so that programs end together.
    """
    counts = -(-num_tokens // tokens)
    index = np.repeat(np.arange(len(starts)), counts)
    offset = tokens * (np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts))
    rows = np.minimum(num_tokens[index] - offset, tokens)
    position = num_computed[index] + offset
    steps = -(-(position + rows) // columns)
    longest = max(-(-int(steps.sum()) // max(spare, 1)), 1)
    parts = np.minimum(-(-steps // longest), MAX_PARTS)
    tile = np.repeat(np.arange(len(index)), parts)
    part = np.arange(len(tile)) - np.repeat(np.cumsum(parts) - parts, parts)
    fields = (starts[index] + offset, rows, position, sequences[index])
    return np.stack([*(field[tile] for field in fields), part, parts[tile]], axis=1).astype(np.int32)


def lay_out(
    blocks: np.ndarray,  # (sequences, blocks), those of each sequence
    num_tokens: np.ndarray,  # (sequences,) rows of each in the batch, those of one token first
    num_computed: np.ndarray,  # (sequences,) KV tokens before them
    *,
    heads: int,
    kv_heads: int,
    device: torch.device,
) -> PagedBatch:
    """A batch for the kernel: decodes in one launch, chunks in another."""
    starts, sequences = np.cumsum(num_tokens) - num_tokens, np.arange(len(num_tokens))
    num_single = int(np.count_nonzero(num_tokens == 1))
    spare = spare_items(kv_heads, num_units(device))
    launches = []
    for part, is_prefill in ((slice(0, num_single), False), (slice(num_single, None), True)):
        if len(starts[part]) == 0:
            continue
        tokens, tuning = tile_tokens(heads // kv_heads, is_prefill), CHUNKS if is_prefill else DECODES
        items = work_items(
            starts[part], num_tokens[part], num_computed[part], sequences[part], tokens, tuning.columns, spare
        )
        on_device = torch.from_numpy(items).to(device, non_blocking=True)
        launches.append(Launch(on_device, tokens, bool((items[:, -1] > 1).any()), tuning))
    table = torch.from_numpy(np.ascontiguousarray(blocks, np.int32)).to(device, non_blocking=True)
    return PagedBatch(table, launches)


def warm_up(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, windows: set[int | None]
) -> None:
    """Compile all that batches of a model may need, so that no measured one pays for it."""
    query = torch.zeros((2, heads, head_dim), dtype=dtype, device=device)
    cache = torch.zeros((1, BLOCK_SIZE, kv_heads, head_dim), dtype=dtype, device=device)
    out = torch.empty_like(query)
    for num_tokens in (np.array([1, 1]), np.array([2])):
        blocks, computed = np.zeros((len(num_tokens), 1)), np.zeros(len(num_tokens), np.int64)
        batch = lay_out(blocks, num_tokens, computed, heads=heads, kv_heads=kv_heads, device=device)
        for has_parts in (False, True):
            for launch in batch.launches:
                launch.has_parts = has_parts
            for window in windows:
                attend(query, cache, cache, out, batch, head_dim**-0.5, window)


def num_units(device: torch.device) -> int:
    """Multiprocessors of a GPU; the interpreter is one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def attend(
    query: torch.Tensor,  # (tokens, heads, head_dim), any strides
    keys: torch.Tensor,  # (blocks, BLOCK_SIZE, kv_heads, head_dim), contiguous
    values: torch.Tensor,
    out: torch.Tensor,  # (tokens, heads, head_dim), contiguous; every row of the items is written
    batch: PagedBatch,
    scale: float,
    window: int | None = None,
) -> None:
    """Causal attention of all rows; with a `window`, to the last so many tokens, the own one included."""
    arguments = query, keys, values, out, batch.block_table, scale, window
    if len(batch.launches) == 2 and query.is_cuda and torch.cuda.is_current_stream_capturing():
        # Decodes wait for memory and chunks for arithmetic: in a recorded pass they run side by side.
        decodes, chunks = batch.launches
        main, side = torch.cuda.current_stream(query.device), _side_stream(query.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            _launch(chunks, *arguments)
        _launch(decodes, *arguments)
        main.wait_stream(side)
    else:
        for launch in batch.launches:
            _launch(launch, *arguments)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _launch(
    launch: Launch,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    table: torch.Tensor,
    scale: float,
    window: int | None,
) -> None:
    heads, dim = query.shape[1:]
    kv_heads = keys.shape[2]
    group = heads // kv_heads
    num_items, tokens = len(launch.items), launch.tile_tokens
    parts, weights = out, out
    if launch.has_parts:
        parts = torch.empty((num_items, tokens, heads, dim), dtype=torch.float32, device=out.device)
        weights = torch.empty((num_items, tokens, heads), dtype=torch.float32, device=out.device)
    padded = {"DIM": dim, "DIM_PADDED": triton.next_power_of_2(dim), "TOKENS": tokens}
    _attend[(kv_heads, num_items)](
        query,
        keys,
        values,
        out,
        parts,
        weights,
        launch.items,
        table,
        table.stride(0),
        query.stride(0),
        query.stride(1),
        scale,
        window or 0,
        **padded,
        KV_HEADS=kv_heads,
        GROUP=group,
        BLOCK=BLOCK_SIZE,
        ROWS=max(triton.next_power_of_2(tokens * group), MIN_ROWS),
        COLUMNS=launch.tuning.columns,
        WINDOW=window is not None,
        PARTS=launch.has_parts,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=launch.tuning.warps,
        num_stages=launch.tuning.stages,
    )
    if launch.has_parts:
        padded["TOKENS_PADDED"] = triton.next_power_of_2(tokens)
        _join[(heads, num_items)](parts, weights, out, launch.items, **padded, HEADS=heads, num_warps=1)


# Counts that change from batch to batch must not each cost a compilation.
@triton.jit(do_not_specialize=["table_stride", "window"])
def _attend(
    query,
    keys,
    values,
    out,  # the answer (tokens, heads, dim)
    parts,  # with PARTS: answers of split walks (items, TOKENS, heads, dim) float32
    weights,  # with PARTS: log2-sum-exp2 of each of them (items, TOKENS, heads)
    items,
    table,
    table_stride,
    query_token_stride,
    query_head_stride,
    scale,
    window,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    kv_head = tl.program_id(0)
    index = tl.program_id(1)
    item = items + index * 6
    start, count = tl.load(item), tl.load(item + 1)
    position, sequence = tl.load(item + 2), tl.load(item + 3)
    part, num_parts = tl.load(item + 4), tl.load(item + 5)

    row = tl.arange(0, ROWS)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    dim = tl.arange(0, DIM_PADDED)
    in_dim = dim < DIM
    is_row = token < count
    at = (start + token).to(tl.int64) * query_token_stride + head * query_head_stride
    q = tl.load(query + at[:, None] + dim[None, :], mask=is_row[:, None] & in_dim[None, :], other=0.0)
    asks = position + token  # each row's own position

    stop = position + count  # KV tokens that the tile's last row sees
    first = 0
    if WINDOW:
        first = tl.maximum(position - window + 1, 0) // COLUMNS
    steps = tl.cdiv(tl.cdiv(stop, COLUMNS) - first, num_parts)
    begin = (first + part * steps) * COLUMNS
    end = tl.minimum(begin + steps * COLUMNS, stop)

    log2_scale = scale * 1.4426950408889634  # exp(x) = 2 ** (x * log2(e)), and the hardware has 2 ** x
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    answer = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    for low in range(begin, end, COLUMNS):
        column = low + tl.arange(0, COLUMNS)
        is_column = column < stop
        block = tl.load(table + sequence.to(tl.int64) * table_stride + column // BLOCK, mask=is_column, other=0)
        slot = (block.to(tl.int64) * BLOCK + column % BLOCK) * (KV_HEADS * DIM) + kv_head * DIM
        k = tl.load(keys + slot[None, :] + dim[:, None], mask=is_column[None, :] & in_dim[:, None], other=0.0)
        score = tl.dot(q, k, input_precision=PRECISION) * log2_scale
        seen = column[None, :] <= asks[:, None]
        if WINDOW:
            seen = seen & (column[None, :] > asks[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
        new_best = tl.maximum(best, tl.max(score, 1))
        # A row that has seen nothing yet must not compute inf - inf.
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
        weight = tl.exp2(score - shift[:, None])
        old = tl.exp2(best - shift)
        total = total * old + tl.sum(weight, 1)
        v = tl.load(values + slot[:, None] + dim[None, :], mask=is_column[:, None] & in_dim[None, :], other=0.0)
        answer = tl.dot(weight.to(v.dtype), v, answer * old[:, None], input_precision=PRECISION)
        best = new_best

    answer = answer / tl.where(total == 0.0, 1.0, total)[:, None]
    at = ((start + token).to(tl.int64) * (KV_HEADS * GROUP) + head) * DIM
    if PARTS:
        in_part = token < tl.where(num_parts > 1, count, 0)
        to = (index.to(tl.int64) * TOKENS + token) * (KV_HEADS * GROUP) + head
        summed = tl.where(total == 0.0, float("-inf"), best + tl.log2(tl.where(total == 0.0, 1.0, total)))
        tl.store(weights + to, summed, mask=in_part)
        tl.store(parts + to[:, None] * DIM + dim[None, :], answer, mask=in_part[:, None] & in_dim[None, :])
        is_row = token < tl.where(num_parts > 1, 0, count)
    tl.store(out + at[:, None] + dim[None, :], answer.to(out.dtype.element_ty), mask=is_row[:, None] & in_dim[None, :])


@triton.jit
def _join(
    parts,  # (items, TOKENS, heads, dim) float32
    weights,  # (items, TOKENS, heads) float32, log2-sum-exp2
    out,  # (tokens, heads, dim)
    items,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    TOKENS_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
):
    head = tl.program_id(0)
    index = tl.program_id(1)
    item = items + index * 6
    start, count, part, num_parts = tl.load(item), tl.load(item + 1), tl.load(item + 4), tl.load(item + 5)
    if (part == 0) & (num_parts > 1):  # the first of a tile's parts speaks for it
        token = tl.arange(0, TOKENS_PADDED)
        dim = tl.arange(0, DIM_PADDED)
        is_row = token < count
        mask = is_row[:, None] & (dim < DIM)[None, :]
        best = tl.full([TOKENS_PADDED], float("-inf"), tl.float32)
        total = tl.zeros([TOKENS_PADDED], tl.float32)
        answer = tl.zeros([TOKENS_PADDED, DIM_PADDED], tl.float32)
        for i in range(0, num_parts):
            at = ((index + i).to(tl.int64) * TOKENS + token) * HEADS + head
            summed = tl.load(weights + at, mask=is_row, other=float("-inf"))
            new_best = tl.maximum(best, summed)
            shift = tl.where(new_best == float("-inf"), 0.0, new_best)
            weight, old = tl.exp2(summed - shift), tl.exp2(best - shift)
            one = tl.load(parts + at[:, None] * DIM + dim[None, :], mask=mask, other=0.0)
            answer = answer * old[:, None] + one * weight[:, None]
            total = total * old + weight
            best = new_best
        answer = answer / tl.where(total == 0.0, 1.0, total)[:, None]
        to = ((start + token).to(tl.int64) * HEADS + head) * DIM
        tl.store(out + to[:, None] + dim[None, :], answer.to(out.dtype.element_ty), mask=mask)
