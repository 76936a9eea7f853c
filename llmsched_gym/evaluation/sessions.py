"""What a run's sessions and its prefix cache came to: columns of rows and of the frame of requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llmsched_gym.engine.records import FINISHED
from llmsched_gym.evaluation.gaps import percentile
from llmsched_gym.evaluation.run import Episode

if TYPE_CHECKING:
    import pandas as pd


def cache_figures(episode: Episode) -> dict[str, float | int | None]:
    """What the cohort's prompts found in the prefix cache, and what was left to compute, tokens.

    Of requests that were scheduled, at their first admission: cached and computed tokens add up to their prompts.
    What they found when they came back after a preemption is apart. Without prefix caching there is nothing to find.
    """
    requests = episode.requests[episode.cohort]
    admitted = requests[~np.isnan(requests["first_scheduled_s"])]
    prompts, cached = (int(admitted[name].sum(dtype=np.int64)) for name in ("prompt_tokens", "num_cached_tokens"))
    again = episode.recached_tokens
    return {
        "prefix_hit_rate": cached / prompts if again is not None and prompts else None,
        "num_cached_tokens": None if again is None else cached,
        "num_recached_tokens": None if again is None else int(again[episode.cohort].sum(dtype=np.int64)),
        "computed_tokens": prompts - cached,
    }


def session_figures(episode: Episode, attained: np.ndarray) -> dict[str, float | int | None]:
    """How many sessions of the cohort were on time, every turn of them, and how long those took that were finished.

    `attained` is bool (num_requests of the cohort,). A session takes from the arrival of its first request to the last
    token of the last one, times to think included. All are None where requests do not come in sessions.
    """
    figures: dict[str, Any] = dict.fromkeys(("num_sessions", "session_on_time", "session_p50_s", "session_p99_s"))
    if episode.table.parent is None:
        return figures
    requests, first = episode.requests[episode.cohort], np.flatnonzero(episode.table.is_root[episode.cohort])
    figures["num_sessions"] = len(first)
    if len(first):
        on_time = np.logical_and.reduceat(attained, first)
        finished = np.logical_and.reduceat(requests["phase"] == FINISHED, first)
        lasted_s = np.maximum.reduceat(requests["resolved_s"], first) - requests["arrival_s"][first]
        figures["session_on_time"] = float(on_time.mean())
        figures["session_p50_s"] = percentile(lasted_s[finished], 0.5)
        figures["session_p99_s"] = percentile(lasted_s[finished], 0.99)
    return figures


def turn_columns(episode: Episode) -> dict[str, pd.Series]:
    """Columns of the frame of requests; missing (NA) where requests do not come in sessions, or nothing is cached.

    `session` is the index of a session's first request, `turn` how many turns lead to this one.
    """
    import pandas as pd

    table, cohort = episode.table, episode.cohort

    def column(values: np.ndarray | None) -> pd.Series:
        if values is None:
            return pd.Series(pd.array([pd.NA] * (cohort.stop - cohort.start), dtype="Int32"))
        return pd.Series(pd.array(values[cohort].astype(np.int32), dtype="Int32"))

    session = turn = None
    if table.parent is not None:
        session = np.flatnonzero(table.is_root)[np.cumsum(table.is_root) - 1]
        turn = np.zeros(len(table), np.int32)
        for r in np.flatnonzero(~table.is_root).tolist():  # parents stand before their turns
            turn[r] = turn[table.parent[r]] + 1
    cached = None
    if episode.recached_tokens is not None:
        cached = pd.array(episode.requests["num_cached_tokens"][cohort], dtype="Int32")
        cached[np.isnan(episode.requests["first_scheduled_s"][cohort])] = pd.NA
    return {
        "session": column(session),
        "turn": column(turn),
        "new_tokens": column(table.new_tokens),
        "num_cached_tokens": column(None) if cached is None else pd.Series(cached),
    }
