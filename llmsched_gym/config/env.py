"""How an agent meets a scenario: the keyword arguments of the environments of one engine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llmsched_gym.config.fields import ConfigError
from llmsched_gym.config.scenario import Scenario

ACTIONS = {"knobs": math.inf, "preset": math.inf, "priority": math.inf, "request": 1}
"""Kinds of actions, each with the most batches that one action may decide; `llmsched_gym.env.actions` has the rest."""
OBSERVATIONS = ("features", "slots")
CREDITS = ("early", "finish")
MASK_NAMES = {
    "rllib": ("observations", "action_mask"),  # rllib/examples/rl_modules/classes/action_masking_rlm.py, ray 2.60
    "torchrl": ("observation", "action_mask"),  # torchrl.envs.transforms.ActionMask, 0.14
    "tianshou": ("obs", "mask"),  # tianshou/algorithm/modelfree/dqn.py, 2.0
}
"""Under which names libraries look for an observation and, beside it, the mask of legal actions."""


def check_reward(config: Any) -> None:
    """Check the fields of an environment's configuration that say what is paid and told."""
    config._check_number("reward_scale", 0.0, 1e12, open_low=True)
    config._check_number("tau_s", 0.0, open_low=True)
    if not isinstance(config.episode_metrics, bool):
        raise ConfigError(f"episode_metrics: expected True or False, got {config.episode_metrics!r}")
    config._check_choice("credit", CREDITS)
    if not callable(config.reward):
        config._check_choice("reward", ("slo",))
    names = config.mask_in_observation
    if names is None or (isinstance(names, str) and names in MASK_NAMES):
        return
    is_pair = isinstance(names, tuple) and len(names) == 2 and all(isinstance(name, str) and name for name in names)
    if not is_pair or names[0] == names[1]:
        what = f"{', '.join(MASK_NAMES)}, or two names, of the observation and of the mask"
        raise ConfigError(f"mask_in_observation: expected None, {what}, got {names!r}")


@dataclass(frozen=True)
class EnvConfig(Scenario):
    """A scenario and how an agent meets it: the keyword arguments of ``gym.make("LLMSched-v0", ...)``."""

    action: str = "knobs"  # knobs, preset, priority, request
    action_repeat: int = 1  # batches that one knobs or priority action decides
    observation: Any = "features"  # features, slots, or an object with `space` and `observe(view)`
    mask_in_observation: str | tuple[str, str] | None = None  # rllib, torchrl, tianshou, or two names: of both parts
    reward: Any = "slo"  # slo, or a callable on a Transition
    reward_scale: float = 1.0  # constant factor on the reward
    credit: str = "early"  # pay utility as it is earned and lost, or at each request's finish
    tau_s: float = 120.0  # time constant of info["discount"]; inf: nothing is discounted
    token_budget: int = 512  # of a batch formed by priority or request actions
    episode_metrics: bool = False  # whether info holds the episode's figures at its end; records gaps between tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reward(self)
        self._check_integer("action_repeat", 1)
        self._check_integer("token_budget", 1)
        self._check_choice("action", tuple(ACTIONS))
        if self.async_lag and self.action == "request":
            raise ConfigError("async_lag: expected False with action='request', got True")
        if not hasattr(self.observation, "observe"):
            self._check_choice("observation", OBSERVATIONS)
        if self.action_repeat > ACTIONS[self.action]:
            most = f"{ACTIONS[self.action]} with action={self.action!r}"
            raise ConfigError(f"action_repeat: expected {most}, got {self.action_repeat}")
