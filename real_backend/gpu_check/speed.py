"""How fast the device runs some batches, against what its bandwidth and FLOP rate allow, and against generate."""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from llmsched_gym.config import DeviceSpec, ModelSpec
from llmsched_gym.real_backend.calibration.sweep import Composition, Limits
from llmsched_gym.real_backend.memory import release_memory

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
    which the device waits for the host. `host_ms` is the host's time to lay the batch out and launch it
    kernel by kernel, as batches with prompts are.
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
    row["host_ms"] = 1e3 * statistics.median(_launch_s(backend, chunks, decodes) for _ in range(5))
    row["share_outside"] = max(1.0 - (parts["product"] + parts["attention"]) / row["ms"], 0.0)
    return row


def _launch_s(backend: TransformersBackend, chunks: list[tuple[int, int]], decodes: list[int]) -> float:
    """Seconds that the host takes to lay a batch out and to launch its kernels one by one, without waiting for them."""
    runner, work = backend.runner, backend.made_up(chunks, decodes)
    runner.wait()
    start_s = time.perf_counter()
    with torch.inference_mode():
        runner.forward(runner.lay_out(work, backend.blocks, backend.tokens))
    launched_s = time.perf_counter() - start_s
    runner.wait()
    backend.blocks.clear(0)
    return launched_s


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
    backend.runner.static = None
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


DECODE_TUNINGS = ((64, 4, 3), (64, 4, 2), (64, 2, 3), (128, 4, 2), (32, 4, 4))
CHUNK_TUNINGS = ((64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3))
"""Columns, warps and stages (of chunks, rows before them) of the kernel's programs that are tried."""
PROGRAMS = (2, 4, 8)
"""Programs per multiprocessor that walks are split for, tried at the shape that comes first."""


def time_kernel(backend: TransformersBackend, limits: Limits, device: DeviceSpec) -> Iterator[dict[str, Any]]:
    """The kernel alone at other shapes of its programs than its own, per layer: rows of batch, shape, time, bound."""
    import triton

    from llmsched_gym.real_backend import paged_attention as kernel

    spec = backend.loaded.spec
    layer = ModelSpec("layer", 0, 0, 1, spec.num_heads, spec.num_kv_heads, spec.head_dim, 0)
    shapes = {
        "32 decodes at 1024": Composition(decodes=(1024,) * 32),
        "128 decodes at 1024": Composition(decodes=(1024,) * 128),
        "4 decodes at 8192": Composition(decodes=(8192,) * 4),
        "2048 prefill": Composition(((0, 2048),)),
        "448 prefill": Composition(((0, 448),)),
        "512 behind 4096": Composition(((4096, 512),)),
    }
    decodes = [(n, kernel.Tuning(kernel.MIN_ROWS, *DECODE_TUNINGS[0])) for n in PROGRAMS]
    decodes += [(kernel.PROGRAMS_PER_UNIT, kernel.Tuning(kernel.MIN_ROWS, *t)) for t in DECODE_TUNINGS[1:]]
    chunks = [(n, kernel.Tuning(*CHUNK_TUNINGS[0])) for n in PROGRAMS]
    chunks += [(kernel.PROGRAMS_PER_UNIT, kernel.Tuning(*t)) for t in CHUNK_TUNINGS[1:]]
    own = kernel.DECODES, kernel.CHUNKS, kernel.PROGRAMS_PER_UNIT
    try:
        for tried, are_chunks in ((decodes, False), (chunks, True)):
            for programs, tuning in tried:
                kernel.DECODES, kernel.CHUNKS, kernel.PROGRAMS_PER_UNIT = tuning, tuning, programs
                for name, batch in shapes.items():
                    if bool(batch.chunks) != are_chunks or not limits.allow(batch, backend.num_kv_blocks):
                        continue
                    with contextlib.suppress(triton.runtime.errors.OutOfResources):  # the shape is too large
                        ms = attention_ms(backend, batch)
                        least = bound_ms(layer, device, batch)["bound_ms"]
                        row = {"batch": name, "programs": programs, **tuning._asdict()}
                        yield {**row, "ms": ms, "times_bound": ms / least}
    finally:
        kernel.DECODES, kernel.CHUNKS, kernel.PROGRAMS_PER_UNIT = own
        backend.blocks.clear(0)


def attention_ms(backend: TransformersBackend, batch: Composition) -> float:
    """Milliseconds of a layer's attention of a batch, replayed as in a pass: layer by layer, each with its own KV."""
    from triton.testing import do_bench_cudagraph

    from llmsched_gym.real_backend.paged_attention import attend

    spec, runner = backend.loaded.spec, backend.runner
    work = backend.made_up(list(batch.chunks), list(batch.decodes))
    query = torch.randn(
        (batch.num_tokens, spec.num_heads, spec.head_dim), device=runner.device, dtype=backend.loaded.dtype
    )
    out = torch.empty_like(query)
    paged = runner.lay_out(work, backend.blocks, backend.tokens).segments.paged
    assert paged is not None

    def all_layers() -> None:
        for layer in range(spec.num_layers):
            attend(query, *runner.cache.layer(layer), out, paged, spec.head_dim**-0.5)

    return float(do_bench_cudagraph(all_layers, rep=10, return_mode="median")) / spec.num_layers


MIXED_DECODES, MIXED_CONTEXTS = (8, 32, 64, 128), (1024, 4096)
MIXED_CHUNKS = ((0, 512), (2048, 512))


def mixed_batches(limits: Limits, num_blocks: int) -> Iterator[tuple[Composition, Composition]]:
    """Decodes and a chunk, each alone, that are measured alone and together."""
    for num, context, chunk in itertools.product(MIXED_DECODES, MIXED_CONTEXTS, MIXED_CHUNKS):
        if limits.allow(Composition((chunk,), (context,) * num), num_blocks):
            yield Composition(decodes=(context,) * num), Composition((chunk,))


def time_mixing(backend: TransformersBackend, decodes: Composition, chunk: Composition) -> dict[str, Any]:
    """Whole passes and, with the kernel, one layer's attention: decodes alone, the chunk alone, both together.

    `attention_price` is what the decodes' attention costs beside the chunk, (both - chunk) / decodes: 1 where an engine
    runs them apart.
    """
    both = Composition(chunk.chunks, decodes.decodes)
    parts = {"decodes": decodes, "chunk": chunk, "both": both}
    ((computed, tokens),) = chunk.chunks
    row: dict[str, Any] = {"decodes": len(decodes.decodes), "context": decodes.decodes[0]}
    row |= {"computed": computed, "chunk": tokens}
    for name, batch in parts.items():
        arguments = list(batch.chunks), list(batch.decodes)
        backend.measure(*arguments)
        row[f"{name}_ms"] = 1e3 * statistics.median(backend.measure(*arguments) for _ in range(3))
    if backend.attention == "triton" and backend.device.type == "cuda":
        for name, batch in parts.items():
            row[f"attention_{name}_ms"] = attention_ms(backend, batch)
        extra = row["attention_both_ms"] - row["attention_chunk_ms"]
        row["attention_price"] = extra / row["attention_decodes_ms"]
        backend.blocks.clear(0)
    return row
