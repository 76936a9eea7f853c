"""The report of a folder of results: report.html in one file, report.md with its figures beside it."""

from __future__ import annotations

import colorsys
import importlib.resources
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure

from llmsched_gym.evaluation import draw, prose, tables
from llmsched_gym.evaluation.sections import Results, findings, overview, remarks, sections, settings, suite_of
from llmsched_gym.evaluation.tables import ReportError

REQUIRED = ("runs.parquet", "requests.parquet", "config.json")
REQUEST_COLUMNS = ["policy", "qps", "seed", "prompt_tokens", "phase", "ttft_s", "attained"]
PNG_DPI = 150

__all__ = ["ReportError", "read_results", "write_report"]


def write_report(directory: str | Path, *, title: str | None = None) -> Path:
    """Write report.html, report.md and figures/*.png from what `evaluate --out` left in `directory`.

    Returns the path of report.html. Raises :class:`ReportError` with one line if something needed is missing or broken.
    """
    results = read_results(Path(directory))
    table = tables.comparison_table(results.rows)
    title = title or f"Schedulers compared: suite {suite_of(results)}"
    parts = []
    for section in sections(results):
        figures = []
        for exhibit in section.exhibits:
            try:
                figure = exhibit.make()
            except draw.NothingToPlot:
                continue
            png, svg = _render(figure, exhibit.name)
            path = f"figures/{exhibit.name}.png"
            _write(results.directory / path, png)
            alt = exhibit.name.replace("-", " ")
            figures.append(
                {"path": path, "svg": Markup(svg), "alt": alt, "caption": exhibit.caption, "wide": exhibit.wide}
            )
        if figures or section.tables:
            parts.append({"section": section, "figures": figures})
    policies = tables.policies_of(results.rows)
    styles = draw.policy_styles(policies)
    context = {
        "title": title,
        "summary": [overview(results), *prose.summary(results.rows, table), *findings(results)],
        "matrix": prose.attainment_matrix(results.rows),
        "parts": parts,
        "comparisons": prose.comparison_tables(results.rows, table),
        "remarks": remarks(results, table),
        "settings": settings(results),
        "command": prose.command(results.config, results.directory),
        "config": json.dumps(results.config, indent=1, sort_keys=True),
        "chips": {p: f"var(--c{s.colour[1:]},{s.colour})" for p, s in styles.items()},
        "dark": _dark_colours([s.colour for s in styles.values()]),
    }
    for kind in ("md", "html"):
        text = _environment().get_template(f"report.{kind}.j2").render(context)
        _write(results.directory / f"report.{kind}", (text.strip() + "\n").encode())
    return results.directory / "report.html"


def read_results(directory: Path) -> Results:
    """Read a folder; one line of error if it cannot be."""
    if not directory.is_dir():
        raise ReportError(f"report: {directory} is no folder")
    for name in REQUIRED:
        if not (directory / name).is_file():
            raise ReportError(f"report: {directory} has no {name}; expected a folder that `evaluate --out` finished")
    name = "config.json"
    try:
        config = json.loads((directory / name).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"expected an object, got {type(config).__name__}")
        name = "runs.parquet"
        rows = tables.tidy(pd.read_parquet(directory / name))
        drawn = bool(rows["drawn"].any())
        focus, highest = tables.focus_load(rows), rows["load"].max()
        rates = rows.loc[rows["load"].isin([focus, highest]), "qps"].unique().tolist()
        name = "requests.parquet"
        wanted = None if drawn else [("qps", "in", rates)]
        requests = pd.read_parquet(directory / name, columns=REQUEST_COLUMNS, filters=wanted)
        name = "itl.parquet"
        itl = _optional(directory / name)
        name = "steps.parquet"
        steps = _optional(directory / name)
        name = "capacity.json"
        capacity = _capacities(directory)
    except (OSError, ValueError, KeyError) as error:
        raise ReportError(f"report: cannot read {directory / name}: {' '.join(str(error).split())}") from None
    if not itl.empty:
        itl = itl.rename(columns={"quantile": "prob"})
        rate = "requested_qps" if "requested_qps" in itl else "qps"
        itl = itl if drawn or itl[rate].isna().all() else itl[np.isclose(itl[rate], focus)]
    if not steps.empty:
        steps = steps[steps["seed"] == steps["seed"].min()]
        steps = steps if drawn else steps[np.isin(steps["qps"], rows.loc[rows["load"] == focus, "qps"])]
    return Results(directory, config, rows, focus, requests, itl, steps, capacity)


