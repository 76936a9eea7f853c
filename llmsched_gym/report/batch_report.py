"""What a fit to measured batches is worth: tables of errors by kind of batch, worst batches, and a heat map of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmsched_gym.cost import Profile
from llmsched_gym.cost.measured_batches import Batch, kind_of
from llmsched_gym.files import replace_file, write_text
from llmsched_gym.report import draw
from llmsched_gym.report.console import new_table
from llmsched_gym.report.fit_report import KINDS, draw_errors, draw_scale, percent
from llmsched_gym.text import table as markdown_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.table import Table

NUM_WORST = 5
HEADS = ("batches", "rows", "mean", "95 %", "worst")
WORST_HEADS = ("chunks", "tokens", "decodes", "KV tokens", "measured ms", "predicted ms", "error %")


def frame(profile: Profile, batches: Sequence[Batch]) -> pd.DataFrame:
    """A row per batch: kind, chunks, c and p (tokens of the chunks, before the first), n and k (decodes, their mean
    context), measured and predicted ms, and the relative error."""
    import pandas as pd

    rows = []
    for batch in batches:
        n = len(batch.decode_contexts)
        rows.append(
            {
                "kind": kind_of(batch),
                "chunks": len(batch.chunks),
                "c": sum(size for _, size in batch.chunks),
                "p": batch.chunks[0][0] if batch.chunks else 0,
                "n": n,
                "k": sum(batch.decode_contexts) / n if n else 0.0,
                "ms": batch.ms,
                "predicted_ms": 1e3 * profile.predict_s(batch.chunks, batch.decode_contexts),
            }
        )
    table = pd.DataFrame(rows)
    return table.assign(error=table.predicted_ms / table.ms - 1.0)


def rows_by_kind(profile: Profile) -> list[tuple[str, ...]]:
    """Kind of batch, held-out rows; percent: mean, 95th percentile and largest of their absolute errors."""
    fit = profile.fit or {}
    groups = [(KINDS[kind], found) for kind, found in fit["kinds"].items()]
    groups.append(("all", fit | {"rows": fit["held_out_rows"]}))
    return [
        (text, str(found["rows"]), *(percent(found[name]) for name in ("mape", "p95_ape", "max_ape")))
        for text, found in groups
    ]


def rows_worst(batches: pd.DataFrame) -> list[tuple[str, ...]]:
    """The batches with the largest relative errors, of all that were measured."""
    order = np.argsort(-batches.error.abs().to_numpy(), kind="stable")[:NUM_WORST]
    return [
        (
            *(f"{row[name]:.0f}" for name in ("chunks", "c", "n")),
            f"{row['n'] * row['k']:.0f}",
            *(f"{row[name]:.2f}" for name in ("ms", "predicted_ms")),
            percent(row["error"]),
        )
        for row in batches.iloc[order].to_dict("records")
    ]


def tables(profile: Profile) -> list[Table]:
    """Errors by kind of batch for a terminal of 80 columns."""
    table = new_table(*HEADS, title=f"{profile.name}: error of held-out batches (%)")
    for row in rows_by_kind(profile):
        table.add_row(*row)
    return [table]


def markdown(profile: Profile, batches: pd.DataFrame) -> str:
    """The same as Markdown, with the worst of all batches (of :func:`frame`)."""
    fit = profile.fit or {}
    attention = "a sum over the batch's parts" if profile.surface is None else "a surface"
    heads = (*HEADS[:2], *(f"{name} %" for name in ("mean", "95 %", "worst")))
    return (
        "\n\n".join(
            (
                f"# Fit of {profile.name}",
                f"Fitted to {fit['rows']} batches; attention is {attention}. Relative errors of the "
                f"{fit['held_out_rows']} batches that were held out:",
                markdown_table(heads, rows_by_kind(profile)),
                "## Worst batches, of all",
                markdown_table(WORST_HEADS, rows_worst(batches)),
            )
        )
        + "\n"
    )


@draw.styled
def heat_map(profile: Profile, batches: pd.DataFrame) -> Figure:
    """Median errors of all batches (of :func:`frame`) by octaves: decodes alone by their number and mean context,
    chunks alone by tokens and prefix, hybrid batches by decodes and chunk."""
    figure = draw.new_figure(9.5, 11.0)
    axes = figure.subplots(3, 1)
    image = None
    for ax, kind, (y, x) in zip(axes, KINDS, (("n", "k"), ("c", "p"), ("n", "c")), strict=True):
        part = batches[batches.kind == kind]
        part = part.assign(**{name: _octave(part[name].to_numpy(float)) for name in (y, x)})
        grid = part.pivot_table(index=y, columns=x, values="error", aggfunc=lambda e: np.median(np.abs(e)))
        image = draw_errors(ax, grid, y, x, kind) or image
    if image is not None:
        draw_scale(figure, image, axes)
    figure.suptitle(f"{profile.name}: by octaves, named by their first number")
    return figure


def _octave(values: np.ndarray) -> np.ndarray:
    """The power of two that is not larger; 0 for what is below 1."""
    return np.where(values < 1.0, 0, 2 ** np.floor(np.log2(np.maximum(values, 1.0)))).astype(int)


def write(profile: Profile, batches: Sequence[Batch], markdown_file: Path, picture: Path) -> None:
    """The errors as Markdown, and the heat map as PNG."""
    measured = frame(profile, batches)
    figure = heat_map(profile, measured)
    replace_file(picture, lambda path: figure.savefig(path, format="png", dpi=110, metadata={"Software": None}))
    write_text(markdown_file, markdown(profile, measured))
