"""A recorded run in Chrome's trace event format, which ui.perfetto.dev and chrome://tracing show.

Process 1 is the engine: its batches as slices, and counters of tokens, requests and KV memory. Process 2 has a track
for each request: a slice from its arrival to its end, and in it what it did. Times are microseconds.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_gym.config import SLO_CLASSES, ConfigError
from llmsched_gym.engine.records import CANCELLED, PENDING, PHASES
from llmsched_gym.evaluation.record import Recording, segments
from llmsched_gym.files import claim_file, json_with, write_text

ENGINE, REQUESTS = 1, 2
WORDS = {"queue": "in the queue", "held": "held back"}


def claim_trace(path: Path) -> None:
    """One line of :class:`ConfigError` if `path` cannot become a trace, or is a file of something else."""
    claim_file(path, "trace of llmsched", json_with("traceEvents"), field="perfetto")
    if not path.parent.is_dir():
        raise ConfigError(f"perfetto: no folder {path.parent}")


def write_trace(recording: Recording, path: Path) -> None:
    """Write the run's trace; one line of :class:`ConfigError` if that cannot be done."""
    try:
        write_text(path, json.dumps(trace(recording), allow_nan=False, separators=(",", ":")) + "\n")
    except OSError as error:
        raise ConfigError(f"perfetto: cannot write {path}: {error.strerror or error}") from None


def trace(recording: Recording) -> dict[str, Any]:
    """The run as the object of the JSON file."""
    episode = recording.episode
    about = {"policy": episode.policy, "seed": episode.seed, "suite": episode.scenario.suite}
    about |= {"qps": float(episode.table.qps), "profile": episode.scenario.profile}
    events = [*_names(), *_batches(recording), *_requests(recording)]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def _us(seconds: float) -> float:
    return round(1e6 * float(seconds), 3)


def _slice(name: str, process: int, track: int, start_s: float, stop_s: float, **args: Any) -> dict[str, Any]:
    """A slice; it ends where it says to the last digit, so that slices nest."""
    start = _us(start_s)
    place = {"name": name, "ph": "X", "pid": process, "tid": track}
    return place | {"ts": start, "dur": round(_us(stop_s) - start, 3), "args": args}


def _named(kind: str, process: int, track: int, **args: Any) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": track, "args": args}


def _names() -> list[dict[str, Any]]:
    found = [_named("thread_name", ENGINE, 1, name="batches")]
    for process, name in ((ENGINE, "engine"), (REQUESTS, "requests")):
        found += [_named("process_name", process, 0, name=name)]
        found += [_named("process_sort_index", process, 0, sort_index=process)]
    return found


def _batches(recording: Recording) -> list[dict[str, Any]]:
    """A slice a batch, and the counters at its start."""
    prompt = np.where(recording.is_prefill, recording.tokens, 0)
    sums = [np.concatenate([[0], np.cumsum(tokens)])[recording.first] for tokens in (prompt, recording.tokens)]
    prefill, total = (np.diff(each).tolist() for each in sums)
    sizes, found = np.diff(recording.first).tolist(), []
    stop_s = recording.stop_s
    for b, start_s in enumerate(recording.start_s.tolist()):
        tokens = {"prefill": prefill[b], "decode": total[b] - prefill[b]}
        kind = "hybrid" if all(tokens.values()) else "prefill" if tokens["prefill"] else "decode"
        told = {"requests": sizes[b]} | {f"{name}_tokens": count for name, count in tokens.items()}
        found.append(_slice(f"{kind} batch", ENGINE, 1, start_s, stop_s[b], **told))
        queues = {"running": int(recording.num_running[b]), "waiting": int(recording.num_waiting[b])}
        used = {"used": round(100 * float(recording.kv_cache_usage[b]), 3)}
        for name, figures in (("tokens", tokens), ("requests", queues), ("KV cache (%)", used)):
            found.append({"name": name, "ph": "C", "pid": ENGINE, "tid": 0, "ts": _us(start_s), "args": figures})
    return found


def _requests(recording: Recording) -> list[dict[str, Any]]:
    """A track a request that came: its whole life, in it what it did, and its first token."""
    episode, found = recording.episode, []
    order = np.argsort(recording.request, kind="stable")
    starts = np.searchsorted(recording.request[order], np.arange(len(episode.requests) + 1))
    for r, request in enumerate(episode.requests):
        if request["phase"] in (PENDING, CANCELLED) or math.isnan(request["arrival_s"]):
            continue
        end_s = float(request["resolved_s"])
        end_s = float(episode.sim.clock_s) if math.isnan(end_s) else end_s
        arrival_s, track, users = float(request["arrival_s"]), r + 1, SLO_CLASSES[int(request["slo_class"])]
        found.append(_named("thread_name", REQUESTS, track, name=f"request {r} ({users})"))
        told = {"users": users, "phase": PHASES[int(request["phase"])], "is_measured": r in _cohort(recording)}
        told |= {"prompt_tokens": int(request["prompt_tokens"]), "output_tokens": int(request["num_output_tokens"])}
        told |= {"preemptions": int(request["num_preemptions"]), "ttft_slo_s": float(request["ttft_slo_s"])}
        found.append(_slice(f"request {r}", REQUESTS, track, arrival_s, end_s, **told))
        for part in segments(recording, r, order[starts[r] : starts[r + 1]], arrival_s, end_s):
            counts = {"batches": part.batches, "tokens": part.tokens}
            name = WORDS.get(part.kind, part.kind)
            found.append(_slice(name, REQUESTS, track, part.start_s, part.stop_s, **counts))
        if not math.isnan(request["first_token_s"]):
            place = {"ph": "i", "pid": REQUESTS, "tid": track, "s": "t", "ts": _us(request["first_token_s"])}
            found.append({"name": "first token", **place, "args": {}})
    return found


def _cohort(recording: Recording) -> range:
    return range(*recording.episode.cohort.indices(len(recording.episode.requests)))
