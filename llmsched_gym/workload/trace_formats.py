"""The known formats of trace files: what each is recognised by, and its rows as text.

A row is (line of the file, one text per column of the format); where it cannot be read as one, a text that says why
takes the place of the fields. A file of sessions gives a row for each model call. docs/formats.md has the formats.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

Row = tuple[int, list[Any] | str]
"""Line number and fields, all texts but the ids of blocks, which are what the file has there; or what is wrong."""

THINK, CACHED = "think_s", "cached_tokens"
"""Columns made for sessions: seconds from the answer before to a call; tokens found in a cache when it was served."""


class BadRow(ValueError):
    """What is wrong with the file's rows together; begins with the line."""


SECONDS = {"s": 1.0, "ms": 1e-3, "ns": 1e-9, "datetime": 1e-9}
"""Of one unit of time, by kind; a date and time (ISO 8601) is counted in nanoseconds."""


@dataclass(frozen=True)
class TraceFormat:
    """Column names of a known format."""

    name: str
    prompt: str
    output: str
    time: str | None = None
    time_kind: str = "s"  # see SECONDS
    session: str | None = None  # optional column
    images: str | None = None  # a column that the header must have: of images, which nobody simulates
    keys: tuple[str, ...] = ()  # of a JSON format: the first object has all of them
    chained: bool = False  # a session's calls each continue the one before
    closed: bool = False  # ... and come a known time after its answer: the columns THINK and CACHED
    block_tokens: int = 0  # of a JSON format with ids of its prompts' blocks: their size

    @property
    def columns(self) -> list[str]:
        """The columns that must be there."""
        needed = (self.time, self.prompt, self.output, self.images)
        return [name for name in needed if name is not None]

    @property
    def keeps_order(self) -> bool:
        """Whether rows are written as they arrive; files of sessions go back in time from one to the next."""
        return self.name not in ("copilot", "tracelab", "llmservingsim", "servegen")

    @property
    def made(self) -> list[str]:
        """Columns that come with those of the file."""
        return [THINK, CACHED] if self.closed else []


CSV_FORMATS = (
    TraceFormat("azure-lmm", "ContextTokens", "GeneratedTokens", "TIMESTAMP", "datetime", images="NumImages"),
    TraceFormat("azure", "ContextTokens", "GeneratedTokens", "TIMESTAMP", "datetime"),
    TraceFormat("burstgpt", "Request tokens", "Response tokens", "Timestamp", "s", "Session ID", chained=True),
    TraceFormat("vidur", "num_prefill_tokens", "num_decode_tokens", "arrived_at", "s"),
    TraceFormat("lengths", "num_prefill_tokens", "num_decode_tokens"),
)
"""Formats of CSV files; the first whose columns are all in the header is taken."""

BAILIAN = TraceFormat(
    *("bailian", "input_length", "output_length", "timestamp", "s", "chat"), keys=("chat_id",), block_tokens=16
)
COPILOT = TraceFormat(
    *("copilot", "tokens.prompt", "tokens.completion", "timestamp", "datetime", "session_id"),
    keys=("session_id", "turns"),
    chained=True,
    closed=True,
)
TRACELAB = TraceFormat(
    *("tracelab", "input_tokens_total", "output_tokens", "timing_events", "datetime", "session_id"),
    keys=("newly_append_tokens",),
    chained=True,
    closed=True,
)
SESSIONS = TraceFormat(
    *("llmservingsim", "input_toks", "output_toks", "arrival_time_ns", "ns", "session_id"),
    keys=("sub_requests",),
    chained=True,
    closed=True,
)
MOONCAKE = TraceFormat(
    "mooncake", "input_length", "output_length", "timestamp", "ms", keys=("input_length",), block_tokens=512
)
JSON_FORMATS = (
    BAILIAN,
    COPILOT,
    TRACELAB,
    SESSIONS,
    dataclasses.replace(SESSIONS, keys=("input_toks",)),
    MOONCAKE,
    dataclasses.replace(MOONCAKE, keys=("output_length",)),
)
"""Formats of JSON lines; the first whose keys are all in the first object is taken."""

