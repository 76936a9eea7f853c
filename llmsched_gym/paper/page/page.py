"""The page as a whole: its sections in order, its figures beside it."""

# ruff: noqa: E501  (lines of prose)

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmsched_gym.paper.page.claims import section_claims
from llmsched_gym.paper.page.figures import all_figures
from llmsched_gym.paper.page.measured import section_bounds, section_main, section_parameters, section_strict
from llmsched_gym.paper.page.sustained import section_ablation, section_routers, section_theory
from llmsched_gym.paper.page.trust import section_assumption, section_robustness, section_speed
from llmsched_gym.report import statistics

DPI = 110


def write_page(data: dict[str, Any], plan: Any, docs: Path) -> Path:
    """Write docs/results.md and docs/figures; returns the page's path."""
    long, short = statistics.tidy(data["main_table"]), statistics.tidy(data["seeds_table"])
    folder = docs / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in all_figures(data, long, short).items():
        figure.savefig(folder / f"{name}.png", dpi=DPI, metadata={"Software": None})
    where = "the paper's own trace (openchat_sharegpt4)" if plan.world.trace else "lengths fitted to the paper's trace"
    sections = [
        f"""# Results

Written by `llmsched reproduce` (`make paper`); every number comes from its runs and repeats to the last digit with the same
code and data, speed excepted. Workload: {where}, Poisson arrivals, 5 % strict users with a TBT SLO of 0.1 s, 95 %
with 0.5 s; token budget 512, at most 128 running requests, 14,733 KV blocks; the cost model of one RTX 6000 Ada with
Mistral-7B unless said otherwise. The figures are simulated: what they say of real machines is as good as the cost model.
""",
        section_assumption(data),
        section_claims(data, long, short, plan),
        section_main(long, plan),
        section_parameters(data),
        section_strict(data),
        section_bounds(data, short),
        section_theory(data, plan),
        section_routers(data, plan),
        section_ablation(data),
        section_robustness(data),
        section_speed(data, plan),
    ]
    path = docs / "results.md"
    path.write_text("\n".join(sections), encoding="utf-8")
    return path
