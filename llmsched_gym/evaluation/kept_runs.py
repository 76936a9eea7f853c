"""Runs of a search that is under way, kept in a hidden file of its folder, so that the same search can go on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from llmsched_gym.config import ConfigError
from llmsched_gym.evaluation.store import lock_folder
from llmsched_gym.files import digest_of, make_folder, write_text

Row = dict[str, Any]


class KeptRuns:
    """Rows by (policy, rate, seed) of the search that `config` describes; without a folder they are kept nowhere.

    A context manager: other processes may not write to the folder meanwhile.
    """

    def __init__(self, out: Path | None, config: dict[str, Any]) -> None:
        self.out, self.rows = out, dict[tuple[str, float, int], Row]()
        self.path = None if out is None else out / f".search-{digest_of(config)}.jsonl"
        self._lock: int | None = None

    def __enter__(self) -> KeptRuns:
        if self.out is None or self.path is None:
            return self
        make_folder(self.out)
        self._lock = lock_folder(self.out)
        try:
            for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
                try:
                    entry = json.loads(line)
                except ValueError:
                    break  # cut short by a crash
                self.rows[entry["policy"], entry["qps"], entry["seed"]] = entry["row"]
            write_text(self.path, "".join(_line(*at, row) for at, row in self.rows.items()))
        except OSError as error:
            raise ConfigError(f"out: cannot write to {self.out}: {error.strerror or error}") from None
        return self

    def add(self, policy: str, qps: float, seed: int, row: Row) -> None:
        """Keep the row of a run."""
        self.rows[policy, qps, seed] = row
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(policy, qps, seed, row))

    def forget(self) -> None:
        """Remove the file: the search is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _line(policy: str, qps: float, seed: int, row: Row) -> str:
    return json.dumps({"policy": policy, "qps": qps, "seed": seed, "row": row}, allow_nan=False) + "\n"
