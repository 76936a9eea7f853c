"""A streamed answer: server-sent events, and how many tokens each chunk carries, as far as the server says so."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from llmsched_gym.config import ConfigError

COUNTED_BY = ("token ids", "usage", "logprobs", "total", "chunk")
"""How tokens of a chunk are known, best first: `total` tells how many there were in all, `chunk` nothing."""
TOTAL, CHUNK = COUNTED_BY.index("total"), COUNTED_BY.index("chunk")

DONE = b"[DONE]"


class ServerError(ConfigError):
    """A server that cannot be measured; the message is one line that names it."""


class StreamError(Exception):
    """A stream that is no answer; the message is one line."""


class Events:
    """Server-sent events, as bytes arrive: only the data of each, in order."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> list[bytes]:
        """The data of all events that these bytes complete; the beginning of another is kept."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        found = []
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                found.append(b"\n".join(self._data))
                self._data = []
        return found


@dataclass(eq=False)
class Answer:
    """What became of one request, on one clock: times are seconds, nan until known."""

    sent_s: float = math.nan  # when it was handed to the network
    ended_s: float = math.nan  # when it was finished, failed or given up
    chunk_s: list[float] = field(default_factory=list)  # arrival of each chunk that carries tokens
    counts: list[int] = field(default_factory=list)  # tokens of each of these; 1 where nobody says
    num_tokens: int = 0  # of all of these
    total_tokens: int | None = None  # of the whole answer, where the server says so
    counted_by: int = 0  # of COUNTED_BY, the worst of its chunks
    ended_by: str | None = None  # the server's finish_reason
    is_done: bool = False  # the stream was ended by the server, as it should be
    is_abandoned: bool = False  # the client's patience ran out
    status: int | None = None  # of HTTP
    reason: str = ""  # why it failed
    prompt_tokens: int | None = None  # as the server counted them
    token_ids: list[int] = field(default_factory=list)
    lateness_s: float = 0.0  # of all waits for a chunk that are over

    @property
    def last_s(self) -> float:
        """When the last token came, nan before the first."""
        return self.chunk_s[-1] if self.chunk_s else math.nan

    def read(self, data: bytes, now_s: float) -> bool:
        """Take in one event; True if it carries tokens. :class:`StreamError` for one that is no part of an answer."""
        if data == DONE:
            self.is_done = True
            return False
        try:
            event = json.loads(data)
        except ValueError:
            raise StreamError("the stream holds what is no JSON") from None
        if not isinstance(event, dict):
            raise StreamError("the stream holds what is no JSON object")
        if event.get("error"):
            raise StreamError(f"the server says: {message_of(event)}")
        choices, usage = event.get("choices"), event.get("usage")
        if isinstance(usage, dict):
            self.prompt_tokens = usage.get("prompt_tokens", self.prompt_tokens)
        if not choices:
            if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
                self.total_tokens = usage["completion_tokens"]
            return False
        choice = choices[0]
        if not isinstance(choice, dict):
            raise StreamError("the stream holds a choice that is no JSON object")
        if choice.get("finish_reason"):
            self.ended_by = str(choice["finish_reason"])
        count, how = self._count(choice, usage)
        if count <= 0:
            return False
        self.counted_by = max(self.counted_by, how)
        self.chunk_s.append(now_s)
        self.counts.append(count)
        self.num_tokens += count
        return True

    def _count(self, choice: dict[str, Any], usage: Any) -> tuple[int, int]:
        """Tokens of a chunk, and which of COUNTED_BY told."""
        ids = choice.get("token_ids")
        if isinstance(ids, list):
            self.token_ids += ids
            return len(ids), 0
        if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
            self.total_tokens = usage["completion_tokens"]
            # a usage that comes with the last chunk alone tells the total, not who had how many
            return self.total_tokens - self.num_tokens, TOTAL if self.counted_by == CHUNK else 1
        logprobs = choice.get("logprobs")
        if isinstance(logprobs, dict) and isinstance(logprobs.get("tokens"), list):
            return len(logprobs["tokens"]), 2
        return int(bool(choice.get("text"))), CHUNK

    def settle(self, expected: int) -> None:
        """Judge an answer that has ended, of which `expected` tokens were asked for: sets `reason` if it failed.

        Where the total is known and not who carried how many, the last chunk is taken to have had the rest: the gaps
        between tokens are the same whichever it was, a deadline for each token is not.
        """
        ended = self.is_done or self.ended_by is not None
        if ended and self.counted_by == CHUNK and self.counts:
            total = expected if self.total_tokens is None and self.ended_by == "length" else self.total_tokens
            if total is not None and total >= self.num_tokens:
                self.counts[-1] += total - self.num_tokens
                self.num_tokens = total
                self.counted_by = TOTAL
        if self.reason or self.is_abandoned:
            return
        came = self.num_tokens
        if not ended:
            self.reason = f"disconnected after {came} of {expected} tokens" if came else "disconnected before a token"
        elif came < expected:
            self.reason = f"short: {came} of {expected} tokens ({self.ended_by or 'no reason given'})"
        elif came > expected:
            self.reason = f"long: {came} of {expected} tokens"


def message_of(event: Any) -> str:
    """What a server's error says, in one line."""
    error = event.get("error", event) if isinstance(event, dict) else event
    text = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(text).split())[:300]
