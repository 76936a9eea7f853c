"""The client of an OpenAI-compatible server, on aiohttp: one event loop, a time for every chunk as it arrives.

Nothing is tried twice: a request that fails has failed.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import ssl
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from llmsched_gym.config import ConfigError
from llmsched_gym.serving.dialect import Dialect
from llmsched_gym.serving.stream import Answer, Events, ServerError, StreamError, message_of

ASK_S = 30.0  # for a question that is no completion
PROBE_S = 300.0  # for the first completion, before which a server may have to compile
TAIL_S = 10.0  # for what follows an answer's last token: usage, the end of the stream
PROBE_PROMPT_TOKENS, PROBE_OUTPUT_TOKENS = 8, 4


def base_of(url: str) -> str:
    """The address of a server without its ``/v1``; one line of error for what is none."""
    try:
        parts = urlsplit(url.strip())
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # half an IPv6 address, a port that is none
        is_address = False
    if not is_address:
        raise ConfigError(f"url: expected http://HOST:PORT, got {url!r}")
    return url.strip().rstrip("/").removesuffix("/v1")


class Client:
    """Connections to one server; an async context manager.

    `api_key` is sent as a bearer token. Connections are kept and as many as there are requests under way.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.base = base_of(url)
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None, sock_read=None),
            headers=self._headers,
        )
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._session.close()

    async def get(self, path: str) -> tuple[int, str]:
        """Status and text of what lies at a path; :class:`ServerError` where nobody answers."""
        try:
            async with asyncio.timeout(ASK_S), self._session.get(self.base + path) as response:
                return response.status, await response.text()
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise ServerError(f"url: no answer from {self.base}{path}: {why(error)}") from None

    async def round_trip_s(self, times: int = 20) -> float:
        """Median time of a question that costs the server nothing."""
        loop, found = asyncio.get_running_loop(), []
        for _ in range(times):
            start_s = loop.time()
            await self.get("/v1/models")
            found.append(loop.time() - start_s)
        return sorted(found)[times // 2]

    async def model(self, wanted: str | None) -> tuple[str, int | None]:
        """The served model, or the one that is wanted, with its context in tokens if the server says so."""
        where = f"{self.base}/v1/models"
        status, text = await self.get("/v1/models")
        if status != 200:
            raise ServerError(f"url: {where} says HTTP {status}: {_message(text)}")
        try:
            models = {item["id"]: item.get("max_model_len") for item in json.loads(text)["data"]}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ServerError(f"url: expected a list of models in JSON at {where}, got {text[:60]!r}") from None
        if not models:
            raise ServerError(f"url: {where} lists no model")
        if wanted is None:
            return next(iter(models.items()))
        if wanted not in models:
            raise ServerError(f"model: {wanted!r} is not served at {self.base}; it has {', '.join(models)}")
        return wanted, models[wanted]

    async def version(self) -> str:
        """What the server calls itself, empty if it does not say."""
        try:
            status, text = await self.get("/version")
            return str(json.loads(text)["version"]) if status == 200 else ""
        except (ServerError, ValueError, KeyError, TypeError):
            return ""

    async def dialect(self, model: str, known: Iterable[Dialect]) -> tuple[Dialect, Answer]:
        """The first of the known ways of asking that the server takes, and how it answered a short probe."""
        said = ""
        for dialect in known:
            low, high = dialect.ids or (0, 2)
            prompt = [low, high - 1] * (PROBE_PROMPT_TOKENS // 2)
            sent = dialect.prompt(_array(prompt))
            answer = Answer()
            try:
                async with asyncio.timeout(PROBE_S):
                    await self.ask(dialect.body(model, sent, PROBE_OUTPUT_TOKENS), answer)
            except TimeoutError:
                raise ServerError(f"url: {self.base} has not answered 4 tokens in {PROBE_S:g} s") from None
            if answer.status in (400, 405, 413, 422) and answer.reason:
                said = said or answer.reason
                continue
            if answer.reason:
                raise ServerError(f"url: {self.base}/v1/completions: {answer.reason}")
            if answer.ended_by is None and not answer.is_done:
                raise ServerError(f"url: {self.base}/v1/completions ends a stream without an end")
            if not answer.counts:
                continue  # without text, usage or ids nobody can tell tokens
            return dialect, answer
        raise ServerError(f"url: {self.base}/v1/completions takes none of our requests: {said or 'it sends no tokens'}")

    async def ask(
        self,
        body: bytes,
        answer: Answer,
        *,
        ttft_slo_s: float = math.inf,
        tbt_slo_s: float = math.inf,
        patience_s: float = math.inf,
    ) -> None:
        """Send one request and note in `answer` what comes of it; errors are noted, too.

        The client gives up once its lateness over all waits has reached `patience_s`.
        """
        loop = asyncio.get_running_loop()
        answer.sent_s = loop.time()
        events = Events()
        limit = asyncio.timeout_at(_when(answer.sent_s + ttft_slo_s + patience_s))
        headers = {"Content-Type": "application/json"}
        try:
            async with limit, self._session.post(f"{self.base}/v1/completions", data=body, headers=headers) as response:
                answer.status = response.status
                if response.status != 200:
                    answer.reason = f"HTTP {response.status}: {_message(await response.text())}"
                elif response.content_type != "text/event-stream":
                    answer.reason = f"the server does not stream: it sent {response.content_type}"
                else:
                    waits_from_s, slo_s = answer.sent_s, ttft_slo_s
                    async for received in response.content.iter_any():
                        now_s = loop.time()
                        came = [answer.read(data, now_s) for data in events.feed(received)]
                        if any(came):
                            answer.lateness_s += max(0.0, now_s - waits_from_s - slo_s)
                            waits_from_s, slo_s = now_s, tbt_slo_s
                            limit.reschedule(_when(now_s + slo_s + patience_s - answer.lateness_s))
                        if answer.ended_by is not None:
                            limit.reschedule(now_s + TAIL_S)
        except TimeoutError as error:
            if not limit.expired():
                answer.reason = f"connection lost: {why(error)}"
            elif answer.ended_by is None:
                answer.is_abandoned = True
                answer.lateness_s = patience_s
        except StreamError as error:
            answer.reason = str(error)
        except aiohttp.ClientConnectorError as error:
            answer.reason = f"no connection: {why(error)}"
        except (aiohttp.ClientError, OSError):
            pass  # the stream has no end, by which `Answer.settle` tells that it was cut off
        answer.ended_s = loop.time()


def _when(time_s: float) -> float | None:
    return time_s if time_s < math.inf else None


def _array(tokens: list[int]) -> Any:
    import numpy as np

    return np.asarray(tokens, np.int64)


def _message(text: str) -> str:
    try:
        return message_of(json.loads(text))
    except ValueError:
        return " ".join(text.split())[:120] or "nothing"


def why(error: BaseException) -> str:
    """A failed connection in a few words."""
    if isinstance(error, aiohttp.ClientConnectorError):
        inner = error.os_error
        if isinstance(inner, ssl.SSLError):
            return f"TLS: {inner.reason or inner}"
        return os.strerror(inner.errno) if inner.errno and inner.errno > 0 else str(inner)
    if isinstance(error, TimeoutError):
        return "it takes too long"
    return " ".join(str(error).split())[:160] or type(error).__name__
