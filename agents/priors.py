"""What an actor prefers before it has learnt anything, as biases of its last layer: a rule, or full batches.

Both are in the weights, so that a policy folder decides as the agent did, and nothing else knows of them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from llmsched_gym.config import ConfigError, EnvConfig
from llmsched_gym.env.actions import action_of
from llmsched_gym.env.actions.knobs import knobs_action
from llmsched_gym.env.actions.preset import preset_action
from llmsched_gym.env.actions.request import CLOSE
from llmsched_gym.registry import make_scheduler
from llmsched_gym.scheduler import Compiled, pack_with_knobs, settings_of

NEVER = -1e4  # a score no other comes near to; not as low as what masks make of illegal actions


def rule_action(name: str, world: EnvConfig) -> np.ndarray:
    """The action that does what a rule always does, int64 (entries,); its dynamic offset is that of little KV in use.

    ConfigError where the rule is no setting of the packing kernel, or no action of `world` does what it does.
    """
    if world.action not in ("knobs", "preset"):
        raise ConfigError(f"prior: expected --action knobs or preset, got {world.action}")
    rule = make_scheduler(name)
    if not isinstance(rule, Compiled) or rule.function is not pack_with_knobs or rule.plan is not None:
        raise ConfigError(f"prior: expected a rule with fixed settings, such as tuned-constant or slai, got {name!r}")
    settings = settings_of(rule.knobs)
    try:
        action = preset_action(settings) if world.action == "preset" else knobs_action(settings, 0.0, world)
    except ValueError as error:
        raise ConfigError(f"prior: no {world.action} action does what {name} does: {error}") from None
    return np.atleast_1d(action)


def prefer(policy: Any, world: EnvConfig, name: str, share: float) -> None:
    """Let the actor start from a rule: each entry of its actions has the rule's value with probability `share`.

    The rest is shared evenly, so that learning begins beside the rule and can leave it: a residual on it, as in Silver
    et al. (2018), "Residual Policy Learning", here in the logits.
    """
    action, first = rule_action(name, world), 0
    if not 0.0 < share < 1.0:
        raise ConfigError(f"--prior-share: expected a number between 0 and 1, got {share:g}")
    with torch.no_grad():
        for choice, index in zip(action_of(world).choices(world), action.tolist(), strict=True):
            num_others = len(choice.labels) - 1
            policy.action_net.bias[first + index] += math.log(share / (1.0 - share) * num_others)
            first += len(choice.labels)


def close_last(policy: Any, world: EnvConfig) -> None:
    """Let a batch end only when nothing more can be added to it: the mask of a work-conserving scheduler.

    As in Che, Dong and Namkoong (2024), "Differentiable Discrete Event Simulation for Queuing Network Control", whose
    policies put no mass on empty queues. The score for closing is a constant below all others, so that among legal
    actions its probability is 0 wherever there is another, and 1 where there is none: its gradient is 0 then, and it
    stays what it is. What remains to decide is who goes first while tokens, sequences and memory last. It rules out
    what leaves work aside on purpose: decodes that wait for their deadlines (SLAI), batches made short by a cap.

    Knobs and presets have no such mask: the packing kernel fills batches itself, and what holds back is their point.
    """
    if world.action != "request":
        raise ConfigError(f"work_conserving: expected --action request, got {world.action}")
    with torch.no_grad():
        policy.action_net.weight[CLOSE] = 0.0
        policy.action_net.bias[CLOSE] = NEVER
