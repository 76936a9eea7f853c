"""Cells of a grid, (policy, rate, seed), and running many of them: in this process or in a pool's workers."""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_gym.config import ClusterScenario, Scenario
from llmsched_gym.engine import Backend
from llmsched_gym.evaluation.clusters import check_policy
from llmsched_gym.evaluation.metrics import gaps_of, requests_frame, row
from llmsched_gym.evaluation.outcomes import Outcomes
from llmsched_gym.evaluation.run import Episode, simulate
from llmsched_gym.evaluation.spread import Places, Pool, spread
from llmsched_gym.evaluation.warm import warm
from llmsched_gym.evaluation.workers import Workers
from llmsched_gym.files import replace_file
from llmsched_gym.registry import make_scheduler
from llmsched_gym.scheduler import Compiled
from llmsched_gym.workload import TraceWarning, make_table
from llmsched_gym.workload.generate import has_turns

LOGGED_STEPS = 3000
"""Batches of a run kept for plots of what happens over time."""

COMPILED_S, PYTHON_S = 3e-5, 4e-3  # what one request costs, roughly, by kind of scheduler
CACHED_BLOCK_S = 5e-8  # and one block of its prompt, where blocks are looked up in the prefix cache
SPAWN_S = 2.5  # what starting workers costs
CHUNK_S = 0.5  # work handed to a worker at a time
DRIVER_S = 5e-3  # this process gets so long for each piece of work: many workers get larger ones


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    index: int  # position in the grid
    policy: str
    qps: float | None  # None: the scenario's own
    seed: int
    frames: tuple[str, ...] = ()  # of requests, steps, itl: what to write besides the row


def make_policy(scenario: Scenario, policy: str) -> Any:
    """The scheduler of a policy; on a cluster its router is tried, too. PolicyError for what cannot be made."""
    return check_policy(scenario, policy) if isinstance(scenario, ClusterScenario) else make_scheduler(policy)


def run_cell(
    scenario: Scenario, cell: Cell, folder: Path | None = None, backend: Backend | None = None
) -> dict[str, Any]:
    """The row of one cell; the frames it asks for are written to `folder`."""
    if cell.qps is not None:
        scenario = scenario.replace(qps=cell.qps)
    steps = LOGGED_STEPS if "steps" in cell.frames else 0
    episode = simulate(scenario, cell.policy, cell.seed, num_steps=steps, backend=backend)
    outcomes = Outcomes(episode)
    gaps = gaps_of(episode, outcomes)
    figures = row(episode, outcomes, gaps)
    if folder is not None and cell.frames:
        import pandas as pd

        labels = {
            "policy": cell.policy,
            "qps": figures["qps"],
            "requested_qps": cell.qps or math.nan,
            "seed": cell.seed,
        }
        if "requests" in cell.frames:
            write_part(folder, "requests", cell.index, requests_frame(episode, outcomes))
        if "steps" in cell.frames:
            write_part(folder, "steps", cell.index, steps_frame(episode).assign(**labels))
        if "itl" in cell.frames:
            parts = [pd.DataFrame({"slo_class": c, "itl_s": s, "count": n}) for c, s, n in gaps.bins()]
            write_part(folder, "itl", cell.index, pd.concat(parts).assign(**labels))
    return figures


def steps_frame(episode: Episode) -> Any:
    """The logged batches, a line each; on a cluster those of every replica, with its number."""
    import pandas as pd

    if episode.steps_by_replica is None:
        return pd.DataFrame(episode.steps)
    logs = [pd.DataFrame(log).assign(replica=j) for j, log in enumerate(episode.steps_by_replica)]
    return pd.concat(logs, ignore_index=True)


def part_path(folder: Path, kind: str, index: int) -> Path:
    """Where a cell's frame of that kind lies."""
    return folder / f"{kind}-{index:06d}.parquet"


def write_part(folder: Path, kind: str, index: int, frame: Any) -> None:
    """Write a cell's frame."""
    replace_file(part_path(folder, kind, index), lambda path: frame.to_parquet(path, index=False, compression="zstd"))


