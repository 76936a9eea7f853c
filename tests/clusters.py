"""Small clusters for tests: hand-made tables and devices, every event under the checker."""

from dataclasses import replace

import numpy as np
from helpers import profile, table
from test_engine_sessions import root, sessions, turn

from llmsched_gym.cluster import Cluster, CompiledRouter
from llmsched_gym.cluster.events import MORE, OVER, ROUTE
from llmsched_gym.cluster.invariants import check
from llmsched_gym.config import scenario
from llmsched_gym.config.cluster import ClusterScenario
from llmsched_gym.engine.records import FINISHED
from llmsched_gym.engine.rows import phases_of
from llmsched_gym.workload import RequestTable

DEVICES = [
    profile((5.0 * f, 5.4 * f), kv_ms=0.001, pair_ms=1e-4, kv_blocks=n) for f, n in ((1, 40), (3, 16), (0.5, 12))
]


class Named:
    """Names the given replicas one after the other, then the last one for ever; keeps what it saw."""

    def __init__(self, *replicas):
        self.replicas, self.views = list(replicas), []

    def route(self, view):
        self.views.append(view)
        return self.replicas[min(len(self.views), len(self.replicas)) - 1]


class Zero:
    """Always the first replica."""

    def route(self, view):
        return 0


class Anywhere:
    """Any replica that may take the request."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)

    def route(self, view):
        return int(self.rng.choice(np.flatnonzero(view.legal)))


def with_sessions(*rows, **columns):
    """A table of ``test_engine_sessions.root`` and ``turn``, whose sessions have numbers."""
    given = sessions(*rows, **columns)
    root = np.arange(len(given))
    for r, parent in enumerate(given.parent):
        root[r] = r if parent < 0 else root[parent]
    return replace(given, session_id=root.astype(np.int64))


class Replicas:
    """A cluster before `rows`, stepped event by event under the checker.

    Devices are ``helpers.profile``s, one a replica or one for all; `fields` are the scenario's.
    """

    def __init__(self, rows, router=None, *, devices=None, scheduler="sarathi", capacity=None, num_steps=0, **fields):
        self.table = rows if isinstance(rows, RequestTable) else table(rows)
        self.router = router
        fields = {"num_replicas": 2, "watermark": 0.0, "jitter": 0.0, **fields}
        given = {**scenario("paper").to_dict(), **fields}
        self.scenario = ClusterScenario(**given)
        n = self.scenario.num_replicas
        devices = devices or profile()
        self.cluster = Cluster(
            self.scenario,
            capacity or len(self.table),
            scheduler=scheduler,
            profiles=devices if isinstance(devices, list) else [devices] * n,
            num_gaps=int(self.table.output_tokens.sum()) - len(self.table) + 1,
            num_steps=num_steps,
        )
        self.cluster.reset(self.table)
        if isinstance(router, CompiledRouter):
            router.install(self.cluster.nodes, 0)
        self.clocks_s = check(self.cluster)

    @property
    def requests(self):
        return self.cluster.state.requests[0][: len(self.table)]

    @property
    def sims(self):
        return self.cluster.state.sims

    @property
    def nodes(self):
        return self.cluster.nodes.nodes

    @property
    def now_s(self):
        return float(self.cluster.nodes.routes[0].now_s)

    @property
    def phases(self):
        return phases_of(self.cluster.state, 0, len(self.table))

    def event(self, to_the_end=True):
        """On to the next event, or to a decision that is to be taken; OVER, ROUTE or MORE."""
        code = self.cluster.advance(0, self.router, to_the_end=to_the_end, max_events=1)
        self.clocks_s = check(self.cluster, 0, self.clocks_s)
        return code

    def decide(self, most=20_000, **kwargs):
        """On to the next decision; returns the view, None at the end."""
        for _ in range(most):
            code = self.event(**kwargs)
            if code != MORE:
                return self.cluster.view() if code == ROUTE else None
        raise AssertionError(f"no decision in {most} events")

    def send(self, replica):
        self.cluster.send(replica)
        self.clocks_s = check(self.cluster, 0, self.clocks_s)

    def drain(self, most=20_000, to_the_end=True):
        """To the end of the run, by its router."""
        for _ in range(most):
            code = self.event(to_the_end)
            if code == OVER:
                return self
            if code == ROUTE:
                self.send(self.router.route(self.cluster.view()))
        raise AssertionError(f"no end after {most} events")

    def gaps(self, r):
        """Recorded seconds between the tokens of request r."""
        start = int(self.cluster.state.arrivals[0][r].gap_start)
        return self.cluster.state.gaps[0, start : start + int(self.requests[r].num_output_tokens) - 1].tolist()

    def all_finished(self):
        return bool((self.phases == FINISHED).all())


def random_sessions(rng, count=12):
    """Sessions that fork, with turns that follow at once."""
    rows, known = [], []
    for r in range(count):
        prompt, output = int(rng.integers(1, 90)), int(rng.integers(1, 25))
        if r > 0 and rng.random() < 0.7:
            first = max(i for i, row in enumerate(rows) if not row[0])
            parent = int(rng.integers(first, r))
            rows.append(turn(parent, float(rng.choice([0.0, 0.01, 0.2])), known[parent] + prompt, output))
        else:
            when = rows and max(row[1] for row in rows if not row[0])
            rows.append(root(float(when or 0.0) + float(rng.choice([0.0, 0.02, 0.1])), prompt, output))
        known.append(rows[-1][3] + output)
    return with_sessions(*rows)
