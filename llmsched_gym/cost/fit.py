"""Fit a profile to measured batches: a robust non-negative least-squares problem, its error told on held-out rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from llmsched_gym.config import DeviceSpec, ModelSpec
from llmsched_gym.cost.fit_batches import with_surface
from llmsched_gym.cost.measured_batches import Batch, kind_of, read_batches
from llmsched_gym.cost.profile import Profile, ProfileError, TableLinear

if TYPE_CHECKING:
    import pandas as pd

MIN_ROWS = 20
HELD_OUT_SHARE = 0.2
ROWS_PER_KNOT = 3
HUBER_SIGMAS = 1.345  # residuals beyond so many sigmas count linearly, not squared
ROUNDS = 20  # of reweighting
TURNS = 3  # of linear layers and attention
AUTO_GAIN = 0.2
"""A surface has hundreds of figures where the sum has two: it must be worth them."""


def fit(
    measurements: str | Path | pd.DataFrame,
    *,
    name: str,
    model: ModelSpec,
    device: DeviceSpec,
    num_kv_blocks: int,
    tile_tokens: int,
    overhead_ms: float = 0.0,
    knots: Sequence[int] | None = None,
    seed: int = 0,
    notes: Sequence[str] = (),
    surface: bool | Literal["auto"] = False,
) -> Profile:
    """A profile whose coefficients come from measured batches; relative errors are what is made small.

    Measurements are a table of batches, see :mod:`~llmsched_gym.cost.measured_batches`.

    20 % of the rows, chosen by `seed`, are held out; `profile.fit` has the errors on them: `mape`, `p95_ape` and
    `max_ape` as shares, `rms_ms`, and the same in `kinds` for decodes alone, chunks alone and hybrid batches. The time
    of the linear layers never falls with the batch's tokens; its `knots` default to a grid that the data can carry.
    Times of whole batches cannot tell the per-batch overhead from the floor of the linear layers: `overhead_ms` is
    taken as given and the rest goes to the table. A few disturbed rows do not move the fit (Huber weights).

    With `surface` attention is a surface, which needs hybrid batches measured on purpose; with "auto" it is one where
    the rows are there and that lowers the mean error on held-out hybrid batches by :data:`AUTO_GAIN` at least. Raises
    :class:`ProfileError` naming line and column.
    """
    batches = read_batches(measurements)
    if len(batches) < MIN_ROWS:
        raise ProfileError(f"{len(batches)} measured batches; a fit needs at least {MIN_ROWS}")
    order = np.random.default_rng(seed).permutation(len(batches))
    num_held_out = int(HELD_OUT_SHARE * len(batches))
    held_out, training = ([batches[i] for i in part] for part in np.split(order, [num_held_out]))

    profile = Profile(
        name=name,
        model=model,
        device=device,
        tile_tokens=tile_tokens,
        linear=TableLinear((1, 2), (1.0, 1.0)),
        overhead_ms=overhead_ms,
        pair_ms=0.0,
        kv_ms=0.0,
        num_kv_blocks=num_kv_blocks,
        notes=(*notes, f"Fitted to {len(training)} measured batches."),
    )
    fitted = _additive(profile, training, knots)
    if surface:
        fitted = _choose(fitted, training, held_out, surface)
    counts = {"rows": len(training), "held_out_rows": num_held_out, "seed": seed}
    return dataclasses.replace(
        fitted, fit={**counts, **errors(fitted, held_out), "kinds": errors_by_kind(fitted, held_out)}
    )


def _additive(profile: Profile, training: Sequence[Batch], knots: Sequence[int] | None) -> Profile:
    """`profile` with linear layers and additive attention fitted to the batches."""
    num_tokens = np.array([batch.num_tokens for batch in training])
    at = np.unique(np.asarray(knots, int)) if knots is not None else _knots(num_tokens)
    if len(at) < 2 or at[0] < 1:
        raise ProfileError("knots: expected at least two different token counts >= 1 in the measurements")
    ms = np.array([batch.ms for batch in training]) - profile.overhead_ms
    if not (ms > 0.0).all():
        raise ProfileError(f"overhead_ms: {profile.overhead_ms:g} is more than the fastest measured batch takes")
    if not any(batch.decode_contexts for batch in training):
        raise ProfileError("decode: no batch has decodes; the cost of the KV that they read cannot be fitted")
    attention = np.array([_attention(batch) for batch in training])
    if not attention.any(axis=0).all():
        raise ProfileError("prefill: no batch has a prefill chunk; the cost of its attention cannot be fitted")
    solution = _robust_nnls(np.column_stack([_increments(num_tokens, at), attention]), ms)
    pair_ms, kv_ms = (float(x) for x in solution[-2:])
    return dataclasses.replace(profile, linear=_table(at, solution[:-2]), pair_ms=pair_ms, kv_ms=kv_ms)


def _with_surface(additive: Profile, training: Sequence[Batch]) -> Profile:
    """The fit with a surface: linear layers and attention in turn, each to what the other leaves of the batches."""
    at = np.array(additive.linear.tokens) if isinstance(additive.linear, TableLinear) else np.zeros(0)
    increments = _increments(np.array([batch.num_tokens for batch in training]), at)
    total = np.array([batch.ms for batch in training])
    profile = with_surface(additive, training)
    for _ in range(TURNS):
        whole = np.array([1e3 * profile.predict_s(batch.chunks, batch.decode_contexts) for batch in training])
        attention = whole - increments @ np.diff(profile.linear.table(int(at[-1]))[at - 1], prepend=0.0)
        solution = _robust_nnls(increments, np.maximum(total - attention, 0.01 * total), total)
        profile = with_surface(dataclasses.replace(additive, linear=_table(at, solution)), training)
    return profile


def _choose(
    additive: Profile, training: Sequence[Batch], held_out: Sequence[Batch], surface: bool | Literal["auto"]
) -> Profile:
    """The fit with a surface if that is required, or possible and better."""
    try:
        fitted = _with_surface(additive, training)
    except ProfileError:
        if surface is True:
            raise
        return additive
    hybrid = [batch for batch in held_out if kind_of(batch) == "hybrid"]
    better = bool(hybrid) and errors(fitted, hybrid)["mape"] <= (1.0 - AUTO_GAIN) * errors(additive, hybrid)["mape"]
    return fitted if surface is True or better else additive


def _table(at: np.ndarray, increments: np.ndarray) -> TableLinear:
    return TableLinear(tuple(at.tolist()), tuple(np.maximum(np.cumsum(increments), 1e-9).tolist()))


def errors_by_kind(profile: Profile, batches: Sequence[Batch]) -> dict[str, dict[str, float]]:
    """:func:`errors` and the number of rows by kind of batch, for kinds that there are."""
    groups = {kind: [b for b in batches if kind_of(b) == kind] for kind in ("decodes", "chunks", "hybrid")}
    return {kind: {"rows": len(group), **errors(profile, group)} for kind, group in groups.items() if group}


def errors(profile: Profile, batches: Sequence[Batch]) -> dict[str, float]:
    """How far a profile's predictions are from measured batches."""
    predicted = np.array([1e3 * profile.predict_s(batch.chunks, batch.decode_contexts) for batch in batches])
    measured = np.array([batch.ms for batch in batches])
    relative = np.abs(predicted / measured - 1.0)
    return {
        "mape": float(relative.mean()),
        "p95_ape": float(np.percentile(relative, 95)),
        "max_ape": float(relative.max()),
        "rms_ms": float(np.sqrt(np.mean((predicted - measured) ** 2))),
    }


