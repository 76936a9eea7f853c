"""What lies between the matrix products of a decoder layer, a Triton kernel a piece.

Eager PyTorch launches some thirty small kernels a layer for it, which takes the host longer than the device computes.
Every kernel rounds where transformers' modules round, so that the answers differ as little as the dtype allows.

Importing this module needs triton; TRITON_INTERPRET=1, set before, runs the kernels on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmsched_gym.config import BLOCK_SIZE

HEADS_PER_PROGRAM = 8
SILU_COLUMNS = 1024


def add_norm(
    hidden: torch.Tensor,  # (tokens, hidden_size), contiguous
    residual: torch.Tensor | None,  # the same shape; gets `hidden` added in place
    weight: torch.Tensor,  # (hidden_size,)
    eps: float,
) -> torch.Tensor:
    """RMS norm of `hidden` plus `residual`, (tokens, hidden_size); without a residual of `hidden` alone."""
    tokens, size = hidden.shape
    out = torch.empty_like(hidden)
    _add_norm[(tokens,)](
        hidden,
        hidden if residual is None else residual,
        weight,
        out,
        eps,
        SIZE=size,
        PADDED=triton.next_power_of_2(size),
        ADD=residual is not None,
        num_warps=8 if size >= 2048 else 4,
    )
    return out


def rotate_and_store(
    qkv: torch.Tensor,  # (tokens, (heads + 2 * kv_heads) * head_dim), contiguous; queries are rotated in place
    positions: torch.Tensor,  # (tokens,) int64
    slots: torch.Tensor,  # (tokens,) int64, block * BLOCK_SIZE + offset
    cos: torch.Tensor,  # (positions, head_dim)
    sin: torch.Tensor,
    keys: torch.Tensor,  # (blocks, BLOCK_SIZE, kv_heads, head_dim), contiguous
    values: torch.Tensor,
) -> None:
    """Rotary position encoding of queries and keys; keys and values go to their places in the cache."""
    kv_heads, dim = keys.shape[2:]
    heads = qkv.shape[1] // dim - 2 * kv_heads
    assert keys.shape[1] == BLOCK_SIZE
    _rotate_and_store[(qkv.shape[0], triton.cdiv(heads + 2 * kv_heads, HEADS_PER_PROGRAM))](
        qkv,
        positions,
        slots,
        cos,
        sin,
        keys,
        values,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        HALF_PADDED=triton.next_power_of_2(dim // 2),
        ROWS=HEADS_PER_PROGRAM,
        num_warps=2,
    )


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of (tokens, 2 * size), the gate first; (tokens, size)."""
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul[(tokens, triton.cdiv(size, SILU_COLUMNS))](gate_up, out, SIZE=size, COLUMNS=SILU_COLUMNS, num_warps=4)
    return out


@triton.jit
def _add_norm(hidden, residual, weight, out, eps, SIZE: tl.constexpr, PADDED: tl.constexpr, ADD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * SIZE
    column = tl.arange(0, PADDED)
    mask = column < SIZE
    dtype = out.dtype.element_ty
    x = tl.load(hidden + row + column, mask=mask, other=0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(residual + row + column, mask=mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(residual + row + column, x, mask=mask)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    normed = (wide * scale).to(dtype).to(tl.float32)
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row + column, (normed * w).to(dtype), mask=mask)


@triton.jit
def _rotate_and_store(
    qkv,
    positions,
    slots,
    cos,
    sin,
    keys,
    values,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    half = tl.arange(0, HALF_PADDED)
    in_half = half < DIM // 2
    mask = (head < HEADS + 2 * KV_HEADS)[:, None] & in_half[None, :]
    at = token * ((HEADS + 2 * KV_HEADS) * DIM) + head[:, None] * DIM + half[None, :]
    first = tl.load(qkv + at, mask=mask, other=0.0)
    second = tl.load(qkv + at + DIM // 2, mask=mask, other=0.0)
    angle = tl.load(positions + token) * DIM + half
    c_first = tl.load(cos + angle, mask=in_half, other=0.0).to(tl.float32)[None, :]
    c_second = tl.load(cos + angle + DIM // 2, mask=in_half, other=0.0).to(tl.float32)[None, :]
    s_first = tl.load(sin + angle, mask=in_half, other=0.0).to(tl.float32)[None, :]
    s_second = tl.load(sin + angle + DIM // 2, mask=in_half, other=0.0).to(tl.float32)[None, :]
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    dtype = qkv.dtype.element_ty
    rotated_first = (wide_first * c_first - wide_second * s_first).to(dtype)
    rotated_second = (wide_second * c_second + wide_first * s_second).to(dtype)
    is_query = mask & (head < HEADS)[:, None]
    tl.store(qkv + at, rotated_first, mask=is_query)
    tl.store(qkv + at + DIM // 2, rotated_second, mask=is_query)
    slot = tl.load(slots + token) * (KV_HEADS * DIM)
    is_key = mask & ((head >= HEADS) & (head < HEADS + KV_HEADS))[:, None]
    to = slot + (head - HEADS)[:, None] * DIM + half[None, :]
    tl.store(keys + to, rotated_first, mask=is_key)
    tl.store(keys + to + DIM // 2, rotated_second, mask=is_key)
    is_value = mask & (head >= HEADS + KV_HEADS)[:, None]
    to = slot + (head - HEADS - KV_HEADS)[:, None] * DIM + half[None, :]
    tl.store(values + to, first, mask=is_value)
    tl.store(values + to + DIM // 2, second, mask=is_value)


@triton.jit
def _silu_mul(gate_up, out, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < SIZE
    gate = tl.load(gate_up + row * (2 * SIZE) + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * SIZE) + SIZE + column, mask=mask, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + row * SIZE + column, (silu * up).to(dtype), mask=mask)
