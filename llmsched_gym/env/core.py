"""What the single and the vector environment share: an engine with agents' actions, rewards and observations on top."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gymnasium import spaces

from llmsched_gym.config import ConfigError, EnvConfig
from llmsched_gym.engine import Engine
from llmsched_gym.engine.compiling import expect_kernels
from llmsched_gym.env import kernels
from llmsched_gym.env.actions.action import as_array, check_range
from llmsched_gym.env.actions.knobs import knobs_for
from llmsched_gym.env.arrays import DISCOUNT, DURATION_S, FIRST_TERM, PAUSED, REWARD, make_arrays
from llmsched_gym.env.episode import METRICS, episode_metrics
from llmsched_gym.env.features import FEATURES
from llmsched_gym.env.reward import TERMS, Transition
from llmsched_gym.env.slots import NUM_SLOTS, SLOT_FEATURES
from llmsched_gym.scheduler import install
from llmsched_gym.workload import NOISE_BLOCK, RequestTable, make_table

ACTED_BY = ("action", "action_repeat", "token_budget", "admission", "allow_refusal")
"""Settings without which a model's actions mean something else."""


def action_space(config: EnvConfig) -> spaces.Space:
    """The space of one environment's actions; what is saved with it says what they mean, see `space_settings`."""
    space: spaces.Space = spaces.Discrete(NUM_SLOTS + 1)
    if config.action == "knobs":
        space = spaces.MultiDiscrete([len(knob.values) for knob in knobs_for(config)])
    if config.action == "priority":
        space = spaces.Box(-1.0, 1.0, (NUM_SLOTS,), np.float32)
    settings = {name: getattr(config, name) for name in ACTED_BY}
    if isinstance(config.observation, str):
        settings["observation"] = config.observation
    vars(space)["llmsched"] = settings
    return space


def space_settings(space: spaces.Space) -> dict[str, Any]:
    """The settings of the environment that an action space was made for; empty where it carries none.

    Libraries save a model's spaces, and nothing else of its environment.
    """
    return dict(vars(space).get("llmsched", {}))


def features_space() -> spaces.Box:
    low = np.array([f.low for f in FEATURES], np.float32)
    high = np.array([f.high for f in FEATURES], np.float32)
    return spaces.Box(low, high, dtype=np.float32)


def observation_space(config: EnvConfig) -> spaces.Space:
    """The space of one environment's observations."""
    if hasattr(config.observation, "observe"):
        space = getattr(config.observation, "space", None)
        if not isinstance(space, spaces.Space):
            raise ConfigError(f"observation: expected an object with a gymnasium space in `space`, got {space!r}")
        return space
    if config.observation == "features":
        return features_space()
    low = np.tile(np.array([f.low for f in SLOT_FEATURES], np.float32), (NUM_SLOTS, 1))
    high = np.tile(np.array([f.high for f in SLOT_FEATURES], np.float32), (NUM_SLOTS, 1))
    return spaces.Dict(
        {
            "slots": spaces.Box(low, high, dtype=np.float32),
            "in_use": spaces.MultiBinary(NUM_SLOTS),
            "features": features_space(),
        }
    )


def expected_requests(config: EnvConfig) -> int:
    """Requests that an episode will hardly exceed; the arrays grow when one does."""
    rate = config.qps or config.qps_range[1]
    if config.num_requests is None:
        mean, extra = rate * config.horizon_s, config.max_backlog
    else:
        tail_s = min(config.drain_s, 600.0) if config.arrivals_continue else 0.0
        mean, extra = rate * (config.warmup_s + tail_s), config.num_requests
    spread = 1.0 / math.sqrt(min(1.0, config.burstiness))
    return int(mean + 6.0 * spread * math.sqrt(mean + 1.0)) + extra + 16


INFOS = ("duration_s", "discount", *(f"reward_{name}" for name in TERMS))
"""What `info` tells of a step: the columns of its outcome from DURATION_S on."""


