"""The policy folder: ``policy.safetensors`` (numbers) and ``policy.json`` (what they mean). Neither can hold code.

``policy.json`` has these fields::

    format          "llmsched-policy/1"
    architecture    {"kind": "mlp" | "rows" | "linear" | "constant", ...settings of the network}
    action          {"kind", "repeat", "token_budget", "admission", "allow_refusal", "knobs": {name: [value, ...]}};
                    the last under the name of the kind, where its entries have names
    observation     {"kind", "features": [name, ...], "slots": [name, ...]}; a feature that the profile lacks is 0
    decision_s      seconds that one decision takes, measured at export
    training        what it was trained on and how it did; for people
    tensors_sha256  of policy.safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from llmsched_gym.config import ADMISSIONS, EnvConfig, plain
from llmsched_gym.engine.pack import LPM, ORDERS
from llmsched_gym.env.actions import ACTIONS, action_of
from llmsched_gym.env.features import ALL_FEATURES, WIDTHS, features_of
from llmsched_gym.env.slots import ALL_SLOT_FEATURES, NUM_SLOT_FEATURES, slot_features_of
from llmsched_gym.files import parse
from llmsched_gym.scheduler import PolicyError

FORMAT = "llmsched-policy/1"
TENSORS, SPEC = "policy.safetensors", "policy.json"
KINDS = ("mlp", "rows", "linear", "constant")
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class PolicySpec:
    """The contents of ``policy.json``."""

    architecture: Mapping[str, Any]
    action: Mapping[str, Any]
    observation: Mapping[str, Any]
    decision_s: float = 0.0
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> EnvConfig:
        """What of an environment's configuration the policy depends on."""
        return EnvConfig(
            action=self.action["kind"],
            action_repeat=self.action["repeat"],
            token_budget=self.action["token_budget"],
            admission=self.action["admission"],
            allow_refusal=self.action["allow_refusal"],
            prefix_caching=_knows_order(self.action, ORDERS[LPM]),
            observation=self.observation["kind"],
        )


def _knows_order(action: Mapping[str, Any], name: str) -> bool:
    """Whether the knobs that a policy sets include this order of prompts."""
    knobs = action.get("knobs")
    order = knobs.get("order") if isinstance(knobs, dict) else None
    return isinstance(order, list | tuple) and name in order


def spec_for(
    config: EnvConfig, architecture: Mapping[str, Any], num_features: int | None = None, **fields: Any
) -> PolicySpec:
    """The spec of a policy made for environments of `config`, as this version names features and knob values.

    It sees the first `num_features`; None: those of the configuration's profile.
    """
    seen = features_of(config, num_features)
    action: dict[str, Any] = {
        "kind": config.action,
        "repeat": config.action_repeat,
        "token_budget": config.token_budget,
        "admission": config.admission,
        "allow_refusal": config.allow_refusal,
    }
    if choices := action_of(config).choices(config):
        action[config.action] = {choice.name: list(choice.labels) for choice in choices}
    observation: dict[str, Any] = {"kind": config.observation, "features": [f.name for f in seen]}
    if config.observation == "slots":
        observation["slots"] = [f.name for f in slot_features_of(config, num_features)]
    return PolicySpec(architecture, action, observation, **fields)


def width_of(observation: Mapping[str, Any]) -> int:
    """The fewest features with which an environment shows all that a policy's `observation` names."""
    names = [f.name for f in ALL_FEATURES]
    last = max(names.index(name) for name in observation["features"])
    slots = [f.name for f in ALL_SLOT_FEATURES]
    if any(slots.index(name) >= NUM_SLOT_FEATURES for name in observation.get("slots", ())):
        return WIDTHS[-1]
    return next(width for width in WIDTHS if last < width)


def write_folder(folder: str | Path, spec: PolicySpec, tensors: Mapping[str, np.ndarray]) -> Path:
    """Write a policy folder; one that is there is replaced as a whole."""
    return write_files(folder, {"format": FORMAT, **vars(spec)}, tensors)


def _check_replaced(folder: Path) -> None:
    """Refuse to replace what is no policy folder, or holds more than one does."""
    if folder.is_dir():
        held = sorted(path.name for path in folder.iterdir())
        if not held or (SPEC in held and set(held) <= {SPEC, TENSORS}):
            return
        what = next((name for name in held if name not in (SPEC, TENSORS)), held[0])
        raise PolicyError(f"out: {folder} holds {what}, and would be replaced as a whole; choose another folder")
    if folder.exists():
        raise PolicyError(f"out: expected a folder, got the file {folder}")


def write_files(folder: str | Path, fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    """Write the two files of a folder, with the digest of the tensors; what was there is replaced as a whole."""
    folder = Path(folder)
    _check_replaced(folder)
    data = save({name: np.ascontiguousarray(array) for name, array in tensors.items()})
    text = {**fields, "tensors_sha256": hashlib.sha256(data).hexdigest()}
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / TENSORS).write_bytes(data)
    (partial / SPEC).write_text(json.dumps(text, indent=2, allow_nan=False, default=plain) + "\n")
    if folder.exists():
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old)
    else:
        os.replace(partial, folder)
    return folder


