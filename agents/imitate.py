"""Imitate a scheduler: ``llmsched imitate --teacher slai --out runs/slai``; then warm-start a training with it.

Behaviour cloning first: the teacher drives, the student learns its knobs. Then DAgger: the student drives, the teacher
says what it would have done, and the student learns from everything seen so far. The teacher is any setting of the
packing kernel whose values the knobs have (`slai`, `sarathi`, ...) or a policy folder with the knobs action. With
``--told`` the teacher knows what nobody can see, the device's cost scale, and the student learns to tell it from what
everybody sees (privileged teachers: Chen et al., Learning by Cheating, CoRL 2019). With ``--worlds`` one student learns
in several, of profiles with a surface and without. Writes weights.pt for ``agents.train --warm-start`` and `policy`, a
policy folder.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmsched_gym.agents.decision_time import finish
from llmsched_gym.agents.envs import TrainingEnv
from llmsched_gym.agents.export import export
from llmsched_gym.agents.networks import normaliser_of
from llmsched_gym.agents.options import MOST_ENVS, MOST_WIDTH, fail_in_one_line, option, parse
from llmsched_gym.agents.run_folder import open_run, settings_of, start_run
from llmsched_gym.agents.seeds import check_evaluations, evaluation_of
from llmsched_gym.agents.settings import MOST_LAYERS
from llmsched_gym.agents.train import Config as TrainConfig
from llmsched_gym.agents.train import make_model
from llmsched_gym.agents.training_run import evaluate
from llmsched_gym.config import ConfigError
from llmsched_gym.env.actions.knobs import CAP, KNOBS, knobs_action
from llmsched_gym.interrupts import leave
from llmsched_gym.policies.bridge import knobs_now, sets_knobs
from llmsched_gym.registry import make_scheduler
from llmsched_gym.report import console

Teacher = Callable[[TrainingEnv, Any], np.ndarray]
"""From the environments and their observations to the actions it would take, (num_envs, num_knobs)."""


@dataclass(frozen=True)
class Config:
    teacher: str = option("slai", "a setting of the packing kernel, or a policy folder with knobs")
    told: bool = option(False, "tell the teacher the hidden cost scale: its cap is divided by it")
    out: str = option("runs/imitate", "folder to write")
    seed: int = option(0, "of weights, minibatches and choice of episodes")
    suite: str = option("default", "suite to imitate on")
    set: dict[str, Any] = option({}, "any other field of EnvConfig, as --set qps=1.8; may be repeated")  # noqa: RUF009
    worlds: str = option("", "JSON file instead of --suite and --set: a list of objects {suite: ..., FIELD: ...}")
    observation: str = option("features", "what the student sees", choices=("features", "slots"))
    action_repeat: int = option(8, "batches that one action decides")
    rounds: int = option(5, "rounds of DAgger after behaviour cloning")
    steps: int = option(300, "decisions per environment and round")
    num_envs: int = option(64, "environments side by side, of each world", most=MOST_ENVS)
    epochs: int = option(4, "passes over the data after each round")
    batch_size: int = option(1024, "of a minibatch")
    learning_rate: float = option(1e-3, "of Adam")
    hidden: tuple[int, ...] = option((64, 64), "features: widths of the layers")
    width: int = option(32, "slots: width of a row's embedding", most=MOST_WIDTH)
    layers: int = option(1, "slots: attention layers; 0 is deep sets", low=0, most=MOST_LAYERS)
    eval_seeds: int = option(4, "selection seeds (2000, 2001, ...)")
    eval_requests: int = option(500, "measured requests of an evaluation run")

    def trainings(self) -> list[TrainConfig]:
        """For each world the training that can start from the student: same world, same network."""
        shared = {f.name for f in dataclasses.fields(TrainConfig)} & {f.name for f in dataclasses.fields(self)}
        skip = {"out", "steps", "epochs", "batch_size", "learning_rate"}
        training = TrainConfig(**{name: getattr(self, name) for name in shared - skip})
        if not self.worlds:
            return [training]
        found = []
        for world in read_worlds(self.worlds):
            suite = world.pop("suite", self.suite)
            found.append(dataclasses.replace(training, suite=suite, set={**self.set, **world}))
        return found


def read_worlds(file: str) -> list[dict[str, Any]]:
    """The objects of a file of worlds; ConfigError where it is not a list of them."""
    try:
        worlds = json.loads(Path(file).read_text())
    except OSError as error:
        raise ConfigError(f"worlds: {file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"worlds: {file}: not JSON: {error}") from None
    if not isinstance(worlds, list) or not worlds or not all(isinstance(world, dict) for world in worlds):
        raise ConfigError(f"worlds: {file}: expected a list of objects, one a world")
    return worlds


def make_teacher(name: str, env: TrainingEnv, *, told: bool = False) -> Teacher:
    """How to ask a scheduler for its knobs; one that is told the cost scale must be a setting of the kernel."""
    scheduler, config = make_scheduler(name), env.env.config
    if sets_knobs(scheduler):
        engine, cap = env.env.core.engine, float(scheduler.knobs["cap"])
        if told and math.isinf(cap):
            raise ConfigError(f"told: expected a teacher with a cap, got {name!r}")

        try:
            for usage in (0.0, 1.0) if scheduler.plan is None else ():
                knobs_action(scheduler.knobs, usage, config)
            knobs_now(scheduler, engine, 0, config)
        except ValueError as error:
            raise ConfigError(f"teacher: {name}: {error}") from None

        def compiled(env: TrainingEnv, observations: Any) -> np.ndarray:
            labels = np.stack([knobs_now(scheduler, engine, i, config) for i in range(env.num_envs)])
            if told:
                labels[:, CAP] = nearest_cap(cap / engine.state.worlds["cost_scale"])
            return labels

        return compiled
    if told:
        raise ConfigError(f"told: expected a setting of the packing kernel as teacher, got {name!r}")
    theirs = getattr(scheduler, "config", None)
    if theirs is None or (theirs.action, theirs.observation) != ("knobs", config.observation):
        raise ConfigError(f"teacher: expected knobs and {config.observation} like the student's, or a kernel setting")

    def learned(env: TrainingEnv, observations: Any) -> np.ndarray:
        if isinstance(observations, dict):
            each = ({k: v[i] for k, v in observations.items()} for i in range(env.num_envs))
            return np.stack([scheduler.policy(one) for one in each])
        return np.stack([scheduler.policy(one) for one in observations])

    return learned


def nearest_cap(caps: np.ndarray) -> np.ndarray:
    """Index of the knob's value nearest to each cap, int64; no cap at all is never the nearest."""
    values = np.array(KNOBS[CAP].values)
    return np.abs(np.asarray(caps)[:, None] - values).argmin(1)


