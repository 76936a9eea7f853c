"""The labels of a folder in one: tables and config that a report reads as it reads those of `evaluate`."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from llmsched_gym.config import ConfigError
from llmsched_gym.evaluation.store import lock_folder, read_rows, write_rows
from llmsched_gym.files import dumps, replace_file, write_text

TABLES = ("requests", "itl")
SAME = ("scenario", "qps", "seeds", "first_seed")
"""What labels of a folder have in common, the model's name apart: the requests, what is expected of a server."""


def check_same(out: str | Path, label: str, config: dict[str, Any]) -> None:
    """One line of error if a label is to be kept in `out` that was asked for something else than the others."""
    for other, held in configs(out).items():
        if other == label:
            continue
        keys = [key for key in SAME if _asked(held).get(key) != _asked(config).get(key)]
        if keys == ["scenario"]:
            ours, theirs = (_asked(c)["scenario"] for c in (config, held))
            keys = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        if keys:
            what = f"its label {other!r} was measured with another {', '.join(keys)}"
            raise ConfigError(f"out: {out} is of another comparison: {what}; choose another folder")


def configs(out: str | Path) -> dict[str, dict[str, Any]]:
    """Configurations of all labels begun in `out`, by label."""
    found = {}
    for path in sorted(Path(out).glob("servers/*/config.json")):
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ConfigError(f"out: cannot read {path}") from None
        found[path.parent.name] = held
    return found


def join(out: str | Path) -> list[dict[str, Any]]:
    """Put the tables of all complete labels into `out`; their rows. Labels keep the order in which they came."""
    import pandas as pd

    folder = Path(out)
    lock = lock_folder(folder)
    try:
        known = configs(folder)
        complete = [label for label in known if (folder / "servers" / label / "runs.parquet").is_file()]
        complete.sort(key=lambda label: (folder / "servers" / label / "config.json").stat().st_ctime_ns)
        parts = [folder / "servers" / label for label in complete]
        for name in TABLES:
            frames = [pd.read_parquet(part / f"{name}.parquet") for part in parts]
            whole = pd.concat(frames, ignore_index=True)
            whole["policy"] = whole["policy"].astype("category" if name == "requests" else "object")
            replace_file(folder / f"{name}.parquet", partial(whole.to_parquet, index=False))
        rows = [row for part in parts for row in read_rows(part)]
        replace_file(folder / "runs.parquet", partial(write_rows, rows))
        config = dict(known[complete[0]])
        config["policies"] = complete
        config["setup"] = "; ".join(str(known[label].get("setup", label)) for label in complete)
        config["scenario"] = _asked(config)["scenario"]
        config["command"] = f"llmsched serve-bench, once for each label: {', '.join(complete)}"
        write_text(folder / "config.json", dumps(config))
    except OSError as error:
        raise ConfigError(f"out: cannot write to {folder}: {error.strerror or error}") from None
    finally:
        if lock is not None:
            os.close(lock)
    return rows


def _asked(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without the model's name, which may differ between servers of one model."""
    return {**config, "scenario": {k: v for k, v in (config.get("scenario") or {}).items() if k != "model"}}
