"""What deciding better could gain: ``python -m llmsched_gym.agents.headroom --planner``.

Mean utility of the informed planner, the uninformed one and rules on the same requests
(:mod:`~llmsched_gym.agents.planner`), by suite, profile and load; differences are paired by seed, with Student's t
intervals from ten seeds on. The best rule is the best of the alternatives held throughout, by its mean on these very
seeds, which flatters it. Where the informed planner gains less than 0.01 over it, a suite is solved by a rule, as far
as such a planner can tell: on average, where the interval has 0.01 in it.

Each run is a line of ``--out``; a command that is given again goes on behind what is there.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_gym.agents.futures import check_drawable, is_drawable
from llmsched_gym.agents.options import MOST_SEEDS, option, parse
from llmsched_gym.agents.planner import ALTERNATIVES, BASE, Plan, mean_utility, run_planned, schedulers
from llmsched_gym.config import ClusterScenario, ConfigError, Scenario, scenario, split_names
from llmsched_gym.evaluation.grid import check
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.files import claim_file, digest_of, make_folder
from llmsched_gym.fluid import fluid_capacity
from llmsched_gym.report import console, intervals
from llmsched_gym.text import table

OWN = "own"
INFORMED, UNINFORMED = "informed", "uninformed"
SOLVED = 0.01
"""Of mean utility: who gains less with the future known leaves a suite to rules."""


@dataclass(frozen=True)
class Config:
    suites: str = option("default,paper,drift,burst,tenants", "suites of one engine, with commas between")
    profiles: str = option("rtx6000ada-mistral-7b,rtx6000ada-mistral-7b-vllm", "cost profiles")
    loads: str = option("own,0.95", "shares of the fluid capacity; own: the suite's own rates")
    seeds: int = option(10, "seeds of a policy", most=MOST_SEEDS)
    first_seed: int = option(3000, "the first")
    num_requests: int = option(300, "measured requests of a run")
    warmup_s: float = option(30.0, "seconds of arrivals before them (suites without a warm-up keep theirs)")
    interval_s: float = option(1.0, "simulated seconds between decisions", positive=True)
    horizon_s: float = option(60.0, "simulated seconds of a rollout", positive=True)
    futures: int = option(4, "drawn futures of a decision; 0: no uninformed planner", low=0)
    margin: float = option(0.0, "standard errors by which futures must favour leaving on-time; 0: their mean decides")
    alternatives: str = option("", "schedulers to try, the first follows all others; with ; between, none: sixteen")
    set: dict[str, Any] = option({}, "any other field of Scenario, as --set jitter=0; may be repeated")  # noqa: RUF009
    out: str = option("runs/planner.jsonl", "file of runs, one a line")


Row = dict[str, Any]

OPTIONS = {"profile": "--profiles", "num_requests": "--num-requests", "warmup_s": "--warmup-s"}
"""Of fields of the scenario, which --set does not take."""


def worlds(config: Config) -> Iterator[tuple[tuple[str, str, str], Scenario]]:
    """(suite, profile, load) and the scenario, each; ConfigError for a bad one."""
    for name, flag in OPTIONS.items():
        if name in config.set:
            raise ConfigError(f"set: {name} has an option of its own, {flag}")
    names = [split_names([getattr(config, field)], field) for field in ("suites", "profiles", "loads")]
    for suite, profile, load in itertools.product(*names):
        world = scenario(suite, num_requests=config.num_requests, profile=profile, **config.set)
        if isinstance(world, ClusterScenario):
            raise ConfigError(f"suites: expected suites of one engine, got {suite!r}")
        world = world.replace(warmup_s=min(world.warmup_s, config.warmup_s))
        yield (
            (suite, profile, load),
            world if load == OWN else world.replace(qps=_share(load) * fluid_capacity(world).qps),
        )


def _share(load: str) -> float:
    try:
        share = float(load)
    except ValueError:
        share = 0.0
    if not 0.0 < share < 10.0:
        raise ConfigError(f"loads: expected own or shares of the fluid capacity, 0 to 10, got {load!r}")
    return share


def _alternatives(config: Config) -> tuple[str, ...]:
    return tuple(name for name in config.alternatives.split(";") if name) or ALTERNATIVES


def plans(config: Config, world: Scenario) -> dict[str, Plan]:
    """Planners by name; the uninformed one only where futures can be drawn."""
    informed = Plan(config.interval_s, config.horizon_s, alternatives=_alternatives(config))
    found = {INFORMED: informed}
    if config.futures and is_drawable(world):
        check_drawable(world)
        found[UNINFORMED] = replace(informed, futures=config.futures, margin=config.margin)
    return found


def run_one(world: Scenario, policy: str | Plan, seed: int) -> Row:
    """One run as figures: mean utility, seconds, of a planner also decisions and the share that kept the base."""
    start = time.perf_counter()
    if isinstance(policy, str):
        return {"mean_utility": mean_utility(simulate(world, policy, seed)), "seconds": time.perf_counter() - start}
    planned = run_planned(world, policy, seed)
    kept = float(np.mean(np.array(planned.chosen) == 0))
    return {
        "mean_utility": mean_utility(planned.episode),
        "seconds": time.perf_counter() - start,
        "decisions": len(planned.chosen),
        "kept": kept,
    }


def _read(out: Path) -> list[Row]:
    """Runs that are there; what a kill has left of a last line is cut off."""
    if not out.exists():
        return []
    text = out.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        out.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def _is_own(out: Path) -> bool:
    first = out.read_text(encoding="utf-8").partition("\n")[0]
    return not first or json.loads(first).keys() >= {"run", "policy", "mean_utility"}


def headroom(config: Config) -> list[Row]:
    """Run what is not there yet; returns one line a world, see :func:`summary`."""
    out = Path(config.out)
    claim_file(out, "file of planners' runs", _is_own)
    schedulers(_alternatives(config))
    found = list(worlds(config))
    for _, world in found:
        check(world, [BASE], [world.qps], config.first_seed)
    by_world = [plans(config, world) for _, world in found]
    make_folder(out.parent)
    done = {row["run"]: row for row in _read(out)}
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    runs = []
    for (place, world), planned in zip(found, by_world, strict=True):
        policies: dict[str, str | Plan] = {name: name for name in _alternatives(config)}
        policies |= planned
        for name, seed in itertools.product(policies, seeds):
            plan = policies[name]
            about = asdict(plan) if isinstance(plan, Plan) else plan
            runs.append((digest_of([world.to_dict(), about, seed]), place, world, name, plan, seed))
    rows = []
    doing = ""
    with console.progress_bar("runs", lambda: doing) as progress, out.open("a", encoding="utf-8") as lines:
        for number, (run, (suite, profile, load), world, name, plan, seed) in enumerate(runs):
            doing = f"{suite} {profile} {load} {name} {seed}"
            progress(number, len(runs))
            if run not in done:
                where = {"run": run, "suite": suite, "profile": profile, "load": load, "qps": world.qps}
                done[run] = where | {"policy": name, "seed": seed} | run_one(world, plan, seed)
                lines.write(json.dumps(done[run]) + "\n")
                lines.flush()
            rows.append(done[run])
    return summary(rows)


def summary(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One line a world: the best rule, means by policy, and paired differences, each with its interval or None.

    `solved` is whether the informed planner gains less than 0.01 over the best rule, `certain` whether the interval
    says so too.
    """
    found = []
    for place in dict.fromkeys((row["suite"], row["profile"], row["load"]) for row in rows):
        here = [row for row in rows if (row["suite"], row["profile"], row["load"]) == place]
        by_policy: dict[str, list[float]] = {}
        for row in sorted(here, key=lambda row: row["seed"]):
            by_policy.setdefault(row["policy"], []).append(row["mean_utility"])
        means = {name: float(np.mean(values)) for name, values in by_policy.items()}
        best = max((name for name in means if name not in (INFORMED, UNINFORMED)), key=lambda name: means[name])
        line: Row = dict(zip(("suite", "profile", "load"), place, strict=True))
        line |= {"qps": here[0]["qps"], "best": best, "best_utility": means[best], "means": means}
        for name, (to, base) in itertools.product((INFORMED, UNINFORMED), (("base", BASE), ("best", best))):
            if name in means and base in means:
                line[f"{name}_over_{to}"] = means[name] - means[base]
                line[f"{name}_over_{to}_interval"] = intervals.difference(by_policy[name], by_policy[base])
        ends = line[f"{INFORMED}_over_best_interval"]
        line["solved"] = line[f"{INFORMED}_over_best"] < SOLVED
        line["certain"] = ends is not None and (ends[1] < SOLVED or ends[0] >= SOLVED)
        found.append(line)
    return found


