"""Measured serving runs: when each request came, and when a real server gave its first and its last token.

Read from a CSV file of times on one clock, or from what ``vllm bench serve --save-result --save-detailed`` writes; the
content tells which. Files may be gzipped. Every row counts: one that breaks a rule is an error that names it.
"""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_gym.files import parse
from llmsched_gym.text import counted, shown
from llmsched_gym.workload.trace_columns import MAX_TOKENS
from llmsched_gym.workload.traces import TraceError, TraceWarning, csv_rows, open_text

CSV_COLUMNS = ("input_toks", "output_toks", "queued_s", "scheduled_s", "first_token_s", "last_token_s")
TOKEN_COLUMNS = CSV_COLUMNS[:2]
BENCH_KEYS = ("input_lens", "output_lens", "start_times", "ttfts", "itls")
BENCH = "vllm bench serve --save-result --save-detailed"
CLOCK_S, SPAN_S, LEAST_TTFT_S = 1e11, 1e8, 1e-6
"""What a clock may show at most, the longest that a run may last, the least TTFT: others are no seconds."""
EXPECTED = f"expected a CSV file with {','.join(CSV_COLUMNS)}, or the JSON of `{BENCH}`"


@dataclass(frozen=True, eq=False)
class ServedRun:
    """Finished requests of a serving run in order of arrival; arrays have shape (num_requests,).

    Times are float64, seconds since the first arrival. A run of the simulator has the same form.
    """

    name: str  # the file's name
    row: np.ndarray  # int64, where the file has it: line of a CSV file, index in the lists of a JSON file
    prompt_tokens: np.ndarray  # int32, >= 1
    output_tokens: np.ndarray  # int32, >= 1
    arrival_s: np.ndarray
    scheduled_s: np.ndarray  # when it first ran; nan where the file does not say
    first_token_s: np.ndarray  # > arrival_s
    last_token_s: np.ndarray  # >= first_token_s
    num_failed: int = 0  # requests of the file that failed and are left out
    unit: str = "line"  # what `row` counts
    itl_s: tuple[np.ndarray, ...] | None = None  # of each request, the gaps between its chunks, if the file has them
    failed_arrival_s: np.ndarray | None = None  # of those that failed, (num_failed,), if the file has them
    failed_prompt_tokens: np.ndarray | None = None  # int32, (num_failed,)

    def __len__(self) -> int:
        return len(self.arrival_s)

    def where(self, r: int) -> str:
        """Request r as a person finds it in the file."""
        return f"{self.unit} {self.row[r]} of {self.name}"

    @property
    def ttft_s(self) -> np.ndarray:
        """Arrival to first token, (num_requests,)."""
        return self.first_token_s - self.arrival_s

    @property
    def queue_time_s(self) -> np.ndarray:
        """Arrival to first scheduled, (num_requests,)."""
        return self.scheduled_s - self.arrival_s

    @property
    def tpot_s(self) -> np.ndarray:
        """(last - first) / (n - 1); nan where all tokens came at once, as one alone does."""
        lasted_s = self.last_token_s - self.first_token_s
        apart = (self.output_tokens > 1) & (lasted_s > 0.0)
        return np.where(apart, lasted_s / np.maximum(self.output_tokens - 1, 1), np.nan)

    @property
    def e2e_latency_s(self) -> np.ndarray:
        """Arrival to last token, (num_requests,)."""
        return self.last_token_s - self.arrival_s

    @property
    def end_s(self) -> float:
        """When the run's last token came."""
        return float(self.last_token_s.max())


def load_run(path: str | Path) -> ServedRun:
    """Read a measured run; raises :class:`TraceError`, and warns (:class:`TraceWarning`) of failed requests."""
    path = Path(path)
    try:
        with open_text(path) as file:
            text = file.read()
    except (OSError, EOFError, zlib.error) as error:  # damaged gzip raises any of them
        raise TraceError(f"{path}: cannot read: {getattr(error, 'strerror', None) or error}") from None
    except UnicodeDecodeError:
        raise TraceError(f"{path}: not a text file in UTF-8") from None
    if not text.strip():
        raise TraceError(f"{path}: the file is empty")
    run = _from_bench(path, text) if text.lstrip()[0] in "{[" else _from_csv(path, text)
    if run.num_failed:
        many = f"{run.num_failed:,} of its {len(run) + run.num_failed:,} requests failed"
        left = "it is left out, and so is the load that it was"
        if run.num_failed > 1:
            left = "they are left out, and so is the load that they were"
        message = f"{path}: {many}: {left}"
        warnings.warn(message, TraceWarning, stacklevel=2)
    return run


