"""Do schedulers of other people what their papers say of them, here and on conditions like their own?

    python -m benchmarks.claims [--claim ppas,eb,wait,mc-sf,slai,rad] [--seeds 20] [--first-seed 0] [--workers N]
                                [--ray | --ray-address A]

ppas: the adaptive budget against the best of several static ones. eb: batches of one phase against mixed ones where
mixing has a measured price. wait: WAIT and Nested WAIT where memory is all that limits, with one type and with four.
mc-sf: shortest outputs first against first come first served with a fifth of the memory, and with all of it. slai and
rad: the paper behind this project. Changes are paired by seed; a claim holds if the whole 95 % interval does what it
says, it does not if the whole interval does not, and is undecided else. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmsched_gym.config import Scenario, scenario
from llmsched_gym.evaluation.capacity import capacity, ratios
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.outcomes import Outcomes
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.evaluation.spread import Places, add_options, choose, run_cells
from llmsched_gym.fluid import fluid_capacity
from llmsched_gym.report import intervals
from llmsched_gym.text import between, number, table
from llmsched_gym.theory.stability import TOLERANCE, Drift, drift
from llmsched_gym.workload import RequestTable, make_table

SELECTION = 2000  # the best of several opponents is chosen on so many seeds' requests from this one on
SELECTION_SEEDS = 10
RAD_SEEDS = 6  # at most, of 20,000 requests
SATURATION_QPS = 1000.0
"""Requests/s at which small instances have somebody waiting at every moment."""

Worlds = Callable[[int], tuple[Scenario, RequestTable | None]]
"""The world of a seed, and its requests where they are not the scenario's own."""


@dataclass(frozen=True)
class Figure:
    """What a claim is about, of a run."""

    name: str
    better: int  # 1: more is better, -1: less is
    is_share: bool = False  # changes are differences in points, else ratios


FIGURES = {
    "slo_attainment": Figure("attainment", 1, True),
    "itl_p99_s": Figure("ITL p99", -1),
    "ttft_p50_s": Figure("median TTFT", -1),
    "ttft_p99_s": Figure("TTFT p99", -1),
    "e2e_mean_s": Figure("mean time to the last token", -1),
    "token_rate": Figure("tokens/s until all is done", 1),
    "throughput_tok_s": Figure("tokens/s", 1),
}


@dataclass(frozen=True)
class Claim:
    """Something that a paper says of a scheduler, against the best of its opponents."""

    source: str
    says: str
    conditions: str
    world: Worlds
    policy: str
    others: tuple[str, ...]
    figures: tuple[str, ...]
    target: float = 0.0  # points, or percent, that the change is said to be at least


@dataclass(frozen=True)
class Found:
    """A claim and what runs say of it."""

    source: str
    says: str
    conditions: str
    what: str  # whose figure, against whose
    change: str  # points, or ours over theirs, with its interval
    verdict: str  # yes, no, undecided


def share_of(world: Scenario, share: float) -> Worlds:
    """A scenario at a share of its fluid capacity, with its own requests."""
    given = world.replace(qps=float(f"{share * fluid_capacity(world).qps:.4g}"))
    return lambda seed: (given, None)


LONG_SHARE, LONG_TOKENS = 0.05, (65_536, 98_304)
LONG_QPS = 0.75


def long_prompts(seed: int) -> tuple[Scenario, RequestTable]:
    """The paper suite's requests on an H100, of which a twentieth have prompts of 65,536 to 98,304 tokens."""
    world = scenario("paper", profile="h100-mistral-7b", qps=LONG_QPS, num_requests=500)
    world = world.replace(max_model_len=131_072, max_num_batched_tokens=16_384)
    given, rng = make_table(world, seed), np.random.default_rng([seed, 17])
    prompt = given.prompt_tokens.astype(np.int64)
    is_long = rng.random(len(given)) < LONG_SHARE
    prompt[is_long] = rng.integers(*LONG_TOKENS, size=int(is_long.sum()))
    return world, with_lengths(world, given, prompt, given.output_tokens)


def with_lengths(world: Scenario, given: RequestTable, prompt: Any, output: Any) -> RequestTable:
    """The same arrivals and users with other lengths; hints are an oracle's."""
    ttft_s = world.ttft_slo_s + world.ttft_slo_per_token_s * prompt
    lengths = {"prompt_tokens": prompt.astype(np.int32), "output_tokens": np.asarray(output, np.int32)}
    return replace(given, **lengths, ttft_slo_s=ttft_s, length_hint=np.asarray(output, float))


