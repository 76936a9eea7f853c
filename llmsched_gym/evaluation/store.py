"""A folder of results: what it holds says which grid it is of; an interrupted grid goes on where it stopped.

While a grid runs, ``partial/`` holds one JSON line per finished cell, and the cells' frames. At the end they become
``runs.parquet`` (rows), ``requests.parquet``, ``steps.parquet`` (first batches of the first seed) and ``itl.parquet``
(distribution of gaps between tokens), each put in place as a whole; ``config.json`` is there from the start.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import llmsched_gym
from llmsched_gym import sources
from llmsched_gym.config import ConfigError, Scenario
from llmsched_gym.cost import split_name
from llmsched_gym.evaluation.cells import part_path
from llmsched_gym.files import claim_folder, dumps, encode, json_with, make_folder, replace_file, write_text
from llmsched_gym.fluid import fluid_capacity
from llmsched_gym.workload.mixture import workload_files

ITL_PROBS = np.concatenate([np.linspace(0.0, 0.98, 295), 1.0 - np.logspace(math.log10(0.02), -5.0, 105)[1:], [1.0]])
"""Where the distribution of gaps is sampled, (400,): evenly, then finer and finer into the tail."""

RUNS_OF = "capacity-*.runs.jsonl"
"""Runs of a search for capacities that is not over."""


def _of_a_search(path: Path) -> bool:
    with path.open(encoding="utf-8") as file:
        return file.readline().startswith('{"search": ')


RESULTS = {
    "config.json": json_with("scenario", "policies"),
    "capacity-*.json": json_with("config", "results"),
    RUNS_OF: _of_a_search,
    "servers/*/config.json": json_with("scenario"),
}
"""Files by which folders of evaluate, capacity and serve-bench, which may be one, are known."""

ITL_COLUMNS = ("prob", "itl_s", "num_gaps", "policy", "requested_qps", "qps", "slo_class")

_ROW_GROUP = 200_000


def grid_config(scenario: Scenario, policies: Sequence[str], **settings: Any) -> dict[str, Any]:
    """All that a grid's results depend on, and the fluid capacity; with versions and a digest of code and files."""
    fluid = fluid_capacity(scenario) if scenario.backend == "simulated" else None
    return {
        "scenario": encode(scenario.to_dict()),
        "policies": list(policies),
        **settings,
        "fluid": None if fluid is None else dataclasses.asdict(fluid),
        "version": llmsched_gym.__version__,
        "code": _code_digest(scenario, policies),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in ("numpy", "numba")},
    }


def _code_digest(scenario: Scenario, policies: Sequence[str]) -> str:
    modules = ["llmsched_gym.evaluation.cells", "llmsched_gym.baselines", "llmsched_gym.policies"]
    if scenario.backend != "simulated":
        modules.append("llmsched_gym.real_backend")
    data = [Path(llmsched_gym.__file__).parent / "data"]
    named = (re.split(r"\+(?![^\[\]]*\])", policy) for policy in policies)  # routers, schedulers; of eb+ nothing
    parts = [part for names in named for part in names if part]
    for policy in parts:
        name = policy.partition("[")[0]
        module = name.partition(":")[0]
        if Path(name).exists():
            data.append(Path(name))
        elif module != name and module.startswith("llmsched_gym."):
            modules.append(module)
        elif module != name:
            spec = importlib.util.find_spec(module)
            if spec is not None and spec.origin:
                origin = Path(spec.origin)
                data.append(origin.parent if origin.name == "__init__.py" else origin)
    profiles = (split_name(name)[0] for name in (scenario.profile, scenario.scheduler_profile) if name)
    given = (*profiles, scenario.trace)
    data += [Path(name) for name in given if name and Path(name).is_file()]
    data += workload_files(scenario.workload) if scenario.trace is None else ()
    return sources.digest(modules, data=data)


