"""Profiles from data sheets: a batch takes the longer of reading the weights and computing its tokens."""

from __future__ import annotations

from typing import TypeVar

from llmsched_gym.config import DeviceSpec, ModelSpec
from llmsched_gym.cost.profile import Profile, ProfileError, SmoothLinear, TableLinear, kv_blocks

Spec = TypeVar("Spec", ModelSpec, DeviceSpec)

MODELS = {
    model.name: model
    for model in (
        ModelSpec("mistral-7b", 4096, 14336, 32, 32, 8, 128, 32000),
        ModelSpec("llama-3-8b", 4096, 14336, 32, 32, 8, 128, 128256),
        ModelSpec("llama-3.1-8b", 4096, 14336, 32, 32, 8, 128, 128256),
    )
}
"""Shapes from the models' published configurations (Mistral-7B-Instruct-v0.2, Meta-Llama-3-8B, Llama-3.1-8B)."""

DEVICES = {
    device.name: device
    for device in (
        # The efficiencies are what the fit to the published chunk sweep found.
        DeviceSpec("rtx6000ada", 48e9, 960e9, 182.1e12, 0.8, 0.85),
        DeviceSpec("a100-80gb", 80e9, 2039e9, 312e12, 0.8, 0.69),
        DeviceSpec("h100-sxm", 80e9, 3350e9, 989e12, 0.8, 0.7),
        DeviceSpec("rtxpro6000", 96e9, 1597e9, 500e12, 0.8, 0.85),
        DeviceSpec("rtx4090", 24e9, 1008e9, 165.2e12, 0.8, 0.85),
    )
}
"""Memory, bandwidth and dense bf16 rate from NVIDIA's data sheets; efficiencies as seen in published profiles.

RTX PRO 6000 Blackwell Server Edition: 4 PFLOP/s of FP4 with sparsity, an eighth of that in dense bf16; RTX 4090: the
Ada white paper's rate with FP32 accumulation. Their efficiencies are assumed."""

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
    overhead_ms: float = OVERHEAD_MS,
    name: str | None = None,
    notes: tuple[str, ...] = (),
) -> Profile:
    """A profile of `model` on `device` (specs, or names in `MODELS` and `DEVICES`) that nobody has measured.

    `waves` rounds the computed tokens up to whole tiles, so that time against tokens is a staircase: the steps that
    real GeMM kernels show. Raises :class:`ProfileError` for unknown names and for a model that does not fit.
    """
    model = _lookup(model, MODELS, "model") if isinstance(model, str) else model
    device = _lookup(device, DEVICES, "device") if isinstance(device, str) else device
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
        linear=_staircase(smooth, tile_tokens) if waves else smooth,
        overhead_ms=overhead_ms,
        pair_ms=pair_ms(model, device),
        kv_ms=kv_ms(model, device),
        num_kv_blocks=kv_blocks(model, device),
        notes=(*notes, *roofline_notes(device, overhead_ms)),
    )


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


def _staircase(smooth: SmoothLinear, tile_tokens: int) -> TableLinear:
    tokens: list[int] = []
    ms: list[float] = []
    for first in range(1, WAVE_TOKENS + 1, tile_tokens):
        last = first + tile_tokens - 1
        for n in (first, last) if last > first else (first,):
            tokens.append(n)
            ms.append(smooth.at(last))
    # One sloped segment at the end, for whatever extrapolates behind it.
    tokens.append(2 * tokens[-1])
    ms.append(smooth.at(tokens[-1]))
    return TableLinear(tuple(tokens), tuple(ms))


def _lookup(name: str, known: dict[str, Spec], what: str) -> Spec:
    if name not in known:
        raise ProfileError(f"{what}: expected one of {', '.join(known)}, got {name!r}")
    return known[name]
