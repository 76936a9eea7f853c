"""Criteria of a capacity: what the runs at one rate must meet, parsed from one line.

A criterion is terms separated by commas, all of which must hold. A term bounds a figure of the rows of runs, as in
``ttft.p99<=2``, ``itl.strict.p99<=0.1`` or ``attainment>=0.95``, or is one of four that have names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmsched_gym.config import SLO_CLASSES, ConfigError
from llmsched_gym.files import digest_of

TTFT_LIMIT_S = 0.5  # of the paper's capacity
LONGEST = 150  # characters of a file's name
HUGE = 1e4  # stands for an infinite latency in a mean

LATENCIES: dict[str, tuple[str, ...]] = {
    "ttft": ("p50", "p90", "p99", "mean"),
    "itl": ("p50", "p99"),
    "tpot": ("p50", "p99"),
    "e2e": ("p50", "p99"),
    "queue_time": ("p50", "p99"),
}
"""Latencies that can be bounded, with the figures that rows have of them."""

OF_CLASSES: dict[str, tuple[str, ...]] = {"ttft": ("p50", "p99"), "itl": ("p50", "p99")}
"""Those that rows have of each class of users."""

FORMS = "METRIC.FIGURE<=SECONDS, attainment>=SHARE, ttft-median, paper, attainment:X or serve-all:X"

Row = dict[str, Any]


@dataclass(frozen=True)
class Condition:
    """Met while the mean over seeds of `excess`, expected to grow with the load, is not above 0."""

    name: str
    excess: Callable[[Row], float | None]  # None: the run has nothing to judge


@dataclass(frozen=True)
class Criterion:
    """What a run must meet: all of the conditions."""

    name: str
    conditions: tuple[Condition, ...]


def criterion(text: str) -> Criterion:
    """The criterion that `text` says; ConfigError, one line, where it says none.

    Terms are ``METRIC[.CLASS].FIGURE<=SECONDS`` of :data:`LATENCIES` and :data:`OF_CLASSES`,
    ``attainment[.CLASS]>=SHARE``, ``ttft-median`` (`ttft.p50<=0.5`), ``paper`` (with the p99 ITL of each class within
    its SLO), ``attainment:X`` and ``serve-all:X`` (nobody is left behind for it).
    """
    text = "".join(text.split())
    conditions = [condition for term in text.split(",") for condition in _term(term)]
    names = [condition.name for condition in conditions]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"criterion: expected one limit of a figure, got two of {name} in {text!r}")
    return Criterion(text, tuple(conditions))


def file_name(text: str) -> str:
    """A criterion as a part of a file's name on any system, which takes some 250 characters."""
    name = text.replace("<=", "-max-").replace(">=", "-min-").replace(",", "-").replace(":", "-")
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 13]}-{digest_of(text)}"


def _term(text: str) -> list[Condition]:
    bound = re.fullmatch(r"([^<>=]*)(<=|>=|<|>|=)([^<>=]*)", text)
    if bound is not None:
        return [_bounded(*bound.groups())]
    name, colon, number = text.partition(":")
    if text in ("ttft-median", "paper"):
        ttft = _latency("ttft", None, "p50", TTFT_LIMIT_S)
        return [ttft] if text == "ttft-median" else [ttft, *(_itl_within_slo(c) for c in SLO_CLASSES)]
    if name not in ("attainment", "serve-all") or not colon:
        quotes = " (quote it: a shell takes < and > for itself)" if re.fullmatch(r"[a-z_]+(\.\w+)*", text) else ""
        raise ConfigError(f"criterion: expected {FORMS}, got {text!r}{quotes}")
    share = _share(text, number)
    attainment = _attainment(None, share)
    return [attainment] if name == "attainment" else [attainment, *_nobody_left(share)]


