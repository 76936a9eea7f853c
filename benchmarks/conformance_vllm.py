"""Compare `vllm-v1` with vLLM's own V1 scheduler, batch by batch, on one clock: that of the cost model.

    benchmarks/vllm_env.sh DIR
    DIR/bin/python -m benchmarks.conformance_vllm --qps 1.8 --requests 400 --kv-blocks 2500 --seed 0

prints one JSON line: ``{"version": v, "batches": n, "mismatches": m, "first_mismatch": i or null}``; ``--cells`` prints
one for each of 18 cells. vLLM's `Scheduler` runs without a model, synchronously: every request whose known tokens are
all computed gets one token. Batches are compared as sets of (request, computed tokens, tokens).

    DIR/bin/python -m benchmarks.conformance_vllm --prefix-caching --random 500 --requests 400

compares with prefix caching on requests that have tokens in common (`prefix_tables.py`): by hand, at random, and 12
cells of sessions under memory pressure. A line then has also what was found cached: tokens at first admissions and at
resumes, and ``"cached_mismatches"``, the requests of which the two found another number.

    DIR/bin/python -m benchmarks.conformance_vllm --async --cells --stop-share 0.5

compares vLLM's `AsyncScheduler`, driven as its engine core drives it, with ours on an engine with `async_lag`. A share
of the requests ends with a stop token, the others at their `max_tokens`.

Requests that our engine rejects at arrival are not sent to vLLM, where one that can never fit stays at the head for
ever. After a mismatch each side goes on with its own state.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, product
from typing import Any

import numpy as np

from benchmarks.conformance import Recording, next_batch
from benchmarks.prefix_tables import Case, at_random, by_hand, cells, tokens_of
from benchmarks.vllm_scheduler import STOP, VLLM, Item, Settings
from llmsched_gym.config import MOST, ConfigError, Scenario, blocks_needed, scenario
from llmsched_gym.cost import Profile, load_profile
from llmsched_gym.engine import Engine, Execution, ScheduledBatch
from llmsched_gym.registry import make_scheduler
from llmsched_gym.scheduler import PolicyError, install
from llmsched_gym.workload import RequestTable, make_table

QPS, KV_BLOCKS, SEEDS = (1.2, 1.8, 2.4), (14_733, 2_500), (0, 1, 2)


class Watched(Recording):
    """A recording that keeps the batch that it was last asked to run, as a set of (request, computed, tokens)."""

    batch: set[tuple[int, int, int]]

    def execute(self, batch: ScheduledBatch) -> Execution:
        columns = batch.request.tolist(), batch.num_computed.tolist(), batch.num_tokens.tolist()
        self.batch = set(zip(*columns, strict=True))
        return super().execute(batch)


class Found:
    """Cached tokens of each request: what vLLM counts as computed when it is admitted, at first and when resumed."""

    def __init__(self, num_requests: int) -> None:
        self.first, self.resumed = np.full(num_requests, -1), np.zeros(num_requests, np.int64)

    def see(self, items: Iterable[Item], resumed: Container[int]) -> None:
        for r, computed, _ in items:
            if self.first[r] < 0:
                self.first[r] = computed
            elif r in resumed:
                self.resumed[r] += computed


def compare(world: Scenario, table: RequestTable, settings: Settings) -> dict[str, Any]:
    """Run both on `table`; the number of vLLM's batches, of those that differ from ours, and the first of these."""
    kv_blocks = world.num_kv_blocks or load_profile(world.profile).num_kv_blocks
    real = VLLM(settings, kv_blocks, world.max_model_len)
    profile, recording, found = load_profile(world.profile), Watched([]), Found(len(table))
    world = world.replace(prefix_caching=settings.prefix_caching)
    scheduler = make_scheduler(settings.policy)
    engine = Engine(world.replace(admission=scheduler.admission), len(table), backend=recording)
    engine.reset(table)
    install(scheduler, engine.state)

    tokens = tokens_of(table)
    prompt, total = table.prompt_tokens, table.prompt_tokens + table.output_tokens
    fits = (total <= world.max_model_len) & (blocks_needed(total) <= kv_blocks)
    clock_s, arrived, differing, batches = 0.0, 0, [], 0
    while arrived < len(table) or real.scheduler.has_unfinished_requests():
        if not real.scheduler.has_unfinished_requests():
            clock_s = max(clock_s, float(table.arrival_s[arrived]))
        while arrived < len(table) and table.arrival_s[arrived] <= clock_s:
            if fits[arrived]:
                real.add(arrived, int(prompt[arrived]), tokens[arrived])
            arrived += 1
        if not real.scheduler.has_unfinished_requests():
            continue
        items = real.step()
        if not items:
            raise RuntimeError(f"vLLM schedules nothing in batch {batches} although requests are pending")
        duration_s = seconds(profile, prompt, items)
        recording.durations_s.append(duration_s)
        found.see(items, real.resumed)
        if not next_batch(engine, scheduler) or set(items) != recording.batch:
            differing.append(batches)
        clock_s += duration_s
        batches += 1
    while next_batch(engine, scheduler):
        differing.append(batches)
        batches += 1
    first = differing[0] if differing else None
    figures = {"version": real.version, "batches": batches, "mismatches": len(differing), "first_mismatch": first}
    if settings.prefix_caching:
        rows = engine.state.requests[0]
        served = found.first >= 0
        resumed = engine.state.prefixes[0]["num_recached_tokens"]
        other = ((rows["num_cached_tokens"] != found.first) | (resumed != found.resumed))[served]
        figures |= {"preemptions": int(rows["num_preemptions"].sum()), "prompt_tokens": int(prompt[served].sum())}
        figures |= {"cached_tokens": int(found.first[served].sum()), "recached_tokens": int(found.resumed.sum())}
        figures["cached_mismatches"] = int(other.sum())
    return figures


