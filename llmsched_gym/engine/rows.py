"""The records of an episode's requests as Python reads them: with those of requests that have not arrived."""

from __future__ import annotations

import numpy as np

from llmsched_gym.engine.load import TABLE_COLUMNS
from llmsched_gym.engine.records import CANCELLED, PENDING
from llmsched_gym.engine.state import State
from llmsched_gym.workload import RequestTable


def phases_of(state: State, env: int, count: int) -> np.ndarray:
    """Phases of the first `count` requests, CANCELLED for turns that will never come; int8 of shape (count,)."""
    cancelled = state.arrivals[env]["is_cancelled"][:count] != 0
    return np.where(cancelled, np.int8(CANCELLED), state.requests[env]["phase"][:count])


def rows_of(state: State, env: int, table: RequestTable) -> np.ndarray:
    """Copies of the records of the requests of `table`, those to come included; shape (num_requests,) REQUEST."""
    rows = state.requests[env, : len(table)].copy()
    to_come = rows["phase"] == PENDING
    for name in TABLE_COLUMNS:
        rows[name][to_come] = getattr(table, name)[to_come]
    rows["prefill_tokens"][to_come] = rows["prompt_tokens"][to_come]
    rows["phase"] = phases_of(state, env, len(table))
    return rows
