"""The same seeds, loads and policies on the real backend and in the simulator, and a page that compares them.

    llmsched sim2real --model random:tiny --out out/sim2real [--threads 1 --clock cpu]

Without `--profile` the model is calibrated first (`OUT/profile.json`); its rows are kept, so a second run is quick.
On a CPU the world is scaled down: requests a sixteenth as long, SLOs as many batch times as in the default suite.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pandas as pd
import typer

from llmsched_gym.config import BLOCK_SIZE, ConfigError, scenario, split_names
from llmsched_gym.cost import Profile, load_profile
from llmsched_gym.evaluation import metrics
from llmsched_gym.evaluation.run import Episode, simulate
from llmsched_gym.files import claim_folder, json_with
from llmsched_gym.real_backend import command
from llmsched_gym.real_backend.calibration.calibrate import (
    block_size_of,
    calibrate,
    describe,
    limits_for,
    on_gpu,
    open_backend,
)
from llmsched_gym.real_backend.command import Backend, Clock, Device, ModelName, Threads
from llmsched_gym.real_backend.errors import BackendError
from llmsched_gym.real_backend.sim2real import page
from llmsched_gym.real_backend.sim2real.agreement import summary
from llmsched_gym.real_backend.sim2real.small_world import SmallWorld, limits, make_world
from llmsched_gym.registry import make_scheduler
from llmsched_gym.report import console

if TYPE_CHECKING:
    from llmsched_gym.real_backend.calibration.measurements import MeasuredBackend

POLICIES = ("sarathi", "sarathi-spf", "slai", "rad", "srpt-capped")
LOADS = (0.5, 0.8, 1.1)
"""Shares of the rate at which sarathi saturates in the simulator."""
CPU_SCALE = 1 / 16
DEFAULT_BLOCKS = 14_733
MAX_STEPS = 1 << 20
SIGMA_PER_MAPE = 1.2533
"""A normal error's standard deviation for a mean absolute one of 1."""


@dataclass(frozen=True)
class Comparison:
    """Rows and steps of paired runs, and how they were made."""

    rows: pd.DataFrame  # metrics of each run, with backend and load
    steps: pd.DataFrame  # every batch of the real runs, with policy, load and seed
    requests: pd.DataFrame  # every request of the runs, with backend and load
    profile: Profile
    setup: str
    world: SmallWorld


