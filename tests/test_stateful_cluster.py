"""Replicas behind a router, in any order of decisions, events and ways back: nothing is lost or doubled."""

import pickle

import helpers
import numpy as np
from clusters import DEVICES, Replicas, random_sessions
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule
from stateful import lasting, one_line, sized
from test_cluster_properties import (
    FAILURES,
    REQUESTS,
    ROLES,
    SMALL_CLUSTERS,
    check_end,
    failures_of,
    rows_from,
)

from llmsched_gym.cluster.events import OVER, ROUTE
from llmsched_gym.cluster.invariants import check
from llmsched_gym.cluster.router import check_replica
from llmsched_gym.engine.rows import phases_of
from llmsched_gym.registry import make_router
from llmsched_gym.scheduler import PolicyError

KINDS = st.sampled_from(["plain", "cached", "split"])


def taken(cluster):
    saved = cluster.save()
    return saved._replace(saved=lasting(saved.saved, cluster.state), given={})


class ClusterMachine(RuleBasedStateMachine):
    moments = Bundle("moments")

    @initialize(
        kind=KINDS, fields=SMALL_CLUSTERS, n=st.integers(1, 4), roles=st.sampled_from(ROLES), drawn=REQUESTS,
        failures=FAILURES, seed=st.integers(0, 99), scheduler=st.sampled_from(["sarathi", "vllm-v1"]),
    )  # fmt: skip
    def begin(self, kind, fields, n, roles, drawn, failures, seed, scheduler):
        n = len(roles) if kind == "split" else n
        more = {"roles": roles} if kind == "split" else {"prefix_caching": kind == "cached"}
        table = random_sessions(np.random.default_rng(seed)) if kind == "cached" else helpers.table(rows_from(drawn))
        self.made = {
            "rows": table,
            "devices": [DEVICES[(seed + j) % len(DEVICES)] for j in range(n)],
            "scheduler": scheduler,
            "num_replicas": n,
            "replica_failures": failures_of(failures, n),
            **more,
            **fields,
        }
        self.run, self.code, self.past = Replicas(**self.made), None, []

    @property
    def is_asked(self):
        return self.code == ROUTE and self.run.cluster.deciding() >= 0

    def go(self, count, router=None):
        """So many events, or until a decision is to be taken."""
        for _ in range(count):
            if self.code == OVER or self.is_asked:
                return
            self.run.router = router
            self.code = self.run.event()
            self.past.append(("event", router))

    def send(self, choice):
        legal = np.flatnonzero(self.run.cluster.view().legal)
        replica = int(legal[choice % len(legal)])
        self.run.send(replica)
        self.code = None
        self.past.append(("send", replica))

    @rule(count=st.integers(1, 40))
    def events(self, count):
        self.go(count)

    @precondition(lambda self: self.is_asked)
    @rule(choice=st.integers(0, 9), count=st.integers(0, 20))
    def route(self, choice, count):
        self.send(choice)
        self.go(count)

    @precondition(lambda self: self.is_asked)
    @rule(replica=st.sampled_from([-1, 9, None, "0", 0.5, True]))
    def route_wrongly(self, replica):
        before = taken(self.run.cluster)
        with one_line(PolicyError):
            check_replica("mine", replica, self.run.cluster.view().legal)
        assert taken(self.run.cluster) == before

    @precondition(lambda self: self.is_asked)
    @rule(name=st.sampled_from(["round-robin", "least-tokens", "prefix-affinity", "session"]))
    def look(self, name):
        """Whatever a compiled router is asked, it names a replica that may be sent the request."""
        saved, before = self.run.cluster.save(), taken(self.run.cluster)
        router = make_router(name)
        router.install(self.run.cluster.nodes, 0)
        self.run.router = router
        self.code = self.run.cluster.advance(0, router, to_the_end=True, max_events=1)
        self.run.clocks_s = check(self.run.cluster, 0, self.run.clocks_s)
        self.run.cluster.restore(saved)
        self.run.clocks_s = check(self.run.cluster)
        self.code = ROUTE
        assert taken(self.run.cluster) == before

    def future(self):
        """What comes of the present, requests sent in turn."""
        told = []
        for k in range(30):
            if self.code == OVER:
                break
            if self.is_asked:
                self.send(k)
            else:
                self.go(1)
            told.append(self.run.now_s)
        return told, taken(self.run.cluster)

    def put(self, saved, code, past):
        self.run.cluster.restore(saved)
        self.run.clocks_s = check(self.run.cluster)
        self.code, self.past = code, list(past)

    @rule(target=moments)
    def keep(self):
        here, now = (self.run.cluster.save(), self.code, list(self.past)), taken(self.run.cluster)
        future = self.future()
        self.put(*here)
        return here, now, future

    @rule(moment=moments)
    def go_back(self, moment):
        (saved, code, past), now, future = moment
        for _ in range(2):
            self.put(saved, code, past)
            assert taken(self.run.cluster) == now
        told, then = self.future()
        assert told == future[0] and then == future[1]
        self.put(saved, code, past)

    @rule()
    def copy(self):
        before = taken(self.run.cluster)
        self.run.cluster = pickle.loads(pickle.dumps(self.run.cluster))
        assert taken(self.run.cluster) == before

    @invariant()
    def counts_are_possible(self):
        if not hasattr(self, "run"):
            return
        rows, sims = self.run.requests, self.run.sims
        assert (sims["free_blocks"] >= 0).all() and (sims["free_blocks"] <= sims["total_blocks"]).all()
        assert (rows["num_cached_tokens"] >= 0).all()
        assert (rows["num_cached_tokens"] <= np.maximum(rows["prompt_tokens"] - 1, 0)).all()
        assert np.bincount(phases_of(self.run.cluster.state, 0, len(rows))).sum() == len(self.run.table)

    def teardown(self):
        """To the end; then all of it again in another cluster, which says the same."""
        if not hasattr(self, "run"):
            return
        for k in range(20_000):
            if self.code == OVER:
                break
            self.send(k) if self.is_asked else self.go(1)
        assert self.code == OVER, "no end"
        check_end(self.run)
        again = Replicas(**self.made)
        for what, value in self.past:
            again.send(value) if what == "send" else again.event()
        assert again.requests.tobytes() == self.run.requests.tobytes()
        assert again.sims.tobytes() == self.run.sims.tobytes()


TestCluster = ClusterMachine.TestCase
TestCluster.settings = sized(12, 16)
