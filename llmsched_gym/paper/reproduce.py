"""The paper's evaluation on the cost model, and what else there is to say about it, in one command.

``llmsched reproduce`` runs the pieces below, each into a file that an interrupted run does not do again,
and writes docs/results.md and its figures from them. Same seeds, same figures, to the last digit; only `speed` times.
The file is a list of pieces, each a short function, which is why it is long.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_gym.config import Scenario, scenario
from llmsched_gym.engine import Engine
from llmsched_gym.evaluation import capacity as capacities
from llmsched_gym.evaluation.bench import PlainSarathi, machine
from llmsched_gym.evaluation.grid import evaluate
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.evaluation.spread import Places, add_options, choose, count_of, run_cells
from llmsched_gym.files import claim_folder, digest_of, json_with, write_text
from llmsched_gym.fluid import fluid_capacity
from llmsched_gym.help_text import ExamplesKept, OneLineParser, examples, place
from llmsched_gym.paper.constants import LOADS, NUM_REQUESTS, PAPER_POLICIES, PUBLISHED_SWEEP
from llmsched_gym.registry import make_scheduler
from llmsched_gym.report import console
from llmsched_gym.scheduler import install
from llmsched_gym.sources import digest
from llmsched_gym.theory import cluster, experiments
from llmsched_gym.workload import RequestTable

BUILT_IN_POLICIES = (*PAPER_POLICIES, "rad-512", "srpt-capped", "on-time")
LEARNED_POLICIES = ("learned",)  # networks, several times as slow: timed apart
MAIN_POLICIES = (*BUILT_IN_POLICIES, *LEARNED_POLICIES)
BOUNDED_POLICIES = (*MAIN_POLICIES, "feasible-first", "shortest-total")
STRICT_POLICIES = ("sarathi", "slai", "slai-priority", "srpt-capped", "feasible-first", "on-time")
STRICT_SHARES = (0.0, 0.05, 0.2, 0.5)
TRACE = "traces/openchat_sharegpt4.csv"
SWEPT_QPS = 1.6
MIXING_FACTORS = (2, 3, 4)  # on the attention of decodes beside a prompt chunk, in the robustness piece
ROBUST_SHARE = 0.8  # of the fluid capacity, in every world of the robustness piece
UNREPEATABLE = ("wall_time_s", "config_hash")
WALL_TIME = "main_table_wall_s.json"

Data = Any
Note = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How much is run."""

    world: Scenario
    out: Path
    workers: Places = 2
    num_requests: int = NUM_REQUESTS  # of the main table's runs
    loads: tuple[float, ...] = LOADS
    seeds: int = 10  # of everything with an interval
    short_requests: int = 2000
    drift_seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    drift_requests: int = 20_000

    @property
    def short(self) -> Scenario:
        """The world with as many requests as runs of several seeds have."""
        return self.world.replace(num_requests=self.short_requests)


def paper_world() -> Scenario:
    """The paper's experiment, on its own trace where LLMSCHED_DATA_DIR holds it and on the fitted lengths elsewhere."""
    trace = Path(os.environ.get("LLMSCHED_DATA_DIR", ""), TRACE)
    return scenario("paper", trace=str(trace) if trace.is_file() else None)


def _rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in UNREPEATABLE} for row in rows]


def main_table(plan: Plan, note: Note) -> Data:
    """Every scheduler at every load, one long run each."""
    world = plan.world.replace(num_requests=plan.num_requests)
    rows: list[dict[str, Any]] = []
    timed: dict[str, Any] = {"workers": count_of(plan.workers)}

    def progress(done: int, runs: int) -> None:
        note(f"{done}/{runs} runs")

    for kind, policies in (("built_in", BUILT_IN_POLICIES), ("learned", LEARNED_POLICIES)):
        start = time.perf_counter()
        found = evaluate(world, policies, qps=plan.loads, seeds=1, workers=plan.workers, progress=progress)
        timed[kind] = {"wall_s": time.perf_counter() - start, "runs": len(found)}
        rows += found
    write_text(plan.out / WALL_TIME, json.dumps(timed))
    return _rows(rows)


