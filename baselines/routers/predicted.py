"""Routers that ask the cost profile: who would have the first token out first, and whose backlog lasts shortest."""

import math

from llmsched_gym.baselines.routers.shortest import tokens_left
from llmsched_gym.cluster.router import CompiledRouter


def slo_aware(route):
    """Most predicted slack to the TTFT SLO, by each replica's profile, queue and cached prefix.

    The SLO is the same wherever the request goes, so that it is the smallest predicted TTFT. Ties by fewest tokens.
    """
    candidates, best = route.candidates, -1
    for j in range(candidates.shape[0]):
        candidate = candidates[j]
        if not candidate.is_legal:
            continue
        if best >= 0:
            ahead_s = candidate.predicted_ttft_s - candidates[best].predicted_ttft_s
            if ahead_s > 0.0 or (ahead_s == 0.0 and tokens_left(candidate) >= tokens_left(candidates[best])):
                continue
        best = j
    return best


def rad_route(route):
    """The smallest backlog, this request's prompt with it, in seconds at the replica's throughput of full tiles.

    Our reading of the routing half of the framework in arXiv 2508.01002, which its abstract names and its experiments
    leave out: RAD works on full tiles, so that a replica's service rate is that of full tiles on its own profile, and
    joining the queue that lasts shortest is maximally stable for such servers, equal or not. The backlog are prompt
    tokens left and output tokens expected.
    """
    best, shortest_s = -1, math.inf
    for j in range(route.candidates.shape[0]):
        candidate = route.candidates[j]
        if candidate.is_legal:
            backlog_s = (tokens_left(candidate) + candidate.uncached_tokens) / candidate.tokens_per_s
            if best < 0 or backlog_s < shortest_s:
                best, shortest_s = j, backlog_s
    return best


ROUTERS = {
    "slo-aware": CompiledRouter("most predicted slack to the TTFT SLO (llm-d predicted latency)", slo_aware),
    "rad-route": CompiledRouter(
        "shortest backlog at full tiles; our reading of arXiv 2508.01002's framework", rad_route
    ),
}
