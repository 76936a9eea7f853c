"""Standard results: train what presets describe, several seeds each, and score it.

``python -m llmsched_gym.agents.benchmark --presets 'default-preset-*' --steps 1e6 --out runs/benchmark``

A preset is a file of ``agents/presets``: a learner with its settings in an environment. What it learnt is judged on
seeds that nobody trained on, in scores: 0 is the scheduler `random`, 1 the best of RULES on selection seeds. ``--out``
has results.jsonl, a line for every finished training, the trainings' folders, benchmark.md, benchmark.json and
curves.png. The same command again goes on after an interruption; more presets or seeds may be asked for then.

Decision times are not charged. Needs ``pip install '.[agents]'``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_gym.agents.benchmark_learners import SELECTION, Training, figures_of, learn, try_out, utilities
from llmsched_gym.agents.benchmark_presets import Preset, find_presets
from llmsched_gym.agents.benchmark_scores import Reference, curves, lines_of, markdown, over_environments
from llmsched_gym.agents.options import MOST_SEEDS, fail_in_one_line, option, parse
from llmsched_gym.agents.seeds import SELECTION_SEEDS, check_seeds
from llmsched_gym.config import ConfigError, Scenario
from llmsched_gym.cost import ProfileError
from llmsched_gym.evaluation.grid import check
from llmsched_gym.evaluation.spread import opened, spread
from llmsched_gym.evaluation.store import lock_folder
from llmsched_gym.files import claim_folder, make_folder, write_text
from llmsched_gym.interrupts import leave
from llmsched_gym.report import console
from llmsched_gym.workload import TraceError

RULES = (
    "sarathi",
    "sarathi-spf",
    "srpt-capped",
    "feasible-first",
    "slai",
    "slai[hold=true]",
    "slai-priority",
    "on-time",
)
"""Hand-written rules, the best of which by mean utility on selection seeds has the score 1."""

TEST_SEED = 3000
KEPT = ("steps", "eval_seeds", "requests", "eval_requests")  # settings that all results of a folder have in common


@dataclass(frozen=True)
class Config:
    presets: str = option("*", "names, patterns such as 'default-*', or TOML files, separated by commas")
    seeds: int = option(5, "training seeds (0, 1, ...) of a preset", most=MOST_SEEDS)
    steps: int = option(1_000_000, "decisions of a training")
    eval_seeds: int = option(10, "test seeds (3000, 3001, ...)")
    requests: int = option(500, "measured requests of a test run")
    eval_requests: int = option(500, "measured requests of a run on selection seeds, within trainings")
    workers: int = option(1, "processes")
    out: str = option("runs/benchmark", "folder of trainings and results; one of the same settings is gone on with")


def references(scenario: Scenario, config: Config) -> tuple[Reference, Reference]:
    """By what scores are measured in a scenario: on the test seeds, and on those of looks within trainings."""
    choosing = SELECTION_SEEDS[: config.eval_seeds]
    best = max(RULES, key=lambda rule: _mean(scenario, rule, choosing))
    looks = scenario.replace(num_requests=config.eval_requests)
    test, selection = (
        Reference(_mean(world, "random", seeds), best, _mean(world, best, seeds))
        for world, seeds in (
            (scenario, range(TEST_SEED, TEST_SEED + config.eval_seeds)),
            (looks, SELECTION_SEEDS[:SELECTION]),
        )
    )
    return test, selection


def _mean(scenario: Scenario, rule: str, seeds: Sequence[int]) -> float:
    return float(np.mean(utilities(scenario, rule, seeds)))


def _job(preset: Preset, seed: int, config: Config) -> dict[str, Any]:
    """Train a preset with a seed and judge it; its line of results.jsonl."""
    start = time.perf_counter()
    out = Path(config.out) / preset.name / f"seed-{seed}"
    every = max(1, config.steps // 12)
    trained = learn(preset, Training(config.steps, seed, out, every, config.eval_requests))
    train_s = time.perf_counter() - start
    seeds = range(TEST_SEED, TEST_SEED + config.eval_seeds)
    figures = figures_of(trained, preset, seed, seeds, config.requests)
    took = {"train_s": train_s, "judge_s": time.perf_counter() - start - train_s}
    return {"preset": preset.name, "digest": preset.digest, "seed": seed, **took, **figures}


class Results:
    """results.jsonl in a folder, whose settings are in benchmark-config.json."""

    def __init__(self, config: Config) -> None:
        self.out = Path(config.out)
        self.path, settings = self.out / "results.jsonl", self.out / "benchmark-config.json"
        claim_folder(self.out, "folder of standard results", {settings.name: lambda path: True})
        kept = {name: getattr(config, name) for name in KEPT}
        if settings.exists():
            try:
                held = json.loads(settings.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ConfigError(f"out: {settings}: cannot be read: {error}") from None
            for name, value in kept.items():
                if not isinstance(held, dict) or held.get(name) != value:
                    theirs = held.get(name) if isinstance(held, dict) else held
                    flag = name.replace("_", "-")
                    raise ConfigError(f"--{flag}: the results in {self.out} have {theirs}, got {value}")
        else:
            make_folder(self.out)
            write_text(settings, json.dumps(kept, indent=2) + "\n")

    def read(self, presets: Sequence[Preset]) -> dict[tuple[str, int], dict[str, Any]]:
        """Lines by preset and seed; ConfigError where a preset is not what it was. A line cut off is left out."""
        found, digests, whole = {}, {preset.name: preset.digest for preset in presets}, ""
        for line in self.path.read_text().splitlines(keepends=True) if self.path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:
                break
            whole += line
            if digests.get(row["preset"], row["digest"]) != row["digest"]:
                raise ConfigError(f"out: {self.path}: preset {row['preset']} has changed; choose another folder")
            found[row["preset"], row["seed"]] = row
        write_text(self.path, whole)
        return found

    def hold(self, preset: Preset) -> None:
        """Begin a preset's folder; ConfigError where trainings in it, finished or not, are of other settings."""
        path = self.out / preset.name / "preset.json"
        if not path.exists():
            make_folder(path.parent)
            write_text(path, json.dumps({"digest": preset.digest}) + "\n")
        elif path.read_text(encoding="utf-8").strip() != json.dumps({"digest": preset.digest}):
            raise ConfigError(f"out: {path.parent}: preset {preset.name} has changed; choose another folder")

    def add(self, row: dict[str, Any]) -> None:
        """Append a line."""
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")


