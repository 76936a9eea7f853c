"""Bridges: any router as an agent of the routing environment, and any agent as a router of clusters."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from llmsched_gym.cluster.records import CANDIDATE
from llmsched_gym.cluster.router import CompiledRouter, RouterView, check_replica, make_router
from llmsched_gym.cluster.state import NODES_HANDLE_TYPE, PROMPTS, ROUTER_MEMORY, ROUTER_TYPE
from llmsched_gym.cluster.transfer import make_route
from llmsched_gym.config import ConfigError, RouteConfig, route_config
from llmsched_gym.engine.handles import unpack
from llmsched_gym.engine.jit import JIT_ENABLED, entry
from llmsched_gym.engine.state import HANDLE_TYPE
from llmsched_gym.env.actions import InvalidAction, as_array
from llmsched_gym.env.masked import mask_place
from llmsched_gym.env.route.core import route_space
from llmsched_gym.env.route.envs import LLMRouteEnv
from llmsched_gym.env.route.features import REPLICA_FEATURES, REQUEST_FEATURES, observe_request
from llmsched_gym.scheduler import PolicyError


def choose(s, c, env, router):
    """The replica that a compiled router names for the request that is to be routed."""
    nodes = unpack(c)
    return router(make_route(unpack(s), nodes, env, nodes.routes[env].deciding, PROMPTS))


@cache
def choosing() -> Any:
    """:func:`choose`, compiled once for routers as function pointers."""
    function = entry()(choose)
    if JIT_ENABLED:
        function.compile(types.int64(HANDLE_TYPE, NODES_HANDLE_TYPE, types.int64, ROUTER_TYPE))
        function.disable_compile()
    return function


@entry()
def observe_view(request, candidates, now_s, last_replica, arrivals, tokens, num_held, out, rows):
    """:func:`~llmsched_gym.env.route.features.observe_request` for Python."""
    observe_request(request, candidates, now_s, last_replica, arrivals, tokens, num_held, out, rows)


class RouterPolicy:
    """Step a routing environment as a router would, wrappers and all.

    >>> env = gym.make("LLMRoute-v0", num_requests=100)
    >>> env.reset(seed=0)
    >>> policy = RouterPolicy(env, "prefix-affinity")
    >>> observation, reward, terminated, truncated, info = policy.step()
    >>> observation, reward, terminated, truncated, info = env.step(policy.action())  # the same

    Args:
        env: a single environment, reset; wrapped or not. One of a vector environment can be asked for actions.
        router: a name, a policy folder, or any router object.

    Raises:
        ConfigError: `env` is no single LLMRoute environment, or wrappers change its actions.
    """

    def __init__(self, env: Any, router: str | Any = "least-tokens") -> None:
        self.env, self._base = env, env.unwrapped
        if not isinstance(self._base, LLMRouteEnv):
            what = type(self._base).__name__
            raise ConfigError(f"env: expected a single LLMRoute environment, wrapped or not, got {what}")
        if env.action_space != self._base.action_space:
            raise ConfigError("env: expected wrappers that leave the action space as it is")
        self.router = make_router(router) if isinstance(router, str) else router
        self.name = router if isinstance(router, str) else getattr(router, "name", type(router).__name__)
        self._memory, self._options = np.zeros(ROUTER_MEMORY), np.zeros(ROUTER_MEMORY)
        self._table: Any = None  # of the episode that it was last asked in
        self._asked, self._replica = (0, 0), 0  # for which decision it was last asked, and its answer

    def step(self) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step of the environment: the request goes where the router sends it."""
        found: tuple[Any, float, bool, bool, dict[str, Any]] = self.env.step(self.action())
        return found

    def action(self) -> int:
        """The replica that the router names now, the same until the environment steps; 0 where there is no request.

        Raises:
            PolicyError: the router names a replica that is not there, or that cannot take the request.
        """
        core, env = self._base.core, self._base._index
        cluster = core.cluster
        if cluster.deciding(env) < 0:
            return 0
        made = int(cluster.nodes.routes[env].num_decisions), core.num_restored
        if core.tables[env] is not self._table:
            self._table = core.tables[env]
            self._begin(cluster, env)
        elif made == self._asked:
            return self._replica
        self._asked = made
        view = cluster.view(env)
        found = self._choose(cluster, env) if isinstance(self.router, CompiledRouter) else self.router.route(view)
        self._replica = check_replica(self.name, found, view.legal)
        return self._replica

    def _begin(self, cluster: Any, env: int) -> None:
        if isinstance(self.router, CompiledRouter):
            self.router.install(cluster.nodes, env)
            self._memory, self._options = cluster.nodes.memory[env].copy(), cluster.nodes.options[env].copy()
        elif hasattr(self.router, "reset"):
            self.router.reset(int(self._base.core.seeds[env]))

    def _choose(self, cluster: Any, env: int) -> int:
        nodes = cluster.nodes
        nodes.memory[env], nodes.options[env] = self._memory, self._options  # another router may have been asked
        found = int(choosing()(cluster.handle, cluster.nodes_handle, env, self.router.kernel))
        self._memory = nodes.memory[env].copy()
        return found