def _attention(batch: Batch) -> tuple[float, float]:
    """Query-key pairs of the prefill chunks, and KV tokens read."""
    pairs = sum(n * (computed + (n + 1) / 2) for computed, n in batch.chunks)
    return pairs, sum(batch.decode_contexts) + sum(computed + n for computed, n in batch.chunks)


def _increments(num_tokens: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """Shape (rows, knots): 1 for the first knot's time, then how far each row has climbed every later segment."""
    shares = (num_tokens[:, None] - knots[None, :-1]) / np.diff(knots)[None, :]
    shares[:, :-1] = np.minimum(shares[:, :-1], 1.0)  # the last segment goes on past its end
    return np.column_stack([np.ones(len(num_tokens)), np.maximum(shares, 0.0)])


def _knots(num_tokens: np.ndarray) -> np.ndarray:
    """Every token count of a sweep that has few; else a grid, finer at small batches, as far as the data carry it."""
    seen = np.unique(num_tokens)
    if len(seen) * ROWS_PER_KNOT <= len(num_tokens) and len(seen) <= 64:
        return seen
    grid = [1, 2, 4, 8, 16, 32, 48, 64, 96, *range(128, 512, 64), *range(512, 2048, 128), *range(2048, 65537, 512)]
    knots = [int(seen[0])]
    for knot in [n for n in grid if seen[0] < n < seen[-1]]:
        below = np.count_nonzero((num_tokens > knots[-1]) & (num_tokens <= knot))
        if below >= ROWS_PER_KNOT and np.count_nonzero(num_tokens > knot) >= ROWS_PER_KNOT:
            knots.append(knot)
    return np.array([*knots, int(seen[-1])])


def _robust_nnls(matrix: np.ndarray, target: np.ndarray, unit: np.ndarray | None = None) -> np.ndarray:
    """Non-negative coefficients with residuals small in units of `unit`, or relative ones; Huber weights, reweighted
    until they settle."""
    from scipy.optimize import nnls

    unit = target if unit is None else unit
    relative, wanted = matrix / unit[:, None], target / unit
    scale = np.linalg.norm(relative, axis=0)
    scale[scale == 0.0] = 1.0
    relative = relative / scale
    weight = np.ones(len(target))
    for _ in range(ROUNDS):
        root = np.sqrt(weight)
        solution, _ = nnls(relative * root[:, None], wanted * root)
        residual = np.abs(relative @ solution - wanted)
        limit = HUBER_SIGMAS * 1.4826 * np.median(residual)
        new = np.minimum(1.0, limit / np.maximum(residual, 1e-12)) if limit > 0.0 else weight
        if np.allclose(new, weight, rtol=0.0, atol=1e-3):
            break
        weight = new
    return np.asarray(solution / scale)