class Runner:
    """Runs cells, in workers where that is quicker; a real `backend` runs them all in this process.

    `places` is a number of processes (None: one per core), or a pool that stays open. A context manager: leaving it
    ends the workers that it started.
    """

    def __init__(
        self,
        scenario: Scenario,
        places: Places | None = 1,
        folder: Path | None = None,
        backend: Backend | None = None,
    ) -> None:
        self.scenario, self.folder, self.backend = scenario, folder, backend
        places = 1 if backend is not None else places or os.cpu_count() or 1
        self._own = Workers(places) if isinstance(places, int) else None
        self.pool: Pool = self._own or places  # type: ignore[assignment]
        self._each_s: dict[str, float] = {}  # seconds a request costs, by policy
        self._turns: dict[float, tuple[int, int]] = {}  # turns of a run and blocks of their prompts, by rate

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._own is not None:
            self._own.__exit__(kind, error, trace)

    def run(self, cells: Sequence[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """(cell, row) of each cell, as they are done."""
        each_s, count = [self._estimate_s(cell) for cell in cells], self.pool.count
        total_s = sum(each_s)
        if isinstance(self.pool, Workers):
            gain_s = total_s * (1 - 1 / count) - (0.0 if self.pool.started else SPAWN_S)
            if gain_s <= 0 or len(cells) < 2:
                for cell in cells:
                    yield cell, run_cell(self.scenario, cell, self.folder, self.backend)
                return
        chunk_s = min(max(CHUNK_S, DRIVER_S * count), total_s / (4 * count))
        chunks: list[tuple] = []
        chunk: list[Cell] = []
        filled_s = 0.0
        for cell, seconds in zip(cells, each_s, strict=True):
            chunk.append(cell)
            filled_s += seconds
            if filled_s >= chunk_s or cell is cells[-1]:
                chunks.append((self.scenario, chunk, self.folder if self.pool.is_here else None))
                chunk, filled_s = [], 0.0
        if self.pool.is_here or self.folder is None:
            for _, rows in spread(self.pool, _run_chunk, chunks):
                yield from rows
            return
        for _, found in spread(self.pool, _run_chunk_away, chunks):
            for cell, figures, parts in found:
                for name, data in parts.items():
                    _put(self.folder / name, data)
                yield cell, figures

    def _estimate_s(self, cell: Cell) -> float:
        scenario, qps = self.scenario, cell.qps or self.scenario.qps or max(self.scenario.qps_range)
        if cell.policy not in self._each_s:
            self._each_s[cell.policy] = (
                COMPILED_S if isinstance(make_policy(self.scenario, cell.policy), Compiled) else PYTHON_S
            )
        if not has_turns(scenario):
            requests = (scenario.num_requests or scenario.horizon_s * qps) + scenario.warmup_s * qps
            return requests * self._each_s[cell.policy]
        if qps not in self._turns:
            self._turns[qps] = _turns_of(scenario.replace(qps=qps) if cell.qps else scenario, cell.seed)
        turns, blocks = self._turns[qps]
        return turns * self._each_s[cell.policy] + scenario.prefix_caching * blocks * CACHED_BLOCK_S


def _turns_of(scenario: Scenario, seed: int) -> tuple[int, int]:
    """Turns that can come in a run, and KV blocks of their prompts.

    Rates are of sessions, each of which has many turns and lasts longer than others go on to begin behind the cohort:
    all of the table comes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TraceWarning)
        table = make_table(scenario, seed)
    return len(table), int(table.prompt_tokens.sum(dtype=np.int64)) // scenario.block_size


def _run_chunk(scenario: Scenario, cells: list[Cell], folder: Path | None) -> list[tuple[Cell, dict[str, Any]]]:
    found = []
    for cell in cells:
        warm(scenario if cell.qps is None else scenario.replace(qps=cell.qps), cell.policy)
        found.append((cell, run_cell(scenario, cell, folder)))
    return found


def _run_chunk_away(
    scenario: Scenario, cells: list[Cell], folder: Path | None
) -> list[tuple[Cell, dict[str, Any], dict[str, bytes]]]:
    """The same with the files of each cell's frames, for whoever has the folder."""
    found = []
    for cell in cells:
        with tempfile.TemporaryDirectory() as own:
            ((_, figures),) = _run_chunk(scenario, [cell], Path(own))
            found.append((cell, figures, {path.name: path.read_bytes() for path in Path(own).iterdir()}))
    return found


def _put(path: Path, data: bytes) -> None:
    replace_file(path, lambda partial: partial.write_bytes(data))
