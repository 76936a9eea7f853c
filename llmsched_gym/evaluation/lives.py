"""The lives of the worst requests: when each waited, was computed, was held back or lost its memory.

Runs are exact by seed, so that these are found by running the first seed of each policy once more, with its batches
recorded while such a request is there. ``lives.json`` of a folder of results has them; reports show them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llmsched_gym.config import ClusterScenario, Scenario
from llmsched_gym.evaluation.grid import finite
from llmsched_gym.evaluation.record import Recording, items_of, record, segments
from llmsched_gym.evaluation.store import read_rows
from llmsched_gym.files import dumps, write_text
from llmsched_gym.report import statistics

MOST_WALL_S = 20.0
"""A run that took longer is not run again."""
FILE = "lives.json"


def write_lives(out: Path, scenario: Scenario) -> None:
    """Write ``lives.json`` beside the results in `out` of that scenario, unless it is of a cluster or a real model."""
    if isinstance(scenario, ClusterScenario) or scenario.backend != "simulated" or scenario.async_lag:
        return
    rows = statistics.tidy(read_rows(out))
    own = rows[rows["load"] == statistics.focus_load(rows)]
    own = own[own["seed"] == own["seed"].min()]
    found: list[dict[str, Any]] = []
    for run in own.itertuples():
        filters = [("policy", "==", run.policy), ("seed", "==", run.seed), ("qps", "==", run.qps)]
        requests = pd.read_parquet(out / "requests.parquet", filters=filters)
        if run.wall_time_s > MOST_WALL_S or requests.empty:
            continue
        rate = run.requested_qps
        world = finite(scenario) if pd.isna(rate) else finite(scenario).replace(qps=float(rate))
        found += lives_of(world, str(run.policy), int(run.seed), worst(requests))
    write_text(out / FILE, dumps({"lives": found}))


def worst(requests: pd.DataFrame) -> pd.DataFrame:
    """Of one run: the request that was latest in all, that with the latest first token, that with most late gaps.

    Each once, latenesses being relative to SLOs; where none missed an SLO, that with the latest first token.
    """
    came = requests[requests["arrival_s"].notna()]
    ttft = (came["ttft_s"].fillna(math.inf) / came["ttft_slo_s"]).to_numpy()
    missed = ~came["attained"].to_numpy(bool)
    if not missed.any():
        return came.iloc[[int(np.argmax(ttft))]] if len(came) else came
    chosen: list[int] = []
    for figure in (
        came["lateness_s"].to_numpy(),
        np.where(np.isfinite(ttft), ttft, 0.0),
        came["num_late_gaps"].to_numpy(),
    ):
        left = np.where(missed, figure, -1.0)
        left[chosen] = -1.0
        if left.max() > 0:
            chosen.append(int(np.argmax(left)))
    return came.iloc[chosen]


def lives_of(scenario: Scenario, policy: str, seed: int, requests: pd.DataFrame) -> list[dict[str, Any]]:
    """The lives of some requests of a run, as ``lives.json`` has them."""
    ends = requests["arrival_s"] + requests["e2e_latency_s"].fillna(math.inf)
    windows = list(zip(requests["arrival_s"].tolist(), ends.tolist(), strict=True))
    recording = record(scenario, policy, seed, windows)
    if not all(_is_whole(recording, int(r)) for r in requests["index"]):  # it began between two looks
        recording = record(scenario, policy, seed)
    return [life(recording, policy, line) for line in requests.to_dict("records")]


def _is_whole(recording: Recording, r: int) -> bool:
    """Whether the first batch of a request was recorded, if it had one."""
    first_s = recording.episode.requests[r]["first_scheduled_s"]
    mine = items_of(recording, r)
    if math.isnan(first_s) or not len(mine):
        return math.isnan(first_s)
    return bool(abs(recording.start_s[recording.batch_of(mine[:1])[0]] - first_s) < 1e-6)


def life(recording: Recording, policy: str, line: dict[str, Any]) -> dict[str, Any]:
    """One request's life: its figures, and `segments` [start_s, stop_s, kind, batches, tokens] from its arrival on."""
    r = int(line["index"])
    request = recording.episode.requests[r]
    end_s = float(request["resolved_s"])
    end_s = float(recording.episode.sim.clock_s) if math.isnan(end_s) else end_s
    mine = items_of(recording, r)
    parts = segments(recording, r, mine, float(line["arrival_s"]), end_s)
    there = (recording.stop_s > line["arrival_s"]) & (recording.start_s < end_s)
    names = ("index", "seed", "slo_class", "phase", "prompt_tokens", "output_tokens", "num_output_tokens", "attained")
    times = ("arrival_s", "ttft_s", "ttft_slo_s", "tbt_slo_s", "queue_time_s", "e2e_latency_s", "max_itl_s")
    counts = ("num_late_gaps", "num_preemptions")
    figures = {name: _plain(line[name]) for name in (*names, *times, *counts)}
    times_s, tokens = recording.start_s[there], _prefill_tokens(recording)[there]
    return {
        "policy": policy,
        "qps": float(line["qps"]),
        **figures,
        "segments": [[_short(a - line["arrival_s"]), _short(b - line["arrival_s"]), *more] for a, b, *more in parts],
        "batches": _thinned(times_s - line["arrival_s"], recording.duration_s[there], tokens),
        "longest": _longest(recording, r, mine),
    }


def _prefill_tokens(recording: Recording) -> np.ndarray:
    """Prompt tokens computed in each batch."""
    tokens = np.where(recording.is_prefill, recording.tokens, 0)
    return np.diff(np.concatenate([[0], np.cumsum(tokens)])[recording.first])


def _longest(recording: Recording, r: int, mine: np.ndarray) -> dict[str, Any] | None:
    """The longest gap between two tokens of request `r`, whose items are `mine`, and what lay in it."""
    batch = recording.batch_of(mine)
    emits = recording.emitted[mine] > 0
    at, ends_s = batch[emits], recording.stop_s[batch[emits]]
    if len(at) < 2:
        return None
    i = int(np.argmax(np.diff(ends_s)))
    inside = slice(int(at[i]) + 1, int(at[i + 1]) + 1)
    was_in = np.isin(np.arange(inside.start, inside.stop), batch)
    return {
        "gap_s": _short(ends_s[i + 1] - ends_s[i]),
        "token": i + 2,
        "batches": int(inside.stop - inside.start),
        "held": int((~was_in).sum()),
        "prefill_tokens": int(_prefill_tokens(recording)[inside].sum()),
        "preempted": recording.is_lost(r, int(at[i]), int(at[i + 1])),
    }


def _thinned(time_s: np.ndarray, duration_s: np.ndarray, tokens: np.ndarray, most: int = 100) -> list[list[float]]:
    """[time, duration, prompt tokens] of batches; of many only the longest of each so many in a row."""
    each = max(1, math.ceil(len(time_s) / most))
    parts = [slice(i, i + each) for i in range(0, len(time_s), each)]
    longest = [part.start + int(np.argmax(duration_s[part])) for part in parts]
    return [[_short(time_s[i]), _short(duration_s[i]), int(tokens[i])] for i in longest]


def _short(value: float) -> float:
    return round(float(value), 4)


def _plain(value: Any) -> Any:
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    number = float(value)
    return None if not math.isfinite(number) else int(number) if isinstance(value, np.integer) else number
