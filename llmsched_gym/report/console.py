"""Printing on a console: numbers, tables and JSON rows, a bar of progress, whatever the stream can take."""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

BROKEN_PIPE = 141
PIPE_WIDTH = 180  # columns of a table that no terminal bounds
LINE_S = 10.0  # between two lines of progress where there is no bar

quiet = False  # whether progress and remarks are left out


def remark(text: str) -> None:
    """Say something on stderr, unless the user wants none of it."""
    if not quiet:
        print("llmsched:", text, file=sys.stderr)


def new_table(*columns: str, title: str | None = None, text: int = 1) -> Table:
    """A table whose first `text` columns are text, which wraps where it must, and whose others are numbers."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, padding=0)
    for i, column in enumerate(columns):
        # a number in two lines reads as another number
        table.add_column(column, justify="left" if i < text else "right", overflow="fold", no_wrap=i >= text)
    return table


def listing(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> Table:
    """Chosen fields of some rows, under the headings of `columns`; those of numbers must come last."""
    text = sum(any(isinstance(row[name], str) for row in rows) for name in columns)
    table = new_table(*columns.values(), text=text)
    table.columns[0].no_wrap = True  # a name in two lines cannot be copied
    for row in rows:
        values = (row[name] for name in columns)
        table.add_row(*(f"{v:g}" if isinstance(v, float) else str(v) for v in values))
    return table


@contextmanager
def progress_bar(what: str, where: Callable[[], str] = lambda: "") -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's stderr, gone when done; elsewhere a line on stderr every `LINE_S` seconds.

    `where` says what does it, such as "on 2 nodes, 64 CPUs"; how many are done a second is said with it.
    """
    if quiet:
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    begun_s, first = time.monotonic(), -1  # those that were done before do not count for the rate

    def place(done: int) -> str:
        nonlocal first
        first = done if first < 0 else first
        rate = (done - first) / max(time.monotonic() - begun_s, 1e-9)
        return f" {text}, {rate:.3g} a second" if (text := where()) else ""

    console = Console(stderr=True)
    if not console.is_terminal:
        said_s = begun_s

        def say(done: int, total: int) -> None:
            nonlocal said_s
            at = place(done)
            now_s = time.monotonic()
            if now_s - said_s >= LINE_S:
                said_s = now_s
                print(f"llmsched: {done:,} of {total:,} {what}{at} after {now_s - begun_s:.0f} s", file=sys.stderr)

        yield say
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        "{task.description}",
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(
            task, completed=done, total=total, description=f"{what}{escape(place(done))}"
        )


def print_listing(rows: list[dict[str, Any]], columns: dict[str, str], as_json: bool = False) -> None:
    """Print chosen fields of rows as a table, or whole rows as JSON."""
    if as_json:
        print_rows(rows)
        return
    print_table(listing(rows, columns))


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a JSON array, one a line."""
    emit("[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in rows) + "\n]\n")


def print_table(table: Table | str, file: Any = None) -> None:
    """Print a table, in colour on a terminal, or a line below one, as wide; `file` is stdout unless given."""
    from rich.console import Console

    stream = file or sys.stdout
    terminal = stream is not None and stream.isatty()
    text = io.StringIO()
    width = None if terminal else PIPE_WIDTH
    # names of policies have brackets, which are no markup
    console = Console(file=text, force_terminal=terminal, width=width, highlight=False, markup=False, emoji=False)
    console.print(table)
    emit(text.getvalue(), stream)


def emit(text: str, stream: Any = None) -> None:
    """Write to stdout, and leave quietly if nobody reads it; OSError with one line if it cannot be written to."""
    stream = stream or sys.stdout
    if stream is None:
        raise OSError("stdout is closed: there is nowhere to print to")
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or Python would try again when it ends
        if isinstance(error, BrokenPipeError):
            raise SystemExit(BROKEN_PIPE) from None
        raise OSError(f"stdout: {error.strerror}") from None


LOOK_ALIKES = str.maketrans("─━│┃╭╮╰╯–—×·…≤≥→←µ", "--||++++--x.~<>><u")
"""ASCII for what our tables are made of; as wide, so that columns stay in line."""


def print_anywhere() -> None:
    """Let streams whose encoding lacks a character take an ASCII one for it; do not let files become closed streams."""
    codecs.register_error("look-alike", _look_alike)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="look-alike")
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    if sys.stderr is None:  # print() would take stdout for it
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives


def _look_alike(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(LOOK_ALIKES)
    return text.encode("ascii", "replace").decode(), error.end
