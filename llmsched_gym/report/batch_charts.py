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
        "yaxis3": axis("KV used (%)", domain=[0.0, 0.2], rangemode="tozero"),
        "height": 520,
        "showlegend": True,
    }
    return Chart("batches", "Batches over time", caption, traces, layout, wide=True, pick=list(runs))


REPLICA_COLOURS = ("#0072b2", "#e69f00", "#117733", "#cc79a7", "#56b4e9", "#d55e00", "#44aa99", "#6b4c2a")
"""On a light ground; the ninth replica has the first's again."""
PANELS = (
    ("num_waiting", "waiting", "y", "requests", 1.0),
    ("num_running", "running", "y2", "requests", 1.0),
    ("kv_cache_usage", "KV cache used", "y3", "% of KV blocks", 100.0),
)
"""What is shown of replicas: column of the log, words, axis, unit, scale."""
MOST_BINS = 1920  # of all replicas of a policy together


def busiest(steps: pd.DataFrame) -> pd.DataFrame:
    """Of each policy the batches of the replica that executed longest; all where there is one engine."""
    if "replica" not in steps:
        return steps
    busy_s = steps.groupby(["policy", "replica"], observed=True)["duration_s"].sum()
    chosen = busy_s.groupby("policy", observed=True).idxmax()
    pairs = pd.MultiIndex.from_frame(steps[["policy", "replica"]])
    return steps[pairs.isin(chosen.tolist())]


def replicas_over_time(
    steps: pd.DataFrame, policies: Sequence[str], window_s: float = 120.0, bin_s: float = 0.5
) -> Chart | None:
    """All replicas of a policy at once: requests that wait and run, one on the other, and each one's KV use."""
    if "replica" not in steps:
        return None
    runs = {p: dict(iter(steps[steps["policy"] == p].sort_values("start_s").groupby("replica"))) for p in policies}
    runs = {p: logs for p, logs in runs.items() if len(logs) > 1}
    if not runs:
        return None
    # the log of the replica with most batches ends first
    longest = [max(logs.values(), key=len).iloc[-1] for logs in runs.values()]
    window_s = min([window_s, *(float(last["start_s"] + last["duration_s"]) for last in longest)])
    most = MOST_BINS // max(map(len, runs.values()))
    num_bins = max(40, min(round(window_s / bin_s), most))
    edges = np.linspace(0.0, window_s, num_bins + 1)
    traces = []
    for policy, logs in runs.items():
        for column, words, where, unit, scale in PANELS:
            for j, log in logs.items():
                is_stacked = where != "y3"
                trace: dict[str, Any] = {"type": "scatter", "mode": "lines", "name": f"replica {j}", "yaxis": where}
                trace |= {"x0": float(edges[1]) / 2, "dx": float(edges[1]), "legendgroup": f"replica {j}"}
                trace["y"] = values(scale * averaged(log, column, edges))
                said = f"replica {j}, %{{x:.1f}} s<br>{words}: %{{y:,.3~r}} {unit}<extra></extra>"
                trace["hovertemplate"] = f"{escape(policy)}, {said}"
                trace["line"] = {"shape": "hvh", "width": 0} if is_stacked else {"width": 1.6}
                if is_stacked:
                    trace["stackgroup"] = f"{policy} {where}"
                meta = {"ink": f"replica-{int(j) % len(REPLICA_COLOURS)}", "pick": policy, "area": is_stacked}
                traces.append(trace | {"meta": meta, "showlegend": where == "y"})
    layout = {
        "xaxis": axis("Time (s)", range=[0, float(window_s)], anchor="y3"),
        "yaxis": axis("Waiting", domain=[0.7, 1.0], rangemode="tozero"),
        "yaxis2": axis("Running", domain=[0.35, 0.65], rangemode="tozero"),
        "yaxis3": axis("KV used (%)", domain=[0.0, 0.3], rangemode="tozero"),
        "height": 520,
        "showlegend": True,
    }
    text = (
        "Requests waiting and running, a replica's on the others', and the share of each one's KV blocks in use: means "
    )
    text += f"over the busy time of bins of {edges[1]:.2g} s."
    return Chart("replicas-over-time", "Replicas over time", text, traces, layout, wide=True, pick=list(runs))


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
