"""Options that several commands have, each declared once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from llmsched_gym.cli.options_file import read_options
from llmsched_gym.config import CLUSTER_SUITES, SUITES

RUNS, ENGINE, OUTPUT = "What runs", "The engine", "Output"  # groups of help that single options join


def option(*names: str, **more: Any) -> Any:
    """typer's option; `group` is the heading of help under which it stands."""
    return typer.Option(*names, rich_help_panel=more.pop("group", None), **more)


Policy = Annotated[
    list[str], option(metavar="P1,P2,...", group=RUNS, help="Names, module:Class or folders, separated by commas.")
]
Qps = Annotated[
    str | None,
    option(group=RUNS, help="Arrival rates, 1/s, of requests or sessions, separated by commas; else the suite's."),
]
NumRequests = Annotated[int | None, option(group=RUNS, help="Measured requests of a run (2000).")]
Seeds = Annotated[int, option(group=RUNS, help="Number of seeds.")]
FirstSeed = Annotated[int, option(group=RUNS, help="The first seed.")]
Routers = Annotated[
    str | None,
    option("--router", metavar="R1,R2,...", group=RUNS, help="Routers, each with every policy, of several replicas."),
]


@dataclass(frozen=True)
class World:
    """The world."""

    suite: Annotated[
        str, option(help=f"One of {', '.join((*SUITES, *CLUSTER_SUITES))}, or a TOML file (llmsched suite).")
    ] = "default"
    workload: Annotated[str | None, option(help="Fitted workload: a name or a JSON file.")] = None
    trace: Annotated[str | None, option(help="Trace file that replaces the workload.")] = None
    trace_arrivals: Annotated[
        str | None,
        option(help="With a trace: keep its times (usual where it has some), or poisson, gamma, mmpp, switching."),
    ] = None
    trace_invalid: Annotated[str | None, option(help="Rows of a trace that break a rule: raise, or drop.")] = None
    set_: Annotated[
        list[str] | None, option("--set", metavar="FIELD=VALUE", help="Any other field of the scenario.")
    ] = None


@dataclass(frozen=True)
class Clients:
    """What clients expect."""

    strict_share: Annotated[float | None, option(help="Share of strict users, 0 to 1.")] = None
    ttft_slo: Annotated[
        str | None, option(metavar="S[,T]", help="TTFT SLO: seconds, and seconds a prompt token (0).")
    ] = None
    tbt_slo: Annotated[
        str | None, option(metavar="S[,S]", help="SLO of gaps between tokens, seconds: of strict users, of others.")
    ] = None
    tbt_rule: Annotated[str | None, option(help="every-gap, fraction:X, deadline or mean.")] = None
    patience: Annotated[float | None, option(help="Lateness at which a client leaves, seconds; inf: never.")] = None


@dataclass(frozen=True)
class Engine:
    """The engine."""

    profile: Annotated[str | None, option(help="Cost profile: a name or a JSON file.")] = None
    jitter: Annotated[float | None, option(help="Sigma of the log-normal factor on batch times.")] = None
    cost_scale: Annotated[float | None, option(help="Hidden factor on batch times.")] = None
    length_hint: Annotated[str | None, option(help="Output length told to policies: none, noisy:SIGMA, oracle.")] = None
    allow_refusal: Annotated[bool, option("--allow-refusal", help="Let policies refuse requests.")] = False
    prefix_caching: Annotated[
        bool | None,
        option("--prefix-caching/--no-prefix-caching", help="Whether requests share KV blocks of equal beginnings."),
    ] = None


@dataclass(frozen=True)
class Places:
    """Where it runs."""

    workers: Annotated[int | None, option(min=1, help="Processes; one per core unless given.")] = None
    ray: Annotated[bool, option("--ray", help="Run on a Ray started here, of --workers processes.")] = False
    ray_address: Annotated[
        str | None, option("--ray-address", metavar="A", help="Run on the Ray cluster at this address.")
    ] = None


TraceInvalid = Annotated[str | None, option(help="Rows of a trace that break a rule: raise, or drop.")]
AsJson = Annotated[bool, option("--json", group=OUTPUT, help="Print JSON.")]


def _take_file(context: typer.Context, path: Path | None) -> Any:
    """Let the file's options be the defaults of this command; the value is what it says of the scenario's fields."""
    if path is None:
        return None
    found = read_options(path, [parameter.name or "" for parameter in context.command.params])
    context.default_map = {**(context.default_map or {}), **found.options}
    return found.fields


OptionsFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=_take_file,
        metavar="FILE",
        help="Options by name, a .toml or .json file, or the config.json of a run.",
    ),
]
