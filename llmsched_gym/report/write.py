"""The report of a folder of results: report.html in one file, report.md and the tables as CSV beside it."""

from __future__ import annotations

import json
from pathlib import Path

from llmsched_gym.files import replace_file
from llmsched_gym.report import findings, page, settings, statistics, tables, twins, verdict
from llmsched_gym.report.bounds import ordinary
from llmsched_gym.report.results import Results, read_results
from llmsched_gym.report.sections import sections
from llmsched_gym.report.served import is_served
from llmsched_gym.report.statistics import ReportError

__all__ = ["ReportError", "write_report"]


def write_report(directory: str | Path, *, title: str | None = None) -> Path:
    """Write report.html, report.md and tables/*.csv from what `evaluate --out` left in `directory`.

    Returns the path of report.html. Raises :class:`ReportError` with one line if something needed is missing or broken.
    """
    return write_results(read_results(Path(directory)), title)


def write_results(results: Results, title: str | None = None) -> Path:
    """Write the report of results that were read."""
    library = page.plotly_source()
    table = statistics.comparison_table(results.rows)
    policies = statistics.policies_of(results.rows)
    judged = ordinary(policies)
    kind = "Servers" if is_served(results.rows) else "Schedulers"
    who = f"{kind} compared" if len(judged) > 1 else judged[0]
    parts = [part for part in sections(results) if part.shown or part.tables]
    charts = [chart for part in parts for chart in part.shown]
    comparisons = tables.comparison_tables(results.rows, table)
    times = tables.comparison_tables(results.rows, table, statistics.TIMES, "Times and rates")
    matrices = [found for found in (verdict.table(results.rows), tables.attainment_matrix(results.rows)) if found]
    context = {
        "title": title or f"{who}: suite {results.suite}",
        "verdict": verdict.sentence(results.rows),
        "summary": [findings.overview(results), *findings.summary(results.rows, table), *findings.overall(results)],
        "matrices": matrices,
        "parts": parts,
        "comparisons": comparisons,
        "times": times,
        "remarks": findings.remarks(results, table),
        "settings": settings.settings(results),
        "command": settings.command(results.config, results.directory),
        "config": json.dumps(results.config, indent=1, sort_keys=True),
        "styles": page.chart.style_of(policies),
        "data": page.chart_data(charts, policies),
        "plotly": page.Markup(library),
    }
    printed = [*matrices, *(t for part in parts for t in part.tables), *comparisons, *times]
    files = {f"tables/{name}": text for name, text in twins.printed_csvs(printed).items()}
    files["tables/comparison.csv"] = twins.comparison_csv(table)
    files |= {f"report.{kind}": page.render(kind, context) for kind in ("md", "html")}
    for path in results.directory.glob("tables/*.csv"):
        path.unlink()
    for name, text in files.items():
        _write(results.directory / name, text.encode())
    return results.directory / "report.html"


def _write(path: Path, content: bytes) -> None:
    """Write a file of the report, in a folder of its own if need be."""
    try:
        path.parent.mkdir(exist_ok=True)
        replace_file(path, lambda partial: partial.write_bytes(content))
    except OSError as error:
        raise ReportError(f"report: cannot write {path}: {error.strerror or error}") from None
