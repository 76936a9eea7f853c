"""One run with what every batch of it held: the same run, bit for bit, stepped and looked at in between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from llmsched_gym.config import ClusterScenario, ConfigError, Scenario
from llmsched_gym.engine import Engine
from llmsched_gym.evaluation.run import Episode, simulate

SKIPPED = 16
"""Steps that pass at once where nothing is to be recorded."""
MARGIN_S = 20.0
"""How long before a window batches are recorded one by one: no :data:`SKIPPED` of them take longer."""

COLUMNS = ("num_computed_tokens", "prefill_tokens", "num_output_tokens", "num_preemptions")
"""What of each request is kept from one look to the next."""

Window = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Recording:
    """The batches of a run that were recorded, one after the other; the items of batch b are first[b]:first[b + 1]."""

    episode: Episode
    start_s: np.ndarray  # (num_batches,)
    duration_s: np.ndarray
    kv_cache_usage: np.ndarray  # 0 to 1
    num_running: np.ndarray
    num_waiting: np.ndarray
    first: np.ndarray  # (num_batches + 1,)
    request: np.ndarray  # (num_items,)
    tokens: np.ndarray  # computed in the batch
    is_prefill: np.ndarray  # bool
    emitted: np.ndarray  # tokens that it got, 0 or 1
    lost: list[tuple[int, int]]  # (batch, request): preempted for that batch

    @property
    def stop_s(self) -> np.ndarray:
        """When each batch ended."""
        return np.asarray(self.start_s + self.duration_s)

    def batch_of(self, items: np.ndarray) -> np.ndarray:
        """The batch of each of these items."""
        return np.searchsorted(self.first, items, side="right") - 1

    def is_lost(self, request: int, after: int, until: int) -> bool:
        """Whether a request was preempted for a batch behind `after`, up to `until`."""
        return any(who == request and after < batch <= until for batch, who in self.lost)


class _Recorder:
    """Looks at the engine after each step inside the windows."""

    def __init__(self, windows: Sequence[Window] | None) -> None:
        self.windows = sorted(windows) if windows is not None else [(0.0, math.inf)]
        self.batches: list[tuple[float, ...]] = []
        self.items: list[np.ndarray] = []
        self.lost: list[tuple[int, int]] = []
        self.seen = 0  # batches of the run
        self.num_lost = 0
        self.before: dict[str, np.ndarray] = {}

    def __call__(self, engine: Engine) -> int:
        """Note the batch just done; returns how many steps to do before the next look."""
        sim, requests = engine.state.sims[0], engine.state.requests[0]
        clock_s, new = float(sim.clock_s), int(sim.num_batches) - self.seen
        if self.before and new == 1:
            touched = self._note(engine, self._is_wanted(clock_s - float(sim.last_batch_s), clock_s))
            for name, column in self.before.items():
                column[touched] = requests[name][touched]
        self.seen, self.num_lost = int(sim.num_batches), int(sim.num_preemptions)
        if not self._is_near(clock_s):
            self.before = {}
            return SKIPPED
        if not self.before or new > 1:
            self.before = {name: requests[name].copy() for name in COLUMNS}
        return 1

    def _is_wanted(self, start_s: float, stop_s: float) -> bool:
        return any(low <= stop_s and start_s <= high for low, high in self.windows)

    def _is_near(self, clock_s: float) -> bool:
        return any(low - MARGIN_S <= clock_s <= high for low, high in self.windows)

    def _note(self, engine: Engine, is_wanted: bool) -> np.ndarray:
        """Keep the batch just done if it is wanted; returns the requests that it changed."""
        state, sim = engine.state, engine.state.sims[0]
        requests, before = state.requests[0], self.before
        lost = np.array([], np.int64)
        if int(sim.num_preemptions) != self.num_lost:
            lost = np.flatnonzero(requests["num_preemptions"] > before["num_preemptions"])
        taken = state.items[0, : int(state.batches[0].num_items)]
        who, tokens = taken["request"].astype(np.int64), taken["tokens"]
        touched = np.concatenate([who, lost])
        if not is_wanted:
            return touched
        self.lost += [(len(self.batches), int(r)) for r in lost]
        if len(lost):  # evicted for this batch: not in it
            kept = ~np.isin(who, lost)
            who, tokens = who[kept], tokens[kept]
        prefill = before["num_computed_tokens"][who] < before["prefill_tokens"][who]
        prefill |= before["num_output_tokens"][who] == 0
        emitted = requests["num_output_tokens"][who] - before["num_output_tokens"][who]
        self.items.append(np.stack([who, tokens, prefill, emitted]).astype(np.int64))
        clock_s, last_s = float(sim.clock_s), float(sim.last_batch_s)
        figures = (clock_s - last_s, last_s, float(sim.kv_cache_usage), int(sim.num_running), int(sim.num_waiting))
        self.batches.append(figures)
        return touched


def record(scenario: Scenario, policy: str, seed: int, windows: Sequence[Window] | None = None) -> Recording:
    """Run `policy` on the requests of `seed` again and keep its batches, of the `windows` of time (s) or all.

    ConfigError for what is no single simulated engine, or forms batches while others execute.
    """
    if isinstance(scenario, ClusterScenario) or scenario.backend != "simulated" or scenario.async_lag:
        raise ConfigError("a run can be recorded on one simulated engine without async_lag only")
    watch = _Recorder(windows)
    episode = simulate(scenario, policy, seed, watch=watch)
    batches = np.array(watch.batches, float).reshape(-1, 5)
    sizes = [items.shape[1] for items in watch.items]
    items = np.concatenate(watch.items, axis=1) if watch.items else np.zeros((4, 0), np.int64)
    columns: dict[str, Any] = {"first": np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)}
    columns |= dict(
        zip(("start_s", "duration_s", "kv_cache_usage", "num_running", "num_waiting"), batches.T, strict=True)
    )
    columns |= {"request": items[0], "tokens": items[1], "is_prefill": items[2] > 0, "emitted": items[3]}
    return Recording(episode, lost=watch.lost, **columns)


class Segment(NamedTuple):
    """A part of a request's life. Its kind is one of :data:`KINDS`."""

    start_s: float
    stop_s: float
    kind: str
    batches: int  # that it was in, or that others had meanwhile
    tokens: int  # computed of it


