"""The sections of a GPU check: each measures one thing and leaves it in the check's results."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from typing import Any

from llmsched_gym.real_backend.calibration.calibrate import CPU_TILE, ROUNDS, fit
from llmsched_gym.real_backend.calibration.measurements import Sheet, run_sweep
from llmsched_gym.real_backend.calibration.sweep import plan
from llmsched_gym.real_backend.errors import BackendError
from llmsched_gym.real_backend.gpu_check.state import Check, TimeUp
from llmsched_gym.real_backend.sim2real import small_world

POLICIES = ("slai", "sarathi", "on-time", "learned", "rad-512")
LOADS = (0.8, 1.1, 0.5)
"""In the order in which they are run: what time cuts off is last."""
REQUESTS = (800, 600, 400, 300, 200, 150, 100, 60, 40, 25, 15, 10, 5)
"""Of a run: the first number whose runs should end in time is taken."""
SLOWER_THAN_PREDICTED = 1.4


def versions(check: Check) -> None:
    """What is installed, and what it runs on."""
    import torch

    names = ("torch", "transformers", "triton", "numpy", "numba")
    found: dict[str, Any] = {"python": platform.python_version(), "model": check.model}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    device = check.torch_device
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        found |= {"multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda}
        found["driver"] = _driver()
    else:
        found |= {"device": "cpu", "threads": torch.get_num_threads()}
    check.results["versions"] = found


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def ceilings(check: Check) -> None:
    """Bytes per second of a large copy, FLOP/s of a large matrix product in the dtype of the weights."""
    import torch

    from llmsched_gym.real_backend.ceilings import measured_device

    dtype = torch.bfloat16 if check.torch_device.type == "cuda" else torch.float32
    check.ceiling = measured_device(check.torch_device, dtype)
    check.results["ceilings"] = {
        "bandwidth_gb_s": check.ceiling.bandwidth_bytes_s / 1e9,
        "tflop_s": check.ceiling.flops_s / 1e12,
    }


def sweep(check: Check) -> None:
    """Times of all kinds of batches, and a profile fitted to them, also where time runs out before all are done."""
    backend = check.backend
    check.results["setup"] = backend.setup
    check.results["kv_blocks"] = backend.num_kv_blocks
    sheet = Sheet(check.out / "sweep.csv", backend.setup)
    batches = plan(check.limits, backend.num_kv_blocks)
    try:
        run_sweep(backend.measure, batches, sheet, rounds=ROUNDS, repeats=2, progress=check.in_time)
    finally:
        tile = None if backend.device.type == "cuda" else CPU_TILE
        check.results["sweep_rows"] = {"measured": len(sheet.done()), "planned": ROUNDS * len(batches)}
        fitted = fit(sheet, backend.loaded.spec, check.measured, backend.num_kv_blocks, tile_tokens=tile)
        fitted.to_json(check.out / "profile.json")
        check.profile = fitted
        check.results["fit"] = {**(fitted.fit or {}), "tile_tokens": fitted.tile_tokens}


def bounds(check: Check) -> None:
    """Some batches' times against what the measured ceilings allow."""
    from llmsched_gym.real_backend.gpu_check.speed import batches, time_batch

    for name, batch in batches(check.limits, check.backend.num_kv_blocks).items():
        check.in_time()
        check.add_row("bounds", time_batch(check.backend, name, batch, check.measured))


def correctness(check: Check) -> None:
    """The fast path against the portable one and against generate."""
    from llmsched_gym.real_backend.gpu_check.correct import (
        graphs_against_eager,
        logits_of_attentions,
        tokens_against_generate,
    )

    found = check.results.setdefault("correctness", {})
    found["logits"] = logits_of_attentions(check.backend, check.limits)
    found["graphs"] = graphs_against_eager(check.backend, check.limits)
    check.in_time()
    found["tokens"] = tokens_against_generate(check.out, str(check.torch_device), check.attention)


