"""Environments and the compiled rollouts of a policy in them: what :mod:`llmsched_gym.agents.ppo` learns from.

Everything that is random about an environment is a function of (seed, its index, step or number of the episode): a
collector of environments 64 to 127 finds what one of 0 to 127 finds for these, in however many threads.

In groups (see :mod:`llmsched_gym.agents.advantages`) the n-th episode of each member has the same requests. Members
whose batches last longer fall behind, so a group in which an episode has ended begins the next one together with the
next rollout. Every rollout ends with the critic's value of what comes, so nothing that was learnt from is lost by that.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from llmsched_gym.agents.advantages import Advantages, Variant
from llmsched_gym.agents.envs import restore_core, save_core
from llmsched_gym.agents.rollout_kernels import KINDS, Rollout, collecting
from llmsched_gym.agents.seeds import TRAINING_SEEDS
from llmsched_gym.config import ConfigError, env_config
from llmsched_gym.env.arrays import TRUNCATED
from llmsched_gym.env.base import EPISODE_INFOS
from llmsched_gym.env.core import EnvCore
from llmsched_gym.policies.network import Network, make_network

EPISODES, ACTIONS = 1, 4  # what random numbers are for


class Collector:
    """Environments first, ..., first + num_envs - 1 of a training, side by side.

    Args:
        num_envs: environments.
        suite, fields: the world, as of the environment.
        seed: of the training; episodes come from the training seeds.
        n_steps: decisions per environment and rollout.
        gae_lambda: lambda of the advantage.
        num_threads: threads that share the environments.
        first: index of the first environment.
        variant: of the advantages; ConfigError where it makes no sense in this world.
    """

    def __init__(
        self,
        num_envs: int,
        suite: str,
        seed: int,
        n_steps: int,
        *,
        gae_lambda: float,
        num_threads: int = 1,
        first: int = 0,
        variant: Variant = Variant(),  # noqa: B008  frozen
        **fields: Any,
    ) -> None:
        config = env_config(suite, **fields)
        _check(config)
        self.core = core = EnvCore(config, num_envs)
        self.config, self.seed, self.first, self.gae_lambda = core.config, seed, first, gae_lambda
        self.num_envs, self._collect = num_envs, collecting()
        self.num_threads = min(num_threads, num_envs)
        self._threads = ThreadPoolExecutor(self.num_threads - 1) if self.num_threads > 1 else None
        self.num_episodes = np.zeros(num_envs, np.int64)  # that have begun
        self.rollout = self._buffers(n_steps)
        self.group = variant.group
        self.advantages = Advantages(variant, core, gae_lambda) if variant != Variant() else None
        self.figures: dict[str, float] = {}  # of the last rollout's advantages, for logs

    def _buffers(self, n_steps: int) -> Rollout:
        core, n = self.core, self.num_envs
        space: Any = core.action_space
        widths = np.atleast_1d(space.nvec if isinstance(space, spaces.MultiDiscrete) else space.n)
        num_masked = int(widths.sum()) if core.kind.mask is not None else 0
        names = ("log_probs", "rewards", "discounts", "paid", "last_values", "advantages", "baselines")
        numbers = {name: np.zeros((n, n_steps), np.float32) for name in names}
        return Rollout(
            features=np.zeros((n, n_steps, core.arrays.features.shape[1]), np.float32),
            masks=np.zeros((n, n_steps, num_masked), np.bool_),
            actions=np.zeros((n, n_steps, len(widths)), np.int64),
            values=np.zeros((n, n_steps + 1), np.float32),
            ended=np.zeros((n, n_steps), np.bool_),
            clocks=np.zeros((n, n_steps)),
            durations=np.zeros((n, n_steps)),
            uniforms=np.zeros((n, n_steps, len(widths)), np.float32),
            widths=widths.astype(np.int64),
            at=np.zeros(n, np.int64),
            waits=np.zeros(n, np.bool_),
            returns=np.zeros(n),
            **numbers,
        )

    def start(self) -> None:
        """Begin an episode in every environment."""
        for env in range(self.num_envs):
            self._begin(env)

    def _begin(self, env: int) -> None:
        """Begin the next episode of environment `env`."""
        place = (self.first + env) // self.group
        self.core.reset(env, episode_seed(self.seed, place, int(self.num_episodes[env])))
        self.num_episodes[env] += 1
        self.rollout.returns[env] = 0.0

    def collect(self, actor: Network, critic: Network, step: int) -> list[dict[str, float]]:
        """Fill ``self.rollout`` with the next decisions of every environment; `step` tells one rollout from another.

        Returns the figures of the episodes that ended, in the order of their ends.
        """
        b, core = self.rollout, self.core
        rng = np.random.default_rng([self.seed, ACTIONS, step])
        b.uniforms[...] = rng.random((self.first + self.num_envs, *b.uniforms.shape[1:]), np.float32)[self.first :]
        b.at[:] = 0
        edges = np.linspace(0, self.num_envs, self.num_threads + 1).astype(int).tolist()
        own = [[network._replace(layers=network.layers.copy()) for network in (actor, critic)] for _ in edges[1:]]
        ended: list[tuple[int, int, dict[str, float]]] = []
        begun, cut = self.num_episodes.copy(), {}  # what episodes that were truncated ended with
        while True:
            parts = [
                (core.engine.handle, core.handle, core.kind.step, b, *networks, self.gae_lambda, *edge)
                for networks, edge in zip(own, itertools.pairwise(edges), strict=True)
            ]
            others = [self._threads.submit(self._collect, *part) for part in parts[1:]] if self._threads else []
            self._collect(*parts[0])
            for other in others:
                other.result()
            waiting = np.flatnonzero(b.waits).tolist()
            for env in waiting:  # between the threads' turns, as arrays may grow
                t = int(b.at[env]) - 1
                if b.ended[env, t]:
                    if core.arrays.outcomes[env, TRUNCATED] > 0.0:
                        cut[env, t] = core.arrays.features[env].copy()
                    figures = zip(EPISODE_INFOS, core.metrics(env).values(), strict=True)
                    ended.append((t, env, {"r": float(b.returns[env]), **dict(figures)}))
                    self._begin(env)
                else:
                    core.engine.refill_noise(env)
                b.waits[env] = False
            if not waiting:
                break
        if self.advantages is not None:
            self.figures = self.advantages.learn(b, core.arrays.features, cut, begun)
        if self.group > 1:
            self._begin_together()
        return [figures for *_, figures in sorted(ended, key=lambda end: end[:2])]

    def _begin_together(self) -> None:
        """Begin the next episode in each group of which a member's has ended in the rollout."""
        for start in range(0, self.num_envs, self.group):
            members = slice(start, start + self.group)
            if self.rollout.ended[members].any():
                self.num_episodes[members] = self.num_episodes[members].max()
                for env in range(start, start + self.group):
                    self._begin(env)

    def save(self) -> dict[str, Any]:
        """The state between two rollouts, for a checkpoint."""
        b, learnt = self.rollout, {} if self.advantages is None else {"advantages": self.advantages.save()}
        return {"core": save_core(self.core), "num_episodes": self.num_episodes, "returns": b.returns, **learnt}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state that was saved."""
        restore_core(self.core, state["core"])
        self.num_episodes[:], self.rollout.returns[:] = state["num_episodes"], state["returns"]
        if self.advantages is not None:
            self.advantages.restore(state["advantages"])

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown()


def episode_seed(seed: int, env: int, number: int) -> int:
    """The requests of environment (or group) `env`'s episode `number`, from 0 on, in the training `seed`."""
    return int(np.random.default_rng([seed, EPISODES, env, number]).integers(TRAINING_SEEDS.start, TRAINING_SEEDS.stop))


