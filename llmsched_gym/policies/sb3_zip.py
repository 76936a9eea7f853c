"""SB3's own zip files as schedulers. They hold pickles: reading one can run any code, so it takes an explicit flag.

What a zip, or the statistics beside it, says about its training is used; what neither says is asked for.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from llmsched_gym.config import ConfigError, EnvConfig
from llmsched_gym.env.actions import ACTIONS
from llmsched_gym.env.core import action_space, space_settings
from llmsched_gym.env.features import WIDTHS
from llmsched_gym.env.masked import mask_place, seen_with_masks
from llmsched_gym.env.observations import observation_space
from llmsched_gym.policies.bridge import PolicyScheduler
from llmsched_gym.scheduler import PolicyError

OPTIONS = ("allow_pickle", "repeat", "token_budget", "vecnormalize")
ALGORITHMS = {
    "RecurrentActorCriticPolicy": ("sb3_contrib", "RecurrentPPO"),
    "MaskableActorCriticPolicy": ("sb3_contrib", "MaskablePPO"),
    "ActorCriticPolicy": ("stable_baselines3", "PPO"),
    "DQNPolicy": ("stable_baselines3", "DQN"),
    "SACPolicy": ("stable_baselines3", "SAC"),
    "TD3Policy": ("stable_baselines3", "TD3"),  # and DDPG
    "QRDQNPolicy": ("sb3_contrib", "QRDQN"),
    "TQCPolicy": ("sb3_contrib", "TQC"),
    "CrossQPolicy": ("sb3_contrib", "CrossQ"),
    "ARSPolicy": ("sb3_contrib", "ARS"),
}
"""By the base of a model's policy: the algorithm that loads it."""


def load_zip(path: Path, options: dict[str, str]) -> PolicyScheduler:
    """The model in `path` as a scheduler; refused unless ``allow_pickle=true``.

    The other options: ``repeat`` and ``token_budget``, for zips that do not know their environment's; ``vecnormalize``,
    a file of VecNormalize's statistics (a pickle too), or none.
    """
    name = str(path)
    model = read_zip(path, options)
    config = zip_config(name, model, options)
    normalise = zip_normaliser(path, model, options.get("vecnormalize"))
    place, seen = mask_place(config), model.observation_space
    number = num_features(seen if place is None else seen[place.observation])
    return PolicyScheduler(Predictor(model, normalise), config, num_features=number)


class Predictor:
    """A model's action for one observation, its likeliest or a drawn one, with the state of a recurrent model."""

    def __init__(self, model: Any, normalise: Callable[[Any], Any], *, deterministic: bool = True) -> None:
        self.model, self.normalise, self.deterministic = model, normalise, deterministic
        self._masked = "Maskable" in type(model).__name__
        self._state: Any = None
        self._starts = True

    def reset(self) -> None:
        """Forget the run so far."""
        self._state, self._starts = None, True

    def __call__(self, observation: Any, mask: Any = None) -> Any:
        extra = {"action_masks": mask} if self._masked and mask is not None else {}
        action, self._state = self.model.predict(
            self.normalise(observation),
            state=self._state,
            episode_start=np.array([self._starts]),
            deterministic=self.deterministic,
            **extra,
        )
        self._starts = False
        return action


