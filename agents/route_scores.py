"""A router that adds up what speaks for each replica, with tuned weights, and its like that is told the future.

:class:`WeightedRouter` sees what every router does. A *told* one, which nobody could run, knows besides how many tokens
each request will emit, so that the loads that it sees are the true ones, and how many turns of its session are to come.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmsched_gym.baselines.routers.shortest import num_requests, tokens_left
from llmsched_gym.cluster.router import CompiledRouter
from llmsched_gym.cluster.state import PROMPTS, ROUTER_MEMORY, Nodes
from llmsched_gym.config import ClusterScenario, ConfigError
from llmsched_gym.evaluation.clusters import simulate_cluster
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.workload import RequestTable, make_table

STRICT = 0  # place in config.SLO_CLASSES
TOKENS = 512.0  # of prompt that a request counts as in `crowd_s`
MOST_LATER = 4  # turns to come, counted in `goes_on`
TURN = 1.0 / 4096  # what a turn to come adds to the hint of a request, for a router that is told

NAMES = (
    "own_s",  # against a replica: its own uncached prompt at full tiles
    "wait_s",  # against: prompt tokens ahead of it
    "work_s",  # against: output tokens left, each as dear as a prompt token
    "crowd_s",  # against: requests there, as if each were 512 tokens of prompt
    "kv_usage",  # against
    "is_late",  # against: its first token is predicted behind its TTFT SLO
    "cached_share",  # for it: of its prompt
    "load_share",  # against: requests there over those at the fullest replica
    "is_alike",  # for: share of the requests there that have its SLO class
    "is_last",  # for: its session's last turn was there
    "goes_on",  # for: the same, by turns of the session that are to come; 0 for who is not told
)
AFFINITY = np.array([float(name in ("cached_share", "load_share")) for name in NAMES])
"""The weights of `prefix-affinity[imbalance=inf]`."""


def weighted(route):
    """The highest sum of weights times entries; ties by fewest tokens left."""
    request, candidates, w, more = route.request, route.candidates, route.options, route.memory
    most = 1
    for j in range(candidates.shape[0]):
        if candidates[j].is_legal:
            most = max(most, num_requests(candidates[j]))
    slack_s = request.ttft_slo_s - (route.route.now_s - request.arrival_s)
    later = 0.0
    if not math.isnan(request.length_hint):
        later = min((request.length_hint - math.floor(request.length_hint)) / TURN, MOST_LATER) / MOST_LATER
    best, highest = -1, -math.inf
    for j in range(candidates.shape[0]):
        candidate = candidates[j]
        if not candidate.is_legal:
            continue
        n, speed = num_requests(candidate), candidate.tokens_per_s
        alike = candidate.num_strict / max(n, 1)
        if request.slo_class != STRICT:
            alike = 1.0 - alike
        score = -w[0] * candidate.uncached_tokens / speed - w[1] * candidate.prompt_tokens_left / speed
        score -= w[2] * candidate.output_tokens_left / speed + w[3] * TOKENS * n / speed
        score -= w[4] * candidate.kv_usage + w[5] * (candidate.predicted_ttft_s > slack_s)
        score += w[6] * candidate.cached_tokens / request.prefill_tokens - w[7] * n / most + more[0] * alike
        if j == route.route.last_replica:
            score += more[1] + more[2] * later
        if score > highest or (score == highest and tokens_left(candidate) < tokens_left(candidates[best])):
            best, highest = j, score
    return best


@dataclass(frozen=True)
class WeightedRouter(CompiledRouter):
    """The kernel with its weights, one for each of `NAMES`; those that have no room as settings lie in its memory."""

    weights: tuple[float, ...] = ()

    def install(self, nodes: Nodes, env: int, which: int = PROMPTS) -> None:
        nodes.options[env, which] = self.weights[:ROUTER_MEMORY]
        nodes.memory[env, which] = 0.0
        nodes.memory[env, which, : len(NAMES) - ROUTER_MEMORY] = self.weights[ROUTER_MEMORY:]


def make_weighted(weights: Sequence[float] | np.ndarray, name: str = "weighted") -> WeightedRouter:
    """The router with these weights."""
    if len(weights) != len(NAMES):
        raise ValueError(f"weights: expected {len(NAMES)}, got {len(weights)}")
    return WeightedRouter("a weighted sum", weighted, name=name, weights=tuple(map(float, weights)))


TUNED = make_weighted(
    [0.5, 0.0, 0.5, 0.0, 0.5, 0.0, 1.0, 0.5, -0.5, 0.0, 0.0],
    name="tuned-router",
)
"""What ``agents.tune_route --suite hetero --seeds 6 --selection-seeds 8`` finds: a router for everybody.

Cached share against load as `prefix-affinity`, and besides seconds of its own prompt and of the outputs left at the
replica's speed, its memory, and requests of the other SLO class for company.
"""


def told(table: RequestTable) -> RequestTable:
    """The table with hints that say how long outputs are and, behind the point, how many turns are to come."""
    return dataclasses.replace(table, length_hint=table.output_tokens + TURN * later_turns(table))


def later_turns(table: RequestTable) -> np.ndarray:
    """For each request how many of its session come after it; int64."""
    order = np.argsort(table.session_id, kind="stable")
    sessions = table.session_id[order]
    stops = np.append(np.flatnonzero(np.diff(sessions)) + 1, len(sessions))
    stop = np.repeat(stops, np.diff(stops, prepend=0))
    found = np.zeros(len(sessions), np.int64)
    found[order] = np.where(sessions >= 0, stop - 1 - np.arange(len(sessions)), 0)
    return found


def utility(
    world: ClusterScenario, scheduler: str, weights: Sequence[float] | np.ndarray, seed: int, *, is_told: bool
) -> float:
    """Mean utility of one run under the weighted router."""
    table = make_table(world, seed)
    if is_told:
        world, table = world.replace(length_hint="oracle"), told(table)
    return float(
        row(simulate_cluster(world, scheduler, seed, router=make_weighted(weights), table=table))["mean_utility"]
    )


def read_weights(file: str) -> np.ndarray:
    """The weights in a file that :func:`tune` wrote; ConfigError for another one."""
    try:
        found = json.loads(Path(file).read_text())["weights"]
        weights = np.array([float(found[name]) for name in NAMES])
    except OSError as error:
        raise ConfigError(f"weights: expected a file of agents.tune_route, got {file!r}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ConfigError(f"weights: {file}: expected weights of {', '.join(NAMES)}, got {error!r}") from None
    if not np.isfinite(weights).all():
        wrong = NAMES[int(np.argmin(np.isfinite(weights)))]
        raise ConfigError(f"weights: {file}: {wrong}: expected a finite number, got {found[wrong]!r}")
    return weights
