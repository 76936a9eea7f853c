"""The device's memory and clock: how many KV blocks fit, whether memory ran out, how long a pass took."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from llmsched_gym.config import BLOCK_SIZE, ModelSpec, Scenario, blocks_needed
from llmsched_gym.real_backend.errors import BackendError

GPU_SHARE = 0.9
"""Share of a GPU's memory that weights, KV and the largest pass may take together."""
CPU_SHARE = 0.25
"""Share of the host's free memory that the KV cache may take."""
CPU_KV_BYTES = 1 << 30
"""A cache on the CPU is for tests: it need not be larger."""


def fitting_blocks(
    scenario: Scenario, model: ModelSpec, device: torch.device, run: Callable[[Any], Any], largest: Any
) -> int:
    """KV blocks that memory holds beside the weights and the largest pass, at most as many as can ever be of use."""
    block_bytes = model.kv_bytes_per_token * BLOCK_SIZE
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(largest)
        pass_bytes = torch.cuda.max_memory_allocated(device) - before
        release_memory(device)
        free, total = torch.cuda.mem_get_info(device)
        room = free - (1 - GPU_SHARE) * total - pass_bytes
    else:
        room = min(CPU_SHARE * _free_host_bytes(), CPU_KV_BYTES)
    blocks = int(room // block_bytes)
    if blocks < 2:
        raise BackendError(f"model {model.name}: no memory is left for KV on {device}")
    if scenario.prefix_caching:
        return blocks  # those that nobody holds are of use, too
    assert scenario.max_num_seqs is not None, "the backend's scenario has its limits"
    longest = blocks_needed(scenario.max_model_len)
    useful = math.ceil(scenario.max_num_seqs * longest / max(1.0 - scenario.watermark, 0.01)) + 1
    return min(blocks, useful)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch means that memory ran out, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text


def release_memory(device: torch.device) -> None:
    """Give cached memory back before another try."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _free_host_bytes() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not on every system
        return 4 * CPU_KV_BYTES


CLOCKS = ("wall", "cpu")


class Stopwatch:
    """Time between start and stop: by device events on a GPU, by the host's clock elsewhere.

    The first event is recorded while the device is idle, so that preparing the batch on the host counts. On a CPU the
    clock may be "cpu", the time this thread was on a core: what others do on the machine hardly moves it.
    """

    def __init__(self, device: torch.device, clock: str = "wall") -> None:
        if clock not in CLOCKS:
            raise BackendError(f"clock: expected one of {', '.join(CLOCKS)}, got {clock!r}")
        if clock == "cpu" and device.type != "cpu":
            raise BackendError(f"clock: expected 'wall' on {device}, got 'cpu'")
        if clock == "cpu" and torch.get_num_threads() > 1:
            threads = torch.get_num_threads()
            raise BackendError(f"clock: 'cpu' counts one thread, torch uses {threads}; call torch.set_num_threads(1)")
        self._events = None
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.now = time.thread_time if clock == "cpu" else time.perf_counter
        self._start_s = 0.0

    def start(self) -> None:
        if self._events:
            self._events[0].record()
        self._start_s = self.now()

    def stop(self) -> float:
        """Seconds since start."""
        if not self._events:
            return self.now() - self._start_s
        self._events[1].record()
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1e3