def as_text(lines: Sequence[Mapping[str, Any]]) -> str:
    """The table, Markdown."""

    def gain(line: Mapping[str, Any], name: str, to: str) -> str:
        if f"{name}_over_{to}" not in line:
            return "-"
        ends = line[f"{name}_over_{to}_interval"]
        return f"{line[f'{name}_over_{to}']:+.3f}" + (f" [{ends[0]:+.3f}, {ends[1]:+.3f}]" if ends else "")

    def mean(line: Mapping[str, Any], name: str) -> str:
        return f"{line['means'][name]:.3f}" if name in line["means"] else "-"

    head = ["suite", "profile", "load", "requests/s", f"`{BASE}`", "best rule", ""]
    for name in (INFORMED, UNINFORMED):
        head += [name, f"over `{BASE}`", "over the best rule"]
    body = []
    for line in lines:
        row = [line["suite"], line["profile"], line["load"], "drawn" if line["qps"] is None else f"{line['qps']:.2f}"]
        row += [mean(line, BASE), f"`{line['best']}`", f"{line['best_utility']:.3f}"]
        for name in (INFORMED, UNINFORMED):
            row += [mean(line, name), gain(line, name, "base"), gain(line, name, "best")]
        verdict = "solved by a rule" if line["solved"] else f"{SOLVED:g} or more to gain"
        body.append([*row, verdict + ("" if line["certain"] else ", on average")])
    return table([*head, "verdict"], body)


def planner(argv: Sequence[str]) -> None:
    """The command: prints the table."""
    print(as_text(headroom(parse(Config, argv, __doc__, "python -m llmsched_gym.agents.headroom --planner"))))
