"""Charts over loads, pure functions of tidy rows; None where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from llmsched_gym.config import SLO_CLASSES
from llmsched_gym.paper import constants
from llmsched_gym.report import statistics
from llmsched_gym.report.chart import ALL, Chart, axis, band, guide, log_axis, values, with_guides
from llmsched_gym.report.text import number

FAR_BELOW = -60.0
"""A reduction (%) below which a policy is off the scale."""
FLUID = "longdashdot"


def by_class(column: str, rows: pd.DataFrame) -> dict[str, str]:
    """The column of all users and those of each class that has figures, by class."""
    found = {ALL: column} | {name: f"{column}_{name}" for name in SLO_CLASSES}
    return {name: c for name, c in found.items() if statistics.has(rows, c)}


def against_load(
    name: str,
    rows: pd.DataFrame,
    columns: Mapping[str, str],
    title: str,
    label: str,
    caption: str = "",
    *,
    scale: float = 1.0,
    unit: str = "",
    log: bool = False,
    percent: bool = False,
    line: tuple[float, str] | None = None,
    dash: str = "dash",
    fluid_qps: float | None = None,
    missed: bool = False,
) -> Chart | None:
    """Columns of rows, by class of users, against load, or their values at the only load; "" is no class.

    `line` is a level of the column, `fluid_qps` a load; `missed` shows what is left of 1, on a log scale down to half
    of what one request in all runs would be.
    """
    binned = statistics.binned_loads(rows)
    means = {slo: statistics.over_seeds(binned, column) for slo, column in columns.items()}
    floor = 0.0
    if missed:
        floor = 50.0 / max(1.0, rows.groupby(["policy", "load"])["num_requests"].sum().max())
        means = {slo: m.assign(value=1 - m["value"], low=1 - m["high"], high=1 - m["low"]) for slo, m in means.items()}
    for frame in means.values():
        frame[["value", "low", "high"]] *= scale
    shown = np.concatenate([frame["value"].to_numpy() for frame in means.values()]) if means else np.array([])
    finite = shown[np.isfinite(shown) & ((shown > 0) | (not log))]
    if not len(finite):
        return None
    policies, traces = statistics.policies_of(rows), []
    single = binned["load"].nunique() == 1
    value_axis, (low, high) = axis(label, percent=percent), (0.0, 100.0) if percent else (-1e9, 1e9)
    if log:
        value_axis = log_axis(
            label, [*finite, *(line or ())[:1], *([floor] if missed and (shown < floor).any() else [])], 1.3
        )
        low, high = (10**end for end in value_axis["range"])
    elif not percent and finite.min() >= 0:
        value_axis["rangemode"] = "tozero"
    for slo, frame in means.items():
        for policy in policies:
            own = frame[frame["policy"] == policy].sort_values("load")
            hover = [_figure(item, unit, floor) for item in own.itertuples()]
            at = own["value"].to_numpy(float)
            beyond = np.isposinf(at)
            y = np.where(beyond, high / 1.08 if log else np.nan, np.maximum(at, floor) if missed else at)
            meta = {"policy": policy, "slo": slo}
            marks: dict[str, Any] = {"text": hover, "hovertemplate": _said(policy, slo, single, own), "meta": meta}
            if beyond.any() or missed:
                kinds = ["triangle-up-open" if b else "triangle-down-open" if v < floor else None for b, v in
                         zip(beyond, np.nan_to_num(at, posinf=1e12), strict=True)]  # fmt: skip
                marks["meta"] = meta | {"symbols": kinds}
            x: dict[str, Any]
            if single:
                error = {"type": "data", "symmetric": False, "thickness": 5, "width": 0}
                ends = own[["low", "high"]].clip(low, high)
                error |= {"array": values(ends["high"] - y), "arrayminus": values(y - ends["low"])}
                x = {"x": values(y), "y": [policy] * len(own), "error_x": error, "mode": "markers"}
                traces.append({"type": "scatter", **x, **marks})
                continue
            traces += band(own, policy, slo, low, high)
            x = {"x": values(own["load"]), "y": values(y), "mode": "lines+markers", "connectgaps": False}
            traces.append({"type": "scatter", **x, **marks})
    if single:
        layout: dict[str, Any] = {
            "xaxis": value_axis,
            "yaxis": {"autorange": "reversed", "automargin": True},
            "rows": len(policies),
        }
    else:
        layout = {"xaxis": axis(f"Load ({statistics.load_unit(rows)})"), "yaxis": value_axis}
    guides = [guide(*line, vertical=single, dash=dash)] if line else []
    if fluid_qps and not single:
        guides.append(guide(fluid_qps, fluid_label(fluid_qps), vertical=True, dash=FLUID))
    return Chart(name, title, caption, traces, with_guides(layout, guides))


def _figure(item: Any, unit: str, floor: float) -> str:
    """A point's value with its interval and unit."""
    value = "0" if floor and item.value == 0 else number(item.value)
    ends = f" [{number(item.low)}–{number(item.high)}]" if np.isfinite([item.low, item.high]).all() else ""
    infinite = f"; infinite in {item.num_infinite} seeds" if item.num_infinite else ""
    return f"{value}{ends} {unit}{infinite}".replace(" ;", ";").strip()


