"""Who is best where prompts are mostly cached, what the cache is worth, and what a long miss does to short hits.

    python -m benchmarks.sessions [--section suites,memory,misses,eviction,speed] [--seeds 10]
                                  [--num-requests 2000] [--policy NAME]... [--share 0.8]...
                                  [--workers N] [--ray | --ray-address A] [--out out/sessions]

suites: the suites chat and agents at shares of their fluid capacity at the hit rate of an infinite cache. memory: hit
rates of the Mooncake conversation trace (its first 6,000 requests, in LLMSCHED_DATA_DIR/traces) with 1, 2, 4 and 8
times the profile's KV blocks, beside those of an infinite cache. misses: agents whose turns have a few hundred tokens
that are not cached, and now and then a prompt of 24,000 tokens of which nothing is: by how much the turns' TTFT grows.
eviction: what it changes to evict by session rather than by block, seed by seed. speed: what an iteration of the
engine costs with prefix caching and without.

Prints Markdown; a run of `suites` that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_gym.config import Scenario, scenario
from llmsched_gym.cost import load_profile
from llmsched_gym.engine import Engine
from llmsched_gym.evaluation.grid import evaluate
from llmsched_gym.evaluation.outcomes import Outcomes
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.evaluation.spread import add_options, choose
from llmsched_gym.fluid import fluid_capacity
from llmsched_gym.help_text import place
from llmsched_gym.registry import make_scheduler
from llmsched_gym.report import intervals
from llmsched_gym.scheduler import install
from llmsched_gym.text import between, number, table
from llmsched_gym.workload import RequestTable, make_table

POLICIES = ("vllm-v1", "sarathi", "slai", "srpt-capped", "tuned-constant", "on-time", "learned")
SHARES = (0.4, 0.6, 0.8, 1.0)
MEMORIES = (1, 2, 4, 8)
TRACE = "mooncake_conversation_first6000.jsonl.gz"
EVICTION_POLICIES = ("sarathi", "slai", "on-time")
SPEED_POLICIES = ("vllm-v1", "slai", "on-time")
MISS_TOKENS, MISS_EVERY_S = 24_000, 10.0


def estimated(rows: list[dict[str, Any]], column: str, unit: float = 1.0, *, latency: bool = False) -> str:
    """Mean (of a latency the median) over seeds with its interval, in `unit`."""
    values = [None if row[column] is None else unit * row[column] for row in rows]
    middle = (intervals.median if latency else intervals.mean)(values)
    around = intervals.median_interval(values) if latency else intervals.interval(values, (0.0, unit))  # of shares
    return number(middle, none="inf") + (between(*around) if around else "")


def suites(args: argparse.Namespace) -> None:
    """Policies on `chat` and `agents` at shares of the fluid capacity."""
    for suite in ("chat", "agents"):
        world = scenario(suite, num_requests=args.num_requests)
        capacity = fluid_capacity(world).qps
        loads = [round(share * capacity, 4) for share in SHARES]
        rows = evaluate(
            world,
            args.policy,
            qps=loads,
            seeds=args.seeds,
            workers=args.workers,
            out=Path(args.out) / suite,
        )
        print(f"\n### `{suite}`: {capacity:.3g} sessions/s are the fluid capacity\n")
        lines = []
        for share, load in zip(SHARES, loads, strict=True):
            for policy in args.policy:
                mine = [row for row in rows if row["policy"] == policy and row["requested_qps"] == load]
                lines.append(
                    [
                        f"{share:g}",
                        policy,
                        estimated(mine, "slo_attainment", 100.0),
                        estimated(mine, "session_on_time", 100.0),
                        estimated(mine, "ttft_p50_s", latency=True),
                        estimated(mine, "ttft_p99_s", latency=True),
                        estimated(mine, "prefix_hit_rate"),
                    ]
                )
        head = ["share", "policy", "attained, %", "sessions on time, %", "TTFT p50, s", "p99, s", "hit rate"]
        print(table(head, lines, 2))


def memory(args: argparse.Namespace) -> None:
    """Hit rates of the Mooncake sample by memory; slowed down, as its own times overload a single device."""
    folder = os.environ.get("LLMSCHED_DATA_DIR")
    if folder is None:
        print("\nmemory: set LLMSCHED_DATA_DIR to the folder that has traces/" + TRACE, file=sys.stderr)
        return
    path = Path(folder) / "traces" / TRACE
    world = scenario(
        "agents",
        trace=str(path),
        trace_arrivals="keep",
        max_model_len=131_072,
        num_requests=6000,
        warmup_s=0.0,
        qps=0.1,
        patience_s=math.inf,
        ttft_slo_per_token_s=1.0,
        jitter=0.0,
        arrivals_continue=False,
    )
    blocks = load_profile(world.profile).num_kv_blocks
    given = make_table(world, 0)
    lines = []
    for factor in MEMORIES:
        found = simulate(world.replace(num_kv_blocks=factor * blocks), "vllm-v1", 0, table=given)
        lines.append([f"{factor} x {blocks:,}", number(hit_rate(found.requests), 3)])
    size = world.block_size
    shares = np.minimum(given.identity()[1], given.prompt_tokens - 1) // size * size
    lines.append(["infinite", number(shares.sum() / given.prompt_tokens.sum(dtype=np.int64), 3)])
    print(f"\n### Mooncake conversation, blocks of {size}, `vllm-v1`, {world.qps:g} requests/s\n")
    print(table(["KV blocks", "hit rate"], lines, 1))


def hit_rate(requests: np.ndarray) -> float:
    """Share of the prompt tokens of admitted requests that were found cached."""
    admitted = requests[~np.isnan(requests["first_scheduled_s"])]
    return float(admitted["num_cached_tokens"].sum(dtype=np.int64) / admitted["prompt_tokens"].sum(dtype=np.int64))


def with_misses(world: Scenario, seed: int) -> tuple[RequestTable, np.ndarray]:
    """The suite's sessions with whole-prompt misses among them; the table, and which of its requests are misses."""
    given = make_table(world, seed)
    n = len(given)
    times = np.arange(MISS_EVERY_S, given.last_root_s, MISS_EVERY_S)
    roots = np.flatnonzero(given.is_root)
    # a miss is a session of one request: it stands where its arrival puts it among the roots
    place = np.append(roots, n)[np.searchsorted(given.arrival_s[roots], times)]
    moved = np.arange(n) + np.searchsorted(place, np.arange(n), "right")
    total = n + len(times)
    is_miss = np.ones(total, np.bool_)
    is_miss[moved] = False

    def column(values: np.ndarray | None, miss: Any) -> np.ndarray:
        assert values is not None
        out = np.full(total, miss, values.dtype)
        out[moved] = values
        return out

    def index(values: np.ndarray | None) -> np.ndarray:
        assert values is not None
        return column(np.where(values >= 0, moved[values], -1).astype(values.dtype), -1)

    arrival_s = column(given.arrival_s, np.nan)
    arrival_s[is_miss] = times
    slo_s = world.ttft_slo_s + world.ttft_slo_per_token_s * MISS_TOKENS
    new = replace(
        given,
        arrival_s=arrival_s,
        prompt_tokens=column(given.prompt_tokens, MISS_TOKENS),
        output_tokens=column(given.output_tokens, 64),
        slo_class=column(given.slo_class, 1),
        ttft_slo_s=column(given.ttft_slo_s, slo_s),
        tbt_slo_s=column(given.tbt_slo_s, world.relaxed_tbt_slo_s),
        length_hint=column(given.length_hint, np.nan),
        session_id=column(given.session_id, -1),
        shares_with=index(given.shares_with),
        shared_tokens=column(given.shared_tokens, 0),
        parent=index(given.parent),
        think_s=column(given.think_s, 0.0),
        new_tokens=column(given.new_tokens, MISS_TOKENS),
        prefix_id=column(given.prefix_id, -1),
        prefix_tokens=column(given.prefix_tokens, 0),
        max_output_tokens=column(given.max_output_tokens, 64),
        cohort_start=int(moved[given.cohort_start]),
        cohort_stop=int(moved[given.cohort_stop - 1]) + 1,
    )
    return new, is_miss


