"""Time per token of the linear layers against batch tokens, a staircase, and what batches off its tile cost.

python -m llmsched_gym.report.staircase PROFILE... --out staircase.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from llmsched_gym.config import ConfigError
from llmsched_gym.cost import Profile, ProfileError, TableLinear, load_profile
from llmsched_gym.cost.tiles import off_tile_cost, tile_gain
from llmsched_gym.report import console, draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_TOKENS, MOST_TOKENS = 64, 2048
"""Below, time is that of reading the weights, and time per token only its share."""


@draw.styled
def plot(profiles: Sequence[Profile]) -> Figure:
    """Microseconds per token, a panel per profile; lines at the multiples of its tile; linear layers must be tables."""
    figure = draw.new_figure(8.0, 3.2 * len(profiles))
    for ax, profile in zip(figure.subplots(len(profiles), squeeze=False).ravel(), profiles, strict=True):
        tokens, ms = _table(profile)
        shown = (tokens >= LEAST_TOKENS) & (tokens <= MOST_TOKENS)
        tile = profile.tile_tokens
        for edge in range(tile, MOST_TOKENS + 1, tile):
            ax.axvline(edge, color=draw.FAINT, lw=0.8, ls=":", label="multiples of the tile" if edge == tile else None)
        per_token = 1e3 * ms / tokens
        ax.plot(tokens[shown], per_token[shown], color="#0072b2", marker=".", ms=4, lw=0.7, label="measured")
        on = shown & (tokens % tile == 0)
        ax.plot(tokens[on], per_token[on], color="#d55e00", marker="o", ms=5, ls="none", label="on the tile")
        ax.set(xlabel="Tokens in the batch", ylabel="Time per token (us)", ylim=(0.0, None), xlim=(0, MOST_TOKENS + 32))
        ax.set_title(f"{profile.name}: linear layers; tile {tile} tokens")
        ax.legend()
    return figure


def rows(profile: Profile) -> list[tuple[str, ...]]:
    """Profile, tile, and in percent: what doubling it to there saved, and what batches off the tile cost by size."""
    tokens, ms = _table(profile)
    tile = profile.tile_tokens
    gain = tile_gain(tokens.tolist(), ms.tolist(), tile)
    costs = off_tile_cost(tokens, ms, tile)
    parts = [[cost for n, cost in costs.items() if low < n <= 2 * low] for low in (256, 512, 1024)]
    means = [f"{100 * np.mean(part):.1f}" if part else "-" for part in [*parts, list(costs.values())]]
    return [(profile.name, str(tile), "-" if gain is None else f"{100 * gain:.1f}", *means)]


def _table(profile: Profile) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(profile.linear, TableLinear):
        raise ProfileError(f"{profile.name}: its linear layers are a formula, not a measured table")
    return np.array(profile.linear.tokens), np.array(profile.linear.ms)


def main(
    profile: Annotated[list[str], typer.Argument(help="Profiles with measured tables: names or .json files.")],
    out: Annotated[Path, typer.Option(help="Picture to write, .png.")],
) -> None:
    """Draw time per token against batch size, and print what batches off the tile cost."""
    if out.suffix != ".png":
        raise ConfigError(f"out: expected a .png file, got {str(out)!r}")
    profiles = [load_profile(name) for name in profile]
    figure = plot(profiles)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    heads = ("profile", "tile", "doubling\nto it", "257-512", "513-1024", "1025-2048", "all")
    table = console.new_table(*heads, title="Time per token saved by the tile (%), against batches off it, by size")
    for name in profiles:
        for row in rows(name):
            table.add_row(*row)
    console.print_table(table)


def command() -> int:
    """The command line; returns its exit code."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except ConfigError as error:
        print("error:", error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(command())
