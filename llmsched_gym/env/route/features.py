"""What an agent that routes sees: the request at hand, and one row a replica, each entry named and bounded.

Everything is a router's: reports of the replicas with their age, what was dispatched since, and what of this prompt is
cached where. Nothing depends on output lengths, later requests, the true rate or the hidden cost scale.
"""

from __future__ import annotations

import math

import numpy as np

from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.records import NONE
from llmsched_gym.env.feature import Feature, places, scales, squash

STRICT = 0  # place in config.SLO_CLASSES


def _log(name: str, scale: float, what: str, unit: str = "", step: float = 1.0, otherwise: str = "") -> Feature:
    return Feature(name, 0, 1, what, scale, unit, log=True, step=step, otherwise=otherwise)


REQUEST_FEATURES: tuple[Feature, ...] = (
    Feature("is_asked", 0, 1, "whether a request is to be routed; 0 where the episode is over"),
    _log(
        "prefill_tokens", 32768, "tokens to compute without a cache: the prompt, after a failure with what was emitted"
    ),
    Feature("is_strict", 0, 1, "whether its user is strict"),
    _log("ttft_slo", 30, "its TTFT SLO", "s", step=0.1),
    Feature("ttft_slack", -1, 1, "share of its TTFT SLO that is left", otherwise="0 once it has a token"),
    _log("emitted_tokens", 4096, "tokens that it has emitted: it is back from a replica that failed"),
    _log("length_hint", 4096, "predicted output tokens", otherwise="0 without a hint"),
    Feature("has_session", 0, 1, "whether a replica has served its session before"),
    _log("arrivals_10s", 100, "requests per second delivered over 10 s, all replicas"),
    _log("arrived_tokens_10s", 1e6, "their prompt tokens per second"),
    _log("num_held", 100, "requests that wait at the router, as no replica can take them"),
)

REPLICA_FEATURES: tuple[Feature, ...] = (
    Feature("is_legal", 0, 1, "whether the request may be sent there"),
    Feature("is_up", 0, 1, "whether it is up"),
    Feature("is_last", 0, 1, "whether it served the session last"),
    Feature("cached_share", 0, 1, "share of the prompt that it has cached"),
    _log("uncached_tokens", 32768, "tokens of the prompt that it would compute"),
    _log(
        "predicted_ttft", 100, "until the first token, by its profile: what is ahead, and this prompt", "s", step=0.01
    ),
    _log("num_waiting", 1000, "waiting requests"),
    _log("num_running", 256, "running requests"),
    _log("num_strict", 256, "waiting and running requests of strict users"),
    _log("prompt_tokens_left", 1e6, "prompt tokens to compute"),
    _log("output_tokens_left", 1e6, "output tokens to emit, as expected"),
    Feature("kv_usage", 0, 1, "share of its KV blocks that requests hold"),
    _log("mean_batch", 1, "mean batch time so far", "s", step=0.01),
    _log("age", 10, "age of its report", "s", step=0.01),
    _log("num_dispatched", 100, "requests sent there since the report, which are counted above"),
    _log("tokens_per_s", 1e5, "prompt tokens that it computes in a second"),
    _log("total_blocks", 1e5, "its KV blocks"),
)

OF, AT = places(REQUEST_FEATURES), places(REPLICA_FEATURES)
_OF_STEP, _OF_LOG, _ = scales(REQUEST_FEATURES)
_AT_STEP, _AT_LOG, _ = scales(REPLICA_FEATURES)


def route_features(num_replicas: int) -> tuple[Feature, ...]:
    """The entries of the flat observation: the request's, then each replica's with ``replicaN.`` before its name."""
    rows = [f._replace(name=f"replica{j}.{f.name}") for j in range(num_replicas) for f in REPLICA_FEATURES]
    return (*REQUEST_FEATURES, *rows)


@kernel()
def _of(i, x):
    return squash(x * _OF_STEP[i], _OF_LOG[i])


@kernel()
def _at(i, x):
    return squash(x * _AT_STEP[i], _AT_LOG[i])


