"""What a trace is: rates, gaps and lengths in figures and in one plot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llmsched_gym.config import BLOCK_SIZE
from llmsched_gym.report import draw
from llmsched_gym.text import counted
from llmsched_gym.workload.identity import found_share
from llmsched_gym.workload.traces import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WINDOW_S = 60.0
PERCENTILES = (50, 90, 99)
TIMES = (
    *("duration_s", "qps", "peak_qps", "gap_p50_s", "gap_p99_s", "gap_cv", "dispersion", "zero_gaps"),
    "num_steps_back",
)


def facts(trace: Trace, max_model_len: int) -> dict[str, Any]:
    """Figures of a trace, ready for JSON: None where it has no times, or none of a kind."""
    total = trace.prompt_tokens.astype(np.int64) + trace.output_tokens
    sessions = trace.session_id[trace.session_id >= 0] if trace.session_id is not None else np.empty(0, int)
    return {
        "name": trace.name,
        "format": trace.format,
        "num_requests": len(trace),
        "num_dropped": trace.num_dropped,
        "num_images": trace.num_images,
        "num_sessions": len(np.unique(sessions)) or None,
        "turns_mean": len(sessions) / len(np.unique(sessions)) if len(sessions) else None,
        "turns_max": int(np.bincount(sessions).max()) if len(sessions) else None,
        **_reuse(trace),
        **_times(trace),
        **{f"prompt_tokens_{name}": value for name, value in _lengths(trace.prompt_tokens).items()},
        **{f"output_tokens_{name}": value for name, value in _lengths(trace.output_tokens).items()},
        "max_model_len": max_model_len,
        "over_max_model_len": float((total > max_model_len).mean()),
    }


def _reuse(trace: Trace) -> dict[str, Any]:
    """What prompts have in common: None where the file does not say."""
    names = ("block_tokens", "seen_share", "hit_rate", "think_p50_s", "think_p99_s")
    if trace.shares is None:
        return dict.fromkeys(names)
    block = trace.block_tokens or BLOCK_SIZE
    shared = trace.shares[1].astype(np.int64)
    waits = trace.think_s[trace.parent >= 0] if trace.think_s is not None and trace.parent is not None else np.empty(0)
    values = (
        block,
        float(shared.sum() / trace.prompt_tokens.sum(dtype=np.int64)),
        found_share(shared, trace.prompt_tokens, block),
        *(float(np.percentile(waits, q)) if len(waits) else None for q in (50, 99)),
    )
    return dict(zip(names, values, strict=True))


def _times(trace: Trace) -> dict[str, Any]:
    if trace.arrival_s is None:
        return dict.fromkeys(TIMES)
    gaps, counts = np.diff(trace.arrival_s), per_window(trace.arrival_s, WINDOW_S)
    several = len(counts) > 1 and counts.mean() > 0
    values = (
        float(trace.arrival_s[-1]),
        trace.qps,
        float(counts.max() / WINDOW_S) if several else None,
        *(float(np.percentile(gaps, q)) if len(gaps) else None for q in (50, 99)),
        float(gaps.std() / gaps.mean()) if len(gaps) and gaps.mean() > 0 else None,
        float(counts.var() / counts.mean()) if several else None,  # of counts in a minute; 1 is Poisson
        trace.zero_gaps,
        trace.num_steps_back,
    )
    return dict(zip(TIMES, values, strict=True))


def per_window(arrival_s: np.ndarray, window_s: float) -> np.ndarray:
    """Arrivals in each whole window."""
    whole = int(arrival_s[-1] // window_s)
    return np.bincount((arrival_s // window_s).astype(np.int64), minlength=whole)[:whole]


def _lengths(tokens: np.ndarray) -> dict[str, float]:
    p50, p90, p99 = np.percentile(tokens, PERCENTILES)
    return {
        "mean": float(tokens.mean()),
        "p50": float(p50),
        "p90": float(p90),
        "p99": float(p99),
        "max": float(tokens.max()),
    }


@draw.styled
def plot_trace(trace: Trace) -> Figure:
    """Rate over time, distribution of gaps beside a Poisson process's, distributions of lengths."""
    figure = draw.new_figure(12.6, 3.7)
    rate, gaps, lengths = figure.subplots(1, 3)
    title = f"{trace.name}: {counted(len(trace), 'request')}, format {trace.format}"
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    arrival_s = trace.arrival_s
    if arrival_s is not None and trace.qps is not None:
        window_s = max(1.0, float(arrival_s[-1]) / 200)
        counts = per_window(arrival_s, window_s)
        rate.step(window_s * np.arange(len(counts)), counts / window_s, where="post", color="#0072b2", linewidth=1.1)
        rate.axhline(trace.qps, color=draw.INK, linestyle=(0, (4, 3)), linewidth=1.1, label=f"mean {trace.qps:.3g}")
        rate.set(xlabel="Time (s)", ylabel=f"Requests/s, over {window_s:.3g} s", title="Rate", ylim=(0, None))
        own = np.sort(np.diff(arrival_s)) * trace.qps
        steps = np.linspace(0.0, 6.0, 200)
        gaps.plot(own, np.arange(1, len(own) + 1) / len(own), color="#0072b2", drawstyle="steps-post", label="trace")
        gaps.plot(steps, 1 - np.exp(-steps), color=draw.INK, linestyle=(0, (4, 3)), linewidth=1.1, label="Poisson")
        gaps.set(xlabel="Gap between arrivals, in mean gaps", ylabel="Share at or below", title="Gaps", xlim=(0, 6))
        rate.legend(), gaps.legend(loc="lower right")
    else:
        for ax in (rate, gaps):
            ax.text(0.5, 0.5, "no times", ha="center", va="center", transform=ax.transAxes)
            ax.set_axis_off()
    for tokens, label, colour in (
        (trace.prompt_tokens, "prompt", "#d55e00"),
        (trace.output_tokens, "output", "#0072b2"),
    ):
        ordered = np.sort(tokens)
        lengths.plot(ordered, np.arange(1, len(ordered) + 1) / len(ordered), color=colour, label=label)
    lengths.set(xscale="log", xlabel="Tokens (log scale)", ylabel="Share at or below", title="Lengths")
    low, high = lengths.get_xlim()
    draw.log_ticks(lengths.xaxis, low, high, whole=True, numbers=lambda v, _: f"{v:,.0f}")
    lengths.legend(loc="upper left")
    return figure
