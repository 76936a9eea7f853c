"""`llmsched arena`: all schedulers on all suites of one engine, ranked by one objective after another."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from llmsched_gym.cli import options as opt
from llmsched_gym.config import SUITES, ConfigError
from llmsched_gym.evaluation import arena as arenas
from llmsched_gym.evaluation.arena_capacity import capacities_of
from llmsched_gym.evaluation.criteria import criterion
from llmsched_gym.evaluation.spread import choose, where
from llmsched_gym.evaluation.store import write_rows
from llmsched_gym.files import replace_file
from llmsched_gym.report import console
from llmsched_gym.report.arena_page import write_arena

ROWS = "arena.parquet"


def arena_command(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(rich_help_panel="Output", metavar="FOLDER", help="Folder of the runs and of the page.")
    ],
    at: opt.Places,
    policies: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="What runs",
            metavar="P1,P2,...",
            help="Schedulers; default: all registered ones but random.",
        ),
    ] = None,
    suites: Annotated[
        str, typer.Option(rich_help_panel="What runs", metavar="S1,S2,...", help="Suites of one engine.")
    ] = ",".join(SUITES),
    profiles: Annotated[
        str,
        typer.Option(rich_help_panel="What runs", metavar="C1,C2,...", help="Cost profiles; own: each suite's own."),
    ] = ",".join(arenas.Arena.profiles),
    loads: Annotated[
        str, typer.Option(rich_help_panel="What runs", metavar="X1,X2,...", help="Shares of the fluid capacity.")
    ] = "0.6,0.8,0.95,1.05",
    hints: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="What runs",
            metavar="H1,...",
            help="Length hints (noisy:SIGMA) with which those that know lengths run again.",
        ),
    ] = None,
    tuned: Annotated[
        str,
        typer.Option(
            rich_help_panel="What runs",
            metavar="FILE.toml",
            help="Tuned constants, which run too; shipped: ours; none: no such runs.",
        ),
    ] = "shipped",
    reference: Annotated[
        str, typer.Option(rich_help_panel="What runs", help="The scheduler that the others are compared with.")
    ] = "vllm-v1",
    seeds: Annotated[
        int, typer.Option(rich_help_panel="How much", help="Number of seeds; there are no intervals below 10.")
    ] = 10,
    first_seed: Annotated[int, typer.Option(rich_help_panel="How much", help="The first seed.")] = 0,
    num_requests: Annotated[int, typer.Option(rich_help_panel="How much", help="Measured requests of a run.")] = 1000,
    session_requests: Annotated[
        int, typer.Option(rich_help_panel="How much", help="Measured turns of a run of a suite of sessions.")
    ] = 300,
    capacity: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="What runs",
            metavar="CRITERION",
            help="Also search capacities, e.g. serve-all:0.9; takes long.",
        ),
    ] = None,
) -> None:
    """Rank schedulers on all suites at shares of the fluid capacity; goes on where it was interrupted."""
    if capacity is not None:
        criterion(capacity)
    named = {"suites": _names(suites, "suites"), "profiles": _names(profiles, "profiles")}
    constants: tuple[arenas.Constants, ...] = ()
    if tuned != "none":
        path = arenas.TUNED_FILE if tuned == "shipped" else Path(tuned)
        constants = arenas.chosen(arenas.read_constants(path), named["profiles"])
    arena = arenas.Arena(
        policies=() if policies is None else tuple(_names(policies, "policies")),
        suites=tuple(named["suites"]),
        profiles=tuple(named["profiles"]),
        loads=tuple(_numbers(loads)),
        hints=() if hints is None else tuple(_names(hints, "hints")),
        constants=constants,
        reference=reference,
        seeds=seeds,
        first_seed=first_seed,
        num_requests=num_requests,
        session_requests=session_requests,
    )
    files = [*arena.policies, *arena.suites, *arena.profiles]
    found: list[dict[str, Any]] = []
    with choose(at.workers, at.ray, at.ray_address, files) as places:
        with console.progress_bar("runs", where(places)) as progress:
            rows = arenas.run(arena, out, places=places, progress=progress)
        replace_file(out / ROWS, lambda path: write_rows(rows, path))
        if capacity is not None:
            with console.progress_bar("capacities", where(places)) as progress:
                found = capacities_of(arena, capacity, out, places=places, progress=progress)
    config = json.loads((out / arenas.CONFIG).read_text(encoding="utf-8"))
    page = write_arena(out, config, rows, found, _again(context))
    console.emit(f"{page}\n")


def _again(context: typer.Context) -> str:
    """The command with the options that are not the usual ones."""
    words = ["llmsched", "arena"]
    for option in context.command.params:
        value = context.params.get(option.name or "")
        if value is not None and str(value) != str(option.default):
            words += [option.opts[0]] if value is True else [option.opts[0], str(value)]
    return shlex.join(words)


def _names(text: str, option: str) -> list[str]:
    """Names separated by commas, those inside brackets left alone."""
    names = [name.strip() for name in re.split(r",(?![^\[\]]*\])", text)]
    if not all(names):
        raise ConfigError(f"{option}: expected names separated by commas, got {text!r}")
    return names


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"loads: expected numbers separated by commas, got {text!r}") from None
