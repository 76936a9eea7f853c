"""Runs of any length in the same memory: the engine sees a window of the requests, figures are added up as it moves.

The window holds who waits and runs and the next requests of the table. When the clock comes near its end, resolved
requests leave it, the others move to its front in the same order, and the next ones are written behind them: batches
and times are those of a run that holds all requests, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from llmsched_gym.config import MOST, SLO_CLASSES, ConfigError, Scenario
from llmsched_gym.engine import Engine
from llmsched_gym.engine import run as kernels
from llmsched_gym.engine.load import ROOT, TABLE_COLUMNS, TO_COME, TURN_COLUMNS
from llmsched_gym.engine.records import ABANDONED, FINISHED, NONE, REFUSED, REJECTED
from llmsched_gym.evaluation.gaps import Gaps, quantile
from llmsched_gym.evaluation.metrics import gaps_of
from llmsched_gym.evaluation.outcomes import Outcomes
from llmsched_gym.evaluation.run import Episode, scenario_for
from llmsched_gym.registry import make_scheduler
from llmsched_gym.scheduler import Compiled, install
from llmsched_gym.workload import RequestTable
from llmsched_gym.workload.chunks import table_chunks

CHUNK = 1 << 14
LINKS = ("later", "earlier", "shorter", "longer")  # of a request's record, to others
ENDS = ("first_open", "last_open", "first_expired", "last_expired", "expired_strict", "expired_others")

Seen = Callable[[Episode], None]
"""Called with an episode of the requests that have just left the window, in the order in which they came."""


def long_run(
    scenario: Scenario, policy: str, seed: int, *, chunk: int = CHUNK, seen: Seen | None = None
) -> dict[str, Any]:
    """Run a compiled scheduler on the requests of `seed` in a window of about twice `chunk` requests.

    Figures are those of `metrics.row` with percentiles by bins 0.2 % wide. The queue itself is in the window: where it
    grows without end, so does the memory. ConfigError for what `table_chunks` refuses, for prefix caching, batches in
    flight and schedulers in Python.
    """
    scheduler = make_scheduler(policy)
    if not isinstance(scheduler, Compiled):
        raise ConfigError(f"policy: expected a compiled scheduler for a run in parts, got {policy!r}")
    scenario = scenario_for(scenario, scheduler)
    for name in ("prefix_caching", "async_lag"):
        if getattr(scenario, name):
            raise ConfigError(f"{name}: expected false for a run in parts, got true")
    if scenario.backend != "simulated":
        raise ConfigError(f"backend: expected simulated for a run in parts, got {scenario.backend!r}")
    if scheduler.clairvoyant and scenario.length_hint == "none":
        scenario = scenario.replace(length_hint="oracle")
    window, figures = _Window(scenario, policy, scheduler, seed, chunk), _Figures()
    start = time.perf_counter()
    for episode in window.episodes():
        figures.add(episode)
        if seen is not None:
            seen(episode)
    sim = window.engine.state.sims[0]
    return {
        "policy": policy,
        "seed": seed,
        **figures.row(),
        "iterations": int(sim.num_batches),
        "sim_time_s": float(sim.clock_s),
        "wall_time_s": time.perf_counter() - start,
    }


class _Window:
    """An engine whose requests are a part of the table."""

    def __init__(self, scenario: Scenario, policy: str, scheduler: Compiled, seed: int, chunk: int) -> None:
        self._scenario, self._policy, self._seed, self._scheduler = scenario, policy, seed, scheduler
        self._tables = table_chunks(scenario, seed, chunk)
        self._measured = np.empty(0, bool)  # of the requests in the window
        self._last_root_s = math.nan  # when the last measured request seen so far comes
        self._left = int(scenario.num_requests or 0)  # measured requests that are still to be drawn
        self.engine = Engine(scenario, 2 * chunk, num_gaps=1)

    def episodes(self) -> Iterator[Episode]:
        """Run to the end; the measured requests as they leave the window."""
        table = next(self._tables)
        self._begin(table)
        for following in self._tables:
            self._append(following)
            self._run_up_to(float(table.arrival_s[-1]))
            yield self._leave()
            if self._is_over or not len(following):
                break
            table = following
        if not self._is_over:
            self._run_up_to(math.inf)
        yield self._leave(everybody=True)

    @property
    def _stop_s(self) -> float:
        return self._last_root_s + self._scenario.drain_s if self._left == 0 else math.inf

    @property
    def _is_over(self) -> bool:
        state = self.engine.state
        return bool(state.sims[0].clock_s >= self._stop_s or state.worlds[0].num_unresolved == 0)

    def _begin(self, table: RequestTable) -> None:
        room = int(table.output_tokens.sum())
        self.engine.reserve(len(table), room)
        everybody = RequestTable(**{**vars(table), "cohort_start": 0, "cohort_stop": len(table)})
        self.engine.reset(everybody)
        install(self._scheduler, self.engine.state, seed=self._seed)
        self.engine.prepare(self._scheduler)
        self._measured = self._note(table)
        world = self.engine.state.worlds[0]
        phases = self.engine.state.requests[0, : len(table)]["phase"]  # at time 0 somebody may have been rejected
        done = (phases >= FINISHED) & self._measured
        world.num_unresolved = int(self._scenario.num_requests or 0) - int(done.sum())
        self._mark_cohort()

    def _note(self, table: RequestTable) -> np.ndarray:
        """Which of a table are measured."""
        places = np.arange(len(table))
        measured = (places >= table.cohort_start) & (places < table.cohort_stop)
        self._left -= int(measured.sum())
        if measured.any():
            self._last_root_s = float(table.arrival_s[table.cohort_stop - 1])
        return measured

    def _mark_cohort(self) -> None:
        world, found = self.engine.state.worlds[0], np.flatnonzero(self._measured)
        world.cohort_start, world.cohort_stop = (found[0], found[-1] + 1) if len(found) else (0, 0)

    def _append(self, table: RequestTable) -> None:
        """Write the next requests behind those in the window."""
        state = self.engine.state
        if len(table) and table.arrival_s[0] <= state.sims[0].clock_s:
            raise ConfigError("chunk: expected more requests than come during one batch")
        held = int(state.worlds[0].num_requests)
        n = held + len(table)
        rooms = np.append(state.output_tokens[0, :held], table.output_tokens).astype(np.int64) - 1
        if n > state.requests.shape[1] or rooms.sum() > state.gaps.shape[1]:
            self.engine.reserve(n, int(rooms.sum()))
            state = self.engine.state
        new, world = slice(held, n), state.worlds[0]
        arrivals = state.arrivals[0]
        state.requests[0, new] = TO_COME
        for name in TABLE_COLUMNS:
            arrivals[name][new] = getattr(table, name)
        arrivals["shares_with"][new], arrivals["shared_tokens"][new] = NONE, 0
        for name, value in zip(TURN_COLUMNS, ROOT, strict=True):
            arrivals[name][new] = value
        arrivals["is_cancelled"][new], arrivals["max_output_tokens"][new] = 0, MOST
        arrivals["gap_start"][new] = (np.cumsum(rooms) - rooms)[new]
        state.output_tokens[0, new] = table.output_tokens
        if world.next_arrival == held and len(table):
            world.next_arrival_s = table.arrival_s[0]
        world.num_requests = world.table_size = n
        self._measured = np.append(self._measured, self._note(table))
        self._mark_cohort()

    def _run_up_to(self, stop_s: float) -> None:
        """Step until the clock reaches `stop_s`, or the run is over."""
        self.engine.state.worlds[0].stop_s = min(stop_s, self._stop_s)
        self.engine.run(self._scheduler)

    def _leave(self, *, everybody: bool = False) -> Episode:
        """Take the resolved requests, or all, out of the window; the measured ones as an episode of their own."""
        kernels.clear_batch_env(self.engine.handle, 0)
        state = self.engine.state
        n = int(state.worlds[0].num_requests)
        phase = state.requests[0, :n]["phase"]
        gone = np.full(n, True) if everybody else (phase >= FINISHED) & (phase <= ABANDONED)
        episode = self._episode(np.flatnonzero(gone & self._measured))
        if not everybody:
            self._keep(np.flatnonzero(~gone), n)
        return episode

    def _gaps(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The recorded gaps of requests side by side, each with the room of all its tokens, and where they begin."""
        state = self.engine.state
        rooms = state.output_tokens[0, rows].astype(np.int64) - 1
        starts = np.cumsum(rooms) - rooms
        places = np.arange(int(rooms.sum())) + np.repeat(state.arrivals[0]["gap_start"][rows] - starts, rooms)
        return state.gaps[0, places], starts

    def _keep(self, kept: np.ndarray, n: int) -> None:
        """Move the requests `kept` to the front; whoever refers to them is told."""
        state, count = self.engine.state, len(kept)
        sim, world = state.sims[0], state.worlds[0]
        new = np.full(n + 1, NONE, np.int32)  # the last is what NONE refers to
        new[kept] = np.arange(count)
        gaps, starts = self._gaps(kept)
        state.gaps[0, : len(gaps)] = gaps
        arrived = int(np.searchsorted(kept, world.next_arrival))
        requests = state.requests[0, kept]
        for name in LINKS:
            requests[name][:arrived] = new[requests[name][:arrived]]
        state.requests[0, :count] = requests
        state.arrivals[0, :count] = state.arrivals[0, kept]
        state.arrivals[0]["gap_start"][:count] = starts
        state.output_tokens[0, :count] = state.output_tokens[0, kept]
        for name in ENDS:
            sim[name] = new[sim[name]]
        for name, size in (("waiting", sim.num_waiting), ("running", sim.num_running)):
            getattr(state, name)[0, :size] = new[getattr(state, name)[0, :size]]
        world.next_arrival, world.num_requests, world.table_size = arrived, count, count
        state.episodes[0].num_resolved = 0
        self._measured = self._measured[kept]
        self._mark_cohort()

    def _episode(self, rows: np.ndarray) -> Episode:
        state = self.engine.state
        requests, arrivals = state.requests[0, rows], state.arrivals[0, rows]
        gaps, _ = self._gaps(rows)
        table = RequestTable(
            **{name: arrivals[name] for name in TABLE_COLUMNS},
            output_tokens=state.output_tokens[0, rows],
            cohort_start=0,
            cohort_stop=len(rows),
            qps=math.nan,
            cost_scale=float(state.worlds[0].cost_scale),
            seed=self._seed,
        )
        return Episode(
            self._scenario,
            self._policy,
            self._seed,
            table,
            requests,
            gaps,
            state.steps[0, :0],
            state.sims[0].copy(),
            0.0,
        )


