"""What the single and the vector environment share: an engine with agents' actions, rewards and observations on top."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gymnasium import spaces

from llmsched_gym.config import ConfigError, EnvConfig
from llmsched_gym.engine import Engine
from llmsched_gym.env import kernels
from llmsched_gym.env.arrays import DURATION_S, FIRST_TERM, REWARD, make_arrays
from llmsched_gym.env.features import FEATURES
from llmsched_gym.env.knobs import knobs_for
from llmsched_gym.env.reward import TERMS, Transition
from llmsched_gym.env.slots import NUM_SLOTS, SLOT_FEATURES
from llmsched_gym.scheduler import install
from llmsched_gym.workload import NOISE_BLOCK, RequestTable, make_table


def action_space(config: EnvConfig) -> spaces.Space:
    """The space of one environment's actions."""
    if config.action == "knobs":
        return spaces.MultiDiscrete([len(knob.values) for knob in knobs_for(config)])
    if config.action == "priority":
        return spaces.Box(-1.0, 1.0, (NUM_SLOTS,), np.float32)
    return spaces.Discrete(NUM_SLOTS + 1)


def features_space() -> spaces.Box:
    low = np.array([f.low for f in FEATURES], np.float32)
    high = np.array([f.high for f in FEATURES], np.float32)
    return spaces.Box(low, high, dtype=np.float32)


def observation_space(config: EnvConfig) -> spaces.Space:
    """The space of one environment's observations."""
    if hasattr(config.observation, "observe"):
        return config.observation.space
    if config.observation == "features":
        return features_space()
    low = np.tile(np.array([f.low for f in SLOT_FEATURES], np.float32), (NUM_SLOTS, 1))
    high = np.tile(np.array([f.high for f in SLOT_FEATURES], np.float32), (NUM_SLOTS, 1))
    return spaces.Dict(
        {
            "slots": spaces.Box(low, high, dtype=np.float32),
            "mask": spaces.MultiBinary(NUM_SLOTS),
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


class EnvCore:
    """Engine, arrays and bookkeeping of `num_envs` environments; all step kernels run over all of them at once."""

    def __init__(self, config: EnvConfig, num_envs: int) -> None:
        if config.backend == "transformers" and num_envs != 1:
            raise ConfigError(f"backend: expected 'simulated' for {num_envs} environments, got 'transformers'")
        self.config, self.num_envs = config, num_envs
        self.action_space, self.observation_space = action_space(config), observation_space(config)
        self.engine = Engine(config, expected_requests(config), num_envs=num_envs, backend=self._backend())
        self.arrays, self.handle = make_arrays(config, num_envs)
        self.actions = {
            "knobs": self.arrays.knob_actions,
            "priority": self.arrays.scores,
            "request": self.arrays.slots,
        }[config.action]
        self.legal = np.ones((num_envs, NUM_SLOTS + 1), np.bool_)
        self.tables: list[RequestTable | None] = [None] * num_envs
        self._step = {
            "knobs": kernels.step_knobs,
            "priority": kernels.step_priority,
            "request": kernels.step_request,
        }[config.action]
        self._outside = config.backend != "simulated" or callable(config.reward)

    def _backend(self) -> Any:
        if self.config.backend == "simulated":
            return None
        import importlib

        if self.config.model is None:
            raise ConfigError("model: expected a folder, a hub id or random:tiny with backend='transformers', got None")
        return importlib.import_module("llmsched_gym.real_backend").make_backend(self.config, self.config.model)

    def reset(self, env: int, seed: int) -> None:
        """Start environment `env` on the requests of `seed`."""
        table = make_table(self.config, seed)
        self.engine.reserve(len(table))
        self.engine.reset(table, env)
        self.tables[env] = table
        install(None, self.engine.state, env, seed)
        self.reopen(env)
        self.observe(env)

    def reopen(self, env: int) -> None:
        """Start the batch that request actions fill next."""
        if self.config.action == "request":
            kernels.reopen_env(self.engine.handle, self.handle, env)

    def observe(self, env: int) -> None:
        kernels.observe_env(self.engine.handle, self.handle, env)

    def step(self) -> None:
        """One decision of every environment, taken from ``self.actions``."""
        if self._outside:
            for env in range(self.num_envs):
                self._step_outside(env)
            return
        if self._step(self.engine.handle, self.handle) and self.engine.noisy:
            sims = self.engine.state.sims
            for env in np.flatnonzero(sims["num_batches"] % NOISE_BLOCK < self.config.action_repeat).tolist():
                self.engine.refill_noise(env)

    def _step_outside(self, env: int) -> None:
        """The same decision with a backend or a reward that lives in Python."""
        engine = self.engine
        start_s = float(engine.state.sims[env].clock_s)
        resolved_before = int(engine.state.sims[env].num_resolved)
        closed = True
        for _ in range(self.config.action_repeat):
            closed = self.decide(env, self.actions[env])
            if closed:
                engine.execute(env)
                if self.config.action == "request":
                    kernels.reopen_env(engine.handle, self.handle, env)
            if engine.is_over(env):
                break
        self.settle(env, start_s, resolved_before)

    def settle(self, env: int, start_s: float, resolved_before: int) -> None:
        """Reward and observation after engine steps made in Python."""
        kernels.settle(self.engine.handle, self.handle, env, start_s)
        if callable(self.config.reward):
            self.arrays.outcomes[env, REWARD] = self.config.reward(self._transition(env, resolved_before))

    def _transition(self, env: int, resolved_before: int) -> Transition:
        state, world = self.engine.state, self.engine.state.worlds[env]
        resolved = state.resolved[env, resolved_before : state.sims[env].num_resolved]
        resolved = resolved[(resolved >= world.cohort_start) & (resolved < world.cohort_stop)]
        return Transition(
            duration_s=float(self.arrays.outcomes[env, DURATION_S]),
            terms=self.terms(env),
            resolved=state.requests[env][resolved],
            view=self.engine.view(env),
        )

    def decide(self, env: int, action: Any) -> bool:
        """Form the next batch of one environment; False while a request action leaves it open."""
        self.actions[env] = action
        if self.config.action == "request":
            return bool(kernels.decide_request(self.engine.handle, self.handle, env))
        decide = kernels.decide_knobs if self.config.action == "knobs" else kernels.decide_priority
        decide(self.engine.handle, self.handle, env)
        return True

    def terms(self, env: int) -> dict[str, float]:
        """Parts of the reward of the last step, unscaled."""
        return dict(zip(TERMS, self.arrays.outcomes[env, FIRST_TERM:].tolist(), strict=True))

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
        if hasattr(self.config.observation, "observe"):
            return self.config.observation.observe(self.engine.view(env))
        if self.config.observation == "features":
            return self.arrays.features[env].copy()
        return {
            "slots": self.arrays.rows[env].copy(),
            "mask": self.arrays.masks[env].copy(),
            "features": self.arrays.features[env].copy(),
        }
