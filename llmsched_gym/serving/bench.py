"""`llmsched serve-bench`: a grid of runs against one server, kept under a label beside those of other servers.

``DIR/servers/LABEL`` is a folder of results as `evaluate` leaves one, completed where an interrupted run stopped.
``DIR`` itself holds all labels that are complete, in the order of their names in ``config.json``: labels take the place
of policies, and are paired by seed, for the requests of a seed are the same for all.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_gym.config import ConfigError, Scenario
from llmsched_gym.evaluation.cells import Cell
from llmsched_gym.evaluation.grid import NUM_REQUESTS, Progress, finite, grid, seed_range
from llmsched_gym.evaluation.store import Store, claim_results
from llmsched_gym.serving import prometheus
from llmsched_gym.serving.client import Client
from llmsched_gym.serving.dialect import Dialect, dialects
from llmsched_gym.serving.join import check_same
from llmsched_gym.serving.labels import check_label, config_of, keep, label_folder
from llmsched_gym.serving.load import Run, offer
from llmsched_gym.serving.running import run_to_end
from llmsched_gym.serving.stream import COUNTED_BY, ServerError
from llmsched_gym.workload import RequestTable, make_table
from llmsched_gym.workload.generate import trace_remarks

REST_S = 0.5  # behind a run, for what its client has given up to be gone


@dataclass(frozen=True)
class Server:
    """What is measured and how; the fields of the command line."""

    url: str
    label: str
    model: str | None = None  # None: the first that the server lists
    send_slos: bool = False
    check_metrics: bool = False
    logprobs: bool = False  # ask for log-probabilities, where only they tell how many tokens a chunk has
    api_key: str | None = None


@dataclass(frozen=True)
class Found:
    """What a server turned out to be."""

    model: str
    context_tokens: int | None
    version: str
    dialect: Dialect
    remarks: list[str] = field(default_factory=list)

    @property
    def setup(self) -> str:
        """The server in words, the same whenever it is asked."""
        version = f", version {self.version}" if self.version else ""
        return f"{self.model}{version}; {self.dialect.words()}"


async def examine(server: Server, client: Client, *, goes_on: bool) -> Found:
    """Ask a server what it serves and takes; ServerError with one line if it cannot be measured.

    With `goes_on` prompts continue answers, whose token ids are asked for.
    """
    model, context = await client.model(server.model)
    dialect, answer = await client.dialect(model, dialects(token_ids=goes_on, logprobs=server.logprobs))
    remarks = []
    answer.settle(answer.num_tokens)
    if not dialect.fixed_length:
        remarks.append("the server takes neither ignore_eos nor min_tokens: answers that end by themselves are misses")
    if COUNTED_BY[answer.counted_by] == "chunk":
        remarks.append("the server does not say how many tokens a chunk carries: gaps are between chunks")
    if goes_on and not answer.token_ids:
        remarks.append("the server does not tell token ids: prompts that go on with an answer repeat only its length")
    if server.check_metrics:
        await prometheus.scrape(client, model)
    return Found(model, context, await client.version(), dialect, remarks)


async def run_once(
    server: Server,
    found: Found,
    scenario: Scenario,
    seed: int,
    resolved: Callable[[int, int], None] | None = None,
) -> Run:
    """One seed's requests offered to the server, with what else was measured beside them."""
    table = make_table(scenario, seed)
    nonce = int.from_bytes(os.urandom(4), "little")
    async with Client(server.url, server.api_key) as client:
        round_trip_s = await client.round_trip_s()
        before = await prometheus.scrape(client, found.model) if server.check_metrics else {}
        run = await offer(
            client,
            found.dialect,
            found.model,
            scenario,
            table,
            seed=seed,
            nonce=nonce,
            send_slos=server.send_slos,
            resolved=resolved,
        )
        run.counters["round_trip_p50_s"] = round_trip_s
        run.counters["metrics_agree"], run.counters["metrics"] = None, ""
        await asyncio.sleep(REST_S)
        if server.check_metrics:
            try:
                after = await prometheus.scrape(client, found.model)
                checked = [
                    prometheus.compare(name, seconds, after[name].less(before[name]))
                    for name, seconds in latencies(run).items()
                ]
                run.counters["metrics_agree"] = all(agreement.agrees for agreement in checked)
                run.counters["metrics"] = "\n".join(agreement.words() for agreement in checked)
            except ServerError as error:  # the run stands, whatever became of the server
                run.counters["metrics"] = str(error)
    return run


