"""Runs of a search for capacities, kept while it goes on, so that one that was interrupted does none of them twice."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from llmsched_gym.evaluation.store import RUNS_OF, lock_folder
from llmsched_gym.files import write_text

Row = dict[str, Any]


class CapacityRuns:
    """The file ``capacity-NAME.runs.jsonl`` in a folder: a line that says of which search it is, then a line a run.

    A context manager that keeps other processes out of the folder. A file of another search is begun anew.
    """

    def __init__(self, folder: Path, name: str, digest: str) -> None:
        self.path, self._digest = folder / RUNS_OF.replace("*", name), digest
        self.rows: dict[tuple[str, float, int], Row] = {}  # by policy, rate, seed

    def __enter__(self) -> CapacityRuns:
        self._lock = lock_folder(self.path.parent)
        text = json.dumps({"search": self._digest}) + "\n"
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        for line in lines[1:] if lines[:1] == [text] else ():
            try:
                policy, qps, seed, row = json.loads(line)
            except ValueError:  # cut short by a crash
                break
            self.rows[policy, qps, seed] = row
            text += line
        write_text(self.path, text)
        return self

    def add(self, policy: str, qps: float, seed: int, row: Row) -> None:
        """Keep the row of a run."""
        self.rows[policy, qps, seed] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([policy, qps, seed, row], allow_nan=False) + "\n")

    def done(self) -> None:
        """The capacities are found and written; the runs are not needed any more."""
        self.path.unlink()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.rows:
            self.path.unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)
