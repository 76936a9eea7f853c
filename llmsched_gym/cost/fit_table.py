"""One table of a surface from scattered measurements: robust least squares over multilinear interpolation."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy import sparse

ROUNDS = 15  # of reweighting
LEAST_RESIDUAL = 0.01  # relative; smaller ones weigh no more
PULL = 0.02  # weight of the first guess against one cell's error, both relative


def weights(knots: Sequence[Sequence[int]], at: Sequence[np.ndarray]) -> sparse.csr_matrix:
    """Interpolation as a matrix, (rows, entries of the table): multilinear in each axis' own unit, as surfaces are."""
    from scipy import sparse

    rows = len(at[0])
    index, share = np.zeros((rows, 1), np.int64), np.ones((rows, 1))
    for axis, values in zip(knots, at, strict=True):
        axis_knots = np.asarray(axis, float)
        x = np.maximum(np.asarray(values, float), axis_knots[0])
        i = np.clip(np.searchsorted(axis_knots, x, side="right") - 1, 0, len(axis_knots) - 2)
        part = (x - axis_knots[i]) / (axis_knots[i + 1] - axis_knots[i])
        step = index * len(axis_knots) + i[:, None]
        index = np.concatenate([step, step + 1], axis=1)
        share = np.concatenate([share * (1.0 - part[:, None]), share * part[:, None]], axis=1)
    row = np.repeat(np.arange(rows), index.shape[1])
    size = int(np.prod([len(axis) for axis in knots]))
    return sparse.csr_matrix((share.ravel(), (row, index.ravel())), shape=(rows, size))


def fit(
    knots: Sequence[Sequence[int]],
    at: Sequence[np.ndarray],
    target: np.ndarray,
    scale: np.ndarray,
    *,
    order: Sequence[int] | None = None,
    convex: int | None = None,
    at_zero: float | None = None,
    guess: np.ndarray | None = None,
    pull: float = PULL,
) -> np.ndarray:
    """The table over `knots` whose interpolation at `at` is close to `target`, in units of `scale`, (rows,) each.

    Unless there is a `guess`, cells on knots give one (medians, weighted by 1 / scale), and :func:`fill` its rest. All
    cells then correct it: least absolute errors, by reweighting, with a weak `pull` towards the guess for knots that
    few cells speak of.
    """
    from scipy import sparse

    shape = tuple(len(axis) for axis in knots)
    if guess is None:
        guess = fill(on_knots(knots, at, target, scale), knots, order, convex, at_zero)
    guess = guess.ravel()
    matrix = weights(knots, at)
    size = np.maximum(_typical(matrix, scale), 1e-12)
    towards = sparse.diags((pull / size) ** 2)
    table = guess
    for _ in range(ROUNDS):
        residual = np.abs(matrix @ table - target) / scale
        weight = 1.0 / (np.maximum(residual, LEAST_RESIDUAL) / LEAST_RESIDUAL * scale**2)
        weighted = matrix.multiply(weight[:, None]).tocsr()
        normal = (matrix.T @ weighted + towards).toarray()
        new = np.linalg.solve(normal, weighted.T @ target + towards @ guess)
        if np.allclose(new, table, rtol=1e-3, atol=1e-3 * float(size.min())):
            break
        table = new
    return np.asarray(new).reshape(shape)


def on_knots(
    knots: Sequence[Sequence[int]], at: Sequence[np.ndarray], target: np.ndarray, scale: np.ndarray
) -> np.ndarray:
    """Weighted medians of the cells that lie on knots, by knot; NaN where there is none."""
    table = np.full(tuple(len(axis) for axis in knots), np.nan)
    where = [np.searchsorted(axis, values) for axis, values in zip(knots, at, strict=True)]
    clipped = [np.minimum(i, len(axis) - 1) for i, axis in zip(where, knots, strict=True)]
    on = np.all([np.asarray(axis)[i] == v for axis, i, v in zip(knots, clipped, at, strict=True)], axis=0)
    flat = np.ravel_multi_index(clipped, table.shape)
    order = np.lexsort((target, flat))
    order = order[on[order]]
    for group in np.split(order, np.flatnonzero(np.diff(flat[order])) + 1) if len(order) else []:
        share = np.cumsum(1.0 / scale[group])
        table.flat[flat[group[0]]] = target[group[np.searchsorted(share, share[-1] / 2)]]
    return table


def fill(
    table: np.ndarray,
    knots: Sequence[Sequence[int]],
    order: Sequence[int] | None = None,
    convex: int | None = None,
    at_zero: float | None = None,
) -> np.ndarray:
    """NaNs replaced along the axes, in `order`, in each axis' own unit: between neighbours, then past the last ones.

    Along the axis `convex`, times are maxima of bounds and so nearly convex: between two neighbours a value lies below
    their chord and above the lines through the next two on either side, and the middle of that is taken; past the last
    one a power law goes on where it is steeper than the line. `at_zero` is the value at 0 of that axis, if known.
    """
    table = table.copy()
    axes = tuple(range(table.ndim)) if order is None else tuple(order)
    for beyond in (False, *(True for _ in axes)):
        for axis in axes:
            if np.isnan(table).any():
                zero = at_zero if axis == convex else None
                line = functools.partial(_fill_line, beyond=beyond, convex=axis == convex, at_zero=zero)
                table = np.apply_along_axis(line, axis, table, np.asarray(knots[axis], float))
    return table


def _fill_line(line: np.ndarray, knots: np.ndarray, *, beyond: bool, convex: bool, at_zero: float | None) -> np.ndarray:
    known = ~np.isnan(line)
    if known.all() or not known.any():
        return line
    x, y = knots[known], line[known]
    if at_zero is not None and x[0] > 0.0:
        x, y = np.concatenate([[0.0], x]), np.concatenate([[at_zero], y])
    if len(x) < 2:
        return np.full(len(line), y[0]) if beyond else line
    line = line.copy()
    for i in np.flatnonzero(~known):
        right = int(np.searchsorted(x, knots[i]))
        if 0 < right < len(x):
            chord = _line(x, y, right - 1, knots[i])
            lines = [_line(x, y, a, knots[i]) for a in (right - 2, right) if 0 <= a < len(x) - 1 and x[a] > 0.0]
            low = max(lines) if convex and lines else chord
            line[i] = (chord + low) / 2.0 if low < chord else chord
        elif beyond:
            line[i] = _line(x, y, 0 if right == 0 else len(x) - 2, knots[i])
            if convex and right > 0 and y[-1] > y[-2] > 0.0 and x[-2] > 0.0:
                line[i] = max(line[i], _power_law(x, y, knots[i]))
    return line


def _line(x: np.ndarray, y: np.ndarray, i: int, at: float) -> float:
    """The line through points i and i + 1."""
    return float(y[i] + (y[i + 1] - y[i]) / (x[i + 1] - x[i]) * (at - x[i]))


def _power_law(x: np.ndarray, y: np.ndarray, at: float) -> float:
    """The one through the last two points, whose values are > 0."""
    exponent = np.log(y[-1] / y[-2]) / np.log(x[-1] / x[-2])
    return float(y[-1] * (at / x[-1]) ** exponent)


def _typical(matrix: sparse.csr_matrix, scale: np.ndarray) -> np.ndarray:
    """The mean scale of the rows around each entry; of all rows where there is none."""
    total = np.asarray(matrix.sum(axis=0)).ravel()
    mean = np.divide(matrix.T @ scale, total, out=np.full(len(total), float(np.mean(scale))), where=total > 0)
    return np.asarray(mean)
