"""Charts of requests at one load, pure functions of their lines; None where there is nothing to draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from llmsched_gym.config import SLO_CLASSES
from llmsched_gym.report import statistics
from llmsched_gym.report.chart import ALL, Chart, axis, guide, log_axis, values, with_guides
from llmsched_gym.report.load_charts import escape

MOST_POINTS = 2000
"""Requests that the scatter shows, of all policies together."""


def classes(requests: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """All requests, and those of each class of users that there are."""
    found = {ALL: requests}
    if "slo_class" in requests:
        kinds = requests["slo_class"].astype(str)
        found |= {name: requests[kinds == name] for name in SLO_CLASSES if (kinds == name).any()}
    return found


def _line(policy: str, slo: str, x: Any, y: Any, hover: str, **more: Any) -> dict[str, Any]:
    """A policy's line; `hover` is a template of Plotly's for what a point says."""
    trace = {"type": "scatter", "mode": "lines+markers", "x": values(x), "y": values(y)}
    hover = f"{_who(policy, slo)}<br>{hover}<extra></extra>"
    return trace | {"hovertemplate": hover, "meta": {"policy": policy, "slo": slo} | more}


def _who(policy: str, slo: str) -> str:
    return f"<b>{escape(policy if slo == ALL else f'{policy}, {slo} users')}</b>"


def titled(title: str, at: str) -> str:
    """A title with the load that it is of."""
    return f"{title}, {at}" if at else title


def ttft_by_prompt(
    requests: pd.DataFrame, quantile: float = 0.5, *, slo: tuple[float, float] | None = None, at: str = ""
) -> Chart | None:
    """A quantile of TTFT by prompt length, in bins of equally many requests; `slo` = (s, s per prompt token)."""
    if requests.empty:
        return None
    edges = prompt_edges(requests)
    name = "Median" if quantile == 0.5 else f"p{100 * quantile:g}"
    found = []
    for kind, whose in classes(requests).items():
        for policy in statistics.policies_of(whose):
            own = whose[whose["policy"] == policy]
            own = own.assign(ttft_s=own["ttft_s"].fillna(np.inf))
            groups = own.groupby(bins(own["prompt_tokens"], edges))
            x = groups["prompt_tokens"].median().to_numpy()
            y = groups["ttft_s"].quantile(quantile, interpolation="higher").to_numpy()
            found.append((policy, kind, x, y))
    finite = np.concatenate([y[np.isfinite(y)] for _, _, _, y in found])
    if not (finite > 0).any():
        return None
    up = log_axis(f"{name} TTFT (s, log scale)", finite, 1.4)
    traces = []
    for policy, kind, x, y in found:
        infinite = np.isposinf(y)
        hover = f"%{{x:,.0f}} tokens: {name} TTFT %{{y:.3~g}} s"
        symbols = {"symbols": ["triangle-up-open" if lost else None for lost in infinite]} if infinite.any() else {}
        y = np.where(infinite, 10 ** up["range"][1] / 1.08, y)
        traces.append(_line(policy, kind, x, y, hover, **symbols))
    across = np.concatenate([x for _, _, x, _ in found])
    if slo is not None:
        x = np.geomspace(max(1.0, across.min()), across.max(), 60)
        line: dict[str, Any] = {"type": "scatter", "mode": "lines", "x": values(x), "y": values(slo[0] + slo[1] * x)}
        line |= {"line": {"dash": "dash", "width": 1.2}, "hoverinfo": "text", "text": ["TTFT SLO"] * len(x)}
        traces.append(line | {"meta": {"ink": "ink"}})
    layout = {"xaxis": log_axis("Prompt length (tokens, log scale)", across), "yaxis": up}
    text = "Each point is a tenth of the requests by prompt length." + (" Dashed: the TTFT SLO." if slo else "")
    stem = "median" if quantile == 0.5 else f"p{100 * quantile:g}"
    title = titled(f"{name} TTFT by prompt length", at)
    return Chart(f"ttft-by-prompt-{stem}", title, text, traces, layout)


def share_by_prompt(requests: pd.DataFrame, name: str, what: str = "attained", *, at: str = "") -> Chart | None:
    """Share of requests that attained (or were served: finished) by tenth of prompt length."""
    if requests.empty:
        return None
    edges = prompt_edges(requests)
    traces = []
    for kind, whose in classes(requests).items():
        hit = whose["attained"] if what == "attained" else whose["phase"].astype(str) == "finished"
        for policy in statistics.policies_of(requests):
            mine = (whose["policy"] == policy).to_numpy()
            shares = hit[mine].astype(float).groupby(bins(whose["prompt_tokens"][mine], edges)).mean()
            shares = 100 * shares.reindex(range(len(edges) - 1))
            traces.append(_line(policy, kind, range(len(shares)), shares, "up to %{x} tokens: %{y:.1f} %"))
    ticks: dict[str, Any] = {
        "tickvals": list(range(len(edges) - 1)),
        "ticktext": [f"{edge:,.0f}" for edge in edges[1:]],
    }
    layout = {"xaxis": axis("Longest prompt of each tenth (tokens)", **ticks)}
    layout["yaxis"] = axis(f"Requests {'within all SLOs' if what == 'attained' else 'finished'} (%)", percent=True)
    title = "Within all SLOs by prompt length" if what == "attained" else "Served by prompt length"
    caption = "Whether short or long prompts pay for the attainment."
    caption = caption if what == "attained" else "Who is served at all, late or not."
    return Chart(name, titled(title, at), caption, traces, layout)


def prompt_edges(requests: pd.DataFrame, num_bins: int = 10) -> np.ndarray:
    """Prompt lengths, tokens, that part requests into equally many; one bin where all are alike."""
    lengths = requests["prompt_tokens"].to_numpy(float)
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, num_bins + 1)))
    return edges if len(edges) > 1 else np.array([edges[0] - 1, edges[0]])


def bins(lengths: pd.Series, edges: np.ndarray) -> np.ndarray:
    """Index of the bin (edge, next edge] of each length; the first bin includes its lower edge."""
    return np.clip(np.searchsorted(edges, lengths, side="left") - 1, 0, len(edges) - 2)


def ttft_cdf(requests: pd.DataFrame, slo_s: float = 0.5, *, at: str = "") -> Chart | None:
    """Distribution of TTFT over all requests: one without a first token never reaches the line's top."""
    shares = np.unique(np.concatenate([np.linspace(0.01, 0.97, 49), np.linspace(0.98, 1, 11)]))
    traces, seen = [], []
    for kind, whose in classes(requests).items():
        for policy in statistics.policies_of(whose):
            ttft_s = whose["ttft_s"][whose["policy"] == policy].fillna(np.inf).to_numpy(float)
            x = np.quantile(ttft_s, shares, method="inverted_cdf")
            finite = np.isfinite(x) & (x > 0)
            if not finite.any():
                continue
            seen += [x[finite][0], x[finite][-1]]
            hover = "%{y:.3~g} % within %{x:.3~g} s"
            traces.append(_line(policy, kind, x[finite], 100 * shares[finite], hover, smooth=True))
    if not traces:
        return None
    layout = {"xaxis": log_axis("TTFT (s, log scale)", seen)}
    layout["yaxis"] = axis("Requests served that fast (%)", percent=True)
    layout = with_guides(layout, [guide(slo_s, f"TTFT {slo_s:g} s", vertical=True)])
    text = "A line ends below 100 % where requests never got a first token. Dashed: the TTFT SLO of an empty prompt."
    return Chart("ttft-cdf", titled("Time to first token", at), text, traces, layout)


