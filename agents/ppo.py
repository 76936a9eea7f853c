"""PPO of our own, its rollouts in compiled code: ``llmsched ppo --suite default --action preset --out runs/own``.

The run folder is that of ``llmsched train``, and so is the policy: what one has trained the other goes on with by
``--warm-start``. Agents see features, through an MLP; request rows, the priority action, real models and rewards in
Python are for ``llmsched train``.

Proximal policy optimisation as in Schulman et al. (2017), with the details of Stable-Baselines3: advantages normalised
by minibatch, no clipping of values, one optimiser. Discounts are per second, see :mod:`llmsched_gym.agents.rollout`.
What takes noise out of advantages is :mod:`llmsched_gym.agents.advantages`, where an actor starts from
:mod:`llmsched_gym.agents.priors`.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from llmsched_gym.agents.advantages import Variant
from llmsched_gym.agents.checkpoint import load_checkpoint
from llmsched_gym.agents.collect import Collector, networks_of
from llmsched_gym.agents.decision_time import finish
from llmsched_gym.agents.envs import TrainingEnv
from llmsched_gym.agents.loss_kernels import FIGURES, loss_gradient
from llmsched_gym.agents.networks import normaliser_of, policy_class, policy_kwargs, through
from llmsched_gym.agents.options import fail_in_one_line, option, parse
from llmsched_gym.agents.priors import close_last, start_from
from llmsched_gym.agents.rollout import episode_figures
from llmsched_gym.agents.run_folder import open_run, start_run
from llmsched_gym.agents.seeds import check_evaluations, evaluation_of
from llmsched_gym.agents.settings import LEARNER, MOST_THREADS, Decisions, Looks, Network, Proximal, Run, World
from llmsched_gym.agents.train import set_actor_learning, typical_features, warm_start
from llmsched_gym.agents.training_run import TrainingRun
from llmsched_gym.config import ACTIONS, ConfigError
from llmsched_gym.interrupts import leave
from llmsched_gym.policies import read_folder

MINIBATCHES = 5  # what these random numbers are for; see agents.collect for others
SHARDS = 2  # of a minibatch

NOISE = "Noise that need not be, see docs/agents_scratch.md"  # a group of help


@dataclass(frozen=True)
class Config(Looks, Network, Proximal, Decisions, World, Run):
    out: str = option("runs/ppo", "folder of the run")
    action: str = option("knobs", "what the agent decides", choices=("knobs", "preset", "request"))
    critic_warmup: int = option(0, "decisions before the actor starts to learn; for a warm start", group=LEARNER)
    value_weight: float = option(0.5, "weight of the critic's loss", group=LEARNER)
    max_grad_norm: float = option(0.5, "gradients longer than that are shortened to it", group=LEARNER)
    group: int = option(1, "environments on the same requests, each other's baseline", group=NOISE)
    shaping: float = option(
        0.0, "utility that a predicted second of waiting prompts costs, as a potential", group=NOISE
    )
    average: bool = option(False, "rewards less their mean per second, instead of a discount", group=NOISE)
    prior: str = option(
        "", "knobs, presets: a rule to start from, such as tuned-constant or, with relu, tuned-linear", group=NOISE
    )
    prior_share: float = option(0.5, "how probable it is at the start, in each entry of an action", group=NOISE)
    work_conserving: bool = option(False, "request actions: a batch ends when nothing more can be added", group=NOISE)
    threads: int = option(2, "threads of rollouts; two of them share an update", most=MOST_THREADS)

    def world(self) -> dict[str, Any]:
        """Fields of the environment."""
        return {
            "action": self.action,
            "action_repeat": int(min(self.action_repeat, ACTIONS[self.action])),
            "reward_scale": self.reward_scale,
            "tau_s": self.tau_s,
            "episode_metrics": True,
            **self.set,
        }


def make_collector(config: Config) -> Collector:
    """The environments of a training."""
    sizes = config.num_envs, config.suite, config.seed, config.n_steps
    variant = Variant(**{field.name: getattr(config, field.name) for field in fields(Variant)})
    threads = config.threads
    return Collector(*sizes, gae_lambda=config.gae_lambda, num_threads=threads, variant=variant, **config.world())


def make_policy(config: Config, collector: Collector) -> Any:
    """Actor and critic, an SB3 policy on features; its weights come from the seed."""
    torch.manual_seed(config.seed)
    cls = policy_class(masks=collector.core.kind.mask is not None, slots=False)
    hidden, activation = config.hidden, config.activation
    settings = policy_kwargs(slots=False, hidden=hidden, activation=activation, width=0, layers=0, heads=0)
    core = collector.core
    policy = cls(core.observation_space, core.action_space, lambda _: config.learning_rate, **settings)
    policy.optimizer = torch.optim.Adam(policy.parameters(), config.learning_rate, eps=1e-5, fused=True)
    if config.work_conserving:
        close_last(policy, collector.config)
    return policy


def begin(policy: Any, config: Config) -> None:
    """Let a fresh policy see features by their means and spreads in the training's world, and start from its prior."""
    env = TrainingEnv(config.num_envs, config.suite, config.seed, **config.world())
    normaliser_of(policy).fit(typical_features(env, config.seed))
    if config.prior:
        start_from(policy, env.env.config, config.prior, config.prior_share)


