"""What schedulers sustain: the fluid capacity and stability, RAD without its principles."""

# ruff: noqa: E501  (lines of prose)

from __future__ import annotations

from typing import Any

from llmsched_gym.paper.page.text import number, table
from llmsched_gym.theory import experiments
from llmsched_gym.theory import figures as theory


def section_theory(data: dict[str, Any], plan: Any) -> str:
    """Fluid capacities, and which share of them schedulers sustain."""
    bounds = [
        [
            theory.device_title(b["profile"]),
            number(b["qps"]),
            " and ".join(f"{n:,}" for n in b["sizes"]) if len(b["sizes"]) <= 2 else number(b["batch_tokens"], 0),
            number(b["decodes_per_batch"], 1),
            f"{b['linear_share']:.0%}",
            b["limited_by"],
        ]
        for b in data["fluid"]
    ]
    lines = []
    for row in data["stability"]:
        judged = row["judged"]
        lines.append(
            [
                theory.device_title(row["profile"]),
                row["policy"],
                f"{100 * judged['drift']:.2f} [{100 * judged['ci_low']:.2f}, {100 * judged['ci_high']:.2f}]",
                judged["verdict"],
                f"{judged['backlog']:.0f}",
                f"{row['boundary_share']:.3f}",
                number(row["boundary_share"] * row["fluid_qps"]),
            ]
        )
    best: dict[str, tuple[str, float]] = {}
    for row in data["stability"]:
        if row["boundary_share"] > best.get(row["profile"], ("", 0.0))[1]:
            best[row["profile"]] = (row["policy"], row["boundary_share"])
    gaps = "; ".join(f"{theory.device_title(p)}: {name}, {share:.1%}" for p, (name, share) in best.items())
    rad = [row["judged"] for row in data["stability"] if row["policy"] == "rad"]
    proven = (
        "bounded on both profiles" if all(j["verdict"] == "bounded" for j in rad) else "not certainly bounded on both"
    )
    above = [r for r in data["stability"] if r["boundary_high"] > 1.0]
    exceeds = "no scheduler sustains more" if not above else f"{above[0]['policy']} is above it, which is a fault"
    return f"""## Stability

The fluid capacity is a rate that no scheduler can sustain more than ([theory.md](theory.md)):

{table(["device", "capacity, requests/s", "optimal batch sizes, tokens", "decodes in a batch", "linear layers' share of time", "limited by"], bounds)}

Drift of the backlog at {experiments.JUDGED:.0%} of it, in per cent of the arrivals, with its 95 % interval over {len(plan.drift_seeds)} seeds of
{plan.drift_requests:,} requests; and the largest load with a bounded backlog, by bisection to 1 %:

{table(["device", "scheduler", "drift at 95 %, % of arrivals", "verdict", "mean backlog, requests", "boundary, share", "requests/s"], lines)}

![Backlogs](figures/backlog.png) ![Boundaries](figures/stability.png)

- RAD's backlog at {experiments.JUDGED:.0%} of the fluid capacity: **{proven}**.
- The bound: {exceeds}; the best come within {max(1 - share for _, share in best.values()):.1%} of it ({gaps}).
{_stability_words(data)}"""


def _stability_words(data: dict[str, Any]) -> str:
    share = {(r["profile"], r["policy"]): r["boundary_share"] for r in data["stability"]}

    def both(policy: str) -> str:
        return " and ".join(f"{share[p, policy]:.1%}" for p in (experiments.SMOOTH, experiments.STAIRCASE))

    return f"""- Of the literature's expectations, that work-conserving schedulers reach the bound and FasterTransformer and vanilla vLLM
  do not: FasterTransformer keeps {both("faster-transformer")} (smooth and staircase). vLLM V0, {both("vllm-v0")}, loses to Sarathi-Serve's
  {both("sarathi")} what its batches of decodes alone cost, once memory is full and prompts come one at a time. So does
  Orca ({both("orca")}), which the literature calls throughput-optimal: with finite memory, being work-conserving is not
  enough. 85 decodes alone take 22 ms, three times as many tokens 29 ms; whole prompts at once leave many batches of the
  former kind behind.
- SLAI's shortest-prompt-first order does not slow everybody down near its boundary but starves the longest prompts: its
  backlog grows by those ({both("slai")}).
- vLLM V1 ({both("vllm-v1")}) takes blocks by the chunk and evicts when decodes find none. Since 0.19 it asks before that whether a
  prompt would fit whole; up to 0.18 it did not, and on the smaller memory recomputed a good part of all prompts
  (`vllm-v1[reserve=false]`: docs/schedulers.md).
"""


