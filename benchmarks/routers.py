"""Which router is best where, what sessions kept together are worth against balance, and what old reports cost.

    python -m benchmarks.routers --out out/routers [--section suites,weight,staleness] [--suite NAME]... [--share X]...
                                 [--router NAME]... [--policy NAME]... [--seeds 10] [--num-requests 2000] [--workers N]
                                 [--ray | --ray-address A]

suites: every router with every scheduler on the suites of replicas, at shares of their fluid capacity. weight:
`prefix-affinity` on the suites with caches over its weight, from load alone to the cache alone, with its check of load
and without. staleness: routers that look at replicas, with reports that are up to 0, 0.1, 1 and 5 s old. The last two
at one share of the capacity. All routers of a world meet the same requests.

Prints Markdown and writes SECTION.md, weight.png and staleness.png into the folder. The runs themselves are in folders
of `llmsched report`; a run that was interrupted goes on where it stopped. Workers write there, so those of a
cluster are to share it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks import whole
from llmsched_gym.config import CLUSTER_SUITES, ClusterScenario, ConfigError, scenario
from llmsched_gym.evaluation.grid import evaluate, seed_range
from llmsched_gym.evaluation.spread import add_options, choose, run_cells
from llmsched_gym.files import make_folder, replace_file, write_text
from llmsched_gym.fluid import cluster_fluid
from llmsched_gym.help_text import place
from llmsched_gym.registry import make_router, make_scheduler, routers
from llmsched_gym.report import draw, intervals
from llmsched_gym.scheduler import PolicyError
from llmsched_gym.text import number, table

POLICIES = ("slai", "on-time")
SHARES = (0.7, 0.9)
ONE_SHARE = 0.9  # of the fluid capacity, where one load has to do
WEIGHTS = ("0", "0.25", "0.5", "1", "2", "4", "16")
UNCHECKED = ("1", "4", "16")  # weights that are tried without the check of load, too
STALENESS_S = (0.0, 0.1, 1.0, 5.0)
NAMED = 2  # routers as good as the best that are named beside it
BLIND = ("round-robin", "random")  # routers to whom reports are nothing

Rows = list[dict[str, Any]]


class World(NamedTuple):
    """One router with one scheduler at one load of a suite."""

    suite: str
    share: float
    staleness_s: float
    scheduler: str
    router: str

    @property
    def folder(self) -> str:
        return f"{self.suite}-{self.share:g}/{self.staleness_s:g}s/{self.scheduler}/{self.router}"


Found = dict[World, Rows]


@cache
def capacity(suite: str) -> float:
    """Of all replicas, requests (of conversations: sessions) per second."""
    world = scenario(suite)
    assert isinstance(world, ClusterScenario)
    return cluster_fluid(world).qps


def run(world: World, seeds: int, first_seed: int, num_requests: int, out: Path) -> Rows:
    """The rows of all seeds."""
    base = scenario(world.suite, num_requests=num_requests, router_staleness_s=world.staleness_s)
    return evaluate(
        base,
        [f"{world.router}+{world.scheduler}"],
        qps=[round(world.share * capacity(world.suite), 4)],
        seeds=seeds,
        first_seed=first_seed,
        out=out / world.folder,
    )


# --- what is run


def suites(args: argparse.Namespace) -> list[World]:
    """All routers with all schedulers."""
    return [
        World(suite, share, 0.0, policy, router)
        for suite in args.suite
        for share in args.share
        for policy in args.policy
        for router in args.router
    ]


def weight(args: argparse.Namespace) -> list[World]:
    """`prefix-affinity` where something is cached."""
    specs = [affinity(w, "32") for w in WEIGHTS] + [affinity(w, "inf") for w in UNCHECKED]
    cached = [suite for suite in args.suite if scenario(suite).prefix_caching][:1]
    return [World(suite, ONE_SHARE, 0.0, policy, spec) for suite in cached for policy in args.policy for spec in specs]


def affinity(weight: str, imbalance: str) -> str:
    return f"prefix-affinity[weight={weight},imbalance={imbalance}]"


def staleness(args: argparse.Namespace) -> list[World]:
    """Routers that look, under the last of the schedulers."""
    return [
        World(suite, ONE_SHARE, age_s, args.policy[-1], router)
        for suite in args.suite
        for age_s in STALENESS_S
        for router in args.router
        if router not in BLIND
    ]


# --- what it says


def values(rows: Rows, column: str, unit: float = 1.0) -> list[float]:
    return [unit * row[column] for row in rows]


def token_imbalance(rows: Rows) -> float:
    """Tokens computed by the replica with the most over the mean, averaged over seeds."""
    return float(np.mean([max(row["tokens_by_replica"]) / np.mean(row["tokens_by_replica"]) for row in rows]))


def plus_minus(found: Sequence[float], digits: int) -> str:
    """A mean over seeds and half the width of its interval."""
    ends = intervals.interval(found)
    around = "" if ends is None else f" ±{number((ends[1] - ends[0]) / 2, digits).removeprefix('0')}"
    return number(float(np.mean(found)), digits) + around


def best_and_ties(found: dict[str, list[float]]) -> tuple[str, list[str]]:
    """The highest mean, and whom paired differences do not tell from it."""
    best = max(found, key=lambda name: float(np.mean(found[name])))
    ends = {name: intervals.difference(own, found[best]) for name, own in found.items() if name != best}
    return best, [name for name, end in ends.items() if end is None or end[1] >= 0.0]


def marked(columns: list[dict[str, list[float]]], names: Sequence[str], digits: int) -> list[list[str]]:
    """A line for each name with a cell for each column: the best bold, an asterisk for whom nothing tells from it."""
    lines: list[list[str]] = [[name] for name in names]
    for column in columns:
        best, ties = best_and_ties(column)
        for line in lines:
            cell = plus_minus(column[line[0]], digits)
            line.append(f"**{cell}**" if line[0] == best else f"{cell}*" if line[0] in ties else cell)
    return lines


def suites_text(found: Found) -> str:
    """Utility, attainment, hits and balance of every router; then who wins where."""
    parts, wins = [], []
    for suite in dict.fromkeys(world.suite for world in found):
        own = {world: rows for world, rows in found.items() if world.suite == suite}
        names = list(dict.fromkeys(world.router for world in own))
        heads = list(dict.fromkeys((world.scheduler, world.share) for world in own))

        def columns(column: str, unit: float, own: Found = own, heads: Any = heads) -> list[dict[str, list[float]]]:
            return [
                {w.router: values(rows, column, unit) for w, rows in own.items() if (w.scheduler, w.share) == head}
                for head in heads
            ]

        utility = columns("mean_utility", 1.0)
        for head, column in zip(heads, utility, strict=True):
            best, ties = best_and_ties(column)
            same = ", ".join(ties[:NAMED]) + f", {len(ties) - NAMED} more" * (len(ties) > NAMED) or "-"
            wins.append([suite, f"{head[1]:g}", head[0], best, plus_minus(column[best], 3), same])
        labels = [f"{policy}, {share:g}" for policy, share in heads]
        rate = f"{capacity(suite):.3g}/s are its fluid capacity"
        for what, lines in (
            (f"mean utility; {rate}", marked(utility, names, 3)),
            ("requests within all SLOs, %", marked(columns("slo_attainment", 100.0), names, 1)),
        ):
            parts.append(f"`{suite}`, {what}:\n\n" + table(["router", *labels], lines, 1))
        if scenario(suite).prefix_caching:
            parts.append(f"`{suite}`, {balance_text(own, names, heads)}")
    head = ["suite", "load", "scheduler", "best", "its utility", "not told apart"]
    return "Where each wins:\n\n" + table(head, wins, 6) + "\n\n" + "\n\n".join(parts)


def balance_text(own: Found, names: Sequence[str], heads: Sequence[tuple[str, float]]) -> str:
    """Hit rates and how uneven the tokens are, per scheduler and load."""
    lines = []
    for name in names:
        cells = []
        for head in heads:
            rows = next(r for w, r in own.items() if (w.router, w.scheduler, w.share) == (name, *head))
            cells.append(f"{hits(rows)}, {token_imbalance(rows):.2f}")
        lines.append([name, *cells])
    labels = [f"{policy}, {share:g}" for policy, share in heads]
    what = "prompt tokens found cached in %, and tokens of the busiest replica over the mean"
    return f"{what}:\n\n" + table(["router", *labels], lines, 1)


def hits(rows: Rows) -> str:
    shares = [row["prefix_hit_rate"] for row in rows]
    return "-" if None in shares else number(100 * float(np.mean(shares)), 0)


def weight_text(found: Found) -> str:
    parts = []
    for suite, policy in dict.fromkeys((world.suite, world.scheduler) for world in found):
        own = {w.router: rows for w, rows in found.items() if (w.suite, w.scheduler) == (suite, policy)}
        utilities = {spec: values(rows, "mean_utility") for spec, rows in own.items()}
        best, ties = best_and_ties(utilities)
        lines = []
        for spec, rows in own.items():
            w, i = parameters(spec)
            cell = plus_minus(utilities[spec], 3)
            cell = f"**{cell}**" if spec == best else f"{cell}*" if spec in ties else cell
            attained = plus_minus(values(rows, "slo_attainment", 100.0), 1)
            busy = number(float(np.mean(values(rows, "imbalance"))), 3)
            lines.append([w, i, cell, attained, hits(rows), number(token_imbalance(rows), 3), busy])
        head = ["weight", "imbalance", "utility", "attained, %", "hits, %", "tokens", "busy"]
        parts.append(f"`{suite}` at {ONE_SHARE:g} of its capacity, `{policy}` inside:\n\n" + table(head, lines, 0))
    return "\n\n".join(parts)


def parameters(spec: str) -> list[str]:
    """The values in the brackets of a router."""
    return [part.partition("=")[2] for part in spec.partition("[")[2].rstrip("]").split(",")]


def staleness_text(found: Found) -> str:
    parts = []
    for suite in dict.fromkeys(world.suite for world in found):
        own = {w: rows for w, rows in found.items() if w.suite == suite}
        ages = list(dict.fromkeys(w.staleness_s for w in own))
        columns = [{w.router: values(r, "mean_utility") for w, r in own.items() if w.staleness_s == s} for s in ages]
        lines = marked(columns, list(columns[0]), 3)
        policy = next(iter(own)).scheduler
        title = f"`{suite}` at {ONE_SHARE:g} of its capacity, `{policy}` inside, mean utility:\n\n"
        parts.append(title + table(["router", *(f"{s:g} s" if s else "always fresh" for s in ages)], lines, 1))
    return "\n\n".join(parts)


# --- figures


def band(ax: Any, x: Sequence[float], found: list[list[float]], style: draw.Style, label: str) -> None:
    """Means over seeds with their intervals."""
    means = [float(np.mean(own)) for own in found]
    ax.plot(x, means, color=style.colour, marker=style.marker, linestyle=style.dash, label=label)
    ends = [intervals.interval(own) for own in found]
    if all(end is not None for end in ends):
        ax.fill_between(x, *np.transpose(np.array(ends, float)), color=style.colour, alpha=0.13, linewidth=0)


@draw.styled
def plot_weight(found: Found) -> Figure:
    """Utility, hit rate and balance over the weight of `prefix-affinity`, with its check of load."""
    suite = next(iter(found)).suite
    figure = draw.new_figure(draw.WIDTH, 6.6)
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
    panels[0].set_title(f"prefix-affinity on {suite} at {100 * ONE_SHARE:g} % of its fluid capacity")
    policies = list(dict.fromkeys(world.scheduler for world in found))
    places = range(len(WEIGHTS))
    for policy, style in draw.policy_styles(policies).items():
        own = [found[World(suite, ONE_SHARE, 0.0, policy, affinity(w, "32"))] for w in WEIGHTS]
        band(panels[0], places, [values(rows, "mean_utility") for rows in own], style, f"{policy} inside")
        band(panels[1], places, [values(rows, "prefix_hit_rate", 100.0) for rows in own], style, policy)
        band(panels[2], places, [[token_imbalance([row]) for row in rows] for rows in own], style, policy)
    panels[0].set_ylabel("Mean utility")
    panels[1].set_ylabel("Hit rate (%)")
    panels[2].set_ylabel("Most tokens / mean")
    panels[2].set_xticks(places, WEIGHTS)
    panels[2].set_xlabel("Weight of the cached share of the prompt against load (0: load alone)")
    panels[0].legend()
    return figure


@draw.styled
def plot_staleness(found: Found) -> Figure:
    """Utility over the age of reports, a panel a suite, a line a router."""
    names = list(dict.fromkeys(world.suite for world in found))
    figure = draw.new_figure(draw.WIDTH, 2.5 * len(names) + 0.4)
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    chosen = list(dict.fromkeys(world.router for world in found))
    ages = list(dict.fromkeys(world.staleness_s for world in found))
    for panel, suite in zip(panels, names, strict=True):
        policy = next(w.scheduler for w in found if w.suite == suite)
        for router, style in draw.policy_styles(chosen).items():
            own = [values(found[World(suite, ONE_SHARE, s, policy, router)], "mean_utility") for s in ages]
            band(panel, range(len(ages)), own, style, router)
        panel.set_title(f"{suite}, {policy} inside, {100 * ONE_SHARE:g} % of its fluid capacity")
        panel.set_ylabel("Mean utility")
    panels[-1].set_xticks(range(len(ages)), [f"{age_s:g}" if age_s else "always fresh" for age_s in ages])
    panels[-1].set_xlabel("Time between two reports of a replica (s)")
    draw.legend(figure, chosen)
    return figure


SECTIONS: dict[str, tuple[Callable[[Any], list[World]], Callable[[Found], str], Callable[[Found], Figure] | None]] = {
    "suites": (suites, suites_text, None),
    "weight": (weight, weight_text, plot_weight),
    "staleness": (staleness, staleness_text, plot_staleness),
}


def measure(args: argparse.Namespace) -> None:
    """Run the sections asked for, and write what they show."""
    for router in args.router:
        make_router(router)
    for policy in args.policy:
        make_scheduler(policy)
    seed_range(args.seeds, args.first_seed)
    make_folder(args.out)
    for section in args.section:
        worlds, text, plot = SECTIONS[section]
        chosen = worlds(args)
        if not chosen:
            continue
        settings = (args.seeds, args.first_seed, args.num_requests, args.out)

        def note(done: str, section: str = section) -> None:
            print(f"{section}: {done}", file=sys.stderr, flush=True)

        with choose(args.workers, args.ray, args.ray_address, [*args.router, *args.policy]) as places:
            rows = run_cells(run, [(world, *settings) for world in chosen], places, note)
        found = dict(zip(chosen, rows, strict=True))
        write_text(args.out / f"{section}.md", text(found) + "\n")
        print(text(found) + "\n")
        if plot is not None:
            figure, kind = plot(found), {"format": "png", "dpi": 150, "metadata": {"Software": None}}
            replace_file(args.out / f"{section}.png", lambda path, f=figure, k=kind: f.savefig(path, **k))


def section_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SECTIONS:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(SECTIONS)}, got {name!r}")
    return list(dict.fromkeys(names))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=place, default=Path("out/routers"), help="folder of runs, tables and figures")
    parser.add_argument("--section", type=section_names, default=list(SECTIONS), help=",".join(SECTIONS))
    parser.add_argument("--suite", action="append", choices=list(CLUSTER_SUITES), help="by default all of replicas")
    parser.add_argument("--share", type=float, action="append", help=f"of the fluid capacity, by default {SHARES}")
    parser.add_argument("--router", action="append", help="by default all that are registered")
    parser.add_argument("--policy", action="append", help=f"schedulers, by default {', '.join(POLICIES)}")
    parser.add_argument("--seeds", type=int, default=10, help="how many; below ten there are no intervals")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--num-requests", type=int, default=2000, help="measured requests of a run")
    parser.add_argument("--workers", type=whole, default=os.cpu_count() or 1, help="processes")
    add_options(parser)
    args = parser.parse_args(argv)
    args.suite = args.suite or list(CLUSTER_SUITES)
    args.share = args.share or list(SHARES)
    args.router = args.router or list(routers())
    args.policy = args.policy or list(POLICIES)
    try:
        measure(args)
    except (ConfigError, PolicyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
