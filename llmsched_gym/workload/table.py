"""The request table: what an episode's clients will ask for, drawn before it starts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class RequestTable:
    """Requests sorted by arrival, as a struct of arrays; all arrays have shape (num_requests,).

    ``output_tokens`` is hidden from schedulers. Requests ``cohort_start <= i < cohort_stop`` are the measured ones.
    """

    arrival_s: np.ndarray  # float64, seconds, not decreasing
    prompt_tokens: np.ndarray  # int32, >= 1
    output_tokens: np.ndarray  # int32, >= 1
    slo_class: np.ndarray  # int8, index into config.SLO_CLASSES
    ttft_slo_s: np.ndarray  # float64
    tbt_slo_s: np.ndarray  # float64
    length_hint: np.ndarray  # float64, predicted output tokens; nan without a hint
    session_id: np.ndarray  # int64, -1 without sessions
    cohort_start: int
    cohort_stop: int
    qps: float  # mean rate of the episode, 1/s
    cost_scale: float  # hidden factor on batch times
    seed: int
    arrivals: str = "given"  # the process behind them, "trace" for a trace's own times

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def gap_start(self) -> np.ndarray:
        """Where the gaps between each request's tokens begin, were they all in one row; int64 (num_requests,)."""
        gaps = self.output_tokens.astype(np.int64) - 1
        return np.cumsum(gaps) - gaps
