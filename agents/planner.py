"""A planner that tries schedulers ahead: what deciding better than any one rule could still gain.

Every so many seconds of a run it tries each alternative from the engine's state on, held for that interval and followed
by `on-time` up to a horizon, and goes on with the one after which the requests that have come are worth most: the sum
of their utilities as they stand there, lateness so far included. Ties keep the first alternative, `on-time`. That is
one step of policy improvement with `on-time` as the base policy (rollouts: Tesauro and Galperin, NIPS 1996; Bertsekas,
Tsitsiklis and Wu, J. Heuristics 1997).

Informed, its rollouts have the true future, requests and noise. Uninformed, they have futures drawn from what a
scheduler may know (:mod:`~llmsched_gym.agents.futures`), the same ones for all alternatives of a decision, and the mean
over futures decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llmsched_gym.agents.futures import Futures
from llmsched_gym.config import ConfigError, Scenario
from llmsched_gym.engine import Engine
from llmsched_gym.engine.due import open_waits
from llmsched_gym.engine.records import ABANDONED, FINISHED, PENDING, REFUSED, REJECTED, RUNNING, WAITING
from llmsched_gym.engine.rows import rows_of
from llmsched_gym.engine.saved import Saved
from llmsched_gym.engine.utility import utility
from llmsched_gym.evaluation.outcomes import Outcomes, attains_tbt
from llmsched_gym.evaluation.run import Episode
from llmsched_gym.registry import make_scheduler
from llmsched_gym.scheduler import Compiled, install
from llmsched_gym.workload import RequestTable, make_table

BASE = "on-time"
"""Who follows an alternative in a rollout."""
ALTERNATIVES = (
    BASE,
    "on-time[cap=0.6]",
    "on-time[cap=0.95]",
    "on-time[budget=384]",
    "on-time[budget=1536]",
    "on-time[stretch=1.6]",
    "on-time[quiet=1000]",
    "on-time[mix=together]",
    "on-time[age=30]",
    "slai",
    "slai[order=feasible,hold=always]",
    "srpt-capped",
    "feasible-first[hold=always]",
    "sarathi[order=feasible,hold=always,cap=0.7,offset=15]",  # nearly tuned-constant, which is no kernel of its own
    "sarathi-spf[budget=1024]",
    "sarathi[order=edf]",
)
"""Schedulers that are tried, the base first."""
UNTOLD = ("batches", "items", "preempt", "refuse")
"""Of a saved lane, what the next decision writes anew."""


@dataclass(frozen=True)
class Plan:
    """How a planner looks ahead."""

    interval_s: float = 1.0  # simulated seconds between decisions
    horizon_s: float = 60.0  # simulated seconds of a rollout
    futures: int = 0  # drawn futures of a decision; 0: the true one
    margin: float = 0.0  # standard errors over futures by which the first must be beaten; 0: the mean decides
    alternatives: tuple[str, ...] = ALTERNATIVES  # the first follows all others in a rollout

    def __post_init__(self) -> None:
        for name in ("interval_s", "horizon_s"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: expected seconds > 0, got {getattr(self, name)!r}")
        if self.horizon_s < self.interval_s:
            raise ConfigError(f"horizon_s: expected interval_s ({self.interval_s:g}) or more, got {self.horizon_s:g}")
        if self.futures < 0:
            raise ConfigError(f"futures: expected 0 or more, got {self.futures}")
        if not 0.0 <= self.margin < math.inf:
            raise ConfigError(f"margin: expected standard errors >= 0, got {self.margin!r}")
        if self.margin > 0.0 and self.futures == 1:
            raise ConfigError("futures: expected two or more with a margin, got 1")


class Planned(NamedTuple):
    """A run under a planner."""

    episode: Episode
    chosen: tuple[int, ...]  # by decision, the alternative
    promised: tuple[float, ...]  # by decision, the best sum of utilities that it saw at the end of a rollout


def schedulers(names: Sequence[str]) -> list[Compiled]:
    """Alternatives by name; ConfigError for one that does not run in compiled loops or admits by another rule."""
    if not names:
        raise ConfigError("alternatives: expected one scheduler at least, got none")
    found = [make_scheduler(name) for name in names]
    for name, scheduler in zip(names, found, strict=True):
        if not isinstance(scheduler, Compiled) or scheduler.clairvoyant:
            raise ConfigError(f"alternatives: expected compiled schedulers that are told no lengths, got {name!r}")
        if scheduler.admission != found[0].admission:
            raise ConfigError(f"alternatives: expected the admission rule of {names[0]!r}, got {name!r}")
    return found


def standing(scenario: Scenario, requests: np.ndarray, clock_s: float) -> np.ndarray:
    """Utilities as they stand at `clock_s`, float64 of the shape of `requests`, REQUEST records; 0 of who has not come.

    As the environment pays them: a request has attained while its first token came in time and none was late since.
    """
    rows = requests.copy()
    phase, emitted = rows["phase"], rows["num_output_tokens"] > 0
    live = (phase == WAITING) | (phase == RUNNING)
    since_s, slo_s = open_waits(rows)
    late_s = np.where(live, np.maximum(clock_s - since_s - slo_s, 0.0), 0.0)
    overdue = emitted & (late_s > 0.0)
    rows["last_token_s"][overdue] = clock_s
    due_s = rows["arrival_s"] + rows["ttft_slo_s"] + rows["num_output_tokens"] * rows["tbt_slo_s"]
    rows["deadline_miss_s"][live] = np.maximum(rows["deadline_miss_s"], clock_s - due_s)[live]
    num_gaps = np.maximum(rows["num_output_tokens"] - 1, 0) + overdue
    in_time = attains_tbt(scenario.tbt_rule, rows, num_gaps, rows["num_late_gaps"] + overdue)
    attained = (live | (phase == FINISHED)) & emitted & (rows["ttft_missed"] == 0) & in_time
    lost = np.zeros(len(rows))
    if math.isfinite(scenario.patience_s):
        lost = np.minimum(1.0, (rows["lateness_s"] + late_s) / scenario.patience_s)
    lost[~(live | np.isin(phase, (FINISHED, ABANDONED)))] = 0.0
    lost[phase == REFUSED] = 1.0
    worth = utility(attained, lost, scenario.beta)
    worth[(phase == REJECTED) | (phase == PENDING)] = 0.0
    return np.asarray(worth)


def run_until(engine: Engine, scheduler: Compiled, until_s: float, env: int = 0) -> None:
    """Let `scheduler` decide up to the first end of a batch at or behind `until_s`, in one call of compiled code."""
    world = engine.state.worlds[env]
    stop_s = float(world.stop_s)
    world.stop_s = min(stop_s, until_s)
    engine.run(scheduler, env)
    engine.state.worlds[env].stop_s = stop_s


class Planner:
    """Looks ahead from an engine's state.

    Args:
        plan: how far and with whom.
        scenario, seed: the run's; drawn futures are a function of the seed and the number of the decision.
        num_steps: room for the log of batches, the run's.
    """

    def __init__(self, plan: Plan, scenario: Scenario, seed: int, num_steps: int = 0) -> None:
        self.plan, self.scenario = plan, scenario
        self.schedulers = schedulers(plan.alternatives)
        self._futures = Futures(scenario, seed, plan.futures, plan.horizon_s, num_steps) if plan.futures else None
        self._decision = 0

    def choose(self, engine: Engine) -> tuple[int, float]:
        """The alternative to go on with and the mean sum of utilities behind it; the engine is left as it was."""
        self._decision += 1
        if len(self.schedulers) == 1:
            return 0, math.nan
        state = engine.save()
        if self._futures is None:
            values = self._values(engine, state, 0)
            engine.restore(state)
        else:
            ahead = self._futures.draw(engine, state, self._decision)
            rolled = [self._values(self._futures.engine, future, env) for env, future in enumerate(ahead)]
            values = np.mean(rolled, axis=0)
        sure = values
        if self.plan.margin > 0.0 and self._futures is not None:
            gains = np.array(rolled) - np.array(rolled)[:, :1]
            sure = values - self.plan.margin * gains.std(axis=0, ddof=1) / math.sqrt(len(gains))
        best = int(np.argmax(sure > sure.max() - 1e-9))  # the first of those that only rounding tells apart
        return best, float(values[best])

    def _values(self, engine: Engine, state: Saved, env: int) -> np.ndarray:
        """Sums of utilities at the end of rollouts from `state` on, float64 (num_alternatives,).

        Alternatives whose intervals end alike have one rollout between them.
        """
        known: dict[int, float] = {}
        values = np.zeros(len(self.schedulers))
        for index, scheduler in enumerate(self.schedulers):
            engine.restore(state, env)
            start_s = float(engine.state.sims[env].clock_s)
            engine.state.worlds[env].drain_all = 0  # all rollouts end at one time
            install(scheduler, engine.state, env)
            run_until(engine, scheduler, start_s + self.plan.interval_s, env)
            base = self.schedulers[0]
            install(base, engine.state, env)
            key = _key(engine.save(env))
            if key not in known:
                run_until(engine, base, start_s + self.plan.horizon_s, env)
                sim, world = engine.state.sims[env], engine.state.worlds[env]
                requests = engine.state.requests[env, : int(world.num_requests)]
                known[key] = float(standing(self.scenario, requests, float(sim.clock_s)).sum())
            values[index] = known[key]
        return values


def _key(saved: Saved) -> int:
    """The same for states that go on alike."""
    lanes = tuple(taken for lane in saved.lanes for name, taken in lane.items() if name not in UNTOLD)
    return hash((lanes, tuple(saved.episode.values()), tuple(saved.begun.values())))


def run_planned(
    scenario: Scenario,
    plan: Plan,
    seed: int,
    *,
    table: RequestTable | None = None,
    num_steps: int = 0,
    told: Callable[[float], None] = lambda clock_s: None,
) -> Planned:
    """Run a planner on the requests of `seed`, or on `table`, to the end; the first `num_steps` batches are logged.

    `told` hears the clock after each interval. The episode has no gaps between tokens.
    """
    table = make_table(scenario, seed) if table is None else table
    engine = Engine(scenario, max(len(table), 1), num_steps=num_steps)
    engine.reset(table)
    planner = Planner(plan, scenario, seed, num_steps)
    chosen, promised = [], []
    while not engine.is_over():
        start_s = float(engine.state.sims[0].clock_s)
        best, value = planner.choose(engine)
        scheduler = planner.schedulers[best]
        install(scheduler, engine.state)
        run_until(engine, scheduler, start_s + plan.interval_s)
        chosen.append(best)
        promised.append(value)
        told(float(engine.state.sims[0].clock_s))
    state = engine.state
    episode = Episode(
        scenario=scenario,
        policy="planner",
        seed=seed,
        table=table,
        requests=rows_of(state, 0, table),
        gaps=state.gaps[0],
        steps=state.steps[0, : min(num_steps, int(state.sims[0].num_batches))],
        sim=state.sims[0],
        wall_time_s=0.0,
    )
    return Planned(episode, tuple(chosen), tuple(promised))


def mean_utility(episode: Episode) -> float:
    """Mean utility of the measured requests."""
    outcomes = Outcomes(episode)
    return float(outcomes.utility[outcomes.counts].mean())