def _optional(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path) if path.is_file() else pd.DataFrame()


def _capacities(directory: Path) -> pd.DataFrame:
    """Rows of every capacity*.json: an array of rows, or an object that has them as its results."""
    rows: list[Any] = []
    for path in sorted(directory.glob("capacity*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        rows += found["results"] if isinstance(found, dict) else found
    frame = pd.DataFrame(rows)
    if frame.empty:
        return frame
    for column in ("capacity_qps", "ci_low", "ci_high"):
        frame[column] = pd.to_numeric(frame[column]).astype(float)
    return frame.drop_duplicates(["policy", "criterion"]).reset_index(drop=True)


def _render(figure: Figure, name: str) -> tuple[bytes, str]:
    """The figure as PNG and as SVG to be put into a page."""
    png, svg = io.BytesIO(), io.StringIO()
    with rc_context(draw.RC):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out now, once for both
        figure.savefig(png, format="png", dpi=PNG_DPI, metadata={"Software": None})
        figure.savefig(svg, format="svg", facecolor="none", metadata={"Date": None})
    return png.getvalue(), _inline(svg.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """An SVG without prolog and outside names, its ids made its own and its colours variables of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", svg)
    svg = re.sub(
        r'<svg\b[^>]*viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{name}">', svg, count=1
    )
    svg = re.sub(r'\bid="', f'id="{name}-', svg).replace('="#', f'="#{name}-').replace("url(#", f"url(#{name}-")
    svg = re.sub(r"font: ([^'\"]*?)'[^\"]*?(;|\")", r"font: \1var(--figure-font)\2", svg)
    svg = re.sub(r"#([0-9a-f]{6})\b(?=[;\"])", r"var(--c\1,#\1)", svg)
    return re.sub(r"\n\s*", "\n", svg)


def _dark_colours(colours: Sequence[str]) -> dict[str, str]:
    """Colours of figures on a dark ground, by their light ones."""
    dark = {draw.INK: "#e6ebf0", draw.FAINT: "#9aa7b4", draw.GRID: "#2d3742"}
    for colour in dict.fromkeys([*colours, "#117733", "#cc3311", "#8793a0"]):
        hue, light, saturation = colorsys.rgb_to_hls(*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)))
        rgb = colorsys.hls_to_rgb(hue, max(light, 0.46 + 0.3 * light), saturation * 0.92)
        dark[colour] = "#" + "".join(f"{round(255 * v):02x}" for v in rgb)
    return {colour[1:]: value for colour, value in dark.items()}


def _environment() -> jinja2.Environment:
    folder = importlib.resources.files("llmsched_gym.evaluation") / "templates"
    loader = jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8"))
    environment = jinja2.Environment(
        loader=loader,
        autoescape=jinja2.select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["inline"] = _inline_markup
    environment.globals["heads"] = _heads
    environment.filters["pipe"] = lambda text: str(text).replace("|", "\\|")
    return environment


def _heads(table: prose.Table) -> list[str]:
    """Column labels of a table that cannot have groups of columns."""
    over = [name for name, span in table.groups for _ in range(span)] or [""] * len(table.labels)
    return [f"{group} {label}".strip() for group, label in zip(over, table.labels, strict=True)]


def _inline_markup(text: str) -> Markup:
    """`code` and **strong** as HTML, all else escaped."""
    html = re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", html))


def _write(path: Path, content: bytes) -> None:
    """Write a file; a reader never sees half of it."""
    try:
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ReportError(f"report: cannot write {path}: {error.strerror or error}") from None
