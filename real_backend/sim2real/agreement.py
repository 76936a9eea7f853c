"""How far the simulator is from the real backend: pure functions of the rows and steps of paired runs.

A row is one of :func:`llmsched_gym.evaluation.metrics.row` with a `backend` (real or sim) and a `load`, the share of
saturation. Two rows are a pair if policy, load and seed are equal.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

RELATIVE = ("ttft_p50_s", "ttft_p99_s", "itl_p50_s", "itl_p99_s")
"""Figures whose errors are told as shares of the real one; those of the others as differences."""
ABSOLUTE = ("slo_attainment", "mean_utility")
NUM_BLOCKS = 20
"""Of consecutive requests, for the spread of a mean over requests."""
RANKINGS = {"mean_utility": 0.02, "slo_attainment": 0.02, "ttft_p50_s": 0.1}
"""Figures that policies are ranked by, and what counts as a clear difference: absolute, relative for times."""


def step_errors(steps: pd.DataFrame) -> dict[str, float]:
    """Errors of the predicted time of each real batch, as shares; `bias` is signed.

    `mape_at_run_speed` is what remains when each run's median error is taken out: the machine's speed may differ from
    run to run, the rest is the profile's shape.
    """
    ratio = steps["predicted_s"] / steps["duration_s"]
    run_speed = ratio.groupby([steps[name] for name in ("policy", "load", "seed")]).transform("median")
    return {
        "steps": len(steps),
        "mape": float((ratio - 1.0).abs().mean()),
        "mape_at_run_speed": float((ratio / run_speed - 1.0).abs().mean()),
        "p95_ape": float((ratio - 1.0).abs().quantile(0.95)),
        "bias": float((ratio - 1.0).mean()),
        "total": float(steps["predicted_s"].sum() / steps["duration_s"].sum() - 1.0),
    }


def paired(rows: pd.DataFrame) -> pd.DataFrame:
    """Seed means, one line per policy and load: each figure's `_real`, `_sim` and `_error`.

    A figure that is infinite (None in a row) on one side only has an infinite error, on both sides none.
    """
    fields = [*RELATIVE, *ABSOLUTE]
    frame = rows.assign(**{name: rows[name].astype(float) for name in fields})
    for name in RELATIVE:
        frame[name] = frame[name].fillna(np.inf)
    means = frame.groupby(["policy", "load", "backend"], sort=False)[fields].mean().unstack("backend")
    out = means.copy()
    out.columns = [f"{name}_{backend}" for name, backend in means.columns]
    for name in fields:
        real, sim = out[f"{name}_real"], out[f"{name}_sim"]
        both = np.isinf(real) & np.isinf(sim)
        with np.errstate(invalid="ignore"):
            error = sim / real - 1.0 if name in RELATIVE else sim - real
        out[f"{name}_error"] = np.where(both, 0.0, error)
    return out.reset_index()


def rankings(pairs: pd.DataFrame) -> list[dict[str, Any]]:
    """Whether the policies' order on the real backend is the simulator's, per load and figure.

    `tau` is Kendall's tau-b over all policies, None where all tie on a side. Policies that differ little may swap by
    chance: `clear_pairs` differ clearly on the real backend, `clear_kept` of them keep their order in the simulator.
    """
    found = []
    for load, group in pairs.groupby("load", sort=True):
        for name, margin in RANKINGS.items():
            real, sim = (group[f"{name}_{side}"].to_numpy(float) for side in ("real", "sim"))
            clear = clear_pairs(real, sim, margin, relative=name in RELATIVE)
            found.append({"load": float(load), "by": name, "tau": kendall_tau(real, sim), **clear})
    return found


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Tau-b of two orders; None where one of them is all ties."""
    from scipy.stats import kendalltau

    # Ranks, because infinite figures tie with each other and nothing else.
    a, b = (pd.Series(values).rank() for values in (first, second))
    tau = float(kendalltau(a, b).statistic) if len(a) > 1 else float("nan")
    return None if np.isnan(tau) else tau


def clear_pairs(real: np.ndarray, sim: np.ndarray, margin: float, *, relative: bool) -> dict[str, int]:
    """Pairs of policies that differ by more than `margin` on the real backend, and those of the same sign in both."""
    i, j = np.triu_indices(len(real), 1)
    kept = clear = 0
    for a, b, c, d in zip(real[i], real[j], sim[i], sim[j], strict=True):
        if a == b:
            continue
        if abs(a - b) > (margin * min(a, b) if relative else margin):
            clear += 1
            kept += bool((a < b and c < d) or (a > b and c > d))
    return {"clear_pairs": clear, "clear_kept": kept}


def request_agreement(requests: pd.DataFrame) -> dict[str, Any]:
    """Request by request: the share whose fate (all SLOs attained or not) differs between the two sides, over all runs
    and by policy; and the differences between policies that the simulator calls significant, and how many of them have
    the same sign on the real backend.

    Differences are of utility, paired by request, at one load; significant is a two-sided 5 % in Student's t over the
    means of consecutive blocks of requests, since neighbours share their fate.
    """
    keys = ["policy", "load", "seed", "index"]
    sides = {side: part.set_index(keys) for side, part in requests.groupby("backend")}
    fates = pd.DataFrame({side: part["attained"] for side, part in sides.items()})
    differ = fates["real"] != fates["sim"]
    utility = pd.DataFrame({side: part["utility"] for side, part in sides.items()})
    significant = kept = 0
    for _, at_load in utility.groupby("load"):
        wide = at_load.unstack("policy")
        for a, b in itertools.combinations(wide["sim"].columns, 2):
            difference = {side: (wide[side][a] - wide[side][b]).to_numpy(float) for side in ("real", "sim")}
            if _p_value(difference["sim"]) < 0.05:
                significant += 1
                kept += difference["sim"].mean() * difference["real"].mean() > 0.0
    return {
        "compared": len(fates),
        "fates_differ": float(differ.mean()),
        "fates_differ_by_policy": differ.groupby("policy").mean().to_dict(),
        "significant_pairs": significant,
        "significant_kept": int(kept),
    }


def _p_value(difference: np.ndarray) -> float:
    """Of a mean of zero, by Student's t over blocks; 1 where nothing differs."""
    from scipy.stats import ttest_1samp

    means = np.array([block.mean() for block in np.array_split(difference, NUM_BLOCKS) if len(block)])
    if len(means) < 2 or not means.any():
        return 1.0
    if np.ptp(means) == 0.0:
        return 0.0
    return float(ttest_1samp(means, 0.0).pvalue)


def summary(rows: pd.DataFrame, steps: pd.DataFrame, requests: pd.DataFrame) -> dict[str, Any]:
    """Everything in a few figures, ready for JSON."""
    pairs = paired(rows)
    ranked = rankings(pairs)

    def typical(name: str) -> float | None:
        errors = pairs[f"{name}_error"].abs()
        errors = errors[np.isfinite(errors)]
        return float(errors.median()) if len(errors) else None

    def over_loads(name: str) -> float | None:
        taus = [r["tau"] for r in ranked if r["by"] == name and r["tau"] is not None]
        return float(np.mean(taus)) if taus else None

    return {
        "step_time": step_errors(steps),
        "requests": request_agreement(requests),
        "median_relative_error": {name: typical(name) for name in RELATIVE},
        "median_absolute_error": {name: typical(name) for name in ABSOLUTE},
        "mean_kendall_tau": {name: over_loads(name) for name in RANKINGS},
        "clear_pairs": sum(r["clear_pairs"] for r in ranked),
        "clear_kept": sum(r["clear_kept"] for r in ranked),
        "rankings": ranked,
    }
