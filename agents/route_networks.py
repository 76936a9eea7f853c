"""Routers in torch for SB3: one network scores every replica, on the flat observation of the routing environment.

The scores are those of :mod:`llmsched_gym.policies.routers`, which computes them in numpy after export.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from torch import nn

from llmsched_gym.agents.networks import ACTIVATIONS
from llmsched_gym.env.route.features import AT, REPLICA_FEATURES, REQUEST_FEATURES
from llmsched_gym.policies.routers import KIND, RouterSpec

NUM_INPUTS = len(REQUEST_FEATURES) + 2 * len(REPLICA_FEATURES)
NEVER = -1e8  # the score of a replica that may not take the request


class Replicas(nn.Module):
    """A fully connected network over each replica: flat observations (n, entries) -> (n, num_replicas, outputs)."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, hidden: tuple[int, ...], activation: str, outputs: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(NUM_INPUTS))
        self.register_buffer("scale", torch.ones(NUM_INPUTS))
        self.activation, self.act = activation, ACTIVATIONS[activation]()
        widths = (NUM_INPUTS, *hidden)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.out = nn.Linear(widths[-1], outputs)

    def forward(self, flat: torch.Tensor) -> torch.Tensor:
        x = (inputs_of(flat) - self.mean) * self.scale
        for layer in self.hidden:
            x = self.act(layer(x))
        return self.out(x)

    def fit(self, flat: np.ndarray) -> None:
        """Set the normalisation from observations (n, entries); entries that hardly vary are not blown up."""
        x = inputs_of(torch.from_numpy(flat)).flatten(0, 1)
        self.mean.copy_(x.mean(0))
        self.scale.copy_(1.0 / (x.std(0) + 0.02))


def split(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The request's entries (n, ...) and the replicas' rows (n, num_replicas, ...) of flat observations."""
    first = len(REQUEST_FEATURES)
    return flat[:, :first], flat[:, first:].unflatten(1, (-1, len(REPLICA_FEATURES)))


def inputs_of(flat: torch.Tensor) -> torch.Tensor:
    """What the network sees of each replica, (n, num_replicas, NUM_INPUTS)."""
    request, rows = split(flat)
    legal = _legal(rows)[..., None].float()
    typical = (rows * legal).sum(1, keepdim=True) / legal.sum(1, keepdim=True)
    return torch.cat([request[:, None].expand(-1, rows.shape[1], -1), rows, rows - typical], -1)


def _legal(rows: torch.Tensor) -> torch.Tensor:
    """Who may take the request; everybody where there is none."""
    legal = rows[..., AT.is_legal] > 0
    return legal | ~legal.any(1, keepdim=True)


class Scores(Replicas):
    """A score for each replica; (n, num_replicas)."""

    def __init__(self, hidden: tuple[int, ...], activation: str) -> None:
        super().__init__(hidden, activation, 1)

    def forward(self, flat: torch.Tensor) -> torch.Tensor:
        return super().forward(flat)[..., 0].masked_fill(~_legal(split(flat)[1]), NEVER)


class Critic(nn.Module):
    """The value of a state: what is made of the replicas, averaged; (n, 1)."""

    def __init__(self, hidden: tuple[int, ...], activation: str) -> None:
        super().__init__()
        self.replicas = Replicas(hidden, activation, 32)
        self.act, self.out = ACTIVATIONS[activation](), nn.Linear(32, 1)

    def forward(self, flat: torch.Tensor) -> torch.Tensor:
        return self.out(self.act(self.replicas(flat).mean(1)))


class _Heads:
    """Replaces SB3's linear heads, which would have weights for each place in the flat observation."""

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.Space, lr_schedule: Any, **kwargs: Any
    ) -> None:
        self.settings = kwargs.pop("hidden"), kwargs.pop("activation")
        super().__init__(observation_space, action_space, lr_schedule, net_arch=[], **kwargs)  # type: ignore[call-arg]

    def _build(self: Any, lr_schedule: Any) -> None:
        super()._build(lr_schedule)  # type: ignore[misc]
        self.action_net, self.value_net = Scores(*self.settings), Critic(*self.settings)
        self.action_net.out.weight.data *= 0.01
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)


class RoutePolicy(_Heads, ActorCriticPolicy):  # type: ignore[misc]
    pass


class MaskableRoutePolicy(_Heads, MaskableActorCriticPolicy):  # type: ignore[misc]
    pass


class RouteDQNPolicy(DQNPolicy):
    """Values of the replicas by the same network."""

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.Discrete, lr_schedule: Any, **kwargs: Any
    ) -> None:
        self.settings = kwargs.pop("hidden"), kwargs.pop("activation")
        super().__init__(observation_space, action_space, lr_schedule, net_arch=[], **kwargs)

    def make_q_net(self) -> QNetwork:
        net = super().make_q_net()
        net.q_net = Scores(*self.settings)  # type: ignore[assignment]
        return net


def scores_of(policy: Any) -> Scores:
    """The network that routes, of whichever policy."""
    found: Any = policy.q_net.q_net if isinstance(policy, DQNPolicy) else policy.action_net
    assert isinstance(found, Scores)
    return found


def fit_normalisation(policy: Any, flat: np.ndarray) -> None:
    """Set the normalisation of all networks of a policy from observations (n, entries)."""
    for module in policy.modules():
        if isinstance(module, Replicas):
            module.fit(flat)


def export_router(policy: Any, **fields: Any) -> tuple[RouterSpec, dict[str, np.ndarray]]:
    """Spec and tensors of a policy for a router's folder; `fields` (training) go into the spec."""
    net = scores_of(policy)
    tensors: dict[str, Any] = {"normalise.mean": net.mean, "normalise.scale": net.scale}
    for i, layer in enumerate(net.hidden):
        tensors |= {f"hidden.{i}.weight": layer.weight, f"hidden.{i}.bias": layer.bias}
    tensors |= {"out.weight": net.out.weight, "out.bias": net.out.bias}
    arrays = {name: tensor.detach().numpy().astype(np.float32) for name, tensor in tensors.items()}
    return RouterSpec({"kind": KIND, "layers": len(net.hidden), "activation": net.activation}, **fields), arrays
