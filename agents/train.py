"""Train PPO or MaskablePPO on LLMSched: ``llmsched train --out runs/first``.

A run folder holds config.json, checkpoints, progress.jsonl (one line per iteration), TensorBoard events, `best` (the
policy folder with the highest mean utility on selection seeds so far) and at the end `policy` (the same, with its
decision time measured). ``llmsched train --resume --out runs/first`` goes on after an interruption, on the
curve that the run would have had without it.

``llmsched train --backend transformers --model random:tiny --warm-start runs/first --out runs/real`` goes on
with a policy trained in simulation on a real model: one environment, whose clock is the model's.

``llmsched train --env route --out runs/router`` trains a router, see :mod:`llmsched_gym.agents.train_route`.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger

from llmsched_gym.agents.checkpoint import (
    load_checkpoint,
    random_state,
    set_random_state,
)
from llmsched_gym.agents.decision_time import finish
from llmsched_gym.agents.envs import TrainingEnv
from llmsched_gym.agents.export import load_actor
from llmsched_gym.agents.networks import normaliser_of, policy_class, policy_kwargs
from llmsched_gym.agents.options import MOST_ENVS, MOST_WIDTH, fail_in_one_line, option, parse
from llmsched_gym.agents.rollout import Discounts, buffer_class, episode_figures
from llmsched_gym.agents.run_folder import check_source, open_run, start_run
from llmsched_gym.agents.seeds import check_evaluations, evaluation_of
from llmsched_gym.agents.settings import (
    LEARNER,
    MOST_LAYERS,
    NETWORK,
    RUN,
    WORLD,
    Decisions,
    Looks,
    Network,
    Proximal,
    Run,
    World,
    check_sizes,
)
from llmsched_gym.agents.training_run import TrainingRun
from llmsched_gym.config import ACTIONS, ConfigError, EnvConfig, env_config
from llmsched_gym.env.actions import action_of
from llmsched_gym.interrupts import leave
from llmsched_gym.policies import read_folder


@dataclass(frozen=True)
class Config(Looks, Network, Proximal, Decisions, World, Run):
    env: str = option("sched", "route trains a router, see `--env route --help`", choices=("sched", "route"), group=RUN)
    backend: str = option(
        "simulated", "what executes batches", choices=("simulated", "transformers", "vllm"), group=WORLD
    )
    model: str = option("", "of a real backend: a folder, a hub id, random:tiny", group=WORLD)
    observation: str = option(
        "features", "what it sees: MLP on features, or rows", choices=("features", "slots"), group=WORLD
    )
    algorithm: str = option("ppo", "maskable is for request actions", choices=("ppo", "maskable"), group=LEARNER)
    num_envs: int = option(128, "environments side by side; always 1 on a real model", most=MOST_ENVS)
    critic_warmup: int = option(0, "decisions before the actor starts to learn; for a warm start", group=LEARNER)
    discount: str = option(
        "second", "per second, exp(-duration / tau), or per step", choices=("second", "step"), group=LEARNER
    )
    gamma: float = option(0.998, "discount of a step, with --discount step", group=LEARNER, most=1.0)
    hidden: tuple[int, ...] = option((64, 64), "features: widths of the layers")
    width: int = option(32, "slots: width of a row's embedding", group=NETWORK, most=MOST_WIDTH)
    layers: int = option(1, "slots: attention layers; 0 is deep sets", low=0, most=MOST_LAYERS, group=NETWORK)
    heads: int = option(2, "slots: attention heads", group=NETWORK)

    def world(self) -> dict[str, Any]:
        """Fields of the environment."""
        return {
            "action": self.action,
            "observation": self.observation,
            "action_repeat": int(min(self.action_repeat, ACTIONS[self.action])),
            "reward_scale": self.reward_scale,
            "tau_s": self.tau_s,
            "backend": self.backend,
            "model": self.model or None,
            "episode_metrics": True,
            **self.set,
        }

    @property
    def is_real(self) -> bool:
        """Whether a real model executes the batches."""
        return self.world()["backend"] != "simulated"


def make_model(config: Config, env: TrainingEnv) -> PPO | MaskablePPO:
    """An SB3 model with our buffer and policy; everything random in it comes from the seed."""
    masks, slots = config.algorithm == "maskable", config.observation == "slots"
    rate = config.learning_rate
    return (MaskablePPO if masks else PPO)(
        policy_class(masks=masks, slots=slots),
        env,
        learning_rate=(lambda remaining: rate * max(0.0, remaining)) if config.anneal else rate,
        n_steps=config.n_steps,
        batch_size=min(config.batch_size, config.n_steps * env.num_envs),
        n_epochs=config.epochs,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        clip_range=config.clip,
        ent_coef=config.entropy,
        rollout_buffer_class=buffer_class(masks=masks, slots=slots),
        policy_kwargs=policy_kwargs(
            slots=slots,
            hidden=config.hidden,
            activation=config.activation,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
        ),
        seed=config.seed,
        device="cpu",
    )


def prepared(config: Config, starts: bool = True) -> tuple[TrainingEnv, PPO | MaskablePPO]:
    """The environments of a training and its model, as it `starts`; ConfigError for what they cannot have."""
    _check(config)
    env = TrainingEnv(1 if config.is_real else config.num_envs, config.suite, config.seed, **config.world())
    model = make_model(config, env)
    if config.warm_start and starts:
        warm_start(model.policy, env.env.config, Path(config.warm_start))
    return env, model


TYPICAL_BATCHES = 12_800
"""In an environment; those of typical features, where actions are held so long that fewer of them do."""


def typical_features(env: TrainingEnv, seed: int, steps: int = 200) -> np.ndarray:
    """Features under random constant actions, for the normalisation; (steps * num_envs, num_features)."""
    steps = min(steps, max(8, TYPICAL_BATCHES // env.env.config.action_repeat))
    rng = np.random.default_rng([seed, 2])
    env.start_over(seed)
    env.reset()
    env.action_space.seed(seed)
    actions = np.stack([env.action_space.sample() for _ in range(env.num_envs)])
    seen = []
    for _ in range(steps):
        if action_of(env.env.config).mask is not None:
            actions = np.array([rng.choice(np.flatnonzero(mask)) for mask in env.action_masks()])
        observation = env.step(actions)[0]
        seen.append(observation["features"] if isinstance(observation, dict) else observation)
    env.start_over(seed)
    return np.concatenate(seen)


def warm_start(policy: Any, world: EnvConfig, source: Path) -> None:
    """Start from a run (its last checkpoint, critic and all), a file of weights, or a policy folder's actor."""
    check_source(str(source))
    saved = load_checkpoint(source) if source.is_dir() else None
    if source.is_dir() and saved is None:
        load_actor(policy, world, source)
        return
    try:
        policy.load_state_dict(torch.load(source, weights_only=True) if saved is None else saved["policy"])
    except Exception as error:  # there is nothing that unpickling junk does not raise
        what = "expected a run, a policy folder (agents.export makes one of an SB3 zip) or weights.pt, of this network"
        raise ConfigError(f"warm_start: {source}: {what} ({' '.join(str(error).split())[:120]})") from None