def _from_csv(path: Path, text: str) -> ServedRun:
    lines = io.StringIO(text, newline="")
    before, first = next((i, line) for i, line in enumerate(lines, 1) if line.strip())
    header = [name.strip() for name in next(csv.reader([first]))]
    for name in CSV_COLUMNS:
        if name not in header:
            raise TraceError(f"{path}: line {before}: no column {name!r}; {EXPECTED}")
        if header.count(name) > 1:
            raise TraceError(f"{path}: line {before}: column {name!r} is there {header.count(name)} times")
    columns: dict[str, list[float]] = {name: [] for name in CSV_COLUMNS}
    row = []
    for line, fields in csv_rows(path, header, lines, before):
        if not fields:
            raise TraceError(f"{path}: line {line}, column {header[-1]!r}: more or fewer fields than in the header")
        values = dict(zip(header, fields, strict=True))
        earlier, earlier_s = "", -CLOCK_S
        for name, column in columns.items():
            where = f"{path}: line {line}, column {name!r}"
            if name in TOKEN_COLUMNS:
                column.append(_tokens(where, values[name]))
                continue
            time_s = _number(values[name])
            if time_s is None or not earlier_s <= time_s <= CLOCK_S:
                what = f"a time in seconds{f', not before {earlier}' if earlier else ''}, at most {CLOCK_S:g}"
                raise TraceError(f"{where}: expected {what}, got {shown(values[name])}")
            if name == "first_token_s" and time_s - columns["queued_s"][-1] < LEAST_TTFT_S:
                raise TraceError(f"{where}: expected a time after queued_s, got {shown(values[name])}")
            column.append(time_s)
            earlier, earlier_s = name, time_s
        row.append(line)
    if not row:
        raise TraceError(f"{path}: no rows behind the header")
    arrays = {name: np.array(column, np.float64) for name, column in columns.items()}
    tokens = [arrays[name] for name in TOKEN_COLUMNS]
    start_s = arrays["queued_s"].min()
    times = [arrays[name] - start_s for name in CSV_COLUMNS if name not in TOKEN_COLUMNS]
    return _run(path, row, *tokens, *times)


def _from_bench(path: Path, text: str) -> ServedRun:
    lists = _bench_lists(path, _bench_result(path, text))
    rows, columns, itl_s = [], [], []
    lost: list[tuple[float | None, float | None]] = []
    for i, (error, output) in enumerate(zip(lists["errors"], lists["output_lens"], strict=True)):
        if error or output == 0:
            lost.append((_number(lists["start_times"][i]), _number(lists["input_lens"][i])))
            continue
        where = {key: f"{path}: {key!r}, request {i}" for key in BENCH_KEYS}
        prompt, output = (_tokens(where[key], lists[key][i]) for key in ("input_lens", "output_lens"))
        begin_s, ttft_s = _number(lists["start_times"][i]), _number(lists["ttfts"][i])
        if begin_s is None or abs(begin_s) > CLOCK_S:
            what = f"expected a time in seconds, at most {CLOCK_S:g}"
            raise TraceError(f"{where['start_times']}: {what}, got {shown(lists['start_times'][i])}")
        if ttft_s is None or not LEAST_TTFT_S <= ttft_s <= SPAN_S:
            what = f"expected seconds from {LEAST_TTFT_S:g} to {SPAN_S:g}"
            raise TraceError(f"{where['ttfts']}: {what}, got {shown(lists['ttfts'][i])}")
        given = lists["itls"][i]
        gaps = [_number(gap) for gap in given] if isinstance(given, list) else [None]
        if not all(gap is not None and 0.0 <= gap <= SPAN_S for gap in gaps):
            what = f"expected a list of seconds from 0 to {SPAN_S:g}"
            raise TraceError(f"{where['itls']}: {what}, got {shown(given)}")
        rows.append(i)
        itl_s.append(np.array(gaps, np.float64))
        columns.append((prompt, output, begin_s, ttft_s, math.fsum(gap for gap in gaps if gap is not None)))
    if not rows:
        failed = f"{counted(len(lists['errors']), 'request')}, and all failed" if lists["errors"] else "no requests"
        raise TraceError(f"{path}: {failed}")
    prompts, outputs, begin, ttft, decoding = np.array(columns, np.float64).T
    arrival_s = begin - begin.min()
    first_s = arrival_s + ttft
    times = [arrival_s, np.full(len(rows), np.nan), first_s, first_s + decoding]
    # one that failed before it was sent may have no time: it is taken to have come first
    failed_s = np.array([begin.min() if time_s is None else time_s for time_s, _ in lost], np.float64)
    return _run(
        path,
        rows,
        prompts,
        outputs,
        *times,
        num_failed=len(lost),
        unit="request",
        itl_s=tuple(itl_s[i] for i in np.argsort(arrival_s, kind="stable")),
        failed_arrival_s=failed_s - begin.min(),
        failed_prompt_tokens=np.array([max(1, int(tokens or 1)) for _, tokens in lost], np.int32),
    )


