"""How figures look: the style of each policy, panels, legends, scales, and the marks that several figures share.

matplotlib, which takes as long to import as all else together, is loaded when the first figure is drawn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from llmsched_gym.report.bounds import is_clairvoyant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GRID = "#1c2733", "#68737f", "#dfe4ea"
PERCENT = (0, 101.5)  # limits of an axis of percentages, whose marks at 100 are whole
WIDTH = 5.8  # inches, of a single panel
LEGEND_LETTERS = 84  # that fit into its legend side by side, handles counted as six
RC = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.facecolor": "none",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.7,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "legend.fontsize": 8.8,
    "figure.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "llmsched",
}


BEYOND = 1e12
"""Stands for an infinite end of an interval, which the axes cut off."""
INSIDE_PT = 4.5
"""How far from the edge a mark of what lies beyond it stands: its whole height is inside."""


class NothingToPlot(ValueError):
    """There is no value that the figure could show."""


class Style(NamedTuple):
    """How a policy is drawn."""

    colour: str
    marker: str
    dash: Any


# Families share a hue (Okabe and Ito's, Tol's), members differ in lightness, marker and dash.
STYLES = {
    "random": Style("#95a0ab", "x", (0, (1.5, 1.2))),
    "sarathi": Style("#0072b2", "o", "-"),
    "sarathi-spf": Style("#56b4e9", "s", (0, (5, 1.5))),
    "slai": Style("#d55e00", "D", "-"),
    "slai-spf-fixed": Style("#e69f00", "^", (0, (5, 1.5))),
    "slai-fcfs-fixed": Style("#b39b00", "v", (0, (1.5, 1.2))),
    "slai-priority": Style("#cc79a7", "P", (0, (4, 1.2, 1, 1.2))),
    "rad": Style("#117733", "X", "-"),
    "rad-512": Style("#44aa99", "<", (0, (5, 1.5))),
    "vllm-v0": Style("#882255", ">", "-"),
    "vllm-v1": Style("#aa4499", "h", (0, (5, 1.5))),
    "orca": Style("#6b4c2a", "p", "-"),
    "faster-transformer": Style("#a08060", "*", (0, (5, 1.5))),
    "edf": Style("#4d5966", "d", (0, (1.5, 1.2))),
    "srpt-capped": Style("#332288", "8", "-"),
    "feasible-first": Style("#6f63c4", "s", "-"),
    "on-time": Style("#00875a", "D", "-"),
    "learned": Style("#c4003c", "*", "-"),
    "shortest-total": Style("#333333", "H", (0, (2, 1.4))),
}


def policy_styles(policies: Sequence[str]) -> dict[str, Style]:
    """The style of each policy: registered names have their own, others get what is left, then other markers."""
    spare = [style for name, style in reversed(STYLES.items()) if name not in policies]
    others = [p for p in policies if p not in STYLES]
    taken = {(s.colour, s.marker) for s in STYLES.values()}
    again = [Style(s.colour, m, "-") for m in "vo^sDPX<>" for s in STYLES.values() if (s.colour, m) not in taken]
    given = dict(zip(others, itertools.cycle([*spare, *again]), strict=False))
    return {p: STYLES.get(p) or given[p] for p in policies}


def styled(function: Any) -> Any:
    """Draw with our settings, whatever the caller's are."""

    @wraps(function)
    def draw(*args: Any, **kwargs: Any) -> Any:
        from matplotlib import rc_context

        with rc_context(RC):
            return function(*args, **kwargs)

    return draw


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, whose layout is its own affair."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def mark(**style: Any) -> Any:
    """What a legend shows of a line of that style."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **style)


def few_ticks(axis: Any, most: int, **settings: Any) -> None:
    """At most so many ticks, at round numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, **settings))


def panel(title: str, height: float = 3.55) -> tuple[Figure, Axes]:
    """A figure of one panel; a legend below it adds its own height (inches)."""
    figure = new_figure(WIDTH, height)
    ax = figure.subplots()
    ax.set_title(title)
    return figure, ax


def legend(figure: Figure, policies: Sequence[str], extra: Sequence[tuple[Any, str]] = ()) -> None:
    """A legend below the figure, which grows by as much."""
    handles = [
        mark(color=s.colour, marker=s.marker, linestyle=s.dash, label=name_in_figure(p))
        for p, s in policy_styles(policies).items()
    ]
    for handle, label in extra:
        handle.set_label(label)
        handles.append(handle)
    if not handles:
        return
    ncols = _columns([len(str(h.get_label())) for h in handles])
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(handles) / ncols))
    figure.legend(handles=handles, loc="outside lower left", ncols=ncols, handlelength=2.4, columnspacing=1.4)


def _columns(lengths: Sequence[int]) -> int:
    """Columns of a legend whose labels have so many letters: as many as fit, up to four, filled one after another."""
    for ncols in range(min(4, len(lengths)), 1, -1):
        if sum(max(column) + 6 for column in np.array_split(lengths, ncols)) <= LEGEND_LETTERS:
            return ncols
    return 1