def imitate(config: Config, say: Callable[[str], None] = lambda line: None) -> Path:
    """Train a student; returns its policy folder."""
    config = open_run(config)
    torch.set_num_threads(1)
    trainings = config.trainings()
    for training in trainings:
        check_evaluations(evaluation_of(training), config.eval_seeds)
    envs = [TrainingEnv(config.num_envs, t.suite, config.seed, **t.world()) for t in trainings]
    teachers = [make_teacher(config.teacher, env, told=config.told) for env in envs]
    widest = max(range(len(envs)), key=lambda i: len(envs[i].env.feature_names))
    model, world = make_model(trainings[widest], envs[widest]), envs[widest].env.config
    policy, rng = model.policy, np.random.default_rng([config.seed, 4])
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate)
    out = Path(config.out)
    start_run(config)

    seen: dict[str, list[np.ndarray]] = {"label": []}
    now = [env.reset() for env in envs]
    for number in range(config.rounds + 1):
        for _ in range(config.steps):
            for i, (env, teacher) in enumerate(zip(envs, teachers, strict=True)):
                named = _named(now[i], len(envs[widest].env.feature_names))
                labels = teacher(env, now[i])
                for key, value in {**named, "label": labels}.items():
                    seen.setdefault(key, []).append(value)
                now[i] = env.step(labels if number == 0 else _sample(policy, named))[0]
        data = {key: np.concatenate(value) for key, value in seen.items()}
        if number == 0:
            normaliser_of(policy).fit(data["" if "" in data else "features"])
        agreement = _fit(policy, optimizer, data, config, rng)
        figures = [evaluate(policy, training, world) for training in trainings]
        line: dict[str, Any] = {"round": number, "agreement": agreement}
        line |= {name: float(np.mean([each[name] for each in figures])) for name in figures[0]}
        if len(figures) > 1:
            line["by_world"] = figures
        with open(out / "progress.jsonl", "a") as progress:
            progress.write(json.dumps(line) + "\n")
        say(f"{'behaviour cloning' if number == 0 else f'DAgger {number}'}: {line}")

    torch.save(policy.state_dict(), out / "weights.pt")
    summary = settings_of(config)
    summary["teacher"] = Path(config.teacher).name  # a path is nobody else's
    if config.worlds:
        summary["worlds"] = [{"suite": training.suite, **training.set} for training in trainings]
        del summary["suite"], summary["set"]
    return finish(out / "policy", *export(policy, world, training={**summary, **line}))


def _named(observations: Any, num_features: int) -> dict[str, np.ndarray]:
    """The parts of a world's observations, as wide as those of the widest: what its profile lacks is 0."""
    named = dict(observations) if isinstance(observations, dict) else {"": observations}
    key = "" if "" in named else "features"
    missing = num_features - named[key].shape[1]
    return named | {key: np.pad(named[key], ((0, 0), (0, missing)))}


def _tensors(named: dict[str, np.ndarray], rows: Any = slice(None)) -> Any:
    tensors = {k: torch.from_numpy(v[rows]) for k, v in named.items() if k != "label"}
    return tensors.get("", tensors)


def _sample(policy: Any, named: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return policy.get_distribution(_tensors(named)).sample().numpy()


def _fit(policy: Any, optimizer: Any, data: dict[str, np.ndarray], config: Config, rng: np.random.Generator) -> float:
    """Raise the likelihood of the labels; returns the share of decisions that agree in all knobs."""
    n, labels, agreed = len(data["label"]), torch.from_numpy(data["label"]), 0
    for epoch in range(config.epochs):
        for rows in np.array_split(rng.permutation(n), max(1, n // config.batch_size)):
            distribution = policy.get_distribution(_tensors(data, rows))
            loss = -distribution.log_prob(labels[rows]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if epoch == config.epochs - 1:
                agreed += int((distribution.mode() == labels[rows]).all(-1).sum())
    return agreed / n


def command(argv: Sequence[str] | None = None, program: str | None = None) -> None:
    """Run the command line; raises what is wrong with it."""
    print(imitate(parse(Config, argv, __doc__, program), console.remark))


def main() -> int:
    return fail_in_one_line(command, "interrupted")


if __name__ == "__main__":
    from llmsched_gym.agents import imitate as module  # under its one name, not this copy of it

    leave(module.main())