def compare_async(world: Scenario, table: RequestTable, settings: Settings, stop_share: float) -> dict[str, Any]:
    """:func:`compare` with batches formed one ahead: vLLM's `AsyncScheduler` against ours with `async_lag`.

    A share of the requests ends with a stop token that nobody foresees, the others at the limit that both are told.
    """
    kv_blocks = world.num_kv_blocks or load_profile(world.profile).num_kv_blocks
    stops = np.random.default_rng(table.seed).random(len(table)) < stop_share
    table = replace(table, max_output_tokens=np.where(stops, MOST, table.output_tokens).astype(np.int32))
    real, profile = VLLM(settings, kv_blocks, world.max_model_len), load_profile(world.profile)
    tokens, prompt = tokens_of(table), table.prompt_tokens
    total = prompt + table.output_tokens
    for r in np.flatnonzero(stops):
        tokens[r][-1] = STOP
    fits = (total <= world.max_model_len) & (blocks_needed(total) <= kv_blocks)
    arrived = 0

    def admit(now_s: float) -> float:
        nonlocal arrived
        while arrived < len(table) and table.arrival_s[arrived] <= now_s:
            if fits[arrived]:
                most = world.max_model_len - int(prompt[arrived]) if stops[arrived] else None
                real.add(arrived, int(prompt[arrived]), tokens[arrived], max_tokens=most)
            arrived += 1
        return float(table.arrival_s[arrived]) if arrived < len(table) else math.inf

    made = list(real.batches(admit, lambda items: seconds(profile, prompt, items)))
    recording, scheduler = Watched([s for _, s in made]), make_scheduler(settings.policy)
    engine = Engine(world.replace(admission=scheduler.admission, async_lag=True), len(table), backend=recording)
    engine.reset(table)
    install(scheduler, engine.state)
    differing = []
    for i, (items, _) in enumerate(made):
        if not next_batch(engine, scheduler) or set(items) != recording.batch:
            differing.append(i)
    batches = len(made)
    while next_batch(engine, scheduler):
        differing.append(batches)
        batches += 1
    computed = sum(n for items, _ in made for _, _, n in items)
    return {
        "version": real.version,
        "batches": batches,
        "mismatches": len(differing),
        "first_mismatch": differing[0] if differing else None,
        "computed_tokens": computed,
        "preemptions": int(engine.state.sims[0].num_preemptions),
    }