def read_folder(folder: str | Path) -> tuple[PolicySpec, dict[str, np.ndarray]]:
    """Spec and tensors of a policy folder, checked; a fault raises one line that names the file and the field."""
    raw = read_fields(folder)
    spec = _check(f"policy {str(folder)!r}: {SPEC}", raw)
    return spec, read_tensors(folder, raw["tensors_sha256"])


def read_fields(folder: str | Path) -> Any:
    """What a folder's policy.json holds, unchecked."""
    folder = Path(folder)
    data = _read(folder, SPEC)
    try:
        return parse(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"policy {str(folder)!r}: {SPEC}: not JSON: {str(error).splitlines()[0]}") from None


def read_tensors(folder: str | Path, digest: str) -> dict[str, np.ndarray]:
    """A folder's tensors, all finite numbers, if they are those that policy.json tells the digest of."""
    folder = Path(folder)
    data = _read(folder, TENSORS)
    where = f"policy {str(folder)!r}: {TENSORS}"
    if hashlib.sha256(data).hexdigest() != digest:
        raise PolicyError(f"{where}: damaged or of another policy: its digest is not {SPEC}'s tensors_sha256")
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise PolicyError(f"{where}: not a safetensors file: {str(error).splitlines()[0]}") from None
    for name, array in tensors.items():
        if array.dtype.kind not in "fi" or not np.isfinite(array).all():
            raise PolicyError(f"{where}: {name}: expected finite numbers")
    return tensors


def _read(folder: Path, name: str) -> bytes:
    path = folder / name
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PolicyError(f"policy {str(folder)!r}: {name}: expected at most {MAX_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise PolicyError(f"policy {str(folder)!r}: {name}: cannot be read: {error.strerror}") from None


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _check(where: str, raw: Any) -> PolicySpec:
    """The spec, if every field is there, of its kind, and understood by this version."""

    def need(ok: bool, name: str, expected: str, got: Any) -> None:
        require(where, ok, name, expected, got)

    need(isinstance(raw, dict), "(file)", "an object", raw)
    need(raw.get("format") == FORMAT, "format", repr(FORMAT), raw.get("format"))
    for name in ("architecture", "action", "observation", "training"):
        need(isinstance(raw.get(name), dict), name, "an object", raw.get(name))
    need(isinstance(raw.get("tensors_sha256"), str), "tensors_sha256", "a digest", raw.get("tensors_sha256"))
    decision_s = raw.get("decision_s")
    number = isinstance(decision_s, int | float) and not isinstance(decision_s, bool)
    need(
        number and math.isfinite(decision_s) and 0 <= decision_s < 10, "decision_s", "seconds from 0 to 10", decision_s
    )
    kind = raw["architecture"].get("kind")
    need(kind in KINDS, "architecture.kind", f"one of {', '.join(KINDS)}", kind)

    action, observation = raw["action"], raw["observation"]
    actions = tuple(ACTIONS) if kind in ("mlp", "rows") else ("knobs",)
    need(action.get("kind") in actions, "action.kind", f"one of {', '.join(actions)}", action.get("kind"))
    for name in ("repeat", "token_budget"):
        value = action.get(name)
        ok = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1 << 20
        need(ok, f"action.{name}", "a whole number >= 1", value)
    need(action.get("admission") in ADMISSIONS, "action.admission", f"one of {', '.join(ADMISSIONS)}", action)
    need(isinstance(action.get("allow_refusal"), bool), "action.allow_refusal", "true or false", action)
    wanted = "slots" if kind == "rows" else "features"
    need(observation.get("kind") == wanted, "observation.kind", repr(wanted), observation.get("kind"))
    spec = PolicySpec(raw["architecture"], action, observation, float(decision_s), raw["training"])
    try:
        config = spec.config
    except ValueError as error:
        raise PolicyError(f"{where}: action: {error}") from None

    names = {"features": [f.name for f in ALL_FEATURES]}
    if wanted == "slots":
        names["slots"] = [f.name for f in ALL_SLOT_FEATURES]
    for name, known in names.items():
        check_names(where, f"observation.{name}", observation.get(name), known)
    if choices := action_of(config).choices(config):
        name, wanted_names = f"action.{config.action}", [choice.name for choice in choices]
        listed = action.get(config.action)
        need(isinstance(listed, dict), name, "an object", listed)
        need(list(listed) == wanted_names, name, ", ".join(wanted_names), list(listed))
        for choice in choices:
            check_names(where, f"{name}.{choice.name}", listed[choice.name], list(choice.labels))
    return spec


def require(where: str, ok: bool, name: str, expected: str, got: Any) -> None:
    """PolicyError with one line that names the field, unless `ok`."""
    if not ok:
        raise PolicyError(f"{where}: {name}: expected {expected}, got {_short(got)}")


def check_names(where: str, field_name: str, names: Any, known: list[str]) -> None:
    """PolicyError with one line unless `names` is a list of names that this version knows."""
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise PolicyError(f"{where}: {field_name}: expected a list of names, got {_short(names)}")
    for name in names:
        if name not in known:
            raise PolicyError(f"{where}: {field_name}: this version has no {_short(name)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
