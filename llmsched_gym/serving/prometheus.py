"""The server's own histograms of TTFT and ITL against what its client measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmsched_gym.serving.stream import ServerError

if TYPE_CHECKING:
    from llmsched_gym.serving.client import Client

HISTOGRAMS = {"ttft": "vllm:time_to_first_token_seconds", "itl": "vllm:inter_token_latency_seconds"}
QUANTILES = (0.5, 0.9, 0.99)
NEIGHBOUR = 1
"""Buckets by which a percentile may be off: the client is on the other side of the network, and so later."""


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of latencies up to each bound; arrays have shape (num_buckets,)."""

    bounds_s: np.ndarray  # float64, increasing; the last is infinite
    counts: np.ndarray  # float64, cumulative
    created_s: float = 0.0  # when the server began to count, where it says so

    def less(self, before: Histogram) -> Histogram:
        """What has come since `before`."""
        goes_on = self.created_s == before.created_s and np.array_equal(self.bounds_s, before.bounds_s)
        if not goes_on or (self.counts < before.counts).any():
            raise ServerError("check_metrics: the server's histograms began anew: it was restarted during the run")
        return Histogram(self.bounds_s, self.counts - before.counts)

    def bucket(self, q: float) -> int:
        """The bucket in which the q-quantile lies; there must be counts."""
        return int(np.searchsorted(self.counts, q * self.counts[-1], side="left"))

    @classmethod
    def of(cls, seconds: np.ndarray, bounds_s: np.ndarray) -> Histogram:
        """The histogram of given latencies over the same buckets."""
        return cls(bounds_s, np.searchsorted(np.sort(seconds), bounds_s, side="right").astype(np.float64))


@dataclass(frozen=True)
class Agreement:
    """How a client's latencies stand to the server's histogram of the same run."""

    name: str
    client_count: int
    server_count: int
    buckets_apart: tuple[int, ...]  # at QUANTILES: the client's bucket less the server's
    client_s: tuple[float, ...]  # at QUANTILES
    server_s: tuple[tuple[float, float], ...]  # at QUANTILES: the ends of the server's bucket
    largest_difference: float  # of the two cumulative shares, at any bound

    @property
    def agrees(self) -> bool:
        """Whether every percentile lies in the server's bucket of it or a neighbouring one."""
        return all(abs(apart) <= NEIGHBOUR for apart in self.buckets_apart)

    def words(self) -> str:
        """The comparison in a line."""
        parts = []
        for q, apart, own_s, (low_s, high_s) in zip(
            QUANTILES, self.buckets_apart, self.client_s, self.server_s, strict=True
        ):
            off = "" if apart == 0 else f", {apart:+d} bucket{'s' if abs(apart) > 1 else ''}"
            parts.append(f"p{100 * q:g} {1e3 * own_s:.1f} ms in ({1e3 * low_s:g}, {1e3 * high_s:g}]{off}")
        counts = f"{self.client_count:,} of the client, {self.server_count:,} of the server"
        far = f"cumulative shares differ by {100 * self.largest_difference:.1f} % at most"
        return f"{self.name.upper()}: {'; '.join(parts)}; {far} ({counts})"


def compare(name: str, seconds: np.ndarray, server: Histogram) -> Agreement:
    """A client's latencies, (n,), against the server's; :class:`ServerError` where either has none."""
    total = server.counts[-1]
    if not len(seconds) or not total:
        raise ServerError(f"check_metrics: no {name} to compare: the client has {len(seconds)}, the server {total:g}")
    client = Histogram.of(seconds, server.bounds_s)
    apart, own, theirs = [], [], []
    low_s = np.concatenate([[0.0], server.bounds_s])
    for q in QUANTILES:
        bucket = server.bucket(q)
        apart.append(client.bucket(q) - bucket)
        own.append(float(np.quantile(seconds, q)))
        theirs.append((float(low_s[bucket]), float(server.bounds_s[bucket])))
    difference = np.abs(client.counts / client.counts[-1] - server.counts / total).max()
    return Agreement(name, len(seconds), int(total), tuple(apart), tuple(own), tuple(theirs), float(difference))


def parse(text: str, model: str) -> dict[str, Histogram]:
    """HISTOGRAMS in an exposition of metrics, by name, added up over engines; those of other models left out."""
    from prometheus_client.parser import text_string_to_metric_families

    wanted = {metric: name for name, metric in HISTOGRAMS.items()}
    found: dict[str, dict[float, float]] = {}
    created_s: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        begun = wanted.get(family.name.removesuffix("_created"))
        if begun is not None and family.name.endswith("_created"):
            created_s[begun] = max(sample.value for sample in family.samples)
        if family.name not in wanted:
            continue
        for sample in family.samples:
            if sample.name != f"{family.name}_bucket" or sample.labels.get("model_name", model) != model:
                continue
            counts = found.setdefault(wanted[family.name], {})
            bound_s = float(sample.labels["le"].replace("+Inf", "inf"))
            counts[bound_s] = counts.get(bound_s, 0.0) + sample.value
    return {
        name: Histogram(
            np.array(sorted(counts)), np.array([counts[bound] for bound in sorted(counts)]), created_s.get(name, 0.0)
        )
        for name, counts in found.items()
        if math.inf in counts
    }


async def scrape(client: Client, model: str) -> dict[str, Histogram]:
    """The server's histograms now; :class:`ServerError` with one line if it has none."""
    status, text = await client.get("/metrics")
    if status != 200:
        raise ServerError(f"check_metrics: {client.base}/metrics says HTTP {status}")
    try:
        found = parse(text, model)
    except ValueError as error:
        raise ServerError(f"check_metrics: cannot read {client.base}/metrics: {error}") from None
    for name, metric in HISTOGRAMS.items():
        if name not in found:
            raise ServerError(f"check_metrics: {client.base}/metrics has no histogram {metric} of {model!r}")
    return found
