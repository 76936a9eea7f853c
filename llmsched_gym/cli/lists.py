"""Commands that list what there is to name: policies, routers, suites, workloads, profiles."""

from __future__ import annotations

from typing import Annotated

import typer

from llmsched_gym.cli import options as opt
from llmsched_gym.config import CLUSTER_SUITES, SUITES, find_suite, suite_text
from llmsched_gym.report import console


def policies(as_json: opt.AsJson = False) -> None:
    """List the schedulers and what they do."""
    from llmsched_gym.registry import registry
    from llmsched_gym.scheduler import Compiled

    rows = []
    for name, entry in sorted(registry().items()):
        what = getattr(entry, "what", " ".join((entry.__doc__ or "").split()))
        kind = {"compiled": isinstance(entry, Compiled), "clairvoyant": getattr(entry, "clairvoyant", False)}
        rows.append({"name": name, "what": what, **kind})
    console.print_listing(rows, {"name": "policy", "what": "what"}, as_json)


def routers(as_json: opt.AsJson = False) -> None:
    """List the routers and what they do."""
    from llmsched_gym.registry import routers as known

    rows = []
    for name, entry in sorted(known().items()):
        options = {parameter.name: f"{parameter.default:g}" for parameter in entry.own}
        given = "" if not options else f"[{','.join(f'{key}={value}' for key, value in options.items())}]"
        rows.append({"name": name + given, "what": entry.what, "parameters": options})
    console.print_listing(rows, {"name": "router", "what": "what"}, as_json)


def suites(as_json: opt.AsJson = False) -> None:
    """List the suites."""
    rows = []
    for name, entry in (SUITES | CLUSTER_SUITES).items():
        fields = {k: "inf" if v == float("inf") else v for k, v in entry.scenario.to_dict().items()}
        rows.append({"name": name, "what": entry.what, "env_id": entry.env_id, "scenario": fields})
    console.print_listing(rows, {"name": "suite", "env_id": "environment", "what": "what"}, as_json)


def suite(name: Annotated[str, typer.Argument(metavar="NAME", help="A suite's name, or a TOML file.")]) -> None:
    """Print a suite as a TOML file, to be changed and given to --suite."""
    console.emit(suite_text(find_suite(name)))


def workloads(as_json: opt.AsJson = False) -> None:
    """List the fitted workloads."""
    from llmsched_gym.workload import describe_workloads

    rows = describe_workloads()
    for row in [] if as_json else rows:
        for name in ("prompt_tokens", "output_tokens"):
            row[name] = " / ".join(f"{row[name][figure]:.0f}" for figure in ("mean", "p50", "p90", "p99"))
    heads = {"prompt_tokens": "prompt tokens: mean / p50 / p90 / p99", "output_tokens": "output tokens"}
    console.print_listing(rows, {"name": "workload", **heads, "source": "source"}, as_json)


def profiles(as_json: opt.AsJson = False) -> None:
    """List the cost profiles."""
    from llmsched_gym.cost import list_profiles

    rows = []
    for profile in list_profiles():
        full_ms = 1e3 * float(profile.linear_table_s(512)[512])
        kind = "additive" if profile.surface is None else "surface"
        rows.append(profile.to_dict() | {"basis": profile.basis, "attention": kind, "full_batch_ms": full_ms})
    heads = {"name": "profile", "attention": "attention", "tile_tokens": "tile\n(tokens)"}
    heads |= {"full_batch_ms": "512 tokens\n(ms)", "num_kv_blocks": "KV blocks\nof 16"}
    console.print_listing(rows, heads, as_json)
    if not as_json:
        console.print_listing(rows, {"name": "profile", "basis": "times", "engine": "engine"})
        console.print_table("NAME[mixing=FACTOR]: decodes beside a prompt chunk cost FACTOR times as much attention.")
        console.print_table("NAME[additive=true]: a batch costs the sum of its parts, fitted to decodes alone.")
