"""What sessions come to: turns, contexts, and how much of them was there before.

    python -m llmsched_gym.workload.session_statistics WORKLOAD --max-model-len TOKENS

prints the figures of the shipped workloads' `statistics`.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

import numpy as np
import typer

from llmsched_gym.config import BLOCK_SIZE, ConfigError, Scenario
from llmsched_gym.workload.generate import make_table
from llmsched_gym.workload.identity import found_share
from llmsched_gym.workload.table import RequestTable

DRAWS = 100_000
"""Turns behind a workload's figures."""


def session_statistics(table: RequestTable, block_size: int = BLOCK_SIZE) -> dict[str, Any]:
    """Figures of a table's measured requests, as a JSON object.

    `seen_share` is the share of prompt tokens that an earlier request of the table has had in the same place, and
    `hit_rate` that of those in full blocks of `block_size`, which an infinite cache would find.
    """
    cohort = slice(table.cohort_start, table.cohort_stop)
    prompt, output = table.prompt_tokens[cohort].astype(np.int64), table.output_tokens[cohort]
    shared = table.identity()[1][cohort].astype(np.int64)
    root = table.is_root[cohort]
    turns = np.diff(np.append(np.flatnonzero(root), len(root)))
    figures = {
        "num_requests": len(prompt),
        "num_sessions": len(turns),
        "turns": spread(turns),
        "prompt_tokens": spread(prompt),
        "output_tokens": spread(output),
        "seen_share": round(float(shared.sum() / prompt.sum()), 4),
        "hit_rate": round(found_share(shared, prompt, block_size), 4),
    }
    if table.new_tokens is not None and table.think_s is not None:
        figures["new_tokens"] = spread(table.new_tokens[cohort])
        if not root.all():
            figures["think_s"] = spread(table.think_s[cohort][~root])
    return figures


def spread(values: np.ndarray) -> dict[str, float]:
    """Percentiles and mean, as a JSON object."""
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    mean = float(np.mean(values))
    return {"p50": round(p50, 2), "p90": round(p90, 2), "p99": round(p99, 2), "mean": round(mean, 2)}


def workload_statistics(workload: str, max_model_len: int, num_requests: int = DRAWS) -> dict[str, Any]:
    """The figures of a workload of sessions, drawn with seed 0."""
    scenario = Scenario(
        workload=workload,
        max_model_len=max_model_len,
        qps=1.0,
        num_requests=num_requests,
        warmup_s=0.0,
        drain_s=math.inf,
        arrivals_continue=False,
    )
    return {"max_model_len": max_model_len, **session_statistics(make_table(scenario, 0))}


def main(
    workload: Annotated[str, typer.Argument(help="A workload of sessions: a name or a JSON file.")],
    max_model_len: Annotated[int, typer.Option(min=1, help="Longest prompt + output, tokens.")] = 8192,
    num_requests: Annotated[int, typer.Option(min=1, help="Turns to draw.")] = DRAWS,
) -> None:
    """Print the figures of a workload of sessions."""
    try:
        typer.echo(json.dumps(workload_statistics(workload, max_model_len, num_requests)))
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
