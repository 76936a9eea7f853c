"""A folder of results, read as far as a report needs it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from llmsched_gym.fluid import Fluid
from llmsched_gym.report import statistics
from llmsched_gym.report.bounds import fluid_of
from llmsched_gym.report.statistics import BASELINE, ReportError

REQUIRED = ("runs.parquet", "requests.parquet", "config.json")
REQUEST_COLUMNS = ["policy", "qps", "seed", "prompt_tokens", "phase", "ttft_s", "attained"]
OF_REQUESTS = (
    *("index", "slo_class", "ttft_slo_s", "tbt_slo_s", "queue_time_s", "e2e_latency_s", "max_itl_s"),
    *("output_tokens", "num_late_gaps", "num_preemptions"),
)
"""Columns that are shown of single requests, where there are such."""


@dataclass(frozen=True)
class Results:
    """What a report is made of."""

    directory: Path
    config: dict[str, Any]
    rows: pd.DataFrame  # tidy
    focus: float  # the load at which distributions are shown
    requests: pd.DataFrame  # of the focus and the highest load
    itl: pd.DataFrame  # of the focus load; empty if there is none
    steps: pd.DataFrame  # of the focus load and one seed; empty if there is none
    capacity: pd.DataFrame  # empty if there is none
    lives: Sequence[dict[str, Any]] = ()  # of the worst requests at the focus load
    fluid: Fluid | None = None  # of the scenario, where it can be had

    @property
    def suite(self) -> str:
        """The suites that were run."""
        return _suite(self.rows)

    @property
    def repeats_paper(self) -> bool:
        """Whether the paper's comparison was run."""
        return self.suite == "paper"

    @property
    def num_loads(self) -> int:
        """Points on an axis of loads."""
        return int(statistics.binned_loads(self.rows)["load"].nunique())

    @property
    def num_seeds(self) -> int:
        """Seeds behind the best founded point."""
        return int(statistics.binned_loads(self.rows).groupby(["load", "policy"])["seed"].nunique().max())

    @property
    def has_baseline(self) -> bool:
        """Whether there is something to compare with the baseline."""
        return BASELINE in set(self.rows["policy"]) and self.rows["policy"].nunique() > 1

    @property
    def trace_remarks(self) -> list[str]:
        """What a reader should know of the trace, a sentence each."""
        return [str(remark) for remark in self.config.get("trace_remarks") or []]

    def setting(self, name: str, default: Any) -> Any:
        """A field of the scenario."""
        return (self.config.get("scenario") or {}).get(name, default)

    def tbt_slos_s(self) -> dict[str, float]:
        """TBT SLOs by class, seconds."""
        usual = {"strict": 0.1, "relaxed": 0.5}
        return {name: float(self.setting(f"{name}_tbt_slo_s", slo_s)) for name, slo_s in usual.items()}

    def ttft_slo(self) -> tuple[float, float]:
        """Seconds, and seconds per prompt token."""
        return float(self.setting("ttft_slo_s", 0.5)), float(self.setting("ttft_slo_per_token_s", 0.0005))

    def ttft_scales(self) -> list[float]:
        """Factors on the TTFT SLO, one a class of users."""
        return [float(scale) for scale in self.setting("ttft_class_scales", [1.0])]

    def requests_at(self, load: float) -> pd.DataFrame:
        """Requests of the runs at a load."""
        rates = self.rows.loc[self.rows["load"] == load, "qps"].unique()
        return self.requests[self.requests["qps"].isin(rates)]


def _suite(rows: pd.DataFrame) -> str:
    return ", ".join(map(str, rows["suite"].unique())) if "suite" in rows else "unknown"


def read_results(directory: Path) -> Results:
    """Read a folder; one line of error if it cannot be."""
    if not directory.is_dir():
        raise ReportError(f"report: {directory} is no folder")
    for name in REQUIRED:
        if not (directory / name).is_file():
            raise ReportError(f"report: {directory} has no {name}; expected a folder that `evaluate --out` finished")
    name = "config.json"
    try:
        config = json.loads((directory / name).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"expected an object, got {type(config).__name__}")
        name = "runs.parquet"
        rows = statistics.tidy(pd.read_parquet(directory / name))
        drawn = bool(rows["drawn"].any())
        focus, highest = statistics.focus_load(rows), rows["load"].max()
        rates = rows.loc[rows["load"].isin([focus, highest]), "qps"].unique().tolist()
        name = "requests.parquet"
        wanted = None if drawn else [("qps", "in", rates)]
        held = set(pq.read_schema(directory / name).names)
        columns = [*REQUEST_COLUMNS, *(column for column in OF_REQUESTS if column in held)]
        requests = pd.read_parquet(directory / name, columns=columns, filters=wanted)
        name = "itl.parquet"
        itl = _optional(directory / name)
        name = "steps.parquet"
        steps = _optional(directory / name)
        name = "lives.json"
        lives = json.loads((directory / name).read_text("utf-8"))["lives"] if (directory / name).is_file() else []
        name = "capacity.json"
        capacity = _capacities(directory, _suite(rows))
    except (OSError, ValueError, KeyError) as error:
        raise ReportError(f"report: cannot read {directory / name}: {' '.join(str(error).split())}") from None
    if not itl.empty:
        itl = itl.rename(columns={"quantile": "prob"})
        rate = "requested_qps" if "requested_qps" in itl else "qps"
        itl = itl if drawn or itl[rate].isna().all() else itl[np.isclose(itl[rate], focus)]
    if not steps.empty:
        steps = steps[steps["seed"] == steps["seed"].min()]
        steps = steps if drawn else steps[np.isin(steps["qps"], rows.loc[rows["load"] == focus, "qps"])]
    return Results(directory, config, rows, focus, requests, itl, steps, capacity, lives, fluid_of(config))


def _optional(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path) if path.is_file() else pd.DataFrame()


def named(criterion: str) -> str:
    """What figures of a criterion are called."""
    return "capacity-" + re.sub(r"[^a-z0-9.]+", "-", criterion.lower())


def capacity_rows(kept: dict[str, Any]) -> pd.DataFrame:
    """The rows of a capacity-CRITERION.json with the suite and over what they were measured."""
    scenario, seeds = kept["config"]["scenario"], kept["config"]["seeds"]
    source = {"suite": scenario["suite"], "measured": f"{seeds} seeds of {scenario['num_requests']:,} requests"}
    return _numbers(pd.DataFrame([source | row for row in kept["results"]]))


def _numbers(frame: pd.DataFrame) -> pd.DataFrame:
    for column in ("capacity_qps", "ci_low", "ci_high"):
        frame[column] = pd.to_numeric(frame[column]).astype(float)
    return frame


def _capacities(directory: Path, suite: str) -> pd.DataFrame:
    """Rows of every capacity*.json: an array of rows, or an object that has them as its results beside its config."""
    frames = []
    for path in sorted(directory.glob("capacity*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            frames.append(capacity_rows(found))
        elif found:
            frames.append(_numbers(pd.DataFrame([{"suite": suite, "measured": ""} | row for row in found])))
    if not frames:
        return pd.DataFrame()
    frame = pd.concat(frames, ignore_index=True).drop_duplicates(["policy", "criterion", "suite"])
    known = {"ttft-median": 0, "paper": 1}  # the paper's come first
    return frame.sort_values("criterion", key=lambda c: c.map(known).fillna(2), kind="stable").reset_index(drop=True)
