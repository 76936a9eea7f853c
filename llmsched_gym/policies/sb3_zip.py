"""SB3's own zip files as schedulers. They hold pickles: reading one can run any code, so it takes an explicit flag."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from gymnasium import spaces

from llmsched_gym.config import ConfigError, EnvConfig
from llmsched_gym.env.core import action_space, observation_space
from llmsched_gym.env.policy import PolicyScheduler
from llmsched_gym.scheduler import PolicyError


def load_zip(path: Path, options: dict[str, str]) -> PolicyScheduler:
    """The PPO or MaskablePPO model in `path`; refused unless ``allow_pickle=true``."""
    name = str(path)
    if options.get("allow_pickle") != "true":
        raise PolicyError(
            f"policy {name!r}: an SB3 zip holds pickles, which can run code: if you trust it, say "
            f"{name}[allow_pickle=true], or turn it into a policy folder with `python -m llmsched_gym.agents.export`"
        )
    if not path.is_file():
        raise PolicyError(f"policy {name!r}: no such file")
    numbers = {"repeat": 1, "token_budget": 512}
    for key, text in options.items():
        if key == "allow_pickle":
            continue
        if key not in numbers or not text.isdigit() or int(text) < 1:
            raise PolicyError(f"policy {name!r}: {key}={text}: expected repeat or token_budget, whole numbers >= 1")
        numbers[key] = int(text)
    model = _load(name)
    try:
        config = _config(model, numbers)
    except (ConfigError, KeyError, TypeError) as error:
        raise PolicyError(f"policy {name!r}: {error}") from None
    if config.action == "request":
        masked = "Maskable" in type(model).__name__

        def request(observation: Any, mask: Any) -> Any:
            extra = {"action_masks": mask} if masked else {}
            return model.predict(observation, deterministic=True, **extra)[0]

        return PolicyScheduler(request, config)
    return PolicyScheduler(lambda observation: model.predict(observation, deterministic=True)[0], config)


def _load(name: str) -> Any:
    faults = []
    for module, cls in (("stable_baselines3", "PPO"), ("sb3_contrib", "MaskablePPO")):
        try:
            return getattr(importlib.import_module(module), cls).load(name, device="cpu")
        except ImportError:
            faults.append(f"{module} is not installed")
        except Exception as error:
            faults.append(f"{cls}: {(str(error) or type(error).__name__).splitlines()[0]}")
    raise PolicyError(f"policy {name!r}: cannot be read as an SB3 zip: {'; '.join(faults)}")


def _config(model: Any, numbers: dict[str, int]) -> EnvConfig:
    """The environment whose spaces the model has."""
    kinds = {spaces.MultiDiscrete: "knobs", spaces.Box: "priority", spaces.Discrete: "request"}
    slots = isinstance(model.observation_space, spaces.Dict)
    kind = kinds[type(model.action_space)]
    for refusal in (False, True):
        config = EnvConfig(
            action=kind,
            observation="slots" if slots else "features",
            action_repeat=1 if kind == "request" else numbers["repeat"],
            token_budget=numbers["token_budget"],
            allow_refusal=refusal,
        )
        if action_space(config) == model.action_space and observation_space(config) == model.observation_space:
            return config
    raise ConfigError("its spaces are not those of this version's environments")
