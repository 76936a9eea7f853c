"""A workload file fitted to a trace: lengths, or sessions where the trace has them; when it comes; how far it is off.

Behind `llmsched workload fit`. The file serves as `workload="FILE.json"`. When requests come is no part of a workload:
`arrivals` in the file has the trace's mean rate and burstiness, and a suite made with it says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_gym.config import ConfigError, Scenario, Suite, suite_text
from llmsched_gym.files import claim_file, json_with, write_text
from llmsched_gym.workload.fit import MIN_ROWS, draw, fit_lengths, ks_distance, lengths_text, rounded
from llmsched_gym.workload.lengths import parse_lengths
from llmsched_gym.workload.session_statistics import spread
from llmsched_gym.workload.sessions import parse_sessions
from llmsched_gym.workload.trace_sessions import TraceSessions, of_sessions
from llmsched_gym.workload.traces import Trace

MIN_SESSIONS = 30
SESSION_PROBS = np.unique(np.concatenate([np.linspace(0.0, 1.0, 101), (0.002, 0.005, 0.992, 0.995, 0.998, 0.999)]))
DRAWS = 20_000  # requests, or sessions, that are compared with the trace's
COMPARED = (0.5, 0.9, 0.99)
ZERO_GAPS = 0.2  # share of gaps from which on times are rounded, and say nothing about bursts
BURSTINESS = (0.01, 100.0)

INDEPENDENT = "quantiles of the trace, drawn independently of everything else"
NOT_KEPT = {
    "spread": "0: not fitted, a session's messages are as long as anybody's",
    "system_prompts": "none: the trace does not say what sessions have in common",
}


def fit_workload(
    trace: Trace, name: str, source: str, max_total_tokens: int | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A workload's JSON object, and rows of how far it is off: quantity, figure, of the trace and of draws, error.

    `max_total_tokens`, the largest prompt + output, is the trace's unless given. Raises :class:`ConfigError` for a
    trace of too few rows.
    """
    most = max_total_tokens or int((trace.prompt_tokens.astype(np.int64) + trace.output_tokens).max())
    has_turns = trace.parent is not None and trace.think_s is not None and bool((trace.parent >= 0).any())
    data = _fit_sessions(trace, name, source) if has_turns else fit_lengths(trace, name, source, max_total_tokens)
    data |= {"max_total_tokens": most, "arrivals": arrivals(trace)}
    return data, _compared(*(_sessions(trace, data, most) if has_turns else _lengths(trace, data)))


def arrivals(trace: Trace) -> dict[str, float] | None:
    """Mean rate of requests, or of sessions, 1/s, and burstiness: 1 / CV^2 of the gaps, the shape of a Gamma process.

    None for a trace without times. Burstiness is left out where times are rounded, or too few.
    """
    starts = of_sessions(trace)
    if starts.arrival_s is None or starts.qps is None:
        return None
    found, gaps = {"qps": float(f"{starts.qps:.6g}")}, np.diff(starts.arrival_s)
    if len(gaps) >= MIN_SESSIONS and starts.zero_gaps <= ZERO_GAPS and gaps.std() > 0.0:
        found["burstiness"] = float(f"{np.clip((gaps.mean() / gaps.std()) ** 2, *BURSTINESS):.4g}")
    return found


def _fit_sessions(trace: Trace, name: str, source: str) -> dict[str, Any]:
    everyone = TraceSessions(trace, 0, 1, 0).everyone
    if len(everyone) < MIN_SESSIONS or len(trace) < MIN_ROWS:
        what = f"{len(everyone):,} sessions of {len(trace):,} calls; a fit needs at least {MIN_SESSIONS} of {MIN_ROWS}"
        raise ConfigError(f"{trace.name}: {what}")
    parts = _of_sessions(everyone)
    quantities = {part: _quantiles(parts[part], 3 if part == "think_s" else 1) for part in parts if part != "prompt"}
    return {
        "kind": "sessions",
        "name": name,
        "source": source,
        **quantities,
        "spread": 0.0,
        "system_prompts": {"tokens": [], "shares": []},
        "max_output_tokens": int(trace.output_tokens.max()),
        "sources": {**dict.fromkeys(quantities, INDEPENDENT), **NOT_KEPT, "max_output_tokens": "the trace's longest"},
        "statistics": {
            "num_requests": len(trace),
            "num_sessions": len(everyone),
            "prompt_tokens": spread(trace.prompt_tokens),
            **{part: spread(parts[part]) for part in ("turns", "output_tokens", "new_tokens", "think_s")},
        },
    }


