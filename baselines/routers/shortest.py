"""Routers that send a request to whoever has least to do, by one measure or another."""

import math

from llmsched_gym.cluster.router import CompiledRouter, draw
from llmsched_gym.engine.jit import kernel


@kernel()
def num_requests(candidate):
    """Waiting and running requests."""
    return candidate.num_waiting + candidate.num_running


@kernel()
def tokens_left(candidate):
    """Prompt tokens still to compute and output tokens still expected."""
    return candidate.prompt_tokens_left + candidate.output_tokens_left


def jsq(route):
    """Join the shortest queue: fewest requests, waiting and running; ties by index."""
    best, fewest = -1, 0
    for j in range(route.candidates.shape[0]):
        candidate = route.candidates[j]
        if candidate.is_legal and (best < 0 or num_requests(candidate) < fewest):
            best, fewest = j, num_requests(candidate)
    return best


def least_tokens(route):
    """Fewest tokens still to compute, of prompts and of outputs as expected; ties by index."""
    best, fewest = -1, math.inf
    for j in range(route.candidates.shape[0]):
        candidate = route.candidates[j]
        if candidate.is_legal and (best < 0 or tokens_left(candidate) < fewest):
            best, fewest = j, tokens_left(candidate)
    return best


def least_kv(route):
    """Lowest share of KV memory in use; ties by fewest requests, then by index."""
    best = -1
    for j in range(route.candidates.shape[0]):
        candidate = route.candidates[j]
        if not candidate.is_legal:
            continue
        if best >= 0:
            chosen = route.candidates[best]
            if candidate.kv_usage > chosen.kv_usage:
                continue
            if candidate.kv_usage == chosen.kv_usage and num_requests(candidate) >= num_requests(chosen):
                continue
        best = j
    return best


def power_of_two(route):
    """Two replicas drawn at random, different ones; the one with fewer requests, of equal ones the first drawn."""
    candidates = route.candidates
    legal = 0
    for j in range(candidates.shape[0]):
        legal += candidates[j].is_legal
    if legal == 0:
        return -1
    a = draw(route, legal)
    b = a
    if legal > 1:
        b = draw(route, legal - 1)
        b += b >= a
    first, second, seen = -1, -1, 0
    for j in range(candidates.shape[0]):
        if candidates[j].is_legal:
            if seen == a:
                first = j
            if seen == b:
                second = j
            seen += 1
    return second if num_requests(candidates[second]) < num_requests(candidates[first]) else first


ROUTERS = {
    "jsq": CompiledRouter("join the shortest queue: fewest requests, waiting and running (vLLM router, BLIS)", jsq),
    "least-tokens": CompiledRouter(
        "fewest tokens still to compute: of prompts, and of outputs as expected", least_tokens
    ),
    "least-kv": CompiledRouter("lowest KV use (BLIS, llm-d scorers)", least_kv),
    "power-of-two": CompiledRouter("two at random, the shorter queue (Mitzenmacher, IEEE TPDS 2001)", power_of_two),
}