class Store:
    """The folder `out`, for the grid that `config` describes."""

    def __init__(self, out: str | Path, config: dict[str, Any]) -> None:
        self.out, self.config = Path(out), json.loads(json.dumps(config))
        self.partial = self.out / "partial"
        self._lines = self.partial / "rows.jsonl"
        self._lock: int | None = None

    def open(self) -> dict[int, dict[str, Any]]:
        """Make the folder ready; returns the rows that it holds already, by cell. One line of error otherwise."""
        claim_results(self.out)
        make_folder(self.out)
        self._lock = lock_folder(self.out)
        try:
            self._check_config()
            if self.complete:
                return dict(enumerate(read_rows(self.out)))
            self.partial.mkdir(exist_ok=True)
            write_text(self.out / "config.json", dumps(self.config))
            done = self._read_lines()
            # A line that a crash cut short must not be followed by another.
            write_text(self._lines, "".join(json.dumps({"cell": i, "row": row}) + "\n" for i, row in done.items()))
            return done
        except OSError as error:
            raise ConfigError(f"out: cannot write to {self.out}: {error.strerror or error}") from None

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def complete(self) -> bool:
        """Whether all tables are in place."""
        return (self.out / "runs.parquet").exists() and not self.partial.exists()

    def _check_config(self) -> None:
        path = self.out / "config.json"
        if not path.exists():
            return
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            held = {}
        if not isinstance(held, dict) or held != self.config:
            keys = sorted(k for k in {*held, *self.config} if held.get(k) != self.config.get(k))
            raise ConfigError(
                f"out: {self.out} holds results of another configuration (it differs in {', '.join(keys)}); "
                "choose another folder or remove it"
            )

    def _read_lines(self) -> dict[int, dict[str, Any]]:
        if not self._lines.exists():
            return {}
        done = {}
        for line in self._lines.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut short by a crash
            done[int(entry["cell"])] = entry["row"]
        return done

    def add(self, cell: int, row: dict[str, Any]) -> None:
        """Keep the row of a finished cell whose frames are in ``partial/``."""
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"cell": cell, "row": row}, allow_nan=False) + "\n")

    def finish(self, rows: Sequence[dict[str, Any]]) -> None:
        """Put the tables in place and clear away the parts."""
        self._join("requests", len(rows))
        self._join("steps", len(rows))
        if self._parts("itl", len(rows)):
            replace_file(self.out / "itl.parquet", lambda path: self._itl(len(rows)).to_parquet(path, index=False))
        replace_file(self.out / "runs.parquet", lambda path: write_rows(rows, path))
        shutil.rmtree(self.partial)

    def _parts(self, kind: str, num_cells: int) -> list[Path]:
        paths = (part_path(self.partial, kind, i) for i in range(num_cells))
        return [path for path in paths if path.exists()]

    def _join(self, kind: str, num_cells: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        parts = self._parts(kind, num_cells)
        if not parts:
            return

        def write(path: Path) -> None:
            schema = pq.read_schema(parts[0]).remove_metadata()
            with pq.ParquetWriter(path, schema, compression="zstd") as writer:
                tables: list[Any] = []
                for i, part in enumerate(parts):
                    tables.append(pq.read_table(part).replace_schema_metadata(None))
                    if i == len(parts) - 1 or sum(len(table) for table in tables) >= _ROW_GROUP:
                        writer.write_table(pa.concat_tables(tables).unify_dictionaries())
                        tables = []

        replace_file(self.out / f"{kind}.parquet", write)

    def _itl(self, num_cells: int) -> Any:
        """Distribution of gaps by policy, load and class, pooled over seeds: itl_s at ITL_PROBS."""
        import pandas as pd

        def load(part: Any) -> tuple[str, float | None]:
            qps = float(part["requested_qps"].iat[0])
            return part["policy"].iat[0], None if math.isnan(qps) else qps

        frames = []
        parts = (pd.read_parquet(path) for path in self._parts("itl", num_cells))
        for (policy, qps), group in itertools.groupby((part for part in parts if len(part)), load):
            whole = pd.concat(group)
            for slo_class, mine in whole.groupby("slo_class"):
                counts = mine.groupby("itl_s")["count"].sum()
                cumulated = counts.cumsum().to_numpy()
                at = np.searchsorted(cumulated, ITL_PROBS * cumulated[-1])
                labels = {"policy": policy, "requested_qps": math.nan if qps is None else qps}
                labels |= {"qps": whole["qps"].mean() if qps is None else qps, "slo_class": slo_class}
                frame = pd.DataFrame({"prob": ITL_PROBS, "itl_s": counts.index.to_numpy()[at]})
                frames.append(frame.assign(num_gaps=cumulated[-1], **labels))
        return pd.concat(frames) if frames else pd.DataFrame(columns=ITL_COLUMNS)


def claim_results(out: str | Path) -> None:
    """One line of :class:`ConfigError` for a folder that holds something else than results."""
    claim_folder(Path(out), "results of llmsched", RESULTS)


def lock_folder(out: Path) -> int | None:
    """Keep other processes from writing to `out` while the file descriptor returned is open, or its process lives.

    One line of :class:`ConfigError` if another has it. A file system, or a system, without locks is written to without
    one.
    """
    folder = None
    try:
        import fcntl

        folder = os.open(out, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if folder is not None:
            os.close(folder)
        message = f"out: another process is writing to {out}; wait for it, or choose another folder"
        raise ConfigError(message) from None
    except (ImportError, OSError):
        pass
    return folder


def read_rows(out: str | Path) -> list[dict[str, Any]]:
    """The rows of ``runs.parquet``, as `evaluate` returned them."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(Path(out) / "runs.parquet").to_pylist()
    return rows


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write rows as ``runs.parquet`` holds them; a column without a figure, or of lists without any, is of numbers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def known(kind: Any) -> Any:
        if pa.types.is_list(kind):
            return pa.list_(known(kind.value_type))
        return pa.float64() if pa.types.is_null(kind) else kind

    guessed = pa.Table.from_pylist(list(rows)).schema
    schema = pa.schema([field.with_type(known(field.type)) for field in guessed])
    # made anew: pyarrow cannot cast lists of nothing
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, compression="zstd")
