"""The `slots` observation: one row per request, running ones first, then waiting ones by arrival."""

from __future__ import annotations

import math

from llmsched_gym.config import BLOCK_SIZE
from llmsched_gym.engine.batch import can_make_ttft, is_prefill
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.records import WAITING
from llmsched_gym.env.features import Feature, per_log_of, squash

NUM_SLOTS = 64

SLOT_FEATURES: tuple[Feature, ...] = (
    Feature("running", 0, 1, "1 if admitted"),
    Feature("decoding", 0, 1, "1 if its whole prompt is computed"),
    Feature("prompt", 0, 1, "prompt tokens, log scale to 8,192"),
    Feature("remaining", 0, 1, "prompt tokens left to compute, log scale to 8,192"),
    Feature("computed", 0, 1, "tokens whose KV is held, log scale to 8,192"),
    Feature("emitted", 0, 1, "tokens emitted, log scale to 8,192"),
    Feature("slack", -1, 1, "time left to the next deadline, share of that SLO"),
    Feature("slack_s", -1, 1, "time left to the next deadline, tanh of seconds"),
    Feature("tbt_slo", 0, 1, "TBT SLO, share of 1 s"),
    Feature("ttft_slo", 0, 1, "TTFT SLO, log scale to 10 s in steps of 0.1 s"),
    Feature("strict", 0, 1, "1 for a strict user"),
    Feature("spoiled", 0, 1, "1 if it can no longer attain"),
    Feature("lateness", 0, 1, "late seconds, share of its patience"),
    Feature("feasible", 0, 1, "1 if its first token came, or can come, in time"),
    Feature("blocks", 0, 1, "KV blocks held, log scale to 512"),
    Feature("scheduled", 0, 1, "tokens it has in the batch being formed, log scale to 8,192"),
    Feature("length_hint", 0, 1, "predicted output tokens, log scale to 8,192; 0 without a hint"),
)
NUM_SLOT_FEATURES = len(SLOT_FEATURES)
_PER_100, _PER_8192, _PER_512 = map(per_log_of, (100.0, 8192.0, 8192.0 / BLOCK_SIZE))


@kernel()
def num_visible(lane):
    return min(NUM_SLOTS, lane.sim.num_running + lane.sim.num_waiting)


@kernel()
def slot_request(lane, slot):
    """The request in a visible slot."""
    running = lane.sim.num_running
    return lane.running[slot] if slot < running else lane.waiting[slot - running]


@kernel()
def observe_slots(lane, rows, in_use):
    """Fill ``rows`` (NUM_SLOTS, NUM_SLOT_FEATURES) float32 and ``in_use`` (NUM_SLOTS,) int8."""
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
        if emitted == 0:
            slo_s = request.ttft_slo_s
            left_s = slo_s - (sim.clock_s - request.arrival_s)
        else:
            slo_s = request.tbt_slo_s
            left_s = slo_s - (sim.clock_s - request.last_token_s)
        row[0] = request.phase != WAITING
        row[1] = request.phase != WAITING and not is_prefill(request)
        row[2] = squash(request.prompt_tokens, _PER_8192)
        row[3] = squash(max(0, request.prefill_tokens - request.num_computed_tokens), _PER_8192)
        row[4] = squash(request.num_computed_tokens, _PER_8192)
        row[5] = squash(emitted, _PER_8192)
        row[6] = max(-1.0, min(1.0, left_s / slo_s)) if slo_s > 0.0 else -1.0
        row[7] = math.tanh(left_s)
        row[8] = min(1.0, request.tbt_slo_s)
        row[9] = squash(request.ttft_slo_s * 10.0, _PER_100)
        row[10] = request.slo_class == 0
        row[11] = request.ttft_missed or request.num_late_gaps > 0 or left_s < 0.0
        lateness_s = request.lateness_s + max(0.0, -left_s)
        row[12] = min(1.0, lateness_s / patience_s) if patience_s < math.inf else 0.0
        row[13] = not request.ttft_missed if emitted > 0 else can_make_ttft(lane, r)
        row[14] = squash(request.num_blocks, _PER_512)
        row[15] = squash(max(0, request.num_scheduled_tokens), _PER_8192)
        row[16] = 0.0 if math.isnan(request.length_hint) else squash(request.length_hint, _PER_8192)
