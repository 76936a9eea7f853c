"""The default observation: a flat vector of named, bounded features of what a scheduler may see (rule 6).

Counts and sizes go through log1p with a fixed scale, ``min(1, log1p(x) / log1p(scale))``, so that an entry means the
same in every suite and at every load.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from llmsched_gym.config import EnvConfig
from llmsched_gym.cost import load_profile
from llmsched_gym.engine.batch import can_make_ttft, is_prefill
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.mixing import price_of_mixing
from llmsched_gym.engine.promise import NONE_DROPPED, STRETCH, promise
from llmsched_gym.env.reward import has_changed, pay_live


class Feature(NamedTuple):
    """One entry of the observation."""

    name: str
    low: float
    high: float
    what: str  # meaning, unit, scale


_SLACK_1, _SLACK_2, _SLACK_3 = 0.2, 0.4, 0.7  # shares of the TBT SLO left
EMITTED_EDGES = (32, 128, 512)  # tokens
TTFT_SLACK_EDGES_S = (0.0, 0.5, 1.0, 2.0)
PROMPT_EDGES = (512, 1024, 2048, 4096)  # tokens
_COUNT_SCALE = 128.0
_CLASSES = ("strict", "relaxed")


def _histogram(prefix: str, labels: list[str], what: str) -> list[Feature]:
    return [Feature(f"{prefix}_{label}", 0, 1, f"{what} ({label}), log scale to 128") for label in labels]


def _log(name: str, scale: float, what: str) -> Feature:
    return Feature(name, 0, 1, f"{what}, log scale to {scale:g}")


_SLACK_LABELS = ["overdue", "under_0.2", "under_0.4", "under_0.7", "over_0.7"]
_EMITTED_LABELS = ["to_32", "to_128", "to_512", "over_512"]
_TTFT_LABELS = ["missed", "under_0.5s", "under_1s", "under_2s", "over_2s"]
_PROMPT_LABELS = ["to_512", "to_1024", "to_2048", "to_4096", "over_4096"]

FEATURES: tuple[Feature, ...] = (
    Feature("kv_cache_usage_last_batch", 0, 1, "KV blocks in use after scheduling the last batch, before its frees"),
    Feature("kv_cache_usage", 0, 1, "KV blocks in use now, share of all"),
    Feature("running_share", 0, 1, "running sequences, share of max_num_seqs"),
    _log("num_waiting", 1000, "waiting requests"),
    _log("waiting_tokens", 1e6, "prompt tokens waiting"),
    _log("started_tokens", 1e5, "prompt tokens left of started prompts"),
    _log("num_started", 128, "started prompts"),
    _log("decode_context_tokens", 3e5, "KV tokens that one decode of everybody reads"),
    Feature("mean_batch", 0, 1, "mean batch time so far, log scale to 1 s in steps of 10 ms"),
    Feature("last_batch", 0, 1, "last batch time, same scale"),
    _log("last_batch_tokens", 8192, "tokens of the last batch"),
    _log("last_batch_decodes", 128, "decodes of the last batch"),
    Feature("cost_ratio", 0, 1, "measured over predicted batch time, moving average, halved"),
    Feature("arrivals_10s", 0, 1, "arrivals per second over 10 s, log scale to 10"),
    Feature("arrivals_60s", 0, 1, "arrivals per second over 60 s, log scale to 10"),
    Feature("arrived_tokens_10s", 0, 1, "prompt tokens per second over 10 s, log scale to 20,000"),
    Feature("arrived_tokens_60s", 0, 1, "prompt tokens per second over 60 s, log scale to 20,000"),
    Feature("smallest_tbt_slo", 0, 1, "smallest TBT SLO among running decodes, share of 1 s; 1 without decodes"),
    *(
        feature
        for name in _CLASSES
        for feature in (
            *_histogram(f"{name}_decodes", _SLACK_LABELS, f"{name} decodes by share of the TBT SLO left"),
            *_histogram(f"{name}_emitted", _EMITTED_LABELS, f"{name} decodes by tokens emitted"),
            Feature(f"{name}_spoiled", 0, 1, f"{name} decodes that can no longer attain, log scale to 128"),
        )
    ),
    *_histogram("waiting", _TTFT_LABELS, "waiting prompts by time left to their TTFT SLO"),
    *_histogram("waiting_prompt", _PROMPT_LABELS, "waiting prompts by length in tokens"),
    Feature("waiting_feasible", 0, 1, "waiting prompts that can make their TTFT SLO if served now, log scale to 128"),
    Feature("waiting_strict", 0, 1, "waiting prompts of strict users, log scale to 128"),
    Feature("shortest_waiting", 0, 1, "shortest waiting prompt, share of 8,192 tokens; 1 if none waits"),
    Feature("oldest_waiting", 0, 1, "age of the oldest waiting request, log scale to 120 s in steps of 0.1 s"),
    Feature("worst_patience", 0, 1, "largest lateness of a waiting request, share of its patience"),
    Feature("promised", 0, 1, "prompts that can all make their TTFT SLO (engine.promise), log scale to 128"),
    Feature("promised_work", 0, 1, "their service alone, share of 4 s"),
    Feature("promise_slack", 0, 1, "least time that one of them has left, share of 1 s; 1 if there is none"),
    Feature(
        "dropped", 0, 1, "prompts that could make their TTFT SLO, but not with the promised ones, log scale to 128"
    ),
    Feature("shortest_dropped", 0, 1, "the shortest of them, share of 8,192 tokens; 1 if there is none"),
)
NUM_FEATURES = len(FEATURES)
MIXING_TOKENS = 768  # prompt tokens whose price is asked; fixed, as between batches there is no token budget yet
MIXING = Feature(
    "price_of_mixing",
    0,
    1,
    f"predicted time of all decodes beside up to {MIXING_TOKENS} prompt tokens, over that of the two in batches of "
    "their own, halved; 0 without decodes or prompts",
)
ALL_FEATURES = (*FEATURES, MIXING)
"""With those that only some profiles have, which come last."""
_FIRST_CLASS = 18
_PER_CLASS = len(_SLACK_LABELS) + len(_EMITTED_LABELS) + 1
_FIRST_WAITING = _FIRST_CLASS + 2 * _PER_CLASS
_COUNTS = np.minimum(1.0, np.log1p(np.arange(129)) / math.log1p(_COUNT_SCALE)).astype(np.float32)


def features_of(config: EnvConfig) -> tuple[Feature, ...]:
    """The features of an environment: MIXING is one where the scheduler's own profile knows what mixing costs."""
    own = load_profile(config.scheduler_profile or config.profile)
    return FEATURES if own.surface is None else ALL_FEATURES


