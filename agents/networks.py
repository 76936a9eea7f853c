"""Policies in torch for SB3: an MLP on features, and a network over request rows that does not depend on their order.

The computations are those of `llmsched_gym.policies.networks`, which runs them in numpy after export.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from llmsched_gym.agents.rollout_kernels import tanh_of
from llmsched_gym.env.actions import ACTIONS
from llmsched_gym.env.core import space_settings
from llmsched_gym.env.slots import NUM_SLOTS

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


class Normaliser(BaseFeaturesExtractor):
    """Features by fixed constants: (x - mean) * scale."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, observation_space: spaces.Box) -> None:
        size = int(np.prod(observation_space.shape))
        super().__init__(observation_space, size)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return (features - self.mean) * self.scale

    def fit(self, features: np.ndarray) -> None:
        """Set the constants from observations (n, size); entries that hardly vary are not blown up."""
        self.mean.copy_(torch.from_numpy(features.mean(0)))
        self.scale.copy_(torch.from_numpy(1.0 / (features.std(0) + 0.05)))


class RowsExtractor(BaseFeaturesExtractor):
    """Request rows and features -> [pooled vector | mask | embedded rows], flat."""

    def __init__(
        self, observation_space: spaces.Dict, width: int = 32, layers: int = 1, heads: int = 2, activation: str = "tanh"
    ) -> None:
        super().__init__(observation_space, width + NUM_SLOTS + NUM_SLOTS * width)
        rows, features = observation_space["slots"].shape[1], observation_space["features"].shape[0]  # type: ignore[index]
        self.settings = {"width": width, "layers": layers, "heads": heads, "activation": activation}
        self.width, self.heads, self.act = width, heads, ACTIVATIONS[activation]()
        self.normalise = Normaliser(observation_space["features"])  # type: ignore[arg-type]
        self.row, self.context = nn.Linear(rows, width), nn.Linear(features, width, bias=False)
        self.mix = nn.Linear(width, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.mixed = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.pool = nn.Linear(2 * width + features, width)

    def forward(self, observation: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = observation["in_use"].reshape(-1, NUM_SLOTS).float()
        x = self.normalise(observation["features"])
        h = self.act(self.row(observation["slots"]) + self.context(x)[:, None])
        h = self.act(self.mix(h))
        for qkv, out in zip(self.qkv, self.mixed, strict=True):
            q, k, v = qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            weights = q @ k.transpose(-1, -2) / math.sqrt(self.width // self.heads)
            weights = weights.masked_fill(mask[:, None, None] == 0, -1e9).softmax(-1)
            h = self.act(h + out((weights @ v).transpose(1, 2).flatten(2)))
        used = mask[..., None]
        mean = (h * used).sum(1) / used.sum(1).clamp(min=1.0)
        largest = h.masked_fill(used == 0, -1e9).amax(1) * (used.sum(1) > 0)
        pooled = self.act(self.pool(torch.cat([mean, largest, x], -1)))
        return torch.cat([pooled, mask, h.flatten(1)], -1)


class PooledHead(nn.Module):
    """A linear layer on the pooled vector."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.width, self.out = width, nn.Linear(width, outputs)

    def forward(self, flat: torch.Tensor) -> torch.Tensor:
        return self.out(flat[:, : self.width])


class RowHead(nn.Module):
    """A score for every row, and with `closes` one more for closing the batch; unused rows score -1."""

    def __init__(self, width: int, activation: str, closes: bool) -> None:
        super().__init__()
        self.width, self.act = width, ACTIVATIONS[activation]()
        self.row, self.pool = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, 1)
        self.close = nn.Linear(width, 1) if closes else None

    def forward(self, flat: torch.Tensor) -> torch.Tensor:
        pooled, mask, rows = flat.split([self.width, NUM_SLOTS, NUM_SLOTS * self.width], -1)
        z = self.act(self.row(rows.unflatten(-1, (NUM_SLOTS, self.width))) + self.pool(pooled)[:, None])
        scores = self.out(z)[..., 0].masked_fill(mask == 0, -1.0)
        return scores if self.close is None else torch.cat([scores, self.close(pooled)], -1)


def _has_choices(space: spaces.Space) -> bool:
    """Whether actions are made of choices, not of slots; spaces saved by others do not carry their kind."""
    kind = space_settings(space).get("action")
    return isinstance(space, spaces.MultiDiscrete) if kind is None else ACTIONS[kind].scores == (0, 0)


class _RowHeads:
    """Replaces SB3's linear heads by ones that know what the flat vector holds."""

    def _build(self: Any, lr_schedule: Any) -> None:
        super()._build(lr_schedule)  # type: ignore[misc]
        settings = self.features_extractor.settings
        width = settings["width"]
        if _has_choices(self.action_space):
            self.action_net = PooledHead(width, spaces.flatdim(self.action_space))
        else:
            self.action_net = RowHead(width, settings["activation"], isinstance(self.action_space, spaces.Discrete))
        self.value_net = nn.Sequential(PooledHead(width, 64), nn.Tanh(), nn.Linear(64, 1))
        for module, gain in ((self.action_net, 1.0), (self.value_net, 1.0)):
            module.apply(lambda m, gain=gain: self.init_weights(m, gain))
        self.action_net.out.weight.data *= 0.01
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)


class RowsPolicy(_RowHeads, ActorCriticPolicy):  # type: ignore[misc]
    pass


class MaskableRowsPolicy(_RowHeads, MaskableActorCriticPolicy):  # type: ignore[misc]
    pass


def policy_class(*, masks: bool, slots: bool) -> type:
    if slots:
        return MaskableRowsPolicy if masks else RowsPolicy
    return MaskableActorCriticPolicy if masks else ActorCriticPolicy


def policy_kwargs(
    *, slots: bool, hidden: tuple[int, ...], activation: str, width: int, layers: int, heads: int
) -> dict[str, Any]:
    """Keyword arguments of the policy class."""
    if not slots:
        net = {"pi": list(hidden), "vf": list(hidden)}
        return {"net_arch": net, "activation_fn": ACTIVATIONS[activation], "features_extractor_class": Normaliser}
    settings = {"width": width, "layers": layers, "heads": heads, "activation": activation}
    return {"net_arch": [], "features_extractor_class": RowsExtractor, "features_extractor_kwargs": settings}


def normaliser_of(policy: Any) -> Normaliser:
    extractor = policy.features_extractor
    return extractor if isinstance(extractor, Normaliser) else extractor.normalise


class Tanh(torch.autograd.Function):
    """The rollouts' hyperbolic tangent, in a fifth of the time of torch's, which is half of a forward pass."""

    @staticmethod
    def forward(context: Any, numbers: torch.Tensor) -> torch.Tensor:
        found = torch.empty_like(numbers)
        tanh_of(numbers.detach().numpy().reshape(-1), found.numpy().reshape(-1))
        context.save_for_backward(found)
        return found

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (found,) = context.saved_tensors
        return torch.ops.aten.tanh_backward(gradient, found)


def through(layers: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """What hidden layers make of `x`."""
    for module in layers:
        x = Tanh.apply(x) if isinstance(module, nn.Tanh) else module(x)
    return x
