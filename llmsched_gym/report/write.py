"""The report of a folder of results: report.html in one file, report.md with its figures beside it."""

from __future__ import annotations

import colorsys
import importlib.resources
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup, escape

from llmsched_gym.files import replace_file
from llmsched_gym.report import draw, findings, settings, statistics, tables
from llmsched_gym.report.bounds import ordinary
from llmsched_gym.report.results import read_results
from llmsched_gym.report.sections import sections
from llmsched_gym.report.served import is_served
from llmsched_gym.report.statistics import ReportError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PNG_DPI = 150

__all__ = ["ReportError", "write_report"]


def write_report(directory: str | Path, *, title: str | None = None) -> Path:
    """Write report.html, report.md and figures/*.png from what `evaluate --out` left in `directory`.

    Returns the path of report.html. Raises :class:`ReportError` with one line if something needed is missing or broken.
    """
    results = read_results(Path(directory))
    table = statistics.comparison_table(results.rows)
    policies = statistics.policies_of(results.rows)
    judged = ordinary(policies)
    kind = "Servers" if is_served(results.rows) else "Schedulers"
    who = f"{kind} compared" if len(judged) > 1 else judged[0]
    title = title or f"{who}: suite {results.suite}"
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
    styles = draw.policy_styles(policies)
    context = {
        "title": title,
        "summary": [findings.overview(results), *findings.summary(results.rows, table), *findings.overall(results)],
        "matrix": tables.attainment_matrix(results.rows),
        "parts": parts,
        "comparisons": tables.comparison_tables(results.rows, table),
        "remarks": findings.remarks(results, table),
        "settings": settings.settings(results),
        "command": settings.command(results.config, results.directory),
        "config": json.dumps(results.config, indent=1, sort_keys=True),
        "chips": {p: f"var(--c{s.colour[1:]},{s.colour})" for p, s in styles.items()},
        "dark": _dark_colours([s.colour for s in styles.values()]),
    }
    for kind in ("md", "html"):
        text = _environment().get_template(f"report.{kind}.j2").render(context)
        _write(results.directory / f"report.{kind}", (text.strip() + "\n").encode())
    return results.directory / "report.html"


def _render(figure: Figure, name: str) -> tuple[bytes, str]:
    """The figure as PNG and as SVG to be put into a page."""
    png, svg = io.BytesIO(), io.StringIO()
    from matplotlib import rc_context

    with rc_context(draw.RC):
        layout = figure.get_layout_engine()
        if layout is not None:
            layout.execute(figure)
            figure.set_layout_engine(None)  # laid out now, once for both
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
    folder = importlib.resources.files("llmsched_gym.report") / "templates"
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


def _heads(table: tables.Table) -> list[str]:
    """Column labels of a table that cannot have groups of columns."""
    over = [name for name, span in table.groups for _ in range(span)] or [""] * len(table.labels)
    return [f"{group} {label}".strip() for group, label in zip(over, table.labels, strict=True)]


def _inline_markup(text: str) -> Markup:
    """`code` and **strong** as HTML, all else escaped."""
    html = re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", html))


def _write(path: Path, content: bytes) -> None:
    """Write a file of the report, in a folder of its own if need be."""
    try:
        path.parent.mkdir(exist_ok=True)
        replace_file(path, lambda partial: partial.write_bytes(content))
    except OSError as error:
        raise ReportError(f"report: cannot write {path}: {error.strerror or error}") from None
