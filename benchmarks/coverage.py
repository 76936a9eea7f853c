"""How often the 95 % intervals of reports cover the truth, from 10 and from 20 seeds.

    python -m benchmarks.coverage [--pool 400] [--draws 500] [--workers N] [--ray | --ray-address A] [--json]

A pool of seeds that nobody else uses is simulated once on the paper's suite and taken for the whole population: its own
figure is the truth. Draws of 10 and 20 seeds from it, with replacement, are given to the functions that reports call.
Prints the coverage of each kind of interval at 0.8, 0.9 and 1.0 of the fluid capacity, of the worst of several policies
or pairs; exits with 1 if any is below 90 %.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmsched_gym import text
from llmsched_gym.config import Scenario, scenario
from llmsched_gym.evaluation.capacity import STEP, Search, ratios
from llmsched_gym.evaluation.criteria import criterion
from llmsched_gym.evaluation.gaps import percentile
from llmsched_gym.evaluation.outcomes import Outcomes
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.evaluation.spread import Places, add_options, choose, run_cells
from llmsched_gym.fluid import fluid_capacity
from llmsched_gym.report import intervals

FIRST_SEED = 4000
SHARES = (0.8, 0.9, 1.0)  # of the fluid capacity
SIZES = (10, 20)
BASE = "sarathi"
POLICIES = (BASE, "slai", "on-time", "srpt-capped")
RANKED = (*POLICIES, "sarathi-spf", "slai-spf-fixed", "feasible-first", "vllm-v0")
CAPACITY_QPS = {BASE: (1.15, 1.6), "slai": (1.5, 2.0), "srpt-capped": (1.75, 2.45)}  # around each one's capacity
ENOUGH = 0.9

Figures = dict[str, np.ndarray]
"""Median and p99 TTFT (inf where there is none) and SLO attainment of one policy at one load, each (seeds,)."""
Pool = dict[tuple[str, float, str], Figures]
"""By world, load and policy."""


def run(world: Scenario, policy: str, qps: float, seeds: Sequence[int]) -> Figures:
    """Simulate a policy on the requests of each seed."""
    found: dict[str, list[float]] = {"ttft_p50_s": [], "ttft_p99_s": [], "slo_attainment": []}
    for seed in seeds:
        outcomes = Outcomes(simulate(world.replace(qps=qps), policy, seed))
        for name, q in (("ttft_p50_s", 0.5), ("ttft_p99_s", 0.99)):
            seconds = percentile(outcomes.ttft_s, q)
            found[name].append(np.inf if seconds is None else seconds)
        found["slo_attainment"].append(float(outcomes.attained.mean()))
    return {name: np.array(values) for name, values in found.items()}


def grid_rates(low_qps: float, high_qps: float) -> list[int]:
    """Places of the rates between two on the grid of capacities."""
    places = range(-200, 200)
    return [k for k in places if low_qps * (1 - 1e-9) <= STEP**k <= high_qps * (1 + 1e-9)]


def simulate_pool(size: int, workers: Places, note: Callable[[str], None]) -> Pool:
    """All runs that the draws are taken from."""
    seeds = range(FIRST_SEED, FIRST_SEED + size)
    worlds = {"modelled": scenario("paper"), "slower": scenario("paper", cost_scale=1.25)}
    keys, cells = [], []
    for name, world in worlds.items():
        fluid_qps = fluid_capacity(world).qps
        for share in SHARES:
            for policy in RANKED:
                keys.append((name, share, policy))
                cells.append((world, policy, share * fluid_qps, seeds))
    for policy, ends in CAPACITY_QPS.items():
        for k in grid_rates(*ends):
            keys.append(("grid", float(k), policy))
            cells.append((worlds["modelled"], policy, STEP**k, seeds))
    return dict(zip(keys, run_cells(run, cells, workers, note), strict=True))


def covers(bounds: intervals.Interval | None, truth: float) -> bool:
    return bounds is not None and bounds[0] - 1e-12 <= truth <= bounds[1] + 1e-12


def coverage(draws: np.ndarray, truth: float, interval: Callable[[np.ndarray], Any]) -> float:
    return float(np.mean([covers(interval(picked), truth) for picked in draws]))


def at_load(pool: Pool, share: float, draws: np.ndarray) -> list[tuple[str, str, str, float]]:
    """(kind, figure, whose, coverage) of every interval at one load."""
    here = {policy: pool["modelled", share, policy] for policy in RANKED}
    found = []
    for policy in POLICIES:
        shares = here[policy]["slo_attainment"]
        covered = coverage(draws, shares.mean(), lambda i, x=shares: intervals.interval(x[i].tolist(), (0.0, 1.0)))
        found.append(("mean", "SLO attainment", policy, covered))
        for name, label in (("ttft_p50_s", "median TTFT"), ("ttft_p99_s", "p99 TTFT")):
            values = here[policy][name]
            covered = coverage(draws, np.median(values), lambda i, x=values: intervals.median_interval(x[i].tolist()))
            found.append(("median", label, policy, covered))
        if policy == BASE:
            continue
        a, b = (here[p]["slo_attainment"] for p in (policy, BASE))
        covered = coverage(draws, float(np.mean(a - b)), lambda i, a=a, b=b: intervals.difference(a[i], b[i]))
        found.append(("difference", "SLO attainment", f"{policy} - {BASE}", covered))
        a, b = (here[p]["ttft_p50_s"] for p in (policy, BASE))
        truth = float(np.median(1.0 - a / b))
        covered = coverage(draws, truth, lambda i, a=a, b=b: intervals.reduction(a[i], b[i]))
        found.append(("ratio", "median TTFT", f"{policy} / {BASE}", covered))
    two = [{p: pool[world, share, p]["slo_attainment"] for p in RANKED} for world in ("modelled", "slower")]
    truth = intervals.rank_agreement(*two)[0]
    covered = coverage(
        draws, truth, lambda i: intervals.rank_agreement(*({p: v[i] for p, v in world.items()} for world in two))[1]
    )
    return [*found, ("tau", "rank by attainment", "8 policies", covered)]


def searches(pool: Pool, seeds: np.ndarray) -> list[Any]:
    """Capacities by median TTFT of some seeds of the pool, their runs looked up."""
    found = []
    for policy, ends in CAPACITY_QPS.items():

        def look_up(name: str, runs: Sequence[tuple[float, int]]) -> list[dict[str, Any]]:
            rows = []
            for qps, i in runs:
                figures = pool["grid", float(round(np.log(qps) / np.log(STEP))), name]
                row: dict[str, Any] = {"ttft_p50_s": float(figures["ttft_p50_s"][i]), "num_requests": 1}
                row |= {"slo_attainment": float(figures["slo_attainment"][i]), "num_refused": 0, "num_abandoned": 0}
                rows.append(row | {f"{name}_by_decile": [] for name in ("attained", "refused", "abandoned")})
            return rows

        found.append(Search(criterion("ttft-median"), look_up, seeds.tolist(), ends).find(policy))
    return found


def capacity_draw(pool: Pool, seeds: np.ndarray) -> list[tuple[Any, Any]]:
    """Ends of the intervals of each capacity, then of each ratio to the first."""
    found = searches(pool, seeds)
    return [(c.ci_low, c.ci_high) for c in found] + [(r["ratio_ci_low"], r["ratio_ci_high"]) for r in ratios(found)[1:]]


def capacities(pool: Pool, draws: np.ndarray, workers: Places) -> list[tuple[str, str, str, float]]:
    """Coverage of the intervals of capacities and of their ratios."""
    everybody = searches(pool, np.arange(len(next(iter(pool.values()))["ttft_p50_s"])))
    truths = [c.qps for c in everybody] + [r["ratio"] for r in ratios(everybody)[1:]]
    grid = {key: figures for key, figures in pool.items() if key[0] == "grid"}
    ends = run_cells(capacity_draw, [(grid, picked) for picked in draws], workers, lambda text: None)
    names = [("capacity", p) for p in CAPACITY_QPS] + [("capacity ratio", f"{p} / {BASE}") for p in CAPACITY_QPS][1:]
    shares = [
        np.mean([covers(bounds[j], truths[j]) for bounds in ends if None not in bounds[j]])  # a capacity in the range
        for j in range(len(truths))
    ]
    return [(kind, "ttft-median", who, float(s)) for (kind, who), s in zip(names, shares, strict=True)]


def measure(pool_size: int, num_draws: int, workers: Places, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row per kind of interval, figure, load and number of seeds: the policies with the lowest coverage."""
    pool = simulate_pool(pool_size, workers, note)
    rng = np.random.default_rng(0)
    rows = []
    for size in SIZES:
        draws = rng.integers(pool_size, size=(num_draws, size))
        found = [(share, *entry) for share in SHARES for entry in at_load(pool, share, draws)]
        few = draws[: max(1, num_draws // 2)]
        found += [(None, *entry) for entry in capacities(pool, few, workers)]
        for share, kind, figure in dict.fromkeys(entry[:3] for entry in found):
            own = [entry for entry in found if entry[:3] == (share, kind, figure)]
            *_, who, covered = min(own, key=lambda entry: entry[-1])
            row = {"kind": kind, "figure": figure, "share": share, "seeds": size, "coverage": covered}
            rows.append(row | {"lowest": who, "among": len(own)})
        note(f"{size} seeds")
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each kind, figure and load."""
    lines = []
    for kind, figure, share in dict.fromkeys((r["kind"], r["figure"], r["share"]) for r in rows):
        own = {r["seeds"]: r for r in rows if (r["kind"], r["figure"], r["share"]) == (kind, figure, share)}
        cells = [f"{100 * own[size]['coverage']:.1f} %" for size in SIZES]
        load = "" if share is None else f"{share:g}"
        lines.append((kind, figure, load, *cells, own[SIZES[0]]["among"]))
    return text.table(("interval", "figure", "load", "10 seeds", "20 seeds", "lowest of"), lines, 2)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pool", type=int, default=400, help="seeds simulated")
    parser.add_argument("--draws", type=int, default=500, help="samples of each size; half as many for capacities")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    add_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if min(args.pool, args.draws, args.workers) < 1:
        parser.error("--pool, --draws and --workers: expected whole numbers >= 1")

    def note(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)

    with choose(args.workers, args.ray, args.ray_address) as places:
        rows = measure(args.pool, args.draws, places, note)
    print(json.dumps(rows) if args.json else table(rows))
    low = [r for r in rows if r["coverage"] < ENOUGH]
    for r in low:
        print(f"below {ENOUGH:.0%}: {r['kind']} of {r['figure']}, {r['seeds']} seeds: {r['lowest']}", file=sys.stderr)
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main())
