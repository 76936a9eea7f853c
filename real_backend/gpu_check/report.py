"""The results of a GPU check as JSON and as Markdown tables: pure functions of what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from llmsched_gym import text

TABLES = {
    "bounds": "Batches against their bounds",
    "mixing": "Decodes and a chunk, alone and together",
    "generate": "Decode steps of transformers' generate",
    "kernel": "The attention kernel alone",
}


def write(results: dict[str, Any], out: Path) -> None:
    """Write OUT/summary.json and OUT/summary.md; safe to call again as more comes in."""
    (out / "summary.json").write_text(json.dumps(_plain(results), indent=1) + "\n", encoding="utf-8")
    (out / "summary.md").write_text(markdown(results), encoding="utf-8")


def markdown(results: dict[str, Any]) -> str:
    """All results as a page."""
    general = {name: value for name, value in results.items() if not isinstance(value, dict | list)}
    parts = ["# GPU check", _pairs({**results.get("versions", {}), **general})]
    fates = [{"section": name, **entry} for name, entry in results.get("sections", {}).items()]
    parts += ["## Sections", table(fates)]
    for name in ("ceilings", "sweep_rows", "fit"):
        if name in results:
            parts += [f"## {name.replace('_', ' ').capitalize()}", _pairs(results[name])]
    for name, rows in results.get("correctness", {}).items():
        parts += [f"## Correctness: {name}", table(rows) if isinstance(rows, list) else _pairs(rows)]
    for name, title in TABLES.items():
        if results.get(name):
            parts += [f"## {title}", table(results[name])]
    if "sim2real" in results:
        parts += ["## Simulator against model", _pairs(_flat(results["sim2real"]))]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of rows with equal fields."""
    if not rows:
        return "none"
    head = list(rows[0])
    return text.table(head, [[_text(row.get(name)) for name in head] for row in rows])


def _pairs(values: dict[str, Any]) -> str:
    return "\n".join(f"* {name}: {_text(value)}" for name, value in values.items())


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name} ") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value).replace("|", "/").replace("\n", " ")


def _plain(value: Any) -> Any:
    """The value with nan and infinity as None, which JSON lacks."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
