"""What single environments have in common: episodes, outcomes, infos and pictures, on whatever core steps them."""

from __future__ import annotations

import math
from itertools import repeat
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils.seeding import np_random

from llmsched_gym.config import ConfigError
from llmsched_gym.env.arrays import DURATION_S, INFOS, PAUSED
from llmsched_gym.env.episode import METRICS
from llmsched_gym.env.saved import EnvState
from llmsched_gym.env.spec import JsonSpec
from llmsched_gym.workload import check_seed

RENDER_MODES = ("ansi", "rgb_array", "human")
RESET_OPTIONS = ("qps",)
SEED_BITS = 63
"""Of the seeds that infos can hold."""
EPISODE_INFOS = tuple(f"episode_{name}" for name in METRICS)
NO_EPISODE = "step: the episode has ended or never begun, call reset()"


def check_options(options: Any, known: tuple[str, ...] = RESET_OPTIONS) -> dict[str, Any]:
    """The options of a reset; an unknown one raises :class:`ConfigError`."""
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise ConfigError(f"options: expected a dict, got {type(options).__name__}")
    for name in options:
        if name not in known:
            raise ConfigError(f"options: expected {' or '.join(known)}, got {name!r}")
    return options


def check_render_mode(render_mode: Any, modes: tuple[str, ...] = RENDER_MODES) -> None:
    """ConfigError for a way to render that there is not."""
    if render_mode is not None and render_mode not in modes:
        raise ConfigError(f"render_mode: expected one of {', '.join(modes)}, got {render_mode!r}")


class SimulatedEnv(JsonSpec, gym.Env):
    """A single environment on a core, which holds the state of one or of many side by side."""

    metadata: dict[str, Any] = {"render_modes": list(RENDER_MODES), "render_fps": 20}  # noqa: RUF012

    def _stand_on(self, core: Any, index: int, render_mode: str | None) -> None:
        """Be environment `index` of `core`."""
        self.core, self._index, self.render_mode = core, index, render_mode
        self.action_space, self.observation_space = core.action_space, core.observation_space
        self._connect()
        self._episode = np.int64(0), np.float64(math.nan)  # seed and rate
        self._has_metrics = core.config.episode_metrics
        self._is_over = True  # until reset
        self._scheduler: Any = None  # whose settings the engine holds, see LLMSchedEnv
        self._next_scheduler: Any = None

    def _connect(self) -> None:
        outcome = self.core.arrays.outcomes[self._index]
        self._verdict, self._told = outcome[:PAUSED], outcome[DURATION_S:]
        self._viewer: Any = None
        if self.render_mode == "rgb_array":  # whose frames show the batches that no frame was asked for, too
            self.core.watch(self._index, self._notice)

    def _notice(self) -> None:
        if self._viewer is None:
            self._viewer = self.core.make_viewer(self._index)
        self._viewer.notice()

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in vars(self).items() if name not in ("_verdict", "_told", "_viewer")}
        return kept | {"history": None if self._viewer is None else self._viewer.history()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        history = state["history"]
        vars(self).update({name: value for name, value in state.items() if name != "history"})
        self._connect()
        if history is not None:
            self._viewer = self.core.make_viewer(self._index)
            self._viewer.go_on(history)

    @property
    def config(self) -> Any:
        """The settings, which do not change after the environment is made."""
        return self.core.config

    @property
    def feature_names(self) -> list[str]:
        """Names of the entries of the features observation."""
        names: list[str] = self.core.feature_names
        return names

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; the same `seed` and options give the same one. ConfigError for bad ones."""
        self.restart(None if seed is None else check_seed(seed, SEED_BITS), **check_options(options))
        if self.render_mode == "human":
            self.render()
        return self.core.observation(self._index), self._info(ended=False)

    def restart(self, seed: int | None, qps: float | None = None) -> None:
        """What :meth:`reset` does to the state."""
        if qps is not None:
            self.config.replace(qps=qps)  # a bad rate fails before the generator of seeds goes on
        super().reset(seed=seed)
        episode = int(self.np_random.integers(2**62)) if seed is None else seed
        self.core.reset(self._index, episode, qps)
        self._episode = self.core.seeds[self._index], self.core.qps[self._index]
        self._is_over = False

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One decision. ResetNeeded where no episode is under way."""
        if self._is_over:
            raise gym.error.ResetNeeded(NO_EPISODE)
        self.core.act(action)
        return self._outcome()

    def get_state(self) -> EnvState:
        """This moment of the episode, to be gone back to with :meth:`set_state`.

        ResetNeeded before the first reset, ConfigError on a real backend.
        """
        if self.core.tables[self._index] is None:
            raise gym.error.ResetNeeded("get_state: no episode has begun, call reset()")
        generator = self.np_random.bit_generator.state
        moment = self.core.save(self._index)
        return EnvState(moment, generator, self._np_random_seed or 0, self._is_over, scheduler=self._scheduler)

    def set_state(self, state: EnvState, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Be at the moment at which `state` was taken; returns the observation and the info of that moment.

        What follows is what followed then, bit for bit: the noise on batch times and the seeds of later episodes are
        part of the state. With `seed` both are drawn anew from it; where nothing is noisy the episode goes on as it
        did. ConfigError for a state of other settings, another cost profile or another version.
        """
        state = self.core.check_state(state)
        if seed is not None:
            seed = check_seed(seed, SEED_BITS)
        self.core.restore(self._index, state.moment, seed)
        if seed is None:
            self.np_random.bit_generator.state = state.generator
            self._np_random_seed = state.generator_seed
        else:
            self._np_random, self._np_random_seed = np_random(seed)
        self._episode = self.core.seeds[self._index], self.core.qps[self._index]
        self._is_over = state.is_over
        self._scheduler, self._next_scheduler = state.scheduler, None
        return self.core.observation(self._index), self._info(bool(self._verdict[1:].any()))

    def _outcome(self) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward, terminated, truncated = self._verdict.tolist()
        self._is_over = over = terminated + truncated > 0.0
        if self.render_mode == "human":
            self.render()
        return self.core.observation(self._index), reward, terminated > 0.0, truncated > 0.0, self._info(over)

    def _info(self, ended: bool) -> dict[str, Any]:
        info = dict(zip(INFOS, self._told))  # noqa: B905  as long as each other; checking takes time
        info["seed"], info["qps"] = self._episode
        if self._has_metrics:
            figures = self.core.metrics(self._index).values() if ended else repeat(math.nan)
            info |= zip(EPISODE_INFOS, map(np.float64, figures), strict=False)
        return info

    def reward_terms(self) -> dict[str, float]:
        """Parts of the last step's reward, before ``reward_scale``: on_time, expired, lateness, refused."""
        return self.core.terms(self._index)

    def episode_metrics(self) -> dict[str, float]:
        """The episode's figures so far, by the names of :data:`~llmsched_gym.env.episode.METRICS`."""
        return self.core.metrics(self._index)

    def action_masks(self) -> np.ndarray:
        """Legal actions, bool: shape (65,) for request actions, (sum of choices,) for knobs."""
        return self.core.action_masks()[self._index]

    def render(self) -> Any:
        """Show the state as `render_mode` says: text, an array (height, width, 3) uint8, or a panel that stays."""
        if self.render_mode is None:
            gym.logger.warn("render() needs a render_mode: ansi, rgb_array or human")
            return None
        if self._viewer is None:
            self._viewer = self.core.make_viewer(self._index)
        return self._viewer.render(self.render_mode)

    def close(self) -> None:
        """Close the viewer, if there is one."""
        if self._viewer is not None:
            self._viewer.close()
            self._viewer = None