KINDS = ("queue", "prefill", "decode", "held", "preempted")
"""Before the first batch; computing the prompt; a token at a time; holding memory, but in no batch; without it."""


def items_of(recording: Recording, request: int) -> np.ndarray:
    """Indices of a request's items, in the order of batches."""
    return np.flatnonzero(recording.request == request)


def segments(recording: Recording, request: int, items: np.ndarray, arrival_s: float, end_s: float) -> list[Segment]:
    """What a request did from its arrival to its end; what is of one kind and adjoins is one segment."""
    found: list[Segment] = []

    def add(new: Segment) -> None:
        if new.stop_s - new.start_s <= 1e-9:
            return
        if found and found[-1].kind == new.kind and new.start_s - found[-1].stop_s < 1e-9:
            old = found.pop()
            new = Segment(old.start_s, new.stop_s, old.kind, old.batches + new.batches, old.tokens + new.tokens)
        found.append(new)

    lost = [batch for batch, who in recording.lost if who == request]

    def between(last: int | None, until: int) -> str:
        if last is None:
            return "queue"
        return "preempted" if any(last < batch <= until for batch in lost) else "held"

    now_s, last = arrival_s, None
    for item, b in zip(items.tolist(), recording.batch_of(items).tolist(), strict=True):
        start_s = float(recording.start_s[b])
        add(Segment(now_s, start_s, between(last, b), 0 if last is None else b - last - 1, 0))
        now_s, last = start_s + float(recording.duration_s[b]), b
        kind = "prefill" if recording.is_prefill[item] else "decode"
        add(Segment(start_s, min(now_s, end_s), kind, 1, int(recording.tokens[item])))
    add(Segment(now_s, end_s, between(last, len(recording.start_s)), 0, 0))
    return found
