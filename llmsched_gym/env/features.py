"""The default observation: a flat vector of named, bounded features of what a scheduler may see (rule 6).

Counts and sizes go through log1p with a fixed scale, ``min(1, log1p(x) / log1p(scale))``, so that an entry means the
same in every suite and at every load.
"""

from __future__ import annotations

import math

import numpy as np

from llmsched_gym.config import MOST, EnvConfig
from llmsched_gym.cost import load_profile
from llmsched_gym.engine.batch import is_prefill, uncached_prefill
from llmsched_gym.engine.due import open_wait
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.mixing import price_of_mixing
from llmsched_gym.engine.predict import can_make_ttft
from llmsched_gym.engine.promise import NONE_DROPPED, STRETCH, promise
from llmsched_gym.env.feature import Feature, places, scales, squash
from llmsched_gym.env.reward import pay_live

_SLACK_1, _SLACK_2, _SLACK_3 = 0.2, 0.4, 0.7  # shares of the TBT SLO left
EMITTED_EDGES = (32, 128, 512)  # tokens
TTFT_SLACK_EDGES_S = (0.0, 0.5, 1.0, 2.0)
PROMPT_EDGES = (512, 1024, 2048, 4096)  # tokens
_COUNT_SCALE = 128.0
_CLASSES = ("strict", "relaxed")


def _log(name: str, scale: float, what: str, unit: str = "", step: float = 1.0) -> Feature:
    return Feature(name, 0, 1, what, scale, unit, log=True, step=step)


def _share(name: str, scale: float, unit: str, what: str, otherwise: str = "") -> Feature:
    return Feature(name, 0, 1, what, scale, unit, otherwise=otherwise)


def _count(name: str, what: str) -> Feature:
    return _log(name, _COUNT_SCALE, what)


def _histogram(prefix: str, labels: list[str], what: str) -> list[Feature]:
    return [_count(f"{prefix}_{label}", f"{what} ({label})") for label in labels]


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
    _count("num_started", "started prompts"),
    _log("decode_context_tokens", 3e5, "KV tokens that one decode of everybody reads"),
    _log("mean_batch", 1, "mean batch time so far", "s", step=0.01),
    _log("last_batch", 1, "last batch time", "s", step=0.01),
    _log("last_batch_tokens", 8192, "tokens of the last batch"),
    _count("last_batch_decodes", "decodes of the last batch"),
    _share("cost_ratio", 2, "", "measured over predicted batch time, moving average"),
    _log("arrivals_10s", 10, "arrivals per second over 10 s"),
    _log("arrivals_60s", 10, "arrivals per second over 60 s"),
    _log("arrived_tokens_10s", 2e4, "prompt tokens per second over 10 s"),
    _log("arrived_tokens_60s", 2e4, "prompt tokens per second over 60 s"),
    _share("smallest_tbt_slo", 1, "s", "smallest TBT SLO among running decodes", "1 without decodes"),
    *(
        feature
        for name in _CLASSES
        for feature in (
            *_histogram(f"{name}_decodes", _SLACK_LABELS, f"{name} decodes by share of the TBT SLO left"),
            *_histogram(f"{name}_emitted", _EMITTED_LABELS, f"{name} decodes by tokens emitted"),
            _count(f"{name}_spoiled", f"{name} decodes that can no longer attain"),
        )
    ),
    *_histogram("waiting", _TTFT_LABELS, "waiting prompts by time left to their TTFT SLO"),
    *_histogram("waiting_prompt", _PROMPT_LABELS, "waiting prompts by length in tokens"),
    _count("waiting_feasible", "waiting prompts that can make their TTFT SLO if served now"),
    _count("waiting_strict", "waiting prompts of strict users"),
    _share("shortest_waiting", 8192, "tokens", "shortest waiting prompt", "1 if none waits"),
    _log("oldest_waiting", 120, "age of the oldest waiting request", "s", step=0.1),
    Feature("worst_patience", 0, 1, "largest lateness of a waiting request, share of its patience"),
    _count("promised", "prompts that can all make their TTFT SLO (engine.promise)"),
    _share("promised_work", 4, "s", "their service alone"),
    _share("promise_slack", 1, "s", "least time that one of them has left", "1 if there is none"),
    _count("dropped", "prompts that could make their TTFT SLO, but not with the promised ones"),
    _share("shortest_dropped", 8192, "tokens", "the shortest of them", "1 if there is none"),
)
NUM_FEATURES = len(FEATURES)
MIXING_TOKENS = 768  # prompt tokens whose price is asked; fixed, as between batches there is no token budget yet
MIXING = _share(
    "price_of_mixing",
    2,
    "",
    f"predicted time of all decodes beside up to {MIXING_TOKENS} prompt tokens, over that of the two in batches of "
    "their own",
    "0 without decodes or prompts",
)
CACHE: tuple[Feature, ...] = (
    _log("waiting_uncached_tokens", 1e6, "prompt tokens waiting that are not cached"),
    _share("waiting_hit", 1, "", "of the prompt tokens waiting, those that are cached", "0 if none waits"),
    Feature(
        "shortest_uncached",
        0,
        1,
        "least tokens of a waiting prompt that are not cached",
        32768,
        "tokens",
        log=True,
        otherwise="1 if none waits",
    ),
    _count("waiting_turns", "waiting requests that go on with a session"),
    _count("running_turns", "running requests that go on with a session"),
)
ALL_FEATURES = (*FEATURES, MIXING, *CACHE)
"""With those that only some environments have, which come last: MIXING and, with prefix caching, CACHE."""
WIDTHS = (NUM_FEATURES, NUM_FEATURES + 1, len(ALL_FEATURES))
"""How many features there may be."""
AT = places(ALL_FEATURES)
_PER_STEP, _PER_LOG, _SCALES = scales(ALL_FEATURES)
_FIRST_CLASS, _PER_CLASS = AT.strict_decodes_overdue, AT.relaxed_decodes_overdue - AT.strict_decodes_overdue
_EMITTED, _SPOILED = AT.strict_emitted_to_32 - _FIRST_CLASS, AT.strict_spoiled - _FIRST_CLASS
_COUNTS = np.minimum(1.0, np.log1p(np.arange(129)) / math.log1p(_COUNT_SCALE)).astype(np.float32)


