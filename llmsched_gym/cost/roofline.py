"""Profiles from data sheets: a batch takes the longer of reading the weights and computing its tokens.

Of several devices that share every layer (tensor parallelism) each reads and computes its part, and after attention
and after the feed-forward layers all of them sum up the tokens' hidden states: an all-reduce, which nothing hides.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TypeVar

from llmsched_gym.config import DeviceSpec, ModelSpec
from llmsched_gym.cost.profile import Profile, ProfileError, SmoothLinear, TableLinear, kv_blocks

Spec = TypeVar("Spec", ModelSpec, DeviceSpec, float)

MODELS = {
    model.name: model
    for model in (
        ModelSpec("mistral-7b", 4096, 14336, 32, 32, 8, 128, 32000),
        ModelSpec("llama-3-8b", 4096, 14336, 32, 32, 8, 128, 128256),
        ModelSpec("llama-3.1-8b", 4096, 14336, 32, 32, 8, 128, 128256),
        ModelSpec("llama-3.1-70b", 8192, 28672, 80, 64, 8, 128, 128256),
        ModelSpec("qwen2.5-7b", 3584, 18944, 28, 28, 4, 128, 152064),
    )
}
"""Shapes from the models' published configurations (Mistral-7B-Instruct-v0.2, Meta-Llama-3-8B, Llama-3.1-8B and 70B,
Qwen2.5-7B)."""

DEVICES = {
    device.name: device
    for device in (
        # The efficiencies are what the fit to the published chunk sweep found.
        DeviceSpec("rtx6000ada", 48e9, 960e9, 182.1e12, 0.8, 0.85),
        DeviceSpec("a100-80gb", 80e9, 2039e9, 312e12, 0.8, 0.69),
        DeviceSpec("h100-sxm", 80e9, 3350e9, 989e12, 0.8, 0.7),
        DeviceSpec("rtxpro6000", 96e9, 1597e9, 500e12, 0.8, 0.85),
        DeviceSpec("rtx4090", 24e9, 1008e9, 165.2e12, 0.8, 0.85),
        DeviceSpec("h200-sxm", 141e9, 4800e9, 989e12, 0.8, 0.7),
        DeviceSpec("l40s", 48e9, 864e9, 362e12, 0.8, 0.7),
    )
}
"""Memory, bandwidth and dense bf16 rate from NVIDIA's data sheets; efficiencies as seen in published profiles.

RTX PRO 6000 Blackwell Server Edition: 4 PFLOP/s of FP4 with sparsity, an eighth of that in dense bf16; RTX 4090: the
Ada white paper's rate with FP32 accumulation. Their efficiencies are assumed, as are those of H200 and
L40S."""

LINK_BYTES_S = {
    "a100-80gb": 300e9,
    "h100-sxm": 450e9,
    "h200-sxm": 450e9,
    "rtxpro6000": 64e9,
    "l40s": 32e9,
    "rtx6000ada": 32e9,
    "rtx4090": 32e9,
}
"""Between devices, each way: half of NVLink's total on NVIDIA's data sheets, else PCIe of 16 lanes (4.0, 5.0)."""
LINK_EFFICIENCY = 0.8
"""Share of it that an all-reduce gets: assumed."""
ALL_REDUCE_S = 10e-6
"""What an all-reduce of nothing takes: assumed, of the order that NCCL's own tests show within a node."""
KNOTS_PER_OCTAVE = 16
"""Of the table of a smooth roofline with all-reduces: off by less than 0.1 % between them."""

OVERHEAD_MS = 3.4
"""Host time per batch, carried over from the RTX 6000 Ada fit: the same engine on another device."""
ATTENTION_EFFICIENCY = 0.5
"""Share of peak that prefill attention reaches; the RTX 6000 Ada fit found 90 of 182.1 TFLOP/s."""
KNEE_POWER = 4.0
"""Sharpness of the change from reading weights to computing, from the RTX 6000 Ada fit."""
WAVE_TOKENS = 16_384
"""The staircase of a wave-quantised roofline is spelt out up to here."""


def roofline(
    model: ModelSpec | str,
    device: DeviceSpec | str,
    *,
    tile_tokens: int = 128,
    waves: bool = False,
    tensor_parallel: int = 1,
    overhead_ms: float = OVERHEAD_MS,
    name: str | None = None,
    notes: tuple[str, ...] = (),
) -> Profile:
    """A profile of `model` on `device` (specs, or names in `MODELS` and `DEVICES`) that nobody has measured.

    `waves` rounds the computed tokens up to whole tiles, so that time against tokens is a staircase: the steps that
    real GeMM kernels show. With `tensor_parallel` > 1 as many devices share every layer, by :func:`all_reduce_ms`.
    Raises :class:`ProfileError` for unknown names, for a model that does not fit, and for one whose heads cannot be
    shared evenly.
    """
    model = _lookup(model, MODELS, "model") if isinstance(model, str) else model
    device = _lookup(device, DEVICES, "device") if isinstance(device, str) else device
    reduce_ms, notes = (0.0, 0.0), tuple(notes)
    if tensor_parallel != 1:
        reduce_ms = all_reduce_ms(model, device, tensor_parallel)
        notes += (
            f"{tensor_parallel} devices share every layer; two all-reduces a layer take {1e3 * reduce_ms[0]:,.0f} us a "
            f"batch and {1e3 * reduce_ms[1]:.2f} us a token: assumed, at {LINK_EFFICIENCY:.0%} of "
            f"{LINK_BYTES_S[device.name] / 1e9:,.0f} GB/s each way.",
        )
        device = together(device, tensor_parallel)
    smooth = SmoothLinear(
        weight_ms=weight_ms(model, device),
        token_ms=2e3 * model.layer_params / (device.flops_efficiency * device.flops_s),
        power=KNEE_POWER,
    )
    return Profile(
        name=name or f"{device.name}-{model.name}",
        model=model,
        device=device,
        tile_tokens=tile_tokens,
        linear=_table(smooth, reduce_ms[1], tile_tokens if waves else None) if waves or reduce_ms[1] else smooth,
        overhead_ms=overhead_ms + reduce_ms[0],
        pair_ms=pair_ms(model, device),
        kv_ms=kv_ms(model, device),
        num_kv_blocks=kv_blocks(model, device),
        notes=(*notes, *roofline_notes(device, overhead_ms)),
    )


