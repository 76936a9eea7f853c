"""One environment's part of a cluster's arrays as a value, beside that of the engine's (`engine.saved`)."""

from __future__ import annotations

from typing import Any, NamedTuple

from llmsched_gym.cluster.state import Nodes
from llmsched_gym.engine.saved import Rows, Saved

OF_REPLICAS = ("nodes", "reports", "candidates", "identities")
OF_EPISODES = ("routes", "tree", "changes_s", "memory", "options")
COUNTED = {"held": "num_held", "moving": "num_moving"}
"""Lists of an episode, and where in its ROUTE their lengths stand."""


class SavedCluster(NamedTuple):
    """One moment of an environment on a cluster."""

    saved: Saved
    replicas: tuple[dict[str, bytes], ...]  # by array
    episode: dict[str, bytes]
    replica_of: bytes  # of the requests from the past ones up to the first that has not come
    given: dict[str, bytes]  # by array, of all requests: the same at all moments of an episode, but for `replica_of`
    schedulers: tuple[Any, ...]  # copies of those in Python, one a replica; none where a compiled one forms batches
    seed: int  # the episode's

    @property
    def room(self) -> int:
        """Requests that a replica's line must have room for."""
        return max(len(lane["waiting"]) + len(lane["running"]) for lane in self.saved.lanes) // 4

    @property
    def nbytes(self) -> int:
        """As of :class:`~llmsched_gym.engine.saved.Saved`; schedulers in Python are not counted."""
        own = sum(len(taken) for part in (*self.replicas, self.episode) for taken in part.values())
        return self.saved.nbytes + own + len(self.replica_of)


class NodeCopier:
    """Takes environments out of a cluster's arrays, and puts them back in."""

    def __init__(self, nodes: Nodes) -> None:
        self._rows = {name: Rows(array) for name, array in nodes._asdict().items()}
        self._counts = {name: nodes.routes[count] for name, count in COUNTED.items()}
        self._num_replicas = len(nodes.nodes) // len(nodes.routes)
        self._given: list[dict[str, bytes] | None] = [None] * len(nodes.routes)

    def forget(self, env: int) -> None:
        """The requests of environment `env` are others now."""
        self._given[env] = None

    def take(self, env: int, saved: Saved, schedulers: tuple[Any, ...], seed: int) -> SavedCluster:
        """What lives of an environment, of its replicas and of its episode, beside what was `saved` of the engine's."""
        rows, first, given = self._rows, env * self._num_replicas, self._given[env]
        if given is None:
            n = saved.given.num_requests
            given = self._given[env] = {name: rows[name].take(env, n) for name in ("replica_of", "before")}
        lanes = range(first, first + self._num_replicas)
        replicas = tuple({name: rows[name].take(k) for name in OF_REPLICAS} for k in lanes)
        episode = {name: rows[name].take(env) for name in OF_EPISODES}
        episode |= {name: rows[name].take(env, int(counts[env])) for name, counts in self._counts.items()}
        replica_of = rows["replica_of"].take(env, saved.num_come, saved.given.num_past)
        return SavedCluster(saved, replicas, episode, replica_of, given, schedulers, seed)

    def put(self, env: int, taken: SavedCluster) -> None:
        """Make environment `env` what was taken; there must be room for it."""
        rows, given = self._rows, taken.saved.given
        if self._given[env] is not taken.given:
            rows["before"].put(env, taken.given["before"])
            self._given[env] = taken.given
        rows["replica_of"].put(env, taken.given["replica_of"])
        rows["replica_of"].put(env, taken.replica_of, given.num_past)
        for name, values in taken.episode.items():
            rows[name].put(env, values)
        for k, replica in enumerate(taken.replicas, env * self._num_replicas):
            for name, values in replica.items():
                rows[name].put(k, values)
