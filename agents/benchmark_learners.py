"""Train what a preset describes, and look at what it has learnt: greedy and sampled actions on given seeds.

Our learners are those of ``llmsched ppo`` and ``llmsched train``, run folders and all. Other algorithms of
Stable-Baselines3 learn on the same environments with the same normalised features, and what is kept of them is chosen
in the same way: by greedy actions on selection seeds.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import set_random_seed

from llmsched_gym.agents.benchmark_presets import LEARNERS, Preset
from llmsched_gym.agents.envs import TrainingEnv
from llmsched_gym.agents.export import load_actor
from llmsched_gym.agents.networks import Normaliser, policy_class, policy_kwargs
from llmsched_gym.agents.seeds import SELECTION_SEEDS
from llmsched_gym.agents.train import typical_features
from llmsched_gym.config import ConfigError, EnvConfig, Scenario
from llmsched_gym.env.policy import PolicyScheduler
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.files import make_folder
from llmsched_gym.policies import LoadedPolicy, read_folder
from llmsched_gym.policies.sb3_zip import Predictor, as_it_is
from llmsched_gym.scheduler import PolicyError
from llmsched_gym.text import no_memory

SELECTION = 4
"""Selection seeds of an evaluation within a training."""


class Training(NamedTuple):
    """How long, with which seed and where a preset is trained, and how often it is looked at meanwhile."""

    steps: int
    seed: int
    out: Path
    eval_every: int
    eval_requests: int


class Trained(NamedTuple):
    """What a training gave: schedulers of greedy and of sampled actions, and the curve of (decisions, mean utility)."""

    greedy: Any
    sampled: Any
    curve: list[tuple[int, float]]


def utilities(world: Scenario, scheduler: Any, seeds: Sequence[int]) -> list[float]:
    """Mean utility of a scheduler on each seed's requests."""
    return [float(row(simulate(world, scheduler, seed=seed))["mean_utility"]) for seed in seeds]


def learn(preset: Preset, training: Training) -> Trained:
    """Train a preset, or go on where our learners were killed."""
    make_folder(training.out.parent)
    module, _ = LEARNERS[preset.learner].place
    return _ours(preset, training) if module.startswith("llmsched_gym") else _sb3(preset, training)


def _curve(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]
    return [(line["step"], line["eval/mean_utility"]) for line in lines if "eval/mean_utility" in line]


def try_out(preset: Preset) -> None:
    """Make a preset's environments and learner; ConfigError of one line for what no training of it can have."""
    place, training = importlib.import_module(LEARNERS[preset.learner].place[0]), Training(1, 0, Path(), 1, 1)
    is_ours = place.__name__.startswith("llmsched_gym")
    try:
        made, _ = place.prepared(_config(preset, training)) if is_ours else _model(preset, training)
    except MemoryError as error:
        raise ConfigError(f"presets: {preset.name}: settings: {no_memory(error)}") from None
    except (ConfigError, PolicyError) as error:
        told = str(error).removeprefix("--")
        raise ConfigError(told if told.startswith("presets: ") else f"presets: {preset.name}: {told}") from None
    made.close()


def _config(preset: Preset, training: Training) -> Any:
    """The settings of a training by a learner of ours."""
    place, learner = importlib.import_module(LEARNERS[preset.learner].place[0]), LEARNERS[preset.learner]
    names = {field.name for field in dataclasses.fields(place.Config)}
    own = {name: value for name, value in preset.world.items() if name in names}
    others = {name: value for name, value in preset.world.items() if name not in names}
    own.setdefault("action_repeat", EnvConfig().action_repeat)  # a preset's world is the environment's, not a command's
    settings = {"threads": 1, **learner.fixed, **preset.settings, **own, "set": others, "suite": preset.suite}
    looks = {"eval_seeds": SELECTION, "eval_requests": training.eval_requests, "eval_every": training.eval_every}
    return place.Config(
        **settings,
        **looks,
        steps=training.steps,
        seed=training.seed,
        out=str(training.out),
        checkpoint_every=training.eval_every,
    )


