"""Measured batches in a CSV that grows row by row and survives being cut off anywhere."""

from __future__ import annotations

import csv
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llmsched_gym.config import ModelSpec
from llmsched_gym.cost.measured_batches import batch_row
from llmsched_gym.engine import Backend
from llmsched_gym.real_backend.calibration.sweep import Composition
from llmsched_gym.real_backend.errors import BackendError

if TYPE_CHECKING:
    import pandas as pd
    import torch

COLUMNS = ("prefill", "decode", "ms", "min_ms", "max_ms", "repeats", "round", "setup")
"""The first three are what :func:`llmsched_gym.cost.fit_profile` reads; times are medians of `repeats` passes."""

Key = tuple[str, str, str]  # prefill, decode, round
Measure = Callable[[list[tuple[int, int]], list[int]], float]
"""Seconds of a batch: prefill chunks as (computed, n) tokens, decodes as context lengths."""


class MeasuredBackend(Backend, Protocol):
    """A real model whose batches are measured one by one: a TransformersBackend or a VLLMBackend."""

    @property
    def num_kv_blocks(self) -> int:
        """Blocks of the KV cache, each of `block_size` tokens."""

    @property
    def block_size(self) -> int: ...

    @property
    def setup(self) -> str:
        """Model, device and versions in one line."""

    @property
    def spec(self) -> ModelSpec:
        """The model's shapes."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""

    def fill_random(self, seed: int) -> None:
        """Let the whole KV cache hold numbers as keys and values are."""

    def measure(self, chunks: list[tuple[int, int]], decode_contexts: list[int]) -> float:
        """Seconds of a batch whose contexts count as computed."""


@dataclass
class Sheet:
    """The CSV of one sweep on one machine."""

    path: Path
    setup: str  # model, device and versions; rows of another setup are refused

    @classmethod
    def of(cls, path: Path) -> Sheet:
        """A sheet that is there, with the setup that its rows name."""
        import pandas as pd

        try:
            rows = pd.read_csv(path, dtype=str, keep_default_na=False)
        except (OSError, ValueError) as error:
            text = " ".join(str(getattr(error, "strerror", None) or error).split())
            raise BackendError(f"{path}: cannot read: {text}") from None
        named = sorted(set(rows["setup"])) if "setup" in rows else []
        if len(named) > 1:
            raise BackendError(f"{path}: column 'setup': expected one setup, got {named[0]!r} and {named[1]!r}")
        return cls(path, named[0] if named else "a setup that the rows do not name")

    def done(self) -> set[Key]:
        """The rows that are there. A last line cut off by a kill is taken out of the file."""
        if not self.path.exists():
            return set()
        try:
            self._drop_torn_line()
            with self.path.open(encoding="utf-8", newline="") as file:
                lines = list(csv.reader(file))
        except (OSError, UnicodeDecodeError) as error:
            raise BackendError(f"{self.path}: cannot read: {getattr(error, 'strerror', None) or error}") from None
        if not lines:
            return set()
        if tuple(lines[0]) != COLUMNS:
            raise BackendError(f"{self.path}: line 1: expected the columns {','.join(COLUMNS)}; name another file")
        for number, line in enumerate(lines[1:], start=2):
            if len(line) != len(COLUMNS):
                raise BackendError(f"{self.path}: line {number}: expected {len(COLUMNS)} values, got {len(line)}")
            if line[-1] != self.setup:
                raise BackendError(
                    f"{self.path}: line {number}: measured on {line[-1]!r}, this is {self.setup!r}; name another file"
                )
        return {(line[0], line[1], line[-2]) for line in lines[1:]}

    def append(self, batch: Composition, number: int, seconds: Sequence[float]) -> None:
        """Add the row of a batch in round `number`, on the disk when this returns."""
        ms = [1e3 * s for s in seconds]
        row = {
            **batch_row(batch.chunks, batch.decodes, round(statistics.median(ms), 6)),
            "min_ms": round(min(ms), 6),
            "max_ms": round(max(ms), 6),
            "repeats": len(ms),
            "round": number,
            "setup": self.setup,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            os.fsync(file.fileno())

    def medians(self) -> pd.DataFrame:
        """One row per batch: the median over its rounds."""
        import pandas as pd

        rows = pd.read_csv(self.path, dtype={"prefill": str, "decode": str}, keep_default_na=False)
        if not {"prefill", "decode", "ms"} <= set(rows.columns):
            raise BackendError(f"{self.path}: line 1: expected the columns {','.join(COLUMNS)}")
        return rows.groupby(["prefill", "decode"], sort=False, as_index=False)["ms"].median()

    def _drop_torn_line(self) -> None:
        text = self.path.read_bytes()
        if text and not text.endswith(b"\n"):
            with self.path.open("r+b") as file:
                file.truncate(text.rfind(b"\n") + 1)


def key(batch: Composition, number: int) -> Key:
    """What tells the row of a batch in round `number` from the others."""
    row = batch_row(batch.chunks, batch.decodes, 0.0)
    return row["prefill"], row["decode"], str(number)


def run_sweep(
    measure: Measure,
    batches: Sequence[Composition],
    sheet: Sheet,
    *,
    rounds: int = 3,
    repeats: int = 3,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Measure the rows that the sheet lacks: every batch once a round, a pass to warm up and `repeats` that count.

    Rounds put minutes between the passes of one batch, so that a disturbance does not hit all of them. Returns how many
    rows were there already. `progress` is called with the number done and of all.
    """
    done = sheet.done()
    wanted = [(batch, number) for number in range(rounds) for batch in batches]
    missing = [(batch, number) for batch, number in wanted if key(batch, number) not in done]
    before = len(wanted) - len(missing)
    for i, (batch, number) in enumerate(missing):
        progress(before + i, len(wanted))
        chunks, decodes = list(batch.chunks), list(batch.decodes)
        measure(chunks, decodes)
        sheet.append(batch, number, [measure(chunks, decodes) for _ in range(repeats)])
    progress(len(wanted), len(wanted))
    return before