UNIT_BLOCKS = 12


def unit_instance(seed: int) -> tuple[Scenario, RequestTable]:
    """The authors': prompts of one block, two with the decode, 12 blocks; somebody always waits."""
    world = scenario("paper", qps=SATURATION_QPS, num_requests=2000, num_kv_blocks=UNIT_BLOCKS, watermark=0.0)
    world = world.replace(length_hint="oracle", max_model_len=64)
    given = make_table(world, seed)
    ones = np.ones(len(given), np.int64)
    return world, with_lengths(world, given, 16 * ones, 2 * ones)


TYPES = (8, 32, 128, 512)


def many_types(seed: int) -> tuple[Scenario, RequestTable]:
    """Prompts of 64 tokens with outputs of 8, 32, 128 or 512, and 1,000 blocks; somebody always waits."""
    world = scenario("paper", qps=SATURATION_QPS, num_requests=1000, num_kv_blocks=1000, length_hint="oracle")
    given, rng = make_table(world, seed), np.random.default_rng([seed, 18])
    prompt = np.full(len(given), 64)
    return world, with_lengths(world, given, prompt, rng.choice(TYPES, len(given)))


STATIC = tuple(f"vllm-v1[budget={budget}]" for budget in (1280, 2048, 4096, 8192, 16_384))
STATIC_SCALED = tuple(f"vllm-v1[budget={budget}]" for budget in (256, 512, 1024, 2048, 4096))
FCFS = ("sarathi", "vllm-v1", "orca")
MIXED = ("sarathi", "sarathi[budget=2048]", "vllm-v1")
VLLM_PROFILES = ("rtx6000ada-mistral-7b-vllm", "rtxpro6000-llama-3.1-8b-vllm", "rtx4090-llama-3.1-8b-vllm")
SHORT_OF_MEMORY = 3000  # blocks, a fifth of what the device has


def claims() -> dict[str, list[Claim]]:
    """All claims but those of rad and of capacities, by name."""
    paper = scenario("paper", num_requests=1500)
    ppas, eb = "P-PAS+ (2608.15171)", "EB+ (2606.00516)"
    wait, mc_sf, slai = "WAIT (2504.11320)", "MC-SF (2502.07115)", "SLAI (2508.01002)"
    served = "serves more than mixed batches"
    per_batch = "serves more where memory alone limits"
    return {
        "ppas": [
            Claim(
                ppas,
                "better than the best static budget",
                f"its budgets, H100, {LONG_QPS:g}/s, {LONG_SHARE:.0%} of prompts of 65,536-98,304 tokens",
                long_prompts,
                "ppas+[large=16384,small=1280,long=65536]",
                STATIC,
                ("slo_attainment", "ttft_p99_s", "itl_p99_s"),
            ),
            Claim(
                ppas,
                "the same",
                "our budgets, paper suite, 0.7 of the fluid capacity",
                share_of(paper, 0.7),
                "ppas+",
                STATIC_SCALED,
                ("slo_attainment", "ttft_p99_s", "itl_p99_s"),
            ),
        ],
        "eb": [
            Claim(
                eb,
                served,
                f"`{name}`, paper suite, 1.1 of the fluid capacity",
                share_of(paper.replace(profile=name), 1.1),
                policy,
                MIXED,
                ("throughput_tok_s",),
            )
            for name in VLLM_PROFILES
            for policy in ("eb+", "eb")
        ],
        "wait": [
            Claim(
                wait, per_batch, f"{what}, saturated", world, policy, ("sarathi", "vllm-v1", "sglang"), ("token_rate",)
            )
            for what, world, known in (
                ("its instance: 1 block, 2 in the decode, 12 blocks", unit_instance, "wait"),
                ("outputs of 8, 32, 128, 512, 1,000 blocks", many_types, "wait[bins=8]"),
            )
            for policy in (known, "nested-wait")
        ],
        "mc-sf": [
            Claim(
                mc_sf,
                "requests end sooner than first come first served",
                f"paper suite, {blocks:,} blocks, {share:g} of the fluid capacity",
                share_of(paper.replace(num_kv_blocks=blocks), share),
                "mc-sf",
                FCFS,
                ("e2e_mean_s",),
            )
            for blocks, share in ((SHORT_OF_MEMORY, 0.7), (SHORT_OF_MEMORY, 0.95), (5 * SHORT_OF_MEMORY, 0.95))
        ],
        "slai": [
            Claim(
                slai,
                "median TTFT 53 % below Sarathi-Serve's",
                f"paper suite, {qps:g}/s",
                lambda seed, qps=qps: (paper.replace(qps=qps), None),
                "slai",
                ("sarathi",),
                ("ttft_p50_s",),
                53.0,
            )
            for qps in (1.37, 1.6, 1.73, 1.8)
        ],
    }


