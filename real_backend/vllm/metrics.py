"""Prometheus metrics of the plug-in, where prometheus_client is there; counted first, and told now and then.

The scheduler runs in the engine's process. Set PROMETHEUS_MULTIPROC_DIR before the server starts, and the server's own
``/metrics`` has these too; or let the plug-in listen on a port of its own (`metrics_port`).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from llmsched_gym.config import SLO_CLASSES
from llmsched_gym.real_backend.vllm.lane import Served

COUNTERS = {
    "requests": ("requests that are over", ("slo_class", "outcome")),
    "first_tokens": ("first tokens", ("slo_class", "in_time")),
    "gaps": ("gaps between tokens", ("slo_class", "in_time")),
    "promises": ("requests that could make their TTFT SLO when they came", ("slo_class", "kept")),
    "deferrals": ("decodes left out of a step", ()),
    "preemptions": ("requests preempted by the policy", ()),
    "refusals": ("requests refused by the policy", ()),
    "fallbacks": ("steps left to vLLM's own order", ("reason",)),
    "bad_slos": ("requests with SLOs that could not be used", ()),
}
TELL_EVERY_S = 1.0


class Metrics:
    """Counts by name and labels; :meth:`tell` hands them on."""

    def __init__(self, port: int | None = None) -> None:
        self.counts: Counter[tuple[str, ...]] = Counter()
        self._told: Counter[tuple[str, ...]] = Counter()
        self._told_s = 0.0
        self._counters: dict[str, Any] = {}
        try:
            import prometheus_client
        except ImportError:
            return
        for name, (what, labels) in COUNTERS.items():
            self._counters[name] = _counter(prometheus_client, f"llmsched_{name}", what, labels)
        if port is not None:
            prometheus_client.start_http_server(port)

    def count(self, name: str, *labels: str, by: int = 1) -> None:
        """One more, or `by` more, of `name`."""
        self.counts[(name, *labels)] += by

    def over(self, served: Served, finished: bool, promised: bool) -> None:
        """A request is over; `promised`: it could make its TTFT SLO when it came."""
        slo_class = SLO_CLASSES[served.slo_class]
        outcome = "aborted" if not finished else "attained" if served.attained else "late"
        self.count("requests", slo_class, outcome)
        in_time = served.ttft_s <= served.ttft_slo_s
        if served.ttft_s == served.ttft_s:
            self.count("first_tokens", slo_class, _yes(in_time))
            if promised:
                self.count("promises", slo_class, _yes(in_time))
        if served.num_gaps > served.num_late:
            self.count("gaps", slo_class, "yes", by=served.num_gaps - served.num_late)
        if served.num_late:
            self.count("gaps", slo_class, "no", by=served.num_late)

    def tell(self, now_s: float, at_once: bool = False) -> None:
        """Hand the counts to Prometheus, unless `at_once` at most once in `TELL_EVERY_S` seconds."""
        if now_s - self._told_s < TELL_EVERY_S and not at_once:
            return
        self._told_s = now_s
        for key, total in self.counts.items():
            name, *labels = key
            counter, by = self._counters.get(name), total - self._told[key]
            if counter is not None and by > 0:
                (counter.labels(*labels) if labels else counter).inc(by)
                self._told[key] = total


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _counter(client: Any, name: str, what: str, labels: tuple[str, ...]) -> Any:
    """The counter of that name: a second scheduler in one process counts on the first one's."""
    known = getattr(client.REGISTRY, "_names_to_collectors", {})
    return known.get(name) or client.Counter(name, what, labels)