class PolicyRouter:
    """A function from observations to replicas as a router: it runs in clusters and in ``evaluate``.

    Args:
        policy: called with one observation (not batched) and the mask of replicas that may take the request, bool
            (num_replicas,); returns the replica. Where one is named that may not, the request goes to the next one in
            order that may, as in the environment. With a method ``reset()`` it is told of each run.
        config: the environment's configuration, whose observation it sees; "replicas" has a row for however many there
            are, the flat one needs as many as the configuration says.
    """

    def __init__(self, policy: Callable[[Any, np.ndarray], Any], config: RouteConfig | None = None) -> None:
        self.policy, self.config = policy, config or route_config()
        self._mask_place = mask_place(self.config)
        self.name = getattr(policy, "name", "") or type(self).__name__

    def reset(self, seed: int) -> None:
        """Tell the policy of a new run."""
        if hasattr(self.policy, "reset"):
            self.policy.reset()

    def route(self, view: RouterView) -> int:
        """The replica that is to serve the request."""
        legal = view.legal
        given = self.policy(self.observe(view), legal)
        n = len(legal)
        try:
            choice = int(as_array(route_space(self.config), given, ()))
        except InvalidAction as error:
            raise PolicyError(f"router {self.name!r}: {error}") from None
        if not 0 <= choice < n:
            raise PolicyError(f"router {self.name!r}: expected a replica from 0 to {n - 1}, got {given!r}")
        return (choice + int(np.argmax(np.roll(legal, -choice)))) % n

    def observe(self, view: RouterView) -> Any:
        """What the environment would show now."""
        seen = self._see(view)
        return seen if self._mask_place is None else self._mask_place.put(seen, view.legal)

    def _see(self, view: RouterView) -> Any:
        kind, n = self.config.observation, len(view.replicas)
        if not isinstance(kind, str):
            return kind.observe(view)
        if kind == "features" and n != self.config.num_replicas:
            expected = f"{self.config.num_replicas} replicas, as its flat observation has"
            raise PolicyError(f"router {self.name!r}: expected {expected}, got {n}")
        asked = np.zeros(len(REQUEST_FEATURES), np.float32)
        rows = np.zeros((n, len(REPLICA_FEATURES)), np.float32)
        observe_view(
            view.request,
            view.replicas.view(CANDIDATE, np.ndarray),
            view.now_s,
            view.last_replica,
            view.arrivals_10s,
            view.arrived_tokens_10s,
            view.num_held,
            asked,
            rows,
        )
        if kind == "replicas":
            return {"request": asked, "replicas": rows}
        return np.concatenate([asked, rows.ravel()])
