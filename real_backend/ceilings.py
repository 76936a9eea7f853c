"""What a device can do at most, measured here: bytes per second and multiply-adds per second."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable

import torch

from llmsched_gym.config import DeviceSpec

REPEATS = 5


def measured_device(device: torch.device, dtype: torch.dtype) -> DeviceSpec:
    """A device by its own figures: bandwidth of a large copy, rate of a large square product. Efficiencies are 1."""
    copy_bytes, size = (1 << 30, 8192) if device.type == "cuda" else (1 << 26, 768)
    return DeviceSpec(
        name=device_name(device),
        memory_bytes=float(memory_bytes(device)),
        bandwidth_bytes_s=2 * copy_bytes / _copy_s(copy_bytes, device),
        flops_s=2 * size**3 / _product_s(size, device, dtype),
        bandwidth_efficiency=1.0,
        flops_efficiency=1.0,
    )


def _copy_s(num_bytes: int, device: torch.device) -> float:
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _fastest_s(lambda: target.copy_(source), device)


def _product_s(size: int, device: torch.device, dtype: torch.dtype) -> float:
    factor = torch.randn(size, size, device=device).to(dtype)
    product = torch.empty_like(factor)
    return _fastest_s(lambda: torch.mm(factor, factor, out=product), device)


def device_name(device: torch.device) -> str:
    """A name for files: the GPU's, or the CPU threads in use."""
    if device.type == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    threads = torch.get_num_threads()
    return f"cpu-{threads}-thread{'s' if threads > 1 else ''}"


def memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not on every system
        return 1 << 33


def _fastest_s(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several runs, after one that does not count."""
    times = []
    for _ in range(REPEATS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
