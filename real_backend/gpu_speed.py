"""How fast the device runs some batches, against what its bandwidth and FLOP rate allow, and against generate."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from llmsched_gym.config import DeviceSpec, ModelSpec
from llmsched_gym.real_backend.memory import release_memory
from llmsched_gym.real_backend.sweep import Composition, Limits

if TYPE_CHECKING:
    from llmsched_gym.real_backend.backend import TransformersBackend

CONTEXT = 1024
DECODES = (1, 8, 32, 64, 128, 256)
HYBRIDS = ((16, 48), (64, 448), (64, 1984))
"""Decodes, and tokens of the one prompt beside them."""
PASSES, PROFILED_PASSES = 15, 3
GENERATED_TOKENS = 12
ATTENTION = ("_attend", "_join", "flash", "fmha", "attention")
PRODUCTS = ("gemm", "gemv", "nvjet", "cutlass", "xmma", "splitk", "aten::mm", "aten::addmm", "aten::bmm")
"""Parts of the names of kernels (of operators, on a CPU); attention's are looked for first."""


def batches(limits: Limits, num_blocks: int) -> dict[str, Composition]:
    """The batches that are timed, by name; contexts are shorter where the limits are."""
    context = min(CONTEXT, limits.max_context // 2)
    named = {f"{n} decodes": Composition(decodes=(context,) * n) for n in DECODES}
    for n, prompt in HYBRIDS:
        named[f"{n} decodes + {prompt} prefill"] = Composition(((0, prompt),), (context,) * n)
    return {name: batch for name, batch in named.items() if limits.allow(batch, num_blocks)}


def bound_ms(model: ModelSpec, device: DeviceSpec, batch: Composition) -> dict[str, float]:
    """The least time of a batch: the longer of moving its bytes and doing its multiply-adds, and both of them.

    Bytes are weights once (not the embedding's), KV read, and KV written; FLOPs those of the layers, of the head on one
    row per sequence, and of attention's pairs. Activations are left out.
    """
    read = sum(batch.decodes) + sum(computed + n for computed, n in batch.chunks)
    weights = (model.layer_params + model.head_params) * model.bytes_per_value
    moved = weights + model.kv_bytes_per_token * (read + batch.num_tokens)
    pairs = sum(batch.decodes) + sum(n * computed + n * (n + 1) / 2 for computed, n in batch.chunks)
    flops: float = 2 * (model.layer_params * batch.num_tokens + model.head_params * batch.num_seqs)
    flops += 4 * model.num_heads * model.head_dim * model.num_layers * pairs
    bytes_ms, flops_ms = 1e3 * moved / device.bandwidth_bytes_s, 1e3 * flops / device.flops_s
    return {"bound_ms": max(bytes_ms, flops_ms), "bytes_ms": bytes_ms, "flops_ms": flops_ms}


def time_batch(backend: TransformersBackend, name: str, batch: Composition, device: DeviceSpec) -> dict[str, Any]:
    """One row: measured time, its bound, and where the time goes.

    `share_outside` is the share of the time that is neither a matrix product nor attention: other kernels, and gaps in
    which the device waits for the host.
    """
    chunks, decodes = list(batch.chunks), list(batch.decodes)
    for _ in range(2):
        backend.measure(chunks, decodes)
    ms = sorted(1e3 * backend.measure(chunks, decodes) for _ in range(PASSES))
    row: dict[str, Any] = {"batch": name, "tokens": batch.num_tokens, "ms": statistics.median(ms), "min_ms": ms[0]}
    row |= bound_ms(backend.loaded.spec, device, batch)
    row["times_bound"] = row["ms"] / row["bound_ms"]
    parts = profiled_ms(lambda: backend.measure(chunks, decodes), on_gpu=backend.device.type == "cuda")
    row |= {f"{part}_ms": value for part, value in parts.items()}
    row["share_outside"] = max(1.0 - (parts["product"] + parts["attention"]) / row["ms"], 0.0)
    return row


def profiled_ms(run: Callable[[], object], on_gpu: bool) -> dict[str, float]:
    """Milliseconds per run in products, attention and other kernels (operators, on a CPU)."""
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(PROFILED_PASSES):
            run()
        if on_gpu:
            torch.cuda.synchronize()
    parts = {"product": 0.0, "attention": 0.0, "other": 0.0}
    for event in profiler.key_averages():
        us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        parts[kind_of(event.key)] += us / 1e3 / PROFILED_PASSES
    return parts


def kind_of(kernel: str) -> str:
    """Whether a kernel is attention, a product, or something else, by its name."""
    lower = kernel.lower()
    if any(part in lower for part in ATTENTION):
        return "attention"
    return "product" if any(part in lower for part in PRODUCTS) else "other"


def free_cache(backend: TransformersBackend) -> None:
    """Give the KV cache's memory back; the backend is of no more use, its model is."""
    backend.runner.graphs = None
    backend.runner.cache.keys.clear()
    backend.runner.cache.values.clear()
    gc.collect()
    release_memory(backend.device)


class _StepTimes:
    """A logits processor that changes nothing and writes down when it is called, with the device idle."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.at_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.at_s.append(time.perf_counter())
        return scores


def time_generate(backend: TransformersBackend, num_seqs: int, context: int) -> float:
    """Milliseconds of a decode step of transformers' own generate at a batch of equal contexts (median)."""
    model: Any = backend.loaded.model
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = None
    times = _StepTimes(backend.device)
    prompt = torch.randint(3, backend.loaded.spec.vocab_size, (num_seqs, context), device=backend.device)
    try:
        with torch.inference_mode():
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=GENERATED_TOKENS,
                do_sample=False,
                pad_token_id=0,
                logits_processor=[times],
            )
    finally:
        model.set_attn_implementation(before)
    steps = [1e3 * (b - a) for a, b in zip(times.at_s[1:], times.at_s[2:], strict=False)]
    return statistics.median(steps)


