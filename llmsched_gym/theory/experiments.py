"""Experiments on stability and tiles: what each scheduler sustains as a share of the fluid capacity.

Each returns plain data; :mod:`llmsched_gym.theory.figures` draws it. Cells run side by side in a pool's workers, and
no figure depends on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmsched_gym.config import Scenario
from llmsched_gym.cost import Profile, load_profile, roofline
from llmsched_gym.evaluation.spread import Places, run_cells
from llmsched_gym.fluid import fluid_capacity
from llmsched_gym.theory.stability import NUM_REQUESTS, SEEDS, Drift, boundary, drift, trajectory

ABLATION = "llmsched_gym.baselines.rad_ablation:"
SMOOTH, STAIRCASE, WAVES = "rtx6000ada-mistral-7b", "a100-mistral-7b", "a100 roofline with waves"
STABILITY_POLICIES = ("rad", "rad-512", "sarathi", "slai", "orca", "vllm-v0", "vllm-v1", "faster-transformer")
VARIANTS = {
    "both principles": ("rad", "rad-512"),
    "tiling off": (f"{ABLATION}UNTILED", f"{ABLATION}UNTILED_512"),
    "dynamic allocation off": (f"{ABLATION}FIXED_SPLIT", f"{ABLATION}FIXED_SPLIT_512"),
    "both off": (f"{ABLATION}NEITHER", f"{ABLATION}NEITHER_512"),
    "8 tokens off the tile": (f"{ABLATION}OFF_TILE", f"{ABLATION}OFF_TILE_512"),
}
"""RAD and what is left of it, with batches of up to 8,192 and of up to 512 tokens."""
JUDGED, OVERLOAD = 0.95, 1.05  # shares of the fluid capacity
WAVE_TILE = 128

Note = Callable[[str], None]


def device(name: str) -> Profile:
    """A shipped profile, or the A100's roofline whose times go up in steps of a tile."""
    if name == WAVES:
        return roofline("mistral-7b", "a100-80gb", waves=True, tile_tokens=WAVE_TILE, name=name)
    return load_profile(name)


def as_row(found: Drift, capacity: float) -> dict[str, Any]:
    """The drift at one rate as plain figures, with the rate as a share of the capacity."""
    return {
        "share": found.qps / capacity,
        "qps": found.qps,
        "drift": found.mean,
        "ci_low": found.ci_low,
        "ci_high": found.ci_high,
        "backlog": found.backlog,
        "verdict": found.verdict,
    }


def stability_cell(
    scenario: Scenario, device_name: str, capacity: float, policy: str, seeds: Sequence[int], num_requests: int
) -> dict[str, Any]:
    """Drift at the judged share and in overload, boundary, and one seed's backlog over time at the judged share."""
    profile = device(device_name)
    settings: dict[str, Any] = {"seeds": seeds, "num_requests": num_requests, "profile": profile}
    judged = drift(scenario, policy, JUDGED * capacity, **settings)
    over = drift(scenario, policy, OVERLOAD * capacity, **settings)
    guess = min(1.0, OVERLOAD * (1 - over.mean))
    edge = boundary(scenario, policy, (guess - 0.01) * capacity, (guess + 0.01) * capacity, **settings)
    world = scenario.replace(qps=JUDGED * capacity, num_requests=num_requests)
    run = trajectory(world, policy, seeds[0], profile=profile)
    return {
        "profile": device_name,
        "policy": policy,
        "fluid_qps": capacity,
        "judged": as_row(judged, capacity),
        "overload": as_row(over, capacity),
        "boundary_share": edge.qps / capacity,
        "boundary_low": edge.bounded_qps / capacity,
        "boundary_high": edge.unbounded_qps / capacity,
        "time_s": np.round(run.time_s, 3).tolist(),
        "requests": run.requests.tolist(),
    }


