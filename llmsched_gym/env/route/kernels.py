"""Steps of an agent that routes: deliver, run to the next decision, pay, observe; many environments in one call."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

from numba import types
from numba.np.numpy_support import from_dtype

from llmsched_gym.cluster.events import NOTHING, OVER, ROOM, ROUTE, advance, send
from llmsched_gym.cluster.state import NODES_HANDLE_TYPE, ROUTER_TYPE
from llmsched_gym.engine.handles import as_handle, handle_type, unpack
from llmsched_gym.engine.jit import JIT_ENABLED, entry, kernel
from llmsched_gym.engine.records import NONE
from llmsched_gym.engine.state import HANDLE_TYPE, SCHEDULE_TYPE, episode_of
from llmsched_gym.env.arrays import DISCOUNT, DURATION_S, FIRST_TERM, PAUSED, REWARD, TERMINATED, TRUNCATED
from llmsched_gym.env.reward import RULES, pay_live, pay_resolved
from llmsched_gym.env.route.features import observe_route


class RouteArrays(NamedTuple):
    """What agents that route put in and get out."""

    choices: Any  # (num_envs,) int64, replicas
    rules: Any  # (1,) RULES
    outcomes: Any  # (num_envs, FIRST_TERM + number of terms) float64
    asked: Any  # (num_envs, request features) float32
    rows: Any  # (num_envs, num_replicas, replica features) float32
    start_s: Any  # (num_envs,) float64, when the step under way began
    codes: Any  # (num_envs,) int64, what the loop of events asks for, see cluster.events
    resolved: Any  # (num_envs,) int64, requests resolved before the step under way


_TYPES = (
    types.Array(types.int64, 1, "C"),
    types.Array(from_dtype(RULES), 1, "C"),
    types.Array(types.float64, 2, "C"),
    types.Array(types.float32, 2, "C"),
    types.Array(types.float32, 3, "C"),
    types.Array(types.float64, 1, "C"),
    types.Array(types.int64, 1, "C"),
    types.Array(types.int64, 1, "C"),
)
ROUTE_ARRAYS_TYPE = types.NamedTuple(list(_TYPES), RouteArrays)
ROUTE_HANDLE_TYPE = handle_type(ROUTE_ARRAYS_TYPE)


@kernel(ROUTE_HANDLE_TYPE(ROUTE_ARRAYS_TYPE), counted=True)
def handle_of(arrays):
    """What kernels take for these arrays."""
    return as_handle(arrays)


@kernel()
def _pay_one(of, now_s, rules, r, terms):
    """What the utility of live request `r` has changed by, if it is measured."""
    world = of.world
    return pay_live(of.episode, now_s, rules, world.cohort_start, world.cohort_stop, r, of.requests[r], terms)


@kernel()
def _pay_listed(of, now_s, rules, listed, count, terms):
    """What the utilities of live requests have changed by."""
    paid = 0.0
    for i in range(count):
        paid += _pay_one(of, now_s, rules, listed[i], terms)
    return paid


@kernel()
def _settle(s, c, a, env):
    """Reward, duration, discount and the end of the step under way, and what is seen behind it."""
    num_replicas = s.sims.shape[0] // s.episodes.shape[0]
    of, route, rules, outcome = episode_of(s, env), c.routes[env], a.rules[0], a.outcomes[env]
    world, now_s = of.world, route.now_s
    outcome[:] = 0.0
    terms = outcome[FIRST_TERM:]
    paid = pay_resolved(of, world, now_s, rules, terms)
    if not rules.at_finish:
        for k in range(env * num_replicas, (env + 1) * num_replicas):
            sim = s.sims[k]
            paid += _pay_listed(of, now_s, rules, s.running[k], sim.num_running, terms)
            paid += _pay_listed(of, now_s, rules, s.waiting[k], sim.num_waiting, terms)
        paid += _pay_listed(of, now_s, rules, c.held[env], route.num_held, terms)
        for i in range(route.num_moving):
            paid += _pay_one(of, now_s, rules, c.moving[env, i].request, terms)
        if route.deciding != NONE:  # back from a replica that failed it may have waited
            paid += _pay_one(of, now_s, rules, route.deciding, terms)
    outcome[REWARD] = rules.scale * paid
    outcome[DURATION_S] = now_s - a.start_s[env]
    outcome[DISCOUNT] = math.exp(-outcome[DURATION_S] / rules.tau_s)
    over = a.codes[env] == OVER
    resolved = world.drain_all != 0 and world.num_unresolved == 0
    outcome[TERMINATED] = over and resolved
    outcome[TRUNCATED] = over and not resolved
    observe_route(s, c, env, a.asked[env], a.rows[env])


@entry()
def settle(s, c, a, env):
    """:func:`_settle` for a step that Python had to finish."""
    _settle(unpack(s), unpack(c), unpack(a), env)


@kernel()
def legal_from(c, first, num_replicas, choice):
    """The replica `choice`, or, where the request may not be sent there, the next that it may be sent to."""
    for i in range(num_replicas):
        j = (choice + i) % num_replicas
        if c.candidates[first + j].is_legal:
            return j
    return NONE


@kernel(inline="always")
def _step_one(s, c, a, env, schedule, forms, router, max_idle_steps, max_events):
    num_replicas = s.sims.shape[0] // s.episodes.shape[0]
    route = c.routes[env]
    a.start_s[env] = route.now_s
    a.resolved[env] = s.episodes[env].num_resolved
    if route.deciding != NONE:
        replica = legal_from(c, env * num_replicas, num_replicas, a.choices[env])
        if not send(s, c, env, route.deciding, replica):
            route.lane = replica
            a.codes[env] = ROOM
            return
    a.codes[env] = advance(s, c, env, schedule, forms, router, False, router, False, max_idle_steps, max_events)


def step_range(s, c, a, first, stop, schedule, forms, router, max_idle_steps, max_events):
    """One decision of environments first, ..., stop - 1; returns how many Python has to finish, see ``codes``.

    -1 if an action, of whichever environment, names no replica; nothing has changed then.
    """
    state, nodes, arrays = unpack(s), unpack(c), unpack(a)
    num_replicas = state.sims.shape[0] // state.episodes.shape[0]
    for env in range(state.episodes.shape[0]):
        if arrays.outcomes[env, PAUSED] == 0.0 and not 0 <= arrays.choices[env] < num_replicas:
            return -1
    left = 0
    for env in range(first, stop):
        if arrays.outcomes[env, PAUSED] != 0.0:
            arrays.codes[env] = NOTHING
            continue
        _step_one(state, nodes, arrays, env, schedule, forms, router, max_idle_steps, max_events)
        if arrays.codes[env] == ROUTE or arrays.codes[env] == OVER:
            _settle(state, nodes, arrays, env)
        else:
            left += 1
    return left


_SIGNATURE = types.int64(
    *(HANDLE_TYPE, NODES_HANDLE_TYPE, ROUTE_HANDLE_TYPE, types.int64, types.int64, SCHEDULE_TYPE, types.boolean),
    *(ROUTER_TYPE, types.int64, types.int64),
)


@cache
def stepping() -> Any:
    """:func:`step_range`, compiled once for schedulers as function pointers."""
    function = entry(nogil=True)(step_range)
    if JIT_ENABLED:
        function.compile(_SIGNATURE)
        function.disable_compile()
    return function
