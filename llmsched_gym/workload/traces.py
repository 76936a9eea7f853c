"""Request traces: files of arrival times and lengths, their format told by what is in them, every row accounted for.

Lengths are whole numbers >= 1. A row that breaks a rule is an error that names file, line and column; rows go only when
the caller asks for it (`on_invalid="drop"`), and are counted then. Blank lines are no rows. Files may be gzipped, and
are read a part at a time. That accounting runs through all of the reading, hence one long file.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import gzip
import io
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmsched_gym.config import ConfigError
from llmsched_gym.files import parse, version_of
from llmsched_gym.text import counted
from llmsched_gym.workload.identity import Shares, shares_of_chains, shares_of_ids
from llmsched_gym.workload.servegen import SPAN_S, draw_requests, is_servegen
from llmsched_gym.workload.trace_columns import parse_column, parse_ids, wrong_ids
from llmsched_gym.workload.trace_formats import (
    CACHED,
    CSV_FORMATS,
    IDS,
    JSON_FORMATS,
    SECONDS,
    TEXTS,
    THINK,
    BadRow,
    Row,
    TraceFormat,
    has_ids,
    json_columns,
    json_rows,
)

CHUNK_ROWS = 100_000  # rows held as text at a time

OnInvalid = Literal["raise", "drop"]


class TraceError(ConfigError):
    """A trace that cannot be used; the message is one line that names file, line and column."""


class TraceWarning(UserWarning):
    """Something about a trace that its user should know; one line."""


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests of a trace file sorted by arrival; arrays have shape (num_requests,) and are read-only."""

    name: str  # the file's name
    arrival_s: np.ndarray | None  # float64, seconds since the first arrival; None: the file has lengths only
    prompt_tokens: np.ndarray  # int32, >= 1
    output_tokens: np.ndarray  # int32, >= 1
    session_id: np.ndarray | None  # int64, numbered by first appearance, -1 where the file's field is empty
    format: str
    num_dropped: int = 0  # invalid rows left out because the caller asked for it
    num_steps_back: int = 0  # rows of the file whose time lies before the row above
    num_images: int = 0  # that came with the requests; nothing simulates them
    num_outside: int = 0  # requests that continue one which the file does not have
    # what prompts have in common, see workload.identity; None: the file does not say
    shares: Shares | None = None
    ids: tuple[np.ndarray, ...] | None = None  # of each prompt's blocks
    block_tokens: int = 0  # tokens in one of them; 0 without ids
    # a session's requests, each after the one before it has been answered; None: they come at times of their own
    parent: np.ndarray | None = None  # int32, the row before it in its session, -1 for its first
    think_s: np.ndarray | None = None  # float64, seconds from that row's answer; 0 for the first

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    @property
    def qps(self) -> float | None:
        """Mean arrival rate, 1/s; None without times, or when all requests arrive at once."""
        if self.arrival_s is None or not self.arrival_s[-1] > 0.0:
            return None
        return (len(self) - 1) / float(self.arrival_s[-1])

    def remarks(self) -> list[str]:
        """What a user of the file should know, a sentence each."""
        found = []
        if self.num_steps_back:
            many = f"{self.num_steps_back:,} time{'s' if self.num_steps_back > 1 else ''}"
            found.append(f"time runs backwards {many}, as where files were joined; the rows are sorted by time")
        if self.num_images:
            found.append(f"{self.num_images:,} images are not simulated; prompts have the tokens of ContextTokens only")
        if self.num_outside:
            many = f"{self.num_outside:,} request{'s continue' if self.num_outside > 1 else ' continues'}"
            found.append(f"{many} a chat that began outside the file; what it had there counts as new")
        return found

    @property
    def zero_gaps(self) -> float:
        """Share of gaps between arrivals that are 0, which is how rounded times look; 0 without times."""
        return float((np.diff(self.arrival_s) == 0.0).mean()) if self.arrival_s is not None and len(self) > 1 else 0.0


def load_trace(path: str | Path, on_invalid: OnInvalid = "raise") -> Trace:
    """Read a trace in one of the formats of docs/formats.md, or draw one from a folder of ServeGen's clients.

    Times that are out of order are sorted (stably), with a :class:`TraceWarning`; so are images that nobody simulates.
    `on_invalid="drop"` leaves out rows that break a rule, for instance BurstGPT's failures with 0 response tokens, and
    counts them in `num_dropped`. Raises :class:`TraceError`.
    """
    if on_invalid not in ("raise", "drop"):
        raise ValueError(f"on_invalid: expected raise or drop, got {on_invalid!r}")
    path = Path(path)
    if is_servegen(path):
        return _servegen(path)
    try:
        with open_text(path) as file:
            trace = _parse(path, file, on_invalid == "drop")
    except (OSError, EOFError, zlib.error) as error:  # damaged gzip raises any of them
        raise TraceError(f"{path}: cannot read: {getattr(error, 'strerror', None) or error}") from None
    except UnicodeDecodeError:
        raise TraceError(f"{path}: not a text file in UTF-8") from None
    for remark in trace.remarks():
        _warn(f"{path}: {remark}")
    return trace