def features_of(config: EnvConfig, num_features: int | None = None) -> tuple[Feature, ...]:
    """The features of an environment: all with prefix caching; MIXING where the own profile knows what mixing costs.

    With `num_features` the first so many, whatever the profile: a policy sees on every profile what it was made for.
    """
    if num_features is not None:
        return ALL_FEATURES[:num_features]
    if config.prefix_caching:
        return ALL_FEATURES
    own = load_profile(config.scheduler_profile or config.profile)
    return FEATURES if own.surface is None else (*FEATURES, MIXING)


@kernel()
def logarithm(place, x):
    """The feature at `place` for a value on a log scale."""
    return squash(x * _PER_STEP[place], _PER_LOG[place])


@kernel()
def share(place, x):
    """The feature at `place` for a value that is a share of its scale."""
    return min(1.0, x / _SCALES[place])


@kernel()
def is_turn(lane, r):
    """Whether `r` goes on with a session, as far as the engine tells: with prefix caching."""
    return lane.sim.prefix_caching and lane.prefixes[r].turn > 0


@kernel(outline=True)
def _observe_cache(lane, out):
    """Fill the features of CACHE."""
    sim = lane.sim
    turns = uncached = 0
    least = MOST
    for i in range(sim.num_waiting):
        r = lane.waiting[i]
        n = uncached_prefill(lane, r)
        uncached += n
        least = min(least, n)
        turns += is_turn(lane, r)
    out[AT.waiting_uncached_tokens] = logarithm(AT.waiting_uncached_tokens, uncached)
    cached = sim.waiting_tokens - uncached
    out[AT.waiting_hit] = cached / sim.waiting_tokens if sim.waiting_tokens > 0 else 0.0
    out[AT.shortest_uncached] = logarithm(AT.shortest_uncached, least) if sim.num_waiting > 0 else 1.0
    out[AT.waiting_turns] = _COUNTS[min(turns, 128)]
    turns = 0
    for i in range(sim.num_running):
        turns += is_turn(lane, lane.running[i])
    out[AT.running_turns] = _COUNTS[min(turns, 128)]


