"""Metrics of one run: pure functions from an episode's records to a row of figures, a frame of requests, gap counts.

Counts and percentiles are over the measured cohort, rates over the time in which it arrived; batches and KV use are
over the whole run. A request without a first token has an infinite TTFT; an infinite figure is None in a row, and so is
one of nothing.

A turn of a session that never came asked for nothing: it has no latency. If it was cancelled, as somebody before it did
not finish, it is a miss of utility 0 in every share of requests; if it was still to come when the run ended, it is in
none.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmsched_gym.config import SLO_CLASSES
from llmsched_gym.engine.records import (
    ABANDONED,
    CANCELLED,
    FINISHED,
    PENDING,
    PHASES,
    REFUSED,
    REJECTED,
    RUNNING,
    WAITING,
)
from llmsched_gym.evaluation.gaps import Gaps, percentile
from llmsched_gym.evaluation.outcomes import Outcomes
from llmsched_gym.evaluation.run import Episode
from llmsched_gym.evaluation.sessions import cache_figures, session_figures, turn_columns

if TYPE_CHECKING:
    import pandas as pd


def gaps_of(episode: Episode, outcomes: Outcomes) -> Gaps:
    """The cohort's gaps between tokens, open ones included."""
    requests, room = episode.requests[episode.cohort], episode.table.output_tokens[episode.cohort].astype(np.int64) - 1
    recorded = np.maximum(requests["num_output_tokens"].astype(np.int64) - 1, 0)
    start = int(episode.table.gap_start[episode.cohort.start]) if len(requests) else 0
    # a request's recorded gaps belong to its class, the rest of its room to nobody
    owner = np.stack([outcomes.slo_class, np.full_like(outcomes.slo_class, -1)], axis=1).ravel()
    sizes = np.stack([recorded, room - recorded], axis=1).ravel()
    still_open = ~np.isnan(outcomes.open_gap_s)
    return Gaps(
        (episode.gaps[start : start + int(room.sum())], np.repeat(owner, sizes)),
        (outcomes.open_gap_s[still_open].astype(np.float32), outcomes.slo_class[still_open]),
    )


def tokens_between(episode: Episode, start_s: float, stop_s: float) -> int:
    """Tokens emitted from `start_s` to `stop_s`, ends included, whoever's."""
    requests = episode.requests
    first_s, last_s = requests["first_token_s"], requests["last_token_s"]  # nan without a token, which is in no range
    meets = (first_s <= stop_s) & (last_s >= start_s)
    inside = meets & (first_s >= start_s) & (last_s <= stop_s)
    total = int(requests["num_output_tokens"][inside].sum())
    across = meets & ~inside
    for request, start in zip(requests[across], episode.table.gap_start[across].tolist(), strict=True):
        num_gaps = int(request["num_output_tokens"]) - 1
        later_s = np.cumsum(episode.gaps[start : start + num_gaps], dtype=np.float64)
        token_s = request["first_token_s"] + np.concatenate([[0.0], later_s])
        total += int(((token_s >= start_s) & (token_s <= stop_s)).sum())
    return total


def rates(episode: Episode, outcomes: Outcomes) -> dict[str, float | None]:
    """Requests within their SLOs and tokens, per second.

    Over the span of the cohort's arrivals, at which load is offered: never the warm-up or the drain. With sessions load
    is sessions, and the span that of their first requests. vLLM's benchmark divides by the time until its last request
    is done, and counts the tokens of finished requests.
    """
    arrival_s = episode.table.arrival_s[episode.cohort][episode.table.is_root[episode.cohort]]
    n, attained = len(arrival_s), outcomes.attained
    start_s, stop_s = (float(arrival_s[0]), float(arrival_s[-1])) if n else (0.0, 0.0)
    span_s = stop_s - start_s
    known = n > 1 and span_s > 0.0
    resolved_s = episode.requests["resolved_s"][episode.cohort]
    done_s = np.where(np.isnan(resolved_s), float(episode.sim.clock_s), resolved_s)[outcomes.phase != CANCELLED]
    lasted_s = float(done_s.max(initial=0.0)) - start_s
    tokens = int(episode.requests["num_output_tokens"][episode.cohort][outcomes.finished].sum())
    return {
        "request_goodput": int(attained.sum()) / n * (n - 1) / span_s if known else None,
        "throughput_tok_s": tokens_between(episode, start_s, stop_s) / span_s if known else None,
        "vllm_request_goodput": int(attained.sum()) / lasted_s if lasted_s > 0.0 else None,
        "vllm_output_throughput": tokens / lasted_s if lasted_s > 0.0 else None,
    }


