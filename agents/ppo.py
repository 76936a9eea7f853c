"""PPO of our own, its rollouts in compiled code: ``llmsched ppo --suite default --action preset --out runs/own``.

The run folder is that of ``llmsched train``, and so is the policy: what one has trained the other goes on with by
``--warm-start``. Agents see features, through an MLP; request rows, the priority action, real models and rewards in
Python are for ``llmsched train``.

Proximal policy optimisation as in Schulman et al. (2017), with the details of Stable-Baselines3: advantages normalised
by minibatch, no clipping of values, one optimiser. Discounts are per second, see :mod:`llmsched_gym.agents.rollout`.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import mse_loss, pad
from torch.nn.utils import clip_grad_norm_

from llmsched_gym.agents.checkpoint import load_checkpoint
from llmsched_gym.agents.collect import Collector, networks_of
from llmsched_gym.agents.decision_time import finish
from llmsched_gym.agents.envs import TrainingEnv
from llmsched_gym.agents.networks import normaliser_of, policy_class, policy_kwargs
from llmsched_gym.agents.options import fail_in_one_line, option, parse
from llmsched_gym.agents.rollout import episode_figures
from llmsched_gym.agents.run_folder import open_run, start_run
from llmsched_gym.agents.train import set_actor_learning, typical_features, warm_start
from llmsched_gym.agents.training_run import TrainingRun
from llmsched_gym.config import ACTIONS
from llmsched_gym.policies import read_folder

MINIBATCHES = 5  # what these random numbers are for; see agents.collect for others
IMPOSSIBLE = -1e8  # the score of what cannot be chosen


@dataclass(frozen=True)
class Config:
    out: str = option("runs/ppo", "folder of the run")
    resume: bool = option(False, "go on from the last checkpoint in --out, with the settings of its config.json")
    seed: int = option(0, "of everything that is random: weights, actions, minibatches, choice of episodes")
    # the world
    suite: str = option("default", "suite to train on")
    set: dict[str, Any] = option({}, "any other field of EnvConfig, as --set qps=1.8; may be repeated")  # noqa: RUF009
    action: str = option("knobs", "what the agent decides", choices=("knobs", "preset", "request"))
    action_repeat: int = option(8, "batches that one action decides (1 for request actions)")
    reward_scale: float = option(0.02, "factor on the reward")
    tau_s: float = option(120.0, "time constant of the per-second discount")
    # the learner
    steps: int = option(2_000_000, "decisions to train on, over all environments")
    num_envs: int = option(128, "environments side by side")
    n_steps: int = option(64, "decisions per environment and iteration")
    batch_size: int = option(2048, "of a minibatch")
    epochs: int = option(4, "passes over an iteration's data")
    learning_rate: float = option(5e-4, "at the start")
    anneal: bool = option(True, "let the learning rate fall to 0 linearly")
    gae_lambda: float = option(0.97, "lambda of the advantage")
    clip: float = option(0.2, "PPO's clip range")
    entropy: float = option(0.002, "weight of the entropy bonus")
    value_weight: float = option(0.5, "weight of the critic's loss")
    max_grad_norm: float = option(0.5, "gradients longer than that are shortened to it")
    critic_warmup: int = option(0, "decisions before the actor starts to learn; for a warm start")
    warm_start: str = option("", "run to start from, weights.pt of agents.imitate, or policy folder (actor only)")
    threads: int = option(2, "threads of rollouts and of torch, one a core at most")
    # the network
    hidden: tuple[int, ...] = option((64, 64), "widths of the layers")
    activation: str = option("tanh", "between layers", choices=("tanh", "relu"))
    # looking and saving
    eval_every: int = option(250_000, "decisions between evaluations on selection seeds")
    eval_seeds: int = option(4, "selection seeds (2000, 2001, ...)")
    eval_requests: int = option(500, "measured requests of an evaluation run")
    checkpoint_every: int = option(250_000, "decisions between checkpoints")

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
    return Collector(*sizes, gae_lambda=config.gae_lambda, num_threads=config.threads, **config.world())


def make_policy(config: Config, collector: Collector) -> Any:
    """Actor and critic, an SB3 policy on features; its weights come from the seed."""
    torch.manual_seed(config.seed)
    cls = policy_class(masks=collector.core.kind.mask is not None, slots=False)
    hidden, activation = config.hidden, config.activation
    settings = policy_kwargs(slots=False, hidden=hidden, activation=activation, width=0, layers=0, heads=0)
    core = collector.core
    policy = cls(core.observation_space, core.action_space, lambda _: config.learning_rate, **settings)
    policy.optimizer = torch.optim.Adam(policy.parameters(), config.learning_rate, eps=1e-5, fused=True)
    return policy


class Learner:
    """Learns from rollouts: ``learner.learn(rollout, step)`` is an iteration's update of the policy."""

    def __init__(self, config: Config, policy: Any, widths: np.ndarray) -> None:
        self.config, self.policy, self.updates = config, policy, 0
        # Scores of one entry after the other, and one that is impossible: where each entry's own lie, (entries, most).
        ends, most = np.cumsum(widths), int(widths.max())
        places = [
            [*range(end - width, end), *[ends[-1]] * (most - width)] for end, width in zip(ends, widths, strict=True)
        ]
        self.places = torch.tensor(places)

    def _evaluate(
        self, features: torch.Tensor, masks: torch.Tensor | None, actions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities of `actions`, entropies and values, each (batch,), of normalised features."""
        body = self.policy.mlp_extractor
        scores = self.policy.action_net(body.policy_net(features))
        if masks is not None:
            scores = scores.masked_fill(~masks, IMPOSSIBLE)
        log_probs = pad(scores, (0, 1), value=IMPOSSIBLE)[:, self.places].log_softmax(-1)
        chosen = log_probs.gather(-1, actions[..., None]).sum((1, 2))
        entropy = -(log_probs.exp() * log_probs).sum((1, 2))
        return chosen, entropy, self.policy.value_net(body.value_net(features))[:, 0]

    def learn(self, rollout: Any, step: int) -> dict[str, float]:
        """Passes over a rollout, which began `step` decisions into the training, in minibatches; figures for logs."""
        config, policy = self.config, self.policy
        rate = config.learning_rate * (max(0.0, 1.0 - step / config.steps) if config.anneal else 1.0)
        for group in policy.optimizer.param_groups:
            group["lr"] = rate
        data = [
            torch.from_numpy(array).flatten(0, 1) for array in (rollout.actions, rollout.log_probs, rollout.advantages)
        ]
        values = torch.from_numpy(rollout.values[:, :-1]).flatten()
        returns = data[-1] + values
        with torch.no_grad():
            features = policy.extract_features(torch.from_numpy(rollout.features).flatten(0, 1))
        masks = torch.from_numpy(rollout.masks).flatten(0, 1) if len(rollout.masks) else None
        seen = []
        for rows in self._minibatches(len(returns), step):
            actions, old_log_probs, advantages = (part[rows] for part in data)
            log_probs, entropy, value = self._evaluate(features[rows], None if masks is None else masks[rows], actions)
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
            change = log_probs - old_log_probs
            ratio = change.exp()
            clipped = ratio.clamp(1.0 - config.clip, 1.0 + config.clip)
            policy_loss = -torch.minimum(advantages * ratio, advantages * clipped).mean()
            value_loss, entropy = mse_loss(value, returns[rows]), entropy.mean()
            policy.optimizer.zero_grad()
            (policy_loss - config.entropy * entropy + config.value_weight * value_loss).backward()
            clip_grad_norm_(policy.parameters(), config.max_grad_norm)
            policy.optimizer.step()
            with torch.no_grad():
                moved = (ratio - 1.0 - change).mean(), (ratio != clipped).float().mean()
                seen.append(torch.stack([policy_loss, value_loss, entropy, *moved]))
        self.updates += len(seen)
        names = ("policy_gradient_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")
        figures = dict(zip(names, torch.stack(seen).mean(0).tolist(), strict=True))
        spread = float(returns.var())
        figures["explained_variance"] = 1.0 - float((returns - values).var()) / spread if spread > 0.0 else 0.0
        figures |= {"learning_rate": rate, "n_updates": self.updates}
        return {f"train/{name}": value for name, value in figures.items()}

    def _minibatches(self, size: int, step: int) -> Iterator[torch.Tensor]:
        """Rows of one minibatch after the other, each epoch in its own order."""
        rng = np.random.default_rng([self.config.seed, MINIBATCHES, step])
        for _ in range(self.config.epochs):
            yield from torch.from_numpy(rng.permutation(size)).split(self.config.batch_size)


def train(config: Config, evaluated: Callable[[int, float], None] | None = None) -> Path:
    """Run or go on with a training; returns the folder of the policy.

    `evaluated` hears, in place of the bar, each evaluation's step and mean utility; what it raises ends the training.
    """
    out = Path(config.out)
    config = open_run(config)
    torch.set_num_threads(config.threads)
    collector = make_collector(config)
    policy, world = make_policy(config, collector), collector.config
    learner = Learner(config, policy, collector.rollout.widths)
    episodes: deque[dict[str, float]] = deque(maxlen=100)

    saved = load_checkpoint(out) if config.resume else None
    if saved is None:
        if config.warm_start:
            warm_start(policy, world, Path(config.warm_start))
        else:
            typical = TrainingEnv(config.num_envs, config.suite, config.seed, **config.world())
            normaliser_of(policy).fit(typical_features(typical, config.seed))
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

    with TrainingRun(config, world, saved, evaluated) as run:
        while run.step < config.steps:
            start, first = time.perf_counter(), run.step
            set_actor_learning(policy, first >= config.critic_warmup)
            episodes.extend(collector.collect(*networks_of(policy), first))
            collected = time.perf_counter()
            step = first + config.num_envs * config.n_steps
            figures = learner.learn(collector.rollout, first) | episode_figures(episodes)
            took_s = time.perf_counter() - start
            figures["time/rollout_share"] = (collected - start) / took_s
            figures["time/frames_per_s"] = (step - first) / took_s
            run.tell(step, figures, policy, state)
    collector.close()
    return finish(out / "policy", *read_folder(out / "best"))


def command(argv: Sequence[str] | None = None, program: str | None = None) -> None:
    """Run the command line; raises what is wrong with it."""
    print(train(parse(Config, argv, __doc__, program)))


def main() -> int:
    return fail_in_one_line(command)


if __name__ == "__main__":
    from llmsched_gym.agents import ppo as module  # under its one name, not this copy of it

    sys.exit(module.main())
