"""What a standard result is of: a learner with its settings in an environment, a TOML file in ``agents/presets``.

::

    learner = "ppo"               # one of LEARNERS
    suite = "default"

    [world]                       # fields of EnvConfig
    action = "preset"

    [settings]                    # of the learner; num_envs, and hidden, the network's widths, of all of them;
                                  # n_quantiles of qr-dqn, lstm_hidden_size of recurrent
    learning_rate = 1e-3
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import inspect
import math
import re
import tomllib
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llmsched_gym.agents.options import (
    KINDS,
    MOST,
    MOST_ENVS,
    MOST_N_STEPS,
    MOST_WIDTH,
    check_values,
    is_of_kind,
)
from llmsched_gym.agents.run_folder import check_source
from llmsched_gym.config import ConfigError, EnvConfig, Scenario, UnknownField, env_config, scenario
from llmsched_gym.files import digest_of

FOLDER = Path(__file__).with_name("presets")


class Learner(NamedTuple):
    """Who learns, where its settings are looked up, and the actions that it can take."""

    label: str
    place: tuple[str, str]  # module and class that has the settings: a dataclass of ours, or one of SB3's algorithms
    actions: tuple[str, ...]
    fixed: dict[str, Any] = {}  # noqa: RUF012 - of a tuple
    policy: str = "MlpPolicy"  # of SB3's algorithms
    network: dict[str, Any] = {}  # noqa: RUF012 - settings of that policy that a preset may change, with defaults


_CHOICES = ("knobs", "preset")
LEARNERS = {
    "own-ppo": Learner("`llmsched ppo`", ("llmsched_gym.agents.ppo", "Config"), (*_CHOICES, "request")),
    "ppo": Learner("PPO of SB3", ("llmsched_gym.agents.train", "Config"), _CHOICES),
    "maskable": Learner(
        "MaskablePPO", ("llmsched_gym.agents.train", "Config"), ("request",), {"algorithm": "maskable"}
    ),
    "a2c": Learner("A2C", ("stable_baselines3", "A2C"), _CHOICES),
    "dqn": Learner("DQN", ("stable_baselines3", "DQN"), ("preset",)),
    "qr-dqn": Learner("QR-DQN", ("sb3_contrib", "QRDQN"), ("preset",), network={"n_quantiles": 200}),
    "recurrent": Learner(
        "RecurrentPPO",
        ("sb3_contrib", "RecurrentPPO"),
        _CHOICES,
        policy="MlpLstmPolicy",
        network={"lstm_hidden_size": 256},
    ),
    "sac": Learner("SAC", ("stable_baselines3", "SAC"), ("priority",), policy="MultiInputPolicy"),
}
OURS = (  # options, but no settings; the last are the benchmark's own
    *("out", "seed", "steps", "suite", "set", "resume", "env", "backend", "model"),
    *("eval_every", "eval_seeds", "eval_requests", "checkpoint_every"),
)
SIZES = (
    "num_envs",
    "n_steps",
    "batch_size",
    "buffer_size",
    "hidden",
    "n_epochs",
    "train_freq",
    "target_update_interval",
    "stats_window_size",
)
SB3S = (  # parameters of SB3's algorithms, but no settings: the benchmark's own, and what no text can name
    *("policy", "env", "policy_kwargs", "seed", "device", "self", "tensorboard_log", "verbose", "_init_setup_model"),
    *("replay_buffer_class", "replay_buffer_kwargs", "rollout_buffer_class", "rollout_buffer_kwargs", "action_noise"),
)
SHARES = ("gamma", "gae_lambda", "tau", "exploration_fraction", "exploration_initial_eps", "exploration_final_eps")
"""Settings of SB3's algorithms that are at most 1."""
MOST_OF = {"num_envs": MOST_ENVS, "n_steps": MOST_N_STEPS}
OF_ANY_SIGN = ("target_entropy",)


@dataclass(frozen=True)
class Preset:
    """A file's content."""

    name: str
    learner: str
    suite: str
    world: dict[str, Any]
    settings: dict[str, Any]

    @property
    def config(self) -> EnvConfig:
        """The environment."""
        return env_config(self.suite, **self.world)

    @property
    def environment(self) -> str:
        """Suite and action, by which learners are compared."""
        return f"{self.suite}, {self.world.get('action', EnvConfig().action)}"

    @property
    def digest(self) -> str:
        """Of all that a result depends on but steps and seeds."""
        return digest_of({**dataclasses.asdict(self), "config": dataclasses.asdict(self.config)})

    def scenario(self, num_requests: int) -> Scenario:
        """What schedulers, which know no actions, are compared in."""
        names = {field.name for field in dataclasses.fields(Scenario)} - {"suite"}
        fields = {name: value for name, value in self.world.items() if name in names}
        return scenario(self.suite, **fields | {"num_requests": num_requests})