def row(episode: Episode, outcomes: Outcomes | None = None, gaps: Gaps | None = None) -> dict[str, Any]:
    """The figures of one run, ready for JSON: no NaN, no infinity."""
    o = outcomes or Outcomes(episode)
    g = gaps or gaps_of(episode, o)
    scenario, table, sim = episode.scenario, episode.table, episode.sim
    n = len(o.phase)

    def by_class(function: Any) -> dict[str, float | None]:
        return {name: function(c) if (o.slo_class == c).any() else None for c, name in enumerate(SLO_CLASSES)}

    def on_time(c: int) -> float | None:
        mine = o.slo_class == c
        total = int(o.num_gaps[mine].sum())
        return 1.0 - int(o.num_late_gaps[mine].sum()) / total if total else None

    tpot_s = o.tpot_s[~np.isnan(o.tpot_s)]
    ttft_s, queue_time_s, e2e_s = o.ttft_s[o.came], o.queue_time_s[o.came], o.e2e_latency_s[o.came]
    return {
        "policy": episode.policy,
        "suite": scenario.suite,
        "backend": scenario.backend,
        "model": scenario.model,
        "profile": scenario.profile,
        "workload": Path(scenario.trace).name if scenario.trace else scenario.workload,
        "arrivals": table.arrivals,
        "qps": float(table.qps),
        "requested_qps": None if scenario.qps is None else float(scenario.qps),
        "seed": int(episode.seed),
        "num_requests": n,
        "num_finished": o.count(FINISHED),
        "num_rejected": o.count(REJECTED),
        "num_too_long": int(o.too_long.sum()),  # of the rejected: longer than max_model_len
        "num_refused": o.count(REFUSED),
        "num_abandoned": o.count(ABANDONED),
        "num_cancelled": o.count(CANCELLED),
        "num_unfinished": int((np.isin(o.phase, (PENDING, WAITING, RUNNING)) & o.came).sum()),
        "num_to_come": n - int(o.counts.sum()),
        "num_attained": int(o.attained.sum()),
        "ttft_p50_s": percentile(ttft_s, 0.5),
        "ttft_p90_s": percentile(ttft_s, 0.9),
        "ttft_p99_s": percentile(ttft_s, 0.99),
        "ttft_mean_s": float(o.ttft_s[o.served].mean()) if o.served.any() else None,
        "ttft_p50_s_by_class": by_class(lambda c: percentile(o.ttft_s[o.came & (o.slo_class == c)], 0.5)),
        "ttft_p99_s_by_class": by_class(lambda c: percentile(o.ttft_s[o.came & (o.slo_class == c)], 0.99)),
        "itl_p50_s": g.percentile(0.5),
        "itl_p99_s": g.percentile(0.99),
        "itl_p50_s_by_class": by_class(lambda c: g.percentile(0.5, c)),
        "itl_p99_s_by_class": by_class(lambda c: g.percentile(0.99, c)),
        "itl_on_time_by_class": by_class(on_time),
        "slo_attainment": o.share(o.attained),
        "slo_attainment_by_class": by_class(lambda c: o.share(o.attained, o.slo_class == c)),
        "mean_utility": o.share(o.utility),
        **rates(episode, o),
        "mean_batch_s": float(sim.mean_batch_s) if sim.num_batches else None,
        "mean_batch_tokens": float(sim.batch_tokens_sum / sim.num_batches) if sim.num_batches else None,
        "kv_cache_usage_max": float(sim.kv_cache_usage_max),
        "num_preemptions": int(episode.requests["num_preemptions"][episode.cohort].sum()),
        "iterations": int(sim.num_batches),
        "sim_time_s": float(sim.clock_s),
        "wall_time_s": float(episode.wall_time_s),
        "e2e_p50_s": percentile(e2e_s, 0.5),
        "e2e_p99_s": percentile(e2e_s, 0.99),
        "queue_time_p50_s": percentile(queue_time_s, 0.5),
        "queue_time_p99_s": percentile(queue_time_s, 0.99),
        "tpot_p50_s": percentile(tpot_s, 0.5),
        "tpot_p99_s": percentile(tpot_s, 0.99),
        "num_requests_by_class": {name: int((o.slo_class == c).sum()) for c, name in enumerate(SLO_CLASSES)},
        "num_gaps_by_class": {name: g.num_gaps(c) for c, name in enumerate(SLO_CLASSES)},
        "tbt_slo_s_by_class": {"strict": scenario.strict_tbt_slo_s, "relaxed": scenario.relaxed_tbt_slo_s},
        "prompt_decile_edges_tokens": o.decile_edges.tolist() if n else [],
        "attained_by_decile": o.by_decile(o.attained) if n else [],
        "refused_by_decile": o.by_decile(o.phase == REFUSED) if n else [],
        "abandoned_by_decile": o.by_decile(o.phase == ABANDONED) if n else [],
        "cancelled_by_decile": o.by_decile(o.phase == CANCELLED) if n else [],
        "tbt_rule": scenario.tbt_rule,
        "length_hint": scenario.length_hint,  # an oracle's where a clairvoyant policy was given one
        "jitter": float(scenario.jitter),
        "cost_scale": float(table.cost_scale),
        **cache_figures(episode),
        **session_figures(episode, o.attained),
        **(episode.replicas or {}),
    }