def prepared(config: Config, starts: bool = True) -> tuple[Collector, Any]:
    """The environments of a training and its policy, as it `starts`; ConfigError for what they cannot have."""
    check_evaluations(evaluation_of(config), config.eval_seeds)
    if config.prior and config.warm_start:
        raise ConfigError("prior: expected no --warm-start, which decides where the actor starts")
    collector = make_collector(config)
    policy = make_policy(config, collector)
    if config.prior and starts:  # to see whether it can; begin() does it
        start_from(policy, collector.config, config.prior, config.prior_share)
    if config.warm_start and starts:
        warm_start(policy, collector.config, Path(config.warm_start))
        if config.work_conserving:
            close_last(policy, collector.config)
    return collector, policy


class Data(NamedTuple):
    """Decisions to learn from, in any order."""

    features: torch.Tensor  # (decisions, number of features) float32, normalised
    masks: np.ndarray  # (decisions, number of scores) bool; no scores where all are always legal
    actions: np.ndarray  # (decisions, entries) int64
    log_probs: np.ndarray  # (decisions,) float32, of the policy that acted
    returns: np.ndarray  # (decisions,) float32, what the critic is to tell


class Learner:
    """Learns from rollouts: ``learner.learn(rollout, step)`` is an iteration's update of the policy.

    The gradient of a minibatch is the sum of those of its SHARDS, whoever computes them: threads change no figure.
    """

    def __init__(self, config: Config, policy: Any, widths: np.ndarray) -> None:
        self.config, self.policy, self.widths, self.updates = config, policy, widths, 0
        self.weights = np.array([config.clip, config.entropy, config.value_weight])
        num_others = min(config.threads, SHARDS) - 1
        self._threads = (
            ThreadPoolExecutor(num_others, initializer=torch.set_num_threads, initargs=(1,)) if num_others else None
        )

    def learn(self, rollout: Any, step: int) -> dict[str, float]:
        """Passes over a rollout, which began `step` decisions into the training, in minibatches; figures for logs."""
        config, policy = self.config, self.policy
        rate = config.learning_rate * (max(0.0, 1.0 - step / config.steps) if config.anneal else 1.0)
        for group in policy.optimizer.param_groups:
            group["lr"] = rate
        data, values = self.data_of(rollout), rollout.values[:, :-1].ravel()
        gains = (rollout.advantages - rollout.baselines).ravel()
        learning = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        sums, num_seen = np.zeros(len(FIGURES)), 0
        for rows in self._minibatches(len(values), step):
            advantages = gains[rows]
            if len(rows) > 1:
                advantages = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)
            shards = [*zip(np.array_split(rows, SHARDS), np.array_split(advantages, SHARDS), strict=True)]
            found = self._each(functools.partial(self.gradients, data, learning, len(rows)), shards)
            for k, parameter in enumerate(learning):
                parameter.grad = functools.reduce(torch.add, [gradients[k] for gradients, _ in found])
            clip_grad_norm_(learning, config.max_grad_norm)
            policy.optimizer.step()
            sums += sum(each for _, each in found)
            num_seen += len(rows)
            self.updates += 1
        figures = dict(zip(FIGURES, (sums / num_seen).tolist(), strict=True))
        spread, missed = float(data.returns.var()), float((data.returns - values).var())
        figures["explained_variance"] = 1.0 - missed / spread if spread > 0.0 else 0.0
        figures |= {"learning_rate": rate, "n_updates": self.updates}
        return {f"train/{name}": value for name, value in figures.items()}

    def data_of(self, rollout: Any) -> Data:
        """A rollout's decisions, one after the other."""
        size = rollout.rewards.size
        with torch.no_grad():
            features = self.policy.extract_features(torch.from_numpy(rollout.features).flatten(0, 1))
        actions, masks = (array.reshape(size, array.shape[-1]) for array in (rollout.actions, rollout.masks))
        returns = rollout.advantages + rollout.values[:, :-1]
        return Data(features, masks, actions, rollout.log_probs.ravel(), returns.ravel())

    def gradients(
        self, data: Data, learning: list[torch.Tensor], size: int, shard: tuple[np.ndarray, np.ndarray]
    ) -> tuple[Any, np.ndarray]:
        """What a shard adds to the gradient of a minibatch of `size`, for each of the parameters that are learning.

        A shard is rows of `data` and their advantages. Also returns the sums that :func:`loss_gradient` makes.
        """
        rows, advantages = shard
        policy, body = self.policy, self.policy.mlp_extractor
        features = data.features[torch.from_numpy(rows)]
        scores = policy.action_net(through(body.policy_net, features))
        outputs = scores, policy.value_net(through(body.value_net, features))[:, 0]
        found = [output.detach().numpy() for output in outputs]
        by_output, sums = [np.empty_like(each) for each in found], np.zeros(len(FIGURES))
        told = data.masks, self.widths, rows, data.actions, data.log_probs, advantages, data.returns
        loss_gradient(*found, *told, size, self.weights, *by_output, np.zeros((len(self.widths), 2)), sums)
        pairs = [
            (output, torch.from_numpy(by))
            for output, by in zip(outputs, by_output, strict=True)
            if output.requires_grad
        ]
        return torch.autograd.grad([output for output, _ in pairs], learning, [by for _, by in pairs]), sums

    def _each(self, function: Callable[[Any], Any], parts: list[Any]) -> list[Any]:
        """What the function makes of each part, by all threads."""
        if self._threads is None:
            return [function(part) for part in parts]
        others = [self._threads.submit(function, part) for part in parts[1:]]
        return [function(parts[0]), *(other.result() for other in others)]

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown()

    def _minibatches(self, size: int, step: int) -> Iterator[np.ndarray]:
        """Rows of one minibatch after the other, each epoch in its own order."""
        rng = np.random.default_rng([self.config.seed, MINIBATCHES, step])
        for _ in range(self.config.epochs):
            order = rng.permutation(size)
            for first in range(0, size, self.config.batch_size):
                yield order[first : first + self.config.batch_size]