def itl_cdf(itl: pd.DataFrame, slo_class: str, slo_s: float, *, at: str = "") -> Chart | None:
    """Share of one class's gaps longer than x, from a quantile table (policy, slo_class, prob, itl_s), to 1 in 10^4."""
    own = itl[(itl["slo_class"].astype(str) == slo_class) & (itl["itl_s"] > 0)]
    if own.empty:
        return None
    traces, longest_s = [], slo_s
    for policy in statistics.policies_of(own):
        mine = own[(own["policy"] == policy) & (own["prob"] < 0.99995)].sort_values("prob")
        mine = mine.iloc[:: max(1, len(mine) // 80)]
        hover = "%{y:.3~g} % of gaps longer than %{x:.3~g} s"
        longest_s = max(longest_s, float(mine["itl_s"].max()))
        traces.append(_line(policy, "", mine["itl_s"], 100 * (1 - mine["prob"]), hover, smooth=True))
    layout = {"xaxis": log_axis("Gap (s, log scale)", [own["itl_s"].min(), longest_s], 1.1)}
    layout["yaxis"] = log_axis("Gaps longer than that (%)", [0.01, 100], 1.0)
    guides = [guide(slo_s, f"TBT SLO {slo_s:g} s", vertical=True), guide(1.0, "p99", dash="dot")]
    text = "The tail of the distribution. Left of where SLO and p99 cross, 99 % of gaps are in time."
    title = titled(f"Gaps between tokens, {slo_class} users", at)
    return Chart(f"itl-cdf-{slo_class}", title, text, traces, with_guides(layout, guides))


def scatter(requests: pd.DataFrame, *, at: str = "") -> Chart | None:
    """TTFT against prompt length, a mark a request, misses marked; of many requests a part, misses first."""
    known = requests[requests["ttft_s"] > 0]
    if known.empty:
        return None
    policies = statistics.policies_of(known)
    most = max(1, MOST_POINTS // len(policies))
    up = log_axis("TTFT (s, log scale)", known["ttft_s"], 1.3)
    figures = [figure for figure in FIGURES if figure[0] in requests]
    traces, left_out = [], False
    for policy in policies:
        mine = requests[(requests["policy"] == policy) & ((requests["ttft_s"] > 0) | requests["ttft_s"].isna())]
        chosen = _some(mine, most)
        left_out |= len(chosen) < len(mine)
        for kind in dict.fromkeys(chosen["slo_class"].astype(str)) if "slo_class" in chosen else [ALL]:
            for missed in (False, True):
                own = chosen[chosen["attained"].astype(bool) != missed]
                own = own[own["slo_class"].astype(str) == kind] if kind != ALL else own
                if own.empty:
                    continue
                first_s = own["ttft_s"].fillna(10 ** up["range"][1] / 1.06)
                trace: dict[str, Any] = {
                    "type": "scatter",
                    "mode": "markers",
                    "x": values(own["prompt_tokens"]),
                    "y": values(first_s),
                }
                hover = f"<b>{escape(policy)}</b>{'' if kind == ALL else f', {kind} user'}<br>%{{x:,}} tokens, "
                trace["hovertemplate"] = f"{hover}TTFT %{{y:.3~g}} s{', missed' if missed else ''}<extra></extra>"
                told = [own[c].astype(str).tolist() if c == "phase" else values(own[c]) for c, *_ in figures]
                trace["customdata"] = [list(line) for line in zip(*told, strict=True)]
                traces.append(trace | {"meta": {"policy": policy, "part": kind, "missed": missed}})
    layout: dict[str, Any] = {
        "xaxis": log_axis("Prompt length (tokens, log scale)", known["prompt_tokens"], 1.1),
        "yaxis": up,
    }
    layout["figures"] = [{"column": column, "unit": unit, "words": words} for column, unit, words in figures]
    text = "A mark is a request; crosses missed an SLO, those on the upper edge never got a first token. "
    text += "A click shows what is known of one."
    if left_out:
        text += f" Of each policy {most:,} are shown, up to half of them misses, the others evenly spread."
    return Chart("requests", titled("TTFT against prompt length", at), text, traces, layout, wide=True)


def _some(mine: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most so many requests: misses up to half, the others evenly spread."""
    if len(mine) <= most:
        return mine
    missed, met = (mine[mine["attained"].astype(bool) == met] for met in (False, True))
    few = missed.iloc[_spread(len(missed), max(most // 2, most - len(met)))]
    return pd.concat([few, met.iloc[_spread(len(met), most - len(few))]])


def _spread(count: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)) if count else np.array([], int)


FIGURES = (
    ("seed", "", "seed"),
    ("index", "", "request"),
    ("phase", "", ""),
    ("queue_time_s", "s", "queue"),
    ("ttft_s", "s", "TTFT"),
    ("ttft_slo_s", "s", "its SLO"),
    ("max_itl_s", "s", "longest gap"),
    ("tbt_slo_s", "s", "its SLO"),
    ("num_late_gaps", "", "late gaps"),
    ("e2e_latency_s", "s", "E2E"),
    ("output_tokens", "", "output tokens"),
    ("num_preemptions", "", "preemptions"),
)
"""What is shown of a request: column, unit, words."""