@kernel()
def observe_features(lane, out, pays, world, rules, terms):
    """Fill ``out`` (float32, as long as one of WIDTHS) with the features, in their order.

    If `pays`, what the utility of the measured live requests has changed is booked on the same way through the lists
    and returned (``pay_live`` of env/reward.py).
    """
    sim, about, requests = lane.sim, lane.episode, lane.requests
    cohort_start, cohort_stop = (world.cohort_start, world.cohort_stop) if pays else (0, 0)
    paid = 0.0
    now_s = sim.clock_s
    out[:] = 0.0
    started = started_tokens = 0
    context = 0
    smallest_s = 1.0
    for i in range(sim.num_running):
        r = lane.running[i]
        request = requests[r]
        paid += pay_live(about, now_s, rules, cohort_start, cohort_stop, r, request, terms)
        if is_prefill(request):
            started += 1
            started_tokens += request.prefill_tokens - request.num_computed_tokens
            continue
        context += request.num_computed_tokens + 1
        smallest_s = min(smallest_s, request.tbt_slo_s)
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
        k = _EMITTED + (n > EMITTED_EDGES[0]) + (n > EMITTED_EDGES[1]) + (n > EMITTED_EDGES[2])
        out[first + k] += 1.0
        if request.ttft_missed or request.num_late_gaps > 0 or left_s < 0.0:
            out[first + _SPOILED] += 1.0
    shortest = 8192
    worst = 0.0
    oldest_s = now_s
    for i in range(sim.num_waiting):
        r = lane.waiting[i]
        request = requests[r]
        paid += pay_live(about, now_s, rules, cohort_start, cohort_stop, r, request, terms)
        since_s, slo_s = open_wait(request)
        left_s = slo_s - (now_s - since_s)
        k = 0
        if left_s >= 0.0:
            k = 1 + (left_s >= TTFT_SLACK_EDGES_S[1]) + (left_s >= TTFT_SLACK_EDGES_S[2])
            k += left_s >= TTFT_SLACK_EDGES_S[3]
            if can_make_ttft(lane, r):
                out[AT.waiting_feasible] += 1.0
        worst = max(worst, request.lateness_s + max(0.0, -left_s))
        out[AT.waiting_missed + k] += 1.0
        n = request.prefill_tokens
        k = AT.waiting_prompt_to_512 + (n > PROMPT_EDGES[0]) + (n > PROMPT_EDGES[1])
        k += n > PROMPT_EDGES[2]
        k += n > PROMPT_EDGES[3]
        out[k] += 1.0
        if request.slo_class == 0:
            out[AT.waiting_strict] += 1.0
        shortest = min(shortest, n)
        oldest_s = min(oldest_s, request.arrival_s)
    for i in range(_FIRST_CLASS, AT.shortest_waiting):
        out[i] = _COUNTS[min(int(out[i]), 128)]

    out[AT.kv_cache_usage_last_batch] = sim.kv_cache_usage
    out[AT.kv_cache_usage] = (sim.total_blocks - sim.free_blocks) / sim.total_blocks
    out[AT.running_share] = sim.num_running / sim.max_num_seqs
    out[AT.num_waiting] = logarithm(AT.num_waiting, sim.num_waiting)
    out[AT.waiting_tokens] = logarithm(AT.waiting_tokens, sim.waiting_tokens)
    out[AT.started_tokens] = logarithm(AT.started_tokens, started_tokens)
    out[AT.num_started] = _COUNTS[min(started, 128)]
    out[AT.decode_context_tokens] = logarithm(AT.decode_context_tokens, context)
    out[AT.mean_batch] = logarithm(AT.mean_batch, sim.mean_batch_s)
    out[AT.last_batch] = logarithm(AT.last_batch, sim.last_batch_s)
    out[AT.last_batch_tokens] = logarithm(AT.last_batch_tokens, sim.last_batch_tokens)
    out[AT.last_batch_decodes] = _COUNTS[min(sim.last_batch_decodes, 128)]
    out[AT.cost_ratio] = share(AT.cost_ratio, sim.cost_ratio)
    out[AT.arrivals_10s] = logarithm(AT.arrivals_10s, sim.arrivals_10s)
    out[AT.arrivals_60s] = logarithm(AT.arrivals_60s, sim.arrivals_60s)
    out[AT.arrived_tokens_10s] = logarithm(AT.arrived_tokens_10s, sim.arrived_tokens_10s)
    out[AT.arrived_tokens_60s] = logarithm(AT.arrived_tokens_60s, sim.arrived_tokens_60s)
    out[AT.smallest_tbt_slo] = share(AT.smallest_tbt_slo, smallest_s)
    out[AT.shortest_waiting] = share(AT.shortest_waiting, shortest)
    out[AT.oldest_waiting] = logarithm(AT.oldest_waiting, now_s - oldest_s)
    out[AT.worst_patience] = min(1.0, worst / about.patience_s) if about.patience_s < math.inf else 0.0
    promised, dropped, slack_s, work_s, shortest_dropped = 0, 0, math.inf, 0.0, NONE_DROPPED
    if started > 0 or sim.num_waiting > 0:
        promised, dropped, slack_s, work_s, shortest_dropped = promise(lane, STRETCH)
    out[AT.promised] = _COUNTS[min(promised, 128)]
    out[AT.promised_work] = share(AT.promised_work, work_s)
    out[AT.promise_slack] = share(AT.promise_slack, max(0.0, slack_s))
    out[AT.dropped] = _COUNTS[min(dropped, 128)]
    out[AT.shortest_dropped] = share(AT.shortest_dropped, shortest_dropped)
    if out.shape[0] > AT.price_of_mixing:
        price = price_of_mixing(lane, min(MIXING_TOKENS, sim.max_num_batched_tokens))
        out[AT.price_of_mixing] = share(AT.price_of_mixing, price)
    if out.shape[0] > AT.waiting_uncached_tokens:
        _observe_cache(lane, out)
    return paid
