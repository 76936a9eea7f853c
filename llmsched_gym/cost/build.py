"""Write the shipped profiles again: `python -m llmsched_gym.cost.build --facts FILE --kernels FOLDER`.

The file, linear_ops_ms_by_tokens.csv, is the condensed form of Vidur's published profiles (`data/profiling/compute`):
columns gpu, model_shape, num_tokens, gemm_ms_32_layers, other_linear_ms_32_layers. The folder has LLMServingSim's
tables of vLLM's kernels on two devices, in RTXPRO6000 and RTX4090: dense.csv, attention.csv.gz, per_sequence.csv and
skew.csv.gz.
"""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from llmsched_gym.cost.profile import DATA_DIR, Profile, ProfileError, SmoothLinear, TableLinear, kv_blocks
from llmsched_gym.cost.roofline import DEVICES, MODELS, OVERHEAD_MS, kv_ms, pair_ms, roofline_notes
from llmsched_gym.cost.tiles import best_tile, tile_gain
from llmsched_gym.cost.vllm import vllm_profiles

CHUNK_SWEEP_MS = {
    64: 724.319638684392,
    128: 386.26284804195166,
    256: 238.8404309749603,
    384: 243.88742260634893,
    512: 212.16091420501465,
    768: 204.89425212144852,
    1024: 201.51933562010527,
}
"""Chunk size -> median TTFT, ms, of lone 2048-token prompts; Mistral-7B-Instruct-v0.2 on one RTX 6000 Ada.
Source: the SLAI authors' repository, scripts/plot1_results.csv."""
SWEEP_PROMPT_TOKENS = 2048
A100_SHAPE = "llama-3-8b"
FACT_COLUMNS = ("gpu", "model_shape", "num_tokens", "gemm_ms_32_layers", "other_linear_ms_32_layers")

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def sweep_ttft_ms(profile: Profile, chunk: int, prompt_tokens: int = SWEEP_PROMPT_TOKENS) -> float:
    """Time to first token of a lone prompt in chunks; the last one is what is left."""
    starts = range(0, prompt_tokens, chunk)
    return sum(1e3 * profile.predict_s([(start, min(chunk, prompt_tokens - start))], []) for start in starts)


def sweep_error(profile: Profile) -> dict[str, float]:
    """RMS and worst relative error of a profile on the published chunk sweep."""
    relative = np.array([sweep_ttft_ms(profile, chunk) / ms - 1.0 for chunk, ms in CHUNK_SWEEP_MS.items()])
    worst = float(relative[np.argmax(np.abs(relative))])
    return {"rows": len(relative), "rms_relative": float(np.sqrt(np.mean(relative**2))), "worst_relative": worst}


def rtx6000ada() -> Profile:
    """The formula fitted to the published chunk sweep."""
    bandwidth_gb_s = 0.8 * 960.0
    profile = Profile(
        name="rtx6000ada-mistral-7b",
        model=MODELS["mistral-7b"],
        device=DEVICES["rtx6000ada"],
        tile_tokens=128,
        linear=SmoothLinear(weight_ms=14.5 / bandwidth_gb_s * 1e3, token_ms=0.090, power=4.0),
        overhead_ms=3.4,
        pair_ms=4 * 32 * 128 * 32 / 90e12 * 1e3,
        kv_ms=131_072 / (bandwidth_gb_s * 1e9) * 1e3,
        num_kv_blocks=14_733,
        engine="the SLAI authors' engine, separate attention kernels for prefill and decode",
        notes=(
            "Fitted to the TTFT of lone 2048-token prompts at 7 chunk sizes, Mistral-7B-Instruct-v0.2 on one RTX 6000 "
            "Ada (the SLAI authors' repository, scripts/plot1_results.csv); see fit for the error.",
            "weight_ms: 14.5 GB of weights at 80 % of 960 GB/s. token_ms: 155 TFLOP/s over 13.96 GFLOP per token.",
            "pair_ms: 524,288 FLOP per query-key pair at 90 TFLOP/s. kv_ms: 128 KiB per token at 80 % of 960 GB/s.",
            "num_kv_blocks: as the authors' engine reported it on that machine.",
            "tile_tokens 128 is assumed: the sweep has too few points to show the staircase.",
            "Additive: that engine runs the two phases in kernels of their own, one after the other, so decodes cost "
            "no more beside a chunk than alone; rtx6000ada-mistral-7b-vllm is an estimate for an engine where they do.",
        ),
    )
    return dataclasses.replace(profile, fit=sweep_error(profile))


