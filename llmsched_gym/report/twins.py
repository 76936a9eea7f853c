"""The tables of a report as CSV files, for whoever computes with them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable

import pandas as pd

from llmsched_gym.report.page import heads
from llmsched_gym.report.tables import Table


def comparison_csv(table: pd.DataFrame) -> str:
    """All metrics of all policies at all loads, one a line, unrounded, as `statistics.comparison_table` has them."""
    return str(table.to_csv(index=False, lineterminator="\n"))


def printed_csvs(tables: Iterable[Table]) -> dict[str, str]:
    """Name and content of a file for each table, as it is printed; an interval has a column of its own."""
    found: dict[str, str] = {}
    for table in tables:
        name = re.sub(r"[^a-z0-9.]+", "-", table.title.lower()).strip("-.")[:70] or "table"
        number = 2
        while f"{name}.csv" in found:
            name, number = f"{name.removesuffix(f'-{number - 1}')}-{number}", number + 1
        found[f"{name}.csv"] = _printed(table)
    return found


def _printed(table: Table) -> str:
    ranged = [any(row[i].interval for row in table.rows) for i in range(len(table.labels))]
    file = io.StringIO()
    write = csv.writer(file, lineterminator="\n").writerow
    write(
        [
            text
            for head, more in zip(heads(table), ranged, strict=True)
            for text in [head, f"{head} interval"][: 1 + more]
        ]
    )
    for row in table.rows:
        write(
            [
                t
                for cell, more in zip(row, ranged, strict=True)
                for t in [_plain(cell.text), _plain(cell.interval)][: 1 + more]
            ]
        )
    return file.getvalue()


def _plain(text: str) -> str:
    """A number as programs read it; other text as it is."""
    number = text.replace("−", "-").replace(",", "")
    number = {"–": "", "∞": "inf"}.get(number, number)
    try:
        float(number)
    except ValueError:
        return "" if text == "–" else text
    return number