def _of_sessions(sessions: Any) -> dict[str, np.ndarray]:
    """What a workload says of sessions, and their contexts; drawn ones and those of a trace alike."""
    is_first = np.zeros(len(sessions.prompt_tokens), bool)
    is_first[sessions.first] = True
    new = np.maximum(sessions.new_tokens, 1)
    return {
        "turns": sessions.num_turns,
        "first_tokens": new[is_first],
        "new_tokens": new[~is_first],
        "output_tokens": sessions.output_tokens,
        "think_s": np.maximum(sessions.think_s[~is_first], 0.0),
        "prompt": sessions.prompt_tokens,
    }


def _quantiles(values: np.ndarray, digits: int) -> dict[str, list[float]]:
    found = np.quantile(values, SESSION_PROBS)
    return {"probs": rounded(SESSION_PROBS), "values": rounded(found, digits)}


Parts = dict[str, np.ndarray]


def _sessions(trace: Trace, data: dict[str, Any], most: int) -> tuple[Parts, Parts]:
    model = parse_sessions(data, trace.name)
    uniforms = np.random.default_rng(0).random((min(DRAWS, max(1, 20_000_000 // model.draws)), model.draws))
    drawn = model.sessions(uniforms, max(most, int(model.output_tokens.high) + 1))
    return _of_sessions(TraceSessions(trace, 0, 1, 0).everyone), _of_sessions(drawn)


def _lengths(trace: Trace, data: dict[str, Any]) -> tuple[Parts, Parts]:
    def parts(prompt: np.ndarray, output: np.ndarray) -> Parts:
        return {"prompt": prompt, "output": output, "total": prompt.astype(np.int64) + output}

    drawn = draw(parse_lengths(data, trace.name), DRAWS, seed=0)
    return parts(trace.prompt_tokens, trace.output_tokens), parts(*drawn)


def _compared(measured: Parts, drawn: Parts) -> list[dict[str, Any]]:
    rows = []
    for part, values in measured.items():
        row: dict[str, Any] = {"quantity": part, "ks_distance": round(ks_distance(values, drawn[part]), 4)}
        figures: dict[str, Callable[[np.ndarray], float]] = {"mean": lambda x: float(x.mean())}
        figures |= {f"p{100 * q:.0f}": lambda x, q=q: float(np.quantile(x, q)) for q in COMPARED}  # type: ignore[misc]
        for name, figure in figures.items():
            own, fitted = figure(values), figure(drawn[part])
            error = (fitted - own) / own if own else None
            row[name] = {"trace": round(own, 3), "fitted": round(fitted, 3), "error": error and round(error, 4)}
        rows.append(row)
    return rows


def check_places(out: Path, suite: Path | None) -> None:
    """ConfigError of one line for a workload's file, or a suite's, where something else lies."""
    if out.suffix != ".json":
        raise ConfigError(f"out: expected a .json file, got {str(out)!r}")
    claim_file(out, "workload", json_with("name", "source"))
    if suite is not None and suite.suffix != ".toml":
        raise ConfigError(f"suite: expected a .toml file, got {str(suite)!r}")
    if suite is not None:
        claim_file(suite, "suite", lambda path: "[scenario]" in path.read_text(encoding="utf-8"), "suite")


def write_workload(data: dict[str, Any], out: Path) -> None:
    """Write a workload's file; ConfigError for a place that cannot be written to."""
    _write(out, lengths_text(data) if "output" in data else _one_a_line(data))


def write_suite(data: dict[str, Any], workload: Path, out: Path) -> None:
    """Write a suite of the workload, with the trace's rate and burstiness; ConfigError as of `write_workload`."""
    found = data["arrivals"] or {}
    fields: dict[str, Any] = {"qps": found["qps"]} if found else {}
    if "burstiness" in found:
        fields |= {"arrivals": "gamma", "burstiness": found["burstiness"]}
    if data.get("kind") == "sessions":
        fields["prefix_caching"] = True
    if data["max_total_tokens"] > Scenario.max_model_len:
        fields["max_model_len"] = data["max_total_tokens"] + 1
    is_beside = workload.absolute().parent == out.absolute().parent  # where suites look first
    named = workload.name if is_beside else str(workload.absolute())
    suite = Suite(Scenario(workload=named, **fields), f"fitted to {data['source']}", "LLMSched-v0")
    usual = Scenario().to_dict()
    text = suite_text(suite).splitlines()
    kept = [line for line in text if line.split(" = ")[0] not in usual or line.split(" = ")[0] in ("workload", *fields)]
    _write(out, "\n".join(kept) + "\n")


def _write(out: Path, text: str) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text)
    except OSError as error:
        raise ConfigError(f"out: cannot write to {out}: {error.strerror}") from None


def _one_a_line(data: dict[str, Any]) -> str:
    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in data.items()) + "\n}\n"
