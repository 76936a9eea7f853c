"""Bridges: any scheduler as an agent of the environment, and any agent as a scheduler of `evaluate`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from llmsched_gym.config import ConfigError, EnvConfig
from llmsched_gym.engine import Engine
from llmsched_gym.env import kernels
from llmsched_gym.env.actions import action_of, as_array, check_range
from llmsched_gym.env.actions.knobs import ACTION as KNOBS_ACTION
from llmsched_gym.env.actions.knobs import CAP, KNOBS, LIMIT, TOKEN_BUDGET, knobs_action
from llmsched_gym.env.actions.preset import ACTION as PRESET_ACTION
from llmsched_gym.env.actions.preset import preset_action
from llmsched_gym.env.arrays import handle_of
from llmsched_gym.env.batched import is_batched, observe_one
from llmsched_gym.env.core import actions_in, make_arrays
from llmsched_gym.env.masked import mask_length, mask_place
from llmsched_gym.env.observations import as_observation, observation_of
from llmsched_gym.scheduler import Compiled, make_scheduler, pack_with_knobs, settings_of


class SchedulerAction(np.ndarray):
    """A member of the action space that a single environment answers with the scheduler's own batches.

    As an ordinary array (``np.array(action)``, what a data set keeps) it is the nearest action that the space has.
    """

    scheduler: Any = None


class SchedulerPolicy:
    """Step an environment as a scheduler would, wrappers and all.

    >>> env = gym.make("LLMSched-v0", num_requests=100)
    >>> env.reset(seed=0)
    >>> policy = SchedulerPolicy(env, "slai")
    >>> observation, reward, terminated, truncated, info = policy.step()
    >>> observation, reward, terminated, truncated, info = env.step(policy.action())  # the same

    Args:
        env: a single environment, reset; wrapped or not.
        scheduler: a name, a policy folder, or any scheduler object.

    Raises:
        ConfigError: `env` is no single LLMSched environment, or of another admission rule than the scheduler's.
    """

    def __init__(self, env: Any, scheduler: str | Any = "slai") -> None:
        self.env, self._base = env, env.unwrapped
        if not hasattr(self._base, "step_scheduler"):
            what = type(self._base).__name__
            raise ConfigError(f"env: expected a single LLMSched environment, wrapped or not, got {what}")
        self.scheduler = make_scheduler(scheduler) if isinstance(scheduler, str) else scheduler
        self.name = scheduler if isinstance(scheduler, str) else type(scheduler).__name__
        wanted = getattr(self.scheduler, "admission", None)
        if wanted is not None and wanted != self._base.config.admission:
            raise ConfigError(f"admission: expected {wanted!r} for {self.name}, got {self._base.config.admission!r}")
        self._table: Any = None  # of the episode that a policy was last asked in

    def step(self) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step of the environment with the scheduler's batches, `action_repeat` of them (for request actions: one).

        Wrappers see :meth:`action` where there is one, else some member of their action space.
        """
        if self.env is self._base:
            return self._base.step_scheduler(self.scheduler)
        try:
            action = self.action()
        except ConfigError:
            action = self._any_action
        self._base.decide_by(self.scheduler)
        return self.env.step(action)

    @cached_property
    def _any_action(self) -> Any:
        space = copy.deepcopy(self.env.action_space)  # the environment's own draws stay as they are
        space.seed(0)
        return space.sample()

    def action(self) -> Any:
        """The action that does what the scheduler does now: what :meth:`step` does, for ``env.step``, a log, a student.

        Knobs actions are int64 of shape (num_knobs,): settings of the packing kernel (`slai`, `on-time`, constants) and
        policies with knobs have them, the dynamic offset taken as it is now, a planned cap or limit as the nearest.
        Priority and request actions are those of a policy with such actions; a request action adds one request, or
        closes the batch. Stepped with as they are, knobs and priorities give exactly the scheduler's batches.

        Raises:
            ConfigError: one line that says why the action space cannot express it.
        """
        config = self._base.config
        if self.env.action_space != self._base.action_space:
            raise ConfigError(f"{self.name}: wrappers change the action space, which step() does not depend on")
        engine = self._base.core.engine
        try:
            if isinstance(self.scheduler, PolicyScheduler):
                if self._table is not self._base.core.tables[0]:
                    self._table = self._base.core.tables[0]
                    self.scheduler.reset(0 if self._table is None else self._table.seed)
                action = self.scheduler.action_now(engine, config)
                if self.scheduler.kind.by_item:  # no batch of its own
                    return action
            elif not sets_knobs(self.scheduler):
                raise ValueError("neither a setting of the packing kernel nor a policy")
            else:
                action = knobs_now(self.scheduler, engine, 0, config)
        except ValueError as error:
            raise ConfigError(f"{self.name}: no action of this environment does what it does: {error}") from None
        carried = np.asarray(action).view(SchedulerAction)
        carried.scheduler = self.scheduler
        return carried


