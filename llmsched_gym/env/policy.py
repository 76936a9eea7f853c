"""Bridges: any scheduler as an agent of the environment, and any agent as a scheduler of `evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llmsched_gym.config import EnvConfig
from llmsched_gym.engine import Engine
from llmsched_gym.env import kernels
from llmsched_gym.env.actions import as_array, check_range
from llmsched_gym.env.arrays import make_arrays
from llmsched_gym.env.knobs import CAP, KNOBS, LIMIT, knobs_action
from llmsched_gym.env.slots import NUM_SLOTS
from llmsched_gym.scheduler import Compiled, make_scheduler, pack_with_knobs


class SchedulerPolicy:
    """Step an environment as a scheduler would.

    >>> env = gym.make("LLMSched-v0", num_requests=100)
    >>> env.reset(seed=0)
    >>> policy = SchedulerPolicy(env, "slai")
    >>> observation, reward, terminated, truncated, info = policy.step()

    Args:
        env: a single environment, reset.
        scheduler: a name, or any scheduler object.
    """

    def __init__(self, env: Any, scheduler: str | Any = "slai") -> None:
        self.env = env.unwrapped
        self.scheduler = make_scheduler(scheduler) if isinstance(scheduler, str) else scheduler
        wanted = getattr(self.scheduler, "admission", None)
        if wanted is not None and wanted != self.env.config.admission:
            raise ValueError(f"admission: expected {wanted!r} for this scheduler, got {self.env.config.admission!r}")

    def step(self) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step of the environment with the scheduler's batch."""
        return self.env.step_scheduler(self.scheduler)

    def action(self) -> np.ndarray:
        """The knobs action that does what the scheduler does now; ValueError where the knobs cannot express it."""
        if not sets_knobs(self.scheduler):
            raise ValueError(f"{getattr(self.scheduler, 'name', self.scheduler)}: not a setting of the packing kernel")
        return knobs_now(self.scheduler, self.env.core.engine, 0, self.env.config)


def sets_knobs(scheduler: Any) -> bool:
    """Whether a scheduler is a setting of the packing kernel, fixed or planned for each batch."""
    return isinstance(scheduler, Compiled) and (scheduler.function is pack_with_knobs or scheduler.plan is not None)


def knobs_now(scheduler: Compiled, engine: Engine, env: int, config: EnvConfig) -> np.ndarray:
    """The knobs action that does what such a scheduler does now in environment `env`; int64 of shape (num_knobs,).

    A planned cap becomes the nearest of the knob, a limit the next larger. ValueError where no knob has the value.
    """
    state = engine.state
    settings = {name: scheduler.knobs[name].item() for name in scheduler.knobs.dtype.names or ()}
    if scheduler.plan is not None:
        before, knobs = state.batches[env].copy(), state.knobs[env].copy()
        scheduler.install(state, env)
        scheduler.plan(engine.handle, env)
        settings |= {name: state.batches[env][name].item() for name in ("order", "limit", "margin", "hold")}
        settings["cap"] = min(KNOBS[CAP].values, key=lambda v: abs(v - float(state.batches[env]["cap"])))
        settings["limit"] = min(v for v in KNOBS[LIMIT].values if v >= settings["limit"])
        state.batches[env], state.knobs[env] = before, knobs
    return knobs_action(settings, float(state.sims[env].kv_cache_usage), config)


class PolicyScheduler:
    """A function from observations to actions as a scheduler: it runs in ``simulate`` and ``evaluate``.

    Args:
        policy: called with one observation (not batched), and for request actions also the mask of legal actions;
            returns one action, checked as the environment checks it.
        config: the environment's configuration: action, observation, action_repeat and token budget are used.
        decision_s: seconds that one decision costs on the clock.
    """

    def __init__(self, policy: Callable[..., Any], config: EnvConfig | None = None, decision_s: float = 0.0) -> None:
        self.policy, self.config, self.decision_s = policy, config or EnvConfig(), decision_s
        self.admission = self.config.admission
        self._arrays, self._handle = make_arrays(self.config, 1)
        self._legal = np.zeros((1, NUM_SLOTS + 1), np.bool_)
        self._action: Any = None
        self._left = 0

    def reset(self, seed: int) -> None:
        self._left = 0

    def decide(self, engine: Engine, env: int = 0) -> None:
        """Form the next batch of environment `env` as the environment would under the policy's action."""
        if env != 0:
            raise ValueError(f"env: expected 0, got {env}")
        kind, handle = self.config.action, engine.handle
        if kind == "request":
            kernels.reopen_env(handle, self._handle, env)
            closed = False
            for _ in range(NUM_SLOTS + 1):
                kernels.mask_requests(handle, self._legal)
                self._put(self._arrays.slots, self.policy(self._observe(engine), self._legal[0].copy()))
                closed = bool(kernels.decide_request(handle, self._handle, env))
                if closed:
                    break
            if not closed:
                self._arrays.slots[0] = NUM_SLOTS
                kernels.decide_request(handle, self._handle, env)
            return
        self._act(engine)
        self._left -= 1
        decide = kernels.decide_knobs if kind == "knobs" else kernels.decide_priority
        decide(handle, self._handle, env)

    def run_steps(self, engine: Engine, max_steps: int, max_idle_steps: int) -> int:
        """Step environment 0 of the simulated engine under one action; returns the number of steps done, 1 or more.

        The same as deciding and executing one batch after the other, but the batches of an action run in compiled code.
        """
        if self.config.action == "request":
            engine.step(self)
            return 1
        self._act(engine)
        run = kernels.run_knobs if self.config.action == "knobs" else kernels.run_priority
        steps = int(run(engine.handle, self._handle, 0, min(self._left, max_steps), max_idle_steps))
        self._left -= steps
        return steps

    def _act(self, engine: Engine) -> None:
        """Put the action into the arrays: a new one if the last has been held for its number of batches."""
        if self._left == 0:
            self._action = self.policy(self._observe(engine))
            self._left = self.config.action_repeat
        self._put(self._arrays.knob_actions if self.config.action == "knobs" else self._arrays.scores, self._action)

    def _put(self, actions: np.ndarray, given: Any) -> None:
        """Check an action as the environment does, and put it where the kernels look for it."""
        actions[0] = as_array(self.config.action, given, actions.shape[1:])
        check_range(self.config, actions, given)

    def _observe(self, engine: Engine) -> Any:
        if hasattr(self.config.observation, "observe"):
            return self.config.observation.observe(engine.view(0))
        kernels.observe_env(engine.handle, self._handle, 0)
        arrays = self._arrays
        if self.config.observation == "features":
            return arrays.features[0].copy()
        return {
            "slots": arrays.rows[0].copy(),
            "in_use": arrays.in_use[0].copy(),
            "features": arrays.features[0].copy(),
        }
