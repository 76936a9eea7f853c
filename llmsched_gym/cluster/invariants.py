"""The engine's checker on all replicas of a cluster, and what a cluster has beside them: call it at any decision."""

from __future__ import annotations

import math

import numpy as np

from llmsched_gym.cluster.core import Cluster
from llmsched_gym.cluster.records import DECODE, PREFILL
from llmsched_gym.engine.invariants import Afoot, InvariantError, check_lanes
from llmsched_gym.engine.records import NONE


def check(cluster: Cluster, env: int = 0, previous_s: np.ndarray | float = -math.inf) -> np.ndarray:
    """Raise :class:`InvariantError` unless every invariant of environment `env` holds.

    At a decision, or at the end. Returns the time, then each replica's clock: pass them to the next call, to have their
    monotony checked too.
    """
    state, routes, lanes = cluster.state, cluster.nodes.routes[env], cluster.lanes(env)
    nodes = cluster.nodes.nodes[lanes[0] : lanes[-1] + 1]
    sims = state.sims[lanes[0] : lanes[-1] + 1]
    held = cluster.nodes.held[env, : routes.num_held].tolist() + [int(routes.deciding)] * int(routes.deciding != NONE)
    moving = cluster.nodes.moving[env, : routes.num_moving]
    afoot = Afoot(
        now_s=float(routes.now_s),
        executing=nodes["is_executing"] != 0,
        behind=nodes["event_s"] <= routes.now_s,
        held=held,
        moving=[tuple(row[name] for name in ("request", "source", "target", "num_blocks")) for row in moving],
        num_abandoned=int(routes.num_abandoned),
    )
    clocks_s = check_lanes(state, env, previous_s, afoot)

    def require(condition: bool | np.ndarray, rule: str) -> None:
        if not np.all(condition):
            raise InvariantError(f"env {env} at {routes.now_s:.6f} s: {rule}")

    down = nodes["is_down"] != 0
    require(sims["num_waiting"][down] + sims["num_running"][down] == 0, "a replica that is down has requests")
    require(sims["free_blocks"][down] == sims["total_blocks"][down], "a replica that is down holds blocks")
    require(~afoot.executing[down] & np.isinf(nodes["event_s"][down]), "a replica that is down works")
    first = int(np.argmin(nodes["event_s"]))
    require(cluster.nodes.tree[env, 1] == first or len(nodes) == 1, "the first event is not the first")
    require(nodes["event_s"] >= routes.now_s, "an event was overlooked")
    require(nodes["change_s"].min() == routes.next_change_s, "the next failure or return is not the next")
    if routes.deciding != NONE:
        legal = cluster.view(env).legal
        require(bool(legal.any()), "nobody may take the request that is to be routed")
        require(~legal[down], "a replica that is down may be sent a request")
    for j, k in enumerate(lanes):
        here = [*state.waiting[k][: sims[j].num_waiting], *state.running[k][: sims[j].num_running]]
        require(cluster.nodes.replica_of[env, here] == j, "a request is not where it was delivered")
        require(nodes[j].num_coming == np.sum(moving["target"] == j), "transfers to a replica: wrong count")
        if nodes[j].role == DECODE:
            emitted = state.requests[env]["num_output_tokens"][here]
            require(emitted > 0, "a replica that only decodes was sent a prompt")
        if nodes[j].role == PREFILL and not afoot.behind[j]:
            rows = state.requests[env][state.running[k][: sims[j].num_running]]
            require(rows["num_computed_tokens"] < rows["prefill_tokens"], "a replica that only prefills decodes")
    for row in moving:
        require((row.num_blocks > 0) == np.isfinite(row.end_s), "a transfer is under way without room at its end")
        require(row.num_blocks == 0 or row.target != NONE, "a transfer has blocks nowhere")
        require(nodes[row.source].role == PREFILL, "a transfer begins where nobody only prefills")
    return clocks_s
