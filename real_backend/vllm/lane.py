"""The lane of a live server: what schedulers see in the gym, kept up to date request by request.

Rows are given to requests as they come and taken back as they go, in turn around a table that grows when it is full, so
that a server that runs for weeks needs as much memory as it has requests at a time. Nothing is rebuilt in between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from llmsched_gym.config import Scenario
from llmsched_gym.cost import Profile
from llmsched_gym.engine import Engine
from llmsched_gym.engine.load import append_request
from llmsched_gym.engine.records import PENDING, RUNNING, WAITING
from llmsched_gym.real_backend.vllm import lane_kernels as kernels
from llmsched_gym.real_backend.vllm.lane_kernels import FIRST_S, MAX_GAP_S, NUM_GAPS, NUM_LATE, NUM_SERVED
from llmsched_gym.scheduler import install
from llmsched_gym.workload import Request, RequestTable

VLLM_BUDGET = 3  # its place among the coefficients of a profile, see scheduler.BY_DEVICE
NEVER_S = 1e300


class Formed(NamedTuple):
    """A batch that the lane has applied to itself, by rows."""

    rows: list[int]
    tokens: list[int]
    admitted: list[int]  # of `rows`, in order
    preempted: list[int]  # before it, the one whose turn comes last first
    refused: list[int]
    num_deferred: int  # running ones that get nothing


class Booked(NamedTuple):
    """A batch that has been booked, to be put right when its end is known."""

    emitted: np.ndarray  # (count,) int32, rows that got a token
    born: np.ndarray  # (count,) int64, whose rows they were
    start_s: float
    end_s: float  # booked so


@dataclass(frozen=True)
class Served:
    """What a request got, by measured times."""

    ttft_s: float  # nan without a token
    max_gap_s: float  # 0 below two tokens
    num_gaps: int
    num_late: int  # gaps above its TBT SLO
    ttft_slo_s: float
    tbt_slo_s: float
    slo_class: int

    @property
    def attained(self) -> bool:
        """Whether the first token and every gap were in time."""
        return self.ttft_s <= self.ttft_slo_s and self.num_late == 0


class Lane:
    """One engine's lane under a scheduler.

    Args:
        scenario: limits of the server; `num_kv_blocks` and `max_num_seqs` are named.
        profile: what the scheduler believes batches to cost.
        scheduler: a compiled or a Python scheduler, or one that decides on an engine.
        capacity: requests at a time before the tables grow.
    """

    def __init__(self, scenario: Scenario, profile: Profile, scheduler: Any, capacity: int = 1024) -> None:
        self.scheduler = scheduler
        self.engine = Engine(scenario, capacity, profile=profile)
        self.engine.reset(RequestTable.of([NEVER_S], [1], [1]))
        self._take_table_away()
        most = self.engine.state.running.shape[1]
        self._formed = np.zeros((3, most), np.int32)
        self._emitted = np.zeros(most, np.int32)
        self.births = np.zeros(capacity, np.int64)  # which of all requests a row has; 0 for none
        self.served = np.zeros((capacity, NUM_SERVED))
        self.num_born = 0
        self._last = -1
        compiled = getattr(scheduler, "kernel", None)
        self._decide = None if compiled is None or hasattr(scheduler, "decide") else kernels.make_decider(compiled)
        state = self.engine.state
        state.own_coef_s[:, VLLM_BUDGET] = scenario.max_num_batched_tokens
        install(scheduler, state)
        state.sims[0].decision_s = 0.0  # it is in what is measured

    def _take_table_away(self) -> None:
        world = self.engine.state.worlds[0]
        world.num_requests = self.engine.state.requests.shape[1]
        world.table_size = world.next_arrival = 0
        world.next_arrival_s = math.inf
        world.cohort_start = world.cohort_stop = -1

    @property
    def sim(self) -> Any:
        """The replica's record."""
        return self.engine.state.sims[0]

    def work(self) -> tuple[int, float, float]:
        """Tokens, query-key pairs and KV tokens of the batch in hand."""
        found: tuple[int, float, float] = kernels.work_of(self.engine.handle, 0)
        return found

    def _free_row(self) -> int:
        births = self.births
        if np.count_nonzero(births) == len(births):
            self._grow(2 * len(births))
            births = self.births
        r = self._last
        for _ in range(len(births)):
            r = (r + 1) % len(births)
            if births[r] == 0:
                break
        self._last = r
        return r

    def _grow(self, capacity: int) -> None:
        old = len(self.births)
        self.engine.reserve(capacity)
        self.engine.state.worlds[0].num_requests = self.engine.state.requests.shape[1]
        births, served = np.zeros(capacity, np.int64), np.zeros((capacity, NUM_SERVED))
        births[:old], served[:old] = self.births, self.served
        self.births, self.served = births, served

    def add(self, request: Request, arrival_s: float, computed: int = 0) -> int:
        """A request joins the line, `computed` tokens of its prompt lying in a cache; returns its row.

        Of `output_tokens` it is known that it is the most that will come.
        """
        r = self._free_row()
        state = self.engine.state
        state.worlds[0].num_requests = r
        append_request(state, 0, request, arrival_s)
        state.worlds[0].num_requests = state.requests.shape[1]
        state.arrivals[0, r].max_output_tokens = request.output_tokens
        handle = self.engine.handle
        kernels.forget(handle, 0, self.served, r)
        kernels.arrive(handle, 0, r)
        state.requests[0, r].num_computed_tokens = computed
        self.num_born += 1
        self.births[r] = self.num_born
        return r

    def begin(self, now_s: float, free_blocks: int, most_seqs: int, server_running: int, most_tokens: int) -> None:
        """A step begins at `now_s`: the clock, and what the server can give; see ``begin`` of the kernels."""
        kernels.begin(self.engine.handle, 0, now_s, free_blocks, most_seqs, server_running, most_tokens)

    def form(self) -> Formed:
        """Let the scheduler decide, and apply its batch."""
        engine = self.engine
        if self._decide is not None:
            self._decide(engine.handle, 0)
        else:
            engine.decide(self.scheduler)
        state, formed = engine.state, self._formed
        count, admitted, preempted, refused, running = kernels.apply_live(engine.handle, 0, formed)
        rows, tokens = formed[:2, :count].tolist()
        return Formed(
            rows,
            tokens,
            state.running[0, running - admitted : running].tolist() if admitted else [],
            self._preempted(preempted) if preempted else [],
            state.refuse[0, :refused].tolist() if refused else [],
            running - count,
        )

    def _preempted(self, count: int) -> list[int]:
        """Who was preempted, so that preempting them one by one leaves the line as it is."""
        places = self.engine.state.requests[0]["place"]
        rows: list[int] = self._formed[kernels.PREEMPTED, :count].tolist()
        return sorted(rows, key=lambda r: -places[r])

    def clear(self) -> None:
        """Nothing of the batch in hand runs; admissions stand."""
        kernels.clear_live(self.engine.handle, 0)

    def take_back(self, r: int) -> None:
        """`r` was not admitted after all."""
        kernels.take_back(self.engine.handle, 0, r)

    def rebook(self, rows: list[int], computed: list[int], tokens: list[int]) -> None:
        """The batch that runs is this one, whatever was formed; waiting ones among it are admitted."""
        kernels.rebook(self.engine.handle, 0, np.array([rows, computed, tokens], np.int32).reshape(3, -1), len(rows))

    def expected_s(self) -> float:
        """Seconds that the applied batch is expected to take, as batches have lately taken against predictions."""
        return float(kernels.expect(self.engine.handle, 0))

    def book(self, start_s: float, end_s: float) -> Booked:
        """The applied batch, whose step began at `start_s`, ends at `end_s`: its tokens are there."""
        count, booked_s = kernels.commit_live(self.engine.handle, 0, end_s - start_s, self._emitted)
        emitted = self._emitted[:count].copy()
        return Booked(emitted, self.births[emitted], start_s, float(booked_s))

    def observe(self, booked: Booked, end_s: float | None = None) -> None:
        """A booked batch ended at `end_s`; None: when it was booked to."""
        emitted, end_s = booked.emitted, booked.end_s if end_s is None else end_s
        handle, at = self.engine.handle, (len(emitted), end_s, booked.end_s, booked.start_s)
        kernels.observe(handle, 0, self.served, emitted, booked.born, self.births, *at)

    def preempt(self, r: int) -> None:
        """The server has preempted `r` by itself."""
        if self.phase(r) == RUNNING:
            kernels.preempt_live(self.engine.handle, 0, r)

    def leave(self, r: int, finished: bool) -> Served:
        """`r` is gone, and its row free; what it got."""
        kernels.leave(self.engine.handle, 0, r, finished)
        row, request = self.served[r], self.engine.state.requests[0, r]
        served = Served(
            float(row[FIRST_S] - request.arrival_s),
            float(row[MAX_GAP_S]),
            int(row[NUM_GAPS]),
            int(row[NUM_LATE]),
            float(request.ttft_slo_s),
            float(request.tbt_slo_s),
            int(request.slo_class),
        )
        kernels.forget(self.engine.handle, 0, self.served, r)
        self.births[r] = 0
        return served

    def phase(self, r: int) -> int:
        """Phase of row `r`, see engine.records; PENDING if nobody has it."""
        return int(self.engine.state.requests[0, r].phase)

    def is_waiting(self, r: int) -> bool:
        """Whether row `r` waits."""
        return self.phase(r) == WAITING

    @property
    def num_rows(self) -> int:
        """Rows of the tables."""
        return len(self.births)

    @property
    def num_live(self) -> int:
        """Rows that requests have."""
        return int(np.count_nonzero(self.engine.state.requests[0]["phase"] != PENDING))
