"""One forward pass of a hybrid batch: lay it out, run the model, take the greedy tokens."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from llmsched_gym.config import BLOCK_SIZE, blocks_needed
from llmsched_gym.real_backend.attention import Chunk, DecodeGroup, KVCache, Segments
from llmsched_gym.real_backend.block_table import SCRATCH, BlockTable, PlacedBlocks
from llmsched_gym.real_backend.errors import BackendError, one_line
from llmsched_gym.real_backend.tokens import TokenStore
from llmsched_gym.real_backend.weights import LoadedModel

if TYPE_CHECKING:
    from llmsched_gym.real_backend.fused import FusedModel
    from llmsched_gym.real_backend.graphs import StaticBatches
    from llmsched_gym.real_backend.paged_attention import PagedBatch

FUSED_TOLERANCE = {torch.float32: 1e-3}
"""Relative difference of logits up to which the fused pass is the model's own; 0.05 in half precision, which rounds."""
MAX_PADDED_TOKENS = 1 << 16
"""KV tokens, padding included, that one group of decodes gathers at a time: bounds the portable path's memory."""


class Work(NamedTuple):
    """Items of one forward pass; arrays of shape (num_items,)."""

    request: np.ndarray  # request index
    row: np.ndarray  # its row in the table of blocks
    num_tokens: np.ndarray  # tokens to compute
    num_computed: np.ndarray  # tokens whose KV is held already
    emits: np.ndarray  # bool, whether a token is wanted

    def take(self, order: np.ndarray | slice) -> Work:
        return Work(*(part[order] for part in self))


class Inputs(NamedTuple):
    """What the model is called with."""

    input_ids: torch.Tensor  # (1, tokens) int64
    position_ids: torch.Tensor  # (1, tokens) int64
    last_rows: torch.Tensor  # (num_emitting,) int64, rows whose logits are wanted
    segments: Segments
    emitting: np.ndarray  # (num_emitting,) request index


