"""Rollout buffers for steps of different lengths: each step has its own discount.

A = delta + gamma_k lambda A' with delta = r + gamma_k V' - V, and gamma_k = exp(-duration / tau) from the step's info.
A request that is late in 2 s then counts the same whether 20 short batches or 5 long ones lie in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableRolloutBuffer
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import obs_as_tensor

from llmsched_gym.env.base import EPISODE_INFOS


class _StepDiscounts:
    """What SB3's buffers get: `discounts` of shape (buffer_size, n_envs), filled in by :class:`Discounts`."""

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.discounts = np.full((self.buffer_size, self.n_envs), self.gamma, np.float32)  # type: ignore[attr-defined]

    def compute_returns_and_advantage(self: Any, last_values: torch.Tensor, dones: np.ndarray) -> None:
        """As SB3's, with each step's own discount."""
        next_values = last_values.clone().cpu().numpy().flatten()
        goes_on = 1.0 - dones.astype(np.float32)
        advantage = np.zeros(self.n_envs, np.float32)
        for step in reversed(range(self.buffer_size)):
            discount = self.discounts[step] * goes_on
            delta = self.rewards[step] + discount * next_values - self.values[step]
            advantage = delta + discount * self.gae_lambda * advantage
            self.advantages[step] = advantage
            next_values, goes_on = self.values[step], 1.0 - self.episode_starts[step]
        self.returns = self.advantages + self.values


class Rollouts(_StepDiscounts, RolloutBuffer):
    pass


class DictRollouts(_StepDiscounts, DictRolloutBuffer):
    pass


class MaskableRollouts(_StepDiscounts, MaskableRolloutBuffer):
    pass


class MaskableDictRollouts(_StepDiscounts, MaskableDictRolloutBuffer):
    pass


def buffer_class(*, masks: bool, slots: bool) -> type:
    if masks:
        return MaskableDictRollouts if slots else MaskableRollouts
    return DictRollouts if slots else Rollouts


def episode_figures(episodes: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Means for logs over the episodes that SB3 remembers: the return, and the figures of `episode_metrics=True`.

    An episode in which a figure is infinite or missing is left out of its mean.
    """
    figures = {}
    names = {"r": "rollout/return"} | {name: f"episode/{name.removeprefix('episode_')}" for name in EPISODE_INFOS}
    for name, logged in names.items():
        values = [e[name] for e in episodes if math.isfinite(e.get(name, math.nan))]
        if values:
            figures[logged] = float(np.mean(values))
    return figures


class EpisodeMetrics(BaseCallback):
    """Logs what became of the last hundred episodes' requests, for any SB3 learner on environments with metrics.

    >>> env = LLMSchedVecEnv(16, episode_metrics=True)
    >>> PPO("MlpPolicy", env, tensorboard_log="logs").learn(100_000, callback=EpisodeMetrics())
    """

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        for name, value in episode_figures(self.model.ep_info_buffer or ()).items():
            self.logger.record(name, value)


class Discounts(BaseCallback):
    """Hands each step's discount to the buffer, and bootstraps truncated episodes with it.

    SB3 would bootstrap with its one gamma: here the value is added first, and the flag that asks for it taken back.
    """

    def __init__(self, *, per_second: bool) -> None:
        super().__init__()
        self.per_second = per_second

    def _on_step(self) -> bool:
        infos, model = self.locals["infos"], cast(Any, self.model)
        buffer = model.rollout_buffer
        discounts = buffer.discounts[buffer.pos]
        if self.per_second:
            discounts[:] = [info["discount"] for info in infos]
        cut = [i for i, info in enumerate(infos) if info.get("TimeLimit.truncated", False)]
        if cut:
            last = [infos[i]["terminal_observation"] for i in cut]
            stacked: Any = {k: np.stack([o[k] for o in last]) for k in last[0]} if isinstance(last[0], dict) else None
            with torch.no_grad():
                tensors = obs_as_tensor(np.stack(last) if stacked is None else stacked, model.device)
                values = model.policy.predict_values(tensors).cpu().numpy().flatten()
            self.locals["rewards"][cut] += discounts[cut] * values
            for i in cut:
                infos[i]["TimeLimit.truncated"] = False
        return True
