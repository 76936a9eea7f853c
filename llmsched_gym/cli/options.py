"""Options that several commands have, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmsched_gym.cli.options_file import read_options
from llmsched_gym.config import CLUSTER_SUITES, SUITES

Policy = Annotated[
    list[str], typer.Option(metavar="P1,P2,...", help="Names, module:Class or folders, separated by commas.")
]
SuiteName = Annotated[
    str, typer.Option(help=f"One of {', '.join((*SUITES, *CLUSTER_SUITES))}, or a TOML file (llmsched suite).")
]
Routers = Annotated[
    str | None,
    typer.Option("--router", metavar="R1,R2,...", help="Routers, each with every policy, on a suite of replicas."),
]
Profile = Annotated[str | None, typer.Option(help="Cost profile: a name or a JSON file.")]
Workload = Annotated[str | None, typer.Option(help="Fitted workload: a name or a JSON file.")]
TraceFile = Annotated[str | None, typer.Option(help="Trace file that replaces the workload.")]
TraceArrivals = Annotated[
    str | None,
    typer.Option(
        help="With a trace: keep its times (the default where it has some), or poisson, gamma, mmpp, switching."
    ),
]
TraceInvalid = Annotated[str | None, typer.Option(help="Rows of a trace that break a rule: raise, or drop.")]
NumRequests = Annotated[int | None, typer.Option(help="Measured requests of a run (2000).")]
Seeds = Annotated[int, typer.Option(help="Number of seeds.")]
FirstSeed = Annotated[int, typer.Option(help="The first seed.")]
StrictShare = Annotated[float | None, typer.Option(help="Share of strict users, 0 to 1.")]
TtftSlo = Annotated[
    str | None, typer.Option(metavar="S[,T]", help="TTFT SLO: seconds, and seconds a prompt token (0).")
]
TbtSlo = Annotated[
    str | None, typer.Option(metavar="S[,S]", help="SLO of gaps between tokens, seconds: of strict users, of others.")
]
Jitter = Annotated[float | None, typer.Option(help="Sigma of the log-normal factor on batch times.")]
Patience = Annotated[float | None, typer.Option(help="Lateness at which a client leaves, seconds; inf: never.")]
CostScale = Annotated[float | None, typer.Option(help="Hidden factor on batch times.")]
LengthHint = Annotated[str | None, typer.Option(help="Output length told to policies: none, noisy:SIGMA, oracle.")]
TbtRule = Annotated[str | None, typer.Option(help="every-gap, fraction:X, deadline or mean.")]
BackendName = Annotated[
    str | None,
    typer.Option("--backend", help="What executes batches: simulated, or a real model: transformers or vllm."),
]
Model = Annotated[str | None, typer.Option(help="With transformers: a folder, a hub id, random:tiny.")]
CountHostTime = Annotated[
    bool, typer.Option("--count-host-time", help="With transformers: let the scheduler's own time count.")
]
PrefixCaching = Annotated[
    bool | None,
    typer.Option("--prefix-caching/--no-prefix-caching", help="Whether requests share KV blocks of equal beginnings."),
]
AllowRefusal = Annotated[bool, typer.Option("--allow-refusal", help="Let policies refuse requests.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Any other field of the scenario.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; one per core unless given.")]
OnRay = Annotated[bool, typer.Option("--ray", help="Run on a Ray started here, of --workers processes.")]
RayAddress = Annotated[
    str | None, typer.Option("--ray-address", metavar="A", help="Run on the Ray cluster at this address.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
        help="Options by name, TOML or JSON, or the config.json of a run.",
    ),
]
