"""Tune the weights of a router: ``python -m llmsched_gym.agents.tune_route --suite hetero``.

The router adds up what speaks for each replica (:mod:`llmsched_gym.agents.route_scores`). A candidate's value is its
mean utility over short continuing runs on training seeds. `steps` moves one weight after another by `sigma`, up or
down, and stays where that helps, always on the same seeds; `cma` is CMA-ES with other seeds in each generation. At the
end what was found and the start are judged on selection seeds, and the better one is kept. With ``--told`` the router
knows output lengths and later turns: how much that is worth is what routing could gain.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cma
import numpy as np

from llmsched_gym.agents.options import fail_in_one_line, option, parse
from llmsched_gym.agents.route_scores import AFFINITY, NAMES, read_weights, utility
from llmsched_gym.agents.seeds import SELECTION_SEEDS, TRAINING_SEEDS, check_seeds
from llmsched_gym.config import CLUSTER_SUITES, ClusterScenario, ConfigError, scenario
from llmsched_gym.evaluation.grid import check
from llmsched_gym.files import claim_file, json_with, make_folder, write_text
from llmsched_gym.interrupts import leave

ROUTER = "prefix-affinity"  # whose weights are the start


@dataclass(frozen=True)
class Config:
    suite: str = option("cluster", "suite of replicas")
    set: dict[str, Any] = option({}, "any other field of the scenario, as --set qps=6; may be repeated")  # noqa: RUF009
    scheduler: str = option("on-time", "who forms the batches of replicas")
    told: bool = option(False, "tell the router output lengths and later turns")
    start: str = option("", "file of weights to start from; by default those of prefix-affinity")
    horizon_s: float = option(200.0, "seconds of a run", positive=True)
    search: str = option("steps", "how to search", choices=("steps", "cma"))
    seeds: int = option(8, "training seeds of a candidate")
    selection_seeds: int = option(16, "selection seeds (2000, 2001, ...)")
    generations: int = option(20, "cma: of the search")
    population: int = option(10, "cma: candidates of a generation")
    sigma: float = option(0.5, "length of a step; cma: how far the search looks at first", positive=True)
    seed: int = option(0, "of the search")
    out: str = option("runs/weights.json", "file to write")


def world_of(suite: str, fields: dict[str, Any]) -> ClusterScenario:
    """The suite with fields replaced; ConfigError if it has one engine."""
    world = scenario(suite, **fields)
    if not isinstance(world, ClusterScenario):
        raise ConfigError(f"suite: expected one of {', '.join(CLUSTER_SUITES)}, got {suite!r}")
    return world


Value = Callable[[np.ndarray, Sequence[int]], float]
"""Mean utility of weights over seeds."""


def by_steps(config: Config, start: np.ndarray, free: Sequence[int], value: Value) -> np.ndarray:
    """One pass over the weights, each a step up or down or as it was."""
    seeds = np.random.default_rng(config.seed).choice(TRAINING_SEEDS, config.seeds, replace=False).tolist()
    best, highest = start, value(start, seeds)
    for i in free:
        tried = [best.copy(), best.copy()]
        for weights, step in zip(tried, (config.sigma, -config.sigma), strict=True):
            weights[i] += step
        found = [value(weights, seeds) for weights in tried]
        if max(found) > highest:
            best, highest = tried[int(np.argmax(found))], max(found)
        say(f"{NAMES[i]}: {found[0]:.4f} up, {found[1]:.4f} down; {best[i]:g} for {highest:.4f}")
    return best


def by_cma(config: Config, start: np.ndarray, free: Sequence[int], value: Value) -> np.ndarray:
    """The mean of the search distribution after the last generation."""

    def whole(x: np.ndarray) -> np.ndarray:
        weights = start.copy()
        weights[free] = x
        return weights

    settings = {"popsize": config.population, "seed": config.seed + 1, "verbose": -9}
    search, rng = cma.CMAEvolutionStrategy(start[free], config.sigma, settings), np.random.default_rng(config.seed)
    for number in range(config.generations):
        seeds = rng.choice(TRAINING_SEEDS, config.seeds, replace=False).tolist()
        asked = search.ask()
        found = [value(whole(x), seeds) for x in asked]
        search.tell(asked, [-utility for utility in found])
        say(f"{number + 1}/{config.generations}: {np.mean(found):.4f} to {max(found):.4f}")
    return whole(search.mean)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def tune(config: Config) -> dict[str, Any]:
    """Search; returns what it writes."""
    if config.population == 1:
        raise ConfigError("--population: expected at least 2, got 1")
    check_seeds("seeds", config.seeds, TRAINING_SEEDS)
    check_seeds("selection-seeds", config.selection_seeds, SELECTION_SEEDS)
    world = world_of(config.suite, {"horizon_s": config.horizon_s, **config.set})
    check(world, [f"{ROUTER}+{config.scheduler}"], [world.qps], TRAINING_SEEDS.start)
    start = read_weights(config.start) if config.start else AFFINITY
    free = [i for i, name in enumerate(NAMES) if config.told or name != "goes_on"]

    def value(weights: np.ndarray, seeds: Sequence[int]) -> float:
        return float(np.mean([utility(world, config.scheduler, weights, seed, is_told=config.told) for seed in seeds]))

    out = Path(config.out)
    claim_file(out, "weights of this command", json_with("weights", "config"))
    make_folder(out.parent)
    search = by_steps if config.search == "steps" else by_cma
    tuned, chosen_on = search(config, start, free, value), SELECTION_SEEDS[: config.selection_seeds]
    before, after = value(start, chosen_on), value(tuned, chosen_on)
    kept = tuned if after > before else start
    result = {
        "weights": dict(zip(NAMES, np.round(kept, 4).tolist(), strict=True)),
        "start": before,
        "tuned": after,
        "config": config.__dict__,
    }
    write_text(out, json.dumps(result, indent=1) + "\n")
    return result


def main() -> int:
    return fail_in_one_line(lambda: print(json.dumps(tune(parse(Config, None, __doc__)), indent=1)), "interrupted")


if __name__ == "__main__":
    from llmsched_gym.agents import tune_route as module  # under its one name, not this copy of it

    leave(module.main())
