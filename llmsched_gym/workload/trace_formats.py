"""The known formats of trace files: what each is recognised by, and its rows as text.

A row is (line of the file, one text per column of the format); it has no texts where it cannot be read as one. A file
of sessions gives a row for each model call. docs/formats.md describes the formats.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Row = tuple[int, list[str]]
"""Line number and fields."""

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

    @property
    def columns(self) -> list[str]:
        """The columns that must be there."""
        needed = (self.time, self.prompt, self.output, self.images)
        return [name for name in needed if name is not None]

    @property
    def keeps_order(self) -> bool:
        """Whether rows are written as they arrive; files of sessions go back in time from one to the next."""
        return self.name not in ("copilot", "tracelab", "llmservingsim", "servegen")


CSV_FORMATS = (
    TraceFormat("azure-lmm", "ContextTokens", "GeneratedTokens", "TIMESTAMP", "datetime", images="NumImages"),
    TraceFormat("azure", "ContextTokens", "GeneratedTokens", "TIMESTAMP", "datetime"),
    TraceFormat("burstgpt", "Request tokens", "Response tokens", "Timestamp", "s", "Session ID"),
    TraceFormat("vidur", "num_prefill_tokens", "num_decode_tokens", "arrived_at", "s"),
    TraceFormat("lengths", "num_prefill_tokens", "num_decode_tokens"),
)
"""Formats of CSV files; the first whose columns are all in the header is taken."""

BAILIAN = TraceFormat("bailian", "input_length", "output_length", "timestamp", "s", "chat", keys=("chat_id",))
COPILOT = TraceFormat(
    "copilot", "tokens.prompt", "tokens.completion", "timestamp", "datetime", "session_id", keys=("session_id", "turns")
)
TRACELAB = TraceFormat(
    *("tracelab", "input_tokens_total", "output_tokens", "timing_events", "datetime", "session_id"),
    keys=("newly_append_tokens",),
)
SESSIONS = TraceFormat(
    "llmservingsim", "input_toks", "output_toks", "arrival_time_ns", "ns", "session_id", keys=("sub_requests",)
)
JSON_FORMATS = (
    BAILIAN,
    COPILOT,
    TRACELAB,
    SESSIONS,
    TraceFormat(
        *("llmservingsim", "input_toks", "output_toks", "arrival_time_ns", "ns", "session_id"), keys=("input_toks",)
    ),
    TraceFormat("mooncake", "input_length", "output_length", "timestamp", "ms", keys=("input_length",)),
    TraceFormat("mooncake", "input_length", "output_length", "timestamp", "ms", keys=("output_length",)),
)
"""Formats of JSON lines; the first whose keys are all in the first object is taken."""

TEXTS = ("text_input", "messages", "payload")
"""Keys of dialects that hold text in place of lengths."""


def text(value: Any) -> str:
    """A JSON value as a field; a string as it is."""
    return value if isinstance(value, str) else json.dumps(value)


def _field(item: Any, name: str) -> str:
    return text(item[name]) if isinstance(item, dict) and name in item else ""


def json_rows(fmt: TraceFormat, items: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[Row]:
    """The rows of a file's objects, columns as in `json_columns`."""
    calls: Callable[[dict[str, Any]], Iterator[list[str]]] = {
        "bailian": _Chats().row,
        "copilot": _copilot,
        "tracelab": _tracelab,
        "llmservingsim": _sessions,
    }.get(fmt.name, lambda item: _plain(fmt, item))
    for line, item in items:
        for row in calls(item):
            yield line, row


def json_columns(fmt: TraceFormat) -> list[str]:
    """The fields that a trace of that format is read from."""
    return [*fmt.columns, *([fmt.session] if fmt.session else [])]


def _plain(fmt: TraceFormat, item: dict[str, Any]) -> Iterator[list[str]]:
    yield [_field(item, name) for name in fmt.columns]


class _Chats:
    """Bailian's chats: a turn names its parent, and a chat is called after its first turn known of."""

    def __init__(self) -> None:
        self._root: dict[str, str] = {}  # of each turn seen

    def row(self, item: dict[str, Any]) -> Iterator[list[str]]:
        turn, parent = _field(item, "chat_id"), _field(item, "parent_chat_id")
        # some parents lie outside the file: their chat is called after them
        root = turn if parent in ("", "-1") else self._root.get(parent, parent)
        self._root[turn] = root
        yield [*next(_plain(BAILIAN, item)), root]


def _copilot(item: dict[str, Any]) -> Iterator[list[str]]:
    """A row for each model call of a session. `prompt` includes what was cached; a call that failed is an empty row."""
    for turn in item.get("turns") or []:
        for call in (turn.get("llm_calls") or []) if isinstance(turn, dict) else []:
            tokens = call.get("tokens") if isinstance(call, dict) else None
            status = str(call.get("status_code", 200)) if isinstance(call, dict) else ""
            if not status.startswith("2"):
                yield []
                continue
            row = [_field(call, "timestamp"), _field(tokens, "prompt"), _field(tokens, "completion")]
            yield [*row, _field(item, "session_id")]


INPUTS = ("user_message", "tool_result")


def _tracelab(item: dict[str, Any]) -> Iterator[list[str]]:
    """A round begins when the last of the inputs it starts from is there."""
    events = [e for e in item.get("timing_events") or [] if isinstance(e, dict) and e.get("timestamp")]
    started_s = _field(events[0], "timestamp") if events else ""
    for event in events:
        if event.get("event_type") not in INPUTS:
            break
        started_s = _field(event, "timestamp")
    session = f"{_field(item, 'provider')} {_field(item, 'session_id')}"
    yield [started_s, _field(item, TRACELAB.prompt), _field(item, TRACELAB.output), session]


def _sessions(item: dict[str, Any]) -> Iterator[list[str]]:
    """Calls of a session follow each other after the tools' time, as if serving them took none."""
    session, arrival = _field(item, "session_id"), item.get("arrival_time_ns")
    calls = item.get("sub_requests")
    if calls is None:
        yield [_field(item, name) for name in ("arrival_time_ns", "input_toks", "output_toks")] + [session]
        return
    for call in calls if isinstance(calls, list) else [None]:
        yield [text(arrival), _field(call, "input_toks"), _field(call, "output_toks"), session]
        pause = call.get("tool_duration_ns", 0) if isinstance(call, dict) else 0
        if isinstance(arrival, int | float) and isinstance(pause, int | float):
            arrival += pause
