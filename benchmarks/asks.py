"""Four questions of serving engineers, answered with the schedulers here: budgets, long gaps, prefills at once, aging.

    python -m benchmarks.asks [--ask budgets,gaps,prefills,aging] [--seeds 50] [--first-seed 0] [--num-requests 2000]
                              [--workers N] [--ray | --ray-address A]

budgets: static token budgets against rules that adapt. gaps: the longest gap between tokens after a burst of prompts,
where batches have one phase. prefills: a limit on prompts under way. aging: shortest first, with and without a bound
on what long prompts wait. All on the paper's suite, at shares of the load that `sarathi` carries (a median TTFT of
0.5 s, docs/results.md). Prints a Markdown table for each; the changes are paired by seed, against the first scheduler
of each group of lines.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmsched_gym.config import scenario
from llmsched_gym.evaluation.gaps import percentile
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.outcomes import NUM_DECILES, Outcomes
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.evaluation.spread import Places, add_options, choose, run_cells
from llmsched_gym.report import intervals
from llmsched_gym.text import between, number, table
from llmsched_gym.workload import RequestTable, make_table

SARATHI_QPS = 1.37
"""Requests/s that `sarathi` carries on the paper's suite (docs/results.md)."""
BURST = 64
"""Requests that come at one moment, amid the others."""
BURST_RUN = 400
"""Requests of a run with a burst, at most: the burst is in the middle."""
NO_AGING_S = 1000
"""A half-life behind which nobody's wait counts: `preflow` without aging."""

LABELS = {
    "slo_attainment": "attained, %",
    "longest_attained": "longest tenth attained, %",
    "ttft_p50_s": "TTFT p50, s",
    "ttft_p99_s": "TTFT p99, s",
    "itl_p99_s": "ITL p99, s",
    "strict_itl_p99_s": "strict users' ITL p99, s",
    "gap_max_s": "longest gap, s",
    "longest_ttft_p99_s": "longest tenth's TTFT p99, s",
    "ttft_max_s": "largest TTFT, s",
    "num_preemptions": "preemptions",
}
MEANS = {"slo_attainment": 100.0, "longest_attained": 100.0, "num_preemptions": 1.0}
"""Figures of which the mean over seeds is shown, times so much, and changes as differences.

All others are latencies: of them the median is shown, and changes as ratios.
"""


@dataclass(frozen=True)
class Ask:
    """A question: which schedulers, compared with the first of their group, at which loads, by which figures."""

    title: str
    shares: tuple[float, ...]  # of SARATHI_QPS
    groups: tuple[tuple[str, ...], ...]  # policies; the first is what the others are compared with
    figures: tuple[str, ...]  # of LABELS
    burst: int = 0  # requests that come at one moment


def limited(base: str, options: str = "") -> tuple[str, ...]:
    """`base` and its limits on prompts under way."""
    return (base, *(f"max-prefills[n={n}{options}]" for n in (1, 2, 4, 8)))


ASKS = {
    "budgets": Ask(
        "Static token budgets",
        (0.8, 1.0),
        (
            (
                "sarathi",
                *(f"sarathi[budget={budget}]" for budget in (256, 1024, 2048)),
                *("ppas", "ppas+", "slai", "on-time"),
            ),
            ("vllm-v1", "ppas", "ppas+"),
        ),
        ("ttft_p99_s", "itl_p99_s", "strict_itl_p99_s", "slo_attainment"),
    ),
    "gaps": Ask(
        f"The longest gap where {BURST} prompts come at once",
        (0.8,),
        (
            ("vllm-v0", "eb", *(f"interleave[k={k},m={m}]" for k, m in ((1, 1), (2, 1), (2, 4), (8, 1)))),
            ("sglang", *(f"sglang[consecutive={n}]" for n in (1, 2, 8)), "sglang[consecutive=1,chunk=2048]"),
            ("vllm-v1", "sarathi"),
        ),
        ("gap_max_s", "ttft_p99_s", "slo_attainment"),
        BURST,
    ),
    "prefills": Ask(
        "Prompts under way at once",
        (1.0, 1.2),
        (
            (*limited("vllm-v1"), "vllm-v1[threshold=256]"),
            limited("vllm-v1[threshold=256]", ",threshold=256"),
        ),
        ("ttft_p50_s", "ttft_p99_s", "itl_p99_s", "num_preemptions", "slo_attainment"),
    ),
    "aging": Ask(
        "Shortest first, and what long prompts wait",
        (1.0, 1.2),
        (
            ("sarathi", "sarathi-spf", "srpt-capped", "on-time", "on-time[age=15]"),
            ("vllm-v1", "vllm-slo", "preflow"),
            (f"preflow[half={NO_AGING_S}]", *(f"preflow[half={half}]" for half in (1, 5, 20))),
        ),
        ("slo_attainment", "longest_attained", "longest_ttft_p99_s", "ttft_max_s"),
    ),
}


