"""The report of a folder that `capacity --out` wrote: what each policy can carry, and what ends it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llmsched_gym.fluid import Fluid
from llmsched_gym.report import load_charts, settings, tables
from llmsched_gym.report.bounds import fluid_of, ordinary
from llmsched_gym.report.chart import Chart, axis, guide, values, with_guides
from llmsched_gym.report.distance import above_fluid, capacity_text
from llmsched_gym.report.load_section import Section
from llmsched_gym.report.results import capacity_rows, named
from llmsched_gym.report.statistics import ReportError
from llmsched_gym.report.text import estimate, names


def is_capacity_folder(directory: Path) -> bool:
    """Whether a folder has capacities and no runs."""
    return not (directory / "runs.parquet").exists() and any(directory.glob("capacity-*.json"))


def context_of(directory: Path) -> dict[str, Any]:
    """What the templates need; :class:`ReportError` of one line for a file that is no capacity."""
    found: list[tuple[dict[str, Any], pd.DataFrame]] = []
    for path in sorted(directory.glob("capacity-*.json")):
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            found.append((kept, capacity_rows(kept)))
            kept["config"]["scenario"]["profile"], kept["config"]["policies"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ReportError(f"report: cannot read {path}: {' '.join(str(error).split())}") from None
    parts, verdicts = [], []
    summary: list[str] = []
    policies: list[str] = []
    for kept, own in found:
        config = kept["config"]
        fluid = fluid_of(config)
        unit = "sessions/s" if "cancelled" in own else "requests/s"
        policies += [p for p in own["policy"] if p not in policies]
        verdicts.append(verdict(own, unit))
        text = f"The largest rate that meets `{config['criterion']}`, on means over {config['seeds']} seeds of "
        text += f"{config['scenario']['num_requests']:,} requests.{above_fluid(own, fluid)}"
        parts.append(_section(kept, own, fluid, unit, text))
        if fluid is not None and not summary:
            summary.append(f"**Fluid capacity:** {capacity_text(fluid, unit)}")
    first = found[0][0]["config"]
    criteria = names(kept["config"]["criterion"] for kept, _ in found)
    overview = f"{len(policies)} policies were searched for the largest rate that meets {criteria}."
    commands = [settings.command(kept["config"], directory) for kept, _ in found]
    return {
        "title": f"Capacity: suite {first['scenario'].get('suite', 'unknown')}",
        "verdict": " ".join(verdicts),
        "summary": [overview, *summary],
        "matrices": [],
        "parts": parts,
        "comparisons": [],
        "times": [],
        "remarks": [],
        "settings": _settings(first),
        "command": "\n".join(text for text in commands if text) or None,
        "config": json.dumps({kept["config"]["criterion"]: kept["config"] for kept, _ in found}, indent=1),
        "policies": policies,
    }


def verdict(own: pd.DataFrame, unit: str = "requests/s") -> str:
    """Who carries most under one criterion, and whether that can be told from the next; policies are of one file."""
    criterion = own["criterion"].iloc[0]
    known = own[own["policy"].isin(ordinary(own["policy"])) & np.isfinite(own["capacity_qps"])]
    known = known.sort_values("capacity_qps", ascending=False, kind="stable")
    if known.empty:
        return f"**`{criterion}`:** no policy has a capacity within the rates searched."
    best = known.iloc[0]
    text = estimate(best["capacity_qps"], best["ci_low"], best["ci_high"], f" {unit}", 2)
    if len(known) == 1:
        return f"**`{criterion}`:** `{best['policy']}` carries {text}."
    second = known.iloc[1]
    times, low, high = best["capacity_qps"] / second["capacity_qps"], np.nan, np.nan
    if second["policy"] == second["ratio_to"] and pd.notna(best["ratio_ci_low"]):
        low, high = best["ratio_ci_low"], best["ratio_ci_high"]
    elif best["policy"] == best["ratio_to"] and pd.notna(second["ratio_ci_low"]):
        low, high = 1 / second["ratio_ci_high"], 1 / second["ratio_ci_low"]
    clear = low > 1 if np.isfinite(low) else best["ci_low"] > second["ci_high"]
    who = f"**Winner: `{best['policy']}`**" if clear else f"**No clear winner:** `{best['policy']}` leads"
    ratio = f"{estimate(times, low, high, '', 2)} times `{second['policy']}`'s"
    return f"{who} under `{criterion}`: {text}, {ratio}, the next."


def _section(kept: dict[str, Any], own: pd.DataFrame, fluid: Fluid | None, unit: str, text: str) -> Section:
    criterion = str(kept["config"]["criterion"])
    bars = load_charts.capacity_chart(named(criterion), own, "", fluid_qps=fluid.qps if fluid else None, unit=unit)
    curves = _curves(criterion, kept.get("curves") or {}, unit)
    anchor = named(criterion).replace(".", "-")
    return Section(
        anchor, f"Capacity, {criterion}", text, [bars, *curves], [tables.capacity_table(criterion, own, unit)]
    )


def _curves(criterion: str, curves: dict[str, list[dict[str, float | None]]], unit: str) -> list[Chart]:
    """How far runs are beyond the limit of each condition at the rates that were run; 0 is the capacity."""
    conditions = dict.fromkeys(
        name for points in curves.values() for point in points for name in point if name != "qps"
    )
    found = []
    for condition in conditions:
        traces = []
        for policy, points in curves.items():
            known = [p for p in points if p.get(condition) is not None]
            if not known:
                continue
            place = {"x": values(p["qps"] for p in known), "y": values(p[condition] for p in known)}
            hover = f"<b>{load_charts.escape(policy)}</b><br>%{{x:.3f}} {unit}: %{{y:.3~g}}<extra></extra>"
            trace = {"type": "scatter", "mode": "lines+markers", **place, "hovertemplate": hover}
            traces.append(trace | {"meta": {"policy": policy, "slo": "all", "thin": True}})
        layout = {"xaxis": axis(f"Load ({unit})"), "yaxis": axis("Mean excess over the limit")}
        layout = with_guides(layout, [guide(0.0, "above: not met", dash="solid")])
        text = "Seed means at the rates that the search ran; the isotonic fit through them crosses 0 at the capacity."
        name = named(f"{criterion} {condition}")
        if traces:
            found.append(Chart(name, f"{condition[0].upper()}{condition[1:]}", text, traces, layout))
    return found


def _settings(config: dict[str, Any]) -> list[tuple[str, str]]:
    world, get = config["scenario"], config["scenario"].get
    seeds, first = int(config["seeds"]), int(config.get("first_seed", 0))
    found = [("Suite", str(get("suite"))), ("Cost profile", str(world["profile"]))]
    found += [("Workload", str(get("trace") or get("workload"))), ("Seeds", f"{first} to {first + seeds - 1}")]
    found += [("Requests per run", f"{world['num_requests']:,}")]
    low, high = config["qps"]
    return [*found, ("Rates searched", f"{low:g} to {high:g} per second")]