CLAIMS = ("ppas", "eb", "wait", "mc-sf", "slai", "rad")


def run(world: Scenario, given: RequestTable | None, policy: str, seed: int) -> dict[str, float | None]:
    """The figures of FIGURES of a run."""
    episode = simulate(world, policy, seed, table=given)
    outcomes = Outcomes(episode)
    found = row(episode, outcomes)
    ended = outcomes.e2e_latency_s
    tokens = int(episode.requests["num_output_tokens"].sum())
    own = {"e2e_mean_s": float(ended.mean()) if np.isfinite(ended).all() else None}
    own["token_rate"] = tokens / float(episode.sim.clock_s)
    return own | {name: found[name] for name in FIGURES if name in found}


def judge(claim: Claim, seeds: range, places: Places) -> list[Found]:
    """A line for each figure of a claim: its scheduler against the best of the others, chosen on other seeds."""
    choosing = range(SELECTION, SELECTION + SELECTION_SEEDS) if len(claim.others) > 1 else range(0)
    cells = [(policy, seed) for policy in claim.others for seed in (*seeds, *choosing)]
    cells += [(claim.policy, seed) for seed in seeds]
    rows = run_cells(run, [(*claim.world(seed), policy, seed) for policy, seed in cells], places)
    held = {cell: found for cell, found in zip(cells, rows, strict=True)}
    lines = []
    for name in claim.figures:
        figure = FIGURES[name]

        def middle(policy: str, name: str = name, figure: Figure = figure) -> float:
            values = [held[policy, seed][name] for seed in choosing or seeds]
            found = intervals.mean(values) if figure.is_share else intervals.median(values)
            return -np.inf if found is None else figure.better * found

        best = max(claim.others, key=middle)
        ours, theirs = ([held[policy, seed][name] for seed in seeds] for policy in (claim.policy, best))
        value, ends = gain(figure, ours, theirs)
        what = f"{figure.name} of `{claim.policy}` against `{best}`"
        lines.append(line(claim, what, figure, value, ends))
    return lines


def gain(
    figure: Figure, ours: intervals.Values, theirs: intervals.Values
) -> tuple[float | None, intervals.Interval | None]:
    """By how much ours is better, in points or percent, with its interval over seeds."""
    if figure.is_share:
        a, b = intervals.mean(ours), intervals.mean(theirs)
        ends = intervals.difference(ours, theirs)
        value = None if a is None or b is None else 100.0 * (a - b)
        return value, None if ends is None else (100.0 * ends[0], 100.0 * ends[1])
    middle, ends = intervals.median(intervals.reductions(ours, theirs)), intervals.reduction(ours, theirs)
    scale = -100.0 * figure.better  # a reduction is how much less it is
    if ends is not None:
        low, high = sorted(scale * end for end in ends)
        ends = (low, high)
    return None if middle is None else scale * middle, ends


def line(claim: Claim, what: str, figure: Figure, value: float | None, ends: intervals.Interval | None) -> Found:
    """What is found of a claim whose scheduler is better by `value`, in points or percent."""

    def shown(better: float) -> float:
        return better if figure.is_share else 1.0 + figure.better * better / 100.0

    form, sign, unit = ("+.1f", "", " points") if figure.is_share else (".3f", "×", "")
    low, high = (None, None) if ends is None else sorted(shown(end) for end in ends)
    text = f"{sign}{number(None if value is None else shown(value), form)}{unit}{between(low, high, form)}"
    return Found(claim.source, claim.says, claim.conditions, what, text, verdict(ends, claim.target))


def verdict(ends: intervals.Interval | None, target: float) -> str:
    """yes: all of the interval is at least the target, and above 0; no: all of it is below, or none of it above 0."""
    if ends is None:
        return "undecided"
    low, high = ends
    if low >= target and low > 0.0:
        return "yes"
    return "no" if high < target or high <= 0.0 else "undecided"


