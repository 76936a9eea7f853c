"""`llmsched fit`: a cost profile from tables of measured kernels, or from the batches that `calibrate` measured."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmsched_gym.config import ConfigError, DeviceSpec, ModelSpec
from llmsched_gym.cost import DEVICES, MODELS, Profile
from llmsched_gym.cost.profile import MOST_WHOLE, check_profile_place
from llmsched_gym.files import make_folder
from llmsched_gym.report import console as terminal

if TYPE_CHECKING:
    from llmsched_gym.cost.measured_batches import Batch


def fit_command(
    out: Annotated[Path, typer.Option(rich_help_panel="Output", help="Profile to write, a .json file.")],
    dense: Annotated[
        Path | None, typer.Option(rich_help_panel="What was measured", help="CSV: layer, tokens, time_us.")
    ] = None,
    attention: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel="What was measured",
            help="CSV: prefill_chunk, kv_prefill, n_decode, kv_decode, time_us, of one layer.",
        ),
    ] = None,
    per_sequence: Annotated[
        Path | None, typer.Option(rich_help_panel="What was measured", help="CSV: layer, sequences, time_us.")
    ] = None,
    skew: Annotated[
        Path | None,
        typer.Option(rich_help_panel="What was measured", help="CSV of unequal contexts against equal ones."),
    ] = None,
    num_layers: Annotated[
        int | None, typer.Option(rich_help_panel="What was measured", min=1, help="Layers of the model (--model's).")
    ] = None,
    batches: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel="What was measured",
            help="Instead of tables: measured batches, the CSV of llmsched calibrate.",
        ),
    ] = None,
    kv_blocks: Annotated[
        int | None,
        typer.Option(
            rich_help_panel="The profile", min=1, max=MOST_WHOLE, help="KV blocks of 16; as memory holds unless given."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(rich_help_panel="The profile", help="Name of the profile (OUT without .json).")
    ] = None,
    model: Annotated[
        str, typer.Option(rich_help_panel="The profile", help=f"One of {', '.join(MODELS)}; no time depends on it.")
    ] = "llama-3.1-8b",
    device: Annotated[
        str,
        typer.Option(
            rich_help_panel="The profile", help=f"One of {', '.join(DEVICES)}: its memory, for KV blocks; no time."
        ),
    ] = "rtxpro6000",
    engine: Annotated[
        str, typer.Option(rich_help_panel="The profile", help="Whose times these are: engine and attention backend.")
    ] = "",
    report: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel="Output",
            metavar="DIR",
            help="Folder of fit.md and fit.png; else OUT-fit.md and OUT-fit.png.",
        ),
    ] = None,
    held_out: Annotated[
        bool, typer.Option(rich_help_panel="The fit", help="Errors on levels left out of the fit: takes seconds.")
    ] = True,
) -> None:
    """Fit a cost profile to measured kernels (CSV files, plain or .gz), and say how far it is from them."""
    check_profile_place(out)
    spec, target = _known(model, MODELS, "model"), _known(device, DEVICES, "device")
    spec = dataclasses.replace(spec, num_layers=num_layers or spec.num_layers)
    text, picture = (out.with_name(f"{out.stem}-fit{end}") for end in (".md", ".png"))
    if report is not None:
        text, picture = report / "fit.md", report / "fit.png"
    tables = {"dense": dense, "attention": attention, "per-sequence": per_sequence}
    if batches is not None:
        given = [option for option, file in {**tables, "skew": skew}.items() if file is not None]
        if given:
            raise ConfigError(f"{given[0]}: expected either tables or --batches, got both")
        for option, folder in (("out", out.parent), ("report", text.parent)):
            _check_place(option, folder)
        profile, measured = _from_batches(batches, spec, target, kv_blocks, name or out.stem, engine)
        from llmsched_gym.report import batch_report

        for folder in (out.parent, text.parent):
            make_folder(folder)
        batch_report.write(profile, measured, text, picture)
        profile.to_json(out)
        for table in batch_report.tables(profile):
            terminal.print_table(table)
        print(importlib.import_module("llmsched_gym.real_backend.calibration.calibrate").describe(profile))
        print(f"llmsched: wrote {out}, {text}, {picture}", file=sys.stderr)
        return
    if dense is None or attention is None or per_sequence is None:
        missing = next(option for option, file in tables.items() if file is None)
        raise ConfigError(f"{missing}: missing; expected --dense, --attention and --per-sequence, or --batches")
    for option, folder in (("out", out.parent), ("report", text.parent)):
        _check_place(option, folder)
    from llmsched_gym.cost.fit_tables import fit_tables
    from llmsched_gym.cost.kernel_tables import layers, read_attention
    from llmsched_gym.report import fit_report

    with terminal.progress_bar("levels left out") as progress:
        profile = fit_tables(
            *(dense, attention, per_sequence, skew),
            name=name or out.stem,
            model=spec,
            device=target,
            num_layers=spec.num_layers,
            num_kv_blocks=kv_blocks,
            engine=engine,
            with_held_out=held_out,
            progress=progress,
        )
    for folder in (out.parent, text.parent):
        make_folder(folder)
    fit_report.write(profile, read_attention(attention), text, picture)
    profile.to_json(out)
    for table in fit_report.tables(profile):
        terminal.print_table(table)
    print(f"llmsched: linear layers are the sum of {', '.join(layers(dense))}", file=sys.stderr)
    print(f"llmsched: wrote {out}, {text}, {picture}", file=sys.stderr)


def _from_batches(
    csv: Path, model: ModelSpec, device: DeviceSpec, kv_blocks: int | None, name: str, engine: str
) -> tuple[Profile, list[Batch]]:
    """The profile, and the batches that it was fitted to or judged by."""
    from llmsched_gym.cost.measured_batches import read_batches
    from llmsched_gym.cost.profile import kv_blocks as blocks_of

    blocks = blocks_of(model, device) if kv_blocks is None else kv_blocks
    calibrate = importlib.import_module("llmsched_gym.real_backend.calibration.calibrate")
    sheet = importlib.import_module("llmsched_gym.real_backend.calibration.measurements").Sheet
    profile: Profile = calibrate.fit_csv(csv, model, device, blocks, name=name)
    return dataclasses.replace(profile, engine=engine), read_batches(sheet.of(csv).medians())


def _check_place(option: str, folder: Path) -> None:
    """Whether a file can come to lie in `folder`, before the work that it takes; makes nothing."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"{option}: cannot write to {folder}")


def _known(name: str, known: dict[str, ModelSpec] | dict[str, DeviceSpec], what: str):  # type: ignore[no-untyped-def]
    if name not in known:
        raise ConfigError(f"{what}: expected one of {', '.join(known)}, got {name!r}")
    return known[name]
