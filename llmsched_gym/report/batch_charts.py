"""Charts of one run over time, and of replicas; None where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from llmsched_gym.report.chart import ALL, Chart, axis, values
from llmsched_gym.report.load_charts import escape

SERIES = (
    ("decode_tokens", "decode tokens", "y", "decode", "area"),
    ("prefill_tokens", "prefill tokens", "y", "prefill", "area"),
    ("num_running", "running", "y2", "running", "line"),
    ("num_waiting", "waiting", "y2", "waiting", "dashed"),
    ("kv_cache_usage", "KV cache used", "y3", "kv", "area"),
)
"""Columns of the log of batches: name, axis, colour and kind of each line."""


def timeline(
    steps: pd.DataFrame, policies: Sequence[str], caption: str = "", window_s: float = 120.0, bin_s: float = 0.5
) -> Chart | None:
    """What batches were made of over time: mean tokens a batch by kind, requests, KV use; a policy at a time."""
    runs = {p: steps[steps["policy"] == p].sort_values("start_s") for p in policies}
    runs = {p: run for p, run in runs.items() if len(run) > 1}
    if not runs:
        return None
    ends = [float((run["start_s"] + run["duration_s"]).iloc[-1]) for run in runs.values()]
    window_s = min(window_s, min(ends))
    edges = np.arange(0, window_s + bin_s / 2, min(bin_s, window_s / 40))
    step_s = float(edges[1] - edges[0])
    traces = []
    for policy, run in runs.items():
        for column, name, where, ink, kind in SERIES:
            y = averaged(run, column, edges)
            unit = {"y": "tokens per batch", "y2": "requests", "y3": "% of KV blocks"}[where]
            y = 100 * y if where == "y3" else y
            trace: dict[str, Any] = {"type": "scatter", "mode": "lines", "name": name, "yaxis": where}
            trace |= {"x0": step_s / 2, "dx": step_s, "y": values(y)}
            trace["hovertemplate"] = f"{escape(policy)}, %{{x:.1f}} s<br>{name} %{{y:,.3~r}} {unit}<extra></extra>"
            trace["line"] = {"shape": "hvh" if kind == "area" else "linear", "width": 0 if kind == "area" else 1.6}
            if where == "y":
                trace["stackgroup"] = policy
            elif kind == "area":
                trace["fill"] = "tozeroy"
            if kind == "dashed":
                trace["line"]["dash"] = "dash"
            traces.append(trace | {"meta": {"ink": ink, "pick": policy, "area": kind == "area"}, "showlegend": True})
    layout = {
        "xaxis": axis("Time (s)", range=[0, float(window_s)], anchor="y3"),
        "yaxis": axis("Tokens per batch", domain=[0.5, 1.0], rangemode="tozero"),
        "yaxis2": axis("Requests", domain=[0.25, 0.45], rangemode="tozero"),
        "yaxis3": axis("KV used (%)", domain=[0.0, 0.2], range=[0, 101.5]),
        "height": 520,
        "showlegend": True,
    }
    return Chart("batches", "Batches over time", caption, traces, layout, wide=True, pick=list(runs))


def averaged(run: pd.DataFrame, column: str, edges: np.ndarray) -> np.ndarray:
    """Mean of a column over the busy time of each bin, 0 in one without."""
    start, duration = run["start_s"].to_numpy(float), run["duration_s"].to_numpy(float)
    at = np.column_stack([start, start + duration]).ravel()

    def integral(found: np.ndarray) -> np.ndarray:
        parts = np.column_stack([np.zeros(len(run)), found * duration]).ravel()
        return np.diff(np.interp(edges, at, np.cumsum(parts)))

    busy_s = integral(np.ones(len(run)))
    return np.where(busy_s > 1e-9, integral(run[column].to_numpy(float)) / np.maximum(busy_s, 1e-9), 0.0)


def replicas(rows: pd.DataFrame) -> list[Chart]:
    """Busy share of each replica, and its hit rate where something is cached: means over runs."""
    found = []
    for column, name, title, label in (
        ("busy_share_by_replica", "router-replicas", "Busy time by replica", "Of the run, executing a batch (%)"),
        ("hit_rate_by_replica", "router-hits", "Prefix hit rate by replica", "Prompt tokens found cached (%)"),
    ):
        traces = []
        for policy in dict.fromkeys(rows["policy"]):
            own = np.array(rows.loc[rows["policy"] == policy, column].tolist(), float)
            if not np.isfinite(own).any():
                continue
            shares = 100 * np.nanmean(np.where(np.isfinite(own).any(axis=0), own, 0.0), axis=0)
            hover = [f"<b>{escape(policy)}</b><br>replica {i}: {v:.1f} %" for i, v in enumerate(shares)]
            trace = {"type": "bar", "x": list(range(len(shares))), "y": values(shares), "hovertext": hover}
            traces.append(trace | {"hoverinfo": "text", "meta": {"policy": policy, "slo": ALL}})
        if traces:
            layout = {"xaxis": axis("Replica", dtick=1), "yaxis": axis(label, range=[0, 101.5]), "barmode": "group"}
            found.append(Chart(name, title, "Means over all runs of a policy.", traces, layout, wide=True))
    return found
