"""Which replica has the next event: a tournament over replicas, whose winner is known after log2(replicas) matches."""

from __future__ import annotations

from llmsched_gym.engine.jit import kernel


@kernel()
def _plays(nodes, first, num_replicas, a, b):
    """The replica whose event comes first, of two; of equal ones the smaller index, of none the other."""
    if b >= num_replicas:
        return a
    if a >= num_replicas:
        return b
    return b if nodes[first + b].event_s < nodes[first + a].event_s else a


@kernel()
def set_event(c, env, replica, event_s):
    """Replica `replica` of environment `env` is to be looked at next at `event_s`."""
    tree, num_replicas = c.tree[env], c.nodes.shape[0] // c.routes.shape[0]
    first, leaves = env * num_replicas, c.tree.shape[1] >> 1
    c.nodes[first + replica].event_s = event_s
    at = (leaves + replica) >> 1
    for _ in range(32):
        if at < 1:
            break
        if 2 * at >= leaves:
            a, b = 2 * at - leaves, 2 * at + 1 - leaves
        else:
            a, b = tree[2 * at], tree[2 * at + 1]
        tree[at] = _plays(c.nodes, first, num_replicas, a, b)
        at >>= 1


@kernel()
def first_of(c, env):
    """The replica whose event comes first; the smallest index of equal ones."""
    return c.tree[env, 1] if c.tree.shape[1] > 2 else 0
