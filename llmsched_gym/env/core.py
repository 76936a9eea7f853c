"""What the single and the vector environment share: an engine with agents' actions, rewards and observations on top."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array

from llmsched_gym.config import ConfigError, EnvConfig, RouteConfig
from llmsched_gym.engine import Engine
from llmsched_gym.engine.compiling import expect_kernels
from llmsched_gym.env import kernels
from llmsched_gym.env.actions import action_of, as_array, check_range
from llmsched_gym.env.arrays import DISCOUNT, DURATION_S, FIRST_TERM, PAUSED, REWARD, Arrays, handle_of
from llmsched_gym.env.batched import is_batched, observe_all, observe_one, pay_together
from llmsched_gym.env.episode import METRICS, episode_metrics
from llmsched_gym.env.features import features_of
from llmsched_gym.env.masked import mask_place, seen_with_masks
from llmsched_gym.env.observations import FEATURES_PART, PARTS, as_observation, observation_of, observation_space
from llmsched_gym.env.reward import TERMS, Transition, as_reward, rules_of
from llmsched_gym.env.saved import SavedCore
from llmsched_gym.scheduler import install
from llmsched_gym.workload import NOISE_BLOCK, RequestTable, make_table

ACTED_BY = ("action", "action_repeat", "token_budget", "admission", "allow_refusal", "prefix_caching")
"""Settings without which a model's actions mean something else."""


def action_space(config: EnvConfig) -> spaces.Space:
    """The space of one environment's actions; what is saved with it says what they mean, see `space_settings`."""
    space = action_of(config).space(config)
    settings = {name: getattr(config, name) for name in ACTED_BY}
    if isinstance(config.observation, str):
        settings["observation"] = config.observation
    if config.mask_in_observation is not None:
        settings["mask_in_observation"] = config.mask_in_observation
    vars(space)["llmsched"] = settings
    return space


def space_settings(space: spaces.Space) -> dict[str, Any]:
    """The settings of the environment that an action space was made for; empty where it carries none.

    Libraries save a model's spaces, and nothing else of its environment.
    """
    return dict(vars(space).get("llmsched", {}))


def make_arrays(config: EnvConfig, num_envs: int, num_features: int | None = None) -> Arrays:
    """Zeroed arrays for `num_envs` environments; those that their action or observation has no use for are empty.

    Steps always fill the features: the first `num_features`; None: those of the configuration's profile.
    """
    space, kind = action_of(config).space(config), observation_of(config)
    size, has_scores = math.prod(space.shape or ()), space.dtype is not None and space.dtype.kind == "f"
    seen = {FEATURES_PART, *(kind.parts.values() if kind is not None else ())}
    spaces_of = {part: part.space(config, num_features) for part in PARTS}
    return Arrays(
        choices=np.zeros((0 if has_scores else num_envs, size), np.int64),
        scores=np.zeros((num_envs if has_scores else 0, size), np.float32),
        rules=rules_of(config),
        outcomes=np.zeros((num_envs, FIRST_TERM + len(TERMS))),
        **{
            part.array: np.zeros((num_envs if part in seen else 0, *(of.shape or ())), of.dtype)
            for part, of in spaces_of.items()
        },
    )


def expected_requests(config: EnvConfig | RouteConfig) -> int:
    """Requests that an episode will hardly exceed; the arrays grow when one does."""
    rate = config.qps or config.qps_range[1]
    if config.num_requests is None:
        mean, extra = rate * config.horizon_s, config.max_backlog
    else:
        tail_s = min(config.drain_s, 600.0) if config.arrivals_continue else 0.0
        mean, extra = rate * (config.warmup_s + tail_s), config.num_requests
    spread = 1.0 / math.sqrt(min(1.0, config.burstiness))
    return int(mean + 6.0 * spread * math.sqrt(mean + 1.0)) + extra + 16


def actions_in(arrays: Arrays, space: spaces.Space) -> np.ndarray:
    """Where the kernels look for the actions of a space; (num_envs, *shape of the space)."""
    array = arrays.scores if len(arrays.scores) else arrays.choices
    return array.reshape(len(array), *(space.shape or ()))


