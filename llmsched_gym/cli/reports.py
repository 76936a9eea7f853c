"""`llmsched report` of folders of results, and `llmsched bench`, figures of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llmsched_gym.cli import options as opt
from llmsched_gym.config import ConfigError
from llmsched_gym.report import console, terminal


def report(
    directory: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders that evaluate, capacity or serve-bench wrote.")
    ],
    out: Annotated[Path | None, typer.Option(help="With several folders: the folder of what compares them.")] = None,
) -> None:
    """Write report.html, report.md and tables/ of a folder of results, or of several in a folder that compares them."""
    from llmsched_gym.report.write import write_report

    folder = directory[0]
    if len(directory) > 1 or out is not None:
        if out is None or len(directory) == 1:
            raise ConfigError("out: expected --out FOLDER with several folders, and with one folder none")
        from llmsched_gym.evaluation.store import claim_results
        from llmsched_gym.report.compare import combine

        claim_results(out)
        combine(directory, out)
        folder = out
    console.remark(f"wrote {write_report(folder)}")


def print_comparison(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Rows of runs as tables, or as JSON."""
    if as_json:
        console.print_rows(rows)
        return
    for table in terminal.comparison(rows):
        console.print_table(table)


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="A smaller grid; the keys say so.")] = False,
    as_json: opt.AsJson = False,
) -> None:
    """Measure how fast this machine runs the engine, an evaluation and the environments."""
    from llmsched_gym.evaluation.bench import bench as measure

    figures = measure(quick, note=lambda text: console.remark(f"measuring: {text}"))
    if as_json:
        console.emit(json.dumps(figures, allow_nan=False) + "\n")
        return
    flat = [(k, name, v) for k, value in figures.items() for name, v in _entries(value)]
    console.print_listing(
        [{"figure": f"{k} {name}".strip(), "value": v} for k, name, v in flat], {"figure": "figure", "value": "value"}
    )


def _entries(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else [("", value)]