class Runner:
    """A loaded model and its KV cache.

    Attributes:
        attention: "sdpa", or "triton" for the paged kernel.
        fused: the model's forward pass in few launches, where set; for the paged kernel's batches.
        static: runs batches of few tokens at fixed shapes, where set.
    """

    def __init__(self, loaded: LoadedModel, cache: KVCache, attention: str = "sdpa") -> None:
        self.loaded, self.cache = loaded, cache
        self.device = loaded.device
        self.attention = attention
        self.fused: FusedModel | None = None
        self.static: StaticBatches | None = None

    def step(self, work: Work, table: BlockTable | PlacedBlocks, tokens: TokenStore) -> dict[int, int]:
        """Run one batch; the greedy token of each emitting request. Blocks and prompts must be there."""
        shape = self.static.shape_of(work) if self.static is not None else None
        if self.static is not None and shape is not None:
            emitting, best, ids = self.static.run(shape, work, table, tokens)
            ids = self._finite(best, ids, emitting)
        else:
            inputs = self.lay_out(work, table, tokens)
            emitting, ids = inputs.emitting, self.run(inputs)
        return dict(zip(emitting.tolist(), ids.tolist(), strict=True))

    def try_kernel(self) -> None:
        """Go back to sdpa, with a warning, if the paged kernel does not run here (without a C compiler, say)."""
        try:
            for num_tokens in (1, 64):  # a tile of each shape
                self.run(self.scratch_inputs(num_tokens))
        except (TypeError, AttributeError, BackendError):
            pass  # the model's fault, which the backend's check explains
        except Exception as error:  # compilers and drivers raise many kinds
            warnings.warn(f"the paged kernel does not run here ({one_line(error)}); using sdpa", stacklevel=2)
            self.attention = "sdpa"

    def try_fused(self, max_positions: int) -> None:
        """Compute by fused kernels from now on, if a trial batch's logits are those of the model's own modules."""
        from llmsched_gym.real_backend.fused import FusedModel, fits  # triton is optional

        if not fits(self.loaded.model):
            return
        inputs = self.scratch_inputs(48)
        with torch.inference_mode():
            own = self.forward(inputs).float()
            self.fused = FusedModel(self.loaded, max_positions)
            difference = float((self.forward(inputs).float() - own).norm() / own.norm())
        if not difference <= FUSED_TOLERANCE.get(self.loaded.dtype, 0.05):  # a nan is none
            warnings.warn(f"the fused kernels are {difference:.1e} off the model's modules; using those", stacklevel=2)
            self.fused = None

    def compile_kernel(self) -> None:
        """Compile all that batches may need of the paged kernel, so that no measured one pays for it."""
        from llmsched_gym.real_backend import paged_attention  # triton is optional

        spec, windows = self.loaded.spec, {None, getattr(self.loaded.model.config, "sliding_window", None)}
        paged_attention.warm_up(
            spec.num_heads, spec.num_kv_heads, spec.head_dim, self.loaded.dtype, self.device, windows
        )

    def lay_out(self, work: Work, table: BlockTable | PlacedBlocks, tokens: TokenStore) -> Inputs:
        """The batch as tensors; blocks and prompts must be there."""
        num_blocks = blocks_needed(work.num_computed + work.num_tokens)
        single = work.num_tokens == 1
        num_single = int(np.count_nonzero(single))
        # Single tokens first, by the blocks of their sequences, so that groups of decodes are slices.
        order = np.argsort(np.where(single, num_blocks, np.iinfo(np.int64).max), kind="stable")
        work, num_blocks = work.take(order), num_blocks[order]
        rows, lengths = work.row, work.num_computed + work.num_tokens

        ends = np.cumsum(work.num_tokens, dtype=np.int64)
        starts = ends - work.num_tokens
        item: np.ndarray | slice  # of each row of the batch; (tokens,)
        if num_single == len(rows):
            item, positions = slice(None), work.num_computed
        else:
            item = np.repeat(np.arange(len(rows)), work.num_tokens)
            positions = np.arange(ends[-1]) - starts[item] + work.num_computed[item]
        blocks = table.blocks[rows[item], positions // BLOCK_SIZE]
        slots = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
        ids = tokens.read(work.request[item], positions)
        segments = Segments(self.cache, self._tensor(slots))
        if self.attention == "triton":
            widest = int(num_blocks.max())
            segments.paged = self._paged(table.blocks[rows, :widest], work.num_tokens, work.num_computed)
        else:
            segments.decodes = [
                DecodeGroup(
                    a, b, self._tensor(table.blocks[rows[a:b], : num_blocks[b - 1]]), self._tensor(lengths[a:b])
                )
                for a, b in group_decodes(num_blocks[:num_single])
            ]
            segments.chunks = [
                Chunk(
                    int(starts[i]),
                    int(ends[i]),
                    int(work.num_computed[i]),
                    self._tensor(table.blocks[rows[i] : rows[i] + 1, : num_blocks[i]]),
                )
                for i in range(num_single, len(rows))
            ]
        return Inputs(
            input_ids=self._tensor(ids)[None],
            position_ids=self._tensor(positions)[None],
            last_rows=self._tensor(ends[work.emits] - 1),
            segments=segments,
            emitting=work.request[work.emits],
        )

    def forward(self, inputs: Inputs) -> torch.Tensor:
        """Logits of the emitting rows, (num_emitting, vocab)."""
        if self.fused is not None and inputs.segments.paged is not None:
            return self.fused.forward(inputs)
        return self.loaded.model(
            input_ids=inputs.input_ids,
            position_ids=inputs.position_ids,
            logits_to_keep=inputs.last_rows,
            use_cache=False,
            segments=inputs.segments,
        ).logits[0]

    def wait(self) -> None:
        """Return when the device has done all it was asked to."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def run(self, inputs: Inputs) -> np.ndarray:
        """Run the pass; the greedy token of each emitting request, (num_emitting,)."""
        with torch.inference_mode():
            best, ids = greedy(self.forward(inputs))
        return self._finite(best, ids, inputs.emitting)

    def _finite(self, best: np.ndarray, ids: np.ndarray, emitting: np.ndarray) -> np.ndarray:
        """The tokens, if the logits they were chosen by are numbers."""
        finite = np.isfinite(best)
        if not finite.all():
            names = ", ".join(str(r) for r in emitting[~finite].tolist()[:5])
            raise BackendError(
                f"request {names}: the model's logits are not finite (nan or inf); check the weights of "
                f"{self.loaded.name}, or use another dtype than {str(self.loaded.dtype).removeprefix('torch.')}"
            )
        return ids

    def scratch_inputs(self, num_tokens: int) -> Inputs:
        """A prompt of so many tokens that writes to the scratch block only: for warm-up and for measuring memory."""
        positions = np.arange(num_tokens)
        segments = Segments(self.cache, self._tensor(positions % BLOCK_SIZE))
        blocks = np.full((1, blocks_needed(num_tokens)), SCRATCH)
        if self.attention == "triton":
            segments.paged = self._paged(blocks, np.array([num_tokens]), np.zeros(1, np.int64))
        else:
            segments.chunks = [Chunk(0, num_tokens, 0, self._tensor(blocks))]
        return Inputs(
            input_ids=self._tensor(np.ones(num_tokens, np.int64))[None],
            position_ids=self._tensor(positions)[None],
            last_rows=self._tensor(positions[-1:]),
            segments=segments,
            emitting=np.zeros(1, np.int64),
        )

    def _paged(self, blocks: np.ndarray, num_tokens: np.ndarray, num_computed: np.ndarray) -> PagedBatch:
        from llmsched_gym.real_backend.paged_attention import lay_out  # triton is optional

        spec, device = self.loaded.spec, self.device
        return lay_out(
            blocks, num_tokens, num_computed, heads=spec.num_heads, kv_heads=spec.num_kv_heads, device=device
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.int64)).to(self.device, non_blocking=True)


def greedy(logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The largest logit of each row and its token, each (rows,), on the host; a nan in a row is its largest."""
    if logits.device.type == "cpu":  # numpy's argmax is the faster one there
        rows = logits.float().numpy()
        ids = rows.argmax(-1)
        return rows[np.arange(len(rows)), ids], ids
    best, chosen = logits.max(-1)
    return best.float().cpu().numpy(), chosen.cpu().numpy()


def group_decodes(num_blocks: np.ndarray) -> list[tuple[int, int]]:
    """Slices of decodes, given their increasing numbers of blocks, in which padding at most doubles what is read."""
    groups = []
    stop = len(num_blocks)
    while stop > 0:
        widest = int(num_blocks[stop - 1])
        fit = max(MAX_PADDED_TOKENS // (widest * BLOCK_SIZE), 1)
        start = max(int(np.searchsorted(num_blocks[:stop], (widest + 1) // 2)), stop - fit)
        groups.append((start, stop))
        stop = start
    return groups[::-1]
