"""RLlib's default modules with illegal actions masked, and what policy folders need of a module."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from ray.rllib.algorithms.appo.torch.default_appo_torch_rl_module import DefaultAPPOTorchRLModule
from ray.rllib.algorithms.dqn.default_dqn_rl_module import QF_PREDS
from ray.rllib.algorithms.dqn.torch.default_dqn_torch_rl_module import DefaultDQNTorchRLModule
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import TARGET_NETWORK_ACTION_DIST_INPUTS
from torch import nn

from llmsched_gym.config import EnvConfig
from llmsched_gym.policies import PolicySpec
from llmsched_gym.policies.folder import spec_for

ILLEGAL = -1e9  # a score with which an action is never chosen, finite for the sake of entropies


class _Masked:  # before a module of RLlib's among the bases
    """Observations end with a 1 for each legal action; the networks see what is before."""

    def __init__(self, *args: Any, observation_space: Any, action_space: Any, **settings: Any) -> None:
        self.inputs = observation_space.shape[0] - int(action_space.n)
        own = spaces.Box(-np.inf, np.inf, (self.inputs,), np.float32)
        settings |= {"observation_space": own, "action_space": action_space}
        super().__init__(*args, **settings)
        self.observation_space = observation_space

    def _split(self, batch: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
        """The batch as the networks take it, and what illegal actions' scores lose."""
        seen = batch[Columns.OBS]
        return {**batch, Columns.OBS: seen[..., : self.inputs]}, (1.0 - seen[..., self.inputs :]) * ILLEGAL


class _MaskedActorCritic(_Masked):
    def _forward(self, batch: dict[str, Any], **settings: Any) -> dict[str, Any]:
        own, loss = self._split(batch)
        found = super()._forward(own, **settings)  # type: ignore[misc]
        found[Columns.ACTION_DIST_INPUTS] = found[Columns.ACTION_DIST_INPUTS] + loss
        return found

    def _forward_train(self, batch: dict[str, Any], **settings: Any) -> dict[str, Any]:
        own, loss = self._split(batch)
        found = super()._forward_train(own, **settings)  # type: ignore[misc]
        found[Columns.ACTION_DIST_INPUTS] = found[Columns.ACTION_DIST_INPUTS] + loss
        return found

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Any:
        return super().compute_values(self._split(batch)[0], embeddings)  # type: ignore[misc]


class MaskedPPO(_MaskedActorCritic, DefaultPPOTorchRLModule):
    """PPO's module."""


class MaskedAPPO(_MaskedActorCritic, DefaultAPPOTorchRLModule):
    """APPO's module, whose target network is masked, too."""

    def forward_target(self, batch: dict[str, Any]) -> dict[str, Any]:
        own, loss = self._split(batch)
        found = super().forward_target(own)
        found[TARGET_NETWORK_ACTION_DIST_INPUTS] = found[TARGET_NETWORK_ACTION_DIST_INPUTS] + loss
        return found


class MaskedDQN(_Masked, DefaultDQNTorchRLModule):
    """DQN's module; RLlib's random actions leave out those of value -inf."""

    def _qf_forward_helper(self, batch: dict[str, Any], encoder: Any, head: Any) -> dict[str, Any]:
        own, loss = self._split(batch)
        found = super()._qf_forward_helper(own, encoder, head)
        found[QF_PREDS] = found[QF_PREDS].masked_fill(loss < 0, -torch.inf)
        return found


MASKED = {"ppo": MaskedPPO, "appo": MaskedAPPO, "dqn": MaskedDQN}


def export(
    module: Any, config: EnvConfig, mean: np.ndarray, scale: np.ndarray, activation: str, **fields: Any
) -> tuple[PolicySpec, dict[str, np.ndarray]]:
    """Spec and tensors of a module trained on `config`: the actor, or the network of values or advantages."""
    encoder = getattr(module.encoder, "actor_encoder", module.encoder)
    hidden, head = _layers(encoder), _layers(module.af if hasattr(module, "af") else module.pi)
    *more, out = [*hidden, *head]
    tensors = {"normalise.mean": mean, "normalise.scale": scale}
    for name, layer in [*((f"hidden.{i}", layer) for i, layer in enumerate(more)), ("out", out)]:
        tensors[f"{name}.weight"] = layer.weight.detach().cpu().numpy().astype(np.float32)
        tensors[f"{name}.bias"] = layer.bias.detach().cpu().numpy().astype(np.float32)
    architecture = {"kind": "mlp", "layers": len(more), "activation": activation}
    return spec_for(config, architecture, len(mean), **fields), tensors


def _layers(network: nn.Module) -> list[nn.Linear]:
    return [module for module in network.modules() if isinstance(module, nn.Linear)]