def time_kernel(backend: TransformersBackend, limits: Limits, device: DeviceSpec) -> list[dict[str, Any]]:
    """The kernel alone, one layer, at other tile sizes than its own: rows of batch, sizes, time and bound."""
    import triton
    from triton.testing import do_bench

    from llmsched_gym.real_backend import paged_attention as kernel

    spec, runner = backend.loaded.spec, backend.runner
    shapes = {
        "128 decodes at 1024": ([], [1024] * 128),
        "1 decode at 8192": ([], [8192]),
        "2048 prefill": ([(0, 2048)], []),
        "512 behind 4096": ([(4096, 512)], []),
    }
    sizes = [(rows, columns) for rows in (64, 128) for columns in (32, 64, 128)]
    own, found = (kernel.PREFILL_ROWS, kernel.KV_TILE), []
    try:
        for name, (chunks, decodes) in shapes.items():
            batch = Composition(tuple(chunks), tuple(decodes))
            if not limits.allow(batch, backend.num_kv_blocks):
                continue
            layer = ModelSpec("layer", 0, 0, 1, spec.num_heads, spec.num_kv_heads, spec.head_dim, 0)
            least = bound_ms(layer, device, batch)["bound_ms"]
            work = backend.made_up(chunks, decodes)
            query = torch.randn(
                (batch.num_tokens, spec.num_heads, spec.head_dim), device=runner.device, dtype=backend.loaded.dtype
            )
            out = torch.empty_like(query)
            for rows, columns in sizes if chunks else [s for s in sizes if s[0] == own[0]]:
                kernel.PREFILL_ROWS, kernel.KV_TILE = rows, columns
                paged = runner.lay_out(work, backend.blocks, backend.tokens).segments.paged
                assert paged is not None
                arguments = (query, *runner.cache.layer(0), out, paged, spec.head_dim**-0.5)
                try:
                    ms = do_bench(lambda a=arguments: kernel.attend(*a), warmup=10, rep=50, return_mode="median")
                except triton.runtime.errors.OutOfResources:  # the tile is too large for this device
                    continue
                found.append({"batch": name, "rows": rows, "columns": columns, "ms": ms, "times_bound": ms / least})
    finally:
        kernel.PREFILL_ROWS, kernel.KV_TILE = own
        backend.blocks.clear(0)
    return found
