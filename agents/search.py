"""Search settings of `llmsched train` with Optuna: ``llmsched search --trials 40 --suite drift --out runs/search``.

Whatever is an option of `llmsched train` is one here and holds in all trials, except the settings that are searched:
``--space learning_rate=log:1e-4..1e-2 --space n_steps=32/64/128 --space tau_s=default``, or a list of our own. A trial
is a training; its value is its best mean utility on selection seeds, which the pruner sees at every evaluation.

All trials have one training seed, so the best of them is partly luck. The best few, and the settings that were given,
are therefore trained again with other training seeds and judged on selection seeds that no evaluation has seen.
best.json holds the winner by the mean of these, as settings and as a command line of `llmsched train`.
``--resume`` goes on after an interruption; a trial that was under way is marked as failed and made again.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState

from llmsched_gym.agents import train as training
from llmsched_gym.agents.options import command_line, fail_in_one_line, parse
from llmsched_gym.agents.run_folder import open_run, start_run
from llmsched_gym.agents.search_space import read, space_of
from llmsched_gym.agents.search_trials import (
    INTERRUPTED,
    WHY,
    Config,
    complete,
    open_study,
    prepare,
    run_trials,
    training_config,
)
from llmsched_gym.agents.seeds import SELECTION_SEEDS
from llmsched_gym.config import ConfigError, env_config
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.evaluation.spread import Pool, opened, run_cells
from llmsched_gym.files import dumps, json_with, write_text
from llmsched_gym.interrupts import leave
from llmsched_gym.report import console, intervals

GIVEN = "given"  # the settings that the search was given, among the finals


def run_final(config: training.Config, seeds: Sequence[int]) -> float:
    """Train, or go on, or see that it is done; mean utility of its best policy on these selection seeds."""
    out = Path(config.out)
    if not (out / "policy" / "policy.json").exists():
        resume = (out / "config.json").exists()
        training.train(dataclasses.replace(config, resume=resume), lambda step, utility: None)
    # `best` is `policy` without its measured decision time, which is another on every machine
    world = env_config(config.suite, **{"num_requests": config.eval_requests, **config.world()})
    return float(np.mean([row(simulate(world, str(out / "best"), seed))["mean_utility"] for seed in seeds]))


def run_finals(study: optuna.Study, config: Config, pool: Pool) -> list[dict[str, Any]]:
    """Candidates with their values by training seed, the best mean first."""
    ended = complete(study)
    if not ended:
        reasons = [t.user_attrs[WHY] for t in study.get_trials(deepcopy=False) if WHY in t.user_attrs]
        raise ConfigError(
            f"space: no trial came to its end; the last that failed: {reasons[-1] if reasons else 'none'}"
        )
    candidates: dict[str, dict[str, Any]] = {GIVEN: {}}
    for trial in ended[: config.finals]:
        settings = {name: read(name, value) for name, value in trial.params.items()}
        if any(getattr(config, name) != value for name, value in settings.items()):
            candidates[f"trial {trial.number}"] = settings
    seeds = training_seeds(config)
    folder = Path(config.out) / "finals"
    cells = [
        (
            training_config(config, folder / f"{name}-seed-{seed}".replace(" ", "-"), seed=seed, **settings),
            judges(config),
        )
        for name, settings in candidates.items()
        for seed in seeds
    ]
    values = run_cells(run_final, cells, pool, lambda text: console.remark(f"finals: {text}"))
    table = np.reshape(values, (len(candidates), len(seeds))).tolist()
    by_name = dict(zip(candidates, table, strict=True))
    found = [
        {
            "candidate": name,
            "settings": settings,
            "mean_utility": float(np.mean(by_name[name])),
            "by_training_seed": by_name[name],
            "over_given": float(np.mean(by_name[name]) - np.mean(by_name[GIVEN])),
            "above_given": sum(a > b for a, b in zip(by_name[name], by_name[GIVEN], strict=True)),
            "over_given_95": intervals.difference(by_name[name], by_name[GIVEN]),
        }
        for name, settings in candidates.items()
    ]
    return sorted(found, key=lambda f: -f["mean_utility"])


def training_seeds(config: Config) -> list[int]:
    """Of the finals; none is that of the trials."""
    return list(range(config.seed + 1, config.seed + 1 + config.final_seeds))


def judges(config: Config) -> list[int]:
    """Selection seeds that judge the finals; none is among those that evaluate trainings."""
    return list(SELECTION_SEEDS[config.eval_seeds :][: config.final_eval_seeds])


def search(config: Config) -> dict[str, Any]:
    """Run or go on with a search; returns what best.json holds."""
    config = open_run(config)
    if config.resume and not json_with("trials")(Path(config.out) / "config.json"):  # a training has but part of these
        raise ConfigError(f"out: {config.out} holds a training, and no search; choose another folder")
    space = space_of(config, config.space)
    _check(config)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    start_run(config)
    study = open_study(config)
    prepare(study, config, space)
    with opened(config.workers) as pool:
        run_trials(study, config, space, pool)
        finals = run_finals(study, config, pool)
    trials = study.get_trials(deepcopy=False)
    winner = training_config(config, Path(config.out) / "best", **finals[0]["settings"])
    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    found = {
        "command": shlex.join(["llmsched", "train", *command_line(training.Config, winner)]),
        "winner": finals[0]["candidate"],
        "settings": finals[0]["settings"],
        "finals": finals,
        "final_training_seeds": training_seeds(config),
        "final_selection_seeds": judges(config),
        "study": {
            **{state.name.lower(): sum(t.state == state for t in trials) for state in states},
            "interrupted": sum(INTERRUPTED in t.user_attrs for t in trials),  # among those that failed
            "best_trial": study.best_trial.number,
            "best_value": study.best_value,
            "training_seed": config.seed,
            "selection_seeds": list(SELECTION_SEEDS[: config.eval_seeds]),
            "space": {name: str(distribution) for name, distribution in space.items()},
        },
    }
    write_text(Path(config.out) / "best.json", dumps(found))
    return found


def _check(config: Config) -> None:
    if config.is_real:
        raise ConfigError(
            "backend: a search trains in simulation, and so does its winner until --backend says otherwise"
        )
    if config.pruner != "none" and config.eval_every >= config.steps:
        raise ConfigError(
            f"eval-every: expected less than the {config.steps} steps of a training, for the pruner to see some, "
            f"got {config.eval_every}"
        )
    if config.eval_seeds + config.final_eval_seeds > len(SELECTION_SEEDS):
        raise ConfigError(
            f"eval-seeds: there are {len(SELECTION_SEEDS)} selection seeds, for trials and finals together"
        )
    training.prepared(config)  # what no environment or network can have, no trial could


def command(argv: Sequence[str] | None = None, program: str | None = None) -> None:
    """Run the command line; raises what is wrong with it."""
    found = search(parse(Config, argv, __doc__, program))
    study = found["study"]
    print(
        f"{study['complete']} trials, {study['pruned']} pruned, {study['fail']} failed; best {study['best_value']:.4f}"
    )
    for final in found["finals"]:
        by_seed = final["by_training_seed"]
        text = (
            f"{final['candidate']}: mean utility {final['mean_utility']:.4f} ({' '.join(f'{v:.4f}' for v in by_seed)})"
        )
        if final["candidate"] != GIVEN:
            text += f", {final['over_given']:+.4f} {_interval(final['over_given_95'])} over the given settings"
            text += f", above them with {final['above_given']} of {len(by_seed)} training seeds"
        print(text)
    print(found["command"])


def _interval(found: intervals.Interval | None) -> str:
    return (
        f"[no interval: fewer than {intervals.MIN_SEEDS} training seeds]"
        if found is None
        else f"[{found[0]:+.4f}, {found[1]:+.4f}]"
    )


def main() -> int:
    return fail_in_one_line(command)


if __name__ == "__main__":
    from llmsched_gym.agents import search as module  # under its one name, not this copy of it

    leave(module.main())