class EnvCore:
    """Engine, arrays and bookkeeping of `num_envs` environments; all step kernels run over all of them at once.

    Without `num_envs` there is one, whose actions have no axis of environments.
    """

    def __init__(self, config: EnvConfig, num_envs: int | None = None) -> None:
        if config.backend == "transformers" and (num_envs or 1) != 1:
            raise ConfigError(f"backend: expected 'simulated' for {num_envs} environments, got 'transformers'")
        make_table(config, 0)  # a bad workload, trace or rate fails here and not at the first reset
        self.config, self.num_envs = config, num_envs or 1
        self.action_space, self.observation_space = action_space(config), observation_space(config)
        self.engine = Engine(
            config,
            expected_requests(config),
            num_envs=self.num_envs,
            backend=self._backend(),
            num_gaps=int(config.episode_metrics),  # reset makes room
        )
        self.arrays, self.handle = make_arrays(config, self.num_envs)
        self.actions = {
            "knobs": self.arrays.knob_actions,
            "priority": self.arrays.scores,
            "request": self.arrays.slots,
        }[config.action]
        self._input = self.actions if num_envs else self.actions.reshape(self.actions.shape[1:])
        self._shape = self._input.shape
        self._observe = getattr(config.observation, "observe", None)
        self.legal = np.ones((self.num_envs, NUM_SLOTS + 1), np.bool_)
        self.tables: list[RequestTable | None] = [None] * self.num_envs
        self.seeds = np.zeros(self.num_envs, np.int64)
        self.qps = np.full(self.num_envs, math.nan)  # true rates, for logs
        self._step = kernels.STEP[config.action]
        self._decide = kernels.DECIDE[config.action]
        self._with_slots = config.observation == "slots"
        expect_kernels(3 + self._with_slots + 2 * (config.action == "request"))  # start, observation, step, and more
        repeats_noise = self.engine.noisy and config.action_repeat > NOISE_BLOCK
        self._outside = config.backend != "simulated" or callable(config.reward) or repeats_noise

    def _backend(self) -> Any:
        if self.config.backend == "simulated":
            return None
        import importlib

        if self.config.model is None:
            raise ConfigError("model: expected a folder, a hub id or random:tiny with backend='transformers', got None")
        return importlib.import_module("llmsched_gym.real_backend").make_backend(self.config, self.config.model)

    def reset(self, env: int, seed: int, qps: float | None = None) -> None:
        """Start environment `env` on the requests of `seed`, which come at the mean rate `qps` if it is given."""
        table = make_table(self.config if qps is None else self.config.replace(qps=qps), seed)
        num_gaps = int(np.sum(table.output_tokens, dtype=np.int64)) - len(table) if self.config.episode_metrics else 0
        self.engine.reserve(len(table), num_gaps)
        self.engine.reset(table, env)
        self.tables[env], self.seeds[env], self.qps[env] = table, seed, table.qps
        install(None, self.engine.state, env, seed)
        self.reopen(env)
        self.arrays.outcomes[env] = 0.0
        self.arrays.outcomes[env, DISCOUNT] = 1.0
        self.observe(env)

    def reopen(self, env: int) -> None:
        """Start the batch that request actions fill next."""
        if self.config.action == "request":
            kernels.reopen_env(self.engine.handle, self.handle, env)

    def observe(self, env: int) -> None:
        kernels.observe_env(self.engine.handle, self.handle, env)
        self._observe_slots(env, env + 1)

    def _observe_slots(self, first: int, stop: int) -> None:
        if self._with_slots:
            kernels.observe_slots_of(self.engine.handle, self.handle, first, stop)

    def act(self, given: Any) -> None:
        """One decision of every environment that is not paused, by the actions `given`.

        Raises :class:`InvalidAction` for one outside the space; then none has stepped.
        """
        place = self._input
        if type(given) is np.ndarray and given.dtype is place.dtype and given.shape == self._shape:
            place[...] = given
        else:
            place[...] = as_array(self.config.action, given, self._shape)
        self._step_all(given)

    def step(self) -> None:
        """:meth:`act` by what ``self.actions`` holds."""
        self._step_all(self.actions)

    def _step_all(self, given: Any) -> None:
        if self._outside:
            check_range(self.config, self.actions, given, self.arrays.outcomes[:, PAUSED])
            for env in np.flatnonzero(self.arrays.outcomes[:, PAUSED] == 0.0).tolist():
                self._step_outside(env)
            return
        due = self._step(self.engine.handle, self.handle)
        if due == kernels.REFUSED:
            check_range(self.config, self.actions, given, self.arrays.outcomes[:, PAUSED])
        self._observe_slots(0, self.num_envs)
        if due and self.engine.noisy:
            sims = self.engine.state.sims
            for env in np.flatnonzero(sims["num_batches"] % NOISE_BLOCK < self.config.action_repeat).tolist():
                self.engine.refill_noise(env)

    def _step_outside(self, env: int) -> None:
        """The same decision with a backend or a reward that lives in Python, or over many blocks of noise."""
        engine, left = self.engine, self.config.action_repeat
        start_s = float(engine.state.sims[env].clock_s)
        resolved_before = int(engine.state.episodes[env].num_resolved)
        while left > 0:
            if self.config.action != "request" and self.config.backend == "simulated":
                left -= self._run(env, left)
            else:
                left -= 1
                if self.decide(env):
                    engine.execute(env)
                    self.reopen(env)
            if engine.is_over(env):
                break
        self.settle(env, start_s, resolved_before)

    def _run(self, env: int, most: int) -> int:
        """Up to `most` batches under the same action in compiled code; returns how many, fewer at a block of noise."""
        steps = int(kernels.RUN[self.config.action](self.engine.handle, self.handle, env, most, 1 << 62))
        if self.engine.noisy and self.engine.noise_due(env):
            self.engine.refill_noise(env)
        return steps

    def settle(self, env: int, start_s: float, resolved_before: int) -> None:
        """Reward and observation after engine steps made in Python."""
        kernels.settle(self.engine.handle, self.handle, env, start_s)
        self._observe_slots(env, env + 1)
        if callable(self.config.reward):
            self.arrays.outcomes[env, REWARD] = self.config.reward(self._transition(env, resolved_before))

    def _transition(self, env: int, resolved_before: int) -> Transition:
        state, world = self.engine.state, self.engine.state.worlds[env]
        resolved = state.resolved[env, resolved_before : state.episodes[env].num_resolved]
        resolved = resolved[(resolved >= world.cohort_start) & (resolved < world.cohort_stop)]
        return Transition(
            duration_s=float(self.arrays.outcomes[env, DURATION_S]),
            terms=self.terms(env),
            resolved=state.requests[env][resolved],
            view=self.engine.view(env),
        )

    def decide(self, env: int) -> bool:
        """Form the next batch of one environment; False while a request action leaves it open."""
        return bool(self._decide(self.engine.handle, self.handle, env))

    def terms(self, env: int) -> dict[str, float]:
        """Parts of the reward of the last step, unscaled."""
        return dict(zip(TERMS, self.arrays.outcomes[env, FIRST_TERM:].tolist(), strict=True))

    def metrics(self, env: int) -> dict[str, float]:
        """The figures of one environment's episode so far; see :func:`~llmsched_gym.env.episode.episode_metrics`."""
        table = self.tables[env]
        if table is None:
            return dict.fromkeys(METRICS, math.nan)
        return episode_metrics(self.engine.state, env, table, has_gaps=self.config.episode_metrics)

    def action_masks(self) -> np.ndarray:
        """Legal actions, bool; (num_envs, NUM_SLOTS + 1) for request actions, all true over the choices of knobs."""
        if self.config.action == "request":
            kernels.mask_requests(self.engine.handle, self.legal)
            return self.legal.copy()
        if self.config.action == "knobs":
            choices = sum(len(knob.values) for knob in knobs_for(self.config))
            return np.ones((self.num_envs, choices), np.bool_)
        raise AttributeError("action_masks: priority actions have no mask, every score is legal")

    def observation(self, env: int) -> Any:
        """A copy of one environment's observation."""
        if self._observe is not None:
            return self._observe(self.engine.view(env))
        if self.config.observation == "features":
            return self.arrays.features[env].copy()
        return {
            "slots": self.arrays.rows[env].copy(),
            "in_use": self.arrays.in_use[env].copy(),
            "features": self.arrays.features[env].copy(),
        }
