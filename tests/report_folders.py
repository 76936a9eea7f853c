"""Made-up folders of results, and what reports of them hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd

from llmsched_gym.config import scenario
from llmsched_gym.files import encode
from llmsched_gym.report import load_charts


def row(policy, qps, seed, *, ttft_s=0.4, attained=0.9, strict=None, num_requests=100, requested=..., **fields):
    """One run as `evaluate` reports it."""
    by_class = {"strict": strict, "relaxed": attained}
    gaps = {"strict": 0 if strict is None else 500, "relaxed": 20_000}
    return {
        "policy": policy,
        "suite": "paper",
        "profile": "rtx6000ada-mistral-7b",
        "workload": "sharegpt",
        "qps": qps,
        "requested_qps": qps if requested is ... else requested,
        "seed": seed,
        "num_requests": num_requests,
        "num_finished": num_requests,
        "num_refused": 0,
        "num_abandoned": 0,
        "num_unfinished": 0,
        "num_rejected": 0,
        "ttft_p50_s": ttft_s,
        "ttft_p99_s": None if ttft_s is None else 10 * ttft_s,
        "itl_p99_s_by_class": {"strict": None if strict is None else 0.08, "relaxed": 0.3},
        "slo_attainment": attained,
        "slo_attainment_by_class": by_class,
        "num_gaps_by_class": gaps,
        "mean_utility": attained - 0.1,
        "request_goodput": attained * qps,
        "throughput_tok_s": 400.0 * qps,
        "kv_cache_usage_max": 0.5,
        "num_preemptions": 2,
        "attained_by_decile": [attained] * 9 + [attained / 2],
    } | fields


def requests_of(rows, num_requests, seed=0):
    """Made-up requests for the runs of `rows`; a policy called never gets none served."""
    rng = np.random.default_rng(seed)
    frames = []
    for r in rows:
        served = np.full(num_requests, r["policy"] != "never")
        frames.append(
            pd.DataFrame(
                {
                    "policy": r["policy"],
                    "qps": r["qps"],
                    "seed": r["seed"],
                    "prompt_tokens": rng.integers(1, 4000, num_requests),
                    "slo_class": np.where(rng.random(num_requests) < 0.1, "strict", "relaxed"),
                    "phase": np.where(served, "finished", "abandoned"),
                    "ttft_s": np.where(served, rng.exponential(0.5, num_requests), np.nan),
                    "attained": served & (rng.random(num_requests) < 0.8),
                }
            )
        )
    return pd.concat(frames)


def steps_of(policies, qps, num_steps=600):
    start = 0.05 * np.arange(num_steps)
    base = {"qps": qps, "seed": 0, "start_s": start, "duration_s": 0.05, "predicted_s": 0.05, "kv_cache_usage": 0.3}
    tokens = {"decode_tokens": 20, "prefill_tokens": np.arange(num_steps) % 400, "num_running": 20, "num_waiting": 3}
    return pd.concat([pd.DataFrame({"policy": p, **base, **tokens}) for p in policies])


def itl_of(policies, qps, classes=("strict", "relaxed")):
    probs = np.linspace(0, 1, 101)
    frames = [
        pd.DataFrame({"policy": p, "qps": qps, "slo_class": c, "prob": probs, "itl_s": 0.02 + 0.1 * probs})
        for p in policies
        for c in classes
    ]
    return pd.concat(frames)


def make_folder(folder: Path, rows, *, steps=None, itl=None, capacity=None, num_requests=60, **fields) -> Path:
    folder.mkdir()
    pd.DataFrame(rows).to_parquet(folder / "runs.parquet")
    requests_of(rows, num_requests).to_parquet(folder / "requests.parquet")
    config = {
        "scenario": encode(scenario("paper", **fields).to_dict()),
        "policies": sorted({r["policy"] for r in rows}),
    }
    (folder / "config.json").write_text(json.dumps(config | {"qps": sorted({r["qps"] for r in rows}), "seeds": 2}))
    if steps is not None:
        steps.to_parquet(folder / "steps.parquet")
    if itl is not None:
        itl.to_parquet(folder / "itl.parquet")
    if capacity is not None:
        (folder / "capacity.json").write_text(json.dumps(capacity))
    return folder


def own_parts(folder):
    """The page without the charting library, and the data of its charts."""
    html = (folder / "report.html").read_text()
    (library,) = re.findall(r'<script type="text/plain" id="plotly">(.*?)</script>', html, flags=re.S)
    found = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', html, flags=re.S)
    return html.replace(library, ""), json.loads(found[1])


def charts_of(folder):
    return {chart["name"]: chart for chart in own_parts(folder)[1]["charts"]}


def line(table, policy, metric, load=None):
    """The one line of a table of figures that is of the policy, the metric and the load."""
    own = table[(table["policy"] == policy) & (table["metric"] == metric)]
    own = own if load is None else own[own["load"] == load]
    assert len(own) == 1
    return own.iloc[0]


def attainment(rows, **settings):
    """The chart of SLO attainment against load."""
    columns = load_charts.by_class("slo_attainment", rows)
    return load_charts.against_load("a", rows, columns, "SLO attainment", "%", scale=100, percent=True, **settings)