@kernel()
def observe_route(s, c, env, out, rows):
    """Fill the request's entries `out` and the rows of the replicas; all 0 where nothing is to be routed."""
    num_replicas = s.sims.shape[0] // s.episodes.shape[0]
    first, route, r = env * num_replicas, c.routes[env], c.routes[env].deciding
    if r == NONE:
        out[:] = 0.0
        rows[:] = 0.0
        return
    arrivals = tokens = 0.0
    for k in range(first, first + num_replicas):
        arrivals += s.sims[k].arrivals_10s
        tokens += s.sims[k].arrived_tokens_10s
    candidates, last = c.candidates[first : first + num_replicas], route.last_replica
    observe_request(s.requests[env, r], candidates, route.now_s, last, arrivals, tokens, route.num_held, out, rows)


@kernel()
def observe_request(request, candidates, now_s, last_replica, arrivals, tokens, num_held, out, rows):
    """Fill `out` and `rows` for a request that is to be routed, with `arrivals` and their `tokens` per second."""
    out[:] = 0.0
    rows[:] = 0.0
    out[OF.is_asked] = 1.0
    out[OF.prefill_tokens] = _of(OF.prefill_tokens, request.prefill_tokens)
    out[OF.is_strict] = 1.0 if request.slo_class == STRICT else 0.0
    out[OF.ttft_slo] = _of(OF.ttft_slo, min(request.ttft_slo_s, 1e9))
    if request.num_output_tokens == 0 and 0.0 < request.ttft_slo_s < math.inf:
        left_s = request.ttft_slo_s - (now_s - request.arrival_s)
        out[OF.ttft_slack] = max(-1.0, min(1.0, left_s / request.ttft_slo_s))
    out[OF.emitted_tokens] = _of(OF.emitted_tokens, request.num_output_tokens)
    if not math.isnan(request.length_hint):
        out[OF.length_hint] = _of(OF.length_hint, request.length_hint)
    out[OF.has_session] = 1.0 if last_replica != NONE else 0.0
    out[OF.arrivals_10s] = _of(OF.arrivals_10s, arrivals)
    out[OF.arrived_tokens_10s] = _of(OF.arrived_tokens_10s, tokens)
    out[OF.num_held] = _of(OF.num_held, num_held)
    for j in range(candidates.shape[0]):
        _observe_replica(candidates[j], j == last_replica, request.prefill_tokens, rows[j])


@kernel()
def _observe_replica(candidate, is_last, prompt, row):
    row[AT.is_legal] = candidate.is_legal
    row[AT.is_up] = candidate.is_up
    row[AT.is_last] = 1.0 if is_last else 0.0
    row[AT.cached_share] = candidate.cached_tokens / prompt
    row[AT.uncached_tokens] = _at(AT.uncached_tokens, candidate.uncached_tokens)
    row[AT.predicted_ttft] = _at(AT.predicted_ttft, candidate.predicted_ttft_s)
    row[AT.num_waiting] = _at(AT.num_waiting, candidate.num_waiting)
    row[AT.num_running] = _at(AT.num_running, candidate.num_running)
    row[AT.num_strict] = _at(AT.num_strict, candidate.num_strict)
    row[AT.prompt_tokens_left] = _at(AT.prompt_tokens_left, candidate.prompt_tokens_left)
    row[AT.output_tokens_left] = _at(AT.output_tokens_left, candidate.output_tokens_left)
    row[AT.kv_usage] = candidate.kv_usage
    row[AT.mean_batch] = _at(AT.mean_batch, candidate.mean_batch_s)
    row[AT.age] = _at(AT.age, candidate.age_s)
    row[AT.num_dispatched] = _at(AT.num_dispatched, candidate.num_dispatched)
    row[AT.tokens_per_s] = _at(AT.tokens_per_s, candidate.tokens_per_s)
    row[AT.total_blocks] = _at(AT.total_blocks, candidate.total_blocks)


def bounds(entries: tuple[Feature, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest values of the entries, float32 (num_entries,) each."""
    return np.array([f.low for f in entries], np.float32), np.array([f.high for f in entries], np.float32)
