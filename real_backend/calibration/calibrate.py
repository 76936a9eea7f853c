"""Measure what batches take on a real model, and fit a cost profile to it.

    llmsched calibrate --model random:tiny --out profile.json [--csv rows.csv]

The rows are written one by one; a killed run goes on where it stopped when started again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmsched_gym.config import BLOCK_SIZE, ConfigError, DeviceSpec, ModelSpec, Scenario, blocks_needed, scenario
from llmsched_gym.cost import Profile, ProfileError, fit_profile
from llmsched_gym.cost.fit import MIN_ROWS
from llmsched_gym.cost.measured_batches import read_batches
from llmsched_gym.cost.tiles import CANDIDATES, best_tile
from llmsched_gym.real_backend import command
from llmsched_gym.real_backend.calibration.measurements import Sheet, run_sweep
from llmsched_gym.real_backend.calibration.sweep import Limits, plan
from llmsched_gym.real_backend.command import Backend, Clock, Device, ModelName, Threads
from llmsched_gym.real_backend.errors import BackendError

if TYPE_CHECKING:
    from llmsched_gym.real_backend.calibration.measurements import MeasuredBackend

ROUNDS, REPEATS = 3, 3
VLLM_CPU_BLOCK_SIZE = 32
CPU_TILE = CANDIDATES[0]
"""A CPU's matrix products have no tiles worth a scheduler's attention."""
CPU_LIMITS = Limits(max_tokens=512, max_context=512, max_seqs=32)
"""What is measured on a CPU unless told otherwise: it is for trying things, not for serving."""


def calibrate(
    backend: MeasuredBackend,
    csv: str | Path,
    limits: Limits,
    *,
    name: str | None = None,
    rounds: int = ROUNDS,
    repeats: int = REPEATS,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Profile:
    """Sweep `backend`, whose limits must allow `limits`, into `csv`, and fit a profile with its held-out error."""
    from llmsched_gym.real_backend.ceilings import measured_device

    backend.fill_random(seed)
    sheet = Sheet(Path(csv), backend.setup)
    batches = plan(limits, backend.num_kv_blocks, seed, backend.block_size)
    run_sweep(backend.measure, batches, sheet, rounds=rounds, repeats=repeats, progress=progress)
    device = measured_device(backend.device, backend.dtype)
    tile = None if backend.device.type == "cuda" else CPU_TILE
    num_kv_blocks = backend.num_kv_blocks * backend.block_size // BLOCK_SIZE
    return fit(sheet, backend.spec, device, num_kv_blocks, tile_tokens=tile, name=name, seed=seed)


def fit(
    sheet: Sheet,
    model: ModelSpec,
    device: DeviceSpec,
    num_kv_blocks: int,
    *,
    tile_tokens: int | None = None,
    name: str | None = None,
    seed: int = 0,
) -> Profile:
    """The profile of a sheet's rows. Unless given, the tile is read off whole prompts, and knots sit at its edges."""
    rows = sheet.medians()
    knots = None
    if tile_tokens is None:
        whole = {
            batch.num_tokens: batch.ms
            for batch in read_batches(rows)
            if len(batch.chunks) == 1 and not batch.decode_contexts and batch.chunks[0][0] == 0
        }
        counts = sorted(whole)
        tile_tokens = best_tile(counts, [whole[n] for n in counts])
        # Between the edges of tiles time is flat; without visible tiles the fit's own grid does.
        if tile_tokens > CANDIDATES[0]:
            knots = sorted(
                {n for n in counts if n % tile_tokens in (0, 1) or n < tile_tokens} | {counts[0], counts[-1]}
            )
    return fit_profile(
        rows,
        name=name or f"{device.name}-{model.name}",
        model=model,
        device=device,
        num_kv_blocks=num_kv_blocks,
        tile_tokens=tile_tokens,
        knots=knots,
        seed=seed,
        surface="auto",
        notes=(
            f"Measured with real_backend.calibrate on {sheet.setup}; medians of repeated passes.",
            "Bandwidth and FLOP/s are those of a large copy and a large matrix product on the same device.",
            "The per-batch overhead is part of the table: times of whole batches cannot tell it apart.",
        ),
    )


def fit_csv(csv: Path, model: ModelSpec, device: DeviceSpec, num_kv_blocks: int, *, name: str | None = None) -> Profile:
    """The profile of a sheet measured before, of a model and device that only name what it describes.

    Rows are read once as they stand in the file, so that an error names its line: a sheet's medians know none.
    """
    batches = read_batches(csv)
    if len(batches) < MIN_ROWS:
        raise ProfileError(f"{csv}: {len(batches)} measured batches; a fit needs at least {MIN_ROWS}")
    return fit(Sheet.of(csv), model, device, num_kv_blocks, name=name)


def block_size_of(backend: str, device: str | None) -> int:
    """Tokens of a KV block: the project's, or where vLLM runs on a CPU the smallest that it has there."""
    return VLLM_CPU_BLOCK_SIZE if backend == "vllm" and not on_gpu(device) else BLOCK_SIZE