def _ours(preset: Preset, training: Training) -> Trained:
    config = dataclasses.replace(_config(preset, training), resume=(training.out / "config.json").exists())
    importlib.import_module(LEARNERS[preset.learner].place[0]).train(config, lambda step, utility: None)
    world, best = preset.config, training.out / "best"
    env = TrainingEnv(1, preset.suite, training.seed, **preset.world)
    masks = preset.learner == "maskable" or world.action == "request"
    network = policy_kwargs(slots=False, hidden=config.hidden, activation=config.activation, width=0, layers=0, heads=0)
    policy = policy_class(masks=masks, slots=False)(env.observation_space, env.action_space, lambda _: 0.0, **network)
    load_actor(policy, world, best)
    spec, tensors = read_folder(best)
    return Trained(LoadedPolicy(spec, tensors, decision_s=0.0), sampled_by(policy, world), _curve(training.out))


def sampled_by(model: Any, world: EnvConfig) -> PolicyScheduler:
    """Actions drawn as an SB3 policy or model draws them; a model of values explores as it did at the end."""
    return PolicyScheduler(Predictor(model, as_it_is, deterministic=False), world)


class _Looks(BaseCallback):
    """Evaluates greedy actions on selection seeds, writes progress.jsonl and keeps the best model in best.zip."""

    def __init__(self, training: Training, utility: Callable[[Any], float]) -> None:
        super().__init__()
        self.training, self.utility = training, utility
        self.best, self._next, self._start = -np.inf, training.eval_every, time.perf_counter()

    def _on_step(self) -> bool:
        if self.num_timesteps >= self._next:
            self._look()
        return True

    def _on_training_end(self) -> None:
        if self.num_timesteps > self._next - self.training.eval_every:
            self._look()

    def _look(self) -> None:
        out, found = self.training.out, self.utility(self.model)
        if found > self.best:
            self.best = found
            self.model.save(out / "best.zip")
        line = {"step": self.num_timesteps, "eval/mean_utility": found, "time/s": time.perf_counter() - self._start}
        with open(out / "progress.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        self._next = self.num_timesteps + self.training.eval_every


def _model(preset: Preset, training: Training) -> tuple[TrainingEnv, Any]:
    """The environments of a training by an algorithm of SB3, and its model."""
    learner = LEARNERS[preset.learner]
    cls = getattr(importlib.import_module(learner.place[0]), learner.place[1])
    settings = dict(preset.settings)
    num_envs, hidden = settings.pop("num_envs", 16), settings.pop("hidden", (64, 64))
    env = TrainingEnv(num_envs, preset.suite, training.seed, **preset.world)
    slots = preset.config.observation == "slots"
    network = {"net_arch": list(hidden)} | ({} if slots else {"features_extractor_class": Normaliser})
    network |= {name: settings.pop(name) for name in learner.network if name in settings}
    try:
        given = {"policy_kwargs": network, "seed": training.seed, "device": "cpu", **settings}
        return env, cls(learner.policy, env, **given)
    except (AssertionError, TypeError, ValueError) as error:  # of settings that do not go together
        raise ConfigError(f"presets: {preset.name}: settings: {' '.join(str(error).split())}") from None


def _sb3(preset: Preset, training: Training) -> Trained:
    torch.set_num_threads(1)
    env, model = _model(preset, training)
    own = [part for part in model.policy.modules() if isinstance(part, Normaliser)]  # a target network has its own, too
    if own:
        typical = typical_features(env, training.seed)
        for part in own:
            part.fit(typical)
    world = preset.config
    judged = preset.config.replace(num_requests=training.eval_requests)

    def greedy(model: Any) -> PolicyScheduler:
        return PolicyScheduler(Predictor(model, as_it_is), world)

    make_folder(training.out)
    (training.out / "progress.jsonl").unlink(missing_ok=True)  # a killed training begins anew
    seeds = SELECTION_SEEDS[:SELECTION]
    model.learn(training.steps, _Looks(training, lambda m: float(np.mean(utilities(judged, greedy(m), seeds)))))
    best = type(model).load(training.out / "best.zip", device="cpu")
    return Trained(greedy(best), sampled_by(best, world), _curve(training.out))


def figures_of(trained: Trained, preset: Preset, seed: int, seeds: Sequence[int], num_requests: int) -> dict[str, Any]:
    """Mean utility by test seed of greedy and of sampled actions, and the curve."""
    world = preset.config.replace(num_requests=num_requests)
    greedy = utilities(world, trained.greedy, seeds)
    set_random_seed(seed)
    return {"greedy": greedy, "sampled": utilities(world, trained.sampled, seeds), "curve": trained.curve}
