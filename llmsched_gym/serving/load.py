"""Offer a server the requests of a table: each at its time whatever became of others, turns of sessions behind answers.

The event loop's clock is the run's. The run ends, and what is under way is given up, when everybody of the cohort has
been answered or lost, or `drain_s` after the last of them came: the rule of the simulator.
"""

from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from llmsched_gym.config import SLO_CLASSES, Scenario
from llmsched_gym.serving.dialect import Dialect
from llmsched_gym.serving.prompts import Prompts
from llmsched_gym.serving.stream import Answer
from llmsched_gym.workload import RequestTable

if TYPE_CHECKING:
    from llmsched_gym.serving.client import Client

LEAD_S = 0.2  # from the start of a run to its time 0
AHEAD_S = 0.1  # how long before it is sent a request is put into words


@dataclass(eq=False)
class Run:
    """A run as its client saw it. Arrays have shape (num_requests,); times are seconds since its time 0."""

    table: RequestTable
    answers: list[Answer | None]  # None: never sent
    planned_s: np.ndarray  # when each was to be sent; nan for turns whose time has not come
    is_cancelled: np.ndarray  # bool: turns that never came, as somebody before them failed
    clock_s: float  # when the run ended
    start_s: float = 0.0  # its time 0 on the clock of its event loop
    counters: dict[str, Any] = field(default_factory=dict)  # what else was measured, columns of its row

    @property
    def late_s(self) -> np.ndarray:
        """How late each request that was sent was sent, (num_sent,)."""
        sent = [(a.sent_s, p) for a, p in zip(self.answers, self.planned_s.tolist(), strict=True) if a is not None]
        return np.array([sent_s - planned_s for sent_s, planned_s in sent], np.float64)


class Load:
    """One run against a server, see :func:`offer`."""

    def __init__(
        self, client: Client, dialect: Dialect, model: str, scenario: Scenario, table: RequestTable, prompts: Prompts
    ) -> None:
        self.client, self.dialect, self.model, self.scenario = client, dialect, model, scenario
        self.table, self.prompts = table, prompts
        n = len(table)
        self.answers: list[Answer | None] = [None] * n
        self.planned_s = np.full(n, np.nan)
        self.is_cancelled = np.zeros(n, np.bool_)
        self.turns: dict[int, list[int]] = {}
        if table.parent is not None:
            for r in np.flatnonzero(table.parent >= 0).tolist():
                self.turns.setdefault(int(table.parent[r]), []).append(r)
        self.left = table.cohort_stop - table.cohort_start
        self.tasks: set[asyncio.Task] = set()
        self.timers: dict[int, asyncio.TimerHandle] = {}  # of requests to come
        self.send_slos = False
        self.resolved: Callable[[int, int], None] | None = None  # called with the number resolved and of all to resolve

    async def run(self) -> Run:
        """Offer the load to its end."""
        self.loop = asyncio.get_running_loop()
        self.over = asyncio.Event()
        self.start_s = self.loop.time() + LEAD_S
        for r in np.flatnonzero(self.table.is_root).tolist():
            self._plan(r, float(self.table.arrival_s[r]))
        stop_s = self.table.last_root_s + self.table.longest_session_s + self.scenario.drain_s
        if not self.left:
            self.over.set()
        # no pause of the collector shall be taken for the server's
        gc.collect()
        gc.freeze()
        try:
            async with asyncio.timeout_at(self.start_s + stop_s if stop_s < math.inf else None):
                await self.over.wait()
        except TimeoutError:
            pass
        finally:
            gc.unfreeze()
            for timer in self.timers.values():
                timer.cancel()
            for task in self.tasks:
                task.cancel()
            failed = await asyncio.gather(*self.tasks, return_exceptions=True)
        clock_s = self.loop.time() - self.start_s
        for error in failed:
            if isinstance(error, Exception):
                raise error
        for answer in filter(None, self.answers):
            answer.sent_s -= self.start_s
            answer.ended_s -= self.start_s
            answer.chunk_s = [time_s - self.start_s for time_s in answer.chunk_s]
        return Run(self.table, self.answers, self.planned_s, self.is_cancelled, clock_s, self.start_s)

    def _plan(self, r: int, due_s: float) -> None:
        self.planned_s[r] = due_s
        self.timers[r] = self.loop.call_at(self.start_s + due_s - AHEAD_S, self._prepare, r)

    def _prepare(self, r: int) -> None:
        table, more = self.table, {}
        if self.send_slos:
            slos: dict[str, Any] = {"slo_class": SLO_CLASSES[int(table.slo_class[r])]}
            for name in ("ttft_slo_s", "tbt_slo_s"):
                if math.isfinite(getattr(table, name)[r]):
                    slos[name] = float(getattr(table, name)[r])
            more["vllm_xargs"] = slos
        body = self.dialect.body(self.model, self.prompts.of(r), int(table.output_tokens[r]), **more)
        self.timers[r] = self.loop.call_at(self.start_s + self.planned_s[r], self._send, r, body)

    def _send(self, r: int, body: bytes) -> None:
        del self.timers[r]
        task = self.loop.create_task(self._serve(r, body))
        self.tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.tasks.add(task)  # an error of ours ends the run, which raises it
            self.over.set()

    async def _serve(self, r: int, body: bytes) -> None:
        table, answer = self.table, Answer()
        self.answers[r] = answer
        slos = {name: float(getattr(table, name)[r]) for name in ("ttft_slo_s", "tbt_slo_s")}
        await self.client.ask(body, answer, patience_s=float(self.scenario.patience_s), **slos)
        answer.settle(int(table.output_tokens[r]))
        self.prompts.answered(r, answer.token_ids)
        if answer.reason or answer.is_abandoned:
            self._cancel_turns(r)
        else:
            for turn in self.turns.get(r, ()):
                self._plan(turn, answer.last_s - self.start_s + float(table.think_s[turn]))  # type: ignore[index]
        self._count(r)

    def _cancel_turns(self, r: int) -> None:
        """Cancel all who come behind `r`: none of them has been planned."""
        lost = list(self.turns.get(r, ()))
        while lost:
            turn = lost.pop()
            self.is_cancelled[turn] = True
            self._count(turn)
            lost += self.turns.get(turn, ())

    def _count(self, r: int) -> None:
        if not self.table.cohort_start <= r < self.table.cohort_stop:
            return
        self.left -= 1
        if self.resolved is not None:
            total = self.table.cohort_stop - self.table.cohort_start
            self.resolved(total - self.left, total)
        if self.left == 0:
            self.over.set()


async def offer(
    client: Client,
    dialect: Dialect,
    model: str,
    scenario: Scenario,
    table: RequestTable,
    *,
    seed: int,
    nonce: int,
    send_slos: bool = False,
    resolved: Callable[[int, int], None] | None = None,
) -> Run:
    """Send the requests of `table` to the server and note what becomes of each.

    `nonce` makes the contents of prompts the run's own, see `Prompts`; with `send_slos` each request tells its SLOs in
    ``vllm_xargs``. `resolved` is called with how many of the cohort are answered or lost, and how many there are.
    """
    load = Load(client, dialect, model, scenario, table, Prompts(table, dialect, seed, nonce))
    load.send_slos, load.resolved = send_slos, resolved
    return await load.run()
