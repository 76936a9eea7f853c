"""vLLM that refuses a newcomer while too many prompt tokens wait (`max_num_queued_tokens`).

Source, read: vLLM's server option. A request that comes while more than `limit` prompt tokens wait is refused, so it
needs a scenario that allows refusal. Without `limit` the bound is, of each newcomer, what the device computes within
its TTFT SLO: TTFT SLO * prefill rate, the rate being that of a prompt as long as the token budget, alone, by the
scheduler's own profile. All else is `vllm-v1`.

Guessed: that a prompt counts in full whatever of it is cached, that the newcomer itself does not count, and that of
those who come during one batch the first is asked first.
"""

import math

from llmsched_gym.baselines.vllm_v1 import OWN, fill_v1
from llmsched_gym.engine.batch import open_batch, refuse
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.predict import prompt_s
from llmsched_gym.scheduler import VLLM_TOKEN_BUDGET, Compiled, Own, not_negative_int

OWN_QUEUE = (*OWN, Own("limit", 0, not_negative_int, "whole number of prompt tokens, 0 for TTFT SLO * prefill rate"))
LIMIT = len(OWN)


@kernel()
def prefill_rate(lane):
    """Prompt tokens per second of one prompt as long as the token budget, served alone."""
    n = max(1, min(lane.knobs.token_budget, lane.sim.max_num_batched_tokens))
    return n / prompt_s(lane.linear_s, lane.coef_s, 0, n, n)


@kernel()
def refuse_newcomers(lane):
    """Refuse who has come while too much waited; of those that wait nobody else needs their `lst_s`: they were asked.

    The line is by arrival behind the preempted, so newcomers are its end.
    """
    sim, requests = lane.sim, lane.requests
    first, queued = sim.num_waiting, sim.waiting_tokens
    for i in range(sim.num_waiting - 1, -1, -1):
        request = requests[lane.waiting[i]]
        if not math.isnan(request.lst_s) or request.num_preemptions > 0:
            break
        first = i
        queued -= request.prefill_tokens
    if first == sim.num_waiting:
        return
    own, rate = lane.knobs.own[LIMIT], prefill_rate(lane)
    for i in range(first, sim.num_waiting):
        r, request = lane.waiting[i], requests[lane.waiting[i]]
        if queued > (own if own > 0 else request.ttft_slo_s * rate):
            refuse(lane, r)
        else:
            queued += request.prefill_tokens
            request.lst_s = sim.clock_s


def queue_tokens(lane):
    """Refuse newcomers while too much waits; then as `vllm-v1`."""
    open_batch(lane)
    refuse_newcomers(lane)
    fill_v1(lane, lane.sim.max_num_seqs)


SCHEDULERS = {
    "queue-tokens": Compiled(
        "vLLM V1 that refuses newcomers while more prompt tokens wait than its TTFT SLO leaves time for",
        queue_tokens,
        {"token_budget": VLLM_TOKEN_BUDGET},
        admission="prompt-check",
        options=("reserve",),
        own=OWN_QUEUE,
        refuses=True,
    ),
}
