"""The request table of an episode, and its execution noise, from (scenario, seed).

Every purpose has a random stream of its own (`SeedSequence(seed, spawn_key=...)`) and every request uses a fixed number
of draws, so request k is the same at every load, in every suite and in a run of any length.
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache

import numpy as np

from llmsched_gym.config import ConfigError, Scenario
from llmsched_gym.workload.arrivals import (
    Arrivals,
    ReplayArrivals,
    arrivals_until,
    measured_arrivals,
    random_arrivals,
)
from llmsched_gym.workload.lengths import load_lengths
from llmsched_gym.workload.mixture import load_sessions
from llmsched_gym.workload.session_table import drawn_in_mid_life, make_session_table, traced_in_mid_life
from llmsched_gym.workload.sessions import SessionStream
from llmsched_gym.workload.streams import (
    BACKLOG,
    COST_SCALE,
    EPISODE_STREAM,
    FIRST_ROW,
    GAP_STREAM,
    HINT_STREAM,
    HOLD_STREAM,
    NOISE_STREAM,
    QPS,
    REQUEST_STREAM,
    SESSION_STREAM,
    START_SIDE,
    STRICT_SHARE,
    check_seed,
    rng,
    uniform,
)
from llmsched_gym.workload.table import RequestTable
from llmsched_gym.workload.trace_sessions import TraceSessions, of_sessions, shares_of_rows
from llmsched_gym.workload.traces import Trace, TraceWarning, cached_trace

NOISE_BLOCK = 4096
"""Steps that one block of execution noise covers."""

ROUNDED = 0.2
"""Share of gaps of 0 above which a trace's times are taken for rounded."""
MAX_DRAIN_S = 600.0
"""Arrivals behind the cohort when the run itself has no time limit."""