def _check(config: Any) -> None:
    """ConfigError for worlds whose rollouts are not compiled."""
    for name, ok, expected in (
        ("action", config.action in KINDS, " or ".join(KINDS)),
        ("observation", config.observation == "features", "features"),
        ("mask_in_observation", config.mask_in_observation is None, "None"),
        ("backend", config.backend == "simulated", "simulated"),
        ("reward", not callable(config.reward), "the built-in one"),
    ):
        if not ok:
            raise ConfigError(f"{name}: expected {expected} for compiled rollouts, got {getattr(config, name)!r}")


def networks_of(policy: Any) -> tuple[Network, Network]:
    """Actor and critic of an SB3 policy on features, as compiled code reads them: a copy of the weights of now."""
    body = policy.mlp_extractor
    return _network(policy, body.policy_net, policy.action_net), _network(policy, body.value_net, policy.value_net)


def _network(policy: Any, hidden: nn.Sequential, out: nn.Linear) -> Network:
    layers = [layer for layer in (*hidden, out) if isinstance(layer, nn.Linear)]
    arrays = [(_array(layer.weight.T), _array(layer.bias)) for layer in layers]
    normalise = policy.features_extractor
    columns, activation = np.arange(len(normalise.mean)), "relu" if policy.activation_fn is nn.ReLU else "tanh"
    mean, scale = _array(normalise.mean), _array(normalise.scale)
    return make_network(columns, mean, scale, arrays, activation, [1], [np.zeros(1, np.int64)])


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().numpy())
