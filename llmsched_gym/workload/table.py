"""The request table: what an episode's clients will ask for, drawn before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from llmsched_gym.config import MOST, SLO_CLASSES, ConfigError
from llmsched_gym.workload.identity import (
    Shares,
    check_known,
    check_lengths,
    check_parents,
    check_sessions,
    check_shares,
)


@dataclass(frozen=True)
class Request:
    """What one client asks for, for an engine that requests enter at run time."""

    prompt_tokens: int  # >= 1
    output_tokens: int  # >= 1, hidden from schedulers; the most, where a backend says when a request has ended
    ttft_slo_s: float = math.inf
    tbt_slo_s: float = math.inf
    slo_class: int = 1  # index into config.SLO_CLASSES
    length_hint: float = math.nan
    session_id: int = -1
    arrival_s: float | None = None  # None: now
    shares_with: int = -1  # the request that has arrived with whose tokens the prompt begins; -1: nobody
    shared_tokens: int = 0  # so many of its prompt and output

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "output_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 1 <= value <= MOST:
                raise ConfigError(f"{name}: expected a whole number from 1 to {MOST:,}, got {value!r}")
        for name, low in (("shares_with", -1), ("shared_tokens", 0)):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or not low <= value <= MOST:
                raise ConfigError(f"{name}: expected a whole number >= {low}, got {value!r}")
        for name in ("ttft_slo_s", "tbt_slo_s"):
            value = getattr(self, name)
            if not isinstance(value, int | float | np.number) or not value > 0.0:
                raise ConfigError(f"{name}: expected seconds > 0, got {value!r}")
        if self.arrival_s is not None and not isinstance(self.arrival_s, int | float | np.number):
            raise ConfigError(f"arrival_s: expected seconds or None, got {self.arrival_s!r}")
        if self.slo_class not in range(len(SLO_CLASSES)):
            raise ConfigError(f"slo_class: expected 0 to {len(SLO_CLASSES) - 1}, got {self.slo_class!r}")


@dataclass(frozen=True, eq=False)
class RequestTable:
    """Requests sorted by arrival, as a struct of arrays; all arrays have shape (num_requests,).

    ``output_tokens`` is hidden from schedulers. Requests ``cohort_start <= i < cohort_stop`` are the measured ones.

    With sessions a request may have a `parent`: it is a *turn*, which comes `think_s` after its parent has finished,
    and never if its parent does not. The requests of a session stand side by side, parents before their turns, sessions
    by the arrival of their first request, the *root*. The first `num_past` requests are over when the episode starts:
    all that is left of them is what the prefix cache holds.
    """

    arrival_s: np.ndarray  # float64, seconds, not decreasing; nan for turns, below 0 for what is past
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
    # for prefix caching, see workload.identity; None: no two prompts have anything in common
    shares_with: np.ndarray | None = None  # int32, an earlier request with whose tokens the prompt begins; -1: nobody
    shared_tokens: np.ndarray | None = None  # int32, so many of its prompt and output
    # sessions, all or none
    parent: np.ndarray | None = None  # int32, an earlier request of the session; -1: a root
    think_s: np.ndarray | None = None  # float64, seconds from its parent's last token to its own arrival; 0 for roots
    new_tokens: np.ndarray | None = None  # int32, of the prompt, those that the client has not sent before
    prefix_id: np.ndarray | None = None  # int32, which system prompt a root begins with; -1: one of its own
    prefix_tokens: np.ndarray | None = None  # int32, how long that is
    max_output_tokens: np.ndarray | None = None  # int32, the most that a client accepts, which schedulers see
    num_past: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "output_tokens"):
            check_lengths(name, getattr(self, name), len(self))
        if self.parent is not None:
            check_parents(self.parent, self.think_s)
            check_sessions(self.parent, self.arrival_s, self.num_past, (self.cohort_start, self.cohort_stop))
            if self.shares_with is not None:
                check_known(self.shares_with, self.parent)
        if self.shares_with is not None or self.shared_tokens is not None:
            check_shares(self.identity(), self.prompt_tokens, self.output_tokens)

    def identity(self) -> Shares:
        """``shares_with`` and ``shared_tokens``, whether given or not."""
        if self.shares_with is None or self.shared_tokens is None:
            for name in ("shares_with", "shared_tokens"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name}: needs shares_with and shared_tokens")
            return np.full(len(self), -1, np.int32), np.zeros(len(self), np.int32)
        return self.shares_with, self.shared_tokens

    def __len__(self) -> int:
        return len(self.arrival_s)

    @classmethod
    def of(
        cls,
        arrival_s: ArrayLike,
        prompt_tokens: ArrayLike,
        output_tokens: ArrayLike,
        *,
        slo_class: ArrayLike = 1,
        ttft_slo_s: ArrayLike = math.inf,
        tbt_slo_s: ArrayLike = math.inf,
        length_hint: ArrayLike = math.nan,
        cohort: tuple[int, int] | None = None,
        qps: float = math.nan,
        cost_scale: float = 1.0,
        seed: int = 0,
        arrivals: str = "given",
        shares_with: ArrayLike | None = None,
        shared_tokens: ArrayLike | None = None,
    ) -> RequestTable:
        """A table of given requests: `arrival_s` has shape (num_requests,), all else has it too or is one for all.

        `cohort` is (start, stop), all requests unless given; `arrivals` names the process behind the times. ConfigError
        names an argument of another shape, and a request whose lengths are no whole numbers >= 1.
        """
        times_s = np.asarray(arrival_s, np.float64)
        n = len(times_s)

        def column(name: str, given: ArrayLike, dtype: type) -> np.ndarray:
            if np.shape(given) not in ((), (n,)):
                raise ConfigError(f"{name}: expected one number or {n:,}, got an array of shape {np.shape(given)}")
            return np.full(n, given, dtype)

        def lengths(name: str, given: ArrayLike) -> np.ndarray:
            check_lengths(name, column(name, given, np.float64), n)  # before they are cut to whole numbers
            return column(name, given, np.int32)

        start, stop = cohort or (0, n)
        return cls(
            arrival_s=column("arrival_s", times_s, np.float64),
            prompt_tokens=lengths("prompt_tokens", prompt_tokens),
            output_tokens=lengths("output_tokens", output_tokens),
            slo_class=column("slo_class", slo_class, np.int8),
            ttft_slo_s=column("ttft_slo_s", ttft_slo_s, np.float64),
            tbt_slo_s=column("tbt_slo_s", tbt_slo_s, np.float64),
            length_hint=column("length_hint", length_hint, np.float64),
            session_id=np.full(n, -1, np.int64),
            cohort_start=start,
            cohort_stop=stop,
            qps=qps,
            cost_scale=cost_scale,
            seed=seed,
            arrivals=arrivals,
            shares_with=None if shares_with is None else column("shares_with", shares_with, np.int32),
            shared_tokens=None if shared_tokens is None else column("shared_tokens", shared_tokens, np.int32),
        )

    @property
    def is_root(self) -> np.ndarray:
        """Whether a request comes by itself, rather than after another one; bool (num_requests,)."""
        return np.ones(len(self), np.bool_) if self.parent is None else np.asarray(self.parent < 0)

    @property
    def last_root_s(self) -> float:
        """When the last session of the cohort begins, seconds."""
        roots = self.arrival_s[self.cohort_start : self.cohort_stop]
        if self.cohort_start >= self.cohort_stop:
            raise ConfigError(f"cohort: expected a request to measure, got {self.cohort_start} to {self.cohort_stop}")
        return float(roots[~np.isnan(roots)][-1])

    @property
    def longest_session_s(self) -> float:
        """The longest that a session of the cohort lasts whose SLOs are just met, seconds; 0 without sessions.

        Behind its root's arrival: all times to think, TTFT SLOs, and outputs at their TBT SLOs.
        """
        if self.parent is None:
            return 0.0
        cohort = slice(self.cohort_start, self.cohort_stop)
        spans = np.zeros(len(self)) if self.think_s is None else self.think_s.copy()
        spans += self.ttft_slo_s + (self.output_tokens - 1) * self.tbt_slo_s
        return float(np.bincount(np.cumsum(self.is_root[cohort]) - 1, spans[cohort]).max(initial=0.0))

    @property
    def gap_start(self) -> np.ndarray:
        """Where the gaps between each request's tokens begin, were they all in one row; int64 (num_requests,)."""
        gaps = self.output_tokens.astype(np.int64) - 1
        return np.cumsum(gaps) - gaps
