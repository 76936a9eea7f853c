"""The request table of an episode whose requests come in sessions."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np

from llmsched_gym.config import Scenario
from llmsched_gym.workload.arrivals import (
    Arrivals,
    ReplayArrivals,
    arrivals_until,
    first_guess,
    measured_arrivals,
)
from llmsched_gym.workload.identity import shares_of_turns
from llmsched_gym.workload.sessions import DrawsSessions, Sessions, SessionStream, join
from llmsched_gym.workload.streams import (
    COST_SCALE,
    PAST_GAP_STREAM,
    PAST_SESSION_STREAM,
    STRICT_SHARE,
    rng,
    uniform,
)
from llmsched_gym.workload.table import RequestTable
from llmsched_gym.workload.trace_sessions import TraceSessions

Past = tuple[np.ndarray, Sessions]
"""Arrivals of what is over, float64 below 0, not decreasing; and as sessions of one turn each."""


MOST_BEFORE = 1_000_000
"""Sessions of a trace that are looked at, back from time 0, for whether they are still under way."""

Coming = tuple[np.ndarray, Sessions]
"""When sessions come or go on, float64, >= 0, and what is to come of them."""


class Stream(Protocol):
    """An endless stream of sessions; a longer call repeats a shorter one exactly."""

    def first(self, n: int) -> Sessions:
        """The first n sessions."""
        ...


def make_session_table(
    scenario: Scenario,
    stream: Stream,
    seed: int,
    episode: np.ndarray,
    arrivals: Arrivals,
    kind: str,
    drain_s: float,
    mid_life: tuple[Past, Coming] | None = None,
) -> RequestTable:
    """The sessions of one episode, whose first requests arrive by `arrivals`; `episode` are its draws.

    A finite run measures the turns of the sessions that begin at or after `warmup_s`, until they are `num_requests` or
    more, and sessions go on to begin for `drain_s`. A continuing one measures all that comes, without backlog;
    `mid_life` are sessions that began before it, see `in_mid_life`.
    """
    past = None
    if scenario.num_requests is None:
        root_s = arrivals_until(arrivals, float(scenario.horizon_s))
        sessions = stream.first(len(root_s))
        if mid_life is not None:
            past, (old_s, old) = mid_life
            root_s, sessions = np.concatenate([old_s, root_s]), join([old, sessions])
        order = np.argsort(root_s, kind="stable")
        root_s, sessions = root_s[order], sessions.select(order)
        name = order  # sessions in mid-life are called after what is past of them
        start, stop = 0, len(root_s)
    else:
        _, start, _ = measured_arrivals(arrivals, float(scenario.warmup_s), 1, 0.0)
        num_measured = _sessions_for(stream, start, scenario.num_requests)
        root_s, start, stop = measured_arrivals(arrivals, float(scenario.warmup_s), num_measured, drain_s)
        sessions, name = stream.first(len(root_s)), np.arange(len(root_s))
    return _table(scenario, seed, episode, sessions, root_s, name, (start, stop), past, arrivals.qps, kind)


def _sessions_for(stream: Stream, start: int, num_requests: int) -> int:
    """How many sessions from `start` on have `num_requests` turns."""
    n = start + first_guess(num_requests / 4)
    while True:
        turns = np.cumsum(stream.first(n).num_turns[start:])
        if turns[-1] >= num_requests:
            return int(np.searchsorted(turns, num_requests, "left")) + 1
        n = start + 2 * (n - start)


def drawn_in_mid_life(scenario: Scenario, model: DrawsSessions, seed: int, qps: float) -> tuple[Past, Coming]:
    """Sessions of a workload in mid-life, see `in_mid_life`.

    They began at the times of a Poisson process of the episode's mean rate, whatever its arrivals.
    """
    longest_s = max(
        part.max_turns
        * (
            _nominal_s(scenario, float(max(part.first_tokens.high, part.new_tokens.high)), part.output_tokens.high)
            + part.think_s.high
        )
        for part in model.parts
    )
    n = first_guess(qps * longest_s)
    began_s = -np.cumsum(rng(seed, PAST_GAP_STREAM).standard_exponential(n)) / qps
    sessions = SessionStream(model, rng(seed, PAST_SESSION_STREAM), scenario.max_model_len).first(n)
    return in_mid_life(scenario, began_s, sessions)


def traced_in_mid_life(scenario: Scenario, stream: TraceSessions, seed: int, arrivals: Arrivals) -> tuple[Past, Coming]:
    """Sessions of a trace in mid-life, see `in_mid_life`: of kept times those of the rows before the first.

    With drawn arrivals they are random ones of the file and began at the times of a Poisson process. Of those that
    began more than `MOST_BEFORE` sessions ago none is left.
    """
    everyone = stream.everyone
    last = np.cumsum(everyone.num_turns) - 1
    lives_s = _since_s(scenario, everyone)[last]
    n = first_guess(min(arrivals.qps * float(lives_s.max()), MOST_BEFORE))
    draws = rng(seed, PAST_SESSION_STREAM).random((n, 3))
    if isinstance(arrivals, ReplayArrivals):
        began_s, rows = arrivals.before(n), (arrivals.first - 1 - np.arange(n)) % len(everyone)
    else:
        began_s = -np.cumsum(rng(seed, PAST_GAP_STREAM).standard_exponential(n)) / arrivals.qps
        rows = stream.random_rows(draws)
    lives = began_s + lives_s[rows] >= 0.0
    hints = rng(seed, PAST_SESSION_STREAM, 1)
    return in_mid_life(scenario, began_s[lives], stream.sessions(rows[lives], draws[lives], hints))


def _since_s(scenario: Scenario, sessions: Sessions) -> np.ndarray:
    """When each turn comes by the nominal timetable, seconds since its session began."""
    lasts_s = _nominal_s(scenario, sessions.new_tokens, sessions.output_tokens)
    # a turn comes after all that the session's turns before it took
    since_s = np.cumsum(sessions.think_s + lasts_s) - lasts_s
    return np.asarray(since_s - since_s[sessions.first][sessions.session])


def in_mid_life(scenario: Scenario, began_s: np.ndarray, sessions: Sessions) -> tuple[Past, Coming]:
    """Of sessions that began before time 0 those that are not over: what is past, and when and how each goes on.

    They went on by a nominal timetable: a turn takes half its TTFT SLO and half the strict TBT SLO for every further
    token. Whatever came before 0 is over by then; of each session its last such turn is left, whose context has all
    those before it. A session is over with a turn that the model is too short for.
    """
    first, of = sessions.first, sessions.session
    came_s = began_s[of] + _since_s(scenario, sessions)
    is_over = came_s < 0.0
    over, too_long = np.zeros((2, len(first)), np.int64)
    if len(first):
        longer = sessions.prompt_tokens + sessions.output_tokens > scenario.max_model_len
        over, too_long = (np.add.reduceat(np.asarray(what, np.int64), first) for what in (is_over, is_over & longer))
    lives = np.flatnonzero((over < sessions.num_turns) & (too_long == 0))
    sessions, last, over = sessions.select(lives), first[lives] + over[lives] - 1, over[lives]
    last_s, next_s = came_s[last], came_s[last + 1]

    order = np.argsort(last_s, kind="stable")
    sessions, over = sessions.select(order), over[order]
    gone = sessions.behind(over - 1).heads()
    return (last_s[order], gone), (next_s[order], sessions.behind(over))


def _nominal_s(scenario: Scenario, new_tokens: Any, output_tokens: Any) -> Any:
    """How long a turn takes by the nominal timetable, seconds."""
    ttft_slo_s = scenario.ttft_slo_s + scenario.ttft_slo_per_token_s * new_tokens
    return 0.5 * ttft_slo_s + 0.5 * scenario.strict_tbt_slo_s * (output_tokens - 1)


def _table(
    scenario: Scenario,
    seed: int,
    episode: np.ndarray,
    sessions: Sessions,
    root_s: np.ndarray,
    name: np.ndarray,
    cohort: tuple[int, int],
    past: Past | None,
    qps: float,
    kind: str,
) -> RequestTable:
    num_past = 0 if past is None else len(past[0])
    if past is not None:
        sessions = join([past[1], sessions])
        root_s, name = np.concatenate([past[0], root_s]), np.concatenate([np.arange(num_past), name])
    of, first = sessions.session, sessions.first
    n = len(of)
    is_root = np.zeros(n, np.bool_)
    is_root[first] = True
    parent = np.where(is_root, -1, np.arange(n) - 1).astype(np.int32)
    arrival_s = np.full(n, np.nan)
    arrival_s[first] = root_s
    # to share with, the past is the parent of what goes on
    before = parent.copy()
    goes_on = np.flatnonzero(name[num_past:] < num_past) + num_past
    before[first[goes_on]] = name[goes_on]
    prefix_id, prefix_tokens = sessions.prefix_id[of], sessions.prefix_tokens[of]
    goes_before = before >= 0
    shares_with, shared_tokens = shares_of_turns(
        np.full(n, -1),
        *(sessions.new_tokens, sessions.prompt_tokens, sessions.output_tokens),
        *(np.where(goes_before, -1, prefix_id), prefix_tokens),
    )
    shared_tokens[goes_before] = (sessions.prompt_tokens - sessions.new_tokens)[goes_before]
    shares_with[goes_before] = np.where(shared_tokens > 0, before, -1)[goes_before]

    relaxed = (sessions.slo_draw >= uniform(scenario.strict_share, episode[STRICT_SHARE]))[of]
    scales = np.asarray(scenario.ttft_class_scales, float)
    scale = scales[(sessions.ttft_draw * len(scales)).astype(np.int64)][of]
    ends = np.append(first, n)
    return RequestTable(
        arrival_s=arrival_s,
        prompt_tokens=sessions.prompt_tokens,
        output_tokens=sessions.output_tokens,
        slo_class=relaxed.astype(np.int8),
        ttft_slo_s=scale * (scenario.ttft_slo_s + scenario.ttft_slo_per_token_s * sessions.new_tokens),
        tbt_slo_s=np.where(relaxed, float(scenario.relaxed_tbt_slo_s), float(scenario.strict_tbt_slo_s)),
        length_hint=_length_hint(scenario.hint_sigma, sessions),
        session_id=name[of].astype(np.int64),
        cohort_start=int(ends[cohort[0] + num_past]),
        cohort_stop=int(ends[cohort[1] + num_past]),
        qps=qps,
        cost_scale=uniform(scenario.cost_scale, episode[COST_SCALE]),
        seed=seed,
        arrivals=kind,
        shares_with=shares_with,
        shared_tokens=shared_tokens,
        parent=parent,
        think_s=np.where(is_root, 0.0, sessions.think_s),
        new_tokens=sessions.new_tokens,
        prefix_id=prefix_id,
        prefix_tokens=prefix_tokens,
        max_output_tokens=sessions.max_output_tokens,
        num_past=num_past,
    )


def _length_hint(sigma: float | None, sessions: Sessions) -> np.ndarray:
    if sigma is None:
        return np.full(len(sessions.output_tokens), math.nan)
    if sigma == 0.0:
        return sessions.output_tokens.astype(np.float64)
    return np.asarray(sessions.output_tokens * np.exp(sigma * sessions.hint_draw))
