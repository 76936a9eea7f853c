"""What schedulers do at each load: the main table, the parameter plots, strict users, the distance to the best."""

# ruff: noqa: E501  (lines of prose)

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from llmsched_gym.paper.constants import PUBLISHED_SWEEP
from llmsched_gym.paper.page.figures import strict_rows
from llmsched_gym.paper.page.text import number, percent, seconds, table
from llmsched_gym.report import intervals, statistics


def section_main(long: pd.DataFrame, plan: Any) -> str:
    """The main table: every scheduler at every load, in one long run each."""
    loads = [q for q in sorted(long["load"].unique()) if q >= 1.0]
    lines = []
    for policy in statistics.policies_of(long):
        own = long[long["policy"] == policy].set_index("load")
        lines.append([policy, *(number(own["ttft_p50_s"].get(q)) for q in loads)])
    ttft = table(["median TTFT, s", *(f"{q:g}/s" for q in loads)], lines)
    lines = []
    for policy in statistics.policies_of(long):
        own = long[long["policy"] == policy].set_index("load")
        lines.append([policy, *(seconds(own["ttft_p99_s"].get(q)) for q in loads)])
    tail = table(["p99 TTFT, s", *(f"{q:g}/s" for q in loads)], lines)
    lines = []
    for policy in statistics.policies_of(long):
        own = long[long["policy"] == policy].set_index("load")
        cells = (
            f"{number(own['itl_p99_s_strict'].get(q), 3)} / {number(own['itl_p99_s_relaxed'].get(q), 3)}" for q in loads
        )
        lines.append([policy, *cells])
    itl = table(["p99 ITL strict / relaxed, s", *(f"{q:g}/s" for q in loads)], lines)
    return f"""## Main table

One run of {plan.num_requests:,} requests per scheduler and load (seed 0; the plots go down to {plan.loads[0]:g} requests/s).
`learned` is the policy that comes with this package, trained on other worlds than this one ([agents_results.md](agents_results.md#where-mixing-costs)).

{ttft}

{tail}

The tail is the price of attainment: a scheduler that lets prompts wait once they are too late keeps the others in time, and
those it puts off wait for minutes.

{itl}

![Median TTFT](figures/ttft_median.png) ![p99 TTFT](figures/ttft_p99.png)
![p99 ITL, strict](figures/itl_strict.png) ![p99 ITL, relaxed](figures/itl_relaxed.png)
![Batch time](figures/batch_time.png) ![KV use](figures/kv_use.png)
"""


def section_parameters(data: dict[str, Any]) -> str:
    """The cost model beside the authors' chunk sweep."""
    lines = []
    errors = []
    for point, (chunk, ttft_ms, batch_ms) in zip(data["budget_sweep"], PUBLISHED_SWEEP, strict=True):
        off = point["ttft_ms"] / ttft_ms - 1
        errors.append(off)
        lines.append(
            [
                f"{chunk}",
                number(point["ttft_ms"], 1),
                number(ttft_ms, 1),
                percent(off, 1),
                number(point["batch_ms"], 1),
                number(batch_ms, 1),
                percent(point["batch_ms"] / batch_ms - 1, 1),
            ]
        )
    header = ["token budget", "TTFT, ms", "published", "off", "batch, ms", "published", "off"]
    return f"""## Parameter plots

{table(header, lines)}

Root mean square of the relative TTFT error: {np.sqrt(np.mean(np.square(errors))):.1%}. The profile is fitted to these TTFTs, so this is
its error in sample. Batch times are averages over the chunks *and* the one decode of each request, as published.

![Token budget](figures/budget_sweep.png)

Decodes in a batch against its time and running requests against KV use, every 20th batch of one run at 1.6 requests/s:

![Batches](figures/batches.png)
"""


def section_strict(data: dict[str, Any]) -> str:
    """Attainment by the share of strict users."""
    rows = strict_rows(data)
    shares = sorted(rows["strict_share"].unique())
    lines = []
    for policy in rows["policy"].unique():
        cells = []
        for share in shares:
            own = rows[(rows["policy"] == policy) & (rows["strict_share"] == share)]
            whole = 100 * own["slo_attainment"].mean()
            strict = own["slo_attainment_strict"].mean() * 100
            cells.append(f"{whole:.1f} / {number(strict, 1)}")
        lines.append([policy, *cells])
    return f"""## Share of strict users

SLO attainment in per cent, of all and of strict users (TTFT within its SLO and every gap within the user's TBT SLO), at 1.6 requests/s:

{table(["all / strict", *(f"{s:.0%} strict" for s in shares)], lines)}

![Strict shares](figures/strict_shares.png)
"""


def section_bounds(data: dict[str, Any], short: pd.DataFrame) -> str:
    """How far schedulers are from what is possible."""
    loads = sorted(short["load"].unique())
    lines = []
    for policy in statistics.policies_of(short):
        own = short[short["policy"] == policy]
        cells = []
        for load in loads:
            values = own.loc[own["load"] == load, "slo_attainment"].tolist()
            ends = intervals.interval(values, (0.0, 1.0))
            cells.append(
                f"{100 * np.mean(values):.1f}" + (f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if ends else "")
            )
        lines.append([policy, *cells])
    found = [r for r in data["capacity"] if r["criterion"] == "ttft-median" and r["capacity_qps"]]
    capacity = data["fluid"][0]["qps"]
    tops = ", ".join(f"{r['policy']} {r['capacity_qps'] / capacity:.0%}" for r in found)
    return f"""## How far from the best

SLO attainment in per cent (TTFT and every gap within the SLOs), mean over seeds with 95 % intervals (Student's t):

{table(["scheduler", *(f"{q:g}/s" for q in loads)], lines)}

![Attainment](figures/attainment.png)

Two bounds: the fluid capacity, {capacity:.2f} requests/s, of which the capacities by median TTFT are: {tops}. And `shortest-total`,
which knows every output length and serves the request with the least work left first, its batches capped at 0.8 of the
TBT SLO. It is a bound on what knowing lengths is worth to this kind of scheduler, not on attainment: a scheduler that
looks at deadlines instead (on-time) may attain more without knowing any. A capacity by median TTFT can exceed what
is stable, because a median does not see the tenth of long prompts that starve.
"""
