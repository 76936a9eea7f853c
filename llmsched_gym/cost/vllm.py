"""The shipped profiles of vLLM: two fitted to tables of its kernels, one estimated from them by scaling."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from llmsched_gym.cost.fit_surface import pairs
from llmsched_gym.cost.fit_tables import fit_tables, rounded
from llmsched_gym.cost.profile import Profile, ProfileError
from llmsched_gym.cost.roofline import DEVICES, MODELS
from llmsched_gym.cost.surface import Surface

ENGINE = "vLLM 0.19.0, bf16, default attention backend"
SOURCE = (
    "Kernel times: LLMServingSim (casys-kaist, MIT licence), profiler of April 2026, vLLM 0.19.0, bf16, Llama-3.1-8B."
)
MEASURED = {"RTXPRO6000": ("rtxpro6000", 32_600), "RTX4090": ("rtx4090", 2587)}
"""Folder of tables -> (device, KV blocks that the source's runs had for use)."""
ESTIMATED = "rtx6000ada-mistral-7b-vllm"


def vllm_profiles(folder: Path, ada: Profile) -> list[Profile]:
    """Profiles of the two measured devices, and what they suggest for `ada`, an additive profile of their sibling."""
    found = {}
    for name, (device, blocks) in MEASURED.items():
        files = [folder / name / file for file in ("dense.csv", "attention.csv.gz", "per_sequence.csv", "skew.csv.gz")]
        found[name] = fit_tables(
            *files,
            name=f"{device}-llama-3.1-8b-vllm",
            model=MODELS["llama-3.1-8b"],
            device=DEVICES[device],
            num_layers=MODELS["llama-3.1-8b"].num_layers,
            num_kv_blocks=blocks,
            engine=ENGINE,
            notes=(SOURCE, "num_kv_blocks: what that engine had for use in the source's runs."),
            with_held_out=True,
        )
    return [*found.values(), scaled_to(ada, found["RTX4090"], ESTIMATED)]


def scaled_to(profile: Profile, measured: Profile, name: str) -> Profile:
    """`profile`, which is additive, with the surface of `measured`: an estimate for one engine on two devices.

    Every time of attention stands to what the additive terms of its own device say as it does on the measured device;
    of that, KV tokens cost what many long decodes alone do. The launch is taken out of the overhead, which has it.
    """
    surface = measured.surface
    if surface is None or profile.surface is not None:
        raise ProfileError(f"{name}: expected an additive profile and one with a surface")
    kv_ms = surface.decode_ms[-1][-1] / (surface.sequences[-1] * surface.context[-1])
    by_kv = profile.kv_ms / kv_ms
    c, p = np.meshgrid(surface.chunk, surface.prefix, indexing="ij")
    own, there = (
        kv * (c + p) + pair * pairs(c, p) for kv, pair in ((profile.kv_ms, profile.pair_ms), (kv_ms, measured.pair_ms))
    )
    chunk_ms = (np.array(surface.chunk_ms) + measured.pair_ms * pairs(c, p)) * own / there - profile.pair_ms * pairs(
        c, p
    )
    estimate: Surface = dataclasses.replace(
        surface.scaled(by_kv), chunk_ms=tuple(map(tuple, chunk_ms.tolist())), sequence_ms=(0.0,)
    )
    launch_ms = float(np.min(chunk_ms[0] + profile.pair_ms * pairs(c, p)[0]))
    return dataclasses.replace(
        profile,
        name=name,
        overhead_ms=rounded(max(profile.overhead_ms - launch_ms, 0.0)),
        surface=dataclasses.replace(estimate, launch_ms=launch_ms).rounded(),
        engine=ENGINE,
        fit=None,
        notes=(
            f"Estimate: {profile.name} with the attention of vLLM's kernels, scaled from {measured.name}, a device of "
            "the same generation; nobody has measured it.",
            f"Decodes, alone and beside a chunk: times {by_kv:.3g}, the ratio of the two devices' times per KV token. "
            "Chunks: times the ratio of what the two devices' costs per KV token and per query-key pair add up to.",
            "Linear layers, output head, overhead (less the launch of attention) and KV blocks are those of "
            f"{profile.name}. {SOURCE}",
        ),
    )