def _bench_lists(path: Path, data: dict[str, Any]) -> dict[str, list[Any]]:
    """BENCH_KEYS and errors, a value for each request."""
    for key in BENCH_KEYS:
        if key not in data:
            why = ", without which nobody knows when requests arrived (vLLM saves them since January 2026)"
            what = f"expected what `{BENCH}` writes"
            raise TraceError(f"{path}: no {key!r}{why if key == 'start_times' else ''}: {what}")
    lists: dict[str, list[Any]] = {key: data[key] for key in BENCH_KEYS}
    lengths = {key: len(value) if isinstance(value, list) else -1 for key, value in lists.items()}
    lists["errors"] = data.get("errors", [""] * max(lengths.values()))  # without them nobody failed
    lengths["errors"] = len(lists["errors"]) if isinstance(lists["errors"], list) else -1
    for key, length in lengths.items():
        if length != max(lengths.values()):
            what = f"expected a list of {max(lengths.values()):,} values, one for each request"
            raise TraceError(f"{path}: {key!r}: {what}, got {length:,}" if length >= 0 else f"{path}: {key!r}: {what}")
    return lists


def _bench_result(path: Path, text: str) -> dict[str, Any]:
    try:
        data = parse(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # --append-result adds a line for each
            raise TraceError(f"{path}: line {error.lineno}: expected the result of one run, got several") from None
        raise TraceError(f"{path}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets as deep
        raise TraceError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise TraceError(f"{path}: expected a JSON object, got {shown(data)}; {EXPECTED}")
    return data


def _run(
    path: Path, row: list[int], prompt: np.ndarray, output: np.ndarray, *times: np.ndarray, **fields: Any
) -> ServedRun:
    """The run from columns as the file has them; times as in ServedRun."""
    order = np.argsort(times[0], kind="stable")
    arrival_s, scheduled_s, first_token_s, last_token_s = (time_s[order] for time_s in times)
    run = ServedRun(
        name=path.name,
        row=np.array(row, np.int64)[order],
        prompt_tokens=prompt[order].astype(np.int32),
        output_tokens=output[order].astype(np.int32),
        arrival_s=arrival_s,
        scheduled_s=scheduled_s,
        first_token_s=first_token_s,
        last_token_s=last_token_s,
        **fields,
    )
    if run.end_s > SPAN_S:
        last = run.where(int(np.argmax(last_token_s)))
        raise TraceError(f"{path}: expected a run of at most {SPAN_S:g} s, got {run.end_s:g} s up to {last}")
    return run


def _number(value: Any) -> float | None:
    """A finite number, of a JSON file or as text of a CSV file; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str) or "_" in str(value):
        return None  # Python would read 1_000
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _tokens(where: str, value: Any) -> int:
    number = _number(value)
    if number is None or not number.is_integer() or not 1 <= number <= MAX_TOKENS:
        raise TraceError(f"{where}: expected a whole number >= 1, got {shown(value)}")
    return int(number)