def misses(args: argparse.Namespace) -> None:
    """What whole-prompt misses do to the turns beside them, by policy."""
    world = scenario("agents", num_requests=args.num_requests)
    world = world.replace(qps=round(0.4 * fluid_capacity(world).qps, 4))
    lines = []
    for policy in args.policy:
        figures: dict[str, list[float]] = {name: [] for name in ("alone", "p50", "p99", "attained", "miss")}
        for seed in range(args.seeds):
            alone = simulate(world, policy, seed)
            figures["alone"].append(float(np.quantile(Outcomes(alone).ttft_s, 0.99)))
            given, is_miss = with_misses(world, seed)
            found = simulate(world, policy, seed, table=given)
            outcomes, missed = Outcomes(found), is_miss[found.cohort]
            figures["p50"].append(float(np.quantile(outcomes.ttft_s[~missed], 0.5)))
            figures["p99"].append(float(np.quantile(outcomes.ttft_s[~missed], 0.99)))
            figures["attained"].append(100.0 * float(outcomes.attained[~missed].mean()))
            figures["miss"].append(100.0 * float(outcomes.attained[missed].mean()))
        seconds = [number(intervals.median(figures[name])) for name in ("alone", "p50", "p99")]
        lines.append([policy, *seconds, *(number(intervals.mean(figures[name])) for name in ("attained", "miss"))])
    print(f"\n### A prompt of {MISS_TOKENS:,} tokens, none cached, every {MISS_EVERY_S:g} s among `agents`' turns\n")
    head = ["policy", "turns' TTFT p99 alone, s", "with misses: p50, s", "p99, s", "turns attained, %", "misses, %"]
    print(table(head, lines, 1))