def _bounded(figure: str, sign: str, number: str) -> Condition:
    """The condition of one bound, such as `ttft.strict.p99`, `<=`, `0.5`."""
    term = f"{figure}{sign}{number}"
    metric, *rest = figure.split(".")
    if metric not in ("attainment", *LATENCIES):
        known = ", ".join((*LATENCIES, "attainment"))
        raise ConfigError(f"criterion: expected one of {known}, got {metric!r} in {term!r}")
    wanted = ">=" if metric == "attainment" else "<="
    if sign != wanted:
        raise ConfigError(f"criterion: expected {figure}{wanted}{number or 'NUMBER'}, got {term!r}")
    slo_class = rest.pop(0) if rest and rest[0] in SLO_CLASSES else None
    if metric == "attainment":
        if rest:
            classes = " or ".join(f"attainment.{name}" for name in SLO_CLASSES)
            raise ConfigError(f"criterion: expected attainment, {classes}, got {figure!r}")
        return _attainment(slo_class, _share(term, number))
    known_figures = LATENCIES[metric] if slo_class is None else OF_CLASSES.get(metric, ())
    if not known_figures:
        names = " and ".join(OF_CLASSES)
        raise ConfigError(f"criterion: expected {names} where a class is named, got {term!r}")
    if len(rest) != 1 or rest[0] not in known_figures:
        of_class = metric if slo_class is None else f"{metric}.{slo_class}"
        expected = ", ".join(f"{of_class}.{name}" for name in known_figures)
        raise ConfigError(f"criterion: expected one of {expected}, got {figure!r}")
    limit_s = _number(number)
    if not 0.0 < limit_s < HUGE:
        raise ConfigError(f"criterion: expected seconds above 0 and below {HUGE:g}, got {number!r} in {term!r}")
    return _latency(metric, slo_class, rest[0], limit_s)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _share(term: str, text: str) -> float:
    share = _number(text)
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"criterion: expected a share above 0 and at most 1, got {text!r} in {term!r}")
    return share


def _latency(metric: str, slo_class: str | None, figure: str, limit_s: float) -> Condition:
    column = f"{metric}_{figure}_s"
    name = f"{'median' if figure == 'p50' else figure} {metric.replace('_', ' ') if '_' in metric else metric.upper()}"

    def excess(row: Row) -> float | None:
        if metric in ("itl", "tpot") and row[column] is None:
            return None  # nobody has a second token, and missing first ones are TTFT's
        return _or_huge(row[column]) - limit_s

    def excess_of_class(row: Row) -> float | None:
        counts = row["num_gaps_by_class" if metric == "itl" else "num_requests_by_class"]
        return _or_huge(row[f"{column}_by_class"][slo_class]) - limit_s if counts[slo_class] else None

    if slo_class is None:
        return Condition(name, excess)
    return Condition(f"{name} of {slo_class} users", excess_of_class)


def _itl_within_slo(slo_class: str) -> Condition:
    def excess(row: Row) -> float | None:
        if not row["num_gaps_by_class"][slo_class]:
            return None
        return _or_huge(row["itl_p99_s_by_class"][slo_class]) - row["tbt_slo_s_by_class"][slo_class]

    return Condition(f"p99 ITL of {slo_class} users", excess)


def _attainment(slo_class: str | None, share: float) -> Condition:
    if slo_class is None:
        return Condition("attainment", lambda row: share - row["slo_attainment"])
    name = f"attainment of {slo_class} users"
    return Condition(name, lambda row: _below(share, row["slo_attainment_by_class"][slo_class]))


def _nobody_left(share: float) -> list[Condition]:
    return [
        _attainment("strict", share),
        Condition("attainment of the longest prompts", lambda row: _below(0.5, row["attained_by_decile"][-1])),
        Condition("refused or abandoned", lambda row: _lost(row) / row["num_requests"] - 0.01),
    ]


def _lost(row: Row) -> int:
    """Requests that were refused or left, and the turns that were to follow them."""
    return int(row["num_refused"] + row["num_abandoned"] + row.get("num_cancelled", 0))


def _or_huge(seconds: float | None) -> float:
    return HUGE if seconds is None else min(seconds, HUGE)


def _below(limit: float, share: float | None) -> float | None:
    return None if share is None else limit - share
