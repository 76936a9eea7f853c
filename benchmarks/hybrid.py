"""Who is best where decodes cost more beside a prompt chunk: three sets of runs, their tables and a figure.

    python -m benchmarks.hybrid --out out/hybrid [--section facts,loads,axis] [--seeds 20] [--num-requests 1500]
                                [--policy NAME]... [--candidate NAME] [--workers N]
                                 [--ray | --ray-address A]

facts: the measured vLLM profiles and their additive twins, at fixed rates. loads: every shipped profile at 0.8, 0.9 and
1.0 of its fluid capacity, one candidate against the best of all others. axis: the default profile with the attention of
decodes beside a chunk 1 to 4 times as dear, at 0.9 of each one's fluid capacity. The paper suite's users and lengths,
15,000 KV blocks everywhere. A run that was interrupted goes on where it stopped.

Writes SECTION.csv, SECTION.md and axis.png into the folder; the runs themselves are in folders of `llmsched report`.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from llmsched_gym.config import ConfigError, Scenario, scenario
from llmsched_gym.cost import PROFILES
from llmsched_gym.evaluation.grid import evaluate, seed_range
from llmsched_gym.evaluation.spread import add_options, choose, run_cells
from llmsched_gym.files import make_folder, replace_file, write_text
from llmsched_gym.fluid import fluid_capacity
from llmsched_gym.help_text import place
from llmsched_gym.paper.page.text import between, number, table
from llmsched_gym.registry import make_scheduler
from llmsched_gym.report import draw, intervals
from llmsched_gym.scheduler import PolicyError

CANDIDATE = "on-time[mix=auto]"
UNMIXED = "on-time[mix=together]"  # without the candidate's rule
TUNED = ("srpt-capped[cap=0.8,margin=3]", "feasible-first[cap=0.8,margin=3,hold=true]", "slai[cap=0.8,hold=true]")
POLICIES = ("sarathi", "slai", "srpt-capped", "feasible-first", *TUNED, UNMIXED, "learned")
PACED = "llmsched_gym.baselines.exclusive:EXCLUSIVE"
EXCLUSIVE = ("vllm-v0", PACED, f"{PACED}[cap=0.65,margin=1.4]")  # never a batch with both phases
AXIS_POLICIES = ("sarathi", "vllm-v1", *EXCLUSIVE, *POLICIES[1:])
KV_BLOCKS = 15_000
FACTS = {"rtxpro6000-llama-3.1-8b-vllm": (3.0, 3.5), "rtx4090-llama-3.1-8b-vllm": (1.8,)}
SHARES = (0.8, 0.9, 1.0)  # of the fluid capacity
AXIS_PROFILE, AXIS_SHARE = "rtx6000ada-mistral-7b", 0.9
FACTORS = (1.0, 1.5, 2.0, 3.0, 4.0)
MARGIN = 0.005
"""The candidate counts as equal to the best while the interval of the difference does not go below minus this."""

Row = dict[str, Any]


class World(NamedTuple):
    """Runs of some policies on the same requests."""

    section: str
    profile: str
    at: float  # what the section varies: rate, share of the fluid capacity, or factor
    qps: float
    policies: tuple[str, ...]

    @property
    def folder(self) -> str:
        name = self.profile.replace("[", "-").replace("]", "").replace("=", "-")
        return f"{self.section}/{name}/{self.at:g}"


def base() -> Scenario:
    return scenario("paper", num_kv_blocks=KV_BLOCKS)


def capacity(profile: str) -> float:
    return fluid_capacity(base().replace(profile=profile)).qps


def facts(more: Sequence[str]) -> list[World]:
    """The measured profiles and their twins at the same rates."""
    names = [(name + twin, qps) for name, rates in FACTS.items() for qps in rates for twin in ("", "[additive=true]")]
    return [World("facts", name, qps, qps, unique(*POLICIES, *more)) for name, qps in names]


def loads(more: Sequence[str]) -> list[World]:
    """All shipped profiles at shares of their own fluid capacity."""
    policies = unique(*POLICIES, *more)
    return [
        World("loads", name, share, share * qps, policies)
        for name, qps in ((name, capacity(name)) for name in PROFILES)
        for share in SHARES
    ]


def axis(more: Sequence[str]) -> list[World]:
    """The default profile at several prices of mixing."""
    names = {factor: f"{AXIS_PROFILE}[mixing={factor:g}]" for factor in FACTORS}
    policies = unique(*AXIS_POLICIES, *more)
    return [World("axis", name, factor, AXIS_SHARE * capacity(name), policies) for factor, name in names.items()]


SECTIONS: dict[str, Callable[[Sequence[str]], list[World]]] = {"facts": facts, "loads": loads, "axis": axis}


def unique(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def run(world: World, seeds: int, first_seed: int, num_requests: int, out: Path) -> list[Row]:
    """What each policy attained: mean over seeds, interval, and the paired difference to the best of the others."""
    rows = evaluate(
        base().replace(profile=world.profile, num_requests=num_requests),
        world.policies,
        qps=[world.qps],
        seeds=seeds,
        first_seed=first_seed,
        out=out / world.folder,
    )
    shares = {p: [row["slo_attainment"] for row in rows if row["policy"] == p] for p in world.policies}
    return [summary(world, policy, shares) for policy in world.policies]


def summary(world: World, policy: str, shares: dict[str, list[float]]) -> Row:
    """One policy's row; ends of intervals are None below ten seeds."""
    means = {p: float(np.mean(values)) for p, values in shares.items()}
    # a variant of the same rule that did the same everywhere is no other policy
    name = policy.partition("[")[0]
    others = [p for p in means if p != policy and (p.partition("[")[0] != name or shares[p] != shares[policy])]
    best = max(others, key=means.__getitem__)
    ends = intervals.interval(shares[policy], (0.0, 1.0)) or (None, None)
    apart = intervals.difference(shares[policy], shares[best]) or (None, None)
    return {
        "section": world.section,
        "profile": world.profile,
        "at": world.at,
        "qps": world.qps,
        "policy": policy,
        "num_seeds": len(shares[policy]),
        "attainment": means[policy],
        "ci_low": ends[0],
        "ci_high": ends[1],
        "best_other": best,
        "difference": means[policy] - means[best],
        "difference_ci_low": apart[0],
        "difference_ci_high": apart[1],
    }