IDS = "hash_ids"
"""Key of the ids of a prompt's blocks."""
TEXTS = ("text_input", "messages", "payload")
"""Keys of dialects that hold text in place of lengths."""


def text(value: Any) -> str:
    """A JSON value as a field; a string as it is."""
    return value if isinstance(value, str) else json.dumps(value)


def _field(item: Any, name: str) -> str:
    return text(item[name]) if isinstance(item, dict) and name in item else ""


def _shown(value: Any) -> str:
    given = repr(value)
    return given if len(given) <= 40 else given[:37] + "..."


def _not_a_time(item: Any, name: str, unit: str = "milliseconds") -> str | None:
    """What is wrong with a time of the file, which need not be there."""
    value = item.get(name) if isinstance(item, dict) else None
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf):
        return None
    return f"expected {unit} >= 0, got {_shown(value)}"


def _items(item: Any, name: str) -> list[Any]:
    """A list of an object; empty where there is none."""
    found = item.get(name) if isinstance(item, dict) else None
    return found if isinstance(found, list) else []


def json_rows(
    fmt: TraceFormat, items: Iterator[tuple[int, dict[str, Any]]], ids: bool, counts: Counter[str]
) -> Iterator[Row]:
    """The rows of a file's objects, columns as in `json_columns`; raises :class:`BadRow`.

    Turns of Bailian's whose parents lie outside the file are added to `counts` as "outside".
    """
    calls: Callable[[dict[str, Any]], Iterator[list[Any] | str]] = {
        "bailian": _Chats(counts).row,
        "copilot": _copilot,
        "tracelab": _Rounds().row,
        "llmservingsim": _sessions,
    }.get(fmt.name, lambda item: _plain(fmt, item))
    for line, item in items:
        try:
            for row in calls(item):
                yield line, [*row, item.get(IDS)] if ids and not isinstance(row, str) else row
        except BadRow as error:
            raise BadRow(f"line {line}: {error}") from None


def json_columns(fmt: TraceFormat, ids: bool) -> list[str]:
    """The fields that a trace of that format is read from."""
    return [*fmt.columns, *([fmt.session] if fmt.session else []), *fmt.made, *([IDS] if ids else [])]


def has_ids(fmt: TraceFormat, item: dict[str, Any]) -> bool:
    """Whether a file whose first object is `item` says which blocks its prompts are made of."""
    return fmt.block_tokens > 0 and IDS in item


def _plain(fmt: TraceFormat, item: dict[str, Any]) -> Iterator[list[str]]:
    yield [_field(item, name) for name in fmt.columns]


class _Chats:
    """Bailian's chats: a turn names its parent, and a chat is called after its first turn known of."""

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts
        self._root: dict[str, str] = {}  # of each turn seen
        self._outside: dict[str, str] = {}  # parents that were not, and a turn that names each

    def row(self, item: dict[str, Any]) -> Iterator[list[str] | str]:
        turn, parent = _field(item, "chat_id"), _field(item, "parent_chat_id")
        if turn == parent:
            raise BadRow(f"chat_id {turn} is its own parent")
        if turn in self._outside:
            raise BadRow(f"chat_id {turn} comes behind chat_id {self._outside[turn]}, whose parent it is")
        if turn and turn in self._root:
            yield f"column 'chat_id': expected another one in every row, got {turn} again"
            return
        # some parents lie outside the file: their chat is called after them
        root = turn if parent in ("", "-1") else self._root.get(parent, parent)
        if root == parent and parent not in self._root:
            self._outside.setdefault(parent, turn)
            self._counts["outside"] += 1
        self._root[turn] = root
        yield [*next(_plain(BAILIAN, item)), root]