def seeds_table(plan: Plan, note: Note) -> Data:
    """Shorter runs of several seeds, for intervals; with the bounds. The folder is one for `llmsched report`."""
    loads = tuple(q for q in plan.loads if q >= 1.0)
    rows = evaluate(
        plan.short,
        BOUNDED_POLICIES,
        qps=loads,
        seeds=plan.seeds,
        workers=plan.workers,
        out=plan.out / "runs",
        progress=lambda i, n: note(f"{i}/{n} runs"),
    )
    return _rows(rows)


def capacity_cell(world: Scenario, policy: str, criterion: str, seeds: int) -> capacities.Capacity:
    """Capacity of one policy, for a worker."""
    return capacities.capacity(world, [policy], criterion, qps=(0.9, 2.4), seeds=seeds)[0]


def capacity(plan: Plan, note: Note) -> Data:
    """Capacity under the paper's criterion, and with both classes' p99 ITL within their SLOs as well."""
    criteria = ("ttft-median", "paper")
    cells = [(plan.short, policy, criterion, plan.seeds) for criterion in criteria for policy in BOUNDED_POLICIES]
    results = run_cells(capacity_cell, cells, plan.workers, note)
    found: list[dict[str, Any]] = []
    for criterion in criteria:
        own = [r for r in results if r.criterion == criterion]  # the first is the one that ratios are to
        found += [r.to_row() | ratio for r, ratio in zip(own, capacities.ratios(own), strict=True)]
    return found


def budget_sweep(plan: Plan, note: Note) -> Data:
    """Lone prompts of 2,048 tokens and one decode each, in chunks: what the authors measured."""
    points = []
    for chunk, _, _ in PUBLISHED_SWEEP:
        n = 4
        table = RequestTable.of(100.0 * np.arange(n), 2048, 2, qps=0.01)
        engine = Engine(scenario("paper", num_requests=n), n)
        engine.reset(table)
        scheduler = make_scheduler(f"sarathi[budget={chunk}]")
        install(scheduler, engine.state)
        engine.run(scheduler)
        requests, sim = engine.state.requests[0, :n], engine.state.sims[0]
        ttft_s = float(np.median(requests["first_token_s"] - requests["arrival_s"]))
        points.append({"chunk": chunk, "ttft_ms": 1e3 * ttft_s, "batch_ms": 1e3 * float(sim.mean_batch_s)})
    return points


def batches(plan: Plan, note: Note) -> Data:
    """Every 20th batch of one run at the swept load: decodes, time, running requests, KV use."""
    found = {}
    for policy in ("sarathi", "slai", "vllm-v0"):
        steps = simulate(plan.short.replace(qps=SWEPT_QPS), policy, 0, num_steps=40_000).steps[::20]
        found[policy] = {
            "decodes": steps["decode_tokens"].tolist(),
            "prefill": steps["prefill_tokens"].tolist(),
            "duration_s": steps["duration_s"].tolist(),
            "running": steps["num_running"].tolist(),
            "kv": steps["kv_cache_usage"].tolist(),
        }
    return found


def strict_shares(plan: Plan, note: Note) -> Data:
    """The share of strict users, at one load."""
    rows: list[dict[str, Any]] = []
    for share in STRICT_SHARES:
        world = plan.short.replace(strict_share=share)
        found = evaluate(world, STRICT_POLICIES, qps=(SWEPT_QPS,), seeds=plan.seeds, workers=plan.workers)
        rows += [row | {"strict_share": share} for row in _rows(found)]
        note(f"{share:.0%}")
    return rows


def mixing_worlds() -> dict[str, dict[str, str]]:
    """Executing and predicting profile of worlds in which decodes cost more beside a prompt chunk, or are said to."""
    base = experiments.SMOOTH
    found = {}
    for factor in MIXING_FACTORS:
        name, dear = f"decodes beside prompts {factor} times as dear", f"{base}[mixing={factor}]"
        found[f"{name}, known"] = {"profile": dear}
        found[f"{name}, hidden"] = {"profile": dear, "scheduler_profile": base}
    dear = f"{base}[mixing={MIXING_FACTORS[0]}]"
    found[f"predicted as {MIXING_FACTORS[0]} times as dear, and not so"] = {"profile": base, "scheduler_profile": dear}
    for title, name in (("RTX PRO 6000", "rtxpro6000-llama-3.1-8b-vllm"), ("RTX 4090", "rtx4090-llama-3.1-8b-vllm")):
        additive = f"{name}[additive=true]"
        found[f"vLLM on an {title}, known"] = {"profile": name}
        found[f"vLLM on an {title}, predicted as a sum"] = {"profile": name, "scheduler_profile": additive}
        found[f"a sum, predicted as vLLM on an {title}"] = {"profile": additive, "scheduler_profile": name}
    return found


