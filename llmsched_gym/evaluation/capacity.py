"""Capacity: the largest arrival rate at which a policy meets a criterion, with an interval over seeds.

Rates lie on one fixed grid, 1.02**k requests per second, searched coarse to fine. At each rate a criterion's conditions
are averaged over the seeds; a non-decreasing fit through these means crosses each condition's limit somewhere, and the
capacity is the smallest crossing. Intervals resample the seeds, the same ones for every policy, so that ratios of
capacities are paired. Search and intervals are one procedure and stand in one file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_gym.config import ConfigError, Scenario, plain
from llmsched_gym.evaluation.capacity_runs import CapacityRuns
from llmsched_gym.evaluation.cells import Cell, Runner
from llmsched_gym.evaluation.criteria import Criterion, criterion, file_name
from llmsched_gym.evaluation.grid import check, finite, seed_range
from llmsched_gym.evaluation.run import make_backend
from llmsched_gym.evaluation.spread import Places
from llmsched_gym.evaluation.store import claim_results, grid_config
from llmsched_gym.files import digest_of, dumps, make_folder, write_text
from llmsched_gym.report.intervals import MIN_SEEDS, resample_quantiles

STEP = 1.02
LOW_QPS, HIGH_QPS = 0.1, 16.0
NUM_RESAMPLES = 1000
COARSE, MEDIUM, SCOUTS = 16, 4, 3  # strides on the grid; seeds that scout with the coarse one

Row = dict[str, Any]


@dataclass
class Capacity:
    """What was found for one policy."""

    policy: str
    criterion: str
    qps: float | None  # None: outside the searched rates, see `note`
    ci_low: float | None = None
    ci_high: float | None = None
    note: str | None = None
    limited_by: str | None = None  # the condition that ends it
    shares: dict[str, Any] = field(default_factory=dict)  # means at the highest rate on the grid that is not above it
    curve: list[dict[str, Any]] = field(default_factory=list)  # per rate, seed mean of each condition's excess
    num_seeds: int = 0
    resamples: np.ndarray | None = None  # (NUM_RESAMPLES,) capacities of resampled seeds

    def to_row(self) -> Row:
        """The capacity as a row of figures; None where there is none."""
        found = {"policy": self.policy, "criterion": self.criterion, "capacity_qps": self.qps}
        return found | {
            "ci_low": self.ci_low,
            "ci_high": self.ci_high,
            "limited_by": self.limited_by,
            "note": self.note,
            **self.shares,
        }


Simulate = Callable[[str, Sequence[tuple[float, int]]], list[Row]]
"""Rows of a policy at (rate, seed) pairs, in their order."""


class Search:
    """Finds capacities on the grid of rates from runs that `simulate` does; each run is done once."""

    def __init__(
        self,
        judged: Criterion,
        simulate: Simulate,
        seeds: Sequence[int],
        qps: tuple[float, float] = (LOW_QPS, HIGH_QPS),
    ) -> None:
        self.judged, self.seeds, self._simulate = judged, list(seeds), simulate
        self.low, self.high = math.ceil(math.log(qps[0], STEP) - 1e-9), math.floor(math.log(qps[1], STEP) + 1e-9)
        if self.low >= self.high:
            raise ConfigError(f"qps: expected a range of rates wider than 2 %, got {qps[0]:g}-{qps[1]:g}")
        self.rows: dict[tuple[str, int, int], Row] = {}  # by policy, rate's place on the grid, seed
        self._quantiles = resample_quantiles(max(len(self.seeds), MIN_SEEDS))
        draws = np.random.default_rng(0).integers(len(self.seeds), size=(NUM_RESAMPLES, len(self.seeds)))
        # how often each resample has each seed; the first is the sample itself
        self._weights = np.stack([np.bincount(draw, minlength=len(self.seeds)) for draw in draws]).astype(float)
        self._weights = np.concatenate([np.ones((1, len(self.seeds))), self._weights])

    def find(self, policy: str) -> Capacity:
        """The capacity of one policy."""
        bracket = self._scout(policy)
        if isinstance(bracket, str):
            return Capacity(policy, self.judged.name, None, note=bracket)
        low, high = max(bracket[0] - MEDIUM, self.low), min(bracket[1] + MEDIUM, self.high)
        rates = set(range(low, high, MEDIUM)) | {high}
        while True:
            self._run(policy, rates, self.seeds)
            places, limits = self._cross(policy, sorted(rates), self._weights)
            first, last = (np.quantile(places, q) for q in self._quantiles)
            first, last = math.floor(first), math.ceil(last)
            # what lies at the edge of the rates that were run may lie beyond
            first, last = first - (MEDIUM if first <= min(rates) else 1), last + (MEDIUM if last >= max(rates) else 1)
            wanted = set(range(max(first, self.low), min(last, self.high) + 1))
            if wanted <= rates:
                return self._result(policy, sorted(rates), places, limits[0])
            rates |= wanted

    def _result(self, policy: str, rates: list[int], places: np.ndarray, limit: int) -> Capacity:
        place, name = float(places[0]), self.judged.conditions[limit].name
        found = Capacity(policy, self.judged.name, STEP**place, limited_by=name)
        found.curve = [self._means(policy, k) for k in rates]
        if not self.low < place < self.high:
            found.qps, found.limited_by = None, None
            found.note = self._not_met(policy) if place <= self.low else self._beyond(self.high, "still")
            return found
        below = max(k for k in rates if k <= place)
        found.shares = {"at_qps": STEP**below} | _shares([self.rows[policy, below, seed] for seed in self.seeds])
        if len(self.seeds) >= MIN_SEEDS:
            found.num_seeds, found.resamples = len(self.seeds), STEP ** places[1:]
            found.ci_low, found.ci_high = (float(q) for q in np.quantile(found.resamples, self._quantiles))
        return found

    @staticmethod
    def _beyond(k: int, how: str) -> str:
        return f"{how} met at {STEP**k:.3g} requests/s, the end of the searched range"

    def _means(self, policy: str, k: int) -> dict[str, Any]:
        rows = [self.rows[policy, k, seed] for seed in self.seeds]
        values = {c.name: [v for v in map(c.excess, rows) if v is not None] for c in self.judged.conditions}
        return {"qps": STEP**k} | {name: float(np.mean(v)) if v else None for name, v in values.items()}

    def _scout(self, policy: str) -> tuple[int, int] | str:
        """Two rates on the grid, the criterion met at the lower and not at the higher by a few seeds' means."""
        seeds = self.seeds[:SCOUTS]

        def met(k: int) -> bool:
            self._run(policy, {k}, seeds)
            rows = [self.rows[policy, k, seed] for seed in seeds]
            values = ([v for v in map(c.excess, rows) if v is not None] for c in self.judged.conditions)
            return all(not v or float(np.mean(v)) <= 0.0 for v in values)

        k = min(max(0, self.low), self.high)
        if met(k):
            while k < self.high:
                k, last = min(k + COARSE, self.high), k
                if not met(k):
                    return last, k
            return self._beyond(k, "still")
        while k > self.low:
            k, last = max(k - COARSE, self.low), k
            if met(k):
                return k, last
        return self._not_met(policy)

    def _not_met(self, policy: str) -> str:
        """Which conditions fail at the lowest rate, and that requests were too long for the engine if any were."""
        rows = [row for seed in self.seeds if (row := self.rows.get((policy, self.low, seed))) is not None]
        failing = []
        for condition in self.judged.conditions:
            values = [v for v in map(condition.excess, rows) if v is not None]
            failing += [condition.name] if values and float(np.mean(values)) > 0.0 else []
        note = f"{self._beyond(self.low, 'not')}: {', '.join(failing)}"
        rejected = np.mean([row.get("num_rejected", 0) / row["num_requests"] for row in rows])
        if rejected > 0.0:
            note += (
                f" ({100 * rejected:.2g} % are rejected, too long for max_model_len or memory, and count as infinite)"
            )
        return note

    def _run(self, policy: str, rates: set[int], seeds: Sequence[int]) -> None:
        missing = [(k, seed) for k in sorted(rates) for seed in seeds if (policy, k, seed) not in self.rows]
        if missing:
            rows = self._simulate(policy, [(STEP**k, seed) for k, seed in missing])
            self.rows |= {(policy, k, seed): row for (k, seed), row in zip(missing, rows, strict=True)}

    def _cross(self, policy: str, rates: list[int], weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each resample's capacity lies on the grid of rates, and the number of the condition that ends it."""
        crossings = []
        for condition in self.judged.conditions:
            excess = np.array(
                [[condition.excess(self.rows[policy, k, seed]) for k in rates] for seed in self.seeds], float
            )
            known = ~np.isnan(excess)
            with np.errstate(invalid="ignore"):
                means = (weights @ np.where(known, excess, 0.0)) / (weights @ known)
            crossings.append([crossing(rates, mean) for mean in means])
        return np.min(crossings, axis=0), np.argmin(crossings, axis=0)


def crossing(rates: Sequence[float], means: np.ndarray) -> float:
    """Where the non-decreasing fit through `means` at `rates` exceeds 0; the first or last rate if it does so nowhere.

    A nan has nothing to say.
    """
    from scipy.optimize import isotonic_regression

    known = ~np.isnan(means)
    if not known.any():
        return float(rates[-1])
    x, y = np.asarray(rates, float)[known], isotonic_regression(means[known]).x
    above = int(np.searchsorted(y, 0.0, side="right"))
    if above in (0, len(y)):
        return float(rates[0] if above == 0 else rates[-1])
    return float(x[above - 1] - y[above - 1] * (x[above] - x[above - 1]) / (y[above] - y[above - 1]))


def _shares(rows: Sequence[Row]) -> dict[str, Any]:
    """Who was served at one load: seed means of the shares attained, refused, abandoned, in all and by tenths.

    Runs of sessions have the share of turns that were cancelled, too, which are misses like the others.
    """
    shares: dict[str, Any] = {"attained": float(np.mean([row["slo_attainment"] for row in rows]))}
    lost = ["refused", "abandoned"] + ["cancelled"] * (rows[0].get("num_sessions") is not None)
    for name in lost:
        shares[name] = float(np.mean([row[f"num_{name}"] / row["num_requests"] for row in rows]))
    for name in ("attained", *lost):
        tenths = zip(*(row[f"{name}_by_decile"] for row in rows), strict=True)
        means = ([share for share in tenth if share is not None] for tenth in tenths)
        shares[f"{name}_by_decile"] = [float(np.mean(m)) if m else None for m in means]
    return shares


def ratios(found: Sequence[Capacity], base: int = 0) -> list[dict[str, Any]]:
    """Each capacity over that of `found[base]`; intervals resample the seeds jointly. None where either is unknown."""
    reference = found[base]
    entries = []
    for other in found:
        ratio = other.qps / reference.qps if other.qps and reference.qps else None
        low = high = None
        if other.resamples is not None and reference.resamples is not None:
            quantiles = resample_quantiles(reference.num_seeds)
            low, high = (float(q) for q in np.quantile(other.resamples / reference.resamples, quantiles))
        entries.append({"ratio_to": reference.policy, "ratio": ratio, "ratio_ci_low": low, "ratio_ci_high": high})
    return entries


def capacity(
    scenario: Scenario,
    policies: Sequence[str],
    judged: str,
    *,
    qps: tuple[float, float] = (LOW_QPS, HIGH_QPS),
    seeds: int = 20,
    first_seed: int = 0,
    workers: Places | None = 1,
    out: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Capacity]:
    """The capacity of each policy under the criterion `judged` (see `criteria`), searched between the rates `qps`.

    The other arguments are those of `grid.evaluate`, and `progress` is called when runs are planned, too; the folder
    `out` gets ``capacity-CRITERION.json``, and does no run of a search again that was interrupted there. Pass the
    result to `ratios` to compare policies.
    """
    scenario, policies = finite(scenario), list(dict.fromkeys(policies))
    conditions, numbers = criterion(judged), seed_range(seeds, first_seed)
    low, high = plain(qps)
    qps = (float(low), float(high))
    check(scenario, policies, qps, numbers.start)
    settings = {"criterion": conditions.name, "qps": list(qps), "seeds": len(numbers), "first_seed": numbers.start}
    config: dict[str, Any] = {}
    with ExitStack() as stack:
        kept: CapacityRuns | None = None
        if out is not None:
            claim_results(out)
            make_folder(Path(out))
            config = grid_config(scenario, policies, **settings)
            kept = stack.enter_context(CapacityRuns(Path(out), file_name(conditions.name), digest_of(config)))
        runner = stack.enter_context(Runner(scenario, workers, backend=make_backend(scenario, workers)))
        done = planned = 0

        def simulate(policy: str, runs: Sequence[tuple[float, int]]) -> list[Row]:
            nonlocal done, planned
            held = {} if kept is None else kept.rows
            rows = [held.get((policy, *run), {}) for run in runs]
            planned, done = planned + len(runs), done + sum(map(bool, rows))
            if progress is not None:
                progress(done, planned)
            left = [Cell(i, policy, *run) for i, run in enumerate(runs) if not rows[i]]
            for cell, row in runner.run(left):
                rows[cell.index] = row
                if kept is not None:
                    kept.add(policy, *runs[cell.index], row)
                done += 1
                if progress is not None:
                    progress(done, planned)
            return rows

        search = Search(conditions, simulate, numbers, qps)
        found = [search.find(policy) for policy in policies]
        if out is not None and kept is not None:
            results = {
                "config": config,
                "results": [item.to_row() | ratio for item, ratio in zip(found, ratios(found), strict=True)],
                "curves": {item.policy: item.curve for item in found},
            }
            write_text(Path(out) / f"capacity-{file_name(conditions.name)}.json", dumps(results))
            kept.done()
    return found
