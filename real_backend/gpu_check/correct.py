"""Whether the fast path computes what the portable one does, on the device at hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmsched_gym.config import scenario
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.real_backend.calibration.sweep import Limits
from llmsched_gym.real_backend.runner import Work
from llmsched_gym.real_backend.sim2real.small_world import limits, scaled_workload

if TYPE_CHECKING:
    from llmsched_gym.real_backend.backend import TransformersBackend

TOKENS_SCALE, TOKENS_POLICY = 1 / 16, "sarathi[budget=64]"
FLOOR_FACTOR = 3.0
"""The kernel may differ from the portable path by so many times what the portable path differs from itself."""
LEAST_TOLERANCE = 1e-5
CHUNKS_BESIDE = ((0, 130), (300, 41))
GRAPH_TOLERANCE = 0.03
"""Of largest logits: bfloat16's rounding through some tens of layers."""


def tokens_against_generate(out: Path, device: str, attention: str, num_requests: int = 12) -> dict[str, Any]:
    """Greedy tokens of random:tiny in float32, from hybrid batches, against transformers' generate, one by one."""
    from llmsched_gym.real_backend import make_backend

    workload = str(scaled_workload("sharegpt", TOKENS_SCALE, out))
    world = scenario("default", workload=workload, num_requests=num_requests, qps=1e3, arrivals_continue=False)
    world = world.replace(warmup_s=0.0, num_kv_blocks=920, **limits(TOKENS_SCALE))
    backend = make_backend(world, "random:tiny", device, dtype=torch.float32, attention=attention)
    simulate(world, TOKENS_POLICY, 0, backend=backend)
    alone = copy.deepcopy(backend.loaded.model)
    alone.set_attn_implementation("sdpa")
    compared = different = requests = 0
    for r in range(num_requests):
        answer = backend.tokens.answer(r)
        if len(answer) == 0:
            continue
        prompt = torch.from_numpy(backend.tokens.prompt(r)).long()[None].to(backend.device)
        expected = _generate(alone, prompt, len(answer))
        requests += 1
        compared += len(answer)
        different += int(np.count_nonzero(answer != expected))
    return {
        "requests": requests,
        "tokens": compared,
        "different_tokens": different,
        "passed": compared > 0 and different == 0,
        "setup": backend.setup,
    }


def _generate(model: Any, prompt: torch.Tensor, num_tokens: int) -> np.ndarray:
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return ids[0, prompt.shape[1] :].cpu().numpy()


def logits_of_attentions(backend: TransformersBackend, bounds: Limits, num_batches: int = 3) -> list[dict[str, Any]]:
    """Relative differences ||a - b|| / ||b|| of hybrid batches' logits between the paths, one row per batch.

    `floor` is how far the portable path is from itself when each sequence runs alone, which changes nothing but the
    shapes of the products: rounding of that size is the dtype's own.
    """
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(num_batches):
        longest = min(bounds.max_context, backend.num_kv_blocks)
        chunk = min(longest // 2, bounds.max_tokens // 4)
        chunks = [(0, chunk), (int(rng.integers(1, longest - chunk)), chunk - 1)]
        decodes = rng.integers(1, longest, min(6, bounds.max_seqs - 2)).tolist()
        work = backend.made_up(chunks, decodes, seed)
        portable = _logits(backend, work, "sdpa")
        parts = [_logits(backend, work.take(slice(i, i + 1)), "sdpa") for i in range(len(work.request))]
        floor = _difference(torch.cat(parts), portable)
        compared = _compare(floor, _logits(backend, work, backend.attention), portable)
        rows.append({"batch": f"{chunks} + {decodes}", "floor": floor, **compared})
    backend.blocks.clear(0)
    return rows


def graphs_against_eager(backend: TransformersBackend, bounds: Limits) -> list[dict[str, Any]]:
    """Largest logits of padded, replayed batches, with and without prompts, against the portable path; empty without
    graphs."""
    static = backend.runner.static
    if static is None:
        return []
    rng, rows = np.random.default_rng(1), []
    for num, chunks in [*((n, ()) for n in (1, 3, 7, 33, 100, 200)), *((n, CHUNKS_BESIDE) for n in (0, 5, 60))]:
        if num > bounds.max_seqs:
            continue
        longest = max(min(bounds.max_context, backend.num_kv_blocks * 8 // max(num, 1)), 2)
        work = backend.made_up(list(chunks), rng.integers(1, longest, num).tolist())
        shape = static.shape_of(work)
        if shape is None:
            continue
        portable, expected_ids = _logits(backend, work, "sdpa").max(-1)
        order = {r: i for i, r in enumerate(work.request.tolist())}
        emitting, best, ids = static.run(shape, work, backend.blocks, backend.tokens)
        _, again, _ = static.run(shape, work, backend.blocks, backend.tokens)
        at = [order[r] for r in emitting.tolist()]
        row = {"decodes": num, "chunks": len(chunks), "repeat_difference": float(np.abs(best - again).max())}
        row["difference"] = _difference(torch.from_numpy(best), portable.float().cpu()[at])
        row["same_token"] = float(np.mean(ids == expected_ids.cpu().numpy()[at]))
        row["passed"] = row["difference"] < GRAPH_TOLERANCE and row["repeat_difference"] == 0.0
        rows.append(row)
    backend.blocks.clear(0)
    return rows


def _logits(backend: TransformersBackend, work: Work, attention: str) -> torch.Tensor:
    """Logits (num_items, vocab) of a batch through an attention, in the order of `work`."""
    runner, before = backend.runner, backend.runner.attention
    runner.attention = attention
    try:
        inputs = runner.lay_out(work, backend.blocks, backend.tokens)
        with torch.inference_mode():
            logits = runner.forward(inputs)
    finally:
        runner.attention = before
    order = {r: i for i, r in enumerate(inputs.emitting.tolist())}
    return logits[[order[r] for r in work.request.tolist()]].float()


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _compare(floor: float, found: torch.Tensor, expected: torch.Tensor) -> dict[str, Any]:
    difference = _difference(found, expected)
    same = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
    passed = difference <= max(FLOOR_FACTOR * floor, LEAST_TOLERANCE)  # a nan fails
    return {"difference": difference, "same_token": same, "passed": passed}