def read_zip(path: Path, options: dict[str, str]) -> Any:
    """The SB3 model in `path`, if the options say that it may be read; one line of :class:`PolicyError` otherwise."""
    name = str(path)
    if options.get("allow_pickle", "").lower() != "true":
        raise PolicyError(
            f"policy {name!r}: an SB3 zip holds pickles, which can run code: if you trust it, say "
            f"{name}[allow_pickle=true], or turn it into a policy folder with `python -m llmsched_gym.agents.export`"
        )
    for key in options:
        if key not in OPTIONS:
            raise PolicyError(f"policy {name!r}: unknown parameter {key!r}, expected one of {', '.join(OPTIONS)}")
    if not path.is_file():
        raise PolicyError(f"policy {name!r}: no such file")
    try:
        data, _, _ = importlib.import_module("stable_baselines3.common.save_util").load_from_zip_file(
            name, device="cpu"
        )
    except ImportError:
        raise PolicyError(f"policy {name!r}: SB3 zips need stable_baselines3, which is not installed") from None
    except Exception as error:
        raise PolicyError(f"policy {name!r}: cannot be read as an SB3 zip: {_line(error)}") from None
    module, algorithm = _algorithm(name, data)
    try:
        cls = getattr(importlib.import_module(module), algorithm)
        # an off-policy model would come with an empty buffer of full size
        buffer = {"buffer_size": 1} if "buffer_size" in data else {}
        return cls.load(name, device="cpu", custom_objects=buffer)
    except ImportError:
        raise PolicyError(f"policy {name!r}: {algorithm} needs {module}, which is not installed") from None
    except Exception as error:
        raise PolicyError(f"policy {name!r}: cannot be loaded as {algorithm}: {_line(error)}") from None


def _algorithm(name: str, data: Any) -> tuple[str, str]:
    """Module and class of the algorithm that saved a zip."""
    policy = (data or {}).get("policy_class")
    if not isinstance(policy, type):
        raise PolicyError(
            f"policy {name!r}: its policy class cannot be unpickled: is sb3_contrib, or its own code, here?"
        )
    found = next((ALGORITHMS[base.__name__] for base in policy.__mro__ if base.__name__ in ALGORITHMS), None)
    if found is None:
        known = ", ".join(algorithm for _, algorithm in ALGORITHMS.values())
        raise PolicyError(f"policy {name!r}: its policy {policy.__name__} is of none of {known}")
    if found[1] == "PPO" and "n_epochs" not in data:  # the same policy
        return ("sb3_contrib", "TRPO") if "cg_max_steps" in data else ("stable_baselines3", "A2C")
    return found


def zip_config(name: str, model: Any, options: dict[str, str]) -> EnvConfig:
    """The configuration of the environment that a model was trained in, as far as acting depends on it."""
    given: dict[str, Any] = {}
    for key, field in (("repeat", "action_repeat"), ("token_budget", "token_budget")):
        if key in options:
            number = float(options[key]) if re.fullmatch(r"[\d.]+", options[key]) else 0.0
            if number < 1 or not number.is_integer():
                raise PolicyError(f"policy {name!r}: {key}: expected a whole number >= 1, got {options[key]!r}")
            given[field] = int(number)
    try:
        settings = space_settings(model.action_space)
        if settings and "observation" not in settings:
            raise ConfigError("it was trained on observations of its own, which only its environment can make")
        for config in [EnvConfig(**{**settings, **given})] if settings else _guesses(model, given):
            actions = action_space(config)
            known = [seen_with_masks(config, observation_space(config, number), actions) for number in WIDTHS]
            if actions == model.action_space and _as_now(model.observation_space) in known:
                return config
    except ConfigError as error:
        raise PolicyError(f"policy {name!r}: {error}") from None
    raise PolicyError(f"policy {name!r}: its spaces are not those of this version's environments")