class _Figures:
    """Sums and counts over episodes, of requests and of gaps between tokens."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(
            ("num_requests", "num_finished", "num_rejected", "num_refused", "num_abandoned"), 0
        )
        self._attained, self._utility = 0, 0.0
        self._span_s = [math.inf, -math.inf]  # first and last arrival
        self._itl = self._ttft = np.zeros(0, np.int64)
        self._endless = 0  # requests without a first token
        self._by_class = np.zeros((2, len(SLO_CLASSES)), np.int64)  # attained, all

    def add(self, episode: Episode) -> None:
        """Count the requests of an episode."""
        if not len(episode.requests):
            return
        o = Outcomes(episode)
        self._counts["num_requests"] += len(o.phase)
        for name, phase in zip(list(self._counts)[1:], (FINISHED, REJECTED, REFUSED, ABANDONED), strict=True):
            self._counts[name] += o.count(phase)
        self._attained += int(o.attained.sum())
        self._utility += float(o.utility.sum())
        for i, mask in enumerate((o.attained, o.counts)):
            self._by_class[i] += np.bincount(o.slo_class[mask], minlength=len(SLO_CLASSES))
        arrival_s = episode.table.arrival_s
        self._span_s = [min(self._span_s[0], arrival_s.min()), max(self._span_s[1], arrival_s.max())]
        is_known = np.isfinite(o.ttft_s)
        self._endless += int((~is_known).sum())
        ttft_s = o.ttft_s[is_known].astype(np.float32)
        self._ttft = _sum(self._ttft, Gaps((ttft_s, np.zeros(len(ttft_s), np.int8))).counts)
        self._itl = _sum(self._itl, gaps_of(episode, o).counts)

    def row(self) -> dict[str, Any]:
        """All figures; None for one of nothing."""
        n = self._counts["num_requests"]
        span_s = self._span_s[1] - self._span_s[0]
        hits, sizes = self._by_class.tolist()
        classes = zip(SLO_CLASSES, hits, sizes, strict=True)
        return {
            **self._counts,
            "slo_attainment": self._attained / n if n else None,
            "slo_attainment_by_class": {name: hit / size if size else None for name, hit, size in classes},
            "mean_utility": self._utility / n if n else None,
            "request_goodput": self._attained / n * (n - 1) / span_s if n > 1 and span_s > 0.0 else None,
            "ttft_p50_s": quantile(self._ttft, 0.5, self._endless),
            "ttft_p99_s": quantile(self._ttft, 0.99, self._endless),
            "itl_p50_s": quantile(self._itl, 0.5),
            "itl_p99_s": quantile(self._itl, 0.99),
        }


def _sum(total: np.ndarray, counts: np.ndarray) -> np.ndarray:
    added = counts.sum(axis=0)
    return added if not len(total) else total + added