def sets_knobs(scheduler: Any) -> bool:
    """Whether a scheduler is a setting of the packing kernel, fixed or planned for each batch."""
    return isinstance(scheduler, Compiled) and (scheduler.function is pack_with_knobs or scheduler.plan is not None)


def knobs_now(scheduler: Compiled, engine: Engine, env: int, config: EnvConfig) -> np.ndarray:
    """The knobs action that does what such a scheduler does now in environment `env`; int64 of shape (num_knobs,).

    In an environment of presets the one that it is, of shape ().
    A planned cap becomes the nearest of the knob, a limit the next larger, a larger room for tokens the next smaller.
    ValueError where no knob has the value.
    """
    if config.action == PRESET_ACTION.name and scheduler.plan is None:
        return preset_action(settings_of(scheduler.knobs))
    if config.action != KNOBS_ACTION.name:
        raise ValueError(f"it sets knobs, and the environment has {config.action} actions")
    state = engine.state
    settings = settings_of(scheduler.knobs)
    if scheduler.plan is not None:
        before, knobs = state.batches[env].copy(), state.knobs[env].copy()
        scheduler.install(state, env)
        scheduler.plan(engine.handle, env)
        settings |= {name: state.batches[env][name].item() for name in ("order", "limit", "margin", "hold")}
        settings["cap"] = min(KNOBS[CAP].values, key=lambda v: abs(v - float(state.batches[env]["cap"])))
        room = state.batches[env]["token_room"]
        if room > settings["token_budget"]:
            settings["token_budget"] = max(v for v in KNOBS[TOKEN_BUDGET].values if v <= room)
        settings["limit"] = min(v for v in KNOBS[LIMIT].values if v >= settings["limit"])
        state.batches[env], state.knobs[env] = before, knobs
    return knobs_action(settings, float(state.sims[env].kv_cache_usage), config)