def requests_frame(episode: Episode, outcomes: Outcomes | None = None) -> pd.DataFrame:
    """One line per request of the cohort; a time that never came is missing (nan)."""
    import pandas as pd

    o = outcomes or Outcomes(episode)
    cohort = episode.cohort
    requests, table = episode.requests[cohort], episode.table

    def missing(seconds: np.ndarray) -> np.ndarray:
        return np.where(np.isinf(seconds), np.nan, seconds)

    return pd.DataFrame(
        {
            "policy": pd.Categorical.from_codes(np.zeros(len(requests), np.int8), [episode.policy]),
            "qps": float(table.qps),
            "seed": episode.seed,
            "index": np.arange(cohort.start, cohort.stop, dtype=np.int32),
            "arrival_s": requests["arrival_s"],
            "prompt_tokens": requests["prompt_tokens"],
            "output_tokens": table.output_tokens[cohort],
            "num_output_tokens": requests["num_output_tokens"],
            "slo_class": pd.Categorical.from_codes(o.slo_class, list(SLO_CLASSES)),
            "phase": pd.Categorical.from_codes(o.phase, list(PHASES)),
            "ttft_slo_s": requests["ttft_slo_s"],
            "tbt_slo_s": requests["tbt_slo_s"],
            "ttft_s": missing(o.ttft_s),
            "queue_time_s": missing(o.queue_time_s),
            "e2e_latency_s": missing(o.e2e_latency_s),
            "tpot_s": o.tpot_s,
            "max_itl_s": o.max_itl_s,
            "num_late_gaps": o.num_late_gaps.astype(np.int32),
            "lateness_s": o.lateness_s,
            "utility": o.utility,
            "attained": o.attained,
            "num_preemptions": requests["num_preemptions"],
            **turn_columns(episode),
            **({} if episode.replica_of is None else {"replica": episode.replica_of[cohort]}),
        }
    )