class EnvCore(SavedCore):
    """Engine, arrays and bookkeeping of `num_envs` environments; all step kernels run over all of them at once.

    Without `num_envs` there is one, whose actions have no axis of environments. `num_threads` share the environments of
    a step among them.
    """

    def __init__(self, config: EnvConfig, num_envs: int | None = None, num_threads: int = 1) -> None:
        if config.backend != "simulated" and (num_envs or 1) != 1:
            raise ConfigError(f"backend: expected 'simulated' for {num_envs} environments, got {config.backend!r}")
        make_table(config, 0)  # a bad workload, trace or rate fails here and not at the first reset
        self.config, self.num_envs = config, num_envs or 1
        self.action_space, self._seen_space = action_space(config), observation_space(config)
        self.observation_space = seen_with_masks(config, self._seen_space, self.action_space)
        self.engine = Engine(
            config,
            expected_requests(config),
            num_envs=self.num_envs,
            backend=self._backend(),
            num_gaps=int(config.episode_metrics),  # reset makes room
        )
        self._space_of_all = batch_space(self._seen_space, self.num_envs)
        self.arrays, self._is_single = make_arrays(config, self.num_envs), num_envs is None
        self.tables: list[RequestTable | None] = [None] * self.num_envs
        self.seeds = np.zeros(self.num_envs, np.int64)
        self.qps = np.full(self.num_envs, math.nan)  # true rates, for logs
        self._connect()
        expected = self._fill, self.kind.mask, self.kind.reopen
        expect_kernels(3 + sum(kernel is not None for kernel in expected))  # start, observation, step, and more
        repeats_noise = self.engine.noisy and config.action_repeat > NOISE_BLOCK
        self.num_threads = min(num_threads, self.num_envs)
        self._start_threads()
        self._pays_together = is_batched(config.reward)
        pays_alone = callable(config.reward) and not self._pays_together
        self._outside = config.backend != "simulated" or pays_alone or repeats_noise

    _derived = (
        *("kind", "seen", "has_masks", "handle", "actions", "_input", "_shape", "_fill", "_read"),
        *("_masks", "_mask_place", "_watchers"),
    )

    def _connect(self) -> None:
        super()._connect()
        self.kind, self.seen = action_of(self.config), observation_of(self.config)
        self.has_masks = self.kind.has_masks
        self.handle = handle_of(self.arrays)
        self.actions = actions_in(self.arrays, self.action_space)
        self._input = self.actions.reshape(self.actions.shape[1:]) if self._is_single else self.actions
        self._shape = self._input.shape
        self._fill = self.seen.fill if self.seen is not None else None
        self._read = self.seen.reader(self.arrays) if self.seen is not None else self._seen_by_user
        self._masks: np.ndarray | None = None  # made when they are asked for
        self._mask_place = mask_place(self.config)
        self._watchers: dict[int, Callable[[], None]] = {}  # by environment; told of its batches

    def _backend(self) -> Any:
        if self.config.backend == "simulated":
            return None
        import importlib

        if self.config.model is None:
            what = f"expected a folder, a hub id or random:tiny with backend={self.config.backend!r}"
            raise ConfigError(f"model: {what}, got None")
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
        """Start the batch that actions fill next, item by item."""
        if self.kind.reopen is not None:
            self.kind.reopen(self.engine.handle, self.handle, env)

    def observe(self, env: int) -> None:
        """Fill the observation arrays of environment `env`."""
        kernels.observe_env(self.engine.handle, self.handle, env)
        self._observe_more(env, env + 1)

    def _observe_more(self, first: int, stop: int) -> None:
        if self._fill is not None:
            self._fill(self.engine.handle, self.handle, first, stop)

    def act(self, given: Any) -> None:
        """One decision of every environment that is not paused, by the actions `given`.

        Raises :class:`InvalidAction` for one outside the space; then none has stepped.
        """
        place = self._input
        if type(given) is np.ndarray and given.dtype is place.dtype and given.shape == self._shape:
            place[...] = given
        else:
            place[...] = as_array(self.action_space, given, self._shape)
        self._step_all(given)

    def step(self) -> None:
        """:meth:`act` by what ``self.actions`` holds."""
        self._step_all(self.actions)

    def _step_all(self, given: Any) -> None:
        if self._outside:
            check_range(self.kind, self.config, self.actions, given, self.arrays.outcomes[:, PAUSED])
            for env in np.flatnonzero(self.arrays.outcomes[:, PAUSED] == 0.0).tolist():
                self._step_outside(env)
            return
        resolved_before = self.engine.state.episodes["num_resolved"].copy() if self._pays_together else None
        due = self._step_range(0, self.num_envs) if self._threads is None else self._step_in_threads(self._threads)
        if due < 0:
            check_range(self.kind, self.config, self.actions, given, self.arrays.outcomes[:, PAUSED])
        if due and self.engine.noisy:
            sims = self.engine.state.sims
            for env in np.flatnonzero(sims["num_batches"] % NOISE_BLOCK < self.config.action_repeat).tolist():
                self.engine.refill_noise(env)
        if resolved_before is not None:
            pay_together(self.config.reward, self.engine.state, self.arrays, 0, self.num_envs, resolved_before)
        for watcher in self._watchers.values():
            watcher()

    def _step_range(self, first: int, stop: int) -> int:
        """Step environments first, ..., stop - 1; returns what the kernel does."""
        due: int = self.kind.step(self.engine.handle, self.handle, first, stop)
        if due != kernels.REFUSED:
            self._observe_more(first, stop)
        return due

    def _step_in_threads(self, threads: ThreadPoolExecutor) -> int:
        """Each thread, this one among them, steps as many environments; what they do does not depend on the others."""
        edges = np.linspace(0, self.num_envs, self.num_threads + 1).astype(int).tolist()
        others = [threads.submit(self._step_range, *edge) for edge in itertools.pairwise(edges[1:])]
        due = self._step_range(0, edges[1])
        return due + sum(other.result() for other in others)

    @property
    def feature_names(self) -> list[str]:
        """Names of the entries of the features observation."""
        return [feature.name for feature in features_of(self.config)]

    def watch(self, env: int, watcher: Callable[[], None]) -> None:
        """Call `watcher` after each batch of environment `env`: those of a held action are run one by one then."""
        self._watchers[env] = watcher
        self._outside = self._outside or self.config.action_repeat > 1

    def noticed(self, env: int) -> None:
        """Tell who watches environment `env` of a batch."""
        if env in self._watchers:
            self._watchers[env]()

    def make_viewer(self, env: int) -> Any:
        """What draws environment `env`."""
        from llmsched_gym.env.render import Viewer

        return Viewer(self, env=env)

    def close(self) -> None:
        """End the threads; the environments can still be stepped, by one."""
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None

    def _step_outside(self, env: int) -> None:
        """The same decision with a backend or a reward that lives in Python, or over many blocks of noise."""
        engine, left = self.engine, self.config.action_repeat
        start_s = float(engine.state.sims[env].clock_s)
        resolved_before = int(engine.state.episodes[env].num_resolved)
        while left > 0:
            if self.kind.run is not None and self.config.backend == "simulated":
                left -= self._run(env, 1 if env in self._watchers else left)
            else:
                left -= 1
                if self.decide(env):
                    engine.execute(env)
                    self.reopen(env)
            self.noticed(env)
            if engine.is_over(env):
                break
        self.settle(env, start_s, resolved_before)

    def _run(self, env: int, most: int) -> int:
        """Up to `most` batches under the same action in compiled code; returns how many, fewer at a block of noise."""
        steps = int(self.kind.run(self.engine.handle, self.handle, env, most, 1 << 62))
        if self.engine.noisy and self.engine.noise_due(env):
            self.engine.refill_noise(env)
        return steps

    def settle(self, env: int, start_s: float, resolved_before: int) -> None:
        """Reward and observation after engine steps made in Python."""
        kernels.settle(self.engine.handle, self.handle, env, start_s)
        self._observe_more(env, env + 1)
        if self._pays_together:
            before = np.array([resolved_before])
            pay_together(self.config.reward, self.engine.state, self.arrays, env, env + 1, before)
        elif callable(self.config.reward):
            paid = self.config.reward(self._transition(env, resolved_before))
            self.arrays.outcomes[env, REWARD] = as_reward(paid)

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
        """Form the next batch of one environment; False while an action leaves it open."""
        return bool(self.kind.decide(self.engine.handle, self.handle, env))

    def terms(self, env: int) -> dict[str, float]:
        """Parts of the reward of the last step, unscaled."""
        return dict(zip(TERMS, self.arrays.outcomes[env, FIRST_TERM:].tolist(), strict=True))

    def metrics(self, env: int) -> dict[str, float]:
        """The figures of one environment's episode so far; see :func:`~llmsched_gym.env.episode.episode_metrics`."""
        table = self.tables[env]
        if table is None:
            return dict.fromkeys(METRICS, math.nan)
        state, sim = self.engine.state, self.engine.state.sims[env]
        told = float(sim.clock_s), int(sim.tokens_emitted)
        return episode_metrics(state, env, table, *told, has_gaps=self.config.episode_metrics)

    def action_masks(self) -> np.ndarray:
        """Legal actions, bool; (num_envs, number of single actions): of a Discrete space, of all knobs together."""
        if self._masks is None:
            self._masks = self.kind.all_legal(self.config, self.num_envs)
        if self.kind.mask is not None:
            self.kind.mask(self.engine.handle, self._masks)
        return self._masks.copy()

    def observation(self, env: int) -> Any:
        """A copy of one environment's observation."""
        seen = self._read(env)
        return seen if self._mask_place is None else self._mask_place.put(seen, self.action_masks()[env])

    def observations(self) -> Any:
        """Copies of all, side by side."""
        seen = self._read(...)
        return seen if self._mask_place is None else self._mask_place.put(seen, self.action_masks())

    def _seen_by_user(self, where: Any) -> Any:
        """What an object of the user's makes of the state."""
        observation, state = self.config.observation, self.engine.state
        if where is not ...:
            if is_batched(observation.observe):
                return observe_one(observation, state, self.arrays, where)
            return as_observation(self._seen_space, observation.observe(self.engine.view(where)))
        if is_batched(observation.observe):
            return observe_all(observation, self._space_of_all, state, self.arrays)
        views = [self._seen_by_user(env) for env in range(self.num_envs)]
        out: Any = create_empty_array(self._seen_space, self.num_envs)
        return concatenate(self._seen_space, views, out)