def section_routers(data: dict[str, Any], plan: Any) -> str:
    """What routers sustain on unequal replicas."""
    rows = data["router_stability"]
    lines = []
    for row in rows:
        judged = row["judged"]
        lines.append(
            [
                row["policy"],
                f"{100 * judged['drift']:.2f} [{100 * judged['ci_low']:.2f}, {100 * judged['ci_high']:.2f}]",
                judged["verdict"],
                f"{judged['backlog']:,.0f}",
                f"{row['boundary_share']:.3f}",
                number(row["boundary_share"] * row["fluid_qps"], 1),
            ]
        )
    share = {row["policy"]: row["boundary_share"] for row in rows}
    best, in_turn = f"{share['rad-route+rad']:.1%}", f"{share['round-robin+rad']:.1%}"
    return f"""## Stability of routers

The same requests on two H100, two A100 and four RTX 6000 Ada behind a router, which sees them as they are; RAD on each. Their fluid
capacity is {number(rows[0]["fluid_qps"], 1)} requests/s, the sum of the eight ([theory.md](theory.md)). Drift at {experiments.JUDGED:.0%} of it, over
{len(plan.drift_seeds)} seeds of {3 * plan.drift_requests:,} requests, and the largest load with a bounded backlog, by bisection to 2 %:

{table(["router + scheduler", "drift at 95 %, % of arrivals", "verdict", "mean backlog, requests", "boundary, share", "requests/s"], lines)}

![Backlogs](figures/router_backlog.png)

`rad-route`, our reading of the framework's other half, keeps {best} of the bound; in turn, where every replica gets an eighth of the
requests and the slowest serve less than that, {in_turn}.
"""


def section_ablation(data: dict[str, Any]) -> str:
    """RAD without one or both of its principles."""
    lines = []
    for row in data["ablation"]:
        change = f"{100 * row['gain']:+.1f} [{100 * row['gain_low']:+.1f}, {100 * row['gain_high']:+.1f}]"
        whole = row["variant"] == "both principles"
        lines.append(
            [
                theory.device_title(row["profile"]),
                f"{row['size']:,}",
                row["variant"],
                f"{row['served_share']:.3f}",
                "" if whole else change,
            ]
        )
    tile_lines = []
    for t in data["tiles"]:
        extra = ", ".join(f"{int(n):,}: {100 * v:+.1f} %" for n, v in t["extra_8"].items())
        tile_lines.append([theory.device_title(t["profile"]), t["tile"], f"{t['best_512']:,}", f"{t['best']:,}", extra])
    return f"""## RAD without its principles, and off the tile

Requests served at {experiments.OVERLOAD:.0%} of the fluid capacity, as a share of that capacity; changes against whole RAD are paired by seed,
with 95 % intervals.

{table(["device", "batches up to", "RAD", "served, share", "change, %"], lines)}

![Ablation](figures/ablation.png)

Tiling matters where time is a staircase, and not at all where it is smooth; dynamic allocation matters on both, and most where
batches are small, because a side that cannot use its half wastes it. *Both off* can serve more than *dynamic allocation off*:
a fixed half that must be cut to whole tiles loses the rest of the tile as well. Where RAD's own batches are 512 tokens, tiling
off changes nothing: the budget itself is a whole tile and the work fills it.

Tokens per second of the linear layers, RAD's batch sizes k*T, and the time per token of batches 8 tokens longer:

{table(["device", "tile", "k*T up to 512", "k*T up to 8,192", "8 tokens more, time per token"], tile_lines)}

![Tiles](figures/tiles.png)

Where RAD's optimality does not show: throughput is not what users feel. `rad` runs batches of up to 0.8 s on the smooth
profile, and both kinds let prompts pass decodes whenever memory admits them, so gaps between tokens are long: see `rad-512`
in the main table. Finite memory is the other reason: RAD keeps room for the expected output of whoever runs, about a tenth of
what the bound uses.
"""