def make_table(scenario: Scenario, seed: int) -> RequestTable:
    """The requests of one episode.

    A finite scenario (`num_requests`) measures the first `num_requests` arrivals at or after `warmup_s`, and arrivals
    go on for `drain_s` (at most 600 s where that is infinite) if `arrivals_continue`. A continuing one has arrivals up
    to `horizon_s` behind a backlog of 0..`max_backlog` requests at time 0; all of them are measured, and there may be
    none at all in a short horizon.

    A trace that has times keeps them unless `trace_arrivals` says otherwise. Kept arrivals take the rows in order and
    repeat the trace where it is too short: from row 0 in a finite run (a seed then moves only classes, hints and
    noise), without backlog and from a random row in a continuing one. Drawn arrivals take their lengths from rows drawn
    with replacement. What prompts of a trace have in common is known where its times are kept, and counts as new in the
    TTFT SLO only where the file has it first.

    A workload with sessions has the columns of sessions, and `qps` sessions per second: see `session_table`. So has a
    trace that tells how long clients think (`Trace.think_s`): its sessions begin when the file says, or at drawn
    arrivals, each a random one of the file.

    Raises :class:`ConfigError` for a bad seed or workload and :class:`TraceError` for a bad trace, one line each.
    """
    seed = check_seed(seed)
    episode = rng(seed, EPISODE_STREAM).random(6)
    trace = trace_of(scenario)
    kind = arrival_kind(scenario, trace)
    arrivals = _arrivals(scenario, kind, seed, episode, trace)

    drain_s = MAX_DRAIN_S if math.isinf(scenario.drain_s) else float(scenario.drain_s)
    drain_s = drain_s if scenario.arrivals_continue else 0.0
    model = load_sessions(scenario.workload) if trace is None else None
    if model is not None:
        drawn = SessionStream(model, rng(seed, SESSION_STREAM), scenario.max_model_len)
        mid_life = drawn_in_mid_life(scenario, model, seed, arrivals.qps) if scenario.num_requests is None else None
        return make_session_table(scenario, drawn, seed, episode, arrivals, kind, drain_s, mid_life)
    if trace is not None and trace.think_s is not None:
        first = arrivals.first if isinstance(arrivals, ReplayArrivals) else None
        stream = TraceSessions(trace, seed, scenario.max_model_len, first)
        mid_life = traced_in_mid_life(scenario, stream, seed, arrivals) if scenario.num_requests is None else None
        table = make_session_table(scenario, stream, seed, episode, arrivals, kind, drain_s, mid_life)
        _warn_of_replay(scenario, trace, kind, len(table))
        return table

    backlog = 0
    if scenario.num_requests is None:
        if not isinstance(arrivals, ReplayArrivals):
            backlog = int(episode[BACKLOG] * (scenario.max_backlog + 1))
        arrival_s = np.concatenate([np.zeros(backlog), arrivals_until(arrivals, float(scenario.horizon_s))])
        start, stop = 0, len(arrival_s)
    else:
        arrival_s, start, stop = measured_arrivals(arrivals, float(scenario.warmup_s), scenario.num_requests, drain_s)

    n = len(arrival_s)
    _warn_of_replay(scenario, trace, kind, n)
    uniforms = rng(seed, REQUEST_STREAM).random((n, 4))  # prompt, output, SLO class, TTFT class
    session, shares, new_tokens = np.full(n, -1, np.int64), None, None
    if trace is None:
        prompt, output = load_lengths(scenario.workload).draw(uniforms)
    elif isinstance(arrivals, ReplayArrivals):
        lap, row = np.divmod(np.arange(arrivals.first, arrivals.first + n), len(trace))
        prompt, output = trace.prompt_tokens[row], trace.output_tokens[row]
        if trace.session_id is not None:
            # A session of a repeated trace is another session.
            apart = lap * (trace.session_id.max() + 1)
            session = np.where(trace.session_id[row] < 0, -1, trace.session_id[row] + apart)
        if trace.shares is not None:
            shares = shares_of_rows(trace, arrivals.first, n)
            new_tokens = prompt - trace.shares[1][row]
    else:
        row = (uniforms[:, 0] * len(trace)).astype(np.int64)
        prompt, output = trace.prompt_tokens[row], trace.output_tokens[row]

    slo_class, ttft_slo_s, tbt_slo_s = slo_columns(
        scenario, episode, uniforms, prompt if new_tokens is None else new_tokens
    )
    return RequestTable(
        arrival_s=arrival_s,
        prompt_tokens=prompt,
        output_tokens=output,
        slo_class=slo_class,
        ttft_slo_s=ttft_slo_s,
        tbt_slo_s=tbt_slo_s,
        length_hint=length_hints(scenario, rng(seed, HINT_STREAM), output),
        session_id=session,
        cohort_start=start,
        cohort_stop=stop,
        qps=arrivals.qps,
        cost_scale=uniform(scenario.cost_scale, episode[COST_SCALE]),
        seed=seed,
        arrivals=kind,
        shares_with=shares[0] if shares else None,
        shared_tokens=shares[1] if shares else None,
    )


