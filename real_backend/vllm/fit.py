"""A cost profile fitted while a server runs: least squares on the batches measured lately."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import nnls

FORGET = 0.999  # weight of a batch after one more: the last 1,000 or so count
EVERY = 64  # batches between two fits
FIRST = 16  # batches before the first
_RIDGE = 1e-6  # of each diagonal, towards the smallest solution


class OnlineFit:
    """Seconds of a batch as base + token * tokens + pair * query-key pairs + kv * KV tokens read, none below 0.

    Batches count by the square of their relative errors, since a long one must not decide about all others.
    """

    def __init__(self) -> None:
        self.gram = np.zeros((4, 4))  # of the terms
        self.moment = np.zeros(4)  # terms against seconds
        self.coefficients: np.ndarray | None = None  # base, token, pair, kv in seconds; (4,) float64
        self._new: list[tuple[float, float, float, float]] = []

    def add(self, tokens: float, pairs: float, kv_tokens: float, seconds: float) -> bool:
        """Take a measured batch in; whether the coefficients have been fitted anew."""
        if not seconds > 0.0:
            return False
        self._new.append((tokens, pairs, kv_tokens, seconds))
        if len(self._new) < (FIRST if self.coefficients is None else EVERY):
            return False
        batches = np.array(self._new)
        self._new.clear()
        terms = np.column_stack([np.ones(len(batches)), batches[:, :3]]) / batches[:, 3:]
        weights = FORGET ** np.arange(len(batches))[::-1]
        kept = FORGET ** len(batches)
        self.gram = kept * self.gram + (weights * terms.T) @ terms
        self.moment = kept * self.moment + weights @ terms
        self.coefficients = self._solve()
        return True

    def _solve(self) -> np.ndarray:
        scale = np.sqrt(np.maximum(np.diag(self.gram), 1e-300))
        gram = self.gram / scale[:, None] / scale + _RIDGE * np.eye(4)
        root = np.linalg.cholesky(gram)  # gram = root @ root.T
        found, _ = nnls(root.T, np.linalg.solve(root, self.moment / scale))
        return np.asarray(found / scale)

    def write(self, state: Any) -> None:
        """Let the scheduler's own profile of an engine's state say what has been fitted."""
        if self.coefficients is None:
            return
        base, token, pair, kv = self.coefficients
        linear_s = state.own_linear_s[0]
        linear_s[1:] = base + token * np.arange(1, len(linear_s))
        linear_s[0] = 0.0
        state.own_coef_s[0, :2] = pair, kv
