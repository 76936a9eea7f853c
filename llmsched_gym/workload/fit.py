"""Fit a length distribution to a trace, and show the two side by side.

    python -m llmsched_gym.workload.fit FILE --name NAME --out FILE.json [--report DIR]

The result is a set of quantiles, small enough to be called a figure and not a copy of the trace. The JSON file serves
as `workload="FILE.json"`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from llmsched_gym.config import ConfigError
from llmsched_gym.files import write_text
from llmsched_gym.workload.lengths import LengthTable, load_lengths, parse_lengths
from llmsched_gym.workload.traces import Trace, TraceError, load_trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TAIL_PROBS = (0.002, 0.005, 0.985, 0.99, 0.992, 0.995, 0.998, 0.999)
OUTPUT_TAIL_PROBS = (0.985, 0.995)
PROMPT_KNOTS = 129  # evenly spaced quantiles of the prompt length, besides TAIL_PROBS
OUTPUT_KNOTS = 33  # evenly spaced quantiles of the output length in each bin, besides OUTPUT_TAIL_PROBS
NUM_BINS = 32  # equally likely ranges of prompt lengths
MIN_ROWS = 10 * NUM_BINS
REPORT_DRAWS = 50_000

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def fit_lengths(trace: Trace, name: str, source: str, max_total_tokens: int | None = None) -> dict[str, Any]:
    """Quantile tables of a trace's lengths, in the JSON form that `lengths.parse_lengths` reads.

    `max_total_tokens` defaults to the largest total in the trace. Raises :class:`ConfigError` for too few rows.
    """
    if len(trace) < MIN_ROWS:
        raise ConfigError(f"{trace.name}: {len(trace)} rows; a fit needs at least {MIN_ROWS}")
    order = np.argsort(trace.prompt_tokens, kind="stable")
    prompt, output = trace.prompt_tokens[order], trace.output_tokens[order]
    prompt_probs = np.unique(np.concatenate([np.linspace(0.0, 1.0, PROMPT_KNOTS), TAIL_PROBS]))
    borders = np.rint(np.arange(1, NUM_BINS) * (len(output) / NUM_BINS)).astype(int)
    output_probs = np.unique(np.concatenate([np.linspace(0.0, 1.0, OUTPUT_KNOTS), OUTPUT_TAIL_PROBS]))
    return {
        "name": name,
        "source": source,
        "statistics": summary(trace.prompt_tokens, trace.output_tokens),
        "max_total_tokens": max_total_tokens or int((prompt + output).max()),
        "prompt": {"probs": rounded(prompt_probs), "tokens": rounded(np.quantile(prompt, prompt_probs), 1)},
        "output": {
            "probs": rounded(output_probs),
            "tokens": [rounded(np.quantile(part, output_probs), 1) for part in np.split(output, borders)],
        },
    }


def summary(prompt: np.ndarray, output: np.ndarray) -> dict[str, Any]:
    """Request count, p50/p90/p99/mean of prompt, output and total tokens, and the prompt-output correlation."""

    def of(tokens: np.ndarray) -> dict[str, float]:
        p50, p90, p99 = np.percentile(tokens, [50, 90, 99])
        return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "mean": round(float(tokens.mean()), 1)}

    return {
        "num_requests": len(prompt),
        "prompt_tokens": of(prompt),
        "output_tokens": of(output),
        "total_tokens": of(prompt + output),
        "correlation": round(float(np.corrcoef(prompt, output)[0, 1]), 4),
    }


def ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance: the largest gap between the two empirical distribution functions."""
    at = np.union1d(a, b)
    cdf_a, cdf_b = (np.searchsorted(np.sort(x), at, "right") / len(x) for x in (a, b))
    return float(np.abs(cdf_a - cdf_b).max())


def fit_report(trace_path: str | Path, workload: str, out_dir: str | Path) -> dict[str, Any]:
    """Compare a trace with 50,000 draws from a workload: figures, and their distribution functions as a PNG.

    Returns `{"workload", "trace", "fitted", "ks_prompt", "ks_output", "ks_total", "plot"}`; the PNG is
    `out_dir/fit_NAME.png`.
    """
    from matplotlib.figure import Figure  # the object API: no state shared with the caller's pyplot

    trace, table = load_trace(trace_path), load_lengths(workload)
    prompt, output = draw(table, REPORT_DRAWS, seed=0)
    pairs = {
        "prompt": (trace.prompt_tokens, prompt),
        "output": (trace.output_tokens, output),
        "total": (trace.prompt_tokens + trace.output_tokens, prompt + output),
    }
    distance = {what: ks_distance(*pair) for what, pair in pairs.items()}
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (what, (measured, drawn)) in zip(panels, pairs.items(), strict=True):
        _plot_cdf(axes, measured, f"{trace.name} ({len(measured):,} requests)", color="0.6", linewidth=4)
        _plot_cdf(axes, drawn, f"{table.name} ({len(drawn):,} draws)", color="C0", linewidth=1.5)
        axes.set(title=f"KS distance {distance[what]:.4f}", xlabel=f"{what} length (tokens)")
        axes.locator_params(axis="x", nbins=6)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of requests at or below (0 to 1)")
    panels[0].legend(loc="lower right", fontsize="small")
    plot = Path(out_dir) / f"fit_{table.name}.png"
    plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(plot, dpi=120)
    return {
        "workload": table.name,
        "trace": summary(trace.prompt_tokens, trace.output_tokens),
        "fitted": summary(prompt, output),
        **{f"ks_{what}": round(value, 5) for what, value in distance.items()},
        "plot": str(plot),
    }


def draw(table: LengthTable, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n independent (prompt, output) lengths, for comparisons."""
    return table.draw(np.random.default_rng(seed).random((n, 2)))


def _plot_cdf(axes: Axes, tokens: np.ndarray, label: str, **style: Any) -> None:
    tokens = np.sort(tokens)
    axes.plot(tokens, np.arange(1, len(tokens) + 1) / len(tokens), drawstyle="steps-post", label=label, **style)


def rounded(values: np.ndarray, digits: int = 6) -> list[float]:
    """Numbers for a JSON file; whole ones as integers."""
    return [int(value) if value == int(value) else value for value in np.round(values, digits).tolist()]


@app.command()
def main(
    file: Annotated[Path, typer.Argument(help="Trace file; its format is told by the header.")],
    name: Annotated[str, typer.Option(help="Name of the workload.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    source: Annotated[str, typer.Option(help="Where the trace comes from, licence included.")] = "",
    max_total_tokens: Annotated[int | None, typer.Option(help="Longest prompt + output; default: the trace's.")] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for the plot of trace against draws.")] = None,
) -> None:
    """Fit a length distribution to a trace."""
    try:
        table = fit_lengths(load_trace(file), name, source or file.name, max_total_tokens)
        parse_lengths(table, name)
    except (ConfigError, TraceError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, lengths_text(table))
    if report is not None:
        typer.echo(json.dumps(fit_report(file, str(out), report), indent=2))


def lengths_text(table: dict[str, Any]) -> str:
    """JSON with one line per list of figures."""
    rows = ",\n      ".join(json.dumps(row) for row in table["output"]["tokens"])
    slim = {**table, "output": {**table["output"], "tokens": "ROWS"}}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in slim.items()]
    return "{\n" + ",\n".join(lines).replace('"ROWS"', "[\n      " + rows + "\n  ]") + "\n}\n"


if __name__ == "__main__":
    app()
