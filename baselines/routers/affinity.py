"""Routers that send a request to where its prompt is cached, as long as load allows it."""

import math

from llmsched_gym.baselines.routers.shortest import num_requests, tokens_left
from llmsched_gym.cluster.router import CompiledRouter
from llmsched_gym.engine.jit import kernel
from llmsched_gym.scheduler import Own, not_negative

WEIGHT, IMBALANCE = 0, 1  # places of the parameters
SLACK = 0


@kernel()
def fewest_requests(route):
    """The fewest requests, waiting and running, at a replica that may take this one."""
    fewest = math.inf
    for j in range(route.candidates.shape[0]):
        candidate = route.candidates[j]
        if candidate.is_legal:
            fewest = min(fewest, num_requests(candidate))
    return fewest


def prefix_affinity(route):
    """The largest `weight` x cached share of the prompt - load, a share of the highest; in imbalance the least load.

    Imbalance is a replica with more than `imbalance` requests more than another. Ties by fewest tokens left.
    """
    candidates, weight = route.candidates, route.options[WEIGHT]
    fewest = fewest_requests(route)
    most = 0
    for j in range(candidates.shape[0]):
        if candidates[j].is_legal:
            most = max(most, num_requests(candidates[j]))
    if most - fewest > route.options[IMBALANCE]:
        weight = 0.0
    best, highest = -1, -math.inf
    for j in range(candidates.shape[0]):
        candidate = candidates[j]
        if not candidate.is_legal:
            continue
        score = weight * candidate.cached_tokens / route.request.prefill_tokens - num_requests(candidate) / max(most, 1)
        if score > highest or (score == highest and tokens_left(candidate) < tokens_left(candidates[best])):
            best, highest = j, score
    return best


def session(route):
    """The replica that served the session last, unless it has `slack` requests more than another.

    Else, and for the first of a session, the one with the fewest tokens left.
    """
    candidates, last = route.candidates, route.route.last_replica
    allowed = fewest_requests(route) + route.options[SLACK]
    if last >= 0 and candidates[last].is_legal and num_requests(candidates[last]) <= allowed:
        return last
    best = -1
    for j in range(candidates.shape[0]):
        if candidates[j].is_legal and (best < 0 or tokens_left(candidates[j]) < tokens_left(candidates[best])):
            best = j
    return best


ROUTERS = {
    "prefix-affinity": CompiledRouter(
        "weight x cached share of the prompt - load; the load alone in imbalance (SGLang router, llm-d, BLIS)",
        prefix_affinity,
        (
            Own("weight", 1.0, not_negative, "number >= 0, 0 for load alone"),
            Own("imbalance", 32.0, not_negative, "requests >= 0 between the most and the least loaded, inf for never"),
        ),
    ),
    "session": CompiledRouter(
        "the replica of the session's last turn, load-checked (llm-d session-affinity)",
        session,
        (Own("slack", 16.0, not_negative, "requests >= 0 more than the least loaded replica, inf for no check"),),
    ),
}
