"""Workloads of sessions by name, and mixtures: sessions of several models, each with its share.

A mixture's session k has row k of the uniforms as a model's has; the spare draw says which part it is of.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_gym.config import ConfigError
from llmsched_gym.files import version_of
from llmsched_gym.workload.lengths import WORKLOADS, has_sessions, is_mixture, read_workload
from llmsched_gym.workload.sessions import SPARE, SessionModel, Sessions, join, parse_sessions


@dataclass(frozen=True, eq=False)
class Mixture:
    """Sessions of several models; their system prompts are apart."""

    name: str
    source: str
    parts: tuple[SessionModel, ...]
    bounds: np.ndarray  # (num_parts,) cumulated shares of sessions, the last one 1

    @property
    def draws(self) -> int:
        """Uniforms of a session, as many as the part with the most turns needs."""
        return max(part.draws for part in self.parts)

    def part_of(self, uniforms: np.ndarray) -> np.ndarray:
        """Which part each session is of, int64 (n,), from uniforms of shape (n, `draws`)."""
        return np.searchsorted(self.bounds[:-1], uniforms[:, SPARE], "right")

    def sessions(self, uniforms: np.ndarray, max_model_len: int) -> Sessions:
        """Sessions from uniforms in [0, 1) of shape (n, `draws`); ConfigError as a part's."""
        of = self.part_of(uniforms)
        drawn, first_id = [], 0
        for i, part in enumerate(self.parts):
            own = part.sessions(uniforms[of == i, : part.draws], max_model_len)
            own.prefix_id[own.prefix_id >= 0] += first_id
            first_id += len(part.system_tokens)
            drawn.append(own)
        # the joined sessions are sorted by part, each part's in their order
        place = np.empty(len(of), np.int64)
        place[np.argsort(of, kind="stable")] = np.arange(len(of))
        return join(drawn).select(place)


def load_sessions(workload: str) -> SessionModel | Mixture | None:
    """The sessions of a workload by name or file, cached until a file changes; None if it has none.

    Raises :class:`ConfigError`, one line that names the file and the field.
    """
    data, path = read_workload(workload)
    if not has_sessions(data):
        return None
    if not is_mixture(data):
        return _model(path, *version_of(path))
    names, shares = _parts(data, str(path))
    models = []
    for name in names:
        part_data, part_path = read_workload(_beside(path, name))
        if not has_sessions(part_data) or is_mixture(part_data):
            raise ConfigError(f"{path}: parts: expected workloads of sessions, got {name!r}")
        models.append(_model(part_path, *version_of(part_path)))
    return _mixture(path, *version_of(path), tuple(models), shares)


def workload_files(workload: str) -> tuple[Path, ...]:
    """The files that a workload of a user depends on, its own and its parts'; none for a shipped one."""
    if workload in WORKLOADS:
        return ()
    data, path = read_workload(workload)
    names = _parts(data, str(path))[0] if has_sessions(data) and is_mixture(data) else ()
    return path, *(Path(_beside(path, name)) for name in names if name not in WORKLOADS)


def _beside(path: Path, part: str) -> str:
    """A part's name, or its file, which lies beside the mixture's unless its path is absolute."""
    return part if part in WORKLOADS or not part.endswith(".json") else str(path.parent / part)


@functools.lru_cache(maxsize=16)
def _model(path: Path, absolute: Path, version: tuple[int, ...]) -> SessionModel:
    return parse_sessions(read_workload(str(path))[0], str(path))


@functools.lru_cache(maxsize=16)
def _mixture(
    path: Path,
    absolute: Path,
    version: tuple[int, ...],
    models: tuple[SessionModel, ...],
    shares: tuple[float, ...],
) -> Mixture:
    data = read_workload(str(path))[0]
    return Mixture(str(data["name"]), str(data["source"]), models, np.cumsum(shares))


def _parts(data: dict[str, Any], where: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Names and shares of a mixture's parts; ConfigError naming `where` and the field."""
    for field in ("name", "source", "parts"):
        if field not in data:
            raise ConfigError(f"{where}: missing field {field!r}")
    parts = data["parts"]
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise ConfigError(f"{where}: parts: expected a list of objects with workload and share")
    names, shares = [], []
    for part in parts:
        name, share = part.get("workload"), part.get("share")
        if not isinstance(name, str):
            raise ConfigError(f"{where}: parts: expected the name of a workload, got {name!r}")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 < share <= 1.0:
            raise ConfigError(f"{where}: parts: expected a share above 0, at most 1, got {share!r} for {name!r}")
        if name in names:
            raise ConfigError(f"{where}: parts: expected each workload once, got {name!r} twice")
        names.append(name)
        shares.append(float(share))
    if abs(sum(shares) - 1.0) > 1e-9:
        raise ConfigError(f"{where}: parts: expected shares that sum to 1, got {sum(shares):.6g}")
    return tuple(names), tuple(shares)
