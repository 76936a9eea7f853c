"""What became of an episode's measured requests, as `llmsched evaluate` would say it: for training logs."""

from __future__ import annotations

import math

import numpy as np

from llmsched_gym.engine.records import ABANDONED, CANCELLED, FINISHED, REFUSED, REJECTED, RUNNING, WAITING, has_come
from llmsched_gym.engine.rows import phases_of
from llmsched_gym.engine.state import State
from llmsched_gym.workload import RequestTable

METRICS: dict[str, str] = {
    "attainment": "share of the measured requests that met all their SLOs; unfinished ones have not",
    "utility": "their mean utility so far: the return per request, before `reward_scale`",
    "ttft_p50_s": "median time to first token, seconds; without a first token it is infinite",
    "ttft_p99_s": "99th percentile of the same",
    "itl_p99_s": "99th percentile of the gaps between tokens, open ones at their length; needs `episode_metrics=True`",
    "lost": "share that was refused, rejected, or left, or was to follow somebody who was or did",
    "tokens_per_s": "tokens emitted per second of the episode",
}
"""Name and meaning of each figure; in `info` its key has the prefix ``episode_``."""


def episode_metrics(
    state: State, env: int, table: RequestTable, clock_s: float, tokens_emitted: int, *, has_gaps: bool
) -> dict[str, float]:
    """METRICS of environment `env` up to now, over the measured requests that have arrived; nan where there are none.

    Turns that were cancelled count among them, as misses, but have no time to first token.

    `has_gaps`: whether the engine records gaps between tokens.
    """
    requests = state.requests[env, table.cohort_start : table.cohort_stop]
    arrived = has_come(requests["phase"])
    num_cancelled = int(np.sum(phases_of(state, env, table.cohort_stop)[table.cohort_start :] == CANCELLED))
    requests, gap_start = requests[arrived], table.gap_start[table.cohort_start : table.cohort_stop][arrived]
    figures = dict.fromkeys(METRICS, math.nan)
    if clock_s > 0.0:
        figures["tokens_per_s"] = tokens_emitted / clock_s
    if len(requests) == 0:
        return figures
    phase = requests["phase"]
    ttft_s = np.where(requests["num_output_tokens"] > 0, requests["first_token_s"] - requests["arrival_s"], math.inf)
    counted = len(requests) + num_cancelled
    figures["attainment"] = int(((phase == FINISHED) & (requests["paid_attained"] > 0.0)).sum()) / counted
    figures["utility"] = float(requests["paid_utility"].sum() / counted)
    figures["ttft_p50_s"], figures["ttft_p99_s"] = _quantile(ttft_s, 0.5), _quantile(ttft_s, 0.99)
    figures["lost"] = (int(np.isin(phase, (REFUSED, REJECTED, ABANDONED)).sum()) + num_cancelled) / counted
    if has_gaps:
        figures["itl_p99_s"] = _quantile(_gaps_s(requests, gap_start, state.gaps[env], clock_s), 0.99)
    return figures


def _gaps_s(requests: np.ndarray, gap_start: np.ndarray, recorded: np.ndarray, clock_s: float) -> np.ndarray:
    """All gaps between tokens of these requests, float32 seconds; so are open ones, and those a client left in."""
    count = np.maximum(requests["num_output_tokens"].astype(np.int64) - 1, 0)
    first = np.repeat(gap_start - np.cumsum(count) + count, count)
    phase, served = requests["phase"], requests["num_output_tokens"] > 0
    pending = (phase == RUNNING) | (phase == WAITING)
    waits = served & (pending | (phase == ABANDONED))
    end_s = np.where(pending, clock_s, requests["resolved_s"])
    open_s = (end_s - requests["last_token_s"])[waits]
    return np.concatenate([recorded[first + np.arange(len(first))], open_s.astype(np.float32)])


def _quantile(values: np.ndarray, q: float) -> float:
    """The q-quantile, interpolated linearly; infinite where it falls among infinite values, nan of nothing."""
    if len(values) == 0:
        return math.nan
    position = q * (len(values) - 1)
    low, high = math.floor(position), math.ceil(position)
    part = np.partition(values, (low, high))
    below, above, share = float(part[low]), float(part[high]), position - low
    if share == 0.0:
        return below
    return below + share * (above - below) if math.isfinite(above) else above