def _copilot(item: dict[str, Any]) -> Iterator[list[str] | str]:
    """A row for each model call of a session. `prompt` includes what was cached; a call that failed has no fields.

    A call's duration, their queueing among it, ends with its answer; the tools that follow take the time to the next.
    """
    calls = [call for turn in _items(item, "turns") for call in _items(turn, "llm_calls")]
    if not calls:
        yield f"column 'turns': expected a session with llm_calls, got {_shown(item.get('turns'))}"
    for batch in (batch for turn in _items(item, "turns") for batch in _items(turn, "tool_batches")):
        if wrong := _not_a_time(batch, "duration_ms"):
            yield f"column 'tool_batches.duration_ms': {wrong}"
    over_s = math.nan
    for call in sorted(calls, key=lambda call: _field(call, "timestamp")):
        tokens = call.get("tokens") if isinstance(call, dict) else None
        status = str(call.get("status_code", 200)) if isinstance(call, dict) else ""
        if not status.startswith("2"):
            yield "a call that did not succeed; leave such out with drop"
            continue
        if wrong := _not_a_time(call, "duration_ms"):
            yield f"column 'llm_calls.duration_ms': {wrong}"
            continue
        row = [_field(call, "timestamp"), _field(tokens, "prompt"), _field(tokens, "completion")]
        start_s, duration_ms = _seconds(row[0]), call.get("duration_ms")
        yield [*row, _field(item, "session_id"), _gap(over_s, start_s), _field(tokens, "cached")]
        over_s = start_s + 1e-3 * (duration_ms or 0.0)


INPUTS = ("user_message", "tool_result")


class _Rounds:
    """TraceLab's rounds. One begins when the last of the inputs it starts from is there."""

    def __init__(self) -> None:
        self._over_s: dict[str, float] = {}  # when each session's last round had written its answer

    def row(self, item: dict[str, Any]) -> Iterator[list[str] | str]:
        for tool in _items(item, "tools"):
            for name in (key for key in tool if key.endswith("_ms")) if isinstance(tool, dict) else ():
                if wrong := _not_a_time(tool, name):
                    yield f"column 'tools.{name}': {wrong}"
                    return
        if not _items(item, "timing_events"):
            yield f"column 'timing_events': expected the events of a round, got {_shown(item.get('timing_events'))}"
            return
        events = [e for e in _items(item, "timing_events") if isinstance(e, dict) and e.get("timestamp")]
        started = _field(events[0], "timestamp") if events else ""
        for event in events:
            if event.get("event_type") not in INPUTS:
                break
            started = _field(event, "timestamp")
        written = [_field(event, "timestamp") for event in events if event.get("event_type") not in INPUTS]
        session = f"{_field(item, 'provider')} {_field(item, 'session_id')}"
        gap = _gap(self._over_s.get(session, math.nan), _seconds(started))
        self._over_s[session] = _seconds(written[-1] if written else started)
        tokens = [_field(item, name) for name in (TRACELAB.prompt, TRACELAB.output)]
        yield [started, *tokens, session, gap, _field(item, "prefix_tokens")]


def _sessions(item: dict[str, Any]) -> Iterator[list[str] | str]:
    """Calls of a session follow each other after the tools' time, as if serving them took none."""
    session, arrival = _field(item, "session_id"), item.get("arrival_time_ns")
    calls = item.get("sub_requests")
    if calls is None:
        yield [*(_field(item, name) for name in ("arrival_time_ns", "input_toks", "output_toks")), session, "", ""]
        return
    if not isinstance(calls, list) or not calls:
        yield f"column 'sub_requests': expected a list of calls, got {_shown(calls)}"
        return
    gap = "0"
    for call in calls:
        if wrong := _not_a_time(call, "tool_duration_ns", "nanoseconds"):
            yield f"column 'sub_requests.tool_duration_ns': {wrong}"
            return
        yield [text(arrival), _field(call, "input_toks"), _field(call, "output_toks"), session, gap, ""]
        pause = call.get("tool_duration_ns", 0) if isinstance(call, dict) else 0
        gap = text(pause)
        if isinstance(arrival, int | float) and isinstance(pause, int | float):
            arrival += pause
            gap = repr(pause * 1e-9)


def _seconds(stamp: str) -> float:
    """Of a date and time (ISO 8601), since 1970; nan for anything else."""
    try:
        moment = datetime.fromisoformat(stamp)
    except ValueError:
        return math.nan
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _gap(over_s: float, start_s: float) -> str:
    """Seconds from an answer to the next call, 0 where that begins before it, and for a session's first."""
    gap_s = start_s - over_s
    return "0" if math.isnan(gap_s) else repr(max(gap_s, 0.0))