def sim2real(check: Check) -> None:
    """The simulator, with the profile measured here, against the model; saved after each load."""
    import pandas as pd

    from llmsched_gym.real_backend.sim2real.compare import Comparison, compare, save

    if check.profile is None:
        raise BackendError("no profile: the sweep did not get far enough")
    out, backend = check.out / "sim2real", check.backend
    out.mkdir(exist_ok=True)
    world = small_world.make_world(check.profile, check.scale, out, 100, backend.num_kv_blocks)
    num_requests = _requests_in_time(check, world)
    world = dataclasses.replace(world, scenario=world.scenario.replace(num_requests=num_requests))
    parts: list[Comparison] = []
    for load in LOADS:
        part = compare(backend, check.profile, world, POLICIES, [load], seeds=1, progress=check.in_time)
        parts.append(part)
        rows, steps, requests = (
            pd.concat([getattr(p, name) for p in parts], ignore_index=True) for name in ("rows", "steps", "requests")
        )
        found = save(Comparison(rows, steps, requests, check.profile, backend.setup, world), out)
        keys = ["step_time", "median_relative_error", "median_absolute_error", "mean_kendall_tau"]
        keys += ["clear_pairs", "clear_kept", "saturation_qps"]
        check.results["sim2real"] = {"requests": num_requests, "loads": len(parts), **{k: found[k] for k in keys}}


def _requests_in_time(check: Check, world: small_world.SmallWorld) -> int:
    """Requests per run, by what the simulator says that all runs take."""
    from llmsched_gym.evaluation.run import simulate

    for policy in POLICIES:  # compiled now, its time is not taken from the runs
        simulate(
            world.scenario.replace(qps=1.0, num_requests=REQUESTS[-1]), world.policy(policy), 0, profile=check.profile
        )
    for num_requests in REQUESTS:
        total_s = 0.0
        for load in LOADS:
            at_load = world.scenario.replace(qps=load * world.saturation_qps, num_requests=num_requests)
            # One policy stands for all: at one load their runs are about as long as the arrivals take.
            episode = simulate(at_load, world.policy(POLICIES[0]), 0, profile=check.profile)
            total_s += len(POLICIES) * float(episode.sim.clock_s)
        if SLOWER_THAN_PREDICTED * total_s < check.left_s():
            return num_requests
    raise TimeUp


def kernel(check: Check) -> None:
    """The attention kernel alone, at several tile sizes; on a GPU only."""
    from llmsched_gym.real_backend.gpu_check.speed import time_kernel

    if check.backend.attention == "triton" and check.backend.device.type == "cuda":
        for row in time_kernel(check.backend, check.limits, check.measured):
            check.add_row("kernel", row)
            check.in_time()


def mixing(check: Check) -> None:
    """Decodes alone, a chunk alone, both together."""
    from llmsched_gym.real_backend.gpu_check.speed import mixed_batches, time_mixing

    for decodes, chunk in mixed_batches(check.limits, check.backend.num_kv_blocks):
        check.in_time()
        check.add_row("mixing", time_mixing(check.backend, decodes, chunk))


def generate(check: Check) -> None:
    """Decode steps of transformers' own generate, at the batches of `bounds`. Takes the cache's memory: comes last."""
    import torch

    from llmsched_gym.real_backend.gpu_check.speed import batches, free_cache, time_generate
    from llmsched_gym.real_backend.memory import release_memory

    backend = check.backend
    own = {row["batch"]: row["ms"] for row in check.results.get("bounds", [])}
    wanted = {n: b.decodes for n, b in batches(check.limits, backend.num_kv_blocks).items() if not b.chunks}
    free_cache(backend)
    for name, decodes in wanted.items():
        check.in_time()
        try:
            ms = time_generate(backend, len(decodes), decodes[0])
        except torch.OutOfMemoryError:  # its cache is not paged, and its prompts run at once
            release_memory(backend.device)
            continue
        ours = own.get(name)
        check.add_row("generate", {"batch": name, "generate_ms": ms, "ours_ms": ours, "speedup": ours and ms / ours})


SECTIONS: dict[str, tuple[Callable[[Check], None], float]] = {
    "versions": (versions, 0.01),
    "ceilings": (ceilings, 0.02),
    "sweep": (sweep, 0.35),
    "bounds": (bounds, 0.10),
    "correctness": (correctness, 0.10),
    "sim2real": (sim2real, 0.40),
    "mixing": (mixing, 0.06),
    "kernel": (kernel, 0.04),
    "generate": (generate, 0.08),
}
"""What runs, in this order, and its share of the time; time not used goes to those behind."""
