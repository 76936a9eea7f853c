"""What a fit to measured kernels is worth: tables of errors by kind of batch, and a heat map of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmsched_gym.cost import Profile
from llmsched_gym.cost.fit_errors import LARGE_US
from llmsched_gym.cost.fit_surface import Attention, kinds
from llmsched_gym.files import replace_file, write_text
from llmsched_gym.report import draw
from llmsched_gym.report.console import new_table
from llmsched_gym.text import number
from llmsched_gym.text import table as markdown_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

KINDS = {"decodes": "decodes alone", "chunks": "chunks alone", "hybrid": "hybrid"}
AXIS_NAMES = {"n": "Decodes", "k": "KV tokens of each decode", "c": "Chunk (tokens)", "p": "Tokens before the chunk"}
MAP_LIMIT = 0.25
"""Errors beyond that have the darkest colour."""


def rows_by_kind(fit: dict[str, Any]) -> list[tuple[str, ...]]:
    """Kind of batch, rows; percent: median, 95th percentile, worst, bias, and the medians of small and large ones."""
    rows = []
    for kind, text in KINDS.items():
        if kind in fit:
            found = fit[kind]
            sizes = [percent(found[size]["median"]) if size in found else "-" for size in ("small", "large")]
            errors = [percent(found[name]) for name in ("median", "p95", "max", "bias")]
            rows.append((text, str(found["rows"]), *errors, *sizes))
    return rows


def rows_held_out(held_out: dict[str, Any]) -> list[tuple[str, ...]]:
    """Column, kind, levels; percent: median and 95th percentile over all levels, the inner ones and the edges."""
    rows = []
    for column, by_kind in held_out.items():
        for kind, found in by_kind.items():
            parts = [found, found.get("inner"), found.get("edges")]
            errors = [percent(part[name]) if part else "-" for part in parts for name in ("median", "p95")]
            rows.append((column, KINDS[kind], str(len(found["levels"])), *errors))
    return rows


def tables(profile: Profile) -> list[Table]:
    """The same for a terminal of 80 columns."""
    fit = profile.fit or {}
    heads: tuple[str, ...] = ("batches", "rows", "median", "95 %", "worst", "bias", "small:\nmedian", "large:\nmedian")
    title = f"{profile.name}: relative error of attention (%); small: below {LARGE_US:g} us a layer"
    first = new_table(*heads, title=title)
    for row in rows_by_kind(fit):
        first.add_row(*row)
    if "held_out" not in fit:
        return [first]
    heads = (
        "levels left out",
        "batches",
        "levels",
        "median",
        "95 %",
        "inner:\nmedian",
        "\n95 %",
        "edges:\nmedian",
        "\n95 %",
    )
    second = new_table(*heads, title="Whole levels left out of the fit in turn (%); edges are extrapolated", text=2)
    for row in rows_held_out(fit["held_out"]):
        second.add_row(*row)
    return [first, second]


def markdown(profile: Profile) -> str:
    """All errors that `profile.fit` has."""
    fit = profile.fit or {}
    heads: tuple[str, ...] = (
        "batches",
        "rows",
        "median %",
        "95 % %",
        "worst %",
        "bias %",
        "small: median %",
        "large: median %",
    )
    parts = [f"# Fit of {profile.name}", markdown_table(heads, rows_by_kind(fit))]
    heads = ("n_decode", "kv_decode", "prefill_chunk", "kv_prefill", "us", "error %")
    worst = [(*(str(cell[name]) for name in heads[:5]), percent(cell["error"])) for cell in fit["worst"]]
    parts += ["## Worst cells", markdown_table(heads, worst)]
    if "held_out" in fit:
        heads = ("left out", "batches", "levels", "median %", "95 % %", "inner: median %", "95 % %")
        heads += ("edges: median %", "95 % %")
        parts += ["## Whole levels left out in turn", markdown_table(heads, rows_held_out(fit["held_out"]))]
        rows = [
            (column, KINDS[kind], level, str(found["rows"]), percent(found["median"]), percent(found["p95"]))
            for column, by_kind in fit["held_out"].items()
            for kind, pooled in by_kind.items()
            for level, found in pooled["levels"].items()
        ]
        parts += ["## By level", markdown_table(("left out", "batches", "level", "rows", "median %", "95 % %"), rows)]
    return "\n\n".join(parts) + "\n"


@draw.styled
def heat_map(profile: Profile, cells: pd.DataFrame) -> Figure:
    """Median errors: decodes alone and hybrid batches by decodes and context, chunks alone by chunk and prefix.

    `cells` are those of :func:`llmsched_gym.cost.kernel_tables.read_attention`.
    """
    if profile.surface is None:
        raise ValueError(f"{profile.name}: has no surface")
    predicted = Attention.of(profile.surface, profile.pair_ms, profile.model.num_layers).predict(cells)
    cells = cells.assign(error=predicted / cells.us - 1.0)
    figure = draw.new_figure(9.5, 11.0)
    axes = figure.subplots(3, 1)
    for ax, (kind, mask), (y, x) in zip(axes, kinds(cells).items(), (("n", "k"), ("c", "p"), ("n", "k")), strict=True):
        grid = cells[mask].pivot_table(index=y, columns=x, values="error", aggfunc=lambda e: np.median(np.abs(e)))
        image = draw_errors(ax, grid, y, x, kind)
    draw_scale(figure, image, axes)
    figure.suptitle(profile.name)
    return figure


def draw_errors(ax: Axes, grid: pd.DataFrame, y: str, x: str, kind: str) -> Any:
    """A panel: `grid` has the errors of a kind of batch as shares, by two of :data:`AXIS_NAMES`. Its image, if any."""
    ax.set_title(f"{KINDS[kind][0].upper()}{KINDS[kind][1:]}: median error (%)")
    ax.set(xlabel=AXIS_NAMES[x], ylabel=AXIS_NAMES[y])
    ax.grid(False)
    if grid.empty:
        ax.set(xticks=[], yticks=[])
        ax.text(0.5, 0.5, "none measured", ha="center", va="center", transform=ax.transAxes)
        return None
    image = ax.imshow(grid, origin="lower", aspect="auto", cmap="YlOrRd", vmin=0.0, vmax=MAP_LIMIT)
    many = len(grid.columns) > 12
    ax.set_xticks(range(len(grid.columns)), [str(v) for v in grid.columns], rotation=45 if many else 0)
    ax.set_yticks(range(len(grid.index)), [str(v) for v in grid.index])
    for (i, j), value in np.ndenumerate(grid.to_numpy()):
        if np.isfinite(value):
            dark = value > 0.6 * MAP_LIMIT
            ax.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color="w" if dark else "k")
    return image


def draw_scale(figure: Figure, image: Any, axes: Any) -> None:
    """The colours of :func:`draw_errors`, in percent as its cells."""
    from matplotlib.ticker import FuncFormatter

    whole = FuncFormatter(lambda share, _: f"{100 * share:.0f}")
    figure.colorbar(image, ax=axes, label="Median error (%)", fraction=0.03, format=whole, extend="max")


def write(profile: Profile, cells: pd.DataFrame, markdown_file: Path, picture: Path) -> None:
    """The errors as Markdown, and the heat map as PNG."""
    markdown_file.parent.mkdir(parents=True, exist_ok=True)
    figure = heat_map(profile, cells)
    replace_file(picture, lambda path: figure.savefig(path, format="png", dpi=110, metadata={"Software": None}))
    write_text(markdown_file, markdown(profile))


def percent(share: float | None) -> str:
    """A share as a number of percent; a dash for none."""
    return number(None if share is None else 100 * share, 1)
