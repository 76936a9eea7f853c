"""What the sections of a GPU check share: settings, the backend once it is there, results, and the time left."""

from __future__ import annotations

import csv
import gc
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsched_gym.config import DeviceSpec, scenario
from llmsched_gym.cost import Profile
from llmsched_gym.real_backend.calibration.sweep import Limits
from llmsched_gym.real_backend.errors import BackendError, one_line
from llmsched_gym.real_backend.sim2real import small_world

if TYPE_CHECKING:
    import torch

    from llmsched_gym.real_backend.backend import TransformersBackend


class TimeUp(Exception):
    """The section's share of the time is over."""


@dataclass
class Check:
    """One check: its settings, and everything it has found so far."""

    model: str
    out: Path
    device: str | None
    limits: Limits
    attention: str = "auto"
    graphs: bool | None = None
    fused: bool = True
    until_s: float = 0.0  # of the running section, on time.monotonic's clock
    results: dict[str, Any] = field(default_factory=dict)
    ceiling: DeviceSpec | None = None
    profile: Profile | None = None
    _backend: TransformersBackend | None = None

    @property
    def scale(self) -> float:
        """Of the world's requests, as in sim2real."""
        from llmsched_gym.real_backend.sim2real.compare import CPU_SCALE

        return 1.0 if self.torch_device.type == "cuda" else CPU_SCALE

    @property
    def torch_device(self) -> torch.device:
        from llmsched_gym.real_backend.backend import find_device

        return find_device(self.device)

    @property
    def backend(self) -> TransformersBackend:
        """One backend for all sections, as large as the largest needs it; without graphs if they cannot be recorded."""
        if self._backend is None:
            for graphs in dict.fromkeys((self.graphs, False)):
                try:
                    self._backend = self._make_backend(graphs)
                    break
                except BackendError:
                    raise
                except Exception as error:  # a recording fails in many ways
                    if graphs is False:
                        raise
                    self.results["without_graphs"] = f"{type(error).__name__}: {one_line(error, 400)}"
                gc.collect()  # what the failed one held
        assert self._backend is not None
        return self._backend

    def _make_backend(self, graphs: bool | None) -> TransformersBackend:
        from llmsched_gym.real_backend import make_backend
        from llmsched_gym.real_backend.sim2real.compare import kv_blocks

        own = small_world.limits(self.scale)
        world = scenario(
            "default",
            max_model_len=max(self.limits.max_context, own["max_model_len"]),
            max_num_seqs=max(self.limits.max_seqs, own["max_num_seqs"]),
            max_num_batched_tokens=max(self.limits.max_tokens, own["max_num_batched_tokens"]),
            num_kv_blocks=kv_blocks(self.scale),
        )
        backend = make_backend(
            world, self.model, self.device, attention=self.attention, graphs=graphs, fused=self.fused
        )
        backend.runner.cache.fill_random(0)
        return backend

    @property
    def measured(self) -> DeviceSpec:
        if self.ceiling is None:
            raise BackendError("the device's ceilings were not measured")
        return self.ceiling

    def left_s(self) -> float:
        return self.until_s - time.monotonic()

    def in_time(self, *_: Any) -> None:
        """Raise :class:`TimeUp` if the section's time is over; also a progress callback."""
        if self.left_s() <= 0.0:
            raise TimeUp

    def add_row(self, name: str, row: dict[str, Any]) -> None:
        """Keep a row, and add it to OUT/name.csv; all rows of a name have the same fields."""
        self.results.setdefault(name, []).append(row)
        path = self.out / f"{name}.csv"
        is_new = len(self.results[name]) == 1
        with path.open("w" if is_new else "a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(row)
