"""Time per token of whole prompts against their length, from a sweep's rows: a staircase, and what its steps cost.

python -m llmsched_gym.real_backend.calibration.staircase sweep.csv --profile profile.json --out staircase.png
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib.figure import Figure

from llmsched_gym.config import ConfigError
from llmsched_gym.cost import Profile, load_profile
from llmsched_gym.cost.measured_batches import read_batches
from llmsched_gym.cost.tiles import steps
from llmsched_gym.interrupts import leave
from llmsched_gym.real_backend import command
from llmsched_gym.real_backend.calibration.measurements import Sheet
from llmsched_gym.report.draw import styled

MEASURED, FITTED, EDGE = "#0072b2", "#d55e00", "#68737f"
LEAST_TOKENS = 64
"""Below, time is that of reading the weights, and time per token only its share."""


def whole_prompts(sweep: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and ms of lone prompts that start at their beginning, each (num_lengths,), medians over rounds."""
    rows = {
        batch.num_tokens: batch.ms
        for batch in read_batches(Sheet(sweep, "").medians())
        if not batch.decode_contexts and len(batch.chunks) == 1 and batch.chunks[0][0] == 0
    }
    tokens = np.array(sorted(rows))
    return tokens, np.array([rows[n] for n in tokens.tolist()])


@styled
def plot(tokens: np.ndarray, ms: np.ndarray, profile: Profile) -> Figure:
    """Microseconds per token of prompts, measured and by the profile; lines at the multiples of its tile."""
    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    ax = figure.subplots()
    shown = tokens >= LEAST_TOKENS
    n = tokens[shown]
    for edge in range(profile.tile_tokens, int(n[-1]) + 1, profile.tile_tokens):
        ax.axvline(
            edge, color=EDGE, lw=0.8, ls=":", label="multiples of the tile" if edge <= profile.tile_tokens else None
        )
    fitted = np.array([1e3 * profile.predict_s([(0, int(k))], []) for k in n])
    ax.plot(n, 1e3 * fitted / n, color=FITTED, lw=1.2, label="profile")
    ax.plot(n, 1e3 * ms[shown] / n, color=MEASURED, marker=".", ms=4, lw=0.6, label="measured")
    ax.set(xlabel="Prompt tokens in the batch", ylabel="Time per token (us)", ylim=(0.0, None), xlim=(0, None))
    ax.set_title(f"{profile.name}: a batch of one prompt; tile {profile.tile_tokens} tokens")
    ax.legend()
    return figure


def staircase_command(
    sweep: Annotated[Path, typer.Argument(help="Rows of a sweep, .csv or .csv.gz.")],
    profile: Annotated[str, typer.Option(help="Profile fitted to them.")],
    out: Annotated[Path, typer.Option(help="Picture to write, .png or .svg.")],
) -> None:
    """Draw the time per token against batch size, and print what the steps cost."""
    if out.suffix not in (".png", ".svg"):
        raise ConfigError(f"out: expected a .png or .svg file, got {str(out)!r}")
    fitted = load_profile(profile)
    tokens, ms = whole_prompts(sweep)
    figure = plot(tokens, ms, fitted)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    print(json.dumps(steps(tokens, ms, fitted.tile_tokens // 2)))


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(staircase_command, "python -m llmsched_gym.real_backend.calibration.staircase", argv)


if __name__ == "__main__":
    leave(main())
