"""What the single and the vector routing environment share: clusters with an agent's actions and rewards on top."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import concatenate, create_empty_array

from llmsched_gym.cluster import Cluster
from llmsched_gym.cluster.events import MORE, NOTHING, OVER, ROUTE
from llmsched_gym.config import ConfigError, RouteConfig
from llmsched_gym.engine.compiling import expect_kernels
from llmsched_gym.engine.core import MAX_IDLE_STEPS
from llmsched_gym.env.actions import InvalidAction, as_array
from llmsched_gym.env.arrays import DISCOUNT, FIRST_TERM, REWARD
from llmsched_gym.env.batched import refuse_batched
from llmsched_gym.env.core import expected_requests
from llmsched_gym.env.episode import METRICS, episode_metrics
from llmsched_gym.env.masked import mask_place, seen_with_masks
from llmsched_gym.env.observations import as_observation
from llmsched_gym.env.reward import TERMS, Transition, as_reward, rules_of
from llmsched_gym.env.route import kernels
from llmsched_gym.env.route.features import REPLICA_FEATURES, REQUEST_FEATURES, bounds, route_features
from llmsched_gym.env.saved import SavedCore
from llmsched_gym.workload import RequestTable, make_table

EVENTS = 1 << 20  # of one step of the compiled loop


def route_space(config: RouteConfig) -> spaces.Discrete:
    """The space of actions: the replica, Discrete(num_replicas)."""
    return spaces.Discrete(config.num_replicas)


def route_observation_space(config: RouteConfig) -> spaces.Space:
    """Box of float32 (entries of :func:`route_features`,), a Dict of two, or the space of a user's object."""
    if not isinstance(config.observation, str):
        space = getattr(config.observation, "space", None)
        if not isinstance(space, spaces.Space):
            raise ConfigError(f"observation: expected an object with a gymnasium space in `space`, got {space!r}")
        return space
    if config.observation == "features":
        return spaces.Box(*bounds(route_features(config.num_replicas)), dtype=np.float32)
    low, high = (np.tile(bound, (config.num_replicas, 1)) for bound in bounds(REPLICA_FEATURES))
    return spaces.Dict(
        {
            "request": spaces.Box(*bounds(REQUEST_FEATURES), dtype=np.float32),
            "replicas": spaces.Box(low, high, dtype=np.float32),
        }
    )