def start_episodes(model: PPO | MaskablePPO, env: TrainingEnv) -> None:
    """Begin anew between two iterations."""
    model._last_obs, model._last_episode_starts = env.reset(), np.ones(env.num_envs, bool)  # type: ignore[assignment]


def set_actor_learning(policy: Any, learns: bool) -> None:
    actor = [policy.action_net, getattr(policy.mlp_extractor, "policy_net", None)]
    for module in filter(None, actor):
        module.requires_grad_(learns)


def train(config: Config, evaluated: Callable[[int, float], None] | None = None) -> Path:
    """Run or go on with a training; returns the folder of the policy.

    `evaluated` hears, in place of the bar, each evaluation's step and mean utility; what it raises ends the training.
    """
    out = Path(config.out)
    config = open_run(config)
    torch.set_num_threads(config.threads)
    torch.distributions.Distribution.set_default_validate_args(False)  # a tenth of the time

    saved = load_checkpoint(out) if config.resume else None
    env, model = prepared(config, starts=saved is None)
    world = env.env.config
    model.set_logger(Logger(folder=None, output_formats=[]))
    callback: Any = Discounts(per_second=config.discount == "second")

    if saved is None:
        if not config.warm_start:
            normaliser_of(model.policy).fit(typical_features(env, config.seed))
        start_run(config)
        _, callback = model._setup_learn(config.steps, callback)
    else:
        model._last_obs, model._last_episode_starts = saved["observation"], saved["episode_starts"]
        model.num_timesteps, model._n_updates = saved["step"], saved["updates"]
        _, callback = model._setup_learn(config.steps - saved["step"], callback, reset_num_timesteps=False)
        model.policy.load_state_dict(saved["policy"])
        model.policy.optimizer.load_state_dict(saved["optimizer"])
        model.ep_info_buffer.extend(saved["episodes"])  # type: ignore[union-attr]
        env.restore(saved["env"])
        if config.is_real:  # no checkpoint holds a model's KV
            start_episodes(model, env)
        set_random_state(saved["random"])

    def state() -> dict[str, Any]:
        return {
            "updates": model._n_updates,
            "policy": model.policy.state_dict(),
            "optimizer": model.policy.optimizer.state_dict(),
            "observation": model._last_obs,
            "episode_starts": np.asarray(model._last_episode_starts),
            "episodes": list(model.ep_info_buffer or ()),
            "env": env.save(),
            "random": random_state(),
        }

    def looked() -> None:
        if config.is_real:  # the model has served the evaluation's requests
            start_episodes(model, env)

    backend = env.env.core.engine.backend
    with TrainingRun(config, world, saved, evaluated) as run:
        while model.num_timesteps < config.steps:
            start, first = time.perf_counter(), model.num_timesteps
            set_actor_learning(model.policy, first >= config.critic_warmup)
            model.collect_rollouts(env, callback, model.rollout_buffer, n_rollout_steps=config.n_steps)
            model._update_current_progress_remaining(model.num_timesteps, config.steps)
            model.train()
            step = model.num_timesteps
            figures = {k: float(v) for k, v in model.logger.name_to_value.items()}
            model.logger.name_to_value.clear()
            figures |= episode_figures(model.ep_info_buffer or ())
            figures["time/frames_per_s"] = (step - first) / (time.perf_counter() - start)
            run.tell(step, figures, model.policy, state, backend=backend, looked=looked)
    return finish(out / "policy", *read_folder(out / "best"))


def _check(config: Config) -> None:
    action = action_of(env_config(config.suite, **config.world()))
    if action.mask is not None and config.algorithm != "maskable":
        raise ConfigError(f"algorithm: expected maskable for {action.name} actions, got {config.algorithm}")
    check_sizes(config.batch_size, config.num_envs, config.n_steps)
    check_evaluations(evaluation_of(config), config.eval_seeds)


def command(argv: Sequence[str] | None = None, program: str | None = None) -> None:
    """Run the command line; raises what is wrong with it."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--env")
    if first.parse_known_args(argv)[0].env == "route":
        importlib.import_module("llmsched_gym.agents.train_route").command(argv, program)
        return
    print(train(parse(Config, argv, __doc__, program)))


def main() -> int:
    return fail_in_one_line(command)


if __name__ == "__main__":
    from llmsched_gym.agents import train as module  # under its one name, not this copy of it

    leave(module.main())
