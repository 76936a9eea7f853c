"""What it costs that prompts which are too late age into service: attainment against the tail of TTFT.

    python -m benchmarks.aging [--qps 1.8] [--seeds 20] [--first-seed 0] [--figure docs/figures/aging.png] [--workers N]
                               [--ray | --ray-address A]

All requests of all seeds on the paper's suite are pooled, so that the largest TTFT is the worst anybody had. Prints a
table: Sarathi-Serve, `on-time`, and `on-time` at several ages.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from llmsched_gym import text
from llmsched_gym.config import scenario
from llmsched_gym.evaluation.gaps import percentile
from llmsched_gym.evaluation.outcomes import Outcomes
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.evaluation.spread import Places, add_options, choose, run_cells
from llmsched_gym.report import draw

AGES_S = (10, 15, 20, 30, 60, 90)
REFERENCES = ("sarathi", "on-time")
TAILS = {"p99": 0.99, "p99.9": 0.999, "largest": 1.0}


class Pooled(NamedTuple):
    """What became of the requests of all seeds under one policy."""

    policy: str
    attainment: float  # share within all SLOs
    median_s: float
    tails_s: dict[str, float]  # TTFT, by name


def pooled(policy: str, ttft_s: np.ndarray, attained: np.ndarray) -> Pooled:
    """Figures of requests; a TTFT that never came is infinite."""

    def quantile(q: float) -> float:
        found = percentile(ttft_s, q)
        return math.inf if found is None else found

    tails = {name: quantile(q) for name, q in TAILS.items()}
    return Pooled(policy, float(attained.mean()), quantile(0.5), tails)


def run(policy: str, qps: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """TTFT (s) of each request of a seed, and whether it attained its SLOs."""
    outcomes = Outcomes(simulate(scenario("paper", qps=qps), policy, seed))
    return outcomes.ttft_s, outcomes.attained


def measure(qps: float, seeds: Sequence[int], workers: Places) -> list[Pooled]:
    """Every policy on the same requests."""
    policies = [*REFERENCES, *(f"on-time[age={age}]" for age in AGES_S)]
    cells = [(policy, qps, seed) for policy in policies for seed in seeds]
    found = run_cells(run, cells, workers, lambda text: None)
    rows = []
    for i, policy in enumerate(policies):
        own = found[i * len(seeds) : (i + 1) * len(seeds)]
        rows.append(pooled(policy, *(np.concatenate(column) for column in zip(*own, strict=True))))
    return rows


def table(rows: Sequence[Pooled]) -> str:
    """Markdown: a line for each policy."""
    lines = []
    for row in rows:
        tails = (f"{seconds:.1f}" for seconds in row.tails_s.values())
        lines.append((f"`{row.policy}`", f"{100 * row.attainment:.1f} %", f"{row.median_s:.2f}", *tails))
    return text.table(("scheduler", "within all SLOs", "median TTFT (s)", "p99", "p99.9", "largest"), lines, 1)


@draw.styled
def plot(rows: Sequence[Pooled], qps: float) -> Figure:
    """Missed SLOs against p99 and the largest TTFT: a line over the ages, the references as points."""
    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    aged = [row for row in rows if row.policy not in REFERENCES]
    styles = draw.policy_styles(REFERENCES)
    missed = {row.policy: 100 * (1 - row.attainment) for row in rows}
    for ax, tail in zip(figure.subplots(1, 2, sharey=True), ("p99", "largest"), strict=True):
        ax.plot([r.tails_s[tail] for r in aged], [missed[r.policy] for r in aged], ".-", color="#117733", zorder=1)
        labelled_s = 0.0
        for row, age in zip(aged, AGES_S, strict=True):
            if row.tails_s[tail] > 1.08 * labelled_s:  # else it would lie on the last label
                labelled_s = row.tails_s[tail]
                ax.annotate(
                    f"{age} s", (labelled_s, missed[row.policy]), (4, 4), textcoords="offset points", fontsize=8
                )
        for name, style in styles.items():
            at = next((r.tails_s[tail], missed[name]) for r in rows if r.policy == name)
            ax.plot(*at, style.marker, color=style.colour, markersize=7)
            ax.annotate(name, at, (0, 9), textcoords="offset points", ha="center", fontsize=8.8)
        ends = [f(r.tails_s[tail] for r in rows) for f in (min, max)]
        ax.set_xscale("log")
        ax.set_xlim(ends[0] / 1.5, ends[1] * 1.5)
        draw.log_ticks(ax.xaxis, *ax.get_xlim())
        ax.set_xlabel(f"{tail if tail == 'p99' else 'Largest'} TTFT (s, log scale)")
    first = figure.axes[0]
    first.set_yscale("log")
    first.set_ylim(min(missed.values()) / 1.5, 1.6 * max(missed.values()))
    draw.log_ticks(first.yaxis, *first.get_ylim())
    first.set_ylabel("Requests that miss an SLO (%, log scale)")
    first.set_title(f"on-time[age=...] at {qps:g} requests/s")
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aging", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--qps", type=float, default=1.8, help="requests per second")
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--figure", type=Path, help="where to write the figure")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    add_options(parser)
    args = parser.parse_args()
    if min(args.seeds, args.workers) < 1 or args.first_seed < 0 or not 0 < args.qps < math.inf:
        parser.error("expected --seeds and --workers >= 1, --first-seed >= 0 and a finite --qps > 0")
    with choose(args.workers, args.ray, args.ray_address) as places:
        rows = measure(args.qps, range(args.first_seed, args.first_seed + args.seeds), places)
    print(table(rows))
    if args.figure:
        args.figure.parent.mkdir(parents=True, exist_ok=True)
        plot(rows, args.qps).savefig(args.figure, format="png", dpi=150, metadata={"Software": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