def name_in_figure(policy: str) -> str:
    """A policy's name in a figure, which says so if it is told output lengths."""
    return short(policy) + (" (oracle)" if is_clairvoyant(policy) else "")


def short(name: str, most: int = 34) -> str:
    """A name of at most so many letters, its middle left out."""
    return name if len(name) <= most else f"{name[: most - 12]}…{name[-11:]}"


def guide(ax: Axes, value: float, text: str, *, vertical: bool = False, dash: Any = (0, (4, 3))) -> tuple[Any, str]:
    """A line at a limit; returns its legend entry, for a name beside the line would lie on data."""
    style: dict[str, Any] = dict(color=INK, linewidth=1.1, linestyle=dash)
    (ax.axvline if vertical else ax.axhline)(value, zorder=2, **style)
    return mark(**style), text


def log_scale(axis: Any, values: Iterable[float]) -> None:
    """A log scale over the positive values."""
    shown = [v for v in values if np.isfinite(v) and v > 0]
    low, high = min(shown) / 1.25, max(shown) * 1.25
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    log_ticks(axis, low, high)


def log_ticks(axis: Any, low: float, high: float, *, whole: bool = False, numbers: Any = None) -> None:
    """Plain numbers at 1, 2, 5 in each decade; only whole decades over a wide range."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    subs = (1.0,) if whole or high / low > 3e3 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=30))
    axis.set_major_formatter(FuncFormatter(numbers or (lambda v, _: f"{v:g}")))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    ticks = [t for t in axis.get_major_locator().tick_values(low, high) if low <= t <= high]
    if len(ticks) < 2:
        axis.set_major_locator(FixedLocator([t for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]))


def lines(ax: Axes, means: pd.DataFrame, policies: Sequence[str], *, floor: float = -math.inf) -> None:
    """A line with an interval band for each policy; values that are infinite or below `floor` become triangles."""
    above, below = [], []
    for policy, style in policy_styles(policies).items():
        own = means[means["policy"] == policy].sort_values("load")
        shown = own.where(np.isfinite(own["value"]) & (own["value"] >= floor))
        band = shown[["low", "high"]].clip(-BEYOND, BEYOND)
        ax.fill_between(own["load"], band["low"], band["high"], color=style.colour, alpha=0.13, linewidth=0)
        ax.plot(own["load"], shown["value"], color=style.colour, marker=style.marker, linestyle=style.dash, zorder=3)
        above.append((own["load"][np.isposinf(own["value"])], style.colour))
        below.append((own["load"][own["value"] < floor], style.colour))
    # a load at which there are triangles alone would lie outside the axes, as they do not count as data
    ax.update_datalim(np.column_stack([means["load"], np.zeros(len(means))]), updatey=False)
    ax.autoscale_view(scaley=False)
    off_scale(ax, above, up=True)
    off_scale(ax, below, up=False)
    few_ticks(ax.xaxis, 8, steps=[1, 2, 2.5, 5, 10])


def off_scale(ax: Axes, marks: Iterable[tuple[Any, str]], *, up: bool) -> None:
    """Triangles inside the edge of the axes for values beyond it, of several policies (x, colour) side by side."""
    from matplotlib.transforms import ScaledTranslation

    marks = [(x, colour) for x, colour in marks if len(x)]
    for i, (x, colour) in enumerate(marks):
        inside = (-1 if up else 1) * INSIDE_PT / 72
        beside = ScaledTranslation(6 / 72 * (i - (len(marks) - 1) / 2), inside, ax.figure.dpi_scale_trans)
        kind: dict[str, Any] = dict(marker="^" if up else "v", linestyle="none", markerfacecolor="none", color=colour)
        y = [1.0 if up else 0.0] * len(x)
        ax.plot(x, y, transform=ax.get_xaxis_transform() + beside, clip_on=False, zorder=4, **kind)


def dots(ax: Axes, means: pd.DataFrame, policies: Sequence[str], *, floor: float = -math.inf) -> None:
    """One load: a dot with its interval on a line of its own for each policy; a number for one below `floor`."""
    for y, (policy, style) in enumerate(policy_styles(policies).items()):
        own = means[means["policy"] == policy].iloc[0]
        low, high = own["low"], own["high"]
        if np.isfinite(own["value"]) and own["value"] < floor:
            text = f"◂ {own['value']:,.0f}"
            ax.text(0.01, y, text, transform=ax.get_yaxis_transform(), ha="left", va="center", color=style.colour)
        elif np.isfinite(own["value"]):
            if not np.isnan(low):
                ends = [max(low, -BEYOND), min(high, BEYOND)]
                ax.plot(ends, [y, y], color=style.colour, linewidth=4, alpha=0.35, solid_capstyle="butt")
            ax.plot([own["value"]], [y], color=style.colour, marker=style.marker, markersize=7, clip_on=False, zorder=3)
        else:
            text = "infinite" if np.isposinf(own["value"]) else "none"
            ax.text(0.995, y, text, transform=ax.get_yaxis_transform(), ha="right", va="center", color=style.colour)
    ax.set_yticks(range(len(policies)), [name_in_figure(p) for p in policies])
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    ax.set_ylim(len(policies) - 0.5, -0.5)
