"""How far a fitted surface is from measured cells: by kind of batch, worst cells, and with whole levels left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from llmsched_gym.cost.fit_surface import AXES, fit_attention, kinds

if TYPE_CHECKING:
    import pandas as pd

LARGE_US = 50.0
"""Attention of one layer that takes less counts as small: weights take longer to read than that."""
NUM_WORST = 5
LEVELS = {"n": ("decodes", "hybrid"), "k": ("decodes", "hybrid"), "c": ("chunks",), "p": ("chunks",)}
"""Columns of which levels are left out, and the kinds of batches whose error that tells."""


def figures(error: np.ndarray) -> dict[str, float | int]:
    """Rows, and of relative errors the median and 95th percentile without sign, the largest, and the mean with sign."""
    size = np.abs(error)
    return {
        "rows": len(error),
        "median": round(float(np.median(size)), 4),
        "p95": round(float(np.quantile(size, 0.95)), 4),
        "max": round(float(size.max()), 4),
        "bias": round(float(np.mean(error)), 4),
    }


def by_kind(cells: pd.DataFrame, predicted_us: np.ndarray) -> dict[str, dict[str, Any]]:
    """Relative errors by kind of batch; of small and large ones (:data:`LARGE_US`) too."""
    error, large = predicted_us / cells.us.to_numpy() - 1.0, cells.us.to_numpy() >= LARGE_US
    out: dict[str, dict[str, Any]] = {}
    for kind, mask in kinds(cells).items():
        rows = mask.to_numpy()
        if rows.any():
            parts = {"small": rows & ~large, "large": rows & large}
            out[kind] = {**figures(error[rows]), **{k: figures(error[m]) for k, m in parts.items() if m.any()}}
    return out


def worst(cells: pd.DataFrame, predicted_us: np.ndarray) -> list[dict[str, Any]]:
    """The cells with the largest relative errors."""
    error = predicted_us / cells.us.to_numpy() - 1.0
    order = np.argsort(-np.abs(error), kind="stable")[:NUM_WORST]
    rows = cells.iloc[order].rename(columns=AXES)
    return [
        {
            **{name: int(row[name]) for name in AXES.values()},
            "us": round(row["us"], 1),
            "error": round(float(e), 3),
        }
        for row, e in zip(rows.to_dict("records"), error[order], strict=True)
    ]


def held_out(
    cells: pd.DataFrame, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, dict[str, dict[str, Any]]]:
    """Errors on whole levels left out of the fit in turn, by column and kind of batch: {column: {kind: figures}}.

    Levels are the powers of two that the column has, where there are four at least. Figures are those of
    :func:`figures` over all levels, of `inner` ones (interpolated) and `edges` (extrapolated), and of each in `levels`.
    """
    plan = [(column, level) for column in LEVELS for level in _levels(cells, column)]
    errors: dict[str, dict[int, pd.DataFrame]] = {column: {} for column in LEVELS}
    for done, (column, level) in enumerate(plan):
        progress(done, len(plan))
        left_out = cells[cells[column] == level]
        fitted = fit_attention(cells[cells[column] != level])
        errors[column][level] = left_out.assign(error=fitted.predict(left_out) / left_out.us - 1.0)
    progress(len(plan), len(plan))
    return {
        AXES[column]: {kind: _pooled(errors[column], kind) for kind in of}
        for column, of in LEVELS.items()
        if errors[column]
    }


def _pooled(by_level: dict[int, pd.DataFrame], kind: str) -> dict[str, Any]:
    parts = {}
    for level, rows in by_level.items():
        mask = kinds(rows)[kind].to_numpy()
        if mask.any():
            parts[level] = rows.error.to_numpy()[mask]
    levels = list(parts)
    groups = {"inner": levels[1:-1], "edges": [levels[0], levels[-1]]}
    pooled = {name: figures(np.concatenate([parts[v] for v in group])) for name, group in groups.items() if group}
    each = {str(level): figures(error) for level, error in parts.items()}
    return {**figures(np.concatenate(list(parts.values()))), **pooled, "levels": each}


def _levels(cells: pd.DataFrame, column: str) -> list[int]:
    values = sorted(int(v) for v in cells[column].unique() if v > 0)
    powers = [v for v in values if v & (v - 1) == 0]
    return powers if len(powers) > 3 else []
