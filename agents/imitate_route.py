"""Imitate a router that is told the truth: ``python -m llmsched_gym.agents.imitate_route --weights FILE --out runs/x``.

The teacher is a weighted router (:mod:`llmsched_gym.agents.route_scores`); with ``--told`` it knows how long outputs
are and which sessions go on, and the student learns to tell it from what everybody sees (Chen et al., Learning by
Cheating, CoRL 2019). Behaviour cloning first: the teacher routes. Then DAgger: the student routes, the teacher says
what it would have done, and the student learns from everything seen so far. Writes `policy`, a router's folder, which
``llmsched train --env route --warm-start`` takes, too.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmsched_gym.agents.options import MOST_ENVS, fail_in_one_line, option, parse
from llmsched_gym.agents.route_networks import export_router, fit_normalisation, scores_of
from llmsched_gym.agents.route_scores import WeightedRouter, make_weighted, read_weights, told
from llmsched_gym.agents.routing import RouteTrainingEnv
from llmsched_gym.agents.run_folder import open_run, settings_of, start_run
from llmsched_gym.agents.seeds import check_evaluations
from llmsched_gym.agents.train_route import Config as TrainConfig
from llmsched_gym.agents.train_route import evaluate, evaluation_of, make_model
from llmsched_gym.cluster.kernels import look_again
from llmsched_gym.config import ConfigError
from llmsched_gym.env.route.policy import choosing
from llmsched_gym.interrupts import leave
from llmsched_gym.policies.routers import write_router


@dataclass(frozen=True)
class Config:
    weights: str = option("", "file of the teacher's weights, of agents.tune_route")
    told: bool = option(False, "tell the teacher output lengths and later turns")
    out: str = option("runs/imitate_route", "folder to write")
    seed: int = option(0, "of weights, minibatches, actions and choice of episodes")
    suite: str = option("cluster", "suite to imitate on")
    set: dict[str, Any] = option({}, "any other field of RouteConfig, as --set qps=6; may be repeated")  # noqa: RUF009
    rounds: int = option(5, "rounds of DAgger after behaviour cloning", low=0)
    steps: int = option(1000, "decisions per environment and round")
    num_envs: int = option(16, "environments side by side", most=MOST_ENVS)
    epochs: int = option(4, "passes over the data after each round")
    batch_size: int = option(1024, "of a minibatch")
    learning_rate: float = option(1e-3, "of Adam")
    hidden: tuple[int, ...] = option((64, 64), "widths of the layers")
    eval_seeds: int = option(4, "selection seeds (2000, 2001, ...)")
    eval_requests: int = option(500, "measured requests of an evaluation run")


class Teacher:
    """Asks a weighted router what it would do in each environment."""

    def __init__(self, router: WeightedRouter, env: RouteTrainingEnv, *, is_told: bool) -> None:
        self.router, self.core, self.is_told = router, env.env.core, is_told
        if self.core.config.length_hint != "none":
            raise ConfigError(f"length_hint: expected 'none' for the student, got {self.core.config.length_hint!r}")
        self._hints: dict[int, tuple[Any, np.ndarray]] = {}  # by environment: its table, and what the teacher is told

    def __call__(self) -> np.ndarray:
        """The replicas, int64 (num_envs,); -1 where no request is to be routed."""
        cluster = self.core.cluster
        found = np.full(self.core.num_envs, -1)
        for env in range(self.core.num_envs):
            if cluster.deciding(env) >= 0:
                self.router.install(cluster.nodes, env)
                found[env] = self._told(env) if self.is_told else self._ask(env)
        return found

    def _ask(self, env: int) -> int:
        cluster = self.core.cluster
        return int(choosing()(cluster.handle, cluster.nodes_handle, env, self.router.kernel))

    def _told(self, env: int) -> int:
        """Its choice while requests have hints: nothing else may see them."""
        cluster, table = self.core.cluster, self.core.tables[env]
        if table is None or self._hints.get(env, (None,))[0] is not table:
            self._hints[env] = table, told(table).length_hint  # type: ignore[arg-type]
        hints = self._hints[env][1]
        seen = cluster.state.requests[env]["length_hint"][: len(hints)]
        before = seen.copy()
        seen[:] = hints
        look_again(cluster.handle, cluster.nodes_handle, env)
        found = self._ask(env)
        seen[:] = before
        look_again(cluster.handle, cluster.nodes_handle, env)
        return found


def imitate(config: Config) -> Path:
    """Train a student; returns its folder."""
    weights = read_weights(config.weights)
    config = open_run(config)
    torch.set_num_threads(1)
    shared = {name: getattr(config, name) for name in ("suite", "set", "seed", "hidden", "eval_seeds", "eval_requests")}
    training = TrainConfig(num_envs=config.num_envs, **shared)
    check_evaluations(evaluation_of(training), config.eval_seeds)
    env = RouteTrainingEnv(config.num_envs, config.suite, config.seed, **training.world())
    teacher = Teacher(make_weighted(weights), env, is_told=config.told)
    model = make_model(training, env)
    policy, rng = model.policy, np.random.default_rng([config.seed, 4])
    net = scores_of(policy)
    optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate)
    out = Path(config.out)
    start_run(config)
    observations: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    now, line = np.asarray(env.reset()), {}
    for number in range(config.rounds + 1):
        for _ in range(config.steps):
            label = teacher()
            observations.append(now)
            labels.append(label)
            now = np.asarray(env.step(np.maximum(label, 0) if number == 0 else _sample(net, now))[0])
        seen, said = np.concatenate(observations), np.concatenate(labels)
        seen, said = seen[said >= 0], said[said >= 0]
        if number == 0:
            fit_normalisation(policy, seen)
        agreement = _fit(net, optimizer, seen, said, config, rng)
        line = {"round": number, "agreement": agreement, **evaluate(policy, training)}
        with open(out / "progress.jsonl", "a") as progress:
            progress.write(json.dumps(line) + "\n")
        print(f"{'behaviour cloning' if number == 0 else f'DAgger {number}'}: {line}", file=sys.stderr)
    summary = {**settings_of(config), **line}
    summary["weights"] = Path(config.weights).name  # a path is nobody else's
    return write_router(out / "policy", *export_router(policy, training=summary))


def _sample(net: Any, flat: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = torch.distributions.Categorical(logits=net(torch.from_numpy(flat))).sample().numpy()
    return found


def _fit(
    net: Any, optimizer: Any, seen: np.ndarray, said: np.ndarray, config: Config, rng: np.random.Generator
) -> float:
    """Raise the likelihood of the labels; returns the share of decisions that agree."""
    flat, labels, agreed = torch.from_numpy(seen), torch.from_numpy(said), 0
    for epoch in range(config.epochs):
        for rows in np.array_split(rng.permutation(len(said)), max(1, len(said) // config.batch_size)):
            scores = net(flat[rows])
            loss = torch.nn.functional.cross_entropy(scores, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if epoch == config.epochs - 1:
                agreed += int((scores.argmax(1) == labels[rows]).sum())
    return agreed / len(said)


def main() -> int:
    return fail_in_one_line(lambda: print(imitate(parse(Config, None, __doc__))), "interrupted")


if __name__ == "__main__":
    from llmsched_gym.agents import imitate_route as module  # under its one name, not this copy of it

    leave(module.main())
