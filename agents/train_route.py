"""Train PPO, MaskablePPO or DQN to route requests: ``llmsched train --env route --out runs/router``.

The run folder is that of ``llmsched train``: config.json, checkpoints, progress.jsonl, `best` and at the end `policy`,
a router by its path (``make_router("runs/router/policy")``). ``--resume`` goes on with the networks of the last
checkpoint; episodes, and DQN's replay memory, begin anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger

from llmsched_gym.agents.checkpoint import (
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from llmsched_gym.agents.options import MOST_ENVS, MOST_N_STEPS, option, parse
from llmsched_gym.agents.rollout import Discounts, buffer_class, episode_figures
from llmsched_gym.agents.route_networks import (
    MaskableRoutePolicy,
    RouteDQNPolicy,
    RoutePolicy,
    export_router,
    fit_normalisation,
    scores_of,
)
from llmsched_gym.agents.routing import DiscountedReplay, RouteTrainingEnv, typical_observations
from llmsched_gym.agents.run_folder import cut_progress, open_run, settings_of, start_run
from llmsched_gym.agents.seeds import SELECTION_SEEDS, check_evaluations
from llmsched_gym.agents.settings import LEARNER, RUN, WORLD, Looks, Network, Proximal, Run, World, check_sizes
from llmsched_gym.config import ClusterScenario, ConfigError, route_config
from llmsched_gym.evaluation.clusters import simulate_cluster
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.policies.routers import LoadedRouter, read_router, write_router
from llmsched_gym.scheduler import PolicyError


@dataclass(frozen=True)
class Config(Looks, Network, Proximal, World, Run):
    env: str = option(
        "route", "this help is of route; sched trains an agent that forms batches", choices=("route",), group=RUN
    )
    suite: str = option("cluster", "suite to train on")
    set: dict[str, Any] = option({}, "any other field of RouteConfig, as --set qps=6; may be repeated")  # noqa: RUF009
    reward_scale: float = option(0.1, "factor on the reward", group=WORLD)
    tau_s: float = option(30.0, "time constant of the per-second discount")
    algorithm: str = option(
        "ppo", "who learns; what is illegal none of them chooses", choices=("ppo", "maskable", "dqn"), group=LEARNER
    )
    steps: int = option(1_000_000, "decisions to train on, over all environments")
    num_envs: int = option(8, "environments side by side", most=MOST_ENVS)
    n_steps: int = option(512, "ppo: decisions per environment and iteration", most=MOST_N_STEPS)
    batch_size: int = option(1024, "of a minibatch")
    epochs: int = option(4, "ppo: passes over an iteration's data")
    gae_lambda: float = option(0.97, "ppo: lambda of the advantage", most=1.0)
    clip: float = option(0.2, "ppo: clip range")
    entropy: float = option(0.002, "ppo: weight of the entropy bonus")
    memory: int = option(100_000, "dqn: decisions in the replay memory", group=LEARNER)
    learning_starts: int = option(5_000, "dqn: decisions before it learns", group=LEARNER)
    exploration: float = option(
        0.2, "dqn: share of the training over which random actions become rare", group=LEARNER, most=1.0
    )
    target_every: int = option(5_000, "dqn: decisions between two updates of the target network", group=LEARNER)
    warm_start: str = option("", "folder of a router whose scores the actor begins with")
    eval_every: int = option(100_000, "decisions between evaluations on selection seeds")
    checkpoint_every: int = option(100_000, "decisions between checkpoints")

    def world(self) -> dict[str, Any]:
        """Fields of the environment."""
        return {"reward_scale": self.reward_scale, "tau_s": self.tau_s, **self.set}


def make_model(config: Config, env: RouteTrainingEnv) -> Any:
    """An SB3 model with our buffer and policy; everything random in it comes from the seed."""
    rate = config.learning_rate
    common: dict[str, Any] = {
        "learning_rate": (lambda remaining: rate * max(0.0, remaining)) if config.anneal else rate,
        "policy_kwargs": {"hidden": config.hidden, "activation": config.activation},
        "seed": config.seed,
        "device": "cpu",
    }
    if config.algorithm == "dqn":
        return DQN(
            RouteDQNPolicy,
            env,
            buffer_size=config.memory,
            batch_size=config.batch_size,
            learning_starts=config.learning_starts,
            train_freq=(max(1, 64 // env.num_envs), "step"),
            gradient_steps=1,
            target_update_interval=config.target_every,
            exploration_fraction=config.exploration,
            replay_buffer_class=DiscountedReplay,
            **common,
        )
    masks = config.algorithm == "maskable"
    learner: Any = MaskablePPO if masks else PPO
    return learner(
        MaskableRoutePolicy if masks else RoutePolicy,
        env,
        n_steps=config.n_steps,
        batch_size=min(config.batch_size, config.n_steps * env.num_envs),
        n_epochs=config.epochs,
        gae_lambda=config.gae_lambda,
        clip_range=config.clip,
        ent_coef=config.entropy,
        rollout_buffer_class=buffer_class(masks=masks, slots=False),
        **common,
    )


def evaluation_of(config: Config) -> ClusterScenario:
    """What runs on selection seeds have as their world."""
    return route_config(config.suite, **{"num_requests": config.eval_requests, **config.set})


def evaluate(policy: Any, config: Config) -> dict[str, float]:
    """Means over selection seeds of whole runs of the exported router."""
    world = evaluation_of(config)
    router, scheduler = LoadedRouter(*export_router(policy)), world.replica_scheduler
    seeds = SELECTION_SEEDS[: config.eval_seeds]
    rows = [row(simulate_cluster(world, scheduler, seed, router=router)) for seed in seeds]
    return {name: float(np.mean([r[name] for r in rows])) for name in ("mean_utility", "slo_attainment")}


class _Keeper(BaseCallback):
    """Between two iterations: writes progress, looks at selection seeds, keeps the best router and checkpoints."""

    def __init__(self, config: Config, progress: TextIO, saved: dict[str, Any] | None) -> None:
        super().__init__()
        self.config, self.progress, self.out = config, progress, Path(config.out)
        self.best = -np.inf if saved is None else saved["best"]
        step = 0 if saved is None else saved["step"]
        self.last = self.last_eval = self.last_checkpoint = step
        self.since = time.perf_counter()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.num_timesteps > self.last:
            self._look(ends=False)

    def _on_training_end(self) -> None:
        self._look(ends=True)

    def _look(self, *, ends: bool) -> None:
        step, config, now = self.num_timesteps, self.config, time.perf_counter()
        is_due = step - self.last_eval >= config.eval_every
        is_quiet = config.algorithm == "dqn" and step - self.last < 2048  # its iterations are short
        if not (ends or is_due or step - self.last_checkpoint >= config.checkpoint_every) and is_quiet:
            return
        figures = {name: float(value) for name, value in self.model.logger.name_to_value.items()}
        self.model.logger.name_to_value.clear()
        figures |= episode_figures(self.model.ep_info_buffer or ())
        figures["time/frames_per_s"] = (step - self.last) / max(now - self.since, 1e-9)
        if is_due or ends:
            self.last_eval = step
            found = evaluate(self.model.policy, config)
            figures |= {f"eval/{name}": value for name, value in found.items()}
            if found["mean_utility"] > self.best:
                self.best = found["mean_utility"]
                summary = {**settings_of(config), "warm_start": bool(config.warm_start), "step": step}
                write_router(
                    self.out / "best", *export_router(self.model.policy, training={**summary, "selection": found})
                )
        self.progress.write(json.dumps({"step": step, **figures}) + "\n")
        self.progress.flush()
        if ends or step - self.last_checkpoint >= config.checkpoint_every:
            self.last_checkpoint = step
            save_checkpoint(self.out, step, self._state(step))
        self.last, self.since = step, time.perf_counter()

    def _state(self, step: int) -> dict[str, Any]:
        model: Any = self.model
        return {
            "step": step,
            "updates": model._n_updates,
            "policy": model.policy.state_dict(),
            "optimizer": model.policy.optimizer.state_dict(),
            "episodes": json.dumps(model.env.env.episodes.bit_generator.state),
            "random": random_state(),
            "best": self.best,
        }


def start_from(policy: Any, source: str) -> None:
    """Give a policy the scores of a router's folder; ConfigError if its network is another."""
    try:
        spec, tensors = read_router(source)
    except PolicyError as error:
        raise ConfigError(f"warm_start: {error}") from None
    wanted, own = export_router(policy)
    shapes = [{name: array.shape for name, array in arrays.items()} for arrays in (tensors, own)]
    if (spec.architecture, spec.observation, shapes[0]) != (wanted.architecture, wanted.observation, shapes[1]):
        raise ConfigError(f"warm_start: {source}: expected a router with this training's network and entries")
    nets = [scores_of(policy), *([policy.q_net_target.q_net] if hasattr(policy, "q_net_target") else [])]
    for net in nets:
        state = {name.replace("normalise.", ""): torch.from_numpy(array) for name, array in tensors.items()}
        net.load_state_dict(state)