class PolicyScheduler:
    """A function from observations to actions as a scheduler: it runs in ``simulate`` and ``evaluate``.

    Args:
        policy: called with one observation (not batched), and for request actions also the mask of legal actions;
            returns one action, checked as the environment checks it. With a method ``reset()`` it is told of each run.
        config: the environment's configuration: action, observation, action_repeat and token budget are used.
        decision_s: seconds that one decision costs on the clock.
        num_features: how many of the features it sees, on any profile; None: those of the configuration's.
    """

    def __init__(
        self,
        policy: Callable[..., Any],
        config: EnvConfig | None = None,
        decision_s: float = 0.0,
        num_features: int | None = None,
    ) -> None:
        self.policy, self.config, self.decision_s = policy, config or EnvConfig(), decision_s
        self.admission = self.config.admission
        self.kind, self._seen = action_of(self.config), observation_of(self.config)
        self._space, self._num_features = self.kind.space(self.config), num_features
        if self.config.mask_in_observation is not None:
            mask_length(self.config, self._space)  # refuses actions without masks
        self.stand_at(0, 1)
        self._action: Any = None
        self._left = 0
        self._asked: Any = None  # when and where `action_now` was asked for an action that no batch has used yet

    def stand_at(self, lane: int, num_lanes: int) -> None:
        """Decide for that lane of so many: 0 of 1 is an engine's own, others are replicas of a cluster."""
        self._lane, self._num_lanes = lane, num_lanes
        self._arrays = make_arrays(self.config, num_lanes, self._num_features)
        self._handle = handle_of(self._arrays)
        self._actions = actions_in(self._arrays, self._space)
        self._read = self._seen.reader(self._arrays) if self._seen is not None else None
        self._masks = np.zeros((1, 0), np.bool_)
        self._mask_place = mask_place(self.config)
        if self.kind.by_item or self._mask_place is not None:
            self._masks = self.kind.all_legal(self.config, num_lanes)

    def __getstate__(self) -> dict[str, Any]:
        arrays = ("kind", "_seen", "_arrays", "_handle", "_actions", "_read", "_masks", "_mask_place")
        return {name: value for name, value in vars(self).items() if name not in arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.kind, self._seen = action_of(self.config), observation_of(self.config)
        self.stand_at(self._lane, self._num_lanes)

    def reset(self, seed: int) -> None:
        """Forget held actions; tells the policy of the new run."""
        self._left, self._asked = 0, None
        if hasattr(self.policy, "reset"):
            self.policy.reset()

    def action_now(self, engine: Engine, config: EnvConfig) -> Any:
        """The action that the policy takes now in environment 0, as environments of `config` take it.

        An action that the policy is holding for several batches is held. ValueError where `config` has no such action.
        """
        kind = self.kind
        if kind.name != config.action:
            raise ValueError(f"it takes {kind.name} actions, and the environment has {config.action} actions")
        if kind.has_budget and self.config.token_budget != config.token_budget:
            budgets = f"{self.config.token_budget}, and the environment's is {config.token_budget}"
            raise ValueError(f"its token_budget is {budgets}")
        if kind.by_item:
            return int(self.policy(self._observe(engine), self._mask(engine)))
        sim = engine.state.sims[0]
        now = float(sim.clock_s), int(sim.num_batches)
        if self._asked not in (None, now):
            self._left = 0
        self._asked = now
        self._act(engine)
        action = np.array(self._action)
        return action if kind.adapt is None else kind.adapt(action, self.config, config)

    def _mask(self, engine: Engine) -> np.ndarray:
        """Which actions are legal now; (number of actions,) bool."""
        if self.kind.mask is not None:
            self.kind.mask(engine.handle, self._masks)
        return self._masks[self._lane].copy()

    def decide(self, engine: Engine, env: int = 0) -> None:
        """Form the next batch of lane `env`, where it stands, as the environment would under the policy's action."""
        if env != self._lane:
            raise ValueError(f"env: expected {self._lane}, got {env}")
        kind, handle = self.kind, engine.handle
        if not kind.by_item:
            self._act(engine)
            self._left, self._asked = self._left - 1, None
            kind.decide(handle, self._handle, env)
            return
        kind.reopen(handle, self._handle, env)
        last = self._masks.shape[1] - 1  # closes
        for _ in range(last + 1):
            self._put(self.policy(self._observe(engine), self._mask(engine)))
            if kind.decide(handle, self._handle, env):
                return
        self._put(last)
        kind.decide(handle, self._handle, env)

    def run_steps(self, engine: Engine, max_steps: int, max_idle_steps: int) -> int:
        """Step environment 0 of the simulated engine under one action; returns the number of steps done, 1 or more.

        The same as deciding and executing one batch after the other, but the batches of an action run in compiled code.
        """
        if self.kind.run is None:
            engine.step(self)
            return 1
        self._act(engine)
        steps = int(self.kind.run(engine.handle, self._handle, 0, min(self._left, max_steps), max_idle_steps))
        self._left -= steps
        return steps

    def _act(self, engine: Engine) -> None:
        """Put the action into the arrays: a new one if the last has been held for its number of batches."""
        if self._left == 0:
            self._action = self.policy(self._observe(engine))
            self._left = self.config.action_repeat
        self._put(self._action)

    def _put(self, given: Any) -> None:
        """Check an action as the environment does, and put it where the kernels look for it."""
        self._actions[self._lane] = as_array(self._space, given, self._actions.shape[1:])
        check_range(self.kind, self.config, self._actions, given)

    def _seen_by_user(self, engine: Engine) -> Any:
        observation = self.config.observation
        if not is_batched(observation.observe):
            return as_observation(observation.space, observation.observe(engine.view(self._lane)))
        if len(engine.state.sims) > len(engine.state.episodes):
            raise ConfigError("observation: one marked as batched is of environments, and this is a replica of one")
        kernels.observe_env(engine.handle, self._handle, self._lane)
        return observe_one(observation, engine.state, self._arrays, self._lane)

    def _observe(self, engine: Engine) -> Any:
        seen = self._see(engine)
        return seen if self._mask_place is None else self._mask_place.put(seen, self._mask(engine))

    def _see(self, engine: Engine) -> Any:
        if self._seen is None or self._read is None:
            return self._seen_by_user(engine)
        kernels.observe_env(engine.handle, self._handle, self._lane)
        if self._seen.fill is not None:
            self._seen.fill(engine.handle, self._handle, self._lane, self._lane + 1)
        return self._read(self._lane)