def verdict(row: Row) -> str:
    """Whether the policy is at least equal to the best of the others, as far as the seeds tell."""
    if row["difference_ci_low"] is None:
        return "too few seeds"
    if row["difference_ci_low"] > 0:
        return "better"
    return "equal" if row["difference_ci_low"] >= -MARGIN else "not shown" if row["difference_ci_high"] > 0 else "worse"


def winners(rows: Sequence[Row]) -> str:
    """The best policy of a world, and those that paired differences do not tell from it."""
    best = max(rows, key=lambda row: row["attainment"])
    tied = [
        row["policy"]
        for row in rows
        if row is not best and row["difference_ci_high"] is not None and row["difference_ci_high"] >= 0
    ]
    return ", ".join(f"`{short(policy)}`" for policy in (best["policy"], *tied))


def share(row: Row) -> str:
    """An attainment in per cent with its interval."""
    ends = (None if end is None else 100 * end for end in (row["ci_low"], row["ci_high"]))
    return number(100 * row["attainment"], 1) + between(*ends, 1)


def by_world(rows: Sequence[Row]) -> dict[tuple[str, float], list[Row]]:
    found: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        found.setdefault((row["profile"], row["at"]), []).append(row)
    return found


def policies_by_world(rows: Sequence[Row], head: str, label: Callable[[Row], str]) -> str:
    """Markdown: a line per world, a column per policy, and who wins."""
    policies = unique(*(row["policy"] for row in rows))
    lines = []
    for own in by_world(rows).values():
        shares = {row["policy"]: share(row) for row in own}
        lines.append([label(own[0]), *(shares.get(p, "-") for p in policies), winners(own)])
    return table([head, *(f"`{short(p)}`" for p in policies), "best"], lines)


def short(policy: str) -> str:
    """A policy's name without the modules in front of it."""
    return policy.rpartition(":")[2].lower() if ":" in policy else policy


def at_rate(row: Row) -> str:
    return f"{row['profile']}, {row['qps']:.3g}/s"


def facts_text(rows: Sequence[Row], candidate: str) -> str:
    return policies_by_world(rows, "within all SLOs, %", at_rate)


def loads_text(rows: Sequence[Row], candidate: str) -> str:
    """A line per profile and load: the candidate against the best of all others."""
    lines = []
    for (profile, at), own in by_world(rows).items():
        ours = next(row for row in own if row["policy"] == candidate)
        best = next(row for row in own if row["policy"] == ours["best_other"])
        ends = (None if e is None else 100 * e for e in (ours["difference_ci_low"], ours["difference_ci_high"]))
        apart = f"{100 * ours['difference']:+.2f}" + between(*ends)
        load = [profile, f"{at:g}", number(ours["qps"]), share(ours), f"`{short(best['policy'])}`", share(best), apart]
        lines.append([*load, verdict(ours)])
    heads = ["profile", "share of fluid capacity", "requests/s", f"`{candidate}`, %", "best other", "it, %"]
    whole = policies_by_world(rows, "within all SLOs, %", lambda row: f"{row['profile']}, {row['at']:g}")
    return table([*heads, "difference", "candidate is"], lines) + "\n\n" + whole


