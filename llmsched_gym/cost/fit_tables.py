"""A profile with a surface from tables of measured kernels: no end-to-end run has a say in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmsched_gym.config import DeviceSpec, ModelSpec
from llmsched_gym.cost import kernel_tables
from llmsched_gym.cost.fit_errors import by_kind, held_out, worst
from llmsched_gym.cost.fit_surface import Attention, fit_attention
from llmsched_gym.cost.profile import Profile, ProfileError, TableLinear, kv_blocks
from llmsched_gym.cost.surface import Surface, nested, rounded
from llmsched_gym.cost.tiles import best_tile

if TYPE_CHECKING:
    import pandas as pd

TAILS = np.arange(0.0, 8.01, 0.25)
MANY = 32
"""From so many decodes on, what a long one among them costs matters; fewer leave half the device idle anyway."""


def fit_tables(
    dense: str | Path,
    attention: str | Path,
    per_sequence: str | Path,
    skew: str | Path | None = None,
    *,
    name: str,
    model: ModelSpec,
    device: DeviceSpec,
    num_layers: int,
    num_kv_blocks: int | None = None,
    engine: str = "",
    overhead_ms: float = 0.0,
    notes: tuple[str, ...] = (),
    with_held_out: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Profile:
    """The profile of the CSV files described in :mod:`llmsched_gym.cost.kernel_tables`, plain or gzip.

    `model` and `device` say what is described (and how many KV blocks fit, unless given); times come from the tables
    alone, attention being that of one layer times `num_layers`. Without `skew`, unequal contexts cost what equal ones
    of their mean do. `profile.fit` has the errors by kind of batch, and `with_held_out` those on whole levels left out
    in turn (:func:`llmsched_gym.cost.fit_errors.held_out`, which takes seconds and calls `progress`). Raises
    :class:`ProfileError` naming file, line and column.
    """
    if num_layers < 1:
        raise ProfileError(f"num_layers: expected a whole number >= 1, got {num_layers}")
    linear_us = kernel_tables.read_dense(dense, num_layers)
    sequence_us = kernel_tables.read_per_sequence(per_sequence)
    cells = kernel_tables.read_attention(attention)
    fitted = fit_attention(cells, str(attention))
    unequal = None if skew is None else kernel_tables.read_skew(skew)
    tails = (0.0, 0.0) if unequal is None else fit_tails(fitted, unequal)

    to_ms = num_layers / 1e3
    tokens = linear_us.index.tolist()
    predicted = fitted.predict(cells)
    # Output head and sampler by whole sequences, up to the last measured count.
    counts = np.arange(1, int(sequence_us.index[-1]) + 1)
    sequence_ms = np.interp(counts, sequence_us.index, sequence_us) / 1e3
    surface = Surface(
        sequences=fitted.sequences,
        context=fitted.context,
        chunk=fitted.chunk,
        prefix=fitted.prefix,
        decode_ms=nested(fitted.decode_us * to_ms),
        chunk_ms=nested(fitted.chunk_us * to_ms),
        hybrid_ms=nested(fitted.hybrid_us * to_ms),
        floor_ms=nested(fitted.floor_us * to_ms),
        launch_ms=float(cells.us[cells.n == 0].min()) * to_ms,
        tail_alone=tails[0],
        tail_hybrid=tails[1],
        sequence_ms=nested(sequence_ms),
    ).rounded()
    fit: dict[str, Any] = {"rows": len(cells), **by_kind(cells, predicted), "worst": worst(cells, predicted)}
    if unequal is not None:
        fit["unequal_contexts"] = tail_errors(fitted, unequal, tails)
    if with_held_out:
        fit["held_out"] = held_out(cells, progress)
    return Profile(
        name=name,
        model=model,
        device=device,
        tile_tokens=best_tile(tokens, linear_us.tolist()),
        linear=TableLinear(*going_on(tokens, [rounded(us / 1e3) for us in linear_us])),
        overhead_ms=overhead_ms,
        pair_ms=rounded(fitted.pair_us * to_ms),
        kv_ms=rounded(_additive_us(fitted, cells) * to_ms),
        num_kv_blocks=kv_blocks(model, device) if num_kv_blocks is None else num_kv_blocks,
        surface=surface,
        engine=engine,
        notes=(
            *notes,
            f"Fitted to {len(cells)} measured attention kernels and {len(tokens)} sizes of the linear layers; "
            f"attention is one layer's times {num_layers}. Host time and gaps between kernels are not in them.",
            f"Linear layers beyond {tokens[-1]} tokens are not measured: as from {tokens[-1] // 2} to there.",
            "kv_ms is what an additive model comes closest with; batches cost what the surface says.",
        ),
        fit=fit,
    )


def going_on(tokens: list[int], ms: list[float]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The knots with one more at twice the last, in line with the last and the one nearest to half of it.

    Past its knots a table goes on as its last segment does, and that may be the flat top of a step.
    """
    last = tokens[-1]
    half = int(np.argmin(np.abs(np.array(tokens[:-1]) - last / 2)))
    slope = max(0.0, (ms[-1] - ms[half]) / (last - tokens[half]))
    return (*tokens, 2 * last), (*ms, rounded(ms[-1] + slope * last))


