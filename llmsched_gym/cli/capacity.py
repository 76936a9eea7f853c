"""`llmsched capacity`: the largest arrival rate at which each policy meets a criterion."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from llmsched_gym.cli import options as opt
from llmsched_gym.cli.reports import report
from llmsched_gym.cli.values import places_of, read_numbers, read_whole_numbers, scenario_of, split_policies
from llmsched_gym.config import ClusterScenario, ConfigError
from llmsched_gym.report import console, terminal


def capacity(
    policy: opt.Policy,
    criterion: Annotated[
        str,
        opt.option(
            group=opt.RUNS,
            help="What must hold, in quotes: ttft.p99<=2, itl.strict.p99<=0.1, attainment>=0.95 (seconds, shares), "
            "with commas between several; or ttft-median, paper, serve-all:X; docs/paths/device.md has all.",
        ),
    ],
    in_world: opt.World,
    clients: opt.Clients,
    engine: opt.Engine,
    at: opt.Places,
    qps: Annotated[
        str | None,
        opt.option(
            group=opt.RUNS,
            help="Lowest and highest rate searched, 1/s; else 0.1,16, further where the fluid capacity is.",
        ),
    ] = None,
    num_requests: opt.NumRequests = None,
    seeds: opt.Seeds = 20,
    first_seed: opt.FirstSeed = 0,
    router: opt.Routers = None,
    replicas: Annotated[
        str | None, opt.option(group=opt.RUNS, help="Numbers of equal replicas; default: the suite's.")
    ] = None,
    out: Annotated[
        Path | None, opt.option(group=opt.OUTPUT, help="Folder for capacity-CRITERION.json and a report.")
    ] = None,
    as_json: opt.AsJson = False,
    config: opt.OptionsFile = None,
) -> None:
    """Find the largest arrival rate at which each policy meets a criterion."""
    world = scenario_of(in_world, clients, config, engine, num_requests=num_requests)
    bounds = None if qps is None else read_numbers("qps", qps)
    if bounds is not None and (len(bounds) != 2 or not bounds[0] < bounds[1]):
        raise ConfigError(f"qps: expected the lowest and the highest rate, LOW,HIGH, got {qps!r}")
    from llmsched_gym.evaluation import capacity as search
    from llmsched_gym.evaluation import cluster_capacity as clusters
    from llmsched_gym.evaluation.criteria import criterion as judged_by
    from llmsched_gym.evaluation.spread import where
    from llmsched_gym.workload.generate import come_in_sessions

    rates = None if bounds is None else (bounds[0], bounds[1])
    settings: dict[str, Any] = {"seeds": seeds, "first_seed": first_seed, "out": out}
    labels: list[str] = []
    names = [*policy, *([router] if router else [])]
    with places_of(at, names, in_world, engine) as places, console.progress_bar("runs", where(places)) as progress:
        settings |= {"workers": places, "progress": progress}
        if isinstance(world, ClusterScenario):
            numbers = [world.num_replicas] if replicas is None else read_whole_numbers("replicas", replicas)
            routers_named = split_policies([world.router if router is None else router], "router")
            chosen = clusters.pairs(routers_named, split_policies(policy))
            several = clusters.by_replicas(world, chosen, criterion, numbers, qps=rates, **settings)
            found = [item for _, item in several]
            labels = [f"{item.policy} on {n}" if len(numbers) > 1 else item.policy for n, item in several]
        elif router is not None or replicas is not None:
            name = "router" if router is not None else "replicas"
            raise ConfigError(f"{name}: expected a suite of several replicas, got {in_world.suite!r}")
        else:
            judged_by(criterion)  # before the fluid capacity takes its time
            qps_range = rates or clusters.searched_rates(world)
            found = search.capacity(world, split_policies(policy), criterion, qps=qps_range, **settings)
            labels = [item.policy for item in found]
    ratios, unit = search.ratios(found), "sessions/s" if come_in_sessions(world) else "1/s"
    for label, item in zip(labels, found, strict=True):
        if item.note:
            console.remark(f"{label}: {item.criterion} {item.note}")
    if not isinstance(world, ClusterScenario) and world.backend == "simulated":
        from llmsched_gym.fluid import fluid_capacity

        most = f"{fluid_capacity(world).qps:.3g} {'requests/s' if unit == '1/s' else unit}"
        console.remark(f"no scheduler that serves everybody sustains more than {most}, the fluid capacity")
    named = [{"policy": label, "ratio_to": labels[0]} for label in labels]
    rows = [item.to_row() | ratio | name for item, ratio, name in zip(found, ratios, named, strict=True)]
    folders = [] if out is None else [out, *sorted(out.glob("replicas-*"))]
    for folder in folders:
        if any(folder.glob("capacity-*.json")):
            report([folder])
    if as_json:
        console.print_rows(rows)
    else:
        console.print_table(terminal.capacities(rows, unit))
    if any(item.shares for item in found):
        console.print_table(terminal.served(rows, unit), sys.stderr)
