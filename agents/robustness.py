"""How policies fare in worlds that they do not know: ``python -m llmsched_gym.agents.robustness --policy learned``.

Every cell is one world: a hidden cost scale, jitter, stragglers, and lengths or a device; or a price of mixing decodes
with prompts that predictions know, leave out or only believe in. The arrival rate is a share of that world's fluid
capacity. The traces are taken from LLMSCHED_DATA_DIR where they are, else the workloads fitted to
them. Prints the worst cell and a table of mean utilities, each with its difference from the baseline paired by seed.
"""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_gym.agents.options import MOST_SEEDS, fail_in_one_line, option, parse
from llmsched_gym.config import Scenario, scenario, split_names
from llmsched_gym.evaluation.grid import check
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.evaluation.spread import choose, run_cells
from llmsched_gym.evaluation.warm import warm
from llmsched_gym.files import claim_file, json_with, make_folder, write_text
from llmsched_gym.fluid import fluid_capacity
from llmsched_gym.interrupts import leave
from llmsched_gym.report import console, intervals
from llmsched_gym.text import table

COST_SCALES, JITTERS, STRAGGLERS = (0.8, 1.0, 1.25), (0.0, 0.05, 0.1), (0.0, 0.01)
MIXINGS = (2, 3, 4)  # factors on the attention of decodes beside a prompt chunk
BASE = "rtx6000ada-mistral-7b"
MEASURED = ("rtxpro6000-llama-3.1-8b-vllm", "rtx4090-llama-3.1-8b-vllm", "rtx6000ada-mistral-7b-vllm")
TRACES = {"sharegpt": "openchat_sharegpt4.csv", "azure-conv": "azure_llm_2023_conv.csv"}


@dataclass(frozen=True)
class Config:
    policy: str = option("learned,tuned-constant,slai", "policies, separated by commas")
    baseline: str = option("sarathi", "what no policy should fall below")
    share: float = option(0.8, "arrival rate, as a share of each world's fluid capacity", positive=True)
    seeds: int = option(10, "seeds of a cell", most=MOST_SEEDS)
    first_seed: int = option(3000, "the first")
    requests: int = option(1000, "measured requests of a run")
    workers: int = option(2, "processes")
    ray: bool = option(False, "run on a Ray started here, of so many processes")
    ray_address: str = option("", "run on the Ray cluster at this address")
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


def pairs() -> list[tuple[str, str]]:
    """(executing, additive) profiles that differ in the price of mixing."""
    factors = [(f"{BASE}[mixing={factor}]", BASE) for factor in MIXINGS]
    return factors + [(name, f"{name}[additive=true]") for name in MEASURED]


def worlds() -> list[tuple[dict[str, Any], Scenario]]:
    """Every cell's labels and scenario; `predicted` is the profile behind predictions."""
    found = []
    for name, scale, jitter, stragglers in itertools.product([*TRACES, "a100"], COST_SCALES, JITTERS, STRAGGLERS):
        cell = {"workload": name, "predicted": None, "cost_scale": scale, "jitter": jitter, "stragglers": stragglers}
        world = workload(name).replace(cost_scale=scale, jitter=jitter, straggler_share=stragglers)
        found.append((cell, world))
    for hybrid, additive in pairs():
        for executing, predicted in ((hybrid, None), (hybrid, additive), (additive, hybrid)):
            world = scenario("default", profile=executing, scheduler_profile=predicted)
            cell = {"workload": executing, "predicted": predicted, "cost_scale": 1.0, "jitter": world.jitter}
            found.append((cell | {"stragglers": 0.0}, world))
    return found


def utility(world: Scenario, policy: str, seed: int) -> float:
    """Mean utility of one run."""
    warm(world, policy)
    return float(row(simulate(world, policy, seed))["mean_utility"])


def robustness(config: Config) -> list[dict[str, Any]]:
    """One entry per cell: its world, rate, and each policy's mean utilities by seed."""
    claim_file(Path(config.out), "table of this command", json_with("config", "cells"))
    policies = [*dict.fromkeys([*split_names([config.policy]), config.baseline])]
    found: list[dict[str, Any]] = []
    cells: list[tuple[Scenario, str, int]] = []
    for cell, plain in worlds():
        world = plain.replace(num_requests=config.requests)
        qps = config.share * fluid_capacity(world).qps
        world = world.replace(qps=qps)
        if not found:  # what one world can have, others can
            check(world, policies, [qps], config.first_seed)
        found.append(cell | {"qps": qps, "mean_utility": {policy: [0.0] * config.seeds for policy in policies}})
        cells += [(world, *run) for run in itertools.product(policies, range(config.seeds))]
    runs = [(world, policy, config.first_seed + i) for world, policy, i in cells]
    each = len(policies) * config.seeds
    make_folder(Path(config.out).parent)
    chosen = choose(config.workers, config.ray, config.ray_address, policies)
    with chosen as places, console.progress_bar("runs") as progress:
        values = run_cells(utility, runs, places, progress=progress)
    for place, ((_, policy, i), value) in enumerate(zip(cells, values, strict=True)):
        found[place // each]["mean_utility"][policy][i] = value
    write_text(Path(config.out), json.dumps({"config": asdict(config), "cells": found}) + "\n")
    return found


def name_of(cell: dict[str, Any]) -> str:
    """The cell's lengths or device, and what predictions take it for."""
    return cell["workload"] + (f", predicted as {cell['predicted']}" if cell["predicted"] else "")


def markdown(cells: list[dict[str, Any]], baseline: str) -> str:
    """For each policy its worst cells; for each world and cost scale the means over jitter and stragglers."""
    policies = [p for p in cells[0]["mean_utility"] if p != baseline]

    def gain(cell: dict[str, Any], policy: str) -> float:
        return float(np.mean(cell["mean_utility"][policy]) - np.mean(cell["mean_utility"][baseline]))

    def place(cell: dict[str, Any]) -> str:
        share = 100 * cell["stragglers"]
        return (
            f"{name_of(cell)}, cost scale {cell['cost_scale']:g}, jitter {100 * cell['jitter']:g} %, "
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
    rows = []
    for name, group in itertools.groupby(cells, lambda cell: (name_of(cell), cell["cost_scale"])):
        own = list(group)
        means = [np.mean([cell["mean_utility"][p] for cell in own]) for p in (baseline, *policies)]
        rows.append((f"{name[0]}, cost scale {name[1]:g}", *(f"{mean:.3f}" for mean in means)))
    text += ["", table(("world", *(f"`{p}`" for p in (baseline, *policies))), rows)]
    return "\n".join(text) + "\n"


def command() -> None:
    config = parse(Config, None, __doc__)
    print(markdown(robustness(config), config.baseline), end="")


def main() -> int:
    return fail_in_one_line(command, "interrupted")


if __name__ == "__main__":
    from llmsched_gym.agents import robustness as module  # under its one name, not this copy of it

    leave(module.main())