def compare(
    backend: MeasuredBackend,
    profile: Profile,
    world: SmallWorld,
    policies: Sequence[str] = POLICIES,
    loads: Sequence[float] = LOADS,
    *,
    seeds: int = 2,
    first_seed: int = 0,
    jitter: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Run every policy at every load and seed on both; the schedulers of both predict with `profile`.

    The simulator's `jitter` is by default the spread of the profile's own held-out errors, so that a policy that lives
    off exact predictions meets the same surprises in it.
    """
    if jitter is None:
        jitter = round(SIGMA_PER_MAPE * (profile.fit or {}).get("mape", 0.0), 3)
    for policy in policies:
        make_scheduler(world.policy(policy))
    rows: list[dict[str, Any]] = []
    steps: list[pd.DataFrame] = []
    requests: list[pd.DataFrame] = []
    total = len(policies) * len(loads) * seeds
    for load in loads:
        at_load = world.scenario.replace(qps=load * world.saturation_qps)
        for seed in range(first_seed, first_seed + seeds):
            for policy in policies:
                progress(len(rows) // 2, total)
                spec = world.policy(policy)
                real = simulate(at_load, spec, seed, backend=backend, profile=profile, num_steps=MAX_STEPS)
                sim = simulate(at_load.replace(jitter=jitter), spec, seed, profile=profile)
                run = {"policy": policy, "load": load, "seed": seed}
                rows += [{**metrics.row(e), **run, "backend": side} for side, e in (("real", real), ("sim", sim))]
                steps.append(steps_of(real).assign(**run))
                requests += [requests_of(e).assign(**run, backend=side) for side, e in (("real", real), ("sim", sim))]
    progress(total, total)
    all_steps, all_requests = (pd.concat(parts, ignore_index=True) for parts in (steps, requests))
    return Comparison(pd.DataFrame(rows), all_steps, all_requests, profile, backend.setup, world)


def steps_of(episode: Episode) -> pd.DataFrame:
    """The batches of a run."""
    fields = ("start_s", "duration_s", "predicted_s", "decode_tokens", "prefill_tokens", "num_running", "num_waiting")
    return pd.DataFrame({name: episode.steps[name] for name in fields})


def requests_of(episode: Episode) -> pd.DataFrame:
    """What became of each request of a run."""
    fields = ["index", "prompt_tokens", "output_tokens", "slo_class", "ttft_s", "max_itl_s", "utility", "attained"]
    return metrics.requests_frame(episode)[fields].astype({"slo_class": str})


def save(comparison: Comparison, out: Path) -> dict[str, Any]:
    """Write rows, steps, summary and page; returns the summary."""
    out.mkdir(parents=True, exist_ok=True)
    found = summary(comparison.rows, comparison.steps, comparison.requests)
    found["setup"] = comparison.setup
    found["jitter"] = float(comparison.rows.loc[comparison.rows["backend"] == "sim", "jitter"].iloc[0])
    found["saturation_qps"] = comparison.world.saturation_qps
    found["calibration"] = comparison.profile.fit
    comparison.rows.to_json(out / "runs.json", orient="records", indent=1)
    comparison.steps.to_parquet(out / "steps.parquet")
    comparison.requests.to_parquet(out / "requests.parquet")
    (out / "summary.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (out / "scenario.json").write_text(
        json.dumps(comparison.world.scenario.to_dict(), indent=1) + "\n", encoding="utf-8"
    )
    page.write(comparison.rows, comparison.steps, found, comparison.profile, comparison.world, out)
    return found


def kv_blocks(scale: float, block_size: int = BLOCK_SIZE) -> int | None:
    """Blocks of a world at a scale; at full scale as many as memory holds."""
    if scale >= 1:
        return None
    return max(int(DEFAULT_BLOCKS * scale) * BLOCK_SIZE, 2 * limits(scale)["max_model_len"]) // block_size


def prepare(
    model: str,
    out: Path,
    *,
    profile: str | None = None,
    device: str | None = None,
    scale: float | None = None,
    num_requests: int = 100,
    clock: str = "wall",
    backend: str = "transformers",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[MeasuredBackend, Profile, SmallWorld]:
    """The backend, its profile (measured unless given) and the world to compare in."""
    scale = scale if scale is not None else (1.0 if on_gpu(device) else CPU_SCALE)
    if not 0.0 < scale <= 1.0:
        raise ConfigError(f"scale: expected a number > 0 and <= 1, got {scale:g}")
    block_size = block_size_of(backend, device)
    machine = {"block_size": block_size, "num_kv_blocks": kv_blocks(scale, block_size), **limits(scale)}
    opened = open_backend(scenario("default", backend=backend, model=model, **machine), device, clock)
    if profile is not None:
        measured = load_profile(profile)
    else:
        bound = limits_for(
            device,
            max_tokens=min(limits(scale)["max_num_batched_tokens"], 2048),
            max_context=limits(scale)["max_model_len"] - (backend == "vllm"),  # the token behind needs room
            max_seqs=limits(scale)["max_num_seqs"],
        )
        measured = calibrate(opened, out / "profile.csv", bound, progress=progress)
        measured.to_json(out / "profile.json")
    return opened, measured, make_world(measured, scale, out, num_requests, opened.num_kv_blocks, block_size)


def sim2real_command(
    model: ModelName,
    out: Annotated[Path, typer.Option(rich_help_panel="Output", help="Folder for the page and what it is made from.")],
    profile: Annotated[
        str | None,
        typer.Option(rich_help_panel="The model", help="Profile of this model and device; measured unless given."),
    ] = None,
    policy: Annotated[str, typer.Option(rich_help_panel="What runs", help="Policies, separated by commas.")] = ",".join(
        POLICIES
    ),
    loads: Annotated[str, typer.Option(rich_help_panel="What runs", help="Shares of the saturating rate.")] = ",".join(
        map(str, LOADS)
    ),
    num_requests: Annotated[int, typer.Option(rich_help_panel="What runs", min=2, help="Requests of a run.")] = 100,
    seeds: Annotated[int, typer.Option(rich_help_panel="What runs", min=1, help="Number of seeds.")] = 2,
    first_seed: Annotated[int, typer.Option(rich_help_panel="What runs", min=0, help="The first seed.")] = 0,
    jitter: Annotated[
        float | None,
        typer.Option(rich_help_panel="What runs", help="Of the simulator; the calibration's spread unless given."),
    ] = None,
    scale: Annotated[
        float | None, typer.Option(rich_help_panel="The model", help="Of request lengths: 1, and 1/16 on a CPU.")
    ] = None,
    device: Device = None,
    threads: Threads = None,
    clock: Clock = "wall",
    backend: Backend = "transformers",
) -> None:
    """Compare the simulator with the real model."""
    try:
        import torch
    except ImportError:
        raise BackendError("sim2real needs torch and transformers: pip install '.[real]'") from None

    try:
        shares = [float(text) for text in loads.split(",")]
    except ValueError:
        shares = [0.0]
    if min(shares) <= 0.0:
        raise ConfigError(f"loads: expected numbers > 0 separated by commas, got {loads!r}")
    if threads is not None:
        torch.set_num_threads(threads)
    marks = {"scenario.json": json_with("suite"), "profile.csv": Path.is_file}  # the first is written last
    claim_folder(out, "comparison of llmsched", marks)
    options = {"profile": profile, "device": device, "scale": scale, "num_requests": num_requests, "clock": clock}
    options["backend"] = command.backend_name(backend)
    with command.progress_bar("calibration") as progress:
        opened, measured, world = prepare(model, out, progress=progress, **options)  # type: ignore[arg-type]
    console.remark(describe(measured) if measured.fit else measured.name)
    with command.progress_bar("runs") as progress:
        names = split_names([policy])
        comparison = compare(
            opened,
            measured,
            world,
            names,
            shares,
            seeds=seeds,
            first_seed=first_seed,
            jitter=jitter,
            progress=progress,
        )
    found = save(comparison, out)
    print(json.dumps({"page": str(out / "report.html"), **found["step_time"], "tau": found["mean_kendall_tau"]}))


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(sim2real_command, "llmsched sim2real", argv)
