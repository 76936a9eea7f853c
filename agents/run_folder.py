"""The folder of a run: its settings in config.json, written once, read again to go on after an interruption."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from llmsched_gym.config import ConfigError
from llmsched_gym.files import make_folder, write_text

Settings = TypeVar("Settings")
"""A frozen dataclass with `out`, the folder, and, if such runs can go on, `resume`."""

_NOT_KEPT = ("out", "resume", "workers", "ray", "ray_address", "max_s")  # where and how long, not what a run is


def settings_of(config: Any) -> dict[str, Any]:
    """What config.json holds: all settings but where the run lies, what runs it, and whether it goes on."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_KEPT}


def open_run(config: Settings) -> Settings:
    """The settings of the run in `config.out`: those of its config.json if it goes on, else `config`. Writes nothing.

    Raises :class:`ConfigError` where there is no such run to go on with, or one already.
    """
    given: Any = config
    path = Path(given.out) / "config.json"
    resumable = hasattr(given, "resume")
    if not (resumable and given.resume):
        if path.exists():
            what = "say --resume, or choose another folder" if resumable else "choose another folder"
            raise ConfigError(f"out: {given.out} holds a run already; {what}")
        return config
    if not path.exists():
        raise ConfigError(f"out: nothing to resume, there is no {path}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"out: {path}: cannot be read: {error}") from None
    fields = settings_of(given)
    if not isinstance(settings, dict) or not settings.keys() <= fields.keys():
        raise ConfigError(f"out: {path}: expected the settings of such a run, got something else's")
    tuples = {name: tuple(value) for name, value in settings.items() if isinstance(fields[name], tuple)}
    own = {name: value for name, value in dataclasses.asdict(given).items() if name in _NOT_KEPT}
    kept = type(given)(**{**own, **settings, **tuples, "resume": True})
    for field in dataclasses.fields(given):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        asked, held = (getattr(one, field.name) for one in (given, kept))
        if asked not in (default, held):
            flag = field.name.replace("_", "-")
            raise ConfigError(f"--{flag}: the run in {given.out} has {held}, got {asked}; a run goes on as it began")
    return kept


def start_run(config: Any) -> None:
    """Make `config.out` the folder of a run; what could be wrong with the settings has been looked at before."""
    make_folder(Path(config.out))
    write_text(Path(config.out) / "config.json", json.dumps(settings_of(config), indent=2) + "\n")