def _run(jobs: Sequence[tuple[Preset, int]], config: Config) -> Iterator[dict[str, Any]]:
    """Lines of trainings, as they finish."""
    cells = [(preset, seed, config) for preset, seed in jobs]
    with opened(max(1, min(config.workers, len(jobs)))) as pool:
        yield from (line for _, line in spread(pool, _job, cells))


def benchmark(config: Config) -> str:
    """Train what is missing, write tables and curves; returns the Markdown."""
    presets = find_presets(config.presets)
    check_seeds("eval-seeds", config.eval_seeds, SELECTION_SEEDS)
    for preset in presets:
        world = preset.scenario(config.requests)
        try:
            check(world, RULES, [world.qps], TEST_SEED)
        except (ConfigError, ProfileError, TraceError) as error:
            raise ConfigError(f"presets: {preset.name}: world: {error}") from None
        try_out(preset)
    store = Results(config)
    lock = lock_folder(store.out)
    try:
        return _benchmark(presets, store, config)
    finally:
        if lock is not None:
            os.close(lock)


def _benchmark(presets: Sequence[Preset], store: Results, config: Config) -> str:
    done = store.read(presets)
    for preset in presets:
        store.hold(preset)
    jobs = [(preset, seed) for seed in range(config.seeds) for preset in presets]
    left = [(preset, seed) for preset, seed in jobs if (preset.name, seed) not in done]
    measured = _measure(presets, config)  # first, as a world in which no rule is above random has no scores
    with console.progress_bar("trainings") as progress:
        progress(len(jobs) - len(left), len(jobs))
        for number, line in enumerate(_run(left, config), len(jobs) - len(left) + 1):
            store.add(line)
            done[line["preset"], line["seed"]] = line
            progress(number, len(jobs))
    results = {preset.name: [done[preset.name, seed] for seed in range(config.seeds)] for preset in presets}
    return _write(presets, results, measured, config)


Measured = dict[Scenario, tuple[Reference, Reference]]  # references on test and on selection seeds


def _measure(presets: Sequence[Preset], config: Config) -> Measured:
    scenarios, found = dict.fromkeys(preset.scenario(config.requests) for preset in presets), {}
    with console.progress_bar("worlds whose rules have run") as progress:
        for number, scenario in enumerate(scenarios):
            progress(number, len(scenarios))
            found[scenario] = references(scenario, config)
    return found


def _write(
    presets: Sequence[Preset], results: dict[str, list[dict[str, Any]]], measured: Measured, config: Config
) -> str:
    """Tables and curves of finished trainings."""
    test, selection = {}, {}
    for preset in presets:
        test[preset.name], selection[preset.name] = measured[preset.scenario(config.requests)]
    found = [(preset, results[preset.name]) for preset in presets]
    lines = lines_of(found, test)
    told = (
        f"{config.steps:,} decisions a training, training seeds 0 to {config.seeds - 1}; judged on {config.eval_seeds} "
        f"seeds from {TEST_SEED:,} on, {config.requests:,} requests each. Scores: interquartile means [95 %]."
    )
    text, out = markdown(lines, test, told), Path(config.out)
    whole = {
        "settings": {name: getattr(config, name) for name in KEPT},
        "lines": lines,
        "over_environments": over_environments(lines),
        "references": {name: reference._asdict() for name, reference in test.items()},
    }
    write_text(out / "benchmark.json", json.dumps(whole, indent=1) + "\n")
    write_text(out / "benchmark.md", text)
    curves(found, selection).savefig(out / "curves.png", dpi=140, metadata={"Software": None})
    return text


def command(argv: Sequence[str] | None = None, program: str | None = None) -> None:
    """Run the command line; raises what is wrong with it."""
    print(benchmark(parse(Config, argv, __doc__, program)), end="")


def main() -> int:
    return fail_in_one_line(command, "interrupted: the same command goes on where it stopped")


if __name__ == "__main__":
    from llmsched_gym.agents import benchmark as module  # under its one name, not this copy of it

    leave(module.main())
