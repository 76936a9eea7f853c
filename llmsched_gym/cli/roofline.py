"""`llmsched roofline`: a cost profile of a model on a device that nobody has measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from llmsched_gym.config import BLOCK_SIZE
from llmsched_gym.cost import DEVICES, MODELS, roofline
from llmsched_gym.cost.profile import check_profile_place
from llmsched_gym.cost.roofline import OVERHEAD_MS
from llmsched_gym.files import make_folder
from llmsched_gym.report import console

BATCHES: dict[str, tuple[list[tuple[int, int]], list[int]]] = {
    "1 decode of 1,000 tokens": ([], [1000]),
    "64 decodes of 1,000": ([], [1000] * 64),
    "512 prompt tokens": ([(0, 512)], []),
    "2,048 prompt tokens": ([(0, 2048)], []),
    "1,984 prompt tokens and 64 decodes of 1,000": ([(0, 1984)], [1000] * 64),
}
"""What is said to take how long: chunks as (computed, tokens), and contexts of decodes."""


def roofline_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"One of {', '.join(MODELS)}.")],
    device: Annotated[str, typer.Argument(metavar="DEVICE", help=f"One of {', '.join(DEVICES)}.")],
    tensor_parallel: Annotated[
        int, typer.Option(rich_help_panel="The machine", min=1, help="Devices that share every layer.")
    ] = 1,
    tile_tokens: Annotated[
        int, typer.Option(rich_help_panel="The machine", min=1, help="Tokens of a tile of the linear layers.")
    ] = 128,
    waves: Annotated[
        bool, typer.Option(rich_help_panel="The machine", help="Linear layers cost whole tiles, as a staircase.")
    ] = False,
    overhead_ms: Annotated[
        float, typer.Option(rich_help_panel="The machine", min=0.0, help="Host time of a batch.")
    ] = OVERHEAD_MS,
    name: Annotated[
        str | None, typer.Option(rich_help_panel="Output", help="Name of the profile (OUT without .json).")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(rich_help_panel="Output", metavar="FILE.json", help="Write the profile into this file."),
    ] = None,
) -> None:
    """Make a cost profile from data sheets, for --profile, and say what batches take by it."""
    if out is not None:
        check_profile_place(out)
    profile = roofline(
        model,
        device,
        tile_tokens=tile_tokens,
        waves=waves,
        tensor_parallel=tensor_parallel,
        overhead_ms=overhead_ms,
        name=name or (out.stem if out is not None else None),
    )
    if out is not None:
        make_folder(out.parent)
        profile.to_json(out)
        print(f"llmsched: wrote {out}", file=sys.stderr)
    tokens = BLOCK_SIZE * profile.num_kv_blocks
    table = console.new_table("batch", "takes\n(ms)", title=f"{profile.name}: KV of {tokens:,} tokens")
    for what, batch in BATCHES.items():
        table.add_row(what, f"{1e3 * profile.predict_s(*batch):.1f}")
    console.print_table(table)
    for note in profile.notes:
        console.print_table(note)
