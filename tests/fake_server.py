"""A small server that speaks the OpenAI API as a test tells it to, and notes when it wrote what.

It runs in a thread of its own, on the process' one monotonic clock. Every request is told by how many tokens it asks
for, so that a test gives each its own plan.
"""

import asyncio
import json
import threading
import time
from dataclasses import dataclass, field

MODEL = "fake"


@dataclass
class Plan:
    """How a request is answered: delays before each chunk, and what goes wrong."""

    ttft_s: float = 0.02
    itl_s: float = 0.01
    per_chunk: int = 1  # tokens of a chunk
    tokens: int | None = None  # in all; None: as many as asked for
    status: int = 200
    fault: str = ""  # close, hang, bad json, error event, no stream, no end
    fault_after: int = 0  # tokens
    finish_reason: str = "length"


@dataclass
class Log:
    """What the server did with one request, on time.monotonic()."""

    body: dict
    arrived_s: float
    written: list = field(default_factory=list)  # (time_s, tokens) of each chunk
    is_gone: bool = False  # whether the client left before the end


class FakeServer:
    """A context manager; `plans` by number of tokens asked for, else `plan`."""

    def __init__(self, plan=None, plans=None, *, refuses=(), usage=True, ids=False, models=(MODEL,), metrics=True):
        self.plan, self.plans, self.refuses = plan or Plan(), plans or {}, refuses
        self.usage, self.ids, self.models, self.metrics = usage, ids, models, metrics
        self.logs, self.port = [], 0
        self.bounds = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.kill()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def of(self, max_tokens):
        """The log of the one request that asked for so many tokens."""
        (log,) = [log for log in self.logs if log.body["max_tokens"] == max_tokens]
        return log

    def start(self):
        ready, self.created_s = threading.Event(), time.time()

        def serve():
            async def main():
                self.loop, self.over, self.writers = asyncio.get_running_loop(), asyncio.Event(), set()
                server = await asyncio.start_server(self._connection, "127.0.0.1", self.port)
                self.port = server.sockets[0].getsockname()[1]
                ready.set()
                await self.over.wait()
                server.close()
                for writer in self.writers:
                    writer.transport.abort()

            asyncio.run(main())

        self.thread = threading.Thread(target=serve, daemon=True)
        self.thread.start()
        assert ready.wait(10)

    def kill(self):
        """Break all connections and listen no longer; `start` listens on the same port again."""
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.over.set)
            self.thread.join(10)

    async def _connection(self, reader, writer):
        self.writers.add(writer)
        try:
            while True:
                line = await reader.readline()
                if not line:
                    return
                method, path, _ = line.decode().split()
                length = 0
                while (header := await reader.readline()).strip():
                    name, _, value = header.decode().partition(":")
                    length = int(value) if name.lower() == "content-length" else length
                body = await reader.readexactly(length)
                if method == "GET":
                    await self._get(path, writer)
                else:
                    await self._complete(json.loads(body), reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.writers.discard(writer)
            writer.close()

    async def _say(self, writer, status, text, kind="application/json"):
        data = text.encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        await writer.drain()

    async def _get(self, path, writer):
        if path == "/v1/models":
            await self._say(writer, 200, json.dumps({"data": [{"id": name} for name in self.models]}))
        elif path == "/version":
            await self._say(writer, 200, json.dumps({"version": "1.2.3"}))
        elif path == "/metrics" and self.metrics:
            await self._say(writer, 200, self.exposition(), "text/plain")
        else:
            await self._say(writer, 404, json.dumps({"error": {"message": "no such page"}}))

    def exposition(self):
        """TTFT and ITL of what was written, as vLLM exposes them."""
        ttft = [log.written[0][0] - log.arrived_s for log in self.logs if log.written]
        itl = []
        for log in self.logs:
            for (a, _), (b, count) in zip(log.written, log.written[1:], strict=False):
                itl += [b - a] + [0.0] * (count - 1)
            itl += [0.0] * (log.written[0][1] - 1 if log.written else 0)
        lines = []
        for name, values in (("time_to_first_token", ttft), ("inter_token_latency", itl)):
            metric = f"vllm:{name}_seconds"
            lines += [f"# HELP {metric} x", f"# TYPE {metric} histogram"]
            for bound in (*self.bounds, float("inf")):
                le = "+Inf" if bound == float("inf") else bound
                count = sum(v <= bound for v in values)
                lines.append(f'{metric}_bucket{{engine="0",le="{le}",model_name="{MODEL}"}} {count}.0')
            lines.append(f'{metric}_count{{engine="0",model_name="{MODEL}"}} {len(values)}.0')
            lines += [
                f"# TYPE {metric}_created gauge",
                f'{metric}_created{{engine="0",model_name="{MODEL}"}} {self.created_s}',
            ]
            lines.append(f'{metric}_sum{{engine="0",model_name="{MODEL}"}} {sum(values)}')
        return "\n".join(lines) + "\n"

    async def _complete(self, body, reader, writer):
        log = Log(body, time.monotonic())
        refused = [
            name for name in self.refuses if name in body or (name == "ids" and isinstance(body["prompt"], list))
        ]
        if refused:
            await self._say(writer, 400, json.dumps({"error": {"message": f"unknown field {refused[0]}"}}))
            return
        self.logs.append(log)
        plan = self.plans.get(body["max_tokens"], self.plan)
        if plan.status != 200:
            await self._say(writer, plan.status, json.dumps({"error": {"message": "out of order"}}))
            return
        if plan.fault == "no stream":
            await self._say(writer, 200, json.dumps({"choices": [{"text": "all at once"}]}))
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            await self._stream(body, plan, log, reader, writer)
        except ConnectionError:
            log.is_gone = True
            raise

    async def _stream(self, body, plan, log, reader, writer):
        async def event(data):
            text = f"data: {data}\n\n".encode()
            if writer.transport.is_closing():
                raise ConnectionResetError
            writer.write(f"{len(text):x}\r\n".encode() + text + b"\r\n")
            await writer.drain()

        options = body.get("stream_options") or {}
        total = body["max_tokens"] if plan.tokens is None else plan.tokens
        sent, due_s = 0, log.arrived_s + plan.ttft_s
        while sent < total:
            if plan.fault and sent >= plan.fault_after:
                if plan.fault == "close":
                    writer.transport.abort()
                    raise ConnectionResetError
                if plan.fault == "hang":
                    while not reader.at_eof():
                        await asyncio.sleep(0.01)
                    raise ConnectionResetError
                if plan.fault == "no end":
                    writer.write(b"0\r\n\r\n")
                    await writer.drain()
                    return
                await event("{no json" if plan.fault == "bad json" else json.dumps({"error": {"message": "it broke"}}))
                plan.fault = ""
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            count = min(plan.per_chunk, total - sent)
            due_s += plan.itl_s
            sent += count
            choice = {"index": 0, "text": " x" * count, "finish_reason": None}
            if sent == total:
                choice["finish_reason"] = plan.finish_reason
            if body.get("return_token_ids") and self.ids:
                choice["token_ids"] = list(range(7000 + sent - count, 7000 + sent))
            if "logprobs" in body:
                choice["logprobs"] = {"tokens": ["x"] * count}
            chunk = {"choices": [choice]}
            if options.get("continuous_usage_stats") and self.usage:
                chunk["usage"] = {"prompt_tokens": len(body["prompt"]), "completion_tokens": sent}
            log.written.append((time.monotonic(), count))
            await event(json.dumps(chunk))
        if options.get("include_usage") and self.usage:
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": sent}
            await event(json.dumps({"choices": [], "usage": usage}))
        await event("[DONE]")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