def warn_of_length(found: Found, tables: Sequence[RequestTable]) -> list[str]:
    """A remark if some request is longer than the server takes, where it says so."""
    longest = max(int((table.prompt_tokens + table.output_tokens).max(initial=0)) for table in tables)
    if found.context_tokens is None or longest <= found.context_tokens:
        return []
    return [f"the server takes {found.context_tokens:,} tokens, a request has {longest:,}: such are misses"]


def latencies(run: Run) -> dict[str, np.ndarray]:
    """TTFT and gaps between tokens of all requests of a run, warm-up and failures too, seconds; (n,) each."""
    ttft, gaps = [], [np.empty(0)]
    for answer in filter(None, run.answers):
        if answer.counts:
            ttft.append(answer.chunk_s[0] - answer.sent_s)
            gaps.append(np.diff(np.repeat(answer.chunk_s, answer.counts)))
    return {"ttft": np.array(ttft), "itl": np.concatenate(gaps)}


def serve_bench(
    scenario: Scenario,
    server: Server,
    *,
    qps: Sequence[float] | None = None,
    seeds: int = 5,
    first_seed: int = 0,
    out: str | Path,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Rows of all runs of this label, by rate and seed; see `llmsched_gym.serving.join` for those of other labels.

    Args:
        scenario: what is asked of the server, and its SLOs; what it says of engines and devices is not used.
        server: the server, and the label of its rows.
        qps: mean arrival rates, 1/s; None: the scenario's own, drawn per seed where it says so.
        seeds, first_seed: seeds first_seed, first_seed + 1, ...
        out: folder for the results of all labels.
        progress: called with the number of measured requests done and of all.
        say: called with each remark, a line.
    """
    check_label(server.label)
    claim_results(out)
    scenario = finite(scenario)
    rates: list[float | None] = [scenario.qps] if qps is None else list(dict.fromkeys(float(rate) for rate in qps))
    if not rates:
        raise ConfigError("qps: expected at least one rate")
    numbers = seed_range(seeds, first_seed)
    tables = [make_table(scenario if rate is None else scenario.replace(qps=rate), numbers.start) for rate in rates]
    goes_on = any(table.shares_with is not None and bool((table.shares_with >= 0).any()) for table in tables)
    found = run_to_end(_examine(server, goes_on))
    for remark in (*found.remarks, *warn_of_length(found, tables)):
        say(remark)
    world = scenario if rates[0] is None else scenario.replace(qps=rates[0])
    settings = {
        "qps": None if qps is None else rates,
        "seeds": len(numbers),
        "first_seed": numbers.start,
        "trace_remarks": trace_remarks(world, numbers.start),
        "send_slos": server.send_slos,
        "setup": f"{server.label}: {found.setup}",
    }
    config = config_of(scenario, server.label, found.model, settings)
    check_same(out, server.label, config)
    store = Store(label_folder(out, server.label), config)
    cells = grid([server.label], rates, numbers, scenario.num_requests or NUM_REQUESTS, frames=True)
    try:
        return _run_cells(scenario, server, found, cells, store, progress, say)
    finally:
        store.close()


async def _examine(server: Server, goes_on: bool) -> Found:
    async with Client(server.url, server.api_key) as client:
        return await examine(server, client, goes_on=goes_on)


def _run_cells(
    scenario: Scenario,
    server: Server,
    found: Found,
    cells: Sequence[Cell],
    store: Store,
    progress: Progress | None,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    done = store.open()
    total = len(cells) * (scenario.num_requests or NUM_REQUESTS)
    each = total // len(cells)
    for cell in cells:
        if cell.index in done:
            continue
        before = len(done) * each

        def resolved(count: int, of: int, before: int = before) -> None:
            if progress is not None:
                progress(before + count * each // of, total)

        world = scenario if cell.qps is None else scenario.replace(qps=cell.qps)
        run = run_to_end(run_once(server, found, world, cell.seed, resolved))
        done[cell.index] = keep(store, cell, run, world, found.model)
        for text in _remarks(done[cell.index]):
            say(text)
    if progress is not None:
        progress(total, total)
    rows = [done[cell.index] for cell in cells]
    if not store.complete:
        store.finish(rows)
    return rows


def _remarks(row: dict[str, Any]) -> list[str]:
    """What a person should know at once of a run."""
    found = []
    if row["num_failed"]:
        found.append(f"seed {row['seed']}: {row['num_failed']:,} of {row['num_requests']:,} failed: {row['failures']}")
    if row["metrics"]:
        found += [f"seed {row['seed']}: {line}" for line in row["metrics"].splitlines()]
    return found