def robustness(plan: Plan, note: Note) -> Data:
    """SLO attainment by seed where the cost model is wrong in some way, at one share of each world's fluid capacity."""
    base = plan.short
    worlds = {
        "as modelled": (base, 0),
        "as modelled, other seeds": (base, plan.seeds),
        "device 25 % slower, hidden": (base.replace(cost_scale=1.25), 0),
        "device 20 % faster, hidden": (base.replace(cost_scale=0.8), 0),
        "jitter 5 %": (base.replace(jitter=0.05), 0),
        "jitter 20 %": (base.replace(jitter=0.2), 0),
        "A100": (base.replace(profile="a100-mistral-7b"), 0),
        "A100, predicted as the RTX 6000 Ada": (
            base.replace(profile="a100-mistral-7b", scheduler_profile="rtx6000ada-mistral-7b"),
            0,
        ),
    } | {name: (base.replace(**profiles), 0) for name, profiles in mixing_worlds().items()}
    found = []
    for name, (world, first) in worlds.items():
        qps = ROBUST_SHARE * fluid_capacity(world).qps
        rows = evaluate(world, BOUNDED_POLICIES, qps=(qps,), seeds=plan.seeds, first_seed=first, workers=plan.workers)
        by_policy = {p: [r["slo_attainment"] for r in rows if r["policy"] == p] for p in BOUNDED_POLICIES}
        found.append({"world": name, "qps": qps, "attainment": by_policy})
        note(name)
    return found


def fluid(plan: Plan, note: Note) -> Data:
    """The fluid capacity of the workload on each device."""
    found = []
    for name in (experiments.SMOOTH, experiments.STAIRCASE, "h100-mistral-7b", experiments.WAVES):
        bound = fluid_capacity(plan.world, experiments.device(name))
        found.append(
            {
                "profile": name,
                "qps": bound.qps,
                "batch_tokens": bound.mean_batch_tokens,
                "sizes": bound.batch_tokens,
                "decodes_per_batch": bound.decodes_per_batch,
                "linear_share": bound.linear_share,
                "limited_by": bound.limited_by,
                "memory_price": bound.memory_price,
                "seqs_price": bound.seqs_price,
            }
        )
    return found


def stability(plan: Plan, note: Note) -> Data:
    """Drift at 95 % of the fluid capacity, and the boundary, on the smooth and on the staircase profile."""
    settings: dict[str, Any] = {"seeds": plan.drift_seeds, "num_requests": plan.drift_requests, "workers": plan.workers}
    return experiments.stability(plan.world, **settings, note=note)


def router_stability(plan: Plan, note: Note) -> Data:
    """The same for routers on unequal replicas, with as many more requests as there is more to serve them."""
    settings: dict[str, Any] = {"seeds": plan.drift_seeds, "num_requests": 3 * plan.drift_requests}
    return cluster.cluster_stability(plan.world, **settings, workers=plan.workers, note=note)


def ablation(plan: Plan, note: Note) -> Data:
    """RAD without its principles."""
    settings: dict[str, Any] = {"seeds": plan.drift_seeds, "num_requests": plan.drift_requests, "workers": plan.workers}
    return experiments.ablation(plan.world, **settings, note=note)


def tiles(plan: Plan, note: Note) -> Data:
    """Tokens per second of the linear layers by batch size, and what leaving the tile costs."""
    return experiments.tiles()


def speed(plan: Plan, note: Note) -> Data:
    """Iterations per second of Sarathi-Serve compiled and of the same in plain Python, on the same requests."""
    world = plan.world.replace(qps=1.3, num_requests=400)
    runs = {}
    for name, policy in (("compiled", "sarathi"), ("python", PlainSarathi())):
        simulate(world.replace(num_requests=20), policy, 0)
        episodes = [simulate(world, policy, 0) for _ in range(3)]
        rates = [int(e.sim.num_batches) / e.wall_time_s for e in episodes]
        runs[name] = {"iterations_per_s": float(np.median(rates)), "sim_time_s": float(episodes[0].sim.clock_s)}
    return {**runs, "machine": machine()}