def train(config: Config) -> Path:
    """Run or go on with a training; returns the folder of the router."""
    out = Path(config.out)
    config = open_run(config)
    check_evaluations(evaluation_of(config), config.eval_seeds)
    if config.algorithm != "dqn":
        check_sizes(config.batch_size, config.num_envs, config.n_steps)
    torch.set_num_threads(config.threads)
    torch.distributions.Distribution.set_default_validate_args(False)
    env = RouteTrainingEnv(config.num_envs, config.suite, config.seed, **config.world())
    model = make_model(config, env)
    model.set_logger(Logger(folder=None, output_formats=[]))
    saved = load_checkpoint(out) if config.resume else None
    if saved is None:
        fit_normalisation(model.policy, typical_observations(env, config.seed))
        if config.warm_start:
            start_from(model.policy, config.warm_start)
        start_run(config)
    else:
        env.env.episodes.bit_generator.state = json.loads(saved["episodes"])
        model.num_timesteps, model._n_updates = saved["step"], saved["updates"]
        model.policy.load_state_dict(saved["policy"])
        model.policy.optimizer.load_state_dict(saved["optimizer"])
        set_random_state(saved["random"])
    with open(cut_progress(out, model.num_timesteps), "a") as progress:
        keeper = _Keeper(config, progress, saved)
        learner = [] if config.algorithm == "dqn" else [Discounts(per_second=True)]
        if model.num_timesteps < config.steps:
            left = config.steps - model.num_timesteps
            model.learn(left, CallbackList([*learner, keeper]), reset_num_timesteps=saved is None)
    return write_router(out / "policy", *read_router(out / "best"))


def command(argv: Sequence[str] | None = None, program: str | None = None) -> None:
    """Run the command line; raises what is wrong with it."""
    print(train(parse(Config, argv, __doc__, program)))