def with_burst(given: RequestTable, size: int) -> RequestTable:
    """The same requests, of which `size` in the middle of the cohort all come when the first of them does."""
    arrival_s = given.arrival_s.copy()
    start = (given.cohort_start + given.cohort_stop - size) // 2
    arrival_s[start : start + size] = arrival_s[start]
    return replace(given, arrival_s=arrival_s)


def run(policy: str, qps: float, seed: int, num_requests: int, burst: int) -> dict[str, Any]:
    """A run's row, and the figures of LABELS that rows do not have."""
    world = scenario("paper", qps=qps, num_requests=num_requests)
    given = make_table(world, seed)
    episode = simulate(world, policy, seed, table=with_burst(given, burst) if burst else given)
    outcomes = Outcomes(episode)
    longest = outcomes.decile == NUM_DECILES - 1
    found = row(episode, outcomes)
    return found | {
        "strict_itl_p99_s": found["itl_p99_s_by_class"]["strict"],
        "gap_max_s": float(np.nanmax(outcomes.max_itl_s, initial=0.0)),
        "longest_attained": outcomes.share(outcomes.attained, longest),
        "longest_ttft_p99_s": percentile(outcomes.ttft_s[longest], 0.99),
        "ttft_max_s": percentile(outcomes.ttft_s, 1.0),
    }


def measure(ask: Ask, seeds: Sequence[int], num_requests: int, places: Places) -> list[dict[str, Any]]:
    """Rows of every scheduler of an ask on the same requests."""
    policies = list(dict.fromkeys(policy for group in ask.groups for policy in group))
    size = min(num_requests, BURST_RUN) if ask.burst else num_requests
    loads = [load_of(share) for share in ask.shares]
    cells = [(policy, qps, seed, size, ask.burst) for policy in policies for qps in loads for seed in seeds]
    return run_cells(run, cells, places)


def load_of(share: float) -> float:
    """Requests/s at a share of what `sarathi` carries."""
    return round(share * SARATHI_QPS, 2)


def estimate(figure: str, values: intervals.Values, *, interval: bool) -> str:
    """A figure over seeds in the unit of its label, with its interval if that is wanted."""
    if figure in MEANS:
        values = [None if value is None else MEANS[figure] * value for value in values]
        most = math.inf if figure == "num_preemptions" else MEANS[figure]
        middle, ends = intervals.mean(values), intervals.interval(values, (0.0, most))
    else:
        middle, ends = intervals.median(values), intervals.median_interval(values)
    return number(middle, none="inf") + (between(*ends) if interval and ends else "")


def change(figure: str, rows: Sequence[dict[str, Any]], policy: str, base: str) -> str:
    """Change against `base` on the same seeds with its interval: of latencies in percent, of shares in points."""
    (entry,) = intervals.compare(rows, figure, policy, base)
    name, sign, digits = ("difference", 1, 2) if figure in MEANS else ("reduction", -1, 0)
    scale = sign * MEANS.get(figure, 100.0)
    value, *ends = (
        None if found is None else round(scale * found, digits) + 0.0  # -0 is 0
        for found in (entry[name], entry[f"{name}_ci_low"], entry[f"{name}_ci_high"])
    )
    unit, form = "" if name == "difference" else " %", f"+.{digits}f"
    return number(value, form) + unit + between(*ends[::sign], form)


def table_of(ask: Ask, rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each load and scheduler; figures of the first of a group have their interval."""
    lines = []
    for share in ask.shares:
        qps = load_of(share)
        here = [row for row in rows if row["requested_qps"] == qps]
        for group in ask.groups:
            for policy in group:
                cells = []
                for figure in ask.figures:
                    values = [row[figure] for row in here if row["policy"] == policy]
                    is_base = policy == group[0]
                    cells.append(estimate(figure, values, interval=is_base))
                    cells.append("base" if is_base else change(figure, here, policy, group[0]))
                lines.append((f"{qps:g}", f"`{policy}`", *cells))
    head = [text for figure in ask.figures for text in (LABELS[figure], "change")]
    return table(("requests/s", "scheduler", *head), lines, 2)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.asks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ask", default=",".join(ASKS), help=f"of {', '.join(ASKS)}")
    parser.add_argument("--seeds", type=int, default=50, help="how many; there are no intervals below 10")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--num-requests", type=int, default=2000, help="of a run; one with a burst has at most 400")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    add_options(parser)
    args = parser.parse_args(argv)
    names = args.ask.split(",")
    for name in names:
        if name not in ASKS:
            parser.error(f"--ask: expected some of {', '.join(ASKS)}, got {name!r}")
    if min(args.seeds, args.workers) < 1 or args.first_seed < 0 or args.num_requests < BURST:
        parser.error(f"expected --seeds and --workers >= 1, --first-seed >= 0 and --num-requests >= {BURST}")
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    with choose(args.workers, args.ray, args.ray_address) as places:
        for name in names:
            rows = measure(ASKS[name], seeds, args.num_requests, places)
            print(f"\n### {ASKS[name].title}\n\n{table_of(ASKS[name], rows)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
