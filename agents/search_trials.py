"""The study of a search: trials drawn by Optuna, each a training, kept in the run's study.db as they go."""

from __future__ import annotations

import dataclasses
import math
import queue
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from llmsched_gym.agents import train as training
from llmsched_gym.agents.options import option
from llmsched_gym.agents.search_space import given_values, read
from llmsched_gym.config import ConfigError
from llmsched_gym.evaluation.spread import Pool
from llmsched_gym.report import console

STUDY, INTERRUPTED, WHY = "search", "interrupted", "error"  # the study's name; attributes of failed trials


@dataclass(frozen=True)
class Config(training.Config):
    env: str = option("sched", "what is trained", choices=("sched",))
    out: str = option("runs/search", "folder of the study and its trainings")
    resume: bool = option(False, "go on with the study in --out, with the settings of its config.json")
    seed: int = option(0, "of the draws, and the training seed of all trials; the finals have those that follow it")
    steps: int = option(200_000, "decisions of a training")
    eval_every: int = option(
        25_000, "decisions between evaluations on selection seeds, after which the pruner may end it"
    )
    # the search
    trials: int = option(20, "trainings of the study; those interrupted do not count")
    space: dict[str, Any] = option(  # noqa: RUF009
        {}, "a setting to search, as NAME=LOW..HIGH, log:LOW..HIGH, A/B/C or default; else a list of our own"
    )
    startup: int = option(6, "trials drawn at random, and not pruned by the median, before what was found counts")
    pruner: str = option("median", "what ends trials early", choices=("median", "hyperband", "none"))
    finals: int = option(3, "best trials that are trained again")
    final_seeds: int = option(3, "training seeds of each of them; differences have intervals from 10 on", low=2)
    final_eval_seeds: int = option(8, "selection seeds that judge them, after those of the trials")
    workers: int = option(1, "trainings side by side; the draws then depend on which ends first")


def training_config(config: Config, out: Path, **settings: Any) -> training.Config:
    """The training with these settings in place of the search's own."""
    names = [field.name for field in dataclasses.fields(training.Config)]
    own = {name: getattr(config, name) for name in names}
    return training.Config(**{**own, "out": str(out), "resume": False, **settings})


def open_study(config: Config) -> optuna.Study:
    """The study in the folder, made if there is none."""
    last = max(1, config.steps // config.eval_every)
    pruners: dict[str, Callable[[], BasePruner]] = {
        "median": lambda: MedianPruner(n_startup_trials=config.startup),
        "hyperband": lambda: HyperbandPruner(min_resource=1, max_resource=last),
        "none": NopPruner,
    }
    path = str((Path(config.out) / "study.db").absolute()).replace("{", "{{").replace("}", "}}")  # it is a template
    storage = RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60.0}})
    return optuna.create_study(
        study_name=STUDY, storage=storage, direction="maximize", pruner=pruners[config.pruner](), load_if_exists=True
    )


def counted(study: optuna.Study) -> int:
    """Trials begun, without those that were interrupted."""
    trials = study.get_trials(deepcopy=False)
    return sum(t.state != TrialState.WAITING and INTERRUPTED not in t.user_attrs for t in trials)


def prepare(study: optuna.Study, config: Config, space: dict[str, BaseDistribution]) -> None:
    """Queue the given settings first of all; mark trials that were under way as failed, and queue them again."""
    trials = study.get_trials(deepcopy=False)
    first = given_values(config, space)
    if not trials and first is not None:
        study.enqueue_trial(first)
    for trial in trials:
        if trial.state != TrialState.RUNNING:
            continue
        shutil.rmtree(trial_folder(config, trial.number), ignore_errors=True)
        optuna.Trial(study, trial._trial_id).set_user_attr(INTERRUPTED, True)
        study.tell(trial.number, state=TrialState.FAIL)
        if trial.params.keys() == space.keys():
            study.enqueue_trial(trial.params)


def trial_folder(config: Config, number: int) -> Path:
    return Path(config.out) / "trials" / f"{number:04d}"


def run_trial(config: Config, trial_id: int) -> tuple[TrialState, float | None, str]:
    """Train with the trial's settings: how it ended, its value, and why it failed."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trial = optuna.Trial(open_study(config), trial_id)
    settings = {name: read(name, value) for name, value in trial.params.items()}
    best = -math.inf

    def evaluated(step: int, utility: float) -> None:
        nonlocal best
        best = max(best, utility)
        if step < config.steps:
            trial.report(utility, step // config.eval_every)
            if trial.should_prune():
                raise optuna.TrialPruned

    try:
        training.train(training_config(config, trial_folder(config, trial.number), **settings), evaluated)
    except optuna.TrialPruned:
        return TrialState.PRUNED, None, ""
    except (ConfigError, ValueError, RuntimeError) as error:  # of these settings; others may do
        return TrialState.FAIL, None, " ".join(str(error).split())
    return TrialState.COMPLETE, best, ""


def run_trials(study: optuna.Study, config: Config, space: dict[str, BaseDistribution], pool: Pool) -> None:
    """Run what is left of the study, with a line on every trial."""
    done: queue.SimpleQueue[tuple[optuna.Trial, Future]] = queue.SimpleQueue()
    running = 0
    while True:
        while running < pool.count and (begun := counted(study)) < config.trials:
            # A sampler of its own for each: a study that goes on draws what an unbroken one would.
            seed = int(np.random.SeedSequence([config.seed, 4, begun]).generate_state(1)[0])
            study.sampler = optuna.samplers.TPESampler(n_startup_trials=config.startup, seed=seed)
            trial = study.ask(space)
            running += 1
            future = pool.submit(run_trial, config, trial._trial_id)
            future.add_done_callback(lambda future, trial=trial: done.put((trial, future)))  # type: ignore[misc]
        if not running:
            return
        trial, future = done.get()
        running -= 1
        state, value, why = future.result()
        if why:
            trial.set_user_attr(WHY, why)
        study.tell(trial, value, state=state)
        _say(study, config, study.get_trials(deepcopy=False)[trial.number])


def complete(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that came to their end, the best first; Optuna gives those that were pruned a value too."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(trials, key=lambda t: (-(t.value or 0.0), t.number))


def _say(study: optuna.Study, config: Config, trial: FrozenTrial) -> None:
    found = f"{trial.value:.4f}" if trial.state == TrialState.COMPLETE else trial.state.name.lower()
    if WHY in trial.user_attrs:
        found += f" ({trial.user_attrs[WHY]})"
    best = f"{done[0].value:.4f}" if (done := complete(study)) else "-"
    settings = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in trial.params.items())
    ended = counted(study) - len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
    progress = f"{ended} of {config.trials}, best {best}"
    console.remark(f"trial {trial.number}: {found}; {progress}; {settings}")
