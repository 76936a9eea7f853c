"""Length distributions: prompt and output tokens drawn from quantile tables fitted to a trace.

A table holds the quantiles of the prompt length and, for each of several equally likely ranges of prompt lengths, the
quantiles of the output length there, so that the dependence between the two survives. A draw is an inverse CDF of two
uniforms; request i uses row i of the uniforms, so its lengths do not depend on how many requests are drawn.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_gym.config import ConfigError
from llmsched_gym.files import parse, version_of

DATA_DIR = Path(__file__).resolve().parent.parent / "data" / "workloads"
WORKLOADS = tuple(sorted(path.stem for path in DATA_DIR.glob("*.json")))
"""Names of the shipped workloads: length distributions, and those of sessions (see `sessions`)."""


@dataclass(frozen=True, eq=False)
class LengthTable:
    """Quantiles of prompt lengths, and of output lengths given the prompt's range."""

    name: str
    source: str  # where the figures come from, licence included
    prompt_probs: np.ndarray  # (num_prompt_knots,) cumulative probabilities, 0 to 1
    prompt_tokens: np.ndarray  # (num_prompt_knots,) quantiles, tokens
    output_keys: np.ndarray  # (num_bins * num_output_knots,) bin + cumulative probability inside the bin
    output_tokens: np.ndarray  # (num_bins * num_output_knots,) quantiles, tokens
    num_bins: int  # equally likely ranges of prompt lengths
    max_total_tokens: int  # prompt + output never exceed it
    statistics: dict[str, Any]  # of the trace that was fitted

    def draw(self, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and output tokens, int32 of shape (n,), from uniforms in [0, 1) of shape (n, 2).

        An output that would lift the total above `max_total_tokens` is cut to fit.
        """
        prompt = np.interp(uniforms[:, 0], self.prompt_probs, self.prompt_tokens)
        prompt = np.maximum(np.rint(prompt), 1.0).astype(np.int32)
        keys = np.floor(uniforms[:, 0] * self.num_bins) + uniforms[:, 1]
        output = np.rint(np.interp(keys, self.output_keys, self.output_tokens)).astype(np.int32)
        return prompt, np.maximum(np.minimum(output, self.max_total_tokens - prompt), 1)


def parse_lengths(data: dict[str, Any], where: str) -> LengthTable:
    """A table from its JSON form (see `fit.fit_lengths`); raises :class:`ConfigError` naming `where` and the field."""

    def quantiles(section: str, ndim: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            probs, tokens = (np.asarray(data[section][field], float) for field in ("probs", "tokens"))
        except (TypeError, ValueError):
            raise ValueError(f"{section}: expected an object with numbers in probs and tokens") from None
        ok = probs.ndim == 1 and tokens.ndim == ndim and len(probs) >= 2 and tokens.shape[-1] == len(probs)
        if not ok or probs[0] != 0.0 or probs[-1] != 1.0 or not (np.diff(probs) > 0.0).all():
            raise ValueError(f"{section}.probs: expected increasing numbers from 0 to 1, one per quantile")
        if not (tokens >= 1.0).all() or not (np.diff(tokens, axis=-1) >= 0.0).all() or not tokens.size:
            raise ValueError(f"{section}.tokens: expected non-decreasing numbers >= 1")
        return probs, tokens

    try:
        prompt_probs, prompt_tokens = quantiles("prompt", 1)
        probs, tokens = quantiles("output", 2)
        max_total = int(data["max_total_tokens"])
        if max_total <= prompt_tokens[-1]:
            raise ValueError("max_total_tokens: expected more than the longest prompt")
        # A bin's last key stays below the next bin's first, so that interpolation never crosses from one to the other.
        keys = np.arange(len(tokens))[:, None] + np.append(probs[:-1], 1.0 - 1e-9)
        return LengthTable(
            name=str(data["name"]),
            source=str(data["source"]),
            prompt_probs=prompt_probs,
            prompt_tokens=prompt_tokens,
            output_keys=keys.ravel(),
            output_tokens=tokens.ravel(),
            num_bins=len(tokens),
            max_total_tokens=max_total,
            statistics=dict(data.get("statistics", {})),
        )
    except KeyError as error:
        raise ConfigError(f"{where}: missing field {error}") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None


def load_lengths(workload: str) -> LengthTable:
    """The table of a shipped workload by name, or of a JSON file by path; cached until the file changes."""
    data, path = read_workload(workload)
    if has_sessions(data):
        raise ConfigError(f"workload: expected a length distribution, got {workload!r}, which has sessions")
    return _parsed(path, *version_of(path))


def read_workload(workload: str) -> tuple[dict[str, Any], Path]:
    """The JSON object of a shipped workload by name, or of a file by path, and the file; cached until it changes."""
    path = DATA_DIR / f"{workload}.json" if workload in WORKLOADS else Path(workload)
    if workload not in WORKLOADS and path.suffix != ".json":
        known = ", ".join(WORKLOADS)
        raise ConfigError(f"workload: expected one of {known}, or a fitted .json file, got {workload!r}")
    try:
        return _read(path, *version_of(path)), path
    except OSError as error:
        raise ConfigError(f"workload: cannot read {path}: {error.strerror}") from None


def has_sessions(data: dict[str, Any]) -> bool:
    """Whether a workload's requests come in sessions, each after the one before it; ConfigError for another kind."""
    kind = data.get("kind", "lengths")
    if kind not in ("lengths", "sessions", "mixture"):
        raise ConfigError(f"kind: expected sessions or mixture, or none for a length distribution, got {kind!r}")
    return bool(kind != "lengths")


def is_mixture(data: dict[str, Any]) -> bool:
    """Whether a workload's sessions are those of several others (see `mixture`)."""
    return bool(data.get("kind") == "mixture")


@functools.lru_cache(maxsize=16)
def _read(path: Path, absolute: Path, version: tuple[int, ...]) -> dict[str, Any]:
    try:
        data = parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return data


@functools.lru_cache(maxsize=16)
def _parsed(path: Path, absolute: Path, version: tuple[int, ...]) -> LengthTable:
    return parse_lengths(_read(path, absolute, version), str(path))


def length_workloads() -> tuple[str, ...]:
    """Names of the shipped length distributions."""
    return tuple(name for name in WORKLOADS if not has_sessions(read_workload(name)[0]))


def describe_workloads() -> list[dict[str, Any]]:
    """One row per shipped workload: name, source, and p50/p90/p99/mean in tokens.

    They are those of the trace that a length distribution was fitted to, and those of the draws of one with sessions.
    """
    tables = [read_workload(name)[0] for name in WORKLOADS]
    return [{"name": table["name"], "source": table["source"], **table["statistics"]} for table in tables]
