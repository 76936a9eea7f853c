"""How far from the best: what a report says of the fluid capacity and of the scheduler that knows output lengths."""

from __future__ import annotations

import numpy as np
import pandas as pd

from llmsched_gym.fluid import Fluid
from llmsched_gym.report import statistics
from llmsched_gym.report.bounds import bound_of
from llmsched_gym.report.results import Results
from llmsched_gym.report.tables import BEST, HEAD, Cell, Table
from llmsched_gym.report.text import estimate, interval, load_label, number, same


def findings(results: Results) -> list[str]:
    """Sentences on the fluid capacity and on the distance to the clairvoyant policy, as far as there are any."""
    found = []
    if results.fluid is not None:
        top = float(results.rows["load"].max())
        which = "highest load" if results.rows["load"].nunique() > 1 else "load"
        unit = statistics.load_unit(results.rows)
        share = f"The {which} that was run is {100 * top / results.fluid.qps:.0f} % of it."
        found.append(f"**Fluid capacity:** {capacity_text(results.fluid, unit)} {share}")
    gaps = statistics.attainment_gap(results.rows)
    loads = dict.fromkeys((results.focus, float(results.rows["load"].max())))
    parts = [part for load in loads if (part := _at_load(results.rows, gaps, load))]
    if parts:
        bound = bound_of(statistics.policies_of(results.rows))
        who = "the best of the others" if gaps["policy"].nunique() > 1 else "the other one"
        text = f"**How far from the best:** against `{bound}`, which knows every output length, {who} attains "
        found.append(f"{text}{' and '.join(parts)}.")
        if gaps["value"].max() > 0:
            found[-1] += f" More than `{bound}` is possible: it serves the least work left first, whatever is due."
    return found


def capacity_text(fluid: Fluid, unit: str = "requests/s") -> str:
    """What the capacity is, what it means and what limits it."""
    text = (
        f"no scheduler that serves everybody sustains more than {fluid.qps:.2f} {unit} in the long run on this "
        f"machine with these lengths. Computing limits it"
    )
    if fluid.limited_by == "computing":
        return f"{text} alone, in batches of {fluid.mean_batch_tokens:,.0f} tokens."
    what, more, price = "KV memory", "KV blocks", fluid.memory_price
    if fluid.limited_by == "max_num_seqs":
        what, more, price = "`max_num_seqs`", "running requests", fluid.seqs_price
    batches = f"which keeps batches at {fluid.mean_batch_tokens:,.0f} tokens"
    return f"{text}, and so does {what}, {batches}: a tenth more {more} would raise it by about {10 * price:.1f} %."


def above_fluid(capacity: pd.DataFrame, fluid: Fluid | None) -> str:
    """A sentence on the policies whose capacity lies above the fluid one; nothing if there are none."""
    if fluid is None:
        return ""
    above = capacity[capacity["capacity_qps"] > fluid.qps]
    if above.empty:
        return ""
    who = ", ".join(f"`{p}` {q:.2f}" for p, q in zip(above["policy"], above["capacity_qps"], strict=True))
    shares = "attained_by_decile" in above
    last = [v[-1] for v in (above["attained_by_decile"] if shares else []) if isinstance(v, list) and v[-1] is not None]
    tail = f" (of the tenth with the longest prompts {100 * min(last):.0f} % attain)" if last else ""
    return (
        f" Above the fluid capacity, {fluid.qps:.2f}: {who}. Nobody serves everyone at such rates: the criterion does "
        f"not see the long prompts that starve{tail}, and p99 TTFT shows them."
    )


def _at_load(rows: pd.DataFrame, gaps: pd.DataFrame, load: float) -> str:
    """The best policy, and SLAI, against the bound at one load; nothing if none can be compared."""
    own = gaps[(gaps["load"] == load) & gaps["value"].notna()].set_index("policy")
    if own.empty:
        return ""
    best = str(own["value"].idxmax())
    who = f"`{best}`"
    if "slai" in own.index and best != "slai":
        who += f"; `slai` {points(own.loc['slai'])}"
    return f"{points(own.loc[best])} at {load_label(rows, load)} ({who})"


def points(line: pd.Series) -> str:
    """A difference in attainment in words: 3.1 points [2.6–3.7] less."""
    sign = -1 if line["value"] < 0 else 1
    low, high = sorted((100 * sign * line["low"], 100 * sign * line["high"]))
    return estimate(100 * sign * line["value"], low, high, " points", 1) + (" less" if sign < 0 else " more")


def gap_table(results: Results) -> Table | None:
    """SLO attainment of each policy less that of the clairvoyant one, percentage points by load."""
    gaps = statistics.attainment_gap(statistics.binned_loads(results.rows))
    if gaps.empty:
        return None
    bound, unit = bound_of(statistics.policies_of(results.rows)), statistics.load_unit(results.rows)
    wide = gaps.set_index(["policy", "load"])
    loads, policies = list(gaps["load"].unique()), list(gaps["policy"].unique())
    top = gaps.groupby("load")["value"].max()
    lines = []
    for policy in policies:
        cells = []
        for load in loads:
            line = wide.loc[(policy, load)]
            kind = BEST if len(policies) > 1 and same(100 * line["value"], 100 * top[load], 1) else ""
            ends = interval(100 * line["low"], 100 * line["high"], 1)
            cells.append(Cell(_signed(100 * line["value"]), ends, kind))
        lines.append([Cell(policy, kind=HEAD), *cells])
    labels, notes = ["policy", *(f"{load:.3g}" for load in loads)], []
    if results.fluid is not None:
        labels = ["policy", *(f"{load:.3g} ({100 * load / results.fluid.qps:.0f} %)" for load in loads)]
        notes = [f"In brackets: the load as a share of the fluid capacity, {results.fluid.qps:.2f} {unit}."]
    title = f"SLO attainment less that of {bound} (percentage points) by load ({unit})"
    return Table(title, [], labels, lines, notes)


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(value, 1) if np.isfinite(value) else number(value)
