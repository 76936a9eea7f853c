"""The `slots` observation: one row per request, running ones first, then waiting ones by arrival."""

from __future__ import annotations

import math

from llmsched_gym.config import BLOCK_SIZE, EnvConfig
from llmsched_gym.engine.batch import is_prefill, uncached_prefill
from llmsched_gym.engine.due import open_wait
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.predict import can_make_ttft
from llmsched_gym.engine.records import WAITING
from llmsched_gym.env.feature import Feature, places, scales, squash
from llmsched_gym.env.features import ALL_FEATURES

NUM_SLOTS = 64


def _tokens(name: str, what: str, otherwise: str = "") -> Feature:
    return Feature(name, 0, 1, what, 8192, log=True, otherwise=otherwise)


SLOT_FEATURES: tuple[Feature, ...] = (
    Feature("running", 0, 1, "1 if admitted"),
    Feature("decoding", 0, 1, "1 if its whole prompt is computed"),
    _tokens("prompt", "prompt tokens"),
    _tokens("remaining", "prompt tokens left to compute"),
    _tokens("computed", "tokens whose KV is held"),
    _tokens("emitted", "tokens emitted"),
    Feature("slack", -1, 1, "time left to the next deadline, share of that SLO"),
    Feature("slack_s", -1, 1, "time left to the next deadline, tanh of seconds"),
    Feature("tbt_slo", 0, 1, "TBT SLO", 1, "s"),
    Feature("ttft_slo", 0, 1, "TTFT SLO", 10, "s", log=True, step=0.1),
    Feature("strict", 0, 1, "1 for a strict user"),
    Feature("spoiled", 0, 1, "1 if it can no longer attain"),
    Feature("lateness", 0, 1, "late seconds, share of its patience"),
    Feature("feasible", 0, 1, "1 if its first token came, or can come, in time"),
    Feature("blocks", 0, 1, "KV blocks held", 8192 / BLOCK_SIZE, log=True),
    _tokens("scheduled", "tokens it has in the batch being formed"),
    _tokens("length_hint", "predicted output tokens", "0 without a hint"),
)
NUM_SLOT_FEATURES = len(SLOT_FEATURES)


def _context(name: str, what: str) -> Feature:
    return Feature(name, 0, 1, what, 32768, "tokens", log=True)


ALL_SLOT_FEATURES: tuple[Feature, ...] = (
    *SLOT_FEATURES,
    _context("cached", "tokens found in the prefix cache, of a waiting one those that it would find"),
    _context("uncached", "prompt tokens left to compute behind what is cached"),
    Feature("hit", 0, 1, "share of its prompt that is cached"),
    Feature("turn", 0, 1, "requests of its session before it", 64, log=True),
)
"""With those that only environments with prefix caching have, which come last."""
AT = places(ALL_SLOT_FEATURES)
_PER_STEP, _PER_LOG, _ = scales(ALL_SLOT_FEATURES)


def slot_features_of(config: EnvConfig, num_features: int | None = None) -> tuple[Feature, ...]:
    """The columns of a row: all with prefix caching, or in an observation with all features."""
    cached = config.prefix_caching if num_features is None else num_features == len(ALL_FEATURES)
    return ALL_SLOT_FEATURES if cached else SLOT_FEATURES


@kernel()
def logarithm(place, x):
    """The entry at `place` for a value on a log scale."""
    return squash(x * _PER_STEP[place], _PER_LOG[place])


@kernel()
def num_visible(lane):
    """How many slots have a request."""
    return min(NUM_SLOTS, lane.sim.num_running + lane.sim.num_waiting)


@kernel()
def slot_request(lane, slot):
    """The request in a visible slot."""
    running = lane.sim.num_running
    return lane.running[slot] if slot < running else lane.waiting[slot - running]


@kernel(outline=True)
def _observe_cached(lane, row, r):
    """Fill the columns that only environments with prefix caching have."""
    request, uncached = lane.requests[r], uncached_prefill(lane, r)
    waits = request.phase == WAITING
    cached = request.prefill_tokens - uncached if waits else request.num_cached_tokens
    row[AT.cached] = logarithm(AT.cached, cached)
    row[AT.uncached] = logarithm(AT.uncached, max(0, uncached))
    row[AT.hit] = min(1.0, cached / request.prompt_tokens)
    row[AT.turn] = logarithm(AT.turn, lane.prefixes[r].turn) if lane.sim.prefix_caching else 0.0


@kernel()
def observe_slots(lane, rows, in_use):
    """Fill ``rows`` (NUM_SLOTS, number of columns) float32 and ``in_use`` (NUM_SLOTS,) int8."""
    sim, patience_s = lane.sim, lane.episode.patience_s
    visible = num_visible(lane)
    rows[visible:] = 0.0
    in_use[:visible] = 1
    in_use[visible:] = 0
    for slot in range(visible):
        r = slot_request(lane, slot)
        request = lane.requests[r]
        row = rows[slot]
        emitted = request.num_output_tokens
        since_s, slo_s = open_wait(request)
        left_s = slo_s - (sim.clock_s - since_s)
        row[AT.running] = request.phase != WAITING
        row[AT.decoding] = request.phase != WAITING and not is_prefill(request)
        row[AT.prompt] = logarithm(AT.prompt, request.prompt_tokens)
        row[AT.remaining] = logarithm(AT.remaining, max(0, request.prefill_tokens - request.num_computed_tokens))
        row[AT.computed] = logarithm(AT.computed, request.num_computed_tokens)
        row[AT.emitted] = logarithm(AT.emitted, emitted)
        row[AT.slack] = max(-1.0, min(1.0, left_s / slo_s)) if slo_s > 0.0 else -1.0
        row[AT.slack_s] = math.tanh(left_s)
        row[AT.tbt_slo] = min(1.0, request.tbt_slo_s)
        row[AT.ttft_slo] = logarithm(AT.ttft_slo, request.ttft_slo_s)
        row[AT.strict] = request.slo_class == 0
        row[AT.spoiled] = request.ttft_missed or request.num_late_gaps > 0 or left_s < 0.0
        lateness_s = request.lateness_s + max(0.0, -left_s)
        row[AT.lateness] = min(1.0, lateness_s / patience_s) if patience_s < math.inf else 0.0
        row[AT.feasible] = not request.ttft_missed if emitted > 0 else can_make_ttft(lane, r)
        row[AT.blocks] = logarithm(AT.blocks, request.num_blocks)
        row[AT.scheduled] = logarithm(AT.scheduled, max(0, request.num_scheduled_tokens))
        row[AT.length_hint] = 0.0 if math.isnan(request.length_hint) else logarithm(AT.length_hint, request.length_hint)
        if rows.shape[1] > NUM_SLOT_FEATURES:
            _observe_cached(lane, row, r)
