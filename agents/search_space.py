"""What a search varies: ranges of the settings of a training, and the values that Optuna draws from them."""

from __future__ import annotations

import argparse
import re
import typing
from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from llmsched_gym.agents.options import check_numbers, integers, whole
from llmsched_gym.agents.train import Config
from llmsched_gym.config import ACTIONS, ConfigError

RANGES = {
    "learning_rate": "log:1e-4..3e-3",
    "n_steps": "32/64/128",
    "batch_size": "512/1024/2048/4096",
    "epochs": "2..10",
    "tau_s": "log:30..480",
    "gamma": "0.98..0.9995",
    "gae_lambda": "0.9..0.99",
    "entropy": "log:1e-4..3e-2",
    "clip": "0.1..0.3",
    "action_repeat": "4/8/16/32",
    "hidden": "32,32/64,64/128,128",
    "activation": "tanh/relu",
    "width": "16/32/64",
    "layers": "0..2",
    "heads": "1/2/4",
}
"""The settings that can be searched, each with its range unless another is given."""

_LEARNER = ("learning_rate", "n_steps", "batch_size", "epochs", "gae_lambda", "entropy", "clip")
_NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_HINTS = typing.get_type_hints(Config)
_CHOICES = {name: Config.__dataclass_fields__[name].metadata.get("choices") for name in RANGES}


def default_names(config: Config) -> list[str]:
    """What is searched unless it is said: the learner, the discount in use, the rhythm of decisions, the network.

    The network of a warm start stays as it is.
    """
    names = [*_LEARNER, "tau_s" if config.discount == "second" else "gamma"]
    if ACTIONS[config.action] > 1:
        names.append("action_repeat")
    if not config.warm_start:
        names += ["hidden"] if config.observation == "features" else ["width", "layers"]
    return names


def space_of(config: Config, given: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """Distributions by setting: of `given`, texts such as ``log:1e-4..1e-2``, ``32/64/128`` or ``default``, if any.

    Raises :class:`ConfigError` for what is no setting, no range, or no value of such a setting.
    """
    texts = dict(given) or dict.fromkeys(default_names(config), "default")
    for name in texts:
        if name not in RANGES:
            raise ConfigError(f"space: expected one of {', '.join(RANGES)}, got {name!r}")
    return {name: _distribution(name, RANGES[name] if t == "default" else str(t)) for name, t in texts.items()}


def read(name: str, value: Any) -> Any:
    """The setting's value of what Optuna drew."""
    return integers(value) if _is_tuple(name) else value


def given_values(config: Config, space: Mapping[str, BaseDistribution]) -> dict[str, Any] | None:
    """The settings of `config` as Optuna would draw them; None where one lies outside its range."""
    found = {}
    for name, distribution in space.items():
        value = getattr(config, name)
        value = ",".join(map(str, value)) if _is_tuple(name) else value
        if isinstance(distribution, CategoricalDistribution):
            if value not in distribution.choices:
                return None
        elif not distribution.low <= value <= distribution.high:
            return None
        found[name] = value
    return found


def _is_tuple(name: str) -> bool:
    return _HINTS[name] == tuple[int, ...]


def _distribution(name: str, text: str) -> BaseDistribution:
    bounds = re.fullmatch(rf"(log:)?({_NUMBER})\.\.({_NUMBER})", text)
    if bounds is not None and _HINTS[name] in (int, float):
        log, (low, high) = bool(bounds[1]), (_value(name, bounds[i], text) for i in (2, 3))
        if not low < high:
            raise ConfigError(f"space: {name}: expected a lower and a higher number, got {text!r}")
        if log and not low > 0:
            raise ConfigError(f"space: {name}: a range in logarithms begins above 0, got {text!r}")
        return (IntDistribution if _HINTS[name] is int else FloatDistribution)(low, high, log=log)
    choices = [_value(name, part, text) for part in text.split("/")]
    if len(set(choices)) < 2 or len(set(choices)) < len(choices):
        raise ConfigError(f"space: {name}: expected two or more different values, got {text!r}")
    return CategoricalDistribution([",".join(map(str, c)) if _is_tuple(name) else c for c in choices])


def _value(name: str, text: str, whole_text: str) -> Any:
    hint, allowed = _HINTS[name], _CHOICES[name]
    value: Any
    try:
        value = integers(text) if _is_tuple(name) else (whole if hint is int else hint)(text)
    except (ValueError, argparse.ArgumentTypeError):
        forms = "A/B/..." if hint not in (int, float) else "LOW..HIGH, log:LOW..HIGH or A/B/..."
        raise ConfigError(f"space: {name}: expected {forms} of its values, got {whole_text!r}") from None
    if (allowed and value not in allowed) or (_is_tuple(name) and not (value and min(value) > 0)):
        what = f"of {', '.join(allowed)}" if allowed else "widths such as 64,64"
        raise ConfigError(f"space: {name}: expected values {what}, got {text!r}")
    try:
        check_numbers(Config, {name: value})
    except ConfigError as error:
        raise ConfigError(f"space: {error}") from None
    return value