def axis_text(rows: Sequence[Row], candidate: str) -> str:
    lines = policies_by_world(rows, "factor: within all SLOs, %", lambda row: f"{row['at']:g}, {row['qps']:.2f}/s")
    return lines + "\n\n![Who wins at which price of mixing](axis.png)"


TEXTS: dict[str, Callable[[Sequence[Row], str], str]] = {"facts": facts_text, "loads": loads_text, "axis": axis_text}


@draw.styled
def plot_axis(rows: Sequence[Row]) -> Figure:
    """Missed SLOs against the factor on the price of mixing, a line per policy."""
    figure, ax = draw.panel("Default profile at 90 % of each fluid capacity", height=4.0)
    policies = unique(*(short(row["policy"]) for row in rows))
    least = 0.5 / (100 * max(row["num_seeds"] for row in rows))
    for policy, style in draw.policy_styles(policies).items():
        own = sorted((row for row in rows if short(row["policy"]) == policy), key=lambda row: row["at"])
        x = np.array([row["at"] for row in own])
        missed = np.maximum(100 * (1 - np.array([row["attainment"] for row in own])), least)
        ax.plot(x, missed, color=style.colour, marker=style.marker, linestyle=style.dash)
        if own[0]["ci_low"] is not None:
            ends = [np.maximum(100 * (1 - np.array([row[end] for row in own])), least) for end in ("ci_high", "ci_low")]
            ax.fill_between(x, *ends, color=style.colour, alpha=0.12, linewidth=0)
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    high = min(high, 110.0)
    ax.set_ylim(low, high)
    draw.log_ticks(ax.yaxis, low, high)
    ax.set_xticks(FACTORS, [f"{factor:g}" for factor in FACTORS])
    ax.set_xlabel("Attention of decodes beside a prompt chunk, times that of decodes alone")
    ax.set_ylabel("Requests that miss an SLO (%, log scale)")
    draw.legend(figure, policies)
    return figure


def csv_text(rows: Sequence[Row]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def write(section: str, rows: Sequence[Row], candidate: str, out: Path) -> None:
    """The section's table, its text, and the axis' figure."""
    write_text(out / f"{section}.csv", csv_text(rows))
    write_text(out / f"{section}.md", TEXTS[section](rows, candidate) + "\n")
    if section == "axis":
        figure = plot_axis(rows)
        settings: dict[str, Any] = {"format": "png", "dpi": 150, "metadata": {"Software": None}}
        replace_file(out / "axis.png", lambda path: figure.savefig(path, **settings))


def measure(args: argparse.Namespace) -> None:
    """Run the sections asked for, side by side by world, and write what they show."""
    candidate = args.candidate
    more = unique(candidate, *args.policy)
    for policy in more:
        make_scheduler(policy)
    seed_range(args.seeds, args.first_seed)
    make_folder(args.out)
    worlds = [world for section in args.section for world in SECTIONS[section](more)]
    settings = (args.seeds, args.first_seed, args.num_requests, args.out)

    def note(text: str) -> None:
        print(f"{text} worlds", file=sys.stderr, flush=True)

    with choose(args.workers, args.ray, args.ray_address, more) as places:
        found = run_cells(run, [(world, *settings) for world in worlds], places, note)
    for section in args.section:
        rows = [row for world, own in zip(worlds, found, strict=True) if world.section == section for row in own]
        write(section, rows, candidate, args.out)
        print((args.out / f"{section}.md").read_text(encoding="utf-8"))


def section_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SECTIONS:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(SECTIONS)}, got {name!r}")
    return list(dict.fromkeys(names))


def whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hybrid", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=place, default=Path("out/hybrid"), help="folder of runs, tables and the figure")
    parser.add_argument("--section", type=section_names, default=list(SECTIONS), help=",".join(SECTIONS))
    parser.add_argument("--seeds", type=whole, default=20, help="how many")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--num-requests", type=whole, default=1500, help="measured requests of a run")
    parser.add_argument("--policy", action="append", default=[], metavar="NAME", help="one more; may be repeated")
    parser.add_argument("--candidate", default=CANDIDATE, metavar="NAME", help=f"compared with all others; {CANDIDATE}")
    parser.add_argument("--workers", type=whole, default=os.cpu_count() or 1, help="processes")
    add_options(parser)
    args = parser.parse_args(argv)
    try:
        measure(args)
    except (ConfigError, PolicyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
