"""A run against a server as an episode, so that its row, its frames and its report are those of `evaluate`.

A request's arrival is when it was sent. What only an engine knows (batches, memory, preemptions, waits for admission)
is missing. Failed requests have the phase rejected, or refused where the server said that it has too much to do.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from llmsched_gym.config import Scenario
from llmsched_gym.engine.load import TO_COME
from llmsched_gym.engine.records import (
    ABANDONED,
    CANCELLED,
    FINISHED,
    PENDING,
    REFUSED,
    REJECTED,
    REPLICA,
    REQUEST,
    RUNNING,
    WAITING,
)
from llmsched_gym.evaluation.gaps import percentile
from llmsched_gym.evaluation.metrics import gaps_of, requests_frame, row
from llmsched_gym.evaluation.outcomes import Outcomes
from llmsched_gym.evaluation.run import Episode
from llmsched_gym.serving.load import Run
from llmsched_gym.serving.stream import COUNTED_BY, Answer
from llmsched_gym.workload import RequestTable

if TYPE_CHECKING:
    import pandas as pd

TOO_MUCH_TO_DO = (429, 503)
"""HTTP statuses of a server that refuses a request for now."""

UNKNOWN = (
    *("kv_cache_usage_max", "num_preemptions", "iterations", "mean_batch_s", "mean_batch_tokens"),
    *("num_cached_tokens", "num_recached_tokens", "computed_tokens", "prefix_hit_rate", "profile", "cost_scale"),
)
"""Columns of a row that no client can tell."""

_TABLE_COLUMNS = ("prompt_tokens", "slo_class", "ttft_slo_s", "tbt_slo_s", "length_hint", "session_id")


def phase_of(answer: Answer | None, is_cancelled: bool) -> int:
    """The phase in which a request of a run that is over was left."""
    if answer is None:
        return CANCELLED if is_cancelled else PENDING
    if answer.is_abandoned:
        return ABANDONED
    if answer.reason:
        return REFUSED if answer.status in TOO_MUCH_TO_DO else REJECTED
    if np.isnan(answer.ended_s):
        return RUNNING if answer.counts else WAITING
    return FINISHED


def token_times(answer: Answer) -> np.ndarray:
    """When each token came, float64 (num_tokens,): those of a chunk together."""
    return np.repeat(np.asarray(answer.chunk_s, np.float64), np.asarray(answer.counts, np.int64))


def episode_of(run: Run, scenario: Scenario, label: str, seed: int) -> Episode:
    """The run as records of requests and gaps between tokens."""
    table, n = run.table, len(run.table)
    records = np.full(n, TO_COME, REQUEST)
    for name in _TABLE_COLUMNS:
        records[name] = getattr(table, name)
    records["prefill_tokens"] = table.prompt_tokens
    records["arrival_s"] = table.arrival_s
    gap_start = table.gap_start
    gaps = np.zeros(int(np.sum(table.output_tokens, dtype=np.int64) - n), np.float32)
    for r, answer in enumerate(run.answers):
        records["phase"][r] = phase = phase_of(answer, bool(run.is_cancelled[r]))
        if answer is None:
            continue
        times_s = token_times(answer)[: int(table.output_tokens[r])]
        own = _record(answer, times_s, phase, table, r)
        own["lateness_s"] = min(answer.lateness_s, scenario.patience_s)
        for name, value in own.items():
            records[name][r] = value
        if len(times_s) > 1:
            gaps[gap_start[r] : gap_start[r] + len(times_s) - 1] = np.diff(times_s)
    sim = np.zeros(1, REPLICA)[0]
    sim["clock_s"] = run.clock_s
    return Episode(
        scenario=scenario,
        policy=label,
        seed=seed,
        table=table,
        requests=records,
        gaps=gaps,
        steps=np.zeros(0),
        sim=sim,
        wall_time_s=run.clock_s,
    )


def _record(answer: Answer, times_s: np.ndarray, phase: int, table: RequestTable, r: int) -> dict[str, Any]:
    """What a request's record says of its answer."""
    own: dict[str, Any] = {"arrival_s": answer.sent_s, "num_output_tokens": len(times_s)}
    ttft_slo_s, tbt_slo_s = float(table.ttft_slo_s[r]), float(table.tbt_slo_s[r])
    if len(times_s):
        due_s = answer.sent_s + ttft_slo_s + np.arange(len(times_s)) * tbt_slo_s
        own |= {"first_token_s": times_s[0], "last_token_s": times_s[-1]}
        own["ttft_missed"] = times_s[0] - answer.sent_s > ttft_slo_s
        own["deadline_miss_s"] = (times_s - due_s).max()
    if len(times_s) > 1:
        between_s = np.diff(times_s)
        own |= {"max_gap_s": between_s.max(), "num_late_gaps": int((between_s > tbt_slo_s).sum())}
    if phase == FINISHED:
        own["resolved_s"] = times_s[-1]
    elif phase in (REJECTED, REFUSED, ABANDONED):
        own["resolved_s"] = answer.ended_s
    return own


def row_of(episode: Episode, run: Run, model: str | None) -> dict[str, Any]:
    """The run's row: the columns of `metrics.row`, and what is said of the client."""
    figures = row(episode) | dict.fromkeys(UNKNOWN)
    figures |= {"backend": "server", "model": model}
    cohort = [a for a in run.answers[episode.cohort] if a is not None]
    reasons = Counter(_kind(a.reason) for a in cohort if a.reason)
    told = [a for a in run.answers if a is not None and a.counts]
    late_s = run.late_s
    prompts = [
        (a.prompt_tokens, int(planned))
        for a, planned in zip(run.answers, run.table.prompt_tokens.tolist(), strict=True)
        if a is not None and a.prompt_tokens is not None
    ]
    num_chunks = sum(len(a.counts) for a in told)
    return {
        **figures,
        "num_failed": sum(reasons.values()),
        "num_short": reasons["short"],
        "failures": json.dumps(dict(sorted(reasons.items()))),
        "counted_by": COUNTED_BY[max((a.counted_by for a in told), default=len(COUNTED_BY) - 1)],
        "tokens_per_chunk": sum(a.num_tokens for a in told) / num_chunks if num_chunks else None,
        "prompt_tokens_ratio": sum(p for p, _ in prompts) / sum(p for _, p in prompts) if prompts else None,
        "sent_late_p50_s": percentile(late_s, 0.5),
        "sent_late_p99_s": percentile(late_s, 0.99),
        "sent_late_max_s": float(late_s.max()) if len(late_s) else None,
        **run.counters,
    }


def _kind(reason: str) -> str:
    """What kind of failure a reason is of: its words before the particulars."""
    return reason.partition(":")[0].partition(" after ")[0]


def frames_of(episode: Episode, run: Run) -> dict[str, pd.DataFrame]:
    """Frames as `evaluate` keeps them, by kind; that of requests has why they failed and how late they were sent."""
    import pandas as pd

    outcomes = Outcomes(episode)
    cohort = episode.cohort
    answers = run.answers[cohort]
    requests = requests_frame(episode, outcomes).assign(
        reason=pd.array(["" if a is None else a.reason for a in answers], dtype="string"),
        sent_late_s=[
            np.nan if a is None else a.sent_s - p for a, p in zip(answers, run.planned_s[cohort], strict=True)
        ],
        num_chunks=np.array([0 if a is None else len(a.counts) for a in answers], np.int32),
    )
    parts = [pd.DataFrame({"slo_class": c, "itl_s": s, "count": n}) for c, s, n in gaps_of(episode, outcomes).bins()]
    return {"requests": requests, "itl": pd.concat(parts)}