def judge_capacity(seeds: range, places: Places) -> list[Found]:
    """SLAI's capacity against Sarathi-Serve's: the largest rate with a median TTFT of 0.5 s."""
    world = scenario("paper", num_requests=1500)
    settings: dict[str, Any] = {"seeds": len(seeds), "first_seed": seeds.start, "workers": places}
    found = capacity(world, ("sarathi", "slai"), "ttft-median", qps=(1.1, 2.1), **settings)
    ratio = ratios(found)[1]
    ends = None if ratio["ratio_ci_low"] is None else (ratio["ratio_ci_low"], ratio["ratio_ci_high"])
    ends = None if ends is None else (100.0 * (ends[0] - 1.0), 100.0 * (ends[1] - 1.0))
    value = None if ratio["ratio"] is None else 100.0 * (ratio["ratio"] - 1.0)
    says, what = "26 % more capacity", "rate with a median TTFT of 0.5 s"
    claim = Claim("SLAI (2508.01002)", says, "paper suite", lambda seed: (world, None), "slai", (), (), 26.0)
    sarathi, slai = (number(item.qps) for item in found)
    return [line(claim, f"{what}, {slai}/s of `slai` against {sarathi}/s of `sarathi`", Figure(what, 1), value, ends)]


def backlog(world: Scenario, policy: str, share: float, seeds: Sequence[int]) -> Drift:
    """The drift of a scheduler's backlog at a share of the fluid capacity."""
    return drift(world, policy, share * fluid_capacity(world).qps, seeds=seeds)


RAD_CASES = (
    ("rtx6000ada-mistral-7b", None, (0.95, 1.05)),
    ("a100-mistral-7b", None, (0.95, 1.05)),
    ("rtx6000ada-mistral-7b", 100_000, (0.95,)),
    ("rtx6000ada-mistral-7b", SHORT_OF_MEMORY, (0.8, 0.95)),
)
"""Profiles, KV blocks (None: the profile's) and shares of the fluid capacity."""


def judge_rad(seeds: range, places: Places) -> list[Found]:
    """RAD's backlog below and above the fluid capacity, with memory to spare and short of it."""
    cases = [(name, blocks, share) for name, blocks, shares in RAD_CASES for share in shares]
    worlds = [scenario("paper", profile=name, num_kv_blocks=blocks, max_num_seqs=1024) for name, blocks, _ in cases]
    worlds = [world if case[1] else world.replace(max_num_seqs=None) for world, case in zip(worlds, cases, strict=True)]
    own = seeds[:RAD_SEEDS]
    cells = [(world, "rad", share, own) for world, (_, _, share) in zip(worlds, cases, strict=True)]
    lines = []
    for (name, blocks, share), found in zip(cases, run_cells(backlog, cells, places), strict=True):
        below = share < 1.0
        says = "throughput-optimal: keeps up below the fluid capacity" if below else "nobody keeps up above it"
        expected = "bounded" if below else "growing"
        known = "undecided" if found.verdict == "undecided" else "yes" if found.verdict == expected else "no"
        ends = between(100.0 * found.ci_low, 100.0 * found.ci_high)
        text = f"{number(100.0 * found.mean)} % of arrivals{ends}"
        memory = "" if blocks is None else f" with {blocks:,} blocks"
        where = f"`{name}`{memory}, paper suite, {share:g} of the fluid capacity"
        what = f"drift of `rad`'s backlog, bounded below {TOLERANCE:.0%}"
        lines.append(Found("RAD (2508.01002), our reading", says, where, what, text, known))
    return lines


def table_of(found: Sequence[Found]) -> str:
    """Markdown: a line for each figure of each claim."""
    head = ("source", "says", "conditions", "figure", "change", "holds")
    return table(head, [(f.source, f.says, f.conditions, f.what, f.change, f.verdict) for f in found])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--claim", default=",".join(CLAIMS), help=f"of {', '.join(CLAIMS)}")
    parser.add_argument("--seeds", type=int, default=20, help="how many; there are no intervals below 10")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    add_options(parser)
    args = parser.parse_args(argv)
    names = args.claim.split(",")
    for name in names:
        if name not in CLAIMS:
            parser.error(f"--claim: expected some of {', '.join(CLAIMS)}, got {name!r}")
    if min(args.seeds, args.workers) < 1 or args.first_seed < 0:
        parser.error("expected --seeds and --workers >= 1, and --first-seed >= 0")
    seeds, known, found = range(args.first_seed, args.first_seed + args.seeds), claims(), []
    with choose(args.workers, args.ray, args.ray_address) as places:
        for name in names:
            for claim in known.get(name, ()):
                found += judge(claim, seeds, places)
            found += judge_capacity(seeds, places) if name == "slai" else []
            found += judge_rad(seeds, places) if name == "rad" else []
            print(f"{name} done", file=sys.stderr, flush=True)
    print(table_of(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
