"""Batches at a few fixed shapes: recorded once as CUDA graphs and replayed.

A pass of a 7B model over few tokens takes a fast GPU less time than launching its kernels takes the host; a replay is
one launch. Sizes and addresses are part of a graph, so a batch is padded to the next of a few shapes and lives in
buffers that stay where they are. Padded rows are sequences of one token in the scratch block: they cost little and
nobody reads them. Batches of decodes alone have shapes of their own; with the paged kernel, whose work is a list on the
device, batches with prompts have some too, up to the size at which the device takes longer than the host.

On a CPU the same buffers run eagerly: the path's logic without its speed, for tests.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from llmsched_gym.config import BLOCK_SIZE, blocks_needed
from llmsched_gym.real_backend.attention import DecodeGroup, Segments
from llmsched_gym.real_backend.block_table import SCRATCH, BlockTable, PlacedBlocks
from llmsched_gym.real_backend.layout import Work
from llmsched_gym.real_backend.runner import Inputs, Runner
from llmsched_gym.real_backend.tokens import TokenStore

DECODES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
"""Sizes of batches of decodes alone."""
TOKENS = (*range(16, 256, 16), *range(256, 512, 32), *range(512, 1024 + 1, 64))
"""Sizes of batches with prompts."""
MAX_CHUNKS = 8
"""Prompts that a batch with prompts surely has room for."""
WARM_UP_PASSES = 2


class Shape(NamedTuple):
    """What a recorded pass has room for."""

    tokens: int  # rows of the batch
    singles: int  # sequences of one token, padding included
    tiles: int  # the kernel's tiles of prompts; 0 in batches of decodes alone
    answers: int  # rows whose logits are wanted
    parts: bool = False  # whether walks over long sequences may be split


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Sizes that are recorded, so that every batch of at most `max_num_seqs` decodes fits, if that is at most 256."""
    return [*(n for n in DECODES if n < max_num_seqs), min(max_num_seqs, DECODES[-1])]


def padded_size(num: int, sizes: list[int]) -> int | None:
    """The smallest size that holds so many; None if none does."""
    return next((size for size in sizes if size >= num), None)


