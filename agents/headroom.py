"""What adapting could gain over the best constant: ``python -m llmsched_gym.agents.headroom --constant FOLDER``.

Three policies that nobody could run, each on the same requests as the constant:

- `machine`: `on-time`, told the device's hidden cost scale, so that its predictions are right; its cap and its token
  budget are chosen on selection seeds.
- `lengths`: `shortest-total` told the cost scale and every output length.
- `hindsight`: for each seed the best of ``--settings`` random constants, chosen on the very requests that it is judged
  on; this flatters it.

Differences are paired by seed, with 95 % intervals. ``--planner`` asks instead what a planner gains that tries
schedulers ahead; it has options of its own, see :mod:`~llmsched_gym.agents.planner_headroom`.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_gym.agents.options import MOST_SEEDS, fail_in_one_line, option, parse
from llmsched_gym.agents.planner_headroom import planner
from llmsched_gym.agents.seeds import SELECTION_SEEDS, check_seeds
from llmsched_gym.config import ClusterScenario, ConfigError, Scenario, scenario
from llmsched_gym.cost import load_profile
from llmsched_gym.evaluation.grid import check
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.evaluation.spread import choose, opened, run_cells
from llmsched_gym.evaluation.warm import warm
from llmsched_gym.files import claim_file, json_with, make_folder, write_text
from llmsched_gym.interrupts import leave
from llmsched_gym.report import console, intervals
from llmsched_gym.workload import make_table

PLANNER = "--planner"
MOST_SETTINGS = 10_000
CAPS, BUDGETS = (0.75, 0.8, 0.85), (512, 768, 1024)
ON_TIME = "on-time[cap={cap},budget={budget}]"
LENGTHS = "shortest-total[cap={cap},budget={budget}]"


@dataclass(frozen=True)
class Config:
    constant: str = option("tuned-constant", "the policy to compare with")
    suite: str = option("drift", "suite")
    set: dict[str, Any] = option({}, "any other field of Scenario, as --set qps=1.8; may be repeated")  # noqa: RUF009
    seeds: int = option(20, "seeds of a policy", most=MOST_SEEDS)
    first_seed: int = option(3000, "the first")
    selection_seeds: int = option(8, "selection seeds (2000, 2001, ...)")
    requests: int = option(2000, "measured requests of a run")
    settings: int = option(200, "random constants that hindsight chooses from", most=MOST_SETTINGS)
    workers: int = option(2, "processes")
    ray: bool = option(False, "run on a Ray started here, of so many processes")
    ray_address: str = option("", "run on the Ray cluster at this address")
    out: str = option("runs/headroom.json", "file to write")


def utility(world: Scenario, told: bool, policy: str, seed: int) -> float:
    """Mean utility of one run; with `told` the policy predicts with the device's true cost scale."""
    warm(world, policy)
    own = load_profile(world.profile).scaled(make_table(world, seed).cost_scale) if told else None
    return float(row(simulate(world, policy, seed, own_profile=own))["mean_utility"])


def random_constants(count: int, seed: int = 0) -> list[str]:
    """Settings of the packing kernel around the good ones."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        order = rng.choice(["feasible", "feasible", "srpt", "edf", "spf"])
        options = {"budget": rng.choice([192, 256, 320, 384, 448, 512, 640, 768, 1024]), "order": order}
        options |= {
            "hold": rng.choice(["always", "always", "true", "false"]),
            "cap": rng.choice(["0.6", "0.7", "0.8", "0.9", "0.95", "inf"]),
        }
        options |= {"offset": rng.choice(["inf", "inf", "inf", "3", "7", "10"])}
        options |= {"limit": rng.choice([8192, 8192, 6500, 5500, 4500, 3500])}
        found.append("sarathi[" + ",".join(f"{name}={value}" for name, value in options.items()) + "]")
    return list(dict.fromkeys(found))


def headroom(config: Config) -> dict[str, Any]:
    """Run everything; returns the table and writes it."""
    claim_file(Path(config.out), "table of this command", json_with("config", "policies"))
    world = scenario(config.suite, **{"num_requests": config.requests, **config.set})
    if isinstance(world, ClusterScenario):
        raise ConfigError(f"suite: expected one of one engine, got {config.suite!r}")
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    check_seeds("selection-seeds", config.selection_seeds, SELECTION_SEEDS)
    check(world, [config.constant], [world.qps], config.first_seed)
    make_folder(Path(config.out).parent)
    chosen_on = SELECTION_SEEDS[: config.selection_seeds]
    with choose(config.workers, config.ray, config.ray_address, [config.constant]) as places, opened(places) as pool:

        def run(what: str, told: bool, policies: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
            """Utilities, (len(policies), len(seeds))."""
            cells = [(world, told, *run) for run in itertools.product(policies, seeds)]
            with console.progress_bar(f"runs, {what}") as progress:
                values = run_cells(utility, cells, pool, progress=progress)
            return np.array(values).reshape(len(policies), len(seeds))

        base = run("constant", False, [config.constant], seeds)[0]
        found: dict[str, tuple[str, np.ndarray]] = {}
        for name, template in (("machine", ON_TIME), ("lengths", LENGTHS)):
            choices = [template.format(cap=cap, budget=budget) for cap in CAPS for budget in BUDGETS]
            best = choices[int(run(f"{name}: choosing", True, choices, chosen_on).mean(1).argmax())]
            found[name] = best, run(name, True, [best], seeds)[0]
        table = run("hindsight", False, [config.constant, *random_constants(config.settings)], seeds)
        found["hindsight"] = f"the best of {len(table)} for each seed", table.max(0)
    result = {
        "config": config.__dict__,
        "constant": float(base.mean()),
        "policies": {
            name: {
                "what": what,
                "mean_utility": float(values.mean()),
                "difference": float((values - base).mean()),
                "interval": intervals.difference(values.tolist(), base.tolist()),
            }
            for name, (what, values) in found.items()
        },
    }
    write_text(Path(config.out), json.dumps(result, indent=1) + "\n")
    return result


def main() -> int:
    argv = sys.argv[1:]
    if PLANNER in argv:
        return fail_in_one_line(lambda: planner([part for part in argv if part != PLANNER]), "interrupted")
    return fail_in_one_line(lambda: print(json.dumps(headroom(parse(Config, None, __doc__)))), "interrupted")


if __name__ == "__main__":
    from llmsched_gym.agents import headroom as module  # under its one name, not this copy of it

    leave(module.main())
