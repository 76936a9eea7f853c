"""What an actor prefers before it has learnt anything, as weights of its layers: a rule, or full batches.

All is in the weights, so that a policy folder decides as the agent did, and nothing else knows of it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from llmsched_gym.agents.networks import normaliser_of
from llmsched_gym.config import ConfigError, EnvConfig
from llmsched_gym.env.actions import action_of
from llmsched_gym.env.actions.knobs import Knob, knobs_action, knobs_for
from llmsched_gym.env.actions.preset import preset_action
from llmsched_gym.env.actions.request import CLOSE
from llmsched_gym.env.features import features_of
from llmsched_gym.policies import LoadedPolicy
from llmsched_gym.policies.knob_rules import KnobScores
from llmsched_gym.policies.load import folder_knobs
from llmsched_gym.registry import make_scheduler
from llmsched_gym.scheduler import Compiled, PolicyError, pack_with_knobs, settings_of

NEVER = -1e4  # a score no other comes near to; not as low as what masks make of illegal actions
RULES = "a rule with fixed settings, such as tuned-constant or slai, or a linear one, such as tuned-linear"


class Layer(NamedTuple):
    """Scores of an action's entries, linear in features: what a softmax over each entry makes a rule of."""

    weight: np.ndarray  # (number of scores, number of inputs)
    bias: np.ndarray  # (number of scores,)
    columns: tuple[int, ...] = ()  # which features the inputs are


def start_from(policy: Any, world: EnvConfig, name: str, share: float) -> None:
    """Let the actor start from a rule: each entry of its actions has the rule's value with probability `share`.

    Learning begins beside the rule and can leave it: a residual on it, as in Silver et al. (2018), "Residual Policy
    Learning", here in the logits. Of a rule with fixed settings the rest is shared evenly, in biases of the last layer.

    A linear rule's score s says how far along a knob's ordered values x_0 = 0, ..., x_n = 1 to go. The softmax of
    -T n^2 (s - x)^2 is likeliest at the value next to s, and linear in s, as s^2 is the same for all: so a linear rule
    is a layer of scores, too, and values beside its own are likelier than those far away. T is such that a value that
    s is just at would have the probability `share` if there were only the two beside it: less where there are more,
    and more where s is beyond 0 or 1. The largest of its scores for orders wins, one of 1 above others of 0 by
    `share`. The rule's features pass through the hidden layers unchanged, as relu(x) - relu(-x), by two units each;
    what these give and take is learnt like everything else.

    To be called when the features' normalisation is known, and as often as one likes. ConfigError where there is no
    such rule, where its settings are none of the action's values, or where it does not fit through the network.
    """
    if not 0.0 < share < 1.0:
        raise ConfigError(f"prior_share: expected a number between 0 and 1, got {share:g}")
    layer = layer_of(name, world, share)
    bias = layer.bias
    with torch.no_grad():
        if layer.columns:
            normaliser, at = normaliser_of(policy), list(layer.columns)
            mean, scale = (part.numpy().astype(np.float64)[at] for part in (normaliser.mean, normaliser.scale))
            bias = bias + layer.weight @ mean
            _pass_through(policy, at)
            weight = torch.from_numpy(layer.weight / scale).float()
            if not (weight.isfinite().all() and torch.from_numpy(bias).float().isfinite().all()):
                raise ConfigError(f"prior: {name} has weights that are too large for float32")
            policy.action_net.weight.zero_()
            policy.action_net.weight[:, : 2 * len(at) : 2] = weight
            policy.action_net.weight[:, 1 : 2 * len(at) : 2] = -weight
        policy.action_net.bias.copy_(torch.from_numpy(bias))


def _pass_through(policy: Any, columns: list[int]) -> None:
    """Let the hidden layers hand on these features: units 0, 2, ... their positive parts, 1, 3, ... the negative."""
    modules, num = list(policy.mlp_extractor.policy_net), 2 * len(columns)
    layers = [module for module in modules if isinstance(module, nn.Linear)]
    if any(isinstance(module, nn.Tanh) for module in modules):
        raise ConfigError(
            "prior: a linear rule needs --activation relu, through which features pass unchanged; got tanh"
        )
    if narrow := [layer.out_features for layer in layers if layer.out_features < num]:
        raise ConfigError(f"prior: this linear rule needs hidden layers of at least {num}, got {narrow[0]}")
    for i, layer in enumerate(layers):
        layer.weight[:num], layer.bias[:num] = 0.0, 0.0
        if i == 0:
            layer.weight[torch.arange(0, num, 2), columns] = 1.0
            layer.weight[torch.arange(1, num, 2), columns] = -1.0
        else:
            layer.weight[:num, :num] = torch.eye(num)