PIECES: dict[str, Callable[[Plan, Note], Data]] = {
    function.__name__: function
    for function in (
        fluid,
        main_table,
        seeds_table,
        capacity,
        budget_sweep,
        batches,
        strict_shares,
        stability,
        router_stability,
        ablation,
        tiles,
        robustness,
        speed,
    )
}


def code_digest() -> str:
    """Digest of the code and data that the pieces depend on, not of how they are shown."""
    shown = ("llmsched_gym.paper.page", "llmsched_gym.report.write")
    needed = ("llmsched_gym.paper.reproduce", "llmsched_gym.baselines", "llmsched_gym.policies")
    return digest(needed, without=shown, data=[Path(__file__).parents[1] / "data"])


def run_piece(name: str, plan: Plan, key: str) -> Data:
    """The piece's data: from its file if the same code and plan wrote it, else run now."""
    path = plan.out / f"{name}.json"
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return kept["data"]
    interactive = sys.stderr.isatty() and not console.quiet

    def note(text: str) -> None:
        if interactive:
            print(f"\r{name}: {text}\x1b[K", end="", file=sys.stderr, flush=True)

    start = time.perf_counter()
    data = PIECES[name](plan, note)
    if not console.quiet:
        took = f"{chr(13) if interactive else ''}{name}: {time.perf_counter() - start:.0f} s"
        print(took, file=sys.stderr, flush=True)
    write_text(path, json.dumps({"key": key, "data": data}, allow_nan=False))
    return json.loads(json.dumps(data))


def reproduce(plan: Plan, pieces: list[str] | None = None) -> dict[str, Data]:
    """Data of all pieces, by name."""
    marks = {f"{name}.json": json_with("key", "data") for name in PIECES}
    claim_folder(plan.out, "pieces of the paper's evaluation", marks | {"runs/config.json": json_with("scenario")})
    plan.out.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in plan.__dict__.items() if k not in ("out", "workers", "world")}
    settings["policies"] = (MAIN_POLICIES, BOUNDED_POLICIES, STRICT_POLICIES)
    world = plan.world.to_dict() | {"trace": Path(plan.world.trace).name if plan.world.trace else None}
    key = digest_of([settings, world, code_digest()])
    return {name: run_piece(name, plan, key) for name in pieces or PIECES}


def main(argv: list[str] | None = None) -> int:
    """The command line of `llmsched reproduce`; returns its exit code."""
    parser = OneLineParser(
        prog="llmsched reproduce",
        usage="%(prog)s [OPTIONS]",
        description=__doc__.split("\n\n")[0],
        epilog=examples("llmsched reproduce --out out/paper", "llmsched reproduce --pieces capacity --seeds 10"),
        formatter_class=ExamplesKept,
    )
    parser.add_argument("--out", type=place, default=Path("out/paper"), help="folder of intermediate results")
    parser.add_argument("--docs", type=place, default=Path("docs"), help="folder of results.md and figures/")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    add_options(parser)
    parser.add_argument("--seeds", type=int, default=10, help="seeds of everything with an interval")
    parser.add_argument("--pieces", default=None, help=f"only these, and no page; of {', '.join(PIECES)}")
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.workers < 1:
        parser.error("--seeds and --workers: expected a whole number >= 1")
    pieces = args.pieces.split(",") if args.pieces else None
    for name in pieces or []:
        if name not in PIECES:
            parser.error(f"--pieces: expected some of {', '.join(PIECES)}, got {name!r}")
    world = paper_world()
    with choose(args.workers, args.ray, args.ray_address, [world.trace or ""]) as places:
        plan = Plan(world, args.out, places, seeds=args.seeds)
        data = reproduce(plan, pieces)
    if pieces is None:
        from llmsched_gym.paper.page import write_page

        print(f"wrote {write_page(data, plan, args.docs)}", file=sys.stderr)
        try:
            from llmsched_gym.report.write import write_report
        except ImportError:
            return 0
        print(f"wrote {write_report(plan.out / 'runs')}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