def seconds(profile: Profile, prompt: np.ndarray, items: Sequence[Item]) -> float:
    """What the cost model says of a batch."""
    chunks = [(computed, n) for r, computed, n in items if computed < prompt[r] or n > 1]
    contexts = [computed + n for r, computed, n in items if not (computed < prompt[r] or n > 1)]
    return float(profile.predict_s(chunks, contexts))


def run_cell(
    qps: float, requests: int, kv_blocks: int, seed: int, settings: Settings, stop_share: float = 0.0
) -> dict[str, Any]:
    """The comparison on `requests` requests of the paper suite."""
    world = scenario(
        "paper",
        qps=qps,
        num_requests=requests,
        num_kv_blocks=kv_blocks,
        watermark=0.0,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.budget,
    )
    table = make_table(world, seed)
    return (
        compare_async(world, table, settings, stop_share) if settings.asynchronous else compare(world, table, settings)
    )


def run_case(case: Case, settings: Settings) -> dict[str, Any]:
    """The comparison with prefix caching on requests that have tokens in common."""
    world = scenario(
        "paper",
        num_requests=len(case.table),
        num_kv_blocks=case.kv_blocks,
        watermark=0.0,
        max_num_seqs=case.max_num_seqs,
        max_num_batched_tokens=case.budget,
    )
    told = replace(settings, budget=case.budget, max_num_seqs=case.max_num_seqs, prefix_caching=True)
    return {"case": case.name, **compare(world, case.table, told)}


def runs(args: argparse.Namespace, settings: Settings) -> Iterator[dict[str, Any]]:
    """The comparisons that were asked for, one after the other."""
    if args.prefix_caching:
        for case in chain(by_hand(), map(at_random, range(args.random)), cells(args.requests)):
            yield run_case(case, settings)
    elif args.cells:
        for qps, blocks, seed in product(QPS, KV_BLOCKS, SEEDS):
            found = run_cell(qps, args.requests, blocks, seed, settings, args.stop_share)
            yield {**found, "qps": qps, "kv_blocks": blocks, "seed": seed}
    else:
        yield run_cell(args.qps, args.requests, args.kv_blocks, args.seed, settings, args.stop_share)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conformance_vllm", description=__doc__.split("\n")[0])
    parser.add_argument("--qps", type=float, default=1.8, help="requests per second of the paper suite (1.8)")
    parser.add_argument("--requests", type=int, default=400, help="how many (400)")
    parser.add_argument("--kv-blocks", type=int, default=2500, help="usable KV blocks of 16 tokens (2500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=2048, help="max_num_batched_tokens (2048)")
    parser.add_argument("--max-num-seqs", type=int, default=128, help="running requests (128)")
    parser.add_argument("--threshold", type=int, default=0, help="long_prefill_token_threshold (0: none)")
    parser.add_argument(
        "--reserve", choices=("true", "false"), default="true", help="scheduler_reserve_full_isl (true)"
    )
    parser.add_argument("--cells", action="store_true", help=f"all of {QPS} x {KV_BLOCKS} blocks x seeds {SEEDS}")
    parser.add_argument("--prefix-caching", action="store_true", help="requests that have tokens in common")
    parser.add_argument("--random", type=int, default=100, help="with prefix caching: small random cases (100)")
    parser.add_argument("--async", dest="asynchronous", action="store_true", help="batches formed one ahead")
    parser.add_argument("--stop-share", type=float, default=0.0, help="of the requests, with --async: end unforeseen")
    args = parser.parse_args(argv)
    if args.asynchronous and args.prefix_caching:
        parser.error("--async: expected without --prefix-caching, which the engine does not have with async_lag")
    settings = Settings(
        args.budget, args.threshold, args.reserve == "true", args.max_num_seqs, asynchronous=args.asynchronous
    )
    mismatches = 0
    try:
        for found in runs(args, settings):
            mismatches += found["mismatches"] + found.get("cached_mismatches", 0)
            print(json.dumps(found), flush=True)
    except ModuleNotFoundError as error:
        print(f"error: {error}; `benchmarks/vllm_env.sh DIR` makes an environment with vLLM", file=sys.stderr)
        return 2
    except (ConfigError, PolicyError, ValueError) as error:
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2
    return 1 if (args.cells or args.prefix_caching) and mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
