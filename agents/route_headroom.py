"""What routing could gain: ``python -m llmsched_gym.agents.route_headroom --suite hetero``.

Each router's parameters are chosen on selection seeds; the best of the tuned ones is what all are compared with, on the
same requests, other seeds. Beside it two routers that nobody could run:

- `lengths`: the tuned routers told every output length (``length_hint="oracle"``), the best on selection seeds.
- `hindsight`: for each seed the best of all of them, chosen on the requests that it is judged on, which flatters it.

Differences are paired by seed, with 95 % intervals from ten seeds on.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from llmsched_gym.agents.envs import SELECTION_SEEDS
from llmsched_gym.agents.options import fail_in_one_line, option, parse
from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.evaluation.workers import Workers
from llmsched_gym.files import make_folder, write_text
from llmsched_gym.registry import routers
from llmsched_gym.report import intervals

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
    also: str = option("", "another router to compare, such as a trained one's folder")
    scheduler: str = option("slai", "who forms the batches of replicas")
    seeds: int = option(10, "seeds of a router")
    first_seed: int = option(3000, "the first")
    selection_seeds: int = option(4, "selection seeds (2000, 2001, ...)")
    requests: int = option(1000, "measured requests of a run")
    workers: int = option(2, "processes")
    out: str = option("runs/route_headroom.json", "file to write")


Run = tuple[str, str, int, dict[str, Any]]
"""Suite, policy, seed, fields."""


def utility(run: Run) -> float:
    """Mean utility of one run."""
    suite, policy, seed, fields = run
    return float(row(simulate(scenario(suite, **fields), policy, seed))["mean_utility"])


def headroom(config: Config) -> dict[str, Any]:
    """Run everything; returns the table and writes it."""
    world = {"num_requests": config.requests, **config.set}
    if not hasattr(scenario(config.suite, **world), "num_replicas"):
        raise ConfigError(f"suite: expected one of replicas, got {config.suite!r}")
    told = {**world, "length_hint": "oracle"}
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    chosen_on = SELECTION_SEEDS[: config.selection_seeds]
    settings = [spec for name in routers() for spec in GRIDS.get(name, (name,))]
    hinted = [spec for spec in settings if spec.split("[")[0] in HINTED]
    with Workers(config.workers) as pool:

        def run(what: str, specs: list[str], seeds: Any, fields: dict[str, Any]) -> np.ndarray:
            """Utilities, (len(specs), len(seeds))."""
            runs = [
                (config.suite, f"{spec}+{config.scheduler}", seed, fields)
                for spec, seed in itertools.product(specs, seeds)
            ]
            found = track(pool.map(utility, runs), what, len(runs), console=Console(stderr=True))
            return np.array(list(found)).reshape(len(specs), len(seeds))

        selection = run("choosing settings", settings, chosen_on, world).mean(1)
        tuned: dict[str, tuple[float, str]] = {}
        for spec, value in zip(settings, selection.tolist(), strict=True):
            name = spec.split("[")[0]
            tuned[name] = max(tuned.get(name, (-1.0, "")), (value, spec))
        best = max(tuned.values())[1]
        specs = [spec for _, spec in tuned.values()] + ([config.also] if config.also else [])
        table = run("judging", specs, seeds, world)
        of_best = hinted[int(run("choosing, told the lengths", hinted, chosen_on, told).mean(1).argmax())]
        lengths = run("judging, told the lengths", [of_best], seeds, told)[0]
    base = table[specs.index(best)]
    found = {spec: values for spec, values in zip(specs, table, strict=True)}
    found |= {f"lengths: {of_best}": lengths, "hindsight": np.maximum(table.max(0), lengths)}
    result = {
        "config": config.__dict__,
        "best_tuned": best,
        "selection": {spec: value for value, spec in tuned.values()},
        "routers": {
            name: {
                "mean_utility": float(values.mean()),
                "difference": float((values - base).mean()),
                "interval": intervals.difference(values.tolist(), base.tolist()),
            }
            for name, values in found.items()
        },
    }
    make_folder(Path(config.out).parent)
    write_text(Path(config.out), json.dumps(result, indent=1) + "\n")
    return result


def main() -> int:
    return fail_in_one_line(lambda: print(json.dumps(headroom(parse(Config, None, __doc__)), indent=1)))


if __name__ == "__main__":
    from llmsched_gym.agents import route_headroom as module  # under its one name, not this copy of it

    sys.exit(module.main())