def layer_of(name: str, world: EnvConfig, share: float) -> Layer:
    """A rule's scores of the world's actions; see :func:`start_from`."""
    rule = _rule(name)
    if isinstance(rule, LoadedPolicy) and rule.spec.architecture["kind"] == "linear":
        if world.action != "knobs":
            raise ConfigError(f"prior: expected --action knobs for the linear rule {name}, got {world.action}")
        return _linear(name, rule, world, share)
    scores = [
        _fixed(len(choice.labels), index, share)
        for choice, index in zip(action_of(world).choices(world), rule_action(name, world).tolist(), strict=True)
    ]
    return Layer(np.zeros((sum(map(len, scores)), 0)), np.concatenate(scores))


def _rule(name: str) -> Any:
    try:
        return make_scheduler(name)
    except PolicyError as error:
        raise ConfigError(f"prior: {error}") from None


def rule_action(name: str, world: EnvConfig) -> np.ndarray:
    """The action that does what a rule always does, int64 (entries,); its dynamic offset is that of little KV in use.

    ConfigError where the rule is no setting of the packing kernel, or no action of `world` does what it does.
    """
    if world.action not in ("knobs", "preset"):
        raise ConfigError(f"prior: expected --action knobs or preset, got {world.action}")
    rule = _rule(name)
    if not isinstance(rule, Compiled) or rule.function is not pack_with_knobs or rule.plan is not None:
        raise ConfigError(f"prior: expected {RULES}, got {name!r}")
    settings = settings_of(rule.knobs)
    try:
        action = preset_action(settings) if world.action == "preset" else knobs_action(settings, 0.0, world)
    except ValueError as error:
        raise ConfigError(f"prior: no {world.action} action does what {name} does: {error}") from None
    return np.atleast_1d(action)


def _fixed(num_values: int, index: int, share: float) -> np.ndarray:
    """Scores of an entry that has one value with probability `share`, all others alike."""
    scores = np.zeros(num_values)
    scores[index] = _lead(share, num_values - 1)
    return scores


def _lead(share: float, num_others: int) -> float:
    """How far a score is above others that are all alike if its value has the probability `share`."""
    return math.log(share / (1.0 - share) * num_others)


def _linear(name: str, rule: LoadedPolicy, world: EnvConfig, share: float) -> Layer:
    if share <= 1 / 3:  # of a value and the two beside it
        raise ConfigError(f"prior_share: expected more than 1/3 for a linear rule, got {share:g}")
    theirs, ours = KnobScores(folder_knobs(rule.spec)), KnobScores(knobs_for(world))
    table = np.column_stack([rule.tensors["bias"], rule.tensors["weight"]]).astype(np.float64)
    parts = np.split(table, np.cumsum(theirs.widths)[:-1])
    given = {knob.name: (_labels(knob), part) for knob, part in zip(theirs.knobs, parts, strict=True)}
    found = []
    for knob, ranks in zip(ours.knobs, ours.ranks, strict=True):
        labels = _labels(knob)
        rows = np.zeros((len(labels), table.shape[1]))  # of each value, its bias and its weights
        known, part = given.pop(knob.name, ((), table))
        if not known:  # off, as wherever the rule is used
            rows[:, 0] = _fixed(len(labels), 0, share)
        elif not set(known) <= set(labels) or (len(part) == 1 and len(known) < len(labels)):
            raise ConfigError(f"prior: {name} chooses from other values of {knob.name} than actions of this world do")
        elif len(part) > 1:
            for row, label in zip(rows, labels, strict=True):
                row[:] = part[known.index(label)] if label in known else part[0]
                row[0] -= label not in known  # behind the first, and so never chosen
            rows *= _lead(share, len(labels) - 1)
        else:
            num = len(labels) - 1
            places, steep = np.argsort(ranks) / num, _lead(share, 2) * num**2
            rows = 2.0 * steep * places[:, None] * part
            rows[:, 0] -= steep * places**2
        found.append(rows)
    if given:
        raise ConfigError(f"prior: {name} sets {', '.join(given)}, and actions of this world do not")
    names = [feature.name for feature in features_of(world)]
    seen = rule.spec.observation["features"]
    if absent := [feature for feature in seen if feature not in names]:
        raise ConfigError(f"prior: {name} looks at {absent[0]}, and observations of this world have no such feature")
    columns = tuple(names.index(feature) for feature in seen)
    stacked = np.concatenate(found)
    return Layer(stacked[:, 1:], stacked[:, 0], columns)


def _labels(knob: Knob) -> tuple[str, ...]:
    return tuple(knob.label(i) for i in range(len(knob.values)))


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
