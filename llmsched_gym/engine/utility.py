"""What counts as in time, and what a request is worth: one definition for the reward, metrics and tuning.

Functions of numbers or of arrays; kernels use the compiled ones.
"""

from __future__ import annotations

from typing import Any

from llmsched_gym.engine.jit import kernel

TOLERANCE = 1e-9
"""Late gaps that rounding may make of a share times a number of gaps."""

RELATIVE_TOLERANCE = 1e-12
"""Of sums of gaps, which rounding may lengthen."""


def late_share(rule: str) -> float:
    """Share of a request's gaps that may be late under the TBT rule every-gap or fraction:X."""
    return 1.0 - float(rule.split(":")[1]) if rule.startswith("fraction") else 0.0


def gaps_in_time(num_late: Any, num_gaps: Any, share: float) -> Any:
    """Whether so many late gaps are within the share that may be."""
    return num_late <= share * num_gaps + TOLERANCE


def mean_in_time(lasted_s: Any, num_gaps: Any, tbt_slo_s: Any) -> Any:
    """Whether the mean of gaps that lasted so long together is within the TBT SLO; none are in time."""
    return lasted_s <= num_gaps * tbt_slo_s * (1.0 + RELATIVE_TOLERANCE)


def utility(attained: Any, lost: Any, beta: float) -> Any:
    """1 for a request that attained, minus beta times what it lost: late seconds as a share of patience; refused, 1."""
    return attained - beta * lost


gaps_in_time_kernel = kernel()(gaps_in_time)
mean_in_time_kernel = kernel()(mean_in_time)
utility_kernel = kernel()(utility)
