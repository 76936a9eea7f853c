"""One label of a folder: its place, its configuration, and how a run is kept there."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import llmsched_gym
from llmsched_gym import sources
from llmsched_gym.config import ConfigError, Scenario
from llmsched_gym.evaluation.cells import Cell, write_part
from llmsched_gym.evaluation.store import Store
from llmsched_gym.files import digest_of, encode
from llmsched_gym.serving.episode import episode_of, frames_of, row_of
from llmsched_gym.serving.load import Run

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
BACKEND = "server"


def check_label(label: str) -> str:
    """A label that can name a folder; one line of error for another."""
    if not LABEL.fullmatch(label):
        raise ConfigError(
            f"label: expected letters, digits and . _ + = -, beginning with one of the first, got {label!r}"
        )
    return label


def label_folder(out: str | Path, label: str) -> Path:
    """Where the results of one label lie."""
    return Path(out) / "servers" / label


def config_of(scenario: Scenario, label: str, model: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What the results of a label depend on, in the form of `evaluate`'s."""
    return {
        "scenario": encode(scenario.to_dict() | {"backend": BACKEND, "model": model}),
        "policies": [label],
        **settings,
        "fluid": None,
        "version": llmsched_gym.__version__,
        "code": sources.digest(["llmsched_gym.serving", "llmsched_gym.evaluation.metrics"]),
        "python": platform.python_version(),
        "packages": {"numpy": metadata.version("numpy")},
    }


def keep(store: Store, cell: Cell, run: Run, scenario: Scenario, model: str | None) -> dict[str, Any]:
    """Put a run into the store; its row."""
    episode = episode_of(run, scenario, cell.policy, cell.seed)
    figures = row_of(episode, run, model) | {"config_hash": digest_of(store.config["scenario"])}
    frames = frames_of(episode, run)
    frames["itl"] = frames["itl"].assign(
        policy=cell.policy, qps=figures["qps"], requested_qps=cell.qps or np.nan, seed=cell.seed
    )
    for kind in cell.frames:
        if kind in frames:
            write_part(store.partial, kind, cell.index, frames[kind])
    store.add(cell.index, figures)
    return figures
