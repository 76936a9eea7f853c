"""What routing could gain: ``python -m llmsched_gym.agents.route_headroom --suite hetero``.

Each router's parameters are chosen on selection seeds; the best of the tuned ones is what all are compared with, on the
same requests, other seeds. Beside it routers of tuned weights (``--weights``, of agents.tune_route), agents
(``--also``) and three that nobody could run:

- `lengths`: the tuned routers told every output length (``length_hint="oracle"``), the best on selection seeds.
- `told`: weights tuned for a router that knows output lengths and later turns (``--told``, of agents.tune_route).
- `hindsight`: for each seed the best of all of them, chosen on the requests that it is judged on, which flatters it.

Runs are finite, of so many measured requests, or with ``--horizon-s`` episodes of the environment. Differences are
paired by seed, with 95 % intervals from ten seeds on.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_gym.agents.options import MOST_SEEDS, fail_in_one_line, option, parse
from llmsched_gym.agents.route_scores import read_weights, utility
from llmsched_gym.agents.seeds import SELECTION_SEEDS, check_seeds
from llmsched_gym.config import ClusterScenario, ConfigError, scenario, split_names
from llmsched_gym.evaluation.grid import check
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.evaluation.spread import choose, opened, run_cells
from llmsched_gym.evaluation.warm import warm
from llmsched_gym.files import claim_file, json_with, make_folder, write_text
from llmsched_gym.interrupts import leave
from llmsched_gym.registry import routers
from llmsched_gym.report import console, intervals

GRIDS: dict[str, tuple[str, ...]] = {
    "prefix-affinity": tuple(f"prefix-affinity[weight={weight}]" for weight in (0.3, 1, 3)),
    "session": tuple(f"session[slack={slack}]" for slack in (2, 8, 32)),
}
"""Settings of the routers that have any."""

HINTED = ("least-tokens", "slo-aware", "rad-route", "session")
"""Routers whose choices depend on how long outputs are."""


@dataclass(frozen=True)
class Config:
    suite: str = option("cluster", "suite of replicas")
    set: dict[str, Any] = option({}, "any other field of the scenario, as --set qps=6; may be repeated")  # noqa: RUF009
    load: float = option(1.0, "factor on the suite's rates", positive=True)
    also: str = option("", "other routers to compare, such as trained ones' folders, with commas between")
    weights: str = option("", "file of weights, of agents.tune_route")
    told: str = option("", "file of weights for a router that is told the future, of agents.tune_route --told")
    scheduler: str = option("slai", "who forms the batches of replicas")
    judged: int = option(10, "how many of the tuned routers are judged, the best on selection seeds")
    seeds: int = option(20, "seeds of a router", most=MOST_SEEDS)
    first_seed: int = option(3000, "the first")
    selection_seeds: int = option(4, "selection seeds (2000, 2001, ...)")
    requests: int = option(1000, "measured requests of a finite run")
    horizon_s: float = option(0.0, "instead of finite runs: seconds of an episode, whose requests all count")
    workers: int = option(2, "processes")
    ray: bool = option(False, "run on a Ray started here, of so many processes")
    ray_address: str = option("", "run on the Ray cluster at this address")
    out: str = option("runs/route_headroom.json", "file to write")


WEIGHTS, TOLD = "weights: ", "told: "
"""Before the file of a router of tuned weights."""


def value(world: ClusterScenario, scheduler: str, router: str, seed: int) -> float:
    """Mean utility of one run."""
    for prefix in (WEIGHTS, TOLD):
        if router.startswith(prefix):
            weights = read_weights(router.removeprefix(prefix))
            return utility(world, scheduler, weights, seed, is_told=prefix == TOLD)
    warm(world, f"{router}+{scheduler}")
    return float(row(simulate(world, f"{router}+{scheduler}", seed))["mean_utility"])


def world_of(config: Config) -> ClusterScenario:
    """The suite at its load; ConfigError if it has one engine."""
    lasts = {"horizon_s": config.horizon_s} if config.horizon_s else {"num_requests": config.requests}
    world = scenario(config.suite, **{**lasts, **config.set})
    if not isinstance(world, ClusterScenario):
        raise ConfigError(f"suite: expected one of replicas, got {config.suite!r}")
    low, high = world.qps_range
    qps = None if world.qps is None else config.load * world.qps
    return world.replace(qps=qps, qps_range=(config.load * low, config.load * high))


def headroom(config: Config) -> dict[str, Any]:
    """Run everything; returns the table and writes it."""
    claim_file(Path(config.out), "table of this command", json_with("config", "routers"))
    world, also = world_of(config), split_names([config.also], "also") if config.also else []
    informed = world.replace(length_hint="oracle")
    for file in (config.weights, config.told):
        if file:
            read_weights(file)
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    check_seeds("selection-seeds", config.selection_seeds, SELECTION_SEEDS)
    chosen_on = SELECTION_SEEDS[: config.selection_seeds]
    settings = [spec for name in routers() for spec in GRIDS.get(name, (name,))]
    hinted = [spec for spec in settings if spec.split("[")[0] in HINTED]
    check(world, [f"{name}+{config.scheduler}" for name in (*settings, *also)], [world.qps], config.first_seed)
    make_folder(Path(config.out).parent)
    files = [config.weights, config.told, config.scheduler, *also]
    with choose(config.workers, config.ray, config.ray_address, files) as places, opened(places) as pool:

        def run(what: str, specs: list[str], seeds: Any, world: ClusterScenario) -> np.ndarray:
            """Utilities, (len(specs), len(seeds))."""
            runs = [(world, config.scheduler, spec, seed) for spec, seed in itertools.product(specs, seeds)]
            with console.progress_bar(f"runs, {what}") as progress:
                found = run_cells(value, runs, pool, progress=progress)
            return np.array(found).reshape(len(specs), len(seeds))

        selection = run("choosing settings", settings, chosen_on, world).mean(1)
        tuned: dict[str, tuple[float, str]] = {}
        for spec, mean in zip(settings, selection.tolist(), strict=True):
            name = spec.split("[")[0]
            tuned[name] = max(tuned.get(name, (-1.0, "")), (mean, spec))
        judged = sorted(tuned.values(), reverse=True)[: config.judged]
        best = judged[0][1]
        specs = [spec for _, spec in judged] + also
        specs += [WEIGHTS + config.weights] if config.weights else []
        table = run("judging", specs, seeds, world)
        of_best = hinted[int(run("choosing, told the lengths", hinted, chosen_on, informed).mean(1).argmax())]
        found = dict(zip(specs, table, strict=True))
        found[f"lengths: {of_best}"] = run("judging, told the lengths", [of_best], seeds, informed)[0]
        if config.told:
            found["told"] = run("judging, told all", [TOLD + config.told], seeds, world)[0]
    base = found[best]
    found["hindsight"] = np.max(list(found.values()), axis=0)
    result = {
        "config": config.__dict__,
        "best_tuned": best,
        "selection": {spec: mean for mean, spec in tuned.values()},
        "routers": {
            name: {
                "mean_utility": float(values.mean()),
                "difference": float((values - base).mean()),
                "interval": intervals.difference(values.tolist(), base.tolist()),
            }
            for name, values in found.items()
        },
    }
    write_text(Path(config.out), json.dumps(result, indent=1) + "\n")
    return result


def main() -> int:
    return fail_in_one_line(lambda: print(json.dumps(headroom(parse(Config, None, __doc__)), indent=1)), "interrupted")


if __name__ == "__main__":
    from llmsched_gym.agents import route_headroom as module  # under its one name, not this copy of it

    leave(module.main())