class RouteCore(SavedCore):
    """Clusters, arrays and bookkeeping of `num_envs` environments; see :class:`llmsched_gym.env.core.EnvCore`."""

    def __init__(self, config: RouteConfig, num_envs: int | None = None, num_threads: int = 1) -> None:
        refuse_batched(config)
        make_table(config, 0)  # a bad workload, trace or rate fails here and not at the first reset
        self.config, self.num_envs = config, num_envs or 1
        self.action_space, self._seen_space = route_space(config), route_observation_space(config)
        self.observation_space = seen_with_masks(config, self._seen_space, self.action_space)
        self.cluster = Cluster(
            config,
            expected_requests(config),
            num_envs=self.num_envs,
            num_gaps=int(config.episode_metrics),  # reset makes room
        )
        n = config.num_replicas
        self.arrays = kernels.RouteArrays(
            choices=np.zeros(self.num_envs, np.int64),
            rules=rules_of(config),
            outcomes=np.zeros((self.num_envs, FIRST_TERM + len(TERMS))),
            asked=np.zeros((self.num_envs, len(REQUEST_FEATURES)), np.float32),
            rows=np.zeros((self.num_envs, n, len(REPLICA_FEATURES)), np.float32),
            start_s=np.zeros(self.num_envs),
            codes=np.zeros(self.num_envs, np.int64),
            resolved=np.zeros(self.num_envs, np.int64),
        )
        self._connect()
        self.tables: list[RequestTable | None] = [None] * self.num_envs
        self.seeds = np.zeros(self.num_envs, np.int64)
        self.qps = np.full(self.num_envs, math.nan)  # true rates, for logs
        self._shape = self.arrays.choices.shape if num_envs else ()
        self.num_threads = min(num_threads, self.num_envs)
        self._start_threads()
        expect_kernels(5)  # start, send, the loop, the step and what it settles

    has_masks = True
    _derived = ("handle", "_mask_place")

    def _connect(self) -> None:
        super()._connect()
        self.handle = kernels.handle_of(self.arrays)
        self._mask_place = mask_place(self.config)

    @property
    def engine(self) -> Cluster:  # type: ignore[override]
        """What holds the state."""
        return self.cluster

    @property
    def feature_names(self) -> list[str]:
        """Names of the entries of the features observation."""
        return [feature.name for feature in route_features(self.config.num_replicas)]

    def watch(self, env: int, watcher: Any) -> None:
        """Its pictures have no history: nobody is told of batches."""

    def make_viewer(self, env: int) -> Any:
        """What draws environment `env`."""
        from llmsched_gym.env.route.render import RouteViewer

        return RouteViewer(self, env)

    def reset(self, env: int, seed: int, qps: float | None = None) -> None:
        """Start environment `env` on the requests of `seed`, and run to the first decision."""
        table = make_table(self.config if qps is None else self.config.replace(qps=qps), seed)
        num_gaps = int(np.sum(table.output_tokens, dtype=np.int64)) - len(table) if self.config.episode_metrics else 0
        self.cluster.reserve(len(table), num_gaps)
        self.cluster.reset(table, env)
        self.tables[env], self.seeds[env], self.qps[env] = table, seed, table.qps
        self.arrays.start_s[env] = 0.0
        self._finish(env, MORE)
        self.arrays.outcomes[env] = 0.0  # an episode of no request at all ends with its first step
        self.arrays.outcomes[env, DISCOUNT] = 1.0

    def _finish(self, env: int, code: int) -> None:
        """Run a step that compiled code could not do alone to its end."""
        while code not in (OVER, ROUTE):
            if code == MORE or self.cluster.help(env, code):
                code = self.cluster.advance(env)
        self.arrays.codes[env] = code
        kernels.settle(self.cluster.handle, self.cluster.nodes_handle, self.handle, env)

    def act(self, given: Any) -> None:
        """One decision of every environment that is not paused, by the replicas `given`.

        Raises :class:`InvalidAction` for one that is none; then no environment has stepped.
        """
        self.arrays.choices[...] = np.reshape(as_array(self.action_space, given, self._shape), self.num_envs)
        left = self._step_range(0, self.num_envs) if self._threads is None else self._step_in_threads(self._threads)
        if left < 0:
            raise InvalidAction(f"action: expected a replica from 0 to {self.config.num_replicas - 1}, got {given!r}")
        if left > 0:
            for env, code in enumerate(self.arrays.codes.tolist()):
                if code not in (OVER, ROUTE, NOTHING):
                    self._finish(env, code)
        if callable(self.config.reward):
            for env in np.flatnonzero(self.arrays.codes != NOTHING).tolist():
                self.arrays.outcomes[env, REWARD] = as_reward(self.config.reward(self._transition(env)))

    def _step_range(self, first: int, stop: int) -> int:
        cluster = self.cluster
        handles = cluster.handle, cluster.nodes_handle, self.handle
        decode = cluster.decode_router.kernel
        left: int = kernels.stepping()(*handles, first, stop, *cluster.loop_args, decode, MAX_IDLE_STEPS, EVENTS)
        return left

    def _step_in_threads(self, threads: ThreadPoolExecutor) -> int:
        edges = np.linspace(0, self.num_envs, self.num_threads + 1).astype(int).tolist()
        others = [threads.submit(self._step_range, *edge) for edge in itertools.pairwise(edges[1:])]
        found = [self._step_range(0, edges[1]), *(other.result() for other in others)]
        return -1 if min(found) < 0 else sum(found)

    def close(self) -> None:
        """End the threads; the environments can still be stepped, by one."""
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None

    def _transition(self, env: int) -> Transition:
        state, world = self.cluster.state, self.cluster.state.worlds[env]
        resolved = state.resolved[env, self.arrays.resolved[env] : state.episodes[env].num_resolved]
        resolved = resolved[(resolved >= world.cohort_start) & (resolved < world.cohort_stop)]
        return Transition(
            duration_s=float(self.arrays.outcomes[env, kernels.DURATION_S]),
            terms=self.terms(env),
            resolved=state.requests[env][resolved],
            view=self.cluster.view(env),
        )

    def terms(self, env: int) -> dict[str, float]:
        """Parts of the reward of the last step, unscaled."""
        return dict(zip(TERMS, self.arrays.outcomes[env, FIRST_TERM:].tolist(), strict=True))

    def metrics(self, env: int) -> dict[str, float]:
        """The figures of one environment's episode so far; see :func:`~llmsched_gym.env.episode.episode_metrics`."""
        table = self.tables[env]
        if table is None:
            return dict.fromkeys(METRICS, math.nan)
        clock_s = float(self.cluster.nodes.routes[env].now_s)
        tokens = int(self.cluster.state.sims["tokens_emitted"][self.cluster.lanes(env)].sum())
        return episode_metrics(self.cluster.state, env, table, clock_s, tokens, has_gaps=self.config.episode_metrics)

    def action_masks(self) -> np.ndarray:
        """Where requests may be sent, bool (num_envs, num_replicas); all where nothing is to be routed."""
        masks = (self.cluster.nodes.candidates["is_legal"] != 0).reshape(self.num_envs, -1)
        masks[self.cluster.nodes.routes["deciding"] < 0] = True
        return masks

    def observation(self, env: int) -> Any:
        """A copy of one environment's observation."""
        seen = self._read(env)
        return seen if self._mask_place is None else self._mask_place.put(seen, self.action_masks()[env])

    def observations(self) -> Any:
        """Copies of all, side by side."""
        seen = self._read(slice(None)) if isinstance(self.config.observation, str) else self._seen_by_user()
        return seen if self._mask_place is None else self._mask_place.put(seen, self.action_masks())

    def _seen_by_user(self) -> Any:
        views = [self._read(env) for env in range(self.num_envs)]
        out: Any = create_empty_array(self._seen_space, self.num_envs)
        return concatenate(self._seen_space, views, out)

    def _read(self, where: Any) -> Any:
        config, arrays = self.config, self.arrays
        if not isinstance(config.observation, str):
            return as_observation(self._seen_space, config.observation.observe(self.cluster.view(where)))
        asked, rows = arrays.asked[where], arrays.rows[where]
        if config.observation == "replicas":
            return {"request": asked.copy(), "replicas": rows.copy()}
        return np.concatenate([asked, rows.reshape(*asked.shape[:-1], -1)], axis=-1)
