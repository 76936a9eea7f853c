"""Attention of a hybrid batch over the paged cache in one Triton kernel, for prompt chunks and decodes alike.

A program takes a tile: consecutive query tokens of one sequence, with all query heads that share one KV head, so that
keys and values are read once for the group. It walks the sequence's blocks with the online softmax of FlashAttention
(arXiv 2205.14135). Where tiles are too few to fill the device, as with few long sequences, the walk is split over
several programs and a second kernel joins the parts by their log-sum-exp (Flash-Decoding, Dao et al. 2023). Block
tables are those of PagedAttention (arXiv 2309.06180).

Importing this module needs triton; TRITON_INTERPRET=1, set before, runs the kernels on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from llmsched_gym.config import BLOCK_SIZE

TILE_COLUMNS = 4
"""Of a tile: its first row in the batch, its number of rows, the first one's position, its sequence."""
MIN_ROWS = 16
"""Query rows (tokens times grouped heads) of a program, at least: the least that matrix units take."""
PROGRAMS_PER_UNIT = 4
"""Programs per multiprocessor that are worth splitting walks for."""
MAX_SPLITS = 32


class Tuning(NamedTuple):
    """How a program of the kernel is shaped; measured by the check of a GPU."""

    rows: int  # query rows of a program, at least
    columns: int  # KV tokens that it reads at a time
    warps: int
    stages: int  # of the software pipeline


DECODES, CHUNKS = Tuning(MIN_ROWS, 64, 4, 3), Tuning(64, 64, 4, 3)


@dataclass
class Launch:
    """Tiles of one shape: rows start..stop of the batch."""

    start: int
    stop: int
    tiles: torch.Tensor  # (num_tiles, TILE_COLUMNS) int32
    tile_tokens: int  # query tokens of a full tile
    splits: int  # programs that share a tile's walk
    tuning: Tuning = DECODES


@dataclass
class PagedBatch:
    """A hybrid batch as the kernel gets it."""

    block_table: torch.Tensor  # (sequences, blocks) int32
    launches: list[Launch]


