"""What became of each request of a run's cohort: latencies, SLOs met, utility; one array each.

A request without a first token has an infinite TTFT. A turn of a session that never came asked for nothing: it has no
latency.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np

from llmsched_gym.engine.due import open_waits
from llmsched_gym.engine.records import ABANDONED, CANCELLED, FINISHED, REFUSED, REJECTED, RUNNING, WAITING
from llmsched_gym.engine.utility import gaps_in_time, late_share, mean_in_time, utility
from llmsched_gym.evaluation.run import Episode

NUM_DECILES = 10


def attains_tbt(rule: str, requests: np.ndarray, num_gaps: np.ndarray, num_late: np.ndarray) -> np.ndarray:
    """Whether the gaps of each finished request are in time under `rule`, one of `config.TBT_RULES`; shape (n,)."""
    if rule == "deadline":
        return np.asarray(requests["deadline_miss_s"] <= 0.0)
    if rule == "mean":
        lasted_s = requests["last_token_s"] - requests["first_token_s"]
        return np.asarray(mean_in_time(lasted_s, num_gaps, requests["tbt_slo_s"]))
    return np.asarray(gaps_in_time(num_late, num_gaps, late_share(rule)))


class Outcomes:
    """What became of each request of the cohort; arrays have shape (num_requests,).

    Latencies of turns that never came are nan.
    """

    def __init__(self, episode: Episode) -> None:
        scenario, requests = episode.scenario, episode.requests[episode.cohort]
        clock_s = float(episode.sim.clock_s)
        self.phase = requests["phase"]
        self.slo_class = requests["slo_class"]
        self.prompt_tokens = requests["prompt_tokens"]
        tokens = requests["num_output_tokens"]
        self.served = tokens > 0
        self.came = ~np.isnan(requests["arrival_s"])  # only turns that never came have no arrival
        self.counts = self.came | (self.phase == CANCELLED)  # in shares of requests
        self.too_long = self.prompt_tokens + episode.table.output_tokens[episode.cohort] > scenario.max_model_len
        self.too_long &= self.came
        self.finished = self.phase == FINISHED
        self.ttft_s = self._since_arrival(requests, "first_token_s")
        self.queue_time_s = self._since_arrival(requests, "first_scheduled_s")
        self.e2e_latency_s = self._since_arrival(requests, "resolved_s")
        self.e2e_latency_s[self.came & ~self.finished] = np.inf
        self.tpot_s = np.full(len(requests), np.nan)  # nan below two tokens
        many = tokens > 1
        self.tpot_s[many] = (requests["last_token_s"] - requests["first_token_s"])[many] / (tokens[many] - 1)

        # A wait that was open when the run ended, or when the client left, is a gap of at least its length.
        pending = (self.phase == RUNNING) | (self.phase == WAITING)
        end_s = np.where(pending, clock_s, requests["resolved_s"])
        waits = self.served & (pending | (self.phase == ABANDONED))
        self.open_gap_s = np.where(waits, end_s - requests["last_token_s"], np.nan)
        self.num_gaps = np.maximum(tokens - 1, 0) + waits
        with np.errstate(invalid="ignore"):
            self.num_late_gaps = requests["num_late_gaps"] + (self.open_gap_s > requests["tbt_slo_s"])
        self.max_itl_s = np.fmax(np.where(many, requests["max_gap_s"], np.nan), self.open_gap_s)

        since_s, slo_s = open_waits(requests)
        open_s = clock_s - since_s - slo_s
        self.lateness_s = requests["lateness_s"] + np.where(pending, np.maximum(open_s, 0.0), 0.0)
        in_time = attains_tbt(scenario.tbt_rule, requests, self.num_gaps, self.num_late_gaps)
        self.attained = self.finished & (self.ttft_s <= requests["ttft_slo_s"]) & in_time
        lost = np.zeros(len(requests))
        if math.isfinite(scenario.patience_s):
            lost = np.minimum(1.0, self.lateness_s / scenario.patience_s)
        lost[self.phase == REJECTED] = 0.0
        lost[self.phase == REFUSED] = 1.0
        self.utility = utility(self.attained, lost, scenario.beta)

    def _since_arrival(self, requests: np.ndarray, event: str) -> np.ndarray:
        """Seconds from each arrival to an event, infinite if it never happened; nan for who never came."""
        seconds = requests[event] - requests["arrival_s"]
        return np.where(self.came & np.isnan(seconds), np.inf, seconds)

    def count(self, *phases: int) -> int:
        """Measured requests that ended in one of these phases."""
        return int(np.isin(self.phase, phases).sum())

    def share(self, mask: np.ndarray, among: np.ndarray | None = None) -> float | None:
        """Share of the requests for which `mask` holds, among those where `among` does; None of nobody."""
        counts = self.counts if among is None else self.counts & among
        return float(mask[counts].mean()) if counts.any() else None

    @cached_property
    def decile_edges(self) -> np.ndarray:
        """Nine prompt lengths that part the cohort into tenths, tokens; an edge belongs to the tenth above it."""
        return np.quantile(self.prompt_tokens, np.arange(1, NUM_DECILES) / NUM_DECILES)

    @cached_property
    def decile(self) -> np.ndarray:
        """Each request's tenth by prompt length, 0 to 9; equal lengths share one, so the last is never empty."""
        return np.searchsorted(self.decile_edges, self.prompt_tokens, side="right")

    def by_decile(self, mask: np.ndarray) -> list[float | None]:
        """Share of each tenth for which `mask` holds; None for an empty tenth."""
        return _shares(mask[self.counts], self.decile[self.counts], NUM_DECILES)


def _shares(mask: np.ndarray, group: np.ndarray, num_groups: int) -> list[float | None]:
    hits = np.bincount(group, weights=mask, minlength=num_groups)
    sizes = np.bincount(group, minlength=num_groups)
    return [float(h / n) if n else None for h, n in zip(hits, sizes, strict=True)]
