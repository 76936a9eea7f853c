"""The page of a report: one HTML file with its charts, their library and a script of ours; and its Markdown twin."""

from __future__ import annotations

import base64
import colorsys
import gzip
import importlib.resources
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup, escape

from llmsched_gym.report import batch_charts, chart, tables
from llmsched_gym.report.statistics import ReportError


def plotly_source() -> str:
    """The charting library; one line of :class:`ReportError` if it is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError:
        raise ReportError("report: report.html needs plotly, which is not installed: pip install plotly") from None
    return str(get_plotlyjs())


def packed(text: str) -> Markup:
    """Text as the page's script unpacks it, gzip in base64: two fifths of the library's 4.8 MB."""
    return Markup(base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode())


def render(kind: str, context: Mapping[str, Any]) -> str:
    """The report as ``html`` or ``md``."""
    return _environment().get_template(f"report.{kind}.j2").render(context).strip() + "\n"


def chart_data(charts: Sequence[chart.Chart], policies: Sequence[str]) -> Markup:
    """What the page's script draws, for a script element."""
    styles = chart.style_of(policies)
    for style in styles.values():
        style["colour"] = [style["colour"], on_dark(style["colour"])]
    data = {"charts": [item.to_json() for item in charts], "policies": styles, "inks": INKS}
    return Markup(chart.embedded(data))


def on_dark(colour: str) -> str:
    """A colour of a light page, light enough for a dark one."""
    hue, light, saturation = colorsys.rgb_to_hls(*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)))
    rgb = colorsys.hls_to_rgb(hue, max(light, 0.46 + 0.3 * light), saturation * 0.72)
    return "#" + "".join(f"{round(255 * v):02x}" for v in rgb)


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
    environment.filters["inline"] = inline_markup
    environment.globals["heads"] = heads
    environment.globals["script"] = lambda: Markup((folder / "report.js").read_text(encoding="utf-8"))
    environment.filters["pipe"] = lambda text: str(text).replace("|", "\\|")
    return environment


def heads(table: tables.Table) -> list[str]:
    """Column labels of a table that cannot have groups of columns."""
    over = [name for name, span in table.groups for _ in range(span)] or [""] * len(table.labels)
    return [f"{group} {label}".strip() for group, label in zip(over, table.labels, strict=True)]


INKS = {
    "ink": ("#1c2733", "#e6ebf0"),
    "decode": ("#0072b2", "#4aa8e0"),
    "prefill": ("#e69f00", "#e6a92b"),
    "running": ("#117733", "#4dbb78"),
    "waiting": ("#cc3311", "#f0785c"),
    "kv": ("#8793a0", "#8793a0"),
    "held": ("#b39b00", "#d4bd2f"),
    "lost": ("#cc3311", "#f0785c"),
    **{f"replica-{i}": (colour, on_dark(colour)) for i, colour in enumerate(batch_charts.REPLICA_COLOURS)},
}
"""Colours of what is no policy's, on a light and on a dark ground."""


def inline_markup(text: str) -> Markup:
    """`code` and **strong** as HTML, all else escaped."""
    html = re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", html))
