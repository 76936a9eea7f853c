"""The folder of a run: its settings in config.json, written once, read again to go on after an interruption."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from llmsched_gym.agents.options import check_values
from llmsched_gym.config import CLUSTER_SUITES, SUITES, ConfigError, find_suite, plain
from llmsched_gym.files import check_place, claim_folder, digest_of, make_folder, write_text

Settings = TypeVar("Settings")
"""A frozen dataclass with `out`, the folder, and, if such runs can go on, `resume`."""

_NOT_KEPT = ("out", "resume", "workers", "ray", "ray_address", "max_s")  # where and how long, not what a run is
_CONTENT = "suite_content"  # of config.json: digest of a suite that lies in a file


def settings_of(config: Any) -> dict[str, Any]:
    """What config.json holds: settings but where the run lies, what runs it, whether it goes on; suites by content."""
    kept = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_KEPT}
    suite = kept.get("suite")
    if suite is None or suite in (*SUITES, *CLUSTER_SUITES):
        return kept
    return kept | {_CONTENT: digest_of(find_suite(suite).scenario.to_dict())}


def open_run(config: Settings) -> Settings:
    """The settings of the run in `config.out`: those of its config.json if it goes on, else `config`. Writes nothing.

    Raises :class:`ConfigError` where there is no such run to go on with, or one already.
    """
    given: Any = config
    check_place(Path(given.out))
    if not getattr(given, "resume", False):
        check_source(getattr(given, "warm_start", ""))
    path = Path(given.out) / "config.json"
    resumable = hasattr(given, "resume")
    if not (resumable and given.resume):
        if path.exists():
            what = "say --resume, or choose another folder" if resumable else "choose another folder"
            raise ConfigError(f"out: {given.out} holds a run already; {what}")
        claim_folder(Path(given.out), "run of llmsched", {})
        return config
    if not path.exists():
        raise ConfigError(f"out: nothing to resume, there is no {path}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"out: {path}: cannot be read: {error}") from None
    fields = dataclasses.asdict(given)
    content = settings.pop(_CONTENT, None) if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or not settings.keys() <= fields.keys() - {*_NOT_KEPT}:
        raise ConfigError(f"out: {path}: expected the settings of such a run, got something else's")
    tuples = {
        name: tuple(value)
        for name, value in settings.items()
        if isinstance(fields[name], tuple) and isinstance(value, list)
    }
    try:
        check_values(type(given), {**settings, **tuples})
    except ConfigError as error:
        raise ConfigError(f"out: {path}: {error}") from None
    own = {name: value for name, value in dataclasses.asdict(given).items() if name in _NOT_KEPT}
    kept = type(given)(**{**own, **settings, **tuples, "resume": True})
    for field in dataclasses.fields(given):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        asked, held = (_plain(getattr(one, field.name)) for one in (given, kept))
        if asked not in (default, held):
            flag = field.name.replace("_", "-")
            raise ConfigError(f"--{flag}: the run in {given.out} has {held}, got {asked}; a run goes on as it began")
    if content is not None and settings_of(kept).get(_CONTENT) != content:
        raise ConfigError(
            f"suite: {kept.suite} is not what the run in {given.out} began with; a run goes on as it began"
        )
    return kept


def _plain(value: Any) -> Any:
    """A setting as a file gives it back: a pair may have been written as (1, 2) or [1, 2]."""
    return {name: plain(each) for name, each in value.items()} if isinstance(value, dict) else plain(value)


def check_source(warm_start: str) -> None:
    """Raise :class:`ConfigError` where there is nothing by the name of what a training is to start from."""
    if warm_start and not Path(warm_start).exists():
        raise ConfigError(f"warm_start: {warm_start}: no such file or folder")


def start_run(config: Any) -> None:
    """Make `config.out` the folder of a run; what could be wrong with the settings has been looked at before."""
    make_folder(Path(config.out))
    write_text(Path(config.out) / "config.json", json.dumps(settings_of(config), indent=2) + "\n")


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, the newest first."""
    return sorted(folder.glob("checkpoint-*"), reverse=True)


def cut_progress(folder: Path, step: int) -> Path:
    """The run's progress.jsonl without lines after `step`, which will be written again."""
    path, kept = folder / "progress.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            if json.loads(line)["step"] > step:
                break
        except ValueError:  # cut off by a kill
            break
        kept.append(line + "\n")
    write_text(path, "".join(kept))
    return path