def _warn(message: str) -> None:
    warnings.warn(message, TraceWarning, stacklevel=3)


def _servegen(path: Path) -> Trace:
    try:
        arrival_s, prompt, output, client, covered_s = draw_requests(path)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise TraceError(str(error)) from None
    if covered_s > SPAN_S:
        _warn(f"{path}: requests are drawn for the first hour of the {covered_s / 3600:.0f} that the folder covers")
    columns = {"time": arrival_s, "prompt": prompt, "output": output, "client": client}
    return _trace(path, TraceFormat("servegen", "prompt", "output", "time", session="client"), columns, 0)


def cached_trace(path: str | Path, on_invalid: OnInvalid = "raise") -> Trace:
    """`load_trace`, parsed again only when the file has changed."""
    path = Path(path)
    try:
        absolute, version = version_of(path)
    except OSError as error:
        raise TraceError(f"{path}: cannot read: {error.strerror}") from None
    return _cached(path, absolute, version, on_invalid)


@functools.lru_cache(maxsize=8)
def _cached(path: Path, absolute: Path, version: tuple[int, ...], on_invalid: OnInvalid) -> Trace:
    return load_trace(path, on_invalid)


def open_text(path: Path) -> io.TextIOBase:
    """A text file in UTF-8, gzipped or not."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    if zipped:
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _parse(path: Path, file: Iterable[str], drop: bool) -> Trace:
    first, lines = "", iter(file)
    counts: Counter[str] = Counter()
    header_line = 0
    while not first.strip():
        header_line += 1
        try:
            first = next(lines)
        except StopIteration:
            raise TraceError(f"{path}: the file is empty") from None
    if first.lstrip().startswith("{"):
        items = _json_items(path, first, lines, header_line)
        line, item = next(items)
        fmt = _detect_json(path, item, line)
        ids = has_ids(fmt, item)
        rows, names = json_rows(fmt, chain([(line, item)], items), ids, counts), json_columns(fmt, ids)
    else:
        header = [name.strip() for name in next(csv.reader([first]))]
        fmt = _detect(path, header, header_line)
        names = [*fmt.columns, *([fmt.session] if fmt.session in header else [])]
        pick = [header.index(name) for name in names]
        width = f"column {names[-1]!r}: more or fewer fields than in the header"
        fields = csv_rows(path, header, lines, header_line)
        rows = ((line, [row[i] for i in pick] if row else width) for line, row in fields)
    try:
        trace = _collect(path, fmt, names, rows, drop)
    except BadRow as error:
        raise TraceError(f"{path}: {error}") from None
    return dataclasses.replace(trace, num_outside=counts["outside"])


def _detect(path: Path, header: list[str], line: int) -> TraceFormat:
    for fmt in CSV_FORMATS:
        if set(fmt.columns) <= set(header):
            return fmt
    raise _unknown_header(path, header, line)


def _detect_json(path: Path, item: dict[str, Any], line: int) -> TraceFormat:
    for fmt in JSON_FORMATS:
        if set(fmt.keys) <= set(item):
            return fmt
    text = next((key for key in TEXTS if key in item), None)
    if text is not None:
        raise TraceError(f"{path}: line {line}: {text!r} holds text; expected lengths in tokens, as input_length")
    raise _unknown_header(path, list(item), line)


def _unknown_header(path: Path, header: list[str], line: int) -> TraceError:
    known = "; ".join(f"{fmt.name}: {','.join(fmt.columns)}" for fmt in CSV_FORMATS)
    first = {fmt.name: fmt for fmt in reversed(JSON_FORMATS)}
    known += "; in JSON lines, " + "; ".join(f"{name}: {','.join(fmt.keys)}" for name, fmt in first.items())
    shown = ",".join(header)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return TraceError(f"{path}: line {line}: unknown header {shown!r}; known columns are {known}")


def csv_rows(path: Path, header: list[str], lines: Iterator[str], before: int) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of every row; a row of the wrong width has no fields."""
    reader = csv.reader(lines)
    try:
        for row in reader:
            if row and (len(row) > 1 or row[0].strip()):
                yield before + reader.line_num, row if len(row) == len(header) else []
    except csv.Error as error:
        raise TraceError(f"{path}: line {before + reader.line_num}: not CSV: {error}") from None