class StaticBatches:
    """Static buffers for batches of fixed shapes, and on a GPU a graph per shape.

    Args:
        max_num_seqs: most sequences of a batch.
        max_tokens: most tokens of a batch with prompts.
        blocks_per_seq: most blocks of a sequence.
    """

    def __init__(self, runner: Runner, max_num_seqs: int, max_tokens: int, blocks_per_seq: int) -> None:
        self.runner = runner
        self.decode_shapes = {n: Shape(n, n, 0, n) for n in decode_sizes(max_num_seqs)}
        self.prompt_shapes: dict[int, Shape] = {}
        self._max_num_seqs, self._spare, self._item_columns = max_num_seqs, 0, 0
        if runner.attention == "triton":
            from llmsched_gym.real_backend import paged_attention as paged  # triton is optional

            spec = runner.loaded.spec
            group = spec.num_heads // spec.num_kv_heads
            self._spare = paged.spare_items(spec.num_kv_heads, paged.num_units(runner.device))
            self._item_columns = paged.ITEM_COLUMNS
            below = 0
            for n in [n for n in TOKENS if n <= max_tokens]:
                singles = min(n, max_num_seqs + n - below)  # decodes and padding
                tiles = -(-n // paged.tile_tokens(group, True)) + MAX_CHUNKS
                self.prompt_shapes[n] = Shape(n, singles, tiles, min(n, max_num_seqs), parts=True)
                below = n
        shapes = [*self.decode_shapes.values(), *self.prompt_shapes.values()]
        most = Shape(*(max(column) for column in zip(*shapes, strict=True)))
        self._ids = self._buffer(3 * most.tokens + most.answers, torch.int64)  # token, position, slot; rows of answers
        self._singles = self._buffer((most.singles + self._spare) * self._item_columns, torch.int32)
        self._tiles = self._buffer((most.tiles + self._spare) * self._item_columns, torch.int32)
        self._blocks_per_seq = blocks_per_seq
        # the first row stays the scratch block's: it is the padding's
        self._table = self._buffer((max(max_num_seqs, DECODES[-1]) + 1) * blocks_per_seq, torch.int32)
        self._best = self._buffer(most.answers, torch.float32)
        self._chosen = self._buffer(most.answers, torch.int64)
        self._graphs: dict[Shape, torch.cuda.CUDAGraph] = {}

    def shape_of(self, work: Work) -> Shape | None:
        """The smallest shape that holds the batch; None if none does."""
        if (work.num_tokens == 1).all():
            size = padded_size(len(work.request), list(self.decode_shapes))
            return None if size is None else self.decode_shapes[size]
        size = padded_size(int(work.num_tokens.sum()), list(self.prompt_shapes))
        if size is None:
            return None
        chunks = int(np.count_nonzero(work.num_tokens > 1))
        return self.prompt_shapes[size] if chunks <= MAX_CHUNKS else None

    def record(self) -> None:
        """Capture a graph for every shape; on a CPU there is nothing to do. Writes to the scratch block only."""
        if self.runner.device.type != "cuda":
            return
        side = torch.cuda.Stream(self.runner.device)
        pool = None
        shapes = [*self.prompt_shapes.values(), *self.decode_shapes.values()]
        shapes += [shape._replace(parts=True) for shape in self.decode_shapes.values()]
        for shape in sorted(shapes, reverse=True):  # the largest first: the others fit into its memory
            self._fill_scratch(shape)
            torch.cuda.synchronize(self.runner.device)
            with torch.inference_mode():
                with torch.cuda.stream(side):  # compilation and workspaces must not be recorded
                    for _ in range(WARM_UP_PASSES):
                        self._pass(shape)
                torch.cuda.synchronize(self.runner.device)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    self._pass(shape)
            self._graphs[shape] = graph
            pool = graph.pool()

    def _fill_scratch(self, shape: Shape) -> None:
        """A batch that fills the shape and writes to the scratch block: one prompt, or padding alone."""
        num_tokens = np.full(1 if shape.tiles else 0, shape.tokens)
        zeros = np.zeros_like(num_tokens)
        work = Work(zeros, zeros, num_tokens, zeros, zeros.astype(bool))
        positions = np.arange(num_tokens.sum())
        blocks = np.full((len(num_tokens), min(blocks_needed(shape.tokens), self._blocks_per_seq)), SCRATCH)
        self._fill(shape, work, blocks, np.stack([positions * 0, positions, positions % BLOCK_SIZE]), zeros)

    def run(
        self, shape: Shape, work: Work, table: BlockTable | PlacedBlocks, tokens: TokenStore
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Emitting requests, the largest logit of each and its token, each (num_emitting,), on the host."""
        # Single tokens first: the kernel's lists are in the order of the rows.
        if shape.tiles:
            work = work.take(np.argsort(work.num_tokens > 1, kind="stable"))
        ends = np.cumsum(work.num_tokens)
        item = np.repeat(np.arange(len(ends)), work.num_tokens) if shape.tiles else np.arange(len(ends))
        positions = np.arange(len(item)) - (ends - work.num_tokens)[item] + work.num_computed[item]
        slots = table.blocks[work.row[item], positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        rows = np.stack([tokens.read(work.request[item], positions), positions, slots])
        width = int((work.num_computed + work.num_tokens - 1).max()) // BLOCK_SIZE + 1
        has_parts = self._fill(shape, work, table.blocks[work.row, :width], rows, (ends - 1)[work.emits])
        shape = shape._replace(parts=shape.parts or has_parts)
        if shape in self._graphs:
            self._graphs[shape].replay()
        else:
            with torch.inference_mode():
                self._pass(shape)
        self.runner.wait()
        emitting = work.request[work.emits]
        return emitting, *(part.host[: len(emitting)].copy() for part in (self._best, self._chosen))

    def _pass(self, shape: Shape) -> None:
        """The batch from the host's buffers through the model, and the answers back: copies are recorded too."""
        room = self._spare * self._item_columns
        self._ids.send(3 * shape.tokens + shape.answers)
        self._singles.send(shape.singles * self._item_columns + room)
        self._tiles.send(shape.tiles * self._item_columns + room if shape.tiles else 0)
        self._table.send((1 + min(shape.tokens, self._max_num_seqs)) * self._blocks_per_seq)
        best, chosen = self._forward(shape)
        self._best.fetch(best.float())
        self._chosen.fetch(chosen)

    def _fill(
        self,
        shape: Shape,
        work: Work,
        blocks: np.ndarray,  # (sequences, blocks)
        rows: np.ndarray,  # (3, tokens): token, position, slot
        answers: np.ndarray,  # (emitting,) rows
    ) -> bool:
        """Lay a batch out in the host's buffers, padded to `shape`; whether walks over its sequences are split."""
        num_seqs, num_rows = len(work.request), rows.shape[1]
        ids = self._ids.host[: 3 * shape.tokens].reshape(3, shape.tokens)
        ids[:, :num_rows] = rows
        ids[:, num_rows:] = 0  # the first slot of the scratch block
        wanted = self._ids.host[3 * shape.tokens :][: shape.answers]
        wanted[: len(answers)], wanted[len(answers) :] = answers, 0
        table = self._table.host.reshape(-1, self._blocks_per_seq)[1:]
        table[:num_seqs, : blocks.shape[1]] = blocks  # nobody reads behind a sequence's end
        if self._item_columns:
            return self._fill_items(shape, work, np.arange(num_rows, shape.tokens))
        table[num_seqs : shape.tokens] = SCRATCH  # the portable attention takes a row for each of the batch
        return False

    def _fill_items(self, shape: Shape, work: Work, padding: np.ndarray) -> bool:
        from llmsched_gym.real_backend import paged_attention as paged

        spec = self.runner.loaded.spec
        num_single = int(np.count_nonzero(work.num_tokens == 1))
        starts, sequences = np.cumsum(work.num_tokens) - work.num_tokens, np.arange(1, len(work.num_tokens) + 1)
        columns = [starts, work.num_tokens, work.num_computed, sequences]
        ones, zeros = np.ones_like(padding), np.zeros_like(padding)
        padded = [padding, ones, zeros, zeros]
        singles = [np.concatenate([c[:num_single], p]) for c, p in zip(columns, padded, strict=True)]
        group, has_parts = spec.num_heads // spec.num_kv_heads, False
        for buffer, room, part, is_prefill in (
            (self._singles, shape.singles, singles, False),
            (self._tiles, shape.tiles, [c[num_single:] for c in columns], True),
        ):
            if room == 0:
                continue
            tuning = paged.CHUNKS if is_prefill else paged.DECODES
            tokens = paged.tile_tokens(group, is_prefill)
            starts, num_tokens, num_computed, sequences = part
            items = paged.work_items(starts, num_tokens, num_computed, sequences, tokens, tuning.columns, self._spare)
            host = buffer.host[: (room + self._spare) * self._item_columns].reshape(-1, self._item_columns)
            host[: len(items)] = items
            host[len(items) :] = (0, 0, 0, 0, 0, 1)  # of no rows
            has_parts |= bool((items[:, -1] > 1).any())
        return has_parts

    def _forward(self, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        """Largest logit of each wanted row and its token, each (answers,), on the device."""
        ids, positions, slots = self._ids.device[: 3 * shape.tokens].view(3, shape.tokens)
        wanted = self._ids.device[3 * shape.tokens :][: shape.answers]
        table = self._table.device.view(-1, self._blocks_per_seq)
        segments = Segments(self.runner.cache, slots)
        if self._item_columns:
            from llmsched_gym.real_backend import paged_attention as paged

            spec = self.runner.loaded.spec
            launches = []
            for buffer, room, is_prefill in ((self._singles, shape.singles, False), (self._tiles, shape.tiles, True)):
                if room:
                    items = buffer.device[: (room + self._spare) * self._item_columns].view(-1, self._item_columns)
                    tokens = paged.tile_tokens(spec.num_heads // spec.num_kv_heads, is_prefill)
                    tuning = paged.CHUNKS if is_prefill else paged.DECODES
                    launches.append(paged.Launch(items, tokens, shape.parts, tuning))
            segments.paged = paged.PagedBatch(table, launches)
        else:
            segments.decodes = [DecodeGroup(0, shape.tokens, table[1 : shape.tokens + 1].long(), positions + 1)]
        inputs = Inputs(ids[None], positions[None], wanted, segments, np.arange(shape.answers))
        best, chosen = self.runner.forward(inputs).max(-1)
        return best, chosen

    def _buffer(self, size: int, dtype: torch.dtype) -> _Buffer:
        return _Buffer(size, dtype, self.runner.device)


class _Buffer:
    """A flat array on the host, pinned for a GPU, and its copy on the device."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._pinned = torch.zeros(size, dtype=dtype, pin_memory=device.type == "cuda")
        self.host = self._pinned.numpy()
        self.device = torch.zeros(size, dtype=dtype, device=device)

    def send(self, size: int) -> None:
        """Copy the first `size` values to the device."""
        self.device[:size].copy_(self._pinned[:size], non_blocking=True)

    def fetch(self, values: torch.Tensor) -> None:
        """Copy values from the device to the first places of the host's array."""
        self._pinned[: len(values)].copy_(values, non_blocking=True)
