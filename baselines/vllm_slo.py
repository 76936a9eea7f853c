"""vLLM's proposed policy `slo`: who waits is ordered by the share of the TTFT SLO that is gone, and finds tokens kept.

Source, read: vLLM pull request 53571 (open; its defaults, that is without a bias between short and long prompts).

- A waiting request scores 200 * wait / TTFT SLO + 10 * (1 - prompt / max_model_len); the highest enters first.
- If a waiting one has used 60 % of its SLO, min(its prompt, 10 % of the budget) is kept from the running requests
  for those that wait, unless more than half of the running ones decode.
- All else is `vllm-v1`. Running requests are not reordered, and nobody is preempted for the order's sake.

Theirs derives one TTFT target for short prompts and one for long ones from its bias; here each request has its SLO.
Guessed: that what is kept and not taken is lost for this batch, and that a preempted request is scored like any other.
"""

import math

from llmsched_gym.baselines.vllm_v1 import OWN, enter, serve_running
from llmsched_gym.engine.batch import is_free, is_prefill, open_batch, uncached_prefill
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.pack import admission_filters, keep_going
from llmsched_gym.engine.predict import can_make_ttft
from llmsched_gym.scheduler import VLLM_TOKEN_BUDGET, Compiled, Own, share

WAIT_WEIGHT, LENGTH_WEIGHT = 200.0, 10.0
USED = 0.6  # share of its TTFT SLO from which a waiting request is urgent
OWN_SLO = (*OWN, Own("kept", 0.1, share, "share of the budget from 0 to 1"))
KEPT = len(OWN)


@kernel()
def used_share(lane, r):
    """Share of its TTFT SLO that a waiting request has used up."""
    request = lane.requests[r]
    return (lane.sim.clock_s - request.arrival_s) / request.ttft_slo_s


@kernel()
def score(lane, r):
    """The larger, the sooner a waiting request enters."""
    length = lane.requests[r].prompt_tokens / lane.sim.max_model_len
    return WAIT_WEIGHT * used_share(lane, r) + LENGTH_WEIGHT * (1.0 - length)


@kernel()
def next_by_score(lane, hold, limit, least_used):
    """The waiting request with the highest score that has used such a share of its SLO; -1 if there is none."""
    best, best_score = -1, -math.inf
    for i in range(lane.sim.num_waiting):
        r = lane.waiting[i]
        if not is_free(lane, r) or used_share(lane, r) < least_used:
            continue
        if (limit and uncached_prefill(lane, r) > lane.batch.limit) or (hold and not can_make_ttft(lane, r)):
            continue
        own = score(lane, r)
        if own > best_score:
            best, best_score = r, own
    return best


@kernel()
def tokens_to_keep(lane, hold, limit):
    """Tokens of the batch that running requests leave to the most urgent one that waits."""
    sim, decodes = lane.sim, 0
    if sim.num_waiting == 0:
        return 0
    for i in range(sim.num_running):
        decodes += not is_prefill(lane.requests[lane.running[i]])
    urgent = next_by_score(lane, hold, limit, USED) if 2 * decodes <= sim.num_running else -1
    if urgent < 0:
        return 0
    most = min(1.0, lane.knobs.own[KEPT]) * lane.batch.token_room
    return min(uncached_prefill(lane, urgent), int(most))


def vllm_slo(lane):
    """Running requests as in `vllm-v1`, with less to spend if somebody urgent waits; then by score."""
    open_batch(lane)
    batch = lane.batch
    hold, limit = admission_filters(lane)
    kept = tokens_to_keep(lane, hold, limit)
    batch.token_room -= kept
    serve_running(lane, True, True)
    batch.token_room += kept
    if batch.num_preempt > 0:
        return
    for _ in range(lane.sim.max_num_seqs):
        r = next_by_score(lane, hold, limit, -math.inf) if batch.token_room > 0 else -1
        if r < 0 or not enter(lane, r):
            break
    keep_going(lane)


SCHEDULERS = {
    "vllm-slo": Compiled(
        "vLLM V1, waiting requests by the share of the TTFT SLO that is gone (vLLM pull request 53571)",
        vllm_slo,
        {"token_budget": VLLM_TOKEN_BUDGET},
        admission="prompt-check",
        options=("reserve",),
        own=OWN_SLO,
    ),
}
