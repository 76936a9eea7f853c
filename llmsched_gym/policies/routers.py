"""Folders of trained routers: one network that scores every replica, in numpy, for any number of replicas.

The two files are those of a policy folder; ``policy.json`` has these fields::

    format          "llmsched-router/1"
    architecture    {"kind": "replica-mlp", "layers": number of hidden layers, "activation": "tanh" | "relu"}
    observation     {"kind": "replicas", "request": [name, ...], "replicas": [name, ...]}
    training        what it was trained on and how it did; for people
    tensors_sha256  of policy.safetensors

The network sees, for each replica, the request's entries, the replica's row, and how far that row is from the mean of
those that may take the request. The request goes to the highest score.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_gym.config import route_config
from llmsched_gym.env.route.features import REPLICA_FEATURES, REQUEST_FEATURES
from llmsched_gym.env.route.policy import PolicyRouter
from llmsched_gym.policies.folder import SPEC, TENSORS, check_names, read_fields, read_tensors, require, write_files
from llmsched_gym.policies.networks import BadTensors, Mlp
from llmsched_gym.scheduler import PolicyError

FORMAT = "llmsched-router/1"
KIND = "replica-mlp"
_NAMES = {"request": [f.name for f in REQUEST_FEATURES], "replicas": [f.name for f in REPLICA_FEATURES]}


def _all_seen() -> dict[str, Any]:
    return {"kind": "replicas", **_NAMES}


@dataclass(frozen=True)
class RouterSpec:
    """The contents of a router's ``policy.json``."""

    architecture: Mapping[str, Any]
    observation: Mapping[str, Any] = field(default_factory=_all_seen)
    training: Mapping[str, Any] = field(default_factory=dict)


class ReplicaScores:
    """The policy: a score for each replica from the observation "replicas", and the highest legal one."""

    def __init__(self, spec: RouterSpec, tensors: Mapping[str, np.ndarray]) -> None:
        seen = spec.observation
        self.request = np.array([_NAMES["request"].index(name) for name in seen["request"]])
        self.row = np.array([_NAMES["replicas"].index(name) for name in seen["replicas"]])
        self.mlp = Mlp(spec.architecture, tensors, len(self.request) + 2 * len(self.row), 1)

    def scores(self, observation: Mapping[str, np.ndarray], mask: np.ndarray) -> np.ndarray:
        """Float32 (num_replicas,); `mask` says who may take the request."""
        rows = observation["replicas"][:, self.row]
        request = np.broadcast_to(observation["request"][self.request], (len(rows), len(self.request)))
        typical = rows[mask].mean(0) if mask.any() else rows.mean(0)
        found: np.ndarray = self.mlp(np.concatenate([request, rows, rows - typical], axis=1))[:, 0]
        return found

    def __call__(self, observation: Mapping[str, np.ndarray], mask: np.ndarray) -> int:
        return int(np.where(mask, self.scores(observation, mask), -np.inf).argmax())


class LoadedRouter(PolicyRouter):
    """A folder of a trained router as a router.

    Args:
        spec, tensors: of the folder.
        name: for reports.
    """

    def __init__(self, spec: RouterSpec, tensors: Mapping[str, np.ndarray], name: str = "") -> None:
        super().__init__(ReplicaScores(spec, tensors), route_config(observation="replicas"))
        self.spec, self.name = spec, name or type(self).__name__
        self.what: str = f"a learned router ({spec.architecture['kind']})"


def write_router(folder: str | Path, spec: RouterSpec, tensors: Mapping[str, np.ndarray]) -> Path:
    """Write a router's folder; one that is there is replaced as a whole."""
    return write_files(folder, {"format": FORMAT, **vars(spec)}, tensors)


def read_router(folder: str | Path) -> tuple[RouterSpec, dict[str, np.ndarray]]:
    """Spec and tensors of a router's folder, checked; a fault raises one line that names the file and the field."""
    where, raw = f"policy {str(folder)!r}: {SPEC}", read_fields(folder)
    require(where, isinstance(raw, dict), "(file)", "an object", raw)
    require(where, raw.get("format") == FORMAT, "format", repr(FORMAT), raw.get("format"))
    for name in ("architecture", "observation", "training"):
        require(where, isinstance(raw.get(name), dict), name, "an object", raw.get(name))
    require(where, isinstance(raw.get("tensors_sha256"), str), "tensors_sha256", "a digest", raw.get("tensors_sha256"))
    kind, seen = raw["architecture"].get("kind"), raw["observation"]
    require(where, kind == KIND, "architecture.kind", repr(KIND), kind)
    require(where, seen.get("kind") == "replicas", "observation.kind", "'replicas'", seen.get("kind"))
    for name, known in _NAMES.items():
        check_names(where, f"observation.{name}", seen.get(name), known)
    return RouterSpec(raw["architecture"], seen, raw["training"]), read_tensors(folder, raw["tensors_sha256"])


def load_router(path: str | Path, **options: Any) -> LoadedRouter:
    """The router in a folder. Nothing in it is executed; a fault, or any option, raises a one-line PolicyError."""
    if options:
        raise PolicyError(f"router {str(path)!r}: unknown parameter {next(iter(options))!r}, it has none")
    spec, tensors = read_router(path)
    try:
        return LoadedRouter(spec, tensors, str(path))
    except BadTensors as error:
        source = SPEC if str(error).startswith("architecture.") else TENSORS
        raise PolicyError(f"policy {str(path)!r}: {source}: {error}") from None