def a100(tokens: list[int], ms: list[float]) -> Profile:
    """The published table of the linear layers, with roofline attention."""
    model, device = MODELS["mistral-7b"], DEVICES["a100-80gb"]
    head_ms = 1e3 * model.head_params * model.bytes_per_value / (device.bandwidth_efficiency * device.bandwidth_bytes_s)
    tile = best_tile(tokens, ms)
    gains = ", ".join(f"{half}: {tile_gain(tokens, ms, 2 * half):+.1%}" for half in (64, 128, 256))
    return Profile(
        name="a100-mistral-7b",
        model=model,
        device=device,
        tile_tokens=tile,
        linear=TableLinear(tuple(tokens), tuple(ms)),
        overhead_ms=round(OVERHEAD_MS + head_ms, 3),
        pair_ms=pair_ms(model, device),
        kv_ms=kv_ms(model, device),
        num_kv_blocks=kv_blocks(model, device),
        engine="none in particular: PyTorch's linear layers, roofline attention",
        notes=(
            "linear: Vidur's published profile of an A100-80GB (data/profiling/compute, MIT), medians of GeMM and "
            "other linear-layer time of 32 layers; llama-3-8b has exactly mistral-7b's layer shapes. All points are "
            "kept; between two of them, up to 8 tokens apart below 1,024, a step of the staircase shows as a ramp.",
            f"tile_tokens: doubling the tile saves at least 1 % up to {tile}. Time per token of odd multiples above "
            f"that of the neighbouring multiples of twice as much, up to 2,048 tokens, {gains}.",
            f"Overhead includes {head_ms:.2f} ms for reading the output head, which the table leaves out.",
            *roofline_notes(device, OVERHEAD_MS),
        ),
    )


def read_table(path: Path, gpu: str, shape: str) -> tuple[list[int], list[float]]:
    """(tokens, ms) of the linear layers, GeMM and other, from the facts file."""
    tokens, ms = [], []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                if row["gpu"] == gpu and row["model_shape"].startswith(shape):
                    tokens.append(int(row["num_tokens"]))
                    ms.append(round(sum(float(row[column]) for column in FACT_COLUMNS[3:]), 4))
    except OSError as error:
        raise ProfileError(f"{path}: cannot read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ProfileError(f"{path}: line {reader.line_num}: expected {', '.join(FACT_COLUMNS)} ({error})") from None
    if not tokens:
        raise ProfileError(f"{path}: no rows for {gpu}, {shape}")
    return tokens, ms


@app.command()
def main(
    facts: Annotated[Path | None, typer.Option(help="Linear-layer times by token count, for the A100.")] = None,
    kernels: Annotated[Path | None, typer.Option(help="Folder of vLLM's kernel times on two devices.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = DATA_DIR,
) -> None:
    """Write the shipped cost profiles, but for those that were measured: they are fits of calibrate's."""
    try:
        if facts is None and kernels is None:
            raise ProfileError("expected --facts or --kernels, or both")
        profiles = []
        if facts is not None:
            profiles += [rtx6000ada(), a100(*read_table(facts, "A100-80GB", A100_SHAPE))]
        if kernels is not None:
            profiles += vllm_profiles(kernels, rtx6000ada())
    except ProfileError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    for profile in profiles:
        profile.to_json(out / f"{profile.name}.json")
        typer.echo(out / f"{profile.name}.json")


if __name__ == "__main__":
    app()
