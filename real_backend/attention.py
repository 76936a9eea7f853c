"""Attention of a hybrid batch over a paged KV cache, hooked into transformers by name.

A forward pass gets all tokens of the batch as one sequence, and a :class:`Segments` that says whose they are. On a GPU
with triton the kernel of paged_attention.py attends; here is the portable path, SDPA: per prompt chunk, and per group
of decodes with contexts of about the same length.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from llmsched_gym.config import BLOCK_SIZE
from llmsched_gym.real_backend.errors import BackendError

if TYPE_CHECKING:
    from llmsched_gym.real_backend.paged_attention import PagedBatch

NAME = "llmsched_paged"
"""The attention implementation's name; transformers knows no mask for it, so it builds none."""
KINDS = ("auto", "sdpa", "triton")
MIN_COMPUTE_CAPABILITY = (8, 0)
"""GPUs below have no bfloat16 matrix units; the kernel is not for them."""
MIN_HEAD_DIM = 16
"""The least that a matrix product in triton takes."""


def choose_attention(kind: str, device: torch.device, head_dim: int) -> str:
    """`kind` with "auto" resolved: triton on GPUs that can run it, sdpa elsewhere.

    Asking for triton where it cannot run raises :class:`BackendError`; TRITON_INTERPRET=1 lets it run on a CPU, slowly.
    """
    if kind not in KINDS:
        raise BackendError(f"attention: expected one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "sdpa":
        return kind
    lacks = None
    if importlib.util.find_spec("triton") is None:
        lacks = "triton is not installed (pip install triton)"
    elif head_dim < MIN_HEAD_DIM:
        lacks = f"the model's heads have {head_dim} dimensions, the kernel needs {MIN_HEAD_DIM}"
    elif device.type != "cuda":
        interprets = kind == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        lacks = None if interprets else f"the kernel needs a GPU, the model is on {device}"
    elif torch.cuda.get_device_capability(device) < MIN_COMPUTE_CAPABILITY:
        lacks = f"{torch.cuda.get_device_name(device)} is too old for the kernel"
    if kind == "triton" and lacks:
        raise BackendError(f"attention 'triton': {lacks}; use auto or sdpa")
    return "sdpa" if lacks else "triton"


class KVCache:
    """Keys and values of all layers, in blocks; block 0 is scratch. Zeroed: padding is read, and 0 * nan is nan."""

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_blocks + 1, BLOCK_SIZE, num_kv_heads, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.num_writes = 0  # layers written since the counter was last reset

    def clear(self) -> None:
        for part in (*self.keys, *self.values):
            part.zero_()

    def fill_random(self, seed: int) -> None:
        """Normal-distributed content, for timing: zeros run faster than what models produce."""
        device = self.keys[0].device
        generator = torch.Generator(device).manual_seed(seed)
        for part in (*self.keys, *self.values):
            part.normal_(generator=generator)

    def write(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store keys and values (tokens, kv_heads, head_dim) at slots (tokens,): block * BLOCK_SIZE + offset."""
        self.keys[layer].view(-1, *key.shape[1:]).index_copy_(0, slots, key)
        self.values[layer].view(-1, *value.shape[1:]).index_copy_(0, slots, value)
        self.num_writes += 1

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of a layer, each (blocks, BLOCK_SIZE, kv_heads, head_dim)."""
        return self.keys[layer], self.values[layer]

    def read(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of sequences' blocks (sequences, blocks), each (sequences, kv_heads, tokens, head_dim)."""
        return _gather(self.keys[layer], blocks), _gather(self.values[layer], blocks)


def _gather(part: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    sequences, count = blocks.shape
    flat = part.index_select(0, blocks.view(-1))
    return flat.view(sequences, count * BLOCK_SIZE, *part.shape[2:]).transpose(1, 2)


@dataclass
class DecodeGroup:
    """Rows start..stop of the batch: one token each, of sequences whose blocks are padded to one number."""

    start: int
    stop: int
    blocks: torch.Tensor  # (sequences, blocks) int64
    lengths: torch.Tensor  # (sequences,) int64, KV tokens to attend to, the new one included
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask (sequences, 1, 1, tokens); every layer of one window shares it."""
        if window not in self._masks:
            positions = torch.arange(self.blocks.shape[1] * BLOCK_SIZE, device=self.blocks.device)
            hidden = positions >= self.lengths[:, None]
            if window is not None:
                hidden |= positions < self.lengths[:, None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
            self._masks[window] = mask[:, None, None, :]
        return self._masks[window]


@dataclass
class Chunk:
    """Rows start..stop of the batch: consecutive prompt tokens of one sequence, behind `computed` others."""

    start: int
    stop: int
    computed: int
    blocks: torch.Tensor  # (1, blocks) int64
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def is_plain_causal(self, window: int | None) -> bool:
        """Whether the chunk sees itself only, so that no mask and no cache is needed."""
        return self.computed == 0 and (window is None or self.stop - self.start <= window)

    def mask(self, window: int | None) -> torch.Tensor:
        """Boolean mask (tokens, KV tokens), true where attended."""
        if window not in self._masks:
            total = self.computed + self.stop - self.start
            keys = torch.arange(total, device=self.blocks.device)
            queries = keys[self.computed :, None]
            mask = keys <= queries
            if window is not None:
                mask &= keys > queries - window
            self._masks[window] = mask
        return self._masks[window]


@dataclass
class Segments:
    """Whose token each row of the batch is, and where its KV goes; `paged`, or decodes and chunks, says the former."""

    cache: KVCache
    slots: torch.Tensor  # (tokens,) int64, block * 16 + offset
    decodes: list[DecodeGroup] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    paged: PagedBatch | None = None


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, heads, tokens, head_dim)
    key: torch.Tensor,  # (1, kv_heads, tokens, head_dim)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    *,
    segments: Segments | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Store the new KV, then attend to each sequence's own; returns (1, tokens, heads, head_dim)."""
    if segments is None:
        raise BackendError(f"attention {NAME!r} runs hybrid batches only: pass segments=..., or set another attention")
    for name in ("softcap", "s_aux"):
        if others.get(name) is not None:
            raise BackendError(f"the model's attention uses {name}, which the paged path does not know")
    layer = cast(int, module.layer_idx)
    cache = segments.cache
    cache.write(layer, segments.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    _, heads, tokens, dim = query.shape
    kv_heads = key.shape[1]
    out = query.new_empty((tokens, heads, value.shape[-1]))
    if segments.paged is not None:
        from llmsched_gym.real_backend.paged_attention import attend  # triton is optional

        scale = dim**-0.5 if scaling is None else scaling
        attend(query[0].transpose(0, 1), *cache.layer(layer), out, segments.paged, scale, sliding_window)
        return out.unsqueeze(0), None
    for group in segments.decodes:
        # The query heads that share a KV head stand in for queries: no KV is repeated.
        q = query[0, :, group.start : group.stop].transpose(0, 1).reshape(-1, kv_heads, heads // kv_heads, dim)
        k, v = cache.read(layer, group.blocks)
        mask = group.mask(sliding_window, query.dtype)
        answer = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        out[group.start : group.stop] = answer.reshape(group.stop - group.start, heads, -1)
    for chunk in segments.chunks:
        rows = slice(chunk.start, chunk.stop)
        if plain := chunk.is_plain_causal(sliding_window):
            k, v = key[:, :, rows], value[:, :, rows]
        else:
            total = chunk.computed + chunk.stop - chunk.start
            # Repeated by hand: with a mask, GPUs have no kernel that lets heads share KV without forming all scores.
            groups = heads // kv_heads
            k, v = (part[:, :, :total].repeat_interleave(groups, 1) for part in cache.read(layer, chunk.blocks))
        answer = F.scaled_dot_product_attention(
            query[:, :, rows],
            k,
            v,
            attn_mask=None if plain else chunk.mask(sliding_window),
            is_causal=plain,
            scale=scaling,
            enable_gqa=k.shape[1] != heads,
        )
        out[rows] = answer[0].transpose(0, 1)
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, paged_attention)