def _as_now(space: spaces.Space) -> spaces.Space:
    """The space as environments have it now: older ones gave the length of a mask as a tuple of one."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({name: _as_now(part) for name, part in space.items()})
    return (
        spaces.MultiBinary(*space.shape) if isinstance(space, spaces.MultiBinary) and len(space.shape) == 1 else space
    )


def num_features(space: spaces.Space) -> int:
    """How many features observations of a space have."""
    features = space["features"] if isinstance(space, spaces.Dict) else space
    return int(np.prod(features.shape or ()))


def _guesses(model: Any, given: dict[str, Any]) -> list[EnvConfig]:
    """Configurations that a model's spaces allow, where these do not carry their environment's settings."""
    slots = isinstance(model.observation_space, spaces.Dict)
    settings = {"observation": "slots" if slots else "features", **given}
    found = []
    for name, action in ACTIONS.items():
        flags = product((False, True), repeat=2)
        variants: list[dict[str, Any]] = [{"allow_refusal": r, "prefix_caching": c} for r, c in flags]
        if all(action.space(EnvConfig(action=name, **variant)) != model.action_space for variant in variants):
            continue
        if action.is_held and "action_repeat" not in given:
            raise _unknown("repeat", "action_repeat")
        if action.has_budget and "token_budget" not in given:
            raise _unknown("token_budget", "token_budget")
        found += [EnvConfig(**settings, action=name, **variant) for variant in variants]
    return found


def _unknown(option: str, field: str) -> ConfigError:
    return ConfigError(f"{option}: the zip does not say with which {field} it was trained: say {option}=N")


def zip_normaliser(path: Path, model: Any, wanted: str | None) -> Callable[[Any], Any]:
    """What VecNormalize did to observations in training: the statistics named, those beside the zip, or none."""
    name = str(path)
    seen = _is_normalised(model)
    if wanted == "none":
        return as_it_is
    if wanted in (None, "true"):
        beside = [file for file in _statistics_files(path) if file.is_file()]
        if not beside:
            if seen or wanted:
                raise PolicyError(
                    f"policy {name!r}: vecnormalize: it was trained on normalised observations, and their statistics "
                    f"are not beside it: save them as {_statistics_files(path)[-1].name}, or say vecnormalize=FILE"
                )
            return as_it_is
        file = beside[0]
    else:
        file = Path(wanted)
    normalise = _read_statistics(name, file, model)
    if wanted is None and seen is False and normalise is not as_it_is:
        raise PolicyError(
            f"policy {name!r}: vecnormalize: {file.name} lies beside it, and its last observation was not normalised: "
            "say vecnormalize=true to use the file, vecnormalize=none to leave it"
        )
    return normalise


def as_it_is(observation: Any) -> Any:
    """The observation, unscaled: what a model without statistics of its own sees."""
    return observation


def _statistics_files(path: Path) -> list[Path]:
    """Where statistics of a model are usually kept: by its own name, by SB3's checkpoints, by the folder."""
    checkpoint = re.sub(r"_(\d+_steps)$", r"_vecnormalize_\1", path.stem)
    names = [f"{path.stem}_vecnormalize", f"{path.stem}_vec_normalize", checkpoint, "vec_normalize", "vecnormalize"]
    return [path.with_name(f"{name}.pkl") for name in names]


def _is_normalised(model: Any) -> bool | None:
    """Whether the last observation of a model's training lies outside the space of observations; None: it has none."""
    last = getattr(model, "_last_obs", None)
    if last is None:
        return None
    parts, known = (
        (last, model.observation_space) if isinstance(last, dict) else ({"": last}, {"": model.observation_space})
    )
    for key, values in parts.items():
        space = known[key]
        if isinstance(space, spaces.Box) and not ((values >= space.low - 1e-4) & (values <= space.high + 1e-4)).all():
            return True
    return False


def _read_statistics(name: str, file: Path, model: Any) -> Callable[[Any], Any]:
    import pickle

    where = f"policy {name!r}: vecnormalize: {file}"
    cls = importlib.import_module("stable_baselines3.common.vec_env").VecNormalize
    try:
        with file.open("rb") as stream:
            statistics = pickle.load(stream)
    except OSError as error:
        raise PolicyError(f"{where}: cannot be read: {error.strerror}") from None
    except Exception as error:
        raise PolicyError(f"{where}: cannot be unpickled: {_line(error)}") from None
    if not isinstance(statistics, cls):
        raise PolicyError(f"{where}: expected a VecNormalize, got {type(statistics).__name__}")
    if not statistics.norm_obs:
        return as_it_is
    if statistics.observation_space != model.observation_space:
        raise PolicyError(f"{where}: its statistics are of other observations than the model's")
    normalise: Callable[[Any], Any] = statistics.normalize_obs
    return normalise


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
