"""The report of a folder of results: report.html in one file, report.md and the tables as CSV beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from llmsched_gym.files import replace_file
from llmsched_gym.report import capacity_page, findings, page, settings, statistics, tables, twins, verdict
from llmsched_gym.report.bounds import ordinary
from llmsched_gym.report.results import Results, read_results
from llmsched_gym.report.sections import sections
from llmsched_gym.report.served import is_served
from llmsched_gym.report.statistics import ReportError

__all__ = ["ReportError", "write_page", "write_report"]


def write_report(directory: str | Path, *, title: str | None = None) -> Path:
    """Write report.html, report.md and tables/*.csv from what `evaluate` or `capacity --out` left in `directory`.

    Returns the path of report.html. Raises :class:`ReportError` with one line if something needed is missing or broken.
    """
    directory = Path(directory)
    page.plotly_source()  # or one line says so before anything is read
    files = {}
    if capacity_page.is_capacity_folder(directory):
        context = capacity_page.context_of(directory)
    else:
        results = read_results(directory)
        table = statistics.comparison_table(results.rows)
        context = _context(results, table)
        files["tables/comparison.csv"] = twins.comparison_csv(table)
    return write_page(directory, context | {"title": title or context["title"]}, files)


def write_page(directory: Path, context: dict[str, Any], files: Mapping[str, str]) -> Path:
    """Write report.html, report.md, tables/*.csv of what the templates need, and `files`; returns the first's path."""
    files, library = dict(files), page.plotly_source()
    parts = [part for part in context["parts"] if part.shown or part.tables]
    charts = [chart for part in parts for chart in part.shown]
    context = {**context, "parts": parts}
    context["styles"] = page.chart.style_of(context["policies"])
    context["data"] = page.chart_data(charts, context["policies"])
    context["plotly"] = page.packed(library)
    printed = [*context["matrices"], *(table for part in parts for table in part.tables)]
    printed += [*context["comparisons"], *context["times"]]
    files |= {f"tables/{name}": text for name, text in twins.printed_csvs(printed).items()}
    files |= {f"report.{kind}": page.render(kind, context) for kind in ("md", "html")}
    for path in directory.glob("tables/*.csv"):
        path.unlink()
    for name, text in files.items():
        _write(directory / name, text.encode())
    return directory / "report.html"


def _context(results: Results, table: pd.DataFrame) -> dict[str, Any]:
    """What the templates need of a grid of runs."""
    rows = results.rows
    policies = statistics.policies_of(rows)
    judged = ordinary(policies)
    kind = "Servers" if is_served(rows) else "Schedulers"
    who = f"{kind} compared" if len(judged) > 1 else judged[0]
    return {
        "title": f"{who}: suite {results.suite}",
        "verdict": verdict.sentence(rows),
        "summary": [findings.overview(results), *findings.summary(rows, table), *findings.overall(results)],
        "matrices": [found for found in (verdict.table(rows), tables.attainment_matrix(rows)) if found],
        "parts": sections(results),
        "comparisons": tables.comparison_tables(rows, table),
        "times": tables.comparison_tables(rows, table, statistics.TIMES, "Times and rates"),
        "remarks": findings.remarks(results, table),
        "settings": settings.settings(results),
        "command": settings.command(results.config, results.directory),
        "config": json.dumps(results.config, indent=1, sort_keys=True),
        "policies": policies,
    }


def _write(path: Path, content: bytes) -> None:
    """Write a file of the report, in a folder of its own if need be."""
    try:
        path.parent.mkdir(exist_ok=True)
        replace_file(path, lambda partial: partial.write_bytes(content))
    except OSError as error:
        raise ReportError(f"report: cannot write {path}: {error.strerror or error}") from None