def together(device: DeviceSpec, count: int) -> DeviceSpec:
    """`count` of a device as one: memory, bandwidth and rate are sums."""
    return replace(
        device,
        name=f"{count}x{device.name}",
        memory_bytes=count * device.memory_bytes,
        bandwidth_bytes_s=count * device.bandwidth_bytes_s,
        flops_s=count * device.flops_s,
        num_devices=count,
    )


def all_reduce_ms(model: ModelSpec, device: DeviceSpec, count: int) -> tuple[float, float]:
    """What `count` devices that share every layer add to a batch, and to it for each of its tokens.

    Two all-reduces a layer, in a ring: of n devices each sends 2 (n - 1) / n of the hidden states. Raises
    :class:`ProfileError` where the key-value heads cannot be shared evenly, and for a device without a known link.
    """
    if count < 1 or model.num_kv_heads % count:
        divisors = [n for n in range(1, model.num_kv_heads + 1) if model.num_kv_heads % n == 0]
        raise ProfileError(
            f"tensor_parallel: {model.name} has {model.num_kv_heads} key-value heads; expected one of "
            f"{', '.join(map(str, divisors))}, got {count}"
        )
    link_bytes_s = LINK_EFFICIENCY * _lookup(device.name, LINK_BYTES_S, "device")
    sent_bytes = 2 * (count - 1) / count * model.hidden_size * model.bytes_per_value
    return 1e3 * 2 * model.num_layers * ALL_REDUCE_S, 1e3 * 2 * model.num_layers * sent_bytes / link_bytes_s


def weight_ms(model: ModelSpec, device: DeviceSpec) -> float:
    """Reading every weight that a batch needs once: the layers and the output head, not the input embedding."""
    read_bytes = (model.layer_params + model.head_params) * model.bytes_per_value
    return 1e3 * read_bytes / (device.bandwidth_efficiency * device.bandwidth_bytes_s)


def pair_ms(model: ModelSpec, device: DeviceSpec) -> float:
    """One query-key pair in all layers: two multiply-adds per head dimension, for scores and for values."""
    flops = 4 * model.num_heads * model.head_dim * model.num_layers
    return 1e3 * flops / (ATTENTION_EFFICIENCY * device.flops_s)


def kv_ms(model: ModelSpec, device: DeviceSpec) -> float:
    """Reading the KV of one token."""
    return 1e3 * model.kv_bytes_per_token / (device.bandwidth_efficiency * device.bandwidth_bytes_s)


def roofline_notes(device: DeviceSpec, overhead_ms: float) -> tuple[str, ...]:
    """What a roofline takes for granted."""
    carried = ": host time, carried over from the fit of rtx6000ada-mistral-7b" if overhead_ms == OVERHEAD_MS else ""
    return (
        f"Roofline, not measured: {device.bandwidth_efficiency:.0%} of {device.bandwidth_bytes_s / 1e9:,.0f} GB/s for "
        f"weights and KV, {device.flops_efficiency:.0%} of {device.flops_s / 1e12:,.0f} TFLOP/s in the linear layers, "
        f"{ATTENTION_EFFICIENCY:.0%} of it in prefill attention.",
        f"Overhead {overhead_ms:g} ms per batch is assumed{carried}.",
        "KV blocks are assumed: 90 % of the memory less the weights.",
    )


def _table(smooth: SmoothLinear, token_ms: float, tile_tokens: int | None) -> TableLinear:
    """Knots of `smooth` plus `token_ms` a token; in whole tiles if there are any."""
    if tile_tokens is None:
        steps = range(KNOTS_PER_OCTAVE * int(math.log2(WAVE_TOKENS)) + 1)
        tokens = sorted({round(2 ** (k / KNOTS_PER_OCTAVE)) for k in steps})
        return TableLinear(tuple(tokens), tuple(smooth.at(n) + token_ms * n for n in tokens))
    tokens, ms = [], []
    for first in range(1, WAVE_TOKENS + 1, tile_tokens):
        last = first + tile_tokens - 1
        for n in (first, last) if last > first else (first,):
            tokens.append(n)
            ms.append(smooth.at(last) + token_ms * n)
    # One sloped segment at the end, for whatever extrapolates behind it.
    tokens.append(2 * tokens[-1])
    ms.append(smooth.at(tokens[-1]) + token_ms * tokens[-1])
    return TableLinear(tuple(tokens), tuple(ms))


def _lookup(name: str, known: dict[str, Spec], what: str) -> Spec:
    if name not in known:
        raise ProfileError(f"{what}: expected one of {', '.join(known)}, got {name!r}")
    return known[name]
