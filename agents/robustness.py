"""How policies fare where the world is not the one they know: ``python -m agents.robustness --policy learned``.

Every cell is one world: a hidden cost scale, jitter, stragglers, and lengths or a device; the arrival rate is a share
of that world's fluid capacity. The traces are taken from LLMSCHED_DATA_DIR where they are, else the workloads fitted to
them. Prints the worst cell and a table of mean utilities, each with its difference from the baseline paired by seed.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from llmsched_gym.agents.options import fail_in_one_line, option, parse
from llmsched_gym.config import Scenario, scenario
from llmsched_gym.evaluation import intervals
from llmsched_gym.evaluation.grid import evaluate
from llmsched_gym.fluid import fluid_capacity

COST_SCALES, JITTERS, STRAGGLERS = (0.8, 1.0, 1.25), (0.0, 0.05, 0.1), (0.0, 0.01)
TRACES = {"sharegpt": "openchat_sharegpt4.csv", "azure-conv": "azure_llm_2023_conv.csv"}


@dataclass(frozen=True)
class Config:
    policy: str = option("learned,tuned-constant,slai", "policies, separated by commas")
    baseline: str = option("sarathi", "what no policy should fall below")
    share: float = option(0.8, "arrival rate, as a share of each world's fluid capacity")
    seeds: int = option(10, "seeds of a cell")
    first_seed: int = option(3000, "the first")
    requests: int = option(1000, "measured requests of a run")
    workers: int = option(2, "processes")
    out: str = option("runs/robustness.json", "file to write")


def workload(name: str) -> Scenario:
    """The default suite on one of the traces, or on the A100."""
    base = scenario("default")
    if name == "a100":
        return base.replace(profile="a100-mistral-7b")
    trace = Path(os.environ.get("LLMSCHED_DATA_DIR", ""), "traces", TRACES[name])
    if trace.is_file():
        return base.replace(trace=str(trace), trace_arrivals="poisson")
    return base.replace(workload=name)


def robustness(config: Config) -> list[dict[str, Any]]:
    """One entry per cell: its world, rate, and each policy's mean utilities by seed."""
    policies = [*dict.fromkeys([*config.policy.split(","), config.baseline])]
    cells = list(itertools.product([*TRACES, "a100"], COST_SCALES, JITTERS, STRAGGLERS))
    found = []
    for name, scale, jitter, stragglers in track(cells, "cells", console=Console(stderr=True)):
        world = workload(name).replace(
            cost_scale=scale, jitter=jitter, straggler_share=stragglers, num_requests=config.requests
        )
        qps = config.share * fluid_capacity(world).qps
        rows = evaluate(
            world, policies, qps=(qps,), seeds=config.seeds, first_seed=config.first_seed, workers=config.workers
        )
        utility = {p: [r["mean_utility"] for r in rows if r["policy"] == p] for p in policies}
        cell = {"workload": name, "cost_scale": scale, "jitter": jitter, "stragglers": stragglers, "qps": qps}
        found.append(cell | {"mean_utility": utility})
    path = Path(config.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"config": asdict(config), "cells": found}) + "\n")
    return found


def markdown(cells: list[dict[str, Any]], baseline: str) -> str:
    """For each policy its worst cells; for each workload and cost scale the means over jitter and stragglers."""
    policies = [p for p in cells[0]["mean_utility"] if p != baseline]

    def gain(cell: dict[str, Any], policy: str) -> float:
        return float(np.mean(cell["mean_utility"][policy]) - np.mean(cell["mean_utility"][baseline]))

    def place(cell: dict[str, Any]) -> str:
        share = 100 * cell["stragglers"]
        return (
            f"{cell['workload']}, cost scale {cell['cost_scale']:g}, jitter {100 * cell['jitter']:g} %, "
            f"stragglers {share:g} %, {cell['qps']:.2f} requests/s"
        )

    text = []
    for policy in policies:
        cell = min(cells, key=lambda cell: gain(cell, policy))
        utility = cell["mean_utility"]
        bounds = intervals.difference(utility[policy], utility[baseline])
        ends = f" [{bounds[0]:+.4f}, {bounds[1]:+.4f}]" if bounds else ""
        below = sum(gain(cell, policy) < 0 for cell in cells)
        text.append(
            f"- `{policy}` against `{baseline}`: worst {gain(cell, policy):+.4f}{ends} ({place(cell)}); "
            f"below it in {below} of {len(cells)} cells."
        )
    text += [
        "",
        f"| world | `{baseline}` | {' | '.join(f'`{p}`' for p in policies)} |",
        "|---" * (len(policies) + 2) + "|",
    ]
    for name, group in itertools.groupby(cells, lambda cell: (cell["workload"], cell["cost_scale"])):
        own = list(group)
        means = [np.mean([cell["mean_utility"][p] for cell in own]) for p in (baseline, *policies)]
        text.append(f"| {name[0]}, cost scale {name[1]:g} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return "\n".join(text) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""

    def run() -> None:
        config = parse(Config, argv, __doc__)
        print(markdown(robustness(config), config.baseline), end="")

    return fail_in_one_line(run)


if __name__ == "__main__":
    from llmsched_gym.agents import robustness as module  # under its one name, not this copy of it

    sys.exit(module.main())
