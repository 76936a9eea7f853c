"""One environment's part of the engine's arrays as a value: what lives of it, as bytes, and the way back.

What has not happened yet is not copied: of the requests to come there is the table, which all moments of an episode
share. Nor is what a seed gives again, the noise on batch times. Arrays are copied as bytes, since NumPy copies records
field by field, which takes forty times as long.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from llmsched_gym.engine.load import NOTHING_SHARED, TO_COME
from llmsched_gym.engine.state import State

WHOLE = ("sims", "knobs", "memory", "batches", "flights")
"""Of a lane; beside them the lists of COUNTED, the log and the blocks live. What is left is scratch of one decision."""
COUNTED = {
    "waiting": ("sims", "num_waiting"),
    "running": ("sims", "num_running"),
    "items": ("batches", "num_items"),
    "preempt": ("batches", "num_preempt"),
    "refuse": ("batches", "num_refuse"),
    "flying": ("flights", "num_items"),
}
"""Lists of a lane, and where their lengths stand."""


class Given(NamedTuple):
    """What of an episode is the same at all its moments, which share it."""

    table: dict[str, bytes]  # by array: of all requests, those to come as they will be found
    past: dict[str, bytes]  # likewise: of the requests that are over when it starts
    num_requests: int  # those of the table, and those that were entered beside it
    num_past: int
    num_gaps: int  # gaps between tokens that are recorded up to its end

    @property
    def nbytes(self) -> int:
        """Bytes of arrays."""
        return sum(map(len, (*self.table.values(), *self.past.values())))


class Saved(NamedTuple):
    """One moment of an environment and its replicas, independent of the arrays that it was taken from."""

    lanes: tuple[dict[str, bytes], ...]  # of each replica, by array
    episode: dict[str, bytes]  # by array
    begun: dict[str, bytes]  # by array: of the requests from the past ones up to the first that has not come
    num_come: int  # the first so many have come, or are turns of sessions that have
    given: Given
    noise_seed: int  # what the noise on batch times is drawn from

    @property
    def nbytes(self) -> int:
        """Bytes of arrays, without those that it shares with all moments of its episode."""
        return sum(len(taken) for part in (*self.lanes, self.episode, self.begun) for taken in part.values())


class Rows:
    """The rows of an array as bytes."""

    def __init__(self, array: np.ndarray) -> None:
        self._entry = array.itemsize * math.prod(array.shape[2:])  # bytes
        self._row = self._entry * math.prod(array.shape[1:2])
        self._bytes = array.reshape(-1).view(np.uint8).data

    def take(self, row: int, stop: int | None = None, start: int = 0) -> bytes:
        """The entries `start` to `stop` of a row; None: all behind."""
        at, size = row * self._row, self._entry
        return bytes(self._bytes[at + start * size : at + (self._row if stop is None else stop * size)])

    def put(self, row: int, taken: bytes | memoryview, start: int = 0) -> None:
        """Write entries of a row from the one at `start` on. ValueError if it ends before them."""
        at = start * self._entry
        if at + len(taken) > self._row:
            raise ValueError(f"row: expected at most {self._row} bytes, got {at + len(taken)}")
        at += row * self._row
        self._bytes[at : at + len(taken)] = taken

    def part(self, taken: bytes, start: int, stop: int) -> memoryview:
        """The entries `start` to `stop` of what was taken from the first on."""
        return memoryview(taken)[start * self._entry : stop * self._entry]


class Copier:
    """Takes environments out of a state, and puts them back in."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._rows = {name: Rows(array) for name, array in state._asdict().items()}
        self._counts = {name: getattr(state, source)[count] for name, (source, count) in COUNTED.items()}
        self._num_replicas = len(state.sims) // len(state.episodes)
        self._num_steps = state.steps.shape[1]
        empty = {"requests": TO_COME} | ({"prefixes": NOTHING_SHARED} if state.prefixes.shape[1] > 0 else {})
        self._empty = {name: row.tobytes() for name, row in empty.items()}  # of who has not come
        self._given: list[Given | None] = [None] * len(state.episodes)  # that which the arrays hold, where it is known

    def forget(self, env: int) -> None:
        """The requests of environment `env` are others now."""
        self._given[env] = None

    def num_come(self, env: int) -> int:
        """The first so many requests have come, or are turns of sessions that have."""
        world = self._state.worlds
        n = int(world["num_requests"][env])
        return n if n > world["table_size"][env] else int(world["next_arrival"][env])

    def take(self, env: int, noise_seed: int) -> Saved:
        """One environment as it is now."""
        rows, state, given = self._rows, self._state, self._given[env] or self._give(env)
        come, first = self.num_come(env), env * self._num_replicas
        begun = {name: rows[name].take(env, come, given.num_past) for name in self._empty}
        episode = {name: rows[name].take(env) for name in ("episodes", "worlds")}
        episode["resolved"] = rows["resolved"].take(env, int(state.episodes["num_resolved"][env]))
        if state.worlds["has_turns"][env]:  # which are given their arrival as the episode goes
            begun["arrivals"] = rows["arrivals"].take(env, come, given.num_past)
            episode["due"] = rows["due"].take(env, int(state.worlds["num_due"][env]))
        if given.num_gaps > 0:
            is_last = come == given.num_requests
            used = given.num_gaps if is_last else int(state.arrivals["gap_start"][env, come])
            episode["gaps"] = rows["gaps"].take(env, used)
        lanes = tuple(self._lane(k) for k in range(first, first + self._num_replicas))
        return Saved(lanes, episode, begun, come, given, noise_seed)

    def _give(self, env: int) -> Given:
        state, rows, num_gaps = self._state, self._rows, 0
        n, past = int(state.worlds["num_requests"][env]), int(state.worlds["num_past"][env])
        if n > 0 and state.worlds["records_gaps"][env]:
            num_gaps = int(state.arrivals["gap_start"][env, n - 1]) + int(state.output_tokens[env, n - 1]) - 1
        table = {name: rows[name].take(env, n) for name in ("arrivals", "output_tokens")}
        self._given[env] = given = Given(
            table, {name: rows[name].take(env, past) for name in self._empty}, n, past, num_gaps
        )
        return given

    def _lane(self, k: int) -> dict[str, bytes]:
        rows = self._rows
        lane = {name: rows[name].take(k) for name in WHOLE}
        for name, counts in self._counts.items():
            lane[name] = rows[name].take(k, int(counts[k]))
        if self._num_steps > 0:
            lane["steps"] = rows["steps"].take(k, min(self._num_steps, int(self._state.sims["num_batches"][k])))
        if "prefixes" in self._empty:
            lane["blocks"] = rows["blocks"].take(k)
        return lane

    def put(self, env: int, saved: Saved) -> None:
        """Make environment `env` what `saved` is, but for the noise; there must be room for it."""
        rows, given, come = self._rows, saved.given, saved.num_come
        stale = self.num_come(env)  # requests that had come here, of the same episode: those behind are untouched
        if self._given[env] is not given:
            for name, taken in (given.table | given.past).items():
                rows[name].put(env, taken)
            stale, self._given[env] = given.num_requests, given
        if stale > come:
            rows["arrivals"].put(env, rows["arrivals"].part(given.table["arrivals"], come, stale), come)
            for name, empty in self._empty.items():
                rows[name].put(env, empty * (stale - come), come)
        for name, taken in saved.begun.items():
            rows[name].put(env, taken, given.num_past)
        for name, taken in saved.episode.items():
            rows[name].put(env, taken)
        for k, lane in enumerate(saved.lanes, env * self._num_replicas):
            for name, taken in lane.items():
                rows[name].put(k, taken)
