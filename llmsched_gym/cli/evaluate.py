"""`llmsched evaluate`: policies on the same requests, at each rate and seed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from llmsched_gym.cli import options as opt
from llmsched_gym.cli.reports import print_comparison, report
from llmsched_gym.cli.values import places_of, read_numbers, scenario_of, split_policies
from llmsched_gym.config import ClusterScenario, ConfigError
from llmsched_gym.report import console


def evaluate(
    policy: opt.Policy,
    in_world: opt.World,
    clients: opt.Clients,
    engine: opt.Engine,
    at: opt.Places,
    qps: opt.Qps = None,
    num_requests: opt.NumRequests = None,
    seeds: opt.Seeds = 20,
    first_seed: opt.FirstSeed = 0,
    router: opt.Routers = None,
    replicas: Annotated[
        int | None, opt.option(group=opt.RUNS, help="Number of equal replicas; default: the suite's.")
    ] = None,
    staleness: Annotated[
        float | None, opt.option(group=opt.RUNS, help="Seconds between two reports of a replica; 0: none.")
    ] = None,
    backend: Annotated[
        str | None,
        opt.option(group=opt.ENGINE, help="What executes batches: simulated, or a real model: transformers or vllm."),
    ] = None,
    model: Annotated[
        str | None, opt.option(group=opt.ENGINE, help="With transformers: a folder, a hub id, random:tiny.")
    ] = None,
    count_host_time: Annotated[
        bool,
        opt.option(
            "--count-host-time", group=opt.ENGINE, help="With transformers: let the scheduler's own time count."
        ),
    ] = False,
    out: Annotated[Path | None, opt.option(group=opt.OUTPUT, help="Folder for the tables and a report.")] = None,
    perfetto: Annotated[
        Path | None,
        opt.option(group=opt.OUTPUT, help="Of a single run: its batches and requests as a trace for ui.perfetto.dev."),
    ] = None,
    no_bound: Annotated[
        bool, opt.option("--no-bound", group=opt.OUTPUT, help="With --out, leave the clairvoyant bound out.")
    ] = False,
    as_json: opt.AsJson = False,
    config: opt.OptionsFile = None,
) -> None:
    """Run policies on the same requests, at each rate and seed; with --out, also shortest-total for a bound."""
    more = {"num_requests": num_requests, "backend": backend, "model": model, "count_host_time": count_host_time}
    world = scenario_of(in_world, clients, config, engine, **more)
    rates = None if qps is None else read_numbers("qps", qps)
    from llmsched_gym.evaluation import cluster_capacity as clusters
    from llmsched_gym.evaluation.grid import evaluate as run
    from llmsched_gym.evaluation.spread import where
    from llmsched_gym.report.bounds import with_bound

    named = split_policies(policy)
    for name, given in (("router", router), ("replicas", replicas), ("staleness", staleness)):
        if given is not None and not isinstance(world, ClusterScenario):
            raise ConfigError(f"{name}: expected a suite of several replicas, got {in_world.suite!r}")
    if isinstance(world, ClusterScenario):
        routers_named = split_policies([world.router if router is None else router], "router")
        named = clusters.pairs(routers_named, named)
        world = world if replicas is None else clusters.with_replicas(world, replicas)
        world = world if staleness is None else world.replace(router_staleness_s=staleness)
    if perfetto is not None:
        from llmsched_gym.evaluation.perfetto import claim_trace

        claim_trace(perfetto)
        if len(named) != 1 or seeds != 1 or (rates is not None and len(rates) != 1):
            raise ConfigError("perfetto: expected one policy, one rate and --seeds 1, got several runs")
        if isinstance(world, ClusterScenario) or world.backend != "simulated" or world.async_lag:
            raise ConfigError("perfetto: expected one simulated engine without async_lag")
    bounded = out is not None and not no_bound and world.backend == "simulated"
    bounded = bounded and not isinstance(world, ClusterScenario)
    chosen = with_bound(named) if bounded else named
    names = [*policy, *([router] if router else [])]
    with places_of(at, names, in_world, engine) as places, console.progress_bar("runs", where(places)) as progress:
        rows = run(
            world,
            chosen,
            qps=rates,
            seeds=seeds,
            first_seed=first_seed,
            workers=places,
            out=out,
            progress=progress,
        )
    if perfetto is not None:
        from llmsched_gym.evaluation.grid import finite
        from llmsched_gym.evaluation.perfetto import write_trace
        from llmsched_gym.evaluation.record import record

        one = finite(world) if rates is None else finite(world).replace(qps=rates[0])
        write_trace(record(one, named[0], first_seed), perfetto)
        console.remark(f"wrote {perfetto}; open it at ui.perfetto.dev")
    try:
        if out is not None:
            from llmsched_gym.evaluation.lives import write_lives

            write_lives(out, world)
            report([out])
    finally:
        print_comparison(rows, as_json)
    if chosen != named:
        note = f"{chosen[-1]} ran too: a bound that knows every output length (--no-bound leaves it out)"
        console.remark(note)