def read_preset(path: Path) -> Preset:
    """A preset's file; ConfigError of one line names what is wrong with which field."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"presets: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"presets: {path}: not a TOML file: {' '.join(str(error).split())}") from None
    _known(path, "", data, ("learner", "suite", "world", "settings"))
    learner, world, settings = data.get("learner"), data.get("world", {}), data.get("settings", {})
    if not isinstance(learner, str) or learner not in LEARNERS:
        raise ConfigError(f"presets: {path}: learner: expected one of {', '.join(LEARNERS)}, got {learner!r}")
    for name, table in (("world", world), ("settings", settings)):
        if not isinstance(table, dict):
            raise ConfigError(f"presets: {path}: {name}: expected a table, got {table!r}")
    if "suite" in world:
        raise ConfigError(f"presets: {path}: world.suite: stands above the tables, as suite = {world['suite']!r}")
    _known(path, "settings.", settings, settings_of(learner))
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    try:
        _check_settings(learner, settings)
    except ConfigError as error:
        raise ConfigError(f"presets: {path}: settings.{error}") from None
    preset = Preset(path.stem, learner, data.get("suite", "default"), world, settings)
    try:
        action = preset.config.action
        _check_world(preset)
    except UnknownField as error:
        raise ConfigError(f"presets: {path}: world: {error.told}") from None
    except ConfigError as error:
        raise ConfigError(f"presets: {path}: {error}") from None
    if action not in LEARNERS[learner].actions:
        expected = " or ".join(LEARNERS[learner].actions)
        raise ConfigError(f"presets: {path}: world.action: expected {expected} for {learner}, got {action!r}")
    return preset


def settings_of(learner: str) -> tuple[str, ...]:
    """Names of the settings that a learner has."""
    module, name = LEARNERS[learner].place
    cls = getattr(importlib.import_module(module), name)
    if dataclasses.is_dataclass(cls):
        return tuple(f.name for f in dataclasses.fields(cls) if f.name not in (*OURS, *EnvConfig.__dataclass_fields__))
    names = (name for name in inspect.signature(cls).parameters if name not in SB3S)
    return ("num_envs", "hidden", *LEARNERS[learner].network, *names)


def _check_world(preset: Preset) -> None:
    """Raise ConfigError for a world that the learner does not know."""
    expected = {"backend": "simulated", "mask_in_observation": None}
    if preset.learner == "own-ppo":
        expected["observation"] = "features"
    for name, value in expected.items():
        if (got := getattr(preset.config, name)) != value:
            raise ConfigError(f"world.{name}: expected {value!r} for {preset.learner}, got {got!r}")


def _check_settings(learner: str, settings: dict[str, Any]) -> None:
    """Raise ConfigError where a value is none that the learner's setting can have."""
    module, name = LEARNERS[learner].place
    cls: Any = getattr(importlib.import_module(module), name)
    if module.startswith("llmsched_gym"):
        check_values(cls, settings)
        check_source(settings.get("warm_start", ""))
        return
    of_cls = {name: each.annotation for name, each in inspect.signature(cls).parameters.items()}
    of_ours = {"num_envs": int, "hidden": tuple[int, ...], **dict.fromkeys(LEARNERS[learner].network, int)}
    for name, value in settings.items():
        kinds = _kinds((of_cls | of_ours)[name])
        if kinds and not any(is_of_kind(value, kind) for kind in kinds):
            raise ConfigError(f"{name}: expected {' or '.join(KINDS[kind] for kind in kinds)}, got {value!r}")
        if isinstance(value, str) and not re.fullmatch(r"auto(_[0-9.e+-]+)?", value):  # of numbers that SB3 tunes
            raise ConfigError(f"{name}: expected a number, auto or auto_NUMBER, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}: expected a number, got {value!r}")
        most = 1.0 if name in SHARES else MOST_OF.get(name, MOST)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and name not in OF_ANY_SIGN
        if is_number and float in kinds and not 0.0 <= value <= most:
            raise ConfigError(f"{name}: expected a number from 0 to {most:g}, got {value!r}")
        if is_number and int in kinds and not -1 <= value <= most:  # -1 of some means as many as can be
            raise ConfigError(f"{name}: expected a whole number from -1 to {most:,.0f}, got {value!r}")
        entries = value if isinstance(value, tuple) else (value,)
        least = min((entry for entry in entries if isinstance(entry, int)), default=1)
        if name in (*SIZES, *LEARNERS[learner].network) and least < 1:
            raise ConfigError(f"{name}: expected at least 1, got {least!r}")
        if name == "hidden" and max(value, default=1) > MOST_WIDTH:
            raise ConfigError(f"{name}: expected widths up to {MOST_WIDTH:,}, got {max(value)}")


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """Those of KINDS that a parameter of SB3's can have; none where a list is one of its values, which SB3 checks."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    parts = typing.get_args(annotation) if is_union else (annotation,)
    if any(typing.get_origin(part) is tuple and part not in KINDS for part in parts):
        return ()
    return tuple(part for part in parts if part in KINDS)


def find_presets(wanted: str) -> list[Preset]:
    """The presets of a list of names, of patterns such as ``default-*`` or of TOML files, separated by commas."""
    files: dict[str, Path] = {}
    known = {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}
    for name in filter(None, wanted.split(",")):
        found = (
            {Path(name).stem: Path(name)} if name.endswith(".toml") else {n: known[n] for n in _matching(known, name)}
        )
        if not found:
            raise ConfigError(f"--presets: expected some of {', '.join(known)} or a .toml file, got {name!r}")
        for stem, path in found.items():
            if files.setdefault(stem, path) != path:
                raise ConfigError(f"--presets: expected files of different names, got {files[stem]} and {path}")
    if not files:
        raise ConfigError("--presets: expected at least one")
    presets = [read_preset(path) for path in files.values()]
    worlds: dict[str, Preset] = {}
    for preset in presets:  # a table and a panel of curves measure all of an environment by one rule
        other = worlds.setdefault(preset.environment, preset)
        one, two = (each.scenario(1).to_dict() for each in (other, preset))
        differing = ", ".join(name for name in one if one[name] != two[name])
        if differing:
            raise ConfigError(
                f"--presets: {other.name} and {preset.name} differ in {differing} of the world; give each a folder"
            )
    return presets


def _matching(known: Collection[str], pattern: str) -> list[str]:
    return [name for name in known if fnmatch.fnmatchcase(name, pattern)]


def _known(path: Path, place: str, data: dict[str, Any], names: Collection[str]) -> None:
    for name in data:
        if name not in names:
            raise ConfigError(f"presets: {path}: {place}{name}: expected one of {', '.join(names)}")
