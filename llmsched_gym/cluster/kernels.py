"""The loop of events for Python: what it is asked to run on, and what happens between two of its calls."""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import types

from llmsched_gym.cluster import events
from llmsched_gym.cluster.look import look
from llmsched_gym.cluster.state import NODES_HANDLE_TYPE, ROUTER_TYPE
from llmsched_gym.cluster.timeline import set_event
from llmsched_gym.engine.handles import unpack
from llmsched_gym.engine.jit import JIT_ENABLED, entry
from llmsched_gym.engine.lifecycle import remember
from llmsched_gym.engine.state import HANDLE_TYPE, SCHEDULE_TYPE, episode_of, lane_of


@entry()
def start(s, c, env, parts):
    """All replicas look for work at time 0, their caches filled with what is past of `parts` ways to split it."""
    state, nodes = unpack(s), unpack(c)
    num_replicas = state.sims.shape[0] // state.episodes.shape[0]
    for j in range(num_replicas):
        k = env * num_replicas + j
        if state.sims[k].prefix_caching:
            remember(lane_of(state, k), episode_of(state, env), j, parts)
        set_event(nodes, env, j, 0.0)


@entry()
def send(s, c, env, r, replica):
    """Deliver the request that was decided on; False if the replica's line has no room."""
    return events.send(unpack(s), unpack(c), env, r, replica)


@entry()
def begin(s, c, env, k):
    """Execute the batch that lane `k` has formed."""
    state = unpack(s)
    events.begin(state, unpack(c), env, k, lane_of(state, k))


@entry()
def hand_back(s, c, env, k):
    """Lane `k` fails."""
    events.hand_back(unpack(s), unpack(c), env, k)


@entry()
def come_back(s, c, env, k):
    """Lane `k` is up again."""
    events.come_back(unpack(s), unpack(c), env, k)


@entry()
def look_again(s, c, env):
    """Fill the candidates for the request that is decided on anew."""
    state, nodes = unpack(s), unpack(c)
    look(state, nodes, env, nodes.routes[env].deciding, True)


def advance(s, c, env, schedule, forms, router, routes, decode_router, to_the_end, max_idle_steps, max_events):
    """:func:`llmsched_gym.cluster.events.advance` on handles."""
    return events.advance(
        unpack(s),
        unpack(c),
        env,
        schedule,
        forms,
        router,
        routes,
        decode_router,
        to_the_end,
        max_idle_steps,
        max_events,
    )


_SIGNATURE = types.int64(
    HANDLE_TYPE,
    NODES_HANDLE_TYPE,
    types.int64,
    SCHEDULE_TYPE,
    types.boolean,
    ROUTER_TYPE,
    types.boolean,
    ROUTER_TYPE,
    types.boolean,
    types.int64,
    types.int64,
)


@cache
def advancing() -> Any:
    """:func:`advance`, compiled once for schedulers and routers as function pointers."""
    function = entry()(advance)
    if JIT_ENABLED:
        function.compile(_SIGNATURE)
        function.disable_compile()
    return function
