"""The single environment. Its docstring is the public specification; docs/environment.md is made from it."""

from __future__ import annotations

import math
from itertools import repeat
from typing import Any

import gymnasium as gym
import numpy as np

from llmsched_gym.config import ConfigError, EnvConfig, env_config
from llmsched_gym.env.arrays import DURATION_S, PAUSED
from llmsched_gym.env.core import INFOS, EnvCore
from llmsched_gym.env.episode import METRICS
from llmsched_gym.env.features import features_of
from llmsched_gym.env.spec import JsonSpec
from llmsched_gym.scheduler import install
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


class LLMSchedEnv(JsonSpec, gym.Env):
    """Schedule the batches of one LLM inference engine: one step is one forward pass.

    Requests arrive with a prompt; the engine computes prompts in chunks (prefill) and then emits one token a pass
    (decode), many requests side by side in a hybrid batch. The action decides what goes into the next batch; the batch
    takes the time that the cost profile, or a GPU, says. A request attains if its first token comes within its TTFT SLO
    and every later token within its TBT SLO.

    **Action** (``action=``). ``"knobs"``, the default: MultiDiscrete over the settings of a packing kernel (token
    budget, cap on the predicted time, offset or margin by which decodes are deferred, order of prompts, holding back
    hopeless prompts, a limit on prompt length, and refusal where it is allowed). Every combination is legal; the
    reference schedulers are among them. ``"priority"``: Box, one score in [-1, 1] per visible slot; requests are packed
    greedily from the highest score, those below 0 are left out. ``"request"``: Discrete, add the request of one slot or
    close the batch (the last action); ``action_masks()`` says what is legal, and time passes on closing only. With
    ``action_repeat=n`` a knobs or priority action decides n batches.

    **Observation** (``observation=``). ``"features"``, the default: a flat float32 Box, each entry named in
    ``feature_names``. ``"slots"``: Dict of 64 request rows, a mask of those in use, and the features. Or an object with
    ``space`` and ``observe(view)``. Nothing in it depends on output lengths, later arrivals, the true rate or the
    hidden cost scale.

    **Reward** (``reward=``). ``"slo"``: with U_i = 1[nothing late so far, first token out] - beta * min(1, L_i /
    patience) and L_i request i's late seconds, a step pays the sum of the changes of U_i: +1 at an on-time first token,
    -1 at that request's first late token (when its deadline passes), -beta dL / patience in between, -beta for a
    refusal; times ``reward_scale``. The undiscounted return over a resolved cohort is the sum of the final utilities.
    ``credit="finish"`` pays each U_i at the end of its request. Or a callable on a
    :class:`~llmsched_gym.env.reward.Transition`.

    **Info.** The same keys at every reset and step, all NumPy scalars: see the table. ``episode_metrics=True`` adds the
    episode's figures, nan until its end. ``episode_metrics()`` has them at any time, ``reward_terms()`` the reward's.

    **Time.** Steps last different times: ``info["duration_s"]`` and ``info["discount"] = exp(-duration / tau_s)``. An
    empty batch moves the clock to the next arrival, or by ``idle_step_s`` while work is pending.

    **Start.** ``reset(seed=s)`` draws the requests that ``llmsched evaluate`` draws for seed s; without a seed the
    next seed comes from ``np_random``. Continuing episodes begin with a random backlog. ``options={"qps": rate}`` fixes
    the mean arrival rate of the episode that begins, as a curriculum needs it; it is the only option.

    **End.** Continuing episodes (the default) are truncated at ``horizon_s``. With ``num_requests`` the episode
    terminates when all measured requests are resolved, and is truncated ``drain_s`` after the last one's arrival.
    A step beyond the end raises ``gymnasium.error.ResetNeeded``.

    Args:
        suite: scenario to start from: default, paper, drift, burst, tenants.
        render_mode: None, "ansi", "rgb_array" or "human".
        fields: any field of :class:`~llmsched_gym.config.EnvConfig`; a bad one raises a one-line ``ConfigError``.
    """

    metadata: dict[str, Any] = {"render_modes": list(RENDER_MODES), "render_fps": 20}  # noqa: RUF012

    def __init__(self, suite: str = "default", render_mode: str | None = None, **fields: Any) -> None:
        if render_mode is not None and render_mode not in RENDER_MODES:
            raise ConfigError(f"render_mode: expected one of {', '.join(RENDER_MODES)}, got {render_mode!r}")
        self._stand_on(EnvCore(env_config(suite, **fields)), 0, render_mode)

    def _stand_on(self, core: EnvCore, index: int, render_mode: str | None) -> None:
        """Be environment `index` of `core`."""
        self.core, self._index, self.render_mode = core, index, render_mode
        self.action_space, self.observation_space = core.action_space, core.observation_space
        outcome = core.arrays.outcomes[index]
        self._verdict, self._told = outcome[:PAUSED], outcome[DURATION_S:]
        self._episode = np.int64(0), np.float64(math.nan)  # seed and rate
        self._has_metrics = core.config.episode_metrics
        self._is_over = True  # until reset
        self._viewer: Any = None
        self._scheduler: Any = None  # whose settings the engine holds
        self._next_scheduler: Any = None  # who forms the next step's batches, see decide_by

    @property
    def config(self) -> EnvConfig:
        """The settings, which do not change after the environment is made."""
        return self.core.config

    @property
    def feature_names(self) -> list[str]:
        """Names of the entries of the features observation."""
        return [feature.name for feature in features_of(self.config)]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; the same `seed` and options give the same one. ConfigError for bad ones."""
        self.restart(None if seed is None else check_seed(seed, SEED_BITS), **check_options(options))
        if self.render_mode == "human":
            self.render()
        return self.core.observation(self._index), self._info(ended=False)

    def restart(self, seed: int | None, qps: float | None = None) -> None:
        """What :meth:`reset` does to the state."""
        super().reset(seed=seed)
        episode = int(self.np_random.integers(2**62)) if seed is None else seed
        self.core.reset(self._index, episode, qps)
        self._episode = self.core.seeds[self._index], self.core.qps[self._index]
        self._scheduler = self._next_scheduler = None
        self._is_over = False

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One batch, or `action_repeat` of them, under `action`. ResetNeeded where no episode is under way."""
        if self._is_over:
            raise gym.error.ResetNeeded(NO_EPISODE)
        scheduler = self._next_scheduler or getattr(action, "scheduler", None)
        if scheduler is not None:
            self._next_scheduler = None
            return self.step_scheduler(scheduler)
        if self._scheduler is not None:
            self._install(None)
        self.core.act(action)
        return self._outcome()

    def decide_by(self, scheduler: Any) -> None:
        """Let a scheduler form the batches of the next step, whatever action comes with it through the wrappers."""
        self._next_scheduler = scheduler

    def _install(self, scheduler: Any) -> None:
        install(scheduler, self.core.engine.state, 0, int(self.core.seeds[0]))
        self._scheduler = scheduler

    def step_scheduler(self, scheduler: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step whose batches, `action_repeat` of them, are formed by a scheduler instead of an action."""
        if self._is_over:
            raise gym.error.ResetNeeded(NO_EPISODE)
        core = self.core
        if scheduler is not self._scheduler:
            self._install(scheduler)
        state = core.engine.state
        start_s, resolved = float(state.sims[0].clock_s), int(state.episodes[0].num_resolved)
        for _ in range(self.config.action_repeat):
            core.engine.step(scheduler)
            core.reopen(0)
            if core.engine.is_over(0):
                break
        core.settle(0, start_s, resolved)
        return self._outcome()

    def _outcome(self) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward, terminated, truncated = self._verdict.tolist()
        self._is_over = over = terminated + truncated > 0.0
        if self.render_mode == "human":
            self.render()
        return self.core.observation(0), reward, terminated > 0.0, truncated > 0.0, self._info(over)

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
            from llmsched_gym.env.render import Viewer

            self._viewer = Viewer(self.core, env=self._index)
        return self._viewer.render(self.render_mode)

    def close(self) -> None:
        """Close the viewer, if there is one."""
        if self._viewer is not None:
            self._viewer.close()
            self._viewer = None
