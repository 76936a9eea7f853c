"""A bound to compare with: who knows every output length and serves the shortest total work first."""

import math

from llmsched_gym.engine.batch import (
    is_prefill,
    open_batch,
    uncached_prefill,
)
from llmsched_gym.engine.blocks import known_computed
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.pack import SRPT, add_all_decodes, add_prompts_by, keep_going
from llmsched_gym.engine.predict import can_make_ttft
from llmsched_gym.scheduler import Compiled

PRICED_TOKENS = 512


@kernel()
def work_s(lane, r):
    """Seconds that the rest of request `r` takes of the device: its tokens in batches of 512, and their attention."""
    request = lane.requests[r]
    tokens = min(PRICED_TOKENS, lane.sim.max_num_batched_tokens)
    token_s = lane.linear_s[tokens] / tokens
    prompt, computed = request.prefill_tokens, known_computed(lane, r)
    left = request.length_hint - request.num_output_tokens
    decodes = max(0.0, left - 1.0) if left == left else 0.0  # without a hint: its prompt alone
    pairs = 0.5 * (prompt * (prompt + 1.0) - computed * (computed + 1.0))
    kv_tokens = prompt + decodes * (prompt + 0.5 * (decodes + 1.0))
    return token_s * (prompt - computed + decodes) + lane.coef_s[0] * pairs + lane.coef_s[1] * kv_tokens


@kernel()
def least_work(lane, admitting, hold, limit):
    """The prompt, started or waiting, of the request with least work left; -1 if there is none."""
    best = -1
    best_s = math.inf
    for i in range(lane.sim.num_running):
        r = lane.running[i]
        if is_prefill(lane.requests[r]) and lane.requests[r].num_scheduled_tokens == 0:
            if hold and not can_make_ttft(lane, r):
                continue
            seconds = work_s(lane, r)
            if seconds < best_s or (seconds == best_s and r < best):
                best, best_s = r, seconds
    if not admitting:
        return best
    for i in range(lane.sim.num_waiting):
        r = lane.waiting[i]
        if lane.requests[r].num_scheduled_tokens == 0:
            if (hold and not can_make_ttft(lane, r)) or (limit and uncached_prefill(lane, r) > lane.batch.limit):
                continue
            seconds = work_s(lane, r)
            if seconds < best_s or (seconds == best_s and r < best):
                best, best_s = r, seconds
    return best


def shortest_total(lane):
    """Every decode, then prompts by the work that is left of the whole request, decodes included; in capped batches."""
    open_batch(lane)
    add_all_decodes(lane)
    add_prompts_by(lane, least_work)
    keep_going(lane)


SCHEDULERS = {
    "shortest-total": Compiled(
        "a bound that knows all output lengths: least total work first, batch time up to 0.8 of the tightest TBT SLO",
        shortest_total,
        # a cap that jitter of 5 % leaves intact; prompts that are hopeless wait while others are not
        {"order": SRPT, "token_budget": 1024, "cap": 0.8, "hold": 1},
        clairvoyant=True,
    ),
}