def fit_tails(fitted: Attention, unequal: pd.DataFrame) -> tuple[float, float]:
    """(alone, hybrid): tokens of the longest context's lead that count, where the mean relative error is least."""
    found = []
    for part in _many(unequal):
        errors = (
            [np.abs(_unequal_ratio(fitted, part, t) / part.ratio - 1.0).mean() for t in TAILS] if len(part) else [0]
        )
        found.append(float(TAILS[int(np.argmin(errors))]))
    return found[0], found[1]


def tail_errors(fitted: Attention, unequal: pd.DataFrame, tails: tuple[float, float]) -> dict[str, Any]:
    """Relative errors of the ratio to equal contexts, by kind, with the tails and without them (median, p95)."""
    out: dict[str, Any] = {}
    for kind, part, tail in zip(("decodes", "hybrid"), _many(unequal), tails, strict=True):
        if len(part):
            error, without = (np.abs(_unequal_ratio(fitted, part, t) / part.ratio - 1.0) for t in (tail, 0.0))
            out[kind] = {"rows": len(part), "median": rounded(float(np.median(error))), "p95": _quantile(error)}
            out[kind] |= {"median_without": rounded(float(np.median(without))), "p95_without": _quantile(without)}
    return out


def _many(unequal: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = unequal[unequal.n >= min(MANY, int(unequal.n.max()))]
    return rows[rows.c == 0], rows[rows.c > 0]


def _unequal_ratio(fitted: Attention, rows: pd.DataFrame, tail: float) -> pd.Series:
    """Predicted time with unequal contexts over that with equal ones of the same mean."""
    even = rows.assign(k=rows["mean"])
    uneven = rows.assign(k=rows["mean"] + tail * (rows.longest - rows["mean"]) / rows.n)
    return rows.ratio * 0.0 + fitted.predict(uneven) / fitted.predict(even)


def _additive_us(fitted: Attention, cells: pd.DataFrame) -> float:
    """Microseconds per KV token with which the sum over parts comes closest, decodes alone and hybrids alike."""
    from scipy.optimize import minimize_scalar

    rows = cells[cells.n > 0]
    c, p, n, k = (rows[name].to_numpy(float) for name in "cpnk")
    rest = float(cells.us.min()) + np.where(c > 0, fitted.pair_us * c * (p + (c + 1.0) / 2.0), 0.0)
    read = n * k + np.where(c > 0, c + p, 0.0)
    weight = np.where(c > 0, 1.0 / max(1, int((c > 0).sum())), 1.0 / max(1, int((c == 0).sum())))

    def error(us: float) -> float:
        return float(np.sum(weight * np.abs((rest + us * read) / rows.us - 1.0)))

    high = float(np.max(rows.us / read))
    return float(minimize_scalar(error, bounds=(0.0, high), method="bounded", options={"xatol": 1e-4 * high}).x)


def _quantile(values: Any) -> float:
    return rounded(float(np.quantile(values, 0.95)))
