"""What takes noise out of our own PPO: ``python -m benchmarks.variance --seeds 5 --workers 2 --out runs/variance``.

A training for every variant of the advantages and of where an actor starts, every suite and every training seed; greedy
and sampled actions are judged on requests that nobody trained on, as by ``benchmarks.without_teacher``. The table has
what they earn at the end and in the mean over the training (the area under the curve), and how much more that is than
without any of it, paired by training seed, with 95 % Student-t intervals.

It takes the options of ``llmsched ppo``, which hold in every training; a variant's own come on top. ``--out`` has
results.jsonl, a line for every finished training, and variance.md; the same command goes on after an interruption.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats

from benchmarks.without_teacher import learn, utility
from llmsched_gym.agents import ppo
from llmsched_gym.agents.options import MOST_ENVS, fail_in_one_line, option, parse
from llmsched_gym.config import ConfigError
from llmsched_gym.evaluation.workers import Workers
from llmsched_gym.files import digest_of, make_folder, write_text
from llmsched_gym.interrupts import leave
from llmsched_gym.text import table

BASELINE = "baseline"
VARIANTS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "group": {"group": 8},
    "shaping": {"shaping": 0.1},
    "average": {"average": True},
    "prior": {"prior": "tuned-constant"},
    "prior slai": {"prior": "slai"},
    "work-conserving": {"work_conserving": True},
    "group, shaping": {"group": 8, "shaping": 0.1},
    "group, average": {"group": 8, "average": True},
    "group, shaping, average": {"group": 8, "shaping": 0.1, "average": True},
    "group, prior": {"group": 8, "prior": "tuned-constant"},
    "group, work-conserving": {"group": 8, "work_conserving": True},
}
RULES = ("slai", "tuned-constant", "on-time")  # shown beside
KINDS = ("greedy", "sampled")
HERE = ("suites", "seeds", "workers", "variants", "out", "resume", "threads")  # what a training does not depend on


@dataclasses.dataclass(frozen=True)
class Trial(ppo.Config):
    suites: str = option("default,burst", "suites to train on; --suite is not used")
    variants: str = option("", "names of variants, separated by semicolons; all that the action has, unless given")
    seeds: int = option(5, "training seeds, from --seed on")
    workers: int = option(2, "processes")
    out: str = option("runs/variance", "folder of the results; one of the same settings is gone on with")
    set: dict[str, Any] = option({}, "any other field of EnvConfig; qps=1.8 unless given")  # noqa: RUF009
    action: str = option("preset", "what the agents decide", choices=("knobs", "preset", "request"))
    action_repeat: int = option(32, "batches that one action decides (1 for request actions)")
    reward_scale: float = option(0.05, "factor on the reward")
    steps: int = option(300_000, "decisions of a training")
    num_envs: int = option(64, "environments side by side", most=MOST_ENVS)
    n_steps: int = option(32, "decisions per environment and iteration")
    batch_size: int = option(512, "of a minibatch")
    learning_rate: float = option(1e-3, "at the start")
    eval_every: int = option(32_768, "decisions between looks on selection seeds, at least")
    threads: int = option(1, "threads of a training")


class Job(NamedTuple):
    """A training."""

    variant: str
    suite: str
    seed: int


def chosen(config: Trial) -> list[str]:
    """The variants to train, the baseline first; ConfigError for an unknown one."""
    names = [name.strip() for name in config.variants.split(";") if name.strip()]
    for name in names:
        if name not in VARIANTS:
            raise ConfigError(f"--variants: expected some of {'; '.join(VARIANTS)}, got {name!r}")
    is_request = config.action == "request"
    possible = [
        name
        for name, changes in VARIANTS.items()
        if (is_request or "work_conserving" not in changes) and not (is_request and "prior" in changes)
    ]
    return list(dict.fromkeys([BASELINE, *(names or possible)]))


def config_of(job: Job, config: Trial) -> ppo.Config:
    """The settings of a training."""
    kept = {field.name: getattr(config, field.name) for field in dataclasses.fields(ppo.Config)}
    world = {"qps": 1.8, **config.set}
    return ppo.Config(**{**kept, "suite": job.suite, "seed": job.seed, "set": world, **VARIANTS[job.variant]})


def digest(job: Job, config: Trial) -> str:
    """Of all that a training's result depends on."""
    settings = dataclasses.asdict(config_of(job, config))
    return digest_of({name: value for name, value in settings.items() if name not in HERE})


def run(job: Job, config: Trial) -> dict[str, Any]:
    """Train and judge; a line of results.jsonl."""
    torch.set_num_threads(1)
    found, spent_s = learn(config_of(job, config))
    curve = [[int(step), greedy, sampled] for step, greedy, sampled, _ in found.tolist()]
    return {**job._asdict(), "digest": digest(job, config), "curve": curve, "train_s": round(spent_s, 1)}


