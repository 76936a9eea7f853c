"""What a router is: the protocol, what it sees, compiled routers with their parameters, and names for them.

A router is compiled (:class:`CompiledRouter`: a kernel and its settings) or any object with ``route(view) -> replica``.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np

from llmsched_gym.cluster.state import PROMPTS, ROUTE_SIGNATURE, Nodes
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.records import NONE
from llmsched_gym.engine.state import State
from llmsched_gym.scheduler import Own, PolicyError, reduced

_MODULUS_A, _MODULUS_B = 2147483563, 2147483399


class RouterView:
    """The replicas as a router may see them, and the request that it decides on.

    Attributes:
        now_s: the clock, seconds.
        request: record of the request: prompt_tokens, prefill_tokens (what is to compute without a cache), slo_class,
            ttft_slo_s, tbt_slo_s, arrival_s, length_hint, session_id.
        replicas: record array, one row a replica, of :data:`~llmsched_gym.cluster.records.CANDIDATE`: its last report,
            with what was dispatched since, and what it means for this request (cached_tokens, predicted_ttft_s).
        legal: bool (num_replicas,), where the request may be sent.
        last_replica: that served its session last; -1: none.
        arrivals_10s, arrived_tokens_10s: requests, and their prompt tokens, delivered per second over 10 s, to all.
        num_held: requests that wait at the router, as no replica can take them.
        index: of the request; -1 where nothing is to be routed, as at an episode's end: then `request` is all zeros.
    """

    def __init__(self, state: State, nodes: Nodes, env: int = 0) -> None:
        route = nodes.routes[env]
        num_replicas = len(nodes.nodes) // len(nodes.routes)
        self.now_s, self.index = float(route.now_s), int(route.deciding)
        self.last_replica, self.num_held = int(route.last_replica), int(route.num_held)
        lanes = slice(env * num_replicas, (env + 1) * num_replicas)
        self.replicas = nodes.candidates[lanes].copy().view(np.recarray)
        # added up one by one, as the environment does
        self.arrivals_10s = float(state.sims["arrivals_10s"][lanes].cumsum()[-1])
        self.arrived_tokens_10s = float(state.sims["arrived_tokens_10s"][lanes].cumsum()[-1])
        self.request = _visible(state.requests[env][self.index], self.index != NONE)

    @property
    def legal(self) -> np.ndarray:
        """Where the request may be sent; bool (num_replicas,)."""
        found: np.ndarray = self.replicas.is_legal != 0
        return found


REQUEST_FIELDS = (
    *("arrival_s", "ttft_slo_s", "tbt_slo_s", "slo_class", "prompt_tokens", "prefill_tokens", "num_output_tokens"),
    *("max_output_tokens", "length_hint", "session_id"),
)
"""What a router sees of a request."""


def _visible(request: Any, is_asked: bool) -> Any:
    seen = np.zeros((), np.dtype((np.record, [(name, request.dtype[name].str) for name in REQUEST_FIELDS])))
    for name in REQUEST_FIELDS if is_asked else ():
        seen[name] = request[name]
    record: Any = seen[()]
    return record


@runtime_checkable
class Router(Protocol):
    """Anything that names a replica for a request. Optional: ``reset(seed)``, called before each run."""

    def route(self, view: RouterView) -> int:
        """The replica that is to serve ``view.request``; one of ``view.legal``."""
        ...


@cache
def _compile(function: Callable) -> Any:
    return kernel(ROUTE_SIGNATURE)(function)


@dataclass(frozen=True)
class CompiledRouter:
    """A compiled router: a function on a :class:`~llmsched_gym.cluster.state.Route`, and its parameters."""

    what: str  # one line for `llmsched routers`, with the source
    function: Callable
    own: tuple[Own, ...] = ()  # parameters in brackets, read as ``route.options[i]``
    settings: Mapping[str, float] = field(default_factory=dict)
    name: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        return reduced(self, make_router)

    def __deepcopy__(self, memo: Any) -> CompiledRouter:
        return self

    @cached_property
    def kernel(self) -> Any:
        """The function, compiled for numba's cache to find in the next process."""
        return _compile(self.function)

    def install(self, nodes: Nodes, env: int, which: int = PROMPTS) -> None:
        """Write the parameters where the kernel reads them, and forget what it remembered."""
        nodes.options[env, which] = 0.0
        values = [self.settings.get(parameter.name, parameter.default) for parameter in self.own]
        nodes.options[env, which, : len(values)] = values
        nodes.memory[env, which] = 0.0


def seed_dice(nodes: Nodes, env: int, seed: int) -> None:
    """Start the draws of routers that draw."""
    draws = np.random.SeedSequence(seed, spawn_key=(97,)).generate_state(2)
    nodes.routes[env].dice_a = 1 + int(draws[0]) % (_MODULUS_A - 1)
    nodes.routes[env].dice_b = 1 + int(draws[1]) % (_MODULUS_B - 1)


@kernel()
def draw(route, n):
    """A number from 0 to n - 1, all as likely (L'Ecuyer, CACM 1988)."""
    state = route.route
    state.dice_a = (40014 * state.dice_a) % _MODULUS_A
    state.dice_b = (40692 * state.dice_b) % _MODULUS_B
    return (state.dice_a - state.dice_b) % (_MODULUS_A - 1) * n // (_MODULUS_A - 1)


@kernel()
def any_legal(route):
    """The first replica that the request may be sent to; NONE if there is none."""
    for j in range(route.candidates.shape[0]):
        if route.candidates[j].is_legal:
            return j
    return NONE


def make_router(spec: str) -> Any:
    """:func:`llmsched_gym.registry.make_router`, which is looked up when called."""
    return importlib.import_module("llmsched_gym.registry").make_router(spec)


def check_replica(spec: str, replica: Any, legal: np.ndarray) -> int:
    """The replica that a router has named; PolicyError if the request may not be sent there."""
    try:
        found = operator.index(replica)
    except TypeError:
        found = NONE
    if isinstance(replica, bool | np.bool_) or not 0 <= found < len(legal):
        raise PolicyError(f"router {spec!r}: expected a replica from 0 to {len(legal) - 1}, got {replica!r}")
    if not legal[found]:
        allowed = ", ".join(map(str, np.flatnonzero(legal))) or "none"
        raise PolicyError(
            f"router {spec!r}: replica {found} is down or cannot take the request, expected one of {allowed}"
        )
    return found
