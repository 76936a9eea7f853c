"""Values in plain text, for pages, the terminal and errors: numbers, intervals, counts of things, tables."""

from __future__ import annotations

import ast
import json
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any


def number(value: float | None, form: int | str = 2, none: str = "-", infinite: str = "inf") -> str:
    """A figure with so many decimals, or in a format such as ``+.1%``; `none` for None and nan, `infinite` if it is."""
    if value is None or math.isnan(value):
        return none
    if math.isinf(value):
        return infinite if value > 0 else f"-{infinite}"
    return format(value, f".{form}f" if isinstance(form, int) else form)


def between(low: float | None, high: float | None, form: int | str = 2) -> str:
    """An interval in brackets behind a figure; nothing where its lower end is none or not finite."""
    if low is None or high is None or not math.isfinite(low):
        return ""
    return f" [{number(low, form)}, {number(high, form)}]"


def counted(count: int, thing: str) -> str:
    """ "1 request", "2,000 requests": `thing` is one of them, with a regular plural."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


class _NotFinite(ast.NodeTransformer):
    """Numbers for the names that TOML has of them, which Python's literals lack."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(float(node.id)) if node.id in ("inf", "nan") else node


def read_value(text: str) -> Any:
    """The value that a text is as JSON has it, or else Python; what neither knows stays text, and so do other kinds.

    ``true``, ``True``, ``null``, ``None``, numbers, ``inf`` and ``nan`` too, words in quotes, lists, tuples and tables
    of such.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes in words
            value = ast.literal_eval(_NotFinite().visit(ast.parse(text.lstrip(" \t"), mode="eval")))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text
    return value if isinstance(value, bool | int | float | str | list | tuple | dict | None) else text


def no_memory(error: MemoryError) -> str:
    """What to say of it; the types of records, a thousand letters in NumPy's words, are left out."""
    return f"not enough memory: {str(error).partition(' and data type')[0]}"


def shown(value: object) -> str:
    """A bad value for an error message, cut where it is long."""
    found = repr(value)
    return found if len(found) <= 40 else found[:37] + "..."


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], text: int | None = None) -> str:
    """A Markdown table; the columns behind the first `text` ones hold numbers and stand to the right."""
    text = len(header) if text is None else text
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * text + "---:|" * (len(header) - text)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])