def stability(
    scenario: Scenario,
    *,
    policies: Sequence[str] = STABILITY_POLICIES,
    devices: Sequence[str] = (SMOOTH, STAIRCASE),
    seeds: Sequence[int] = SEEDS,
    num_requests: int = NUM_REQUESTS,
    workers: Places = 1,
    note: Note = lambda text: None,
) -> list[dict[str, Any]]:
    """Every policy on every device."""
    capacities = [(name, fluid_capacity(scenario, device(name)).qps) for name in devices]
    cells = [(scenario, *pair, policy, seeds, num_requests) for pair in capacities for policy in policies]
    return run_cells(stability_cell, cells, workers, note)


def overload_cell(
    scenario: Scenario, device_name: str, capacity: float, policy: str, seeds: Sequence[int], num_requests: int
) -> dict[str, Any]:
    """What a policy serves in overload, by seed, as shares of the fluid capacity."""
    settings: dict[str, Any] = {"seeds": seeds, "num_requests": num_requests, "profile": device(device_name)}
    found = drift(scenario, policy, OVERLOAD * capacity, **settings)
    served = [OVERLOAD * (1 - d) for d in found.drifts]
    return {"profile": device_name, "policy": policy, "served_share": float(np.mean(served)), "by_seed": served}


def ablation(
    scenario: Scenario,
    *,
    devices: Sequence[str] = (SMOOTH, STAIRCASE, WAVES),
    seeds: Sequence[int] = SEEDS,
    num_requests: int = NUM_REQUESTS,
    workers: Places = 1,
    note: Note = lambda text: None,
) -> list[dict[str, Any]]:
    """What RAD and its variants serve in overload, as a share of the fluid capacity, with paired losses to RAD."""
    names = [
        (variant, size, policy)
        for variant, pair in VARIANTS.items()
        for size, policy in zip((8192, 512), pair, strict=True)
    ]
    capacities = [(name, fluid_capacity(scenario, device(name)).qps) for name in devices]
    cells = [(scenario, *pair, policy, seeds, num_requests) for pair in capacities for _, _, policy in names]
    found = run_cells(overload_cell, cells, workers, note)
    labels = [(variant, size) for _ in devices for variant, size, _ in names]
    rows = [row | {"variant": variant, "size": size} for row, (variant, size) in zip(found, labels, strict=True)]
    whole = {(row["profile"], row["size"]): row for row in rows if row["variant"] == "both principles"}
    for row in rows:
        own, base = np.array(row["by_seed"]), np.array(whole[row["profile"], row["size"]]["by_seed"])
        row |= _paired(own / base - 1)
    return rows


def _paired(gains: np.ndarray) -> dict[str, float]:
    from scipy.stats import t as student

    half = student.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains))
    return {
        "gain": float(gains.mean()),
        "gain_low": float(gains.mean() - half),
        "gain_high": float(gains.mean() + half),
    }


def tiles(devices: Sequence[str] = (SMOOTH, STAIRCASE, WAVES), most: int = 8192) -> list[dict[str, Any]]:
    """Tokens per second of the linear layers against batch tokens, RAD's k * T and the cost of 8 tokens more."""
    found = []
    for name in devices:
        profile = device(name)
        linear_s = profile.linear_table_s(most + 8)
        tokens = np.arange(8, most + 1, 8)
        multiples = np.arange(profile.tile_tokens, most + 1, profile.tile_tokens)
        best = int(multiples[np.argmax(multiples / linear_s[multiples])])
        best_512 = int(multiples[multiples <= 512][np.argmax((multiples / linear_s[multiples])[multiples <= 512])])
        found.append(
            {
                "profile": name,
                "tile": profile.tile_tokens,
                "tokens": tokens.tolist(),
                "tokens_per_s": (tokens / linear_s[tokens]).tolist(),
                "best": best,
                "best_512": best_512,
                "extra_8": {
                    str(n): float(linear_s[n + 8] / linear_s[n] * n / (n + 8) - 1) for n in (best_512, 1024, best)
                },
            }
        )
    return found