def train(config: Config, evaluated: Callable[[int, float], None] | None = None) -> Path:
    """Run or go on with a training; returns the folder of the policy.

    `evaluated` hears, in place of the bar, each evaluation's step and mean utility; what it raises ends the training.
    """
    out = Path(config.out)
    config = open_run(config)
    torch.set_num_threads(1)  # several wait for each other without sleeping; whole shards are shared out instead
    saved = load_checkpoint(out) if config.resume else None
    collector, policy = prepared(config, starts=saved is None)
    world = collector.config
    learner = Learner(config, policy, collector.rollout.widths)
    episodes: deque[dict[str, float]] = deque(maxlen=100)

    if saved is None:
        if not config.warm_start:
            begin(policy, config)
        start_run(config)
        collector.start()
    else:
        policy.load_state_dict(saved["policy"])
        policy.optimizer.load_state_dict(saved["optimizer"])
        collector.restore(saved["collector"])
        episodes.extend(saved["episodes"])
        learner.updates = saved["updates"]

    def state() -> dict[str, Any]:
        return {
            "policy": policy.state_dict(),
            "optimizer": policy.optimizer.state_dict(),
            "collector": collector.save(),
            "episodes": list(episodes),
            "updates": learner.updates,
        }

    with closing(collector), closing(learner), TrainingRun(config, world, saved, evaluated) as run:
        while run.step < config.steps:
            start, first = time.perf_counter(), run.step
            set_actor_learning(policy, first >= config.critic_warmup)
            episodes.extend(collector.collect(*networks_of(policy), first))
            collected = time.perf_counter()
            step = first + config.num_envs * config.n_steps
            figures = learner.learn(collector.rollout, first) | collector.figures | episode_figures(episodes)
            took_s = time.perf_counter() - start
            figures["time/rollout_share"] = (collected - start) / took_s
            figures["time/frames_per_s"] = (step - first) / took_s
            run.tell(step, figures, policy, state)
    return finish(out / "policy", *read_folder(out / "best"))


def command(argv: Sequence[str] | None = None, program: str | None = None) -> None:
    """Run the command line; raises what is wrong with it."""
    print(train(parse(Config, argv, __doc__, program)))


def main() -> int:
    return fail_in_one_line(command)


if __name__ == "__main__":
    from llmsched_gym.agents import ppo as module  # under its one name, not this copy of it

    leave(module.main())