@kernel()
def squash(x, per_log):
    """log1p with a fixed scale, within 0 and 1; `per_log` is :func:`per_log_of` the scale."""
    return min(1.0, math.log(1.0 + x) * per_log)


def per_log_of(scale: float) -> float:
    """1 / log1p(scale): computed once, as a logarithm is the dearest operation of an observation."""
    return 1.0 / math.log1p(scale)


_PER_10, _PER_100, _PER_1000, _PER_1200 = map(per_log_of, (10.0, 100.0, 1000.0, 1200.0))
_PER_8192, _PER_20K, _PER_100K, _PER_300K, _PER_1M = map(per_log_of, (8192.0, 2e4, 1e5, 3e5, 1e6))


@kernel()
def observe_features(lane, out, pays, world, rules, terms):
    """Fill ``out`` (float32, of NUM_FEATURES, or one more for MIXING) with the features, in their order.

    If `pays`, what the utility of the measured live requests has changed is booked on the same way through the lists
    and returned: a second pass over them would cost as much as the step's decision.
    """
    sim, about, requests = lane.sim, lane.episode, lane.requests
    cohort_start, cohort_stop = (world.cohort_start, world.cohort_stop) if pays else (0, 0)
    paid = 0.0
    now_s, tbt_rule = sim.clock_s, rules.tbt_rule
    out[:] = 0.0
    started = started_tokens = 0
    context = 0
    smallest = 1.0
    for i in range(sim.num_running):
        r = lane.running[i]
        request = requests[r]
        if cohort_start <= r < cohort_stop and has_changed(now_s, tbt_rule, request):
            paid += pay_live(about, now_s, rules, request, terms)
        if is_prefill(request):
            started += 1
            started_tokens += request.prefill_tokens - request.num_computed_tokens
            continue
        context += request.num_computed_tokens + 1
        smallest = min(smallest, request.tbt_slo_s)
        first = _FIRST_CLASS + _PER_CLASS * min(request.slo_class, 1)
        slo_s = request.tbt_slo_s
        left_s = slo_s - (now_s - request.last_token_s)
        k = 0  # an int first: without compilation bools would be or-ed
        k += left_s >= 0.0
        k += left_s >= _SLACK_1 * slo_s
        k += left_s >= _SLACK_2 * slo_s
        k += left_s >= _SLACK_3 * slo_s
        out[first + k] += 1.0
        n = request.num_output_tokens
        k = 5 + (n > EMITTED_EDGES[0]) + (n > EMITTED_EDGES[1]) + (n > EMITTED_EDGES[2])
        out[first + k] += 1.0
        if request.ttft_missed or request.num_late_gaps > 0 or left_s < 0.0:
            out[first + 9] += 1.0
    shortest = 8192
    worst = 0.0
    oldest_s = now_s
    first = _FIRST_WAITING
    for i in range(sim.num_waiting):
        r = lane.waiting[i]
        request = requests[r]
        if cohort_start <= r < cohort_stop and has_changed(now_s, tbt_rule, request):
            paid += pay_live(about, now_s, rules, request, terms)
        left_s = request.ttft_slo_s - (now_s - request.arrival_s)
        if request.num_output_tokens > 0:
            left_s = request.tbt_slo_s - (now_s - request.last_token_s)
        k = 0
        if left_s >= 0.0:
            k = 1 + (left_s >= TTFT_SLACK_EDGES_S[1]) + (left_s >= TTFT_SLACK_EDGES_S[2])
            k += left_s >= TTFT_SLACK_EDGES_S[3]
            if can_make_ttft(lane, r):
                out[first + 10] += 1.0
        worst = max(worst, request.lateness_s + max(0.0, -left_s))
        out[first + k] += 1.0
        n = request.prefill_tokens
        k = 5 + (n > PROMPT_EDGES[0]) + (n > PROMPT_EDGES[1]) + (n > PROMPT_EDGES[2]) + (n > PROMPT_EDGES[3])
        out[first + k] += 1.0
        if request.slo_class == 0:
            out[first + 11] += 1.0
        shortest = min(shortest, n)
        oldest_s = min(oldest_s, request.arrival_s)
    for i in range(_FIRST_CLASS, _FIRST_WAITING + 12):
        out[i] = _COUNTS[min(int(out[i]), 128)]

    out[0] = sim.kv_cache_usage
    out[1] = (sim.total_blocks - sim.free_blocks) / sim.total_blocks
    out[2] = sim.num_running / sim.max_num_seqs
    out[3] = squash(sim.num_waiting, _PER_1000)
    out[4] = squash(sim.waiting_tokens, _PER_1M)
    out[5] = squash(started_tokens, _PER_100K)
    out[6] = _COUNTS[min(started, 128)]
    out[7] = squash(context, _PER_300K)
    out[8] = squash(sim.mean_batch_s * 100.0, _PER_100)
    out[9] = squash(sim.last_batch_s * 100.0, _PER_100)
    out[10] = squash(sim.last_batch_tokens, _PER_8192)
    out[11] = _COUNTS[min(sim.last_batch_decodes, 128)]
    out[12] = min(1.0, sim.cost_ratio * 0.5)
    out[13] = squash(about.arrivals_10s, _PER_10)
    out[14] = squash(about.arrivals_60s, _PER_10)
    out[15] = squash(about.arrived_tokens_10s, _PER_20K)
    out[16] = squash(about.arrived_tokens_60s, _PER_20K)
    out[17] = smallest
    out[first + 12] = min(1.0, shortest / 8192.0)
    out[first + 13] = squash((now_s - oldest_s) * 10.0, _PER_1200)
    out[first + 14] = min(1.0, worst / about.patience_s) if about.patience_s < math.inf else 0.0
    promised, dropped, slack_s, work_s, shortest_dropped = 0, 0, math.inf, 0.0, NONE_DROPPED
    if started > 0 or sim.num_waiting > 0:
        promised, dropped, slack_s, work_s, shortest_dropped = promise(lane, STRETCH)
    out[first + 15] = _COUNTS[min(promised, 128)]
    out[first + 16] = min(1.0, work_s * 0.25)
    out[first + 17] = min(1.0, max(0.0, slack_s))
    out[first + 18] = _COUNTS[min(dropped, 128)]
    out[first + 19] = min(1.0, shortest_dropped / 8192.0)
    if out.shape[0] > NUM_FEATURES:
        out[NUM_FEATURES] = min(1.0, 0.5 * price_of_mixing(lane, min(MIXING_TOKENS, sim.max_num_batched_tokens)))
    return paid
