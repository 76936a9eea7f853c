"""Agents of several training seeds against their opponents, on seeds that nothing was trained, tuned or chosen on.

``llmsched compare --agents runs/a/policy,runs/b/policy --opponents tuned-constant,tuned-linear,slai``

Every policy serves the same requests; differences are paired by seed, against the opponent with the highest mean
utility, with 95 % bootstrap intervals. The interquartile mean over agents (Agarwal et al., NeurIPS 2021) says what
training gives, not what the best of a few trainings gave. ``--out`` holds the runs, an interrupted one goes on, and
table.md and table.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import trim_mean

from llmsched_gym.agents.options import fail_in_one_line, option, parse
from llmsched_gym.agents.settings import RUN, WORLD, Spread, World
from llmsched_gym.config import ConfigError, scenario, split_names
from llmsched_gym.evaluation.grid import evaluate
from llmsched_gym.evaluation.spread import choose
from llmsched_gym.interrupts import leave
from llmsched_gym.report import console, intervals
from llmsched_gym.text import between
from llmsched_gym.text import table as markdown_table

METRIC = "mean_utility"

COMPARED = "What is compared"  # a group of help


@dataclass(frozen=True)
class Config(Spread, World):
    agents: str = option("learned", "policies trained with different seeds, separated by commas", group=COMPARED)
    opponents: str = option(
        "tuned-constant,tuned-linear,slai,sarathi", "policies to beat, separated by commas", group=COMPARED
    )
    beside: str = option("", "policies that the table shows too, separated by commas; not to be beaten", group=COMPARED)
    margin: float = option(0.02, "gain in mean utility that counts as winning", group=COMPARED)
    suite: str = option("drift", "suite")
    set: dict[str, Any] = option({}, "any other field of Scenario, as --set qps=1.8; may be repeated")  # noqa: RUF009
    seeds: int = option(20, "seeds of a policy", group=WORLD)
    first_seed: int = option(3000, "the first; below 3,000 seeds are for training and selection", group=WORLD)
    requests: int = option(20_000, "measured requests of a run", group=WORLD)
    out: str = option("runs/compare", "folder of the runs and of the table", group=RUN)


def interquartile_mean(values: Sequence[float]) -> float:
    """Mean without the lowest and the highest quarter."""
    return float(trim_mean(values, 0.25))


def table(
    rows: Sequence[dict[str, Any]], agents: Sequence[str], opponents: Sequence[str], beside: Sequence[str] = ()
) -> dict[str, Any]:
    """Means, intervals and paired differences of all policies from the best opponent."""
    by_policy = {p: [r for r in rows if r["policy"] == p] for p in (*opponents, *beside, *agents)}
    utility = {p: [r[METRIC] for r in own] for p, own in by_policy.items()}
    best = max(opponents, key=lambda p: intervals.mean(utility[p]) or 0.0)
    lines: list[dict[str, Any]] = []
    for policy, own in by_policy.items():
        mean, base = intervals.mean(utility[policy]), intervals.mean(utility[best])
        assert mean is not None and base is not None  # utilities are finite
        lines.append(
            {
                "policy": policy,
                "agent": policy in agents,
                METRIC: mean,
                "interval": intervals.interval(utility[policy]),
                "slo_attainment": intervals.mean([r["slo_attainment"] for r in own]),
                "difference": mean - base,
                "difference_interval": None if policy == best else intervals.difference(utility[policy], utility[best]),
            }
        )
    gains = [line["difference"] for line in lines if line["agent"]]
    return {"best_opponent": best, "lines": lines, "interquartile_mean": interquartile_mean(gains)}


def winners(found: dict[str, Any], margin: float) -> int:
    """Agents ahead of the best opponent by `margin`, with an interval clear of zero."""
    return sum(
        line["agent"] and line["difference"] >= margin and (line["difference_interval"] or (0.0,))[0] > 0.0
        for line in found["lines"]
    )


def markdown(found: dict[str, Any], config: Config) -> str:
    """The table as a page shows it."""
    best = found["best_opponent"]
    rows = []
    for line in sorted(found["lines"], key=lambda line: line[METRIC]):
        against = "-"
        if line["policy"] != best:
            low, high = line["difference_interval"] or (None, None)
            against = f"{line['difference']:+.4f}{between(low, high, 4)}"
        low, high = line["interval"] or (None, None)
        utility = f"{line[METRIC]:.4f}{between(low, high, 3)}"
        rows.append((f"`{line['policy']}`", utility, f"{line['slo_attainment']:.4f}", against))
    num_agents = sum(line["agent"] for line in found["lines"])
    text = [
        markdown_table(("policy", "mean utility", "attainment", f"against `{best}`"), rows),
        "",
        f"Interquartile mean of the agents' differences: {found['interquartile_mean']:+.4f}; "
        f"{winners(found, config.margin)} of {num_agents} gain {config.margin:g} or more, interval clear of zero.",
    ]
    return "\n".join(text) + "\n"


def compare(config: Config) -> str:
    """Run what is missing and write the tables; returns the Markdown one."""
    agents, opponents = split_names([config.agents], "agents"), split_names([config.opponents], "opponents")
    beside = split_names([config.beside], "beside") if config.beside else []
    if len({*agents, *opponents, *beside}) < len(agents) + len(opponents) + len(beside):
        raise ConfigError(f"agents: expected policies that are named once, got {config.agents!r}")
    world = scenario(config.suite, **{"num_requests": config.requests, **config.set})
    out = Path(config.out)
    policies = [*opponents, *beside, *agents]
    chosen = choose(config.workers, config.ray, config.ray_address, policies)
    with chosen as places, console.progress_bar("runs") as progress:
        rows = evaluate(
            world,
            policies,
            seeds=config.seeds,
            first_seed=config.first_seed,
            workers=places,
            out=out,
            progress=progress,
        )
    found = table(rows, agents, opponents, beside)
    text = markdown(found, config)
    (out / "table.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "table.md").write_text(text)
    return text


def command(argv: Sequence[str] | None = None, program: str | None = None) -> None:
    """Run the command line; raises what is wrong with it."""
    print(compare(parse(Config, argv, __doc__, program)), end="")


def main() -> int:
    return fail_in_one_line(command, "interrupted: the same command goes on where it stopped")


if __name__ == "__main__":
    from llmsched_gym.agents import compare as module  # under its one name, not this copy of it

    leave(module.main())