def _json_items(path: Path, first: str, lines: Iterator[str], before: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every JSON line."""
    for line, text in enumerate(chain([first], lines), before):
        if not text.strip():
            continue
        try:
            item = parse(text)
        except ValueError as error:
            raise TraceError(f"{path}: line {line}: not JSON: {error}") from None
        if not isinstance(item, dict):
            raise TraceError(f"{path}: line {line}: expected a JSON object, got {text.strip()[:40]!r}")
        yield line, item


def _collect(path: Path, fmt: TraceFormat, names: list[str], rows: Iterator[Row], drop: bool) -> Trace:
    values: list[list[np.ndarray]] = [[] for _ in names]  # per column, one array per chunk
    num_rows = num_dropped = 0
    while chunk := list(islice(rows, CHUNK_ROWS)):
        num_rows += len(chunk)
        whole = [(line, row) for line, row in chunk if not isinstance(row, str)]
        if len(whole) < len(chunk) and not drop:
            line, what = next((line, row) for line, row in chunk if isinstance(row, str))
            raise TraceError(f"{path}: line {line}{', ' if what.startswith('column') else ': '}{what}")
        parsed = [parse_column(fmt, name, [row[j] for _, row in whole]) for j, name in enumerate(names) if name != IDS]
        if names[-1] == IDS:
            prompts, known, _ = parsed[names.index(fmt.prompt)]
            parsed.append(parse_ids(fmt, [row[-1] for _, row in whole], np.where(known, prompts, 1.0)))
        valid = np.logical_and.reduce([ok for _, ok, _ in parsed])
        if not valid.all() and not drop:
            row = int(np.argmin(valid))
            j = next(j for j, (_, ok, _) in enumerate(parsed) if not ok[row])
            line, fields = whole[row]
            if names[j] == IDS:
                raise TraceError(f"{path}: line {line}, column {IDS!r}: {wrong_ids(fmt, fields[j], int(prompts[row]))}")
            got = fields[j] if len(fields[j]) <= 40 else fields[j][:37] + "..."
            raise TraceError(f"{path}: line {line}, column {names[j]!r}: expected {parsed[j][2]}, got {got!r}")
        num_dropped += len(chunk) - int(valid.sum())
        for column, (array, _, _) in zip(values, parsed, strict=True):
            column.append(array[valid])
    if num_rows == num_dropped:
        what = f"{counted(num_rows, 'row')}, and all are invalid" if num_rows else "no rows behind the header"
        raise TraceError(f"{path}: {what}")
    columns = {name: np.concatenate(column) for name, column in zip(names, values, strict=True)}
    return _trace(path, fmt, columns, num_dropped)


def _trace(path: Path, fmt: TraceFormat, columns: dict[str, np.ndarray], num_dropped: int) -> Trace:
    order: np.ndarray | slice = slice(None)
    arrival_s = session_id = None
    steps_back = 0
    if fmt.time is not None:
        steps_back = int((np.diff(columns[fmt.time]) < 0).sum()) if fmt.keeps_order else 0
        order = np.argsort(columns[fmt.time], kind="stable")
        times = columns[fmt.time][order]
        # Subtract before scaling: nanoseconds since 1970 do not fit into a float.
        arrival_s = (times - times[0]) * SECONDS[fmt.time_kind]
    if fmt.session is not None and fmt.session in columns:
        import pandas as pd

        session_id = pd.factorize(columns[fmt.session][order])[0].astype(np.int64)
    prompt, output = (columns[name][order].astype(np.int32) for name in (fmt.prompt, fmt.output))
    ids = parent = think_s = shares = None
    if IDS in columns:
        ids = tuple(columns[IDS][order])
        shares = shares_of_ids(ids, prompt, fmt.block_tokens)
    elif fmt.chained and session_id is not None:
        gaps = columns[THINK][order] if fmt.closed else None
        parent = _rows_before(session_id)
        if gaps is not None:
            parent = np.where(np.isnan(gaps), -1, parent).astype(np.int32)  # those that come at times of their own
        shares = shares_of_chains(parent, prompt, output, columns[CACHED][order] if CACHED in columns else None)
        if gaps is not None and (parent >= 0).any():
            think_s = np.where(parent < 0, 0.0, gaps)
    for array in (arrival_s, prompt, output, session_id, parent, think_s, *(shares or ())):
        if array is not None:
            array.setflags(write=False)
    return Trace(
        name=path.name,
        arrival_s=arrival_s,
        prompt_tokens=prompt,
        output_tokens=output,
        session_id=session_id,
        format=fmt.name,
        num_dropped=num_dropped,
        num_steps_back=steps_back,
        num_images=int(columns[fmt.images].sum()) if fmt.images else 0,
        shares=shares,
        ids=ids,
        block_tokens=fmt.block_tokens if ids is not None else 0,
        parent=parent if think_s is not None else None,
        think_s=think_s,
    )


def _rows_before(session_id: np.ndarray) -> np.ndarray:
    """The row before each one in its session, -1 for its first, int32."""
    rows = np.argsort(session_id, kind="stable")
    parent = np.full(len(rows), -1, np.int32)
    same = (session_id[rows[1:]] == session_id[rows[:-1]]) & (session_id[rows[1:]] >= 0)
    parent[rows[1:][same]] = rows[:-1][same]
    return parent