def open_backend(world: Scenario, device: str | None, clock: str) -> MeasuredBackend:
    """The real model that `world` names, loaded; vLLM finds its device itself."""
    from llmsched_gym.real_backend import make_backend

    where = {} if world.backend == "vllm" else {"device": device}
    backend: MeasuredBackend = make_backend(world, world.model, clock=clock, **where)
    return backend


def backend_for(
    model: str,
    limits: Limits,
    device: str | None = None,
    num_kv_blocks: int | None = None,
    clock: str = "wall",
    backend: str = "transformers",
) -> MeasuredBackend:
    """A backend just large enough for a sweep within `limits`."""
    block_size = block_size_of(backend, device)
    if backend == "vllm" and num_kv_blocks is None:
        num_kv_blocks = limits.max_seqs * blocks_needed(limits.max_context, block_size)
    world = scenario(
        "paper",
        backend=backend,
        model=model,
        block_size=block_size,
        max_model_len=limits.max_context + (backend == "vllm"),  # which asks for room for the token behind
        max_num_seqs=limits.max_seqs,
        max_num_batched_tokens=limits.max_tokens,
        num_kv_blocks=num_kv_blocks,
    )
    return open_backend(world, device, clock)


def on_gpu(device: str | None) -> bool:
    """Whether a named device, or the one that is taken where none is named, is a GPU."""
    try:
        import torch
    except ImportError:
        raise BackendError("calibration needs torch and transformers: pip install '.[real]'") from None

    return torch.cuda.is_available() if device is None else device.startswith("cuda")


def limits_for(device: str | None, **given: int | None) -> Limits:
    """The limits given, and for the rest those that suit the device."""
    default = Limits() if on_gpu(device) else CPU_LIMITS
    chosen = {field: getattr(default, field) if value is None else value for field, value in given.items()}
    try:
        return Limits(**chosen)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def describe(profile: Profile) -> str:
    """One line about how good a fit is, and what form attention has."""
    errors: dict[str, Any] = profile.fit or {}
    kinds = ", ".join(f"{kind} {found['mape']:.1%}" for kind, found in errors["kinds"].items())
    attention = "additive" if profile.surface is None else "a surface"
    return (
        f"{profile.name}: step time within {errors['mape']:.1%} on average (95 % within {errors['p95_ape']:.1%}) on "
        f"{errors['held_out_rows']} held-out batches, fitted to {errors['rows']}; tile {profile.tile_tokens} tokens, "
        f"{profile.num_kv_blocks} KV blocks; attention {attention}; by kind of batch: {kinds}"
    )


def calibrate_command(
    model: ModelName,
    out: Annotated[Path, typer.Option(rich_help_panel="Output", help="Profile to write, a .json file.")],
    csv: Annotated[
        Path | None, typer.Option(rich_help_panel="Output", help="Measured rows (OUT with .csv); rows in it are kept.")
    ] = None,
    device: Device = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(rich_help_panel="What is measured", help="Tokens of the largest batch (2048; 512 on a CPU)."),
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(rich_help_panel="What is measured", help="Longest sequence, tokens (8192; 512 on a CPU)."),
    ] = None,
    max_seqs: Annotated[
        int | None,
        typer.Option(rich_help_panel="What is measured", help="Sequences of the largest batch (128; 32 on a CPU)."),
    ] = None,
    mixtures: Annotated[
        int | None, typer.Option(rich_help_panel="What is measured", help="Random mixed batches (160).")
    ] = None,
    num_kv_blocks: Annotated[
        int | None,
        typer.Option(
            rich_help_panel="The model",
            help="KV blocks; as many as memory holds (vllm: as the sweep needs) unless given.",
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(rich_help_panel="What is measured", min=1, help="Times that the whole sweep is gone through.")
    ] = ROUNDS,
    repeats: Annotated[
        int, typer.Option(rich_help_panel="What is measured", min=1, help="Measured passes per batch and round.")
    ] = REPEATS,
    threads: Threads = None,
    clock: Clock = "wall",
    name: Annotated[
        str | None, typer.Option(rich_help_panel="Output", help="Name of the profile; DEVICE-MODEL unless given.")
    ] = None,
    backend: Backend = "transformers",
    seed: Annotated[
        int,
        typer.Option(
            rich_help_panel="What is measured", help="Of the random mixtures, their order, and the held-out rows."
        ),
    ] = 0,
) -> None:
    """Measure a model's batches and fit a cost profile."""
    if out.suffix != ".json":
        raise ConfigError(f"out: expected a .json file, got {str(out)!r}")
    limits = limits_for(device, max_tokens=max_tokens, max_context=max_context, max_seqs=max_seqs, mixtures=mixtures)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    measured = backend_for(model, limits, device, num_kv_blocks, clock, command.backend_name(backend))
    with command.progress_bar("batches") as progress:
        profile = calibrate(
            measured,
            csv or out.with_suffix(".csv"),
            limits,
            name=name,
            rounds=rounds,
            repeats=repeats,
            seed=seed,
            progress=progress,
        )
    profile.to_json(out)
    print(describe(profile))


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(calibrate_command, "llmsched calibrate", argv)
