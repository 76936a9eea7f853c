"""Batches of decodes alone, at a few fixed sizes: recorded once as CUDA graphs and replayed.

A decode step of a 7B model takes a fast GPU less time than launching its thousand kernels takes the host; a replay is
one launch. Sizes and addresses are part of a graph, so a batch is padded to the next of a few sizes and lives in
buffers that stay where they are. Padded rows are sequences of one token in the scratch block: they cost little and
nobody reads them. Mixed batches are long enough to hide the host, and padding them would cost real work.

On a CPU the same buffers run eagerly: the path's logic without its speed, for tests.
"""

from __future__ import annotations

import numpy as np
import torch

from llmsched_gym.config import BLOCK_SIZE
from llmsched_gym.real_backend.attention import DecodeGroup, Segments
from llmsched_gym.real_backend.block_table import SCRATCH, BlockTable
from llmsched_gym.real_backend.runner import Inputs, Runner, Work
from llmsched_gym.real_backend.tokens import TokenStore

SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
TILE_COLUMNS = 4  # as in paged_attention, which needs triton
WARM_UP_PASSES = 2


def sizes_up_to(max_num_seqs: int) -> list[int]:
    """Sizes that are recorded, so that every batch of at most `max_num_seqs` decodes fits, if that is at most 256."""
    return [*(n for n in SIZES if n < max_num_seqs), min(max_num_seqs, SIZES[-1])]


def padded_size(num_seqs: int, sizes: list[int]) -> int | None:
    """The smallest size that holds so many sequences; None if none does."""
    return next((size for size in sizes if size >= num_seqs), None)


class DecodeGraphs:
    """Static buffers for batches of decodes, and on a GPU a graph per size."""

    def __init__(self, runner: Runner, max_num_seqs: int, blocks_per_seq: int) -> None:
        self.runner = runner
        self.sizes = sizes_up_to(max_num_seqs)
        most, device = self.sizes[-1], runner.device
        pinned = device.type == "cuda"
        self._host_ids = torch.zeros(3 * most, dtype=torch.int64, pin_memory=pinned)
        self._host_table = torch.zeros((most, TILE_COLUMNS + blocks_per_seq), dtype=torch.int32, pin_memory=pinned)
        self._ids = torch.zeros_like(self._host_ids, device=device)  # (3 * size,): token, position, slot of each row
        self._table = torch.zeros_like(self._host_table, device=device)  # tile and block table of each row
        self._rows = torch.arange(most, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._answers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def fit(self, work: Work) -> bool:
        """Whether the batch has one token of each sequence and a size that holds it."""
        return padded_size(len(work.request), self.sizes) is not None and bool((work.num_tokens == 1).all())

    def record(self) -> None:
        """Capture a graph for every size; on a CPU there is nothing to do. Writes to the scratch block only."""
        if self.runner.device.type != "cuda":
            return
        side = torch.cuda.Stream(self.runner.device)
        pool = None
        for size in reversed(self.sizes):  # the largest first: the others fit into its memory
            self._fill_padding(0, size)
            self._upload(size)
            torch.cuda.synchronize(self.runner.device)
            with torch.inference_mode():
                with torch.cuda.stream(side):  # compilation and workspaces must not be recorded
                    for _ in range(WARM_UP_PASSES):
                        self._forward(size)
                torch.cuda.synchronize(self.runner.device)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    self._answers[size] = self._forward(size)
            self._graphs[size] = graph
            pool = graph.pool()

    def run(self, work: Work, table: BlockTable, tokens: TokenStore) -> tuple[np.ndarray, np.ndarray]:
        """Largest logit of each row and its token, each (num_items,), on the host; the batch must fit."""
        num = len(work.request)
        size = padded_size(num, self.sizes)
        assert size is not None, "the batch is larger than the largest size"
        self._fill(work, table, tokens, size)
        self._upload(size)
        if size in self._graphs:
            self._graphs[size].replay()
            best, ids = self._answers[size]
        else:
            with torch.inference_mode():
                best, ids = self._forward(size)
        return best[:num].float().cpu().numpy(), ids[:num].cpu().numpy()

    def _fill(self, work: Work, table: BlockTable, tokens: TokenStore, size: int) -> None:
        num, positions = len(work.request), work.num_computed
        last_block = positions // BLOCK_SIZE
        ids = self._host_ids.numpy()[: 3 * size].reshape(3, size)
        ids[0, :num] = tokens.read(work.request, positions)
        ids[1, :num] = positions
        ids[2, :num] = table.blocks[work.row, last_block] * BLOCK_SIZE + positions % BLOCK_SIZE
        rows, blocks = np.split(self._host_table.numpy()[:num], [TILE_COLUMNS], axis=1)
        index = np.arange(num)
        rows[:] = np.stack([index, np.ones(num, int), positions, index], axis=1)
        width = int(last_block.max()) + 1  # nobody reads behind a sequence's end
        blocks[:, :width] = table.blocks[work.row, :width]
        self._fill_padding(num, size)

    def _fill_padding(self, num: int, size: int) -> None:
        """Rows num..size become sequences of one token, its KV at the start of the scratch block."""
        self._host_ids.numpy()[: 3 * size].reshape(3, size)[:, num:] = 0
        rows = self._host_table.numpy()[num:size]
        index = np.arange(num, size)
        rows[:, :TILE_COLUMNS] = np.stack([index, np.ones_like(index), np.zeros_like(index), index], axis=1)
        rows[:, TILE_COLUMNS:] = SCRATCH

    def _upload(self, size: int) -> None:
        # The host's buffers may be filled again once the answers have come: those wait for this copy.
        self._ids[: 3 * size].copy_(self._host_ids[: 3 * size], non_blocking=True)
        self._table[:size].copy_(self._host_table[:size], non_blocking=True)

    def _forward(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Largest logit of each row and its token, each (size,), on the device."""
        ids, positions, slots = self._ids[: 3 * size].view(3, size)
        tiles, blocks = self._table[:size].split([TILE_COLUMNS, self._table.shape[1] - TILE_COLUMNS], dim=1)
        segments = Segments(self.runner.cache, slots)
        if self.runner.attention == "triton":
            from llmsched_gym.real_backend.paged_attention import Launch, PagedBatch, choose_splits, num_units

            splits = choose_splits(size, self.runner.loaded.spec.num_kv_heads, num_units(self.runner.device))
            segments.paged = PagedBatch(blocks, [Launch(0, size, tiles, 1, splits)])
        else:
            segments.decodes = [DecodeGroup(0, size, blocks.long(), positions + 1)]
        inputs = Inputs(ids[None], positions[None], self._rows[:size], segments, np.arange(size))
        best, chosen = self.runner.forward(inputs).max(-1)
        return best, chosen
