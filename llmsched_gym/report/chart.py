"""Charts as plain data: Plotly traces and layouts, without colours, which the page gives by policy and theme.

What the page needs to know of a trace is in its ``meta``: ``policy`` (one entry of the page's only legend shows and
hides it), ``slo`` (the class of users whose figures it has: ``all``, ``strict`` or ``relaxed``; without one it is
always shown), ``part`` (the class whose requests it has, shown under ``all`` too), ``ink`` (a colour of the page's own
instead of a policy's) and ``pick`` (which entry of the chart's menu shows it).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from llmsched_gym.report import draw
from llmsched_gym.report.bounds import is_clairvoyant

ALL = "all"
SYMBOLS = {
    **{"o": "circle", "s": "square", "D": "diamond", "d": "diamond-tall", "^": "triangle-up", "v": "triangle-down"},
    **{"<": "triangle-left", ">": "triangle-right", "P": "cross", "X": "x", "x": "hourglass", "*": "star"},
    **{"h": "hexagon", "H": "hexagon2", "p": "pentagon", "8": "octagon"},
}
"""Plotly's names of matplotlib's markers."""
DIGITS = 5  # significant ones that data keep in the page


class Chart(NamedTuple):
    """A chart of the page."""

    name: str
    title: str
    caption: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    wide: bool = False
    pick: Sequence[str] = ()  # entries of a menu of its own

    def to_json(self) -> dict[str, Any]:
        """What the page's script draws."""
        return {"name": self.name, "title": self.title, "traces": self.traces, "layout": self.layout}


def style_of(policies: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, symbol and dash of each policy, and what its legend entry says."""
    styles = {}
    for policy, style in draw.policy_styles(policies).items():
        dash = "solid" if style.dash == "-" else "dash" if style.dash[1][0] > 2 else "dot"
        label = policy + (" (oracle)" if is_clairvoyant(policy) else "")
        styles[policy] = {"colour": style.colour, "symbol": SYMBOLS[style.marker], "dash": dash, "label": label}
    return styles


def values(column: Iterable[Any]) -> list[Any]:
    """Numbers as JSON has them, of :data:`DIGITS` significant digits; None for what is no finite number."""
    return [None if v is None or not math.isfinite(v) else _rounded(float(v)) for v in column]


def _rounded(value: float) -> float | int:
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def axis(title: str, *, percent: bool = False, **more: Any) -> dict[str, Any]:
    """An axis with its unit in the title."""
    found: dict[str, Any] = {"title": {"text": title}}
    return found | ({"range": [-1.5, 101.5]} if percent else {}) | more


def log_axis(title: str, found: Iterable[float], room: float = 1.25) -> dict[str, Any]:
    """A log axis over the positive finite values, with plain numbers at a few digits of each decade."""
    shown = [v for v in found if v is not None and np.isfinite(v) and v > 0]
    low, high = min(shown) / room, max(shown) * room
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for digits in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        if len(ticks) < 4:
            ticks = [v for d in decades for digit in digits if low <= (v := digit * 10.0**d) <= high]
    texts = [f"{v:,.0f}" if v >= 10 else f"{v:.9g}" for v in ticks]
    axis = {"type": "log", "range": [math.log10(low), math.log10(high)], "title": {"text": title}}
    return axis | ({"tickvals": values(ticks), "ticktext": texts} if len(ticks) > 1 else {})


def guide(value: float, text: str, *, vertical: bool = False, dash: str = "dash") -> tuple[dict[str, Any], Any]:
    """A line across the chart at a limit, and what is written at its end."""
    along = {"x0": value, "x1": value, "y0": 0, "y1": 1, "xref": "x", "yref": "paper"}
    across = {"y0": value, "y1": value, "x0": 0, "x1": 1, "yref": "y", "xref": "paper"}
    shape = {"type": "line", "line": {"width": 1.2, "dash": dash}, "layer": "below", **(along if vertical else across)}
    return shape, {"at": value, "text": text, "vertical": vertical}


def with_guides(layout: dict[str, Any], guides: Sequence[tuple[dict[str, Any], Any]]) -> dict[str, Any]:
    """The layout with lines at limits, each with its name beside it."""
    shapes, notes = [], []
    for shape, note in guides:
        vertical = note["vertical"]
        which = "xaxis" if vertical else "yaxis"
        at = math.log10(note["at"]) if layout.get(which, {}).get("type") == "log" else note["at"]
        place = (
            {"x": at, "y": int("rows" in layout), "xref": "x", "yref": "paper", "yanchor": "bottom", "xanchor": "right"}
            if vertical
            else {"x": 1, "y": at, "xref": "paper", "yref": "y", "xanchor": "right", "yanchor": "bottom"}
        )
        shapes.append(shape)
        notes.append({"text": note["text"], "showarrow": False, "font": {"size": 11}, **place})
    return layout | {"shapes": shapes, "annotations": [*layout.get("annotations", []), *notes]}


def band(own: pd.DataFrame, policy: str, slo: str, low: float, high: float) -> list[dict[str, Any]]:
    """The interval around a line, cut to `low` and `high`; nothing where there is none."""
    known = own.dropna(subset=["low", "high"])
    if len(known) < 2:
        return []
    ends = known[["low", "high"]].clip(low, high)
    x = [*known["load"], *reversed(known["load"].tolist())]
    y = [*ends["high"], *reversed(ends["low"].tolist())]
    trace = {"type": "scatter", "mode": "lines", "fill": "toself", "x": values(x), "y": values(y)}
    return [trace | {"hoverinfo": "skip", "line": {"width": 0}, "meta": {"policy": policy, "slo": slo, "band": True}}]


def embedded(value: Any) -> str:
    """JSON that can stand in a script element of the page."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("</", "<\\/").replace("<!--", "\\u003c!--")