def eviction(args: argparse.Namespace) -> None:
    """What evicting by session buys over evicting by block, on the same seeds."""
    lines = []
    for suite in ("chat", "agents"):
        world = scenario(suite, num_requests=args.num_requests)
        capacity = fluid_capacity(world).qps
        for share in args.share or [0.8]:
            policies = [f"{name}{rule}" for name in EVICTION_POLICIES for rule in ("", "[evict=session]")]
            load = round(share * capacity, 4)
            rows = evaluate(world, policies, qps=[load], seeds=args.seeds, workers=args.workers)
            of = {policy: [row for row in rows if row["policy"] == policy] for policy in policies}
            for name in EVICTION_POLICIES:
                block, session = of[name], of[f"{name}[evict=session]"]
                cells = []
                for column, unit in (("slo_attainment", 100.0), ("session_on_time", 100.0), ("prefix_hit_rate", 1.0)):
                    changes = [unit * (b[column] - a[column]) for a, b in zip(block, session, strict=True)]
                    around = intervals.interval(changes, (-unit, unit))
                    before = number(unit * float(np.mean([a[column] for a in block])))
                    cells += [before, f"{number(intervals.mean(changes))}{between(*around) if around else ''}"]
                lines.append([suite, f"{share:g}", name, *cells])
    print("\n### `evict=session` against `lru`, the same seeds\n")
    figures = ("attained, %", "sessions on time, %", "hit rate")
    head = ["suite", "share", "policy", *(text for figure in figures for text in (figure, "change"))]
    print(table(head, lines, 3))


def speed(args: argparse.Namespace) -> None:
    """Processor time of an iteration, best of five runs, jitter and patience left out."""
    lines = []
    for suite, share in (("chat", 0.3), ("chat", 0.5), ("agents", 0.5)):
        base = scenario(suite, num_requests=args.num_requests, jitter=0.0, patience_s=math.inf)
        base = base.replace(qps=round(share * fluid_capacity(base).qps, 4))
        for policy in SPEED_POLICIES:
            cells = []
            for on in (False, True):
                world, scheduler = base.replace(prefix_caching=on), make_scheduler(policy)
                given, best_s = make_table(world, 0), math.inf
                engine = Engine(world, len(given))
                for _ in range(5):
                    engine.reset(given)
                    install(scheduler, engine.state)
                    engine.prepare(scheduler)
                    start_s = time.process_time()
                    engine.run(scheduler)
                    sim = engine.state.sims[0]
                    best_s = min(best_s, (time.process_time() - start_s) / int(sim.num_batches))
                cells += [number(1e6 * best_s), number(float(sim.batch_tokens_sum / sim.num_batches), 1)]
            lines.append([suite, f"{share:g}", policy, *cells])
    print("\n### An iteration of the engine, us of processor time\n")
    print(table(["suite", "share", "policy", "off", "tokens a batch", "with caching", "tokens a batch"], lines, 3))


SECTIONS = {"suites": suites, "memory": memory, "misses": misses, "eviction": eviction, "speed": speed}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--section", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--num-requests", type=int, default=2000, help="measured turns of a run")
    parser.add_argument("--policy", action="append", help=f"by default {', '.join(POLICIES)}")
    parser.add_argument("--share", type=float, action="append", help="of the fluid capacity, for eviction; 0.8")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    add_options(parser)
    parser.add_argument("--out", type=place, default=Path("out/sessions"))
    args = parser.parse_args()
    args.policy = args.policy or list(POLICIES)
    sections = args.section.split(",")
    for name in sections:
        if name not in SECTIONS:
            parser.error(f"--section: expected some of {', '.join(SECTIONS)}, got {name!r}")
    with choose(args.workers, args.ray, args.ray_address, args.policy) as args.workers:
        for name in sections:
            SECTIONS[name](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
