"""Several folders of results as one, whose report compares them."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from llmsched_gym.files import dumps, make_folder, replace_file, write_text
from llmsched_gym.report import statistics
from llmsched_gym.report.results import read_results
from llmsched_gym.report.statistics import ReportError


def combine(folders: Sequence[Path], out: Path) -> None:
    """Put the results of `folders` together into `out`, which a report can be written of.

    A policy that several have is called ``policy (folder)``. ConfigError of one line for what cannot be compared.
    """
    labels = _labels(folders)
    parts = [read_results(folder) for folder in folders]
    held = Counter(policy for part in parts for policy in dict.fromkeys(part.rows["policy"].astype(str)))

    def renamed(policy: str, label: str) -> str:
        return f"{policy} ({label})" if held[policy] > 1 else policy

    units = {statistics.load_unit(part.rows) for part in parts}
    if len(units) > 1:
        raise ReportError("report: expected folders whose loads are all of requests, or all of sessions")
    _claim(out)
    make_folder(out)
    for name in ("requests", "itl", "steps", "runs"):
        found = []
        for folder, label in zip(folders, labels, strict=True):
            if (folder / f"{name}.parquet").is_file():
                frame = pd.read_parquet(folder / f"{name}.parquet")
                found.append(frame.assign(policy=[renamed(str(p), label) for p in frame["policy"]]))
        if found:
            replace_file(out / f"{name}.parquet", pd.concat(found, ignore_index=True).to_parquet)
    lives = [
        life | {"policy": renamed(life["policy"], label)}
        for part, label in zip(parts, labels, strict=True)
        for life in part.lives
    ]
    write_text(out / "lives.json", dumps({"lives": lives}))
    write_text(out / "config.json", dumps(_config([part.config for part in parts], folders, labels, out)))


def _claim(out: Path) -> None:
    """Results that were not put together here are not written over."""
    config = out / "config.json"
    if config.is_file() and "compared" not in json.loads(config.read_text(encoding="utf-8")):
        raise ReportError(f"out: {out} holds results of its own; choose another folder for the comparison")


def _labels(folders: Sequence[Path]) -> list[str]:
    """What each folder is called: its name, with its parent's where names are equal."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ReportError("report: expected different folders, got one twice")
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [f"{path.parent.name}/{path.name}" for path in paths]


def _config(
    configs: Sequence[dict[str, Any]], folders: Sequence[Path], labels: Sequence[str], out: Path
) -> dict[str, Any]:
    """What the folders have in common of their scenarios, and what they differ in."""
    worlds = [config.get("scenario") or {} for config in configs]
    keys = [key for key in dict.fromkeys(k for world in worlds for k in world) if key != "qps"]
    same = {key: worlds[0].get(key) for key in keys if all(world.get(key) == worlds[0].get(key) for world in worlds)}
    apart = {key: [world.get(key) for world in worlds] for key in keys if key not in same}
    told = [f"{key}: {_each(found, labels)}" for key, found in apart.items()]
    fluids = [config.get("fluid") for config in configs]
    paths = [*map(str, folders), "--out", out.resolve().name]
    return {
        "scenario": same,
        "policies": [],
        "compared": {"folders": list(labels), "differences": told},
        "command": shlex.join(["llmsched", "report", *paths]),
        **({"fluid": fluids[0]} if fluids[0] and all(fluid == fluids[0] for fluid in fluids) else {}),
    }


def _each(found: Sequence[Any], labels: Sequence[str]) -> str:
    words = [value if isinstance(value, str) else json.dumps(value) for value in found]
    return ", ".join(f"{word} in {label}" for word, label in zip(words, labels, strict=True))
