"""One forward pass of a hybrid batch: lay it out, run the model, take the greedy tokens."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from llmsched_gym.config import BLOCK_SIZE, blocks_needed
from llmsched_gym.engine.jit import entry
from llmsched_gym.real_backend.attention import Chunk, KVCache, Segments
from llmsched_gym.real_backend.block_table import SCRATCH, BlockTable, PlacedBlocks
from llmsched_gym.real_backend.errors import BackendError, one_line
from llmsched_gym.real_backend.layout import Layout, Work
from llmsched_gym.real_backend.tokens import TokenStore
from llmsched_gym.real_backend.weights import LoadedModel

if TYPE_CHECKING:
    from llmsched_gym.real_backend.fused import FusedModel
    from llmsched_gym.real_backend.graphs import StaticBatches
    from llmsched_gym.real_backend.paged_attention import PagedBatch

FUSED_TOLERANCE = {torch.float32: 1e-3}
"""Relative difference of logits up to which the fused pass is the model's own; 0.05 in half precision, which rounds."""
_NO_ROWS = np.zeros(0, np.int64)


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
        self.layout = Layout(self.device)
        self._inference = torch.inference_mode()
        self.fused: FusedModel | None = None
        self.static: StaticBatches | None = None

    def step(self, work: Work, table: BlockTable | PlacedBlocks, tokens: TokenStore) -> tuple[np.ndarray, np.ndarray]:
        """Run one batch; emitting requests and the greedy token of each. Blocks and prompts must be there."""
        shape = self.static.shape_of(work) if self.static is not None else None
        if self.static is not None and shape is not None:
            emitting, best, ids = self.static.run(shape, work, table, tokens)
            return emitting, self._checked(ids, np.flatnonzero(~np.isfinite(best)), emitting)
        inputs = self.lay_out(work, table, tokens)
        return inputs.emitting, self.run(inputs)

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
        """The batch as tensors, good until the next one; blocks and prompts must be there."""
        is_paged = self.attention == "triton"
        laid = self.layout.fill(work, table, tokens, portable=not is_paged)
        segments = Segments(self.cache, laid.slots, laid.decodes, laid.chunks)
        if is_paged:
            work = work.take(laid.order)
            widest = int((work.num_computed + work.num_tokens - 1).max()) // BLOCK_SIZE + 1
            segments.paged = self._paged(table.blocks[work.row, :widest], work.num_tokens, work.num_computed)
        return Inputs(laid.ids, laid.positions, laid.wanted, segments, laid.emitting)

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
        with self._inference:
            ids, strange = greedy(self.forward(inputs))
        return self._checked(ids, strange, inputs.emitting)

    def _checked(self, ids: np.ndarray, strange: np.ndarray, emitting: np.ndarray) -> np.ndarray:
        """The tokens, if the logits they were chosen by are numbers; those of `strange` rows are not."""
        if len(strange) > 0:
            names = ", ".join(str(r) for r in emitting[strange].tolist()[:5])
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
    """The token of each row's largest logit, (rows,), and the rows where it is not finite; a nan is a row's largest."""
    if logits.device.type == "cpu":  # numpy's argmax is the faster one there
        rows: np.ndarray = (logits if logits.dtype == torch.float32 else logits.float()).numpy()
        ids: np.ndarray = rows.argmax(-1)
        if _are_finite(rows, ids):
            return ids, _NO_ROWS
        return ids, np.flatnonzero(~np.isfinite(rows[np.arange(len(ids)), ids]))
    largest, chosen = logits.max(-1)
    return chosen.cpu().numpy(), np.flatnonzero(~np.isfinite(largest.float().cpu().numpy()))


@entry()
def _are_finite(rows, ids):
    num_strange = 0
    for i in range(rows.shape[0]):
        num_strange += not math.isfinite(rows[i, ids[i]])
    return num_strange == 0