def _said(policy: str, slo: str, single: bool, own: pd.DataFrame) -> str:
    """A template for what points say: whose they are, where, over how many seeds."""
    load = f"{own['load'].iloc[0]:.3g}" if single else "%{x:.3~g}"
    who = policy if slo in (ALL, "") else f"{policy}, {slo} users"
    return f"<b>{escape(who)}</b><br>load {load}: %{{text}}<br>{own['num_seeds'].max()} seeds<extra></extra>"


def escape(text: str) -> str:
    """Text for a chart, whose labels are a kind of HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def fluid_label(qps: float) -> str:
    """What stands beside the line of the fluid capacity."""
    return f"fluid capacity {qps:.2f}"


def reduction_chart(
    reduction: pd.DataFrame, baseline: str = statistics.BASELINE, *, paper: bool = False, unit: str = "requests/s"
) -> Chart | None:
    """Reduction (%) of the median TTFT against `baseline` over load; with `paper` its claim and reference figures."""
    means = reduction.assign(**{c: 100 * reduction[c] for c in ("value", "low", "high")})
    finite = means[np.isfinite(means["value"])]
    if finite.empty:
        return None
    low = max(FAR_BELOW, min(0.0, float(finite[["value", "low"]].min().min())) * 1.1)
    high = min(100.0, max(60.0, float(finite[["value", "high"]].max().max()) + 6))
    traces, single = [], means["load"].nunique() == 1
    for policy in statistics.policies_of(means):
        own = means[means["policy"] == policy].sort_values("load")
        below = (own["value"] < low).to_numpy()
        y = own["value"].clip(low + 1.5)
        hover = [
            f"<b>{escape(policy)}</b><br>load {item.load:.3g}: {number(item.value, 1)} % below {baseline}'s"
            for item in own.itertuples()
        ]
        kinds = ["triangle-down-open" if b else None for b in below]
        meta = {"policy": policy, "slo": ALL, "symbols": kinds}
        own = own.assign(num_infinite=0)
        place: dict[str, Any] = {"x": values(own["load"]), "y": values(y)}
        if single:
            place = {"x": values(y), "y": [policy] * len(own)}
        else:
            traces += band(own, policy, ALL, low, high)
        mode = "markers" if single else "lines+markers"
        traces.append({"type": "scatter", "mode": mode, "text": hover, "hoverinfo": "text", "meta": meta, **place})
    label = "Reduction of median TTFT (%)"
    guides = [guide(0.0, "", vertical=single, dash="solid")]
    if paper and not single:
        claim = 100 * constants.PAPER_TTFT_REDUCTION
        loads, figures = zip(*constants.REFERENCE_TTFT_REDUCTION.items(), strict=True)
        place = {"x": values(loads), "y": values(100 * np.array(figures)), "mode": "markers", "type": "scatter"}
        marker = {"symbol": "diamond-open", "size": 10}
        hover = [
            f"reference figure for slai<br>load {q:g}: {100 * v:.0f} %" for q, v in zip(loads, figures, strict=True)
        ]
        traces.append(place | {"marker": marker, "text": hover, "hoverinfo": "text", "meta": {"ink": "ink"}})
        guides.append(guide(claim, f"the paper's claim {claim:.0f} %"))
    if single:
        layout = {"xaxis": axis(label, range=[low, high]), "yaxis": {"autorange": "reversed", "automargin": True}}
        layout["rows"] = means["policy"].nunique()
    else:
        layout = {"xaxis": axis(f"Load ({unit})"), "yaxis": axis(label, range=[low, high])}
    text = "How much lower the median TTFT is: the median over seeds of paired runs."
    if (means["value"] < low).any():
        text += " Triangles on the lower edge stand for far higher ones."
    title = f"Median TTFT reduction against {baseline}"
    return Chart("ttft-reduction", title, text, traces, with_guides(layout, guides))


PARETO = (
    ("ttft_p99_s", "throughput_tok_s", "p99 TTFT (s, log scale)", "Output (tokens/s)"),
    ("ttft_p99_s", "slo_attainment", "p99 TTFT (s, log scale)", "Requests within all SLOs (%)"),
    ("throughput_tok_s", "slo_attainment", "Output (tokens/s)", "Requests within all SLOs (%)"),
)
"""Pairs of columns drawn against each other, with their labels."""


def pareto_charts(rows: pd.DataFrame) -> list[Chart]:
    """What is given up of one figure for another: a point per policy and load, joined from load to load."""
    binned, found = statistics.binned_loads(rows), []
    for across, up, across_label, up_label in PARETO:
        if not (statistics.has(rows, across) and statistics.has(rows, up)):
            continue
        x, y = (statistics.over_seeds(binned, column).set_index(["policy", "load"])["value"] for column in (across, up))
        log, percent = across.endswith("_s") and across.startswith("ttft"), up == "slo_attainment"
        both = pd.DataFrame({"x": x, "y": 100 * y if percent else y}).replace(np.inf, np.nan).dropna()
        both = both[both["x"] > 0] if log else both
        if both.empty:
            continue
        traces = []
        for policy in statistics.policies_of(rows):
            if policy not in both.index.get_level_values(0):
                continue
            own = both.loc[policy].sort_index()
            hover = [
                f"<b>{escape(policy)}</b><br>load {load:.3g}<br>{across_label.split(' (')[0]} {number(item.x)}"
                f"<br>{up_label.split(' (')[0]} {number(item.y)}"
                for load, item in zip(own.index, own.itertuples(), strict=True)
            ]
            sizes = {"size": [7 + 5 * i / max(1, len(own) - 1) for i in range(len(own))]}
            place = {"x": values(own["x"]), "y": values(own["y"]), "mode": "lines+markers", "marker": sizes}
            meta = {"policy": policy, "slo": ALL, "thin": True}
            traces.append({"type": "scatter", **place, "text": hover, "hoverinfo": "text", "meta": meta})
        layout: dict[str, Any] = {"xaxis": log_axis(across_label, both["x"], 1.4) if log else axis(across_label)}
        layout["yaxis"] = axis(up_label, percent=percent)
        title = f"{up_label.split(' (')[0]} against {_lower(across_label.split(' (')[0])}"
        better = "Better is up and left." if log else "Better is up and right."
        text = f"{better} A mark is a load, larger for higher ones; infinite figures are left out."
        found.append(Chart(f"pareto-{up}-{across}".replace("_", "-"), title, text, traces, layout))
    return found


def _lower(text: str) -> str:
    return text if text[:2].isupper() or text[0].islower() else text[0].lower() + text[1:]


def capacity_chart(
    name: str,
    capacity: pd.DataFrame,
    caption: str,
    *,
    reference: Mapping[str, float] | None = None,
    fluid_qps: float | None = None,
    unit: str = "requests/s",
) -> Chart | None:
    """Capacity by policy with intervals, for one criterion; marks: reference figures, dash-dotted: the fluid bound."""
    own = capacity[np.isfinite(capacity["capacity_qps"].astype(float))]
    if own.empty:
        return None
    traces: list[dict[str, Any]] = []
    policies: Sequence[str] = [str(p) for p in own["policy"]]
    for policy, bar in zip(policies, own.itertuples(), strict=True):
        known = np.isfinite([bar.ci_low, bar.ci_high]).all()
        ends = f" [{bar.ci_low:.2f}–{bar.ci_high:.2f}]" if known else ""
        hover = f"<b>{escape(policy)}</b><br>{bar.capacity_qps:.2f}{ends} {unit}"
        trace: dict[str, Any] = {
            "type": "bar",
            "orientation": "h",
            "x": [bar.capacity_qps],
            "y": [policy],
            "hovertext": hover,
        }
        trace |= {"text": f"{bar.capacity_qps:.2f}", "textposition": "inside", "insidetextanchor": "start"}
        trace |= {"hoverinfo": "text", "meta": {"policy": policy, "slo": ALL}}
        if known:
            plus, minus = bar.ci_high - bar.capacity_qps, bar.capacity_qps - bar.ci_low
            trace["error_x"] = {"type": "data", "symmetric": False, "array": [plus], "arrayminus": [minus], "width": 5}
        traces.append(trace)
    shown = {p: (reference or {})[p] for p in policies if p in (reference or {})}
    if shown:
        said = [f"reference figure for {p}: {q:.2f}" for p, q in shown.items()]
        marks: dict[str, Any] = {"type": "scatter", "mode": "markers", "x": list(shown.values()), "y": list(shown)}
        marker: dict[str, Any] = {"symbol": "line-ns-open", "size": 20, "line": {"width": 2}}
        traces.append(marks | {"marker": marker, "text": said, "hoverinfo": "text", "meta": {"ink": "ink"}})
        caption += " Upright marks: reference figures."
    layout = {"xaxis": axis(f"Capacity ({unit})", rangemode="tozero"), "rows": len(own), "barmode": "overlay"}
    layout["yaxis"] = {"autorange": "reversed", "automargin": True}
    guides = [guide(fluid_qps, fluid_label(fluid_qps), vertical=True, dash=FLUID)] if fluid_qps else []
    return Chart(name, f"Capacity ({own['criterion'].iloc[0]})", caption, traces, with_guides(layout, guides))
