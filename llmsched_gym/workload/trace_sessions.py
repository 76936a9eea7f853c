"""Sessions of a trace: what its prompts have in common, and turns that come after the answer before them.

    python -m llmsched_gym.workload.trace_sessions WORKLOAD --out FILE.jsonl --qps RATE

writes drawn sessions as a trace in LLMServingSim's form.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from llmsched_gym.config import ConfigError, Scenario
from llmsched_gym.files import replace_file
from llmsched_gym.workload.identity import Shares, shares_of_ids
from llmsched_gym.workload.sessions import Sessions
from llmsched_gym.workload.streams import HINT_STREAM, SESSION_STREAM, rng
from llmsched_gym.workload.table import RequestTable
from llmsched_gym.workload.traces import Trace


def of_sessions(trace: Trace) -> Trace:
    """The first requests of a trace's sessions, which arrive when they do; a trace without think times as it is."""
    if trace.parent is None or trace.arrival_s is None:
        return trace
    roots = np.flatnonzero(trace.parent < 0)
    return dataclasses.replace(
        trace,
        arrival_s=trace.arrival_s[roots] - trace.arrival_s[roots[0]],
        prompt_tokens=trace.prompt_tokens[roots],
        output_tokens=trace.output_tokens[roots],
        session_id=None,
        shares=None,
        parent=None,
        think_s=None,
    )


def shares_of_rows(trace: Trace, first: int, n: int) -> Shares:
    """``shares_with`` and ``shared_tokens`` of `n` rows from `first` on, as indices from 0.

    A trace that starts over has other prompts then.
    """
    assert trace.shares is not None
    lap, row = np.divmod(np.arange(first, first + n), len(trace))
    with_, tokens = (array[row] for array in trace.shares)
    shares_with = np.where(with_ >= 0, with_.astype(np.int64) + lap * len(trace) - first, -1)
    if trace.ids is not None and first % len(trace) > 0:
        # Who was first in the file is not who is first here.
        own = lap == lap[0]
        found, tokens[own] = shares_of_ids(
            [trace.ids[r] for r in row[own]], trace.prompt_tokens[row[own]], trace.block_tokens
        )
        shares_with[own] = found
    gone = shares_with < 0
    return np.where(gone, -1, shares_with).astype(np.int32), np.where(gone, 0, tokens).astype(np.int32)


class TraceSessions:
    """The sessions of a trace from its `first` on, over and over; without one, random ones of them."""

    def __init__(self, trace: Trace, seed: int, max_model_len: int, first: int | None) -> None:
        assert trace.parent is not None and trace.think_s is not None and trace.shares is not None
        self._seed, self._first = seed, first
        parent = trace.parent
        roots = np.flatnonzero(parent < 0)
        root = np.arange(len(parent))
        for r in np.flatnonzero(parent >= 0):
            root[r] = root[parent[r]]
        rows = np.argsort(root, kind="stable")  # sessions side by side, in order of their roots
        prompt, output = trace.prompt_tokens[rows], trace.output_tokens[rows]
        most = np.maximum(np.minimum(output.max(), max_model_len - prompt), output)
        nobody = np.full(len(roots), -1, np.int32)
        self.everyone = Sessions(  # of the file, in its order
            num_turns=np.bincount(np.searchsorted(roots, root), minlength=len(roots)),
            prefix_id=nobody,
            prefix_tokens=np.zeros_like(nobody),
            slo_draw=np.zeros(len(roots)),
            ttft_draw=np.zeros(len(roots)),
            prompt_tokens=prompt,
            new_tokens=prompt - trace.shares[1][rows],
            output_tokens=output,
            max_output_tokens=most.astype(np.int32),
            think_s=trace.think_s[rows],
            hint_draw=np.zeros(len(rows)),
        )

    def first(self, n: int) -> Sessions:
        """The first n sessions; a longer call repeats a shorter one exactly."""
        draws = rng(self._seed, SESSION_STREAM).random((n, 3))  # session, SLO class, TTFT class
        if self._first is None:
            rows = self.random_rows(draws)
        else:
            rows = np.arange(self._first, self._first + n) % len(self.everyone)
        return self.sessions(rows, draws, rng(self._seed, HINT_STREAM))

    def random_rows(self, draws: np.ndarray) -> np.ndarray:
        """Which sessions of the file uniforms of shape (n, 3) choose, int64 (n,)."""
        return np.asarray((draws[:, 0] * len(self.everyone)).astype(np.int64))

    def sessions(self, rows: np.ndarray, draws: np.ndarray, hints: np.random.Generator) -> Sessions:
        """The sessions of `rows` (n,) with the classes that `draws` (n, 3) give them."""
        chosen = self.everyone.select(rows)
        hint = hints.standard_normal(len(chosen.prompt_tokens))
        return dataclasses.replace(chosen, slo_draw=draws[:, 1], ttft_draw=draws[:, 2], hint_draw=hint)


def write_sessions(table: RequestTable, path: str | Path) -> None:
    """Write what is to come of a table of sessions in LLMServingSim's form, a session a line.

    A session is ``{"session_id", "arrival_time_ns", "sub_requests": [{"input_toks", "output_toks",
    "tool_duration_ns"}]}``; the last is the time from an answer to the next call. Raises :class:`ConfigError` for a
    table without sessions, or a place that cannot be written to.
    """
    if table.parent is None or table.think_s is None:
        raise ConfigError("table: expected one with sessions, got one without parents")
    path, parent, think_s = Path(path), table.parent, table.think_s
    try:
        replace_file(path, lambda partial: _write(table, parent, think_s, partial))
    except OSError as error:
        raise ConfigError(f"out: cannot write to {path}: {error.strerror}") from None


def _write(table: RequestTable, parent: np.ndarray, think_s: np.ndarray, path: Path) -> None:
    roots = np.flatnonzero(parent < 0)
    ends = np.append(roots[1:], len(table))
    with path.open("w", encoding="utf-8") as file:
        for start, end in zip(roots[table.num_past :].tolist(), ends[table.num_past :].tolist(), strict=True):
            pause_s = np.append(think_s[start + 1 : end], 0.0)
            calls = zip(table.prompt_tokens[start:end], table.output_tokens[start:end], pause_s, strict=True)
            session = {
                "session_id": str(table.session_id[start]),
                "arrival_time_ns": round(1e9 * float(table.arrival_s[start])),
                "sub_requests": [
                    {"input_toks": int(p), "output_toks": int(o), "tool_duration_ns": round(1e9 * float(s))}
                    for p, o, s in calls
                ],
            }
            file.write(json.dumps(session) + "\n")


def main(
    workload: Annotated[str, typer.Argument(help="A workload of sessions: a name or a JSON file.")],
    out: Annotated[Path, typer.Option(help="File of JSON lines to write.")],
    qps: Annotated[float, typer.Option(help="Sessions per second, Poisson.")] = 1.0,
    num_requests: Annotated[int, typer.Option(min=1, help="Turns, up to the end of a session.")] = 1000,
    max_model_len: Annotated[int, typer.Option(min=1, help="Longest prompt + output, tokens.")] = 8192,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write drawn sessions as a trace."""
    from llmsched_gym.workload.generate import make_table  # which stands on this module

    try:
        scenario = Scenario(
            workload=workload,
            qps=qps,
            num_requests=num_requests,
            max_model_len=max_model_len,
            warmup_s=0.0,
            arrivals_continue=False,
        )
        write_sessions(make_table(scenario, seed), out)
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