def tile_tokens(group: int, prefill: bool) -> int:
    """Query tokens of a tile whose KV head serves `group` query heads."""
    return max(CHUNKS.rows // group, 1) if prefill else 1


def tiles_of(starts: np.ndarray, num_tokens: np.ndarray, num_computed: np.ndarray, tokens: int) -> np.ndarray:
    """Tiles (num_tiles, TILE_COLUMNS) int32 of at most `tokens` rows; arguments are per sequence, in batch order."""
    counts = -(-num_tokens // tokens)
    sequence = np.repeat(np.arange(len(starts)), counts)
    offset = tokens * (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts))
    rows = np.minimum(num_tokens[sequence] - offset, tokens)
    columns = (starts[sequence] + offset, rows, num_computed[sequence] + offset, sequence)
    return np.stack(columns, axis=1).astype(np.int32)


def choose_splits(num_tiles: int, num_kv_heads: int, num_units: int) -> int:
    """Programs per tile, a power of two, so that all multiprocessors have some."""
    wanted = PROGRAMS_PER_UNIT * num_units / max(num_tiles * num_kv_heads, 1)
    return min(1 << max(int(np.log2(max(wanted, 1.0))), 0), MAX_SPLITS)


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
    starts = np.cumsum(num_tokens) - num_tokens
    num_single = int(np.count_nonzero(num_tokens == 1))
    units = num_units(device)
    launches = []
    for part, is_prefill in ((slice(0, num_single), False), (slice(num_single, None), True)):
        if len(starts[part]) == 0:
            continue
        tokens = tile_tokens(heads // kv_heads, is_prefill)
        tiles = tiles_of(starts[part], num_tokens[part], num_computed[part], tokens)
        tiles[:, 3] += part.start
        start, stop = int(starts[part][0]), int(starts[part][-1] + num_tokens[part][-1])
        splits = choose_splits(len(tiles), kv_heads, units)
        on_device = torch.from_numpy(tiles).to(device, non_blocking=True)
        launches.append(Launch(start, stop, on_device, tokens, splits, CHUNKS if is_prefill else DECODES))
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
        for exponent in range(MAX_SPLITS.bit_length()):
            for launch in batch.launches:
                launch.splits = 1 << exponent
            for window in windows:
                attend(query, cache, cache, out, batch, head_dim**-0.5, window)


def num_units(device: torch.device) -> int:
    """Multiprocessors of a GPU; the interpreter is one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def attend(
    query: torch.Tensor,  # (tokens, heads, head_dim), any strides
    keys: torch.Tensor,  # (blocks, BLOCK_SIZE, kv_heads, head_dim), contiguous
    values: torch.Tensor,
    out: torch.Tensor,  # (tokens, heads, head_dim), contiguous; every row of the launches is written
    batch: PagedBatch,
    scale: float,
    window: int | None = None,
) -> None:
    """Causal attention of all rows; with a `window`, to the last so many tokens, the own one included."""
    heads, dim = query.shape[1:]
    kv_heads = keys.shape[2]
    group = heads // kv_heads
    table = batch.block_table
    for launch in batch.launches:
        rows, splits = launch.stop - launch.start, launch.splits
        parts, weights = out, out
        if splits > 1:
            parts = torch.empty((splits, rows, heads, dim), dtype=torch.float32, device=out.device)
            weights = torch.empty((splits, rows, heads), dtype=torch.float32, device=out.device)
        block_rows = max(triton.next_power_of_2(launch.tile_tokens * group), MIN_ROWS)
        _attend[(kv_heads, len(launch.tiles), splits)](
            query,
            keys,
            values,
            parts,
            weights,
            launch.tiles,
            launch.tiles.stride(0),
            table,
            table.stride(0),
            query.stride(0),
            query.stride(1),
            rows,
            launch.start if splits > 1 else 0,
            scale,
            window or 0,
            splits,
            KV_HEADS=kv_heads,
            GROUP=group,
            DIM=dim,
            DIM_PADDED=triton.next_power_of_2(dim),
            BLOCK=BLOCK_SIZE,
            ROWS=block_rows,
            COLUMNS=launch.tuning.columns,
            WINDOW=window is not None,
            SPLIT=splits > 1,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=launch.tuning.warps,
            num_stages=launch.tuning.stages,
        )
        if splits > 1:
            _join[(heads, rows)](
                parts,
                weights,
                out,
                rows,
                launch.start,
                HEADS=heads,
                DIM=dim,
                DIM_PADDED=triton.next_power_of_2(dim),
                SPLITS=splits,
                num_warps=1,
            )


# Counts that change from batch to batch must not each cost a compilation.
@triton.jit(do_not_specialize=["tile_stride", "table_stride", "num_rows", "first_row", "window", "splits"])
def _attend(
    query,
    keys,
    values,
    out,  # the answer (tokens, heads, dim), or with SPLIT the parts (splits, rows, heads, dim) float32
    weights,  # with SPLIT: log2-sum-exp2 of each part (splits, rows, heads)
    tiles,
    tile_stride,
    table,
    table_stride,
    query_token_stride,
    query_head_stride,
    num_rows,
    first_row,
    scale,
    window,
    splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    kv_head = tl.program_id(0)
    tile = tiles + tl.program_id(1) * tile_stride
    split = tl.program_id(2)
    start, count = tl.load(tile), tl.load(tile + 1)
    position, sequence = tl.load(tile + 2), tl.load(tile + 3)

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
    steps = tl.cdiv(tl.cdiv(stop, COLUMNS) - first, splits)
    begin = (first + split * steps) * COLUMNS
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
    to = (start - first_row + token).to(tl.int64)
    if SPLIT:
        to += split.to(tl.int64) * num_rows
        summed = tl.where(total == 0.0, float("-inf"), best + tl.log2(tl.where(total == 0.0, 1.0, total)))
        tl.store(weights + to * (KV_HEADS * GROUP) + head, summed, mask=is_row)
    at = (to * (KV_HEADS * GROUP) + head) * DIM
    tl.store(out + at[:, None] + dim[None, :], answer.to(out.dtype.element_ty), mask=is_row[:, None] & in_dim[None, :])


@triton.jit(do_not_specialize=["num_rows", "first_row"])
def _join(
    parts,  # (splits, rows, heads, dim) float32
    weights,  # (splits, rows, heads) float32, log2-sum-exp2
    out,  # (tokens, heads, dim)
    num_rows,
    first_row,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
):
    head = tl.program_id(0)
    row = tl.program_id(1)
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, DIM_PADDED)
    in_dim = dim < DIM
    at = (split.to(tl.int64) * num_rows + row) * HEADS + head
    weight = tl.load(weights + at)
    weight = tl.exp2(weight - tl.max(weight, 0))  # some part has seen something, so the largest is finite
    part = tl.load(parts + at[:, None] * DIM + dim[None, :], mask=in_dim[None, :], other=0.0)
    answer = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    to = ((row + first_row).to(tl.int64) * HEADS + head) * DIM
    tl.store(out + to + dim, answer.to(out.dtype.element_ty), mask=in_dim)
