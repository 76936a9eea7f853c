"""The request table of a finite run in parts: the same requests as `make_table`, never all of them at once."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from llmsched_gym.config import ConfigError, Scenario
from llmsched_gym.workload.arrivals import random_arrivals
from llmsched_gym.workload.generate import MAX_DRAIN_S, arrival_kind, length_hints, slo_columns
from llmsched_gym.workload.lengths import load_lengths
from llmsched_gym.workload.mixture import load_sessions
from llmsched_gym.workload.streams import (
    COST_SCALE,
    EPISODE_STREAM,
    GAP_STREAM,
    HINT_STREAM,
    HOLD_STREAM,
    QPS,
    REQUEST_STREAM,
    START_SIDE,
    check_seed,
    rng,
    uniform,
)
from llmsched_gym.workload.table import RequestTable


def table_chunks(scenario: Scenario, seed: int, size: int) -> Iterator[RequestTable]:
    """The requests of ``make_table(scenario, seed)``, `size` a table; the last one is shorter.

    Each table's cohort is its part of the measured requests. For finite runs on drawn arrivals of single requests:
    ConfigError for others, which need the whole table.
    """
    if scenario.num_requests is None:
        raise ConfigError("num_requests: expected a number for a run in parts, got None")
    if scenario.trace is not None or load_sessions(scenario.workload) is not None:
        given = f"trace={scenario.trace!r}" if scenario.trace is not None else f"workload={scenario.workload!r}"
        raise ConfigError(f"workload: expected drawn single requests for a run in parts, got {given}")
    if size < 1:
        raise ConfigError(f"size: expected a whole number >= 1, got {size!r}")
    return _chunks(scenario, check_seed(seed), size, scenario.num_requests)


def _chunks(scenario: Scenario, seed: int, size: int, measured: int) -> Iterator[RequestTable]:
    episode = rng(seed, EPISODE_STREAM).random(6)
    kind = arrival_kind(scenario, None)
    gaps, holds = rng(seed, GAP_STREAM), rng(seed, HOLD_STREAM)
    arrivals = random_arrivals(kind, scenario, episode[[QPS, START_SIDE]], gaps, holds)
    draws, hints, lengths = rng(seed, REQUEST_STREAM), rng(seed, HINT_STREAM), load_lengths(scenario.workload)
    drain_s = MAX_DRAIN_S if math.isinf(scenario.drain_s) else float(scenario.drain_s)
    drain_s = drain_s if scenario.arrivals_continue else 0.0
    left, end_s = measured, math.inf
    for arrival_s in arrivals.parts(size):
        start = int(np.searchsorted(arrival_s, scenario.warmup_s, "left"))
        stop = min(start + left, size)
        left -= stop - start
        if left == 0 and math.isinf(end_s):
            end_s = float(arrival_s[stop - 1]) + drain_s
        n = size
        if left == 0:
            n = stop if drain_s == 0.0 else int(np.searchsorted(arrival_s, end_s, "right"))
        uniforms = draws.random((size, 4))[:n]
        prompt, output = lengths.draw(uniforms)
        slo_class, ttft_slo_s, tbt_slo_s = slo_columns(scenario, episode, uniforms, prompt)
        yield RequestTable(
            arrival_s=arrival_s[:n],
            prompt_tokens=prompt,
            output_tokens=output,
            slo_class=slo_class,
            ttft_slo_s=ttft_slo_s,
            tbt_slo_s=tbt_slo_s,
            length_hint=length_hints(scenario, hints, output),
            session_id=np.full(n, -1, np.int64),
            cohort_start=min(start, n),
            cohort_stop=min(stop, n),
            qps=arrivals.qps,
            cost_scale=uniform(scenario.cost_scale, episode[COST_SCALE]),
            seed=seed,
            arrivals=kind,
        )
        if left == 0 and n < size:
            return