def slo_columns(
    scenario: Scenario, episode: np.ndarray, uniforms: np.ndarray, new_tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes, TTFT SLOs and TBT SLOs, each (n,), of `uniforms` (n, 4) and the prompt tokens that count for a TTFT."""
    relaxed = uniforms[:, 2] >= uniform(scenario.strict_share, episode[STRICT_SHARE])
    ttft_slo_s = scenario.ttft_slo_s + scenario.ttft_slo_per_token_s * new_tokens
    scales = scenario.ttft_class_scales
    if scales != (1.0,):
        ttft_slo_s = ttft_slo_s * np.asarray(scales, float)[(uniforms[:, 3] * len(scales)).astype(np.int64)]
    tbt_slo_s = np.where(relaxed, float(scenario.relaxed_tbt_slo_s), float(scenario.strict_tbt_slo_s))
    return relaxed.astype(np.int8), ttft_slo_s, tbt_slo_s


def trace_remarks(scenario: Scenario, seed: int) -> list[str]:
    """What a reader of a run's results should know of its trace, a sentence each."""
    trace = trace_of(scenario)
    if trace is None:
        return []
    dropped = [f"{trace.num_dropped:,} invalid rows were left out"] * bool(trace.num_dropped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TraceWarning)
        table = make_table(scenario, seed)
    kept = table.arrivals == "trace"
    replayed = _replay_remarks(scenario, trace, len(table)) if kept else []
    apart = trace.shares is not None and trace.think_s is None and not kept
    lost = ["requests are random rows of it, so that no two prompts have anything in common"] * apart
    return [*dropped, *trace.remarks(), *replayed, *lost]


def _warn_of_replay(scenario: Scenario, trace: Trace | None, kind: str, num_requests: int) -> None:
    if trace is not None and kind == "trace":
        for remark in _replay_remarks(scenario, trace, num_requests):
            warnings.warn(f"{trace.name}: {remark}", TraceWarning, stacklevel=3)


def _replay_remarks(scenario: Scenario, trace: Trace, num_requests: int) -> list[str]:
    """What a run on a trace's own times is not."""
    notes = []
    zero_gaps = of_sessions(trace).zero_gaps
    if zero_gaps > ROUNDED:
        notes.append(
            f"{100 * zero_gaps:.0f} % of the gaps between arrivals are 0, as its times are rounded: requests "
            "come in bursts that nobody sent (trace_arrivals=poisson draws other gaps)"
        )
    if scenario.num_requests is not None and num_requests > len(trace):
        few = "request is" if len(trace) == 1 else "requests are"
        notes.append(f"its {len(trace):,} {few} too few for the run and start over")
    return notes


def come_in_sessions(scenario: Scenario) -> bool:
    """Whether a scenario's requests are turns of drawn sessions, so that its rates are sessions per second."""
    return scenario.trace is None and load_sessions(scenario.workload) is not None


def has_turns(scenario: Scenario) -> bool:
    """Whether requests come after others have been answered, in sessions drawn or of a trace."""
    trace = trace_of(scenario)
    return come_in_sessions(scenario) if trace is None else trace.think_s is not None


def trace_of(scenario: Scenario) -> Trace | None:
    """The scenario's trace, read."""
    return None if scenario.trace is None else cached_trace(scenario.trace, scenario.trace_invalid)


def arrival_kind(scenario: Scenario, trace: Trace | None) -> str:
    """The process behind the scenario's arrivals, "trace" for its trace's own times."""
    if trace is None:
        if scenario.arrivals == "replay":
            raise ConfigError("arrivals: replay needs a trace")
        return scenario.arrivals
    kind = scenario.trace_arrivals or ("keep" if trace.qps is not None else scenario.arrivals)
    return "trace" if kind in ("keep", "replay") else kind


def noise_block(scenario: Scenario, seed: int, block: int, replica: int = 0) -> np.ndarray:
    """Factors on the execution times of steps block * NOISE_BLOCK and on, float64 of shape (NOISE_BLOCK,), read-only.

    Log-normal with median 1 and sigma `jitter`, times `straggler_factor` for a share `straggler_share` of the steps.
    Without either it is `np.ones(1)`: one factor for every step. Each replica has its own; the first has the single
    engine's.
    """
    if scenario.jitter == 0.0 and scenario.straggler_share == 0.0:
        return np.ones(1)
    stragglers = scenario.straggler_share, scenario.straggler_factor
    return _noise(scenario.jitter, *stragglers, check_seed(seed), block, replica)


@lru_cache(maxsize=256)  # 8 MB: who goes back to a moment again and again needs the same blocks
def _noise(jitter: float, share: float, factor: float, seed: int, block: int, replica: int) -> np.ndarray:
    draws = rng(seed, NOISE_STREAM, block, *([replica] if replica else []))
    noise = np.exp(jitter * draws.standard_normal(NOISE_BLOCK))
    if share > 0.0:
        noise[draws.random(NOISE_BLOCK) < share] *= factor
    noise.setflags(write=False)
    return noise


def _arrivals(scenario: Scenario, kind: str, seed: int, episode: np.ndarray, trace: Trace | None) -> Arrivals:
    if kind == "trace" and trace is not None:
        trace = of_sessions(trace)
        first = 0 if scenario.num_requests is not None else int(episode[FIRST_ROW] * len(trace))
        return ReplayArrivals(trace, scenario.qps, first)
    gaps, holds = rng(seed, GAP_STREAM), rng(seed, HOLD_STREAM)
    return random_arrivals(kind, scenario, episode[[QPS, START_SIDE]], gaps, holds)


def length_hints(scenario: Scenario, draws: np.random.Generator, output: np.ndarray) -> np.ndarray:
    """What schedulers are told of output lengths, tokens; nan without a hint. Shape (n,)."""
    sigma = scenario.hint_sigma
    if sigma is None:
        return np.full(len(output), np.nan)
    if sigma == 0.0:
        return output.astype(np.float64)
    return output * np.exp(sigma * draws.standard_normal(len(output)))
