"""Arrival processes: unit gaps that a seed fixes, and the clock that turns them into seconds.

The k-th arrival is the k-th partial sum of unit-mean gaps, mapped through the inverse of the cumulated rate. The gaps
do not depend on the rate, so a seed brings the same requests, in the same relative spacing, at every load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from llmsched_gym.config import ConfigError, Scenario
from llmsched_gym.workload.traces import Trace

MAX_ARRIVALS = 20_000_000
"""More requests than this in one episode is taken for a mistake in the settings, not a wish to fill the memory."""
MAX_SWITCHES = 20_000_000
"""Of the rate in one episode: before requests come at rates next to 0, they would fill the memory."""


class Arrivals(Protocol):
    """An endless stream of arrivals."""

    qps: float  # mean rate, 1/s

    def times(self, n: int) -> np.ndarray:
        """The first n arrival times, seconds, float64 of shape (n,); a longer call repeats a shorter one exactly."""
        ...


class RandomArrivals:
    """Unit-mean gaps from `draw_gaps`, laid on the clock `to_seconds`."""

    def __init__(
        self, draw_gaps: Callable[[int], np.ndarray], to_seconds: Callable[[np.ndarray], np.ndarray], qps: float
    ) -> None:
        self.qps = qps
        self._draw_gaps, self._to_seconds = draw_gaps, to_seconds
        self._gaps = np.empty(0)

    def times(self, n: int) -> np.ndarray:
        """The first `n` arrival times, seconds, float64 (n,); more are drawn where needed."""
        if n > len(self._gaps):
            self._gaps = np.concatenate([self._gaps, self._draw_gaps(n - len(self._gaps))])
        return self._to_seconds(np.cumsum(self._gaps[:n]))

    def parts(self, size: int) -> Iterator[np.ndarray]:
        """The times of :meth:`times`, `size` at a time and without end, of which none are kept. Once, and alone."""
        last = 0.0  # in unit time
        while True:
            unit = np.cumsum(np.concatenate([[last], self._draw_gaps(size)]))[1:]
            last = float(unit[-1])
            yield self._to_seconds(unit)


class ReplayArrivals:
    """The arrivals of a trace from row `first` on, scaled to the mean rate `qps` (None: the trace's own).

    Behind its last row the trace starts over, one mean gap later.
    """

    def __init__(self, trace: Trace, qps: float | None, first: int = 0) -> None:
        if trace.arrival_s is None:
            raise ConfigError(f"trace_arrivals: keep needs arrival times; {trace.name} ({trace.format}) has none")
        rate = trace.qps
        if rate is None:
            raise ConfigError(f"trace_arrivals: keep needs a rate; {trace.name} has a single arrival time")
        self.qps = rate if qps is None else float(qps)
        self.first = first
        self._arrival_s = trace.arrival_s
        self._period_s = len(trace) / rate
        self._scale = 1.0 if qps is None else rate / qps

    def times(self, n: int) -> np.ndarray:
        """The first `n` arrival times, seconds, float64 (n,): the trace's, lap after lap."""
        lap, row = np.divmod(np.arange(self.first, self.first + n), len(self._arrival_s))
        since: np.ndarray = self._arrival_s[row] + lap * self._period_s - self._arrival_s[self.first]
        # Rounding at the seam between two laps must not turn the clock back.
        seconds: np.ndarray = np.maximum.accumulate(since * self._scale)
        return seconds

    def before(self, n: int) -> np.ndarray:
        """When the `n` rows before the first came, that next to it first, seconds below 0, float64 (n,)."""
        lap, row = np.divmod(self.first - 1 - np.arange(n), len(self._arrival_s))
        since: np.ndarray = self._arrival_s[row] + lap * self._period_s - self._arrival_s[self.first]
        seconds: np.ndarray = np.minimum(since * self._scale, -1e-9)  # who came with the first came just before it
        return seconds


class SwitchingClock:
    """Unit time to seconds under a rate that alternates between two values, held for times from `draw_holds`."""

    def __init__(self, rates: tuple[float, float], draw_holds: Callable[[int], np.ndarray]) -> None:
        self.rates = rates  # (first, second), 1/s
        self._draw_holds = draw_holds
        self._holds = np.empty(0)

    def __call__(self, unit: np.ndarray) -> np.ndarray:
        seconds, cumulated = self._knots()
        while len(unit) and cumulated[-1] < unit[-1]:
            if len(self._holds) > MAX_SWITCHES / 2:
                low = min(self.rates)
                raise ConfigError(f"qps: at {low:g} requests a second the rate switches too often before they come")
            self._holds = np.concatenate([self._holds, self._draw_holds(max(32, len(self._holds)))])
            seconds, cumulated = self._knots()
        return np.asarray(np.interp(unit, cumulated, seconds))

    def _knots(self) -> tuple[np.ndarray, np.ndarray]:
        seconds, cumulated = np.zeros((2, len(self._holds) + 1))
        rate = np.resize(self.rates, len(self._holds))
        np.cumsum(self._holds, out=seconds[1:])
        np.cumsum(self._holds * rate, out=cumulated[1:])
        return seconds, cumulated


def random_arrivals(
    kind: str, scenario: Scenario, uniforms: np.ndarray, gaps: np.random.Generator, holds: np.random.Generator
) -> RandomArrivals:
    """The process `kind`: poisson, gamma, mmpp or switching.

    `uniforms` (2,): draws of the episode's rate and of the side a two-rate process starts on. Hold times are
    exponential for mmpp, uniform in `switch_every_s` for switching, and a fresh one starts at time 0. A given `qps` is
    the mean over time: both rates of the pair `qps_range` are scaled alike to reach it.
    """

    def unit_gaps(n: int) -> np.ndarray:
        if kind == "gamma":
            return gaps.standard_gamma(scenario.burstiness, n) / scenario.burstiness
        return gaps.standard_exponential(n)

    low, high = scenario.qps_range
    if kind in ("poisson", "gamma"):
        qps = float(scenario.qps) if scenario.qps is not None else low + (high - low) * float(uniforms[0])
        return RandomArrivals(unit_gaps, lambda unit: unit / qps, qps)

    shortest, longest = scenario.switch_every_s

    def hold_times(n: int) -> np.ndarray:
        if kind == "mmpp":
            return holds.standard_exponential(n) * (0.5 * (shortest + longest))
        return shortest + (longest - shortest) * holds.random(n)

    qps = float(scenario.qps) if scenario.qps is not None else 0.5 * (low + high)
    scale = qps / (0.5 * (low + high))
    rates = (low * scale, high * scale) if uniforms[1] < 0.5 else (high * scale, low * scale)
    return RandomArrivals(unit_gaps, SwitchingClock(rates, hold_times), qps)


def arrivals_until(arrivals: Arrivals, end_s: float) -> np.ndarray:
    """All arrival times up to and including `end_s`, shape (n,)."""
    n = first_guess(arrivals.qps * end_s)
    times = arrivals.times(n)
    while times[-1] <= end_s:
        n = first_guess(1.5 * n)
        times = arrivals.times(n)
    return times[: np.searchsorted(times, end_s, "right")]


def measured_arrivals(
    arrivals: Arrivals, warmup_s: float, num_requests: int, drain_s: float
) -> tuple[np.ndarray, int, int]:
    """Arrival times of a finite run, and the bounds of its cohort.

    The cohort is the first `num_requests` arrivals at or after `warmup_s`; what comes before is warm-up, and arrivals
    go on for `drain_s` behind its last one (0: it is the last).
    """
    n = first_guess(num_requests + arrivals.qps * (warmup_s + drain_s))
    while True:
        times = arrivals.times(n)
        start = int(np.searchsorted(times, warmup_s, "left"))
        stop = start + num_requests
        if n >= stop and drain_s == 0.0:
            return times[:stop], start, stop
        if n > stop and times[-1] > times[stop - 1] + drain_s:
            return times[: np.searchsorted(times, times[stop - 1] + drain_s, "right")], start, stop
        n = first_guess(1.5 * n)


def first_guess(expected: float) -> int:
    """Arrivals to draw so that `expected` of them nearly always suffice."""
    if expected > MAX_ARRIVALS:
        raise ConfigError(f"qps: about {expected:.3g} requests in one episode; at most {MAX_ARRIVALS:,} are supported")
    return int(expected + 4.0 * expected**0.5) + 8