def read(path: Path, config: Trial) -> dict[Job, dict[str, Any]]:
    """Lines of finished trainings; one that a kill cut off is removed. ConfigError where settings are others."""
    found, whole = {}, ""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            break
        job = Job(row["variant"], row["suite"], row["seed"])
        if job.variant in VARIANTS and row["digest"] != digest(job, config):
            raise ConfigError(f"--out: {path} has results of other settings; choose another folder")
        found[job] = row
        whole += line
    if path.exists():
        write_text(path, whole)
    return found


def trained(jobs: Sequence[Job], config: Trial) -> Iterator[dict[str, Any]]:
    """Lines of trainings, as they finish."""
    if config.workers == 1 or len(jobs) < 2:
        yield from (run(job, config) for job in jobs)
        return
    with Workers(min(config.workers, len(jobs))) as pool:
        yield from (future.result() for future in as_completed([pool.submit(run, job, config) for job in jobs]))


def final(curve: np.ndarray) -> np.ndarray:
    """What greedy and sampled actions earn at the end, (2,)."""
    last: np.ndarray = curve[-1, 1:]
    return last


def area(curve: np.ndarray) -> np.ndarray:
    """What they earn in the mean over the training, from the first decision on, (2,)."""
    mean: np.ndarray = np.trapezoid(curve[:, 1:], curve[:, 0], axis=0) / curve[-1, 0]
    return mean


def difference(own: np.ndarray, baseline: np.ndarray) -> str:
    """The mean difference of pairs, both (num_seeds,), and half of its 95 % interval, which takes three seeds."""
    found = own - baseline
    if len(found) < 3 or found.std() < 1e-12:  # scipy warns of pairs that all differ by the same
        return f"{found.mean():+.3f}"
    low, high = stats.ttest_1samp(found, 0.0).confidence_interval(0.95)
    return f"{found.mean():+.3f} ±{(high - low) / 2:.3f}"


def markdown(rows: dict[Job, dict[str, Any]], config: Trial, levels: dict[str, dict[str, float]]) -> str:
    """A table for every suite and kind of actions; `levels`: what rules earn, by suite."""
    names, seeds = chosen(config), range(config.seed, config.seed + config.seeds)
    text = []
    for suite, rules in levels.items():
        curves = {name: [np.array(rows[Job(name, suite, seed)]["curve"]) for seed in seeds] for name in names}
        measured = {
            name: [np.array([measure(curve) for curve in own]) for measure in (final, area)]
            for name, own in curves.items()
        }
        for k, kind in enumerate(KINDS):
            lines = []
            for name, own in measured.items():
                line = [name]
                for values, base in zip(own, measured[BASELINE], strict=True):
                    against = "" if name == BASELINE else difference(values[:, k], base[:, k])
                    line += [f"{values[:, k].mean():.3f}", against]
                lines.append(line)
            header = [f"{suite}, {kind}", "at the end", "more", "area", "more"]
            text.append(table(header, lines, 1))
        text.append(", ".join(f"`{name}` {level:.3f}" for name, level in rules.items()))
    took_s = np.mean([rows[job]["train_s"] for job in rows])
    told = f"{config.steps:,} decisions, training seeds {seeds[0]} to {seeds[-1]}, {took_s:.0f} s a training."
    return "\n\n".join([*text, told]) + "\n"


def benchmark(config: Trial, tell: Callable[[str], None]) -> str:
    """Train what is missing and write the table; returns it."""
    suites, out = [suite.strip() for suite in config.suites.split(",")], Path(config.out)
    jobs = [
        Job(name, suite, seed)
        for seed in range(config.seed, config.seed + config.seeds)
        for suite in suites
        for name in chosen(config)
    ]
    for job in jobs[: len(suites) * len(chosen(config))]:  # what makes no sense fails before anything is trained
        ppo.prepared(config_of(job, config))
    path = out / "results.jsonl"
    done = read(path, config)
    left = [job for job in jobs if job not in done]
    make_folder(out)
    for row in trained(left, config):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        done[Job(row["variant"], row["suite"], row["seed"])] = row
        num_done, (_, greedy, sampled) = sum(job in done for job in jobs), row["curve"][-1]
        what = f"{row['suite']}, {row['variant']}, seed {row['seed']}"
        tell(f"{num_done}/{len(jobs)} {what}: greedy {greedy:.3f}, sampled {sampled:.3f}, {row['train_s']:.0f} s")
    levels = {}
    for suite in suites:
        world = config_of(Job(BASELINE, suite, config.seed), config)
        levels[suite] = {rule: utility(rule, world) for rule in RULES}
    text = markdown({job: done[job] for job in jobs}, config, levels)
    write_text(out / "variance.md", text)
    return text


def command() -> None:
    config = parse(Trial, None, __doc__, "python -m benchmarks.variance")
    print(benchmark(config, lambda line: print(line, file=sys.stderr, flush=True)), end="")


if __name__ == "__main__":
    from benchmarks import variance as module  # under its one name, which other processes know

    leave(fail_in_one_line(module.command, "interrupted: the same command goes on where it stopped"))
