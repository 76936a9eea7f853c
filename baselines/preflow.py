"""PREFLOW: prompts by how much their wait weighs on their own work, which doubles every `half` seconds.

Source: vllm-ascend pull request 16360, its description read. Prompts that wait and that are under way go by
2^(age / half) / (P * R), the largest first, with W(n) = n (n + 1) / 2, P = W(prompt) - W(cached) and
R = W(prompt) - W(computed): weighted shortest remaining job first, where the job is attention alone.

Theirs serves the prefill side of disaggregated serving, without decodes. Guessed: that here all decodes run in each
batch and prompts take the rest of vLLM's budget; `half` = 5 seconds, as the default of theirs is not known.
"""

import math

from llmsched_gym.engine.batch import (
    is_free,
    is_prefill,
    open_batch,
    uncached_prefill,
)
from llmsched_gym.engine.blocks import known_computed
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.pack import add_all_decodes, add_prompts_by, keep_going
from llmsched_gym.engine.predict import can_make_ttft
from llmsched_gym.engine.records import WAITING
from llmsched_gym.scheduler import VLLM_TOKEN_BUDGET, Compiled, Own, positive

OWN = (Own("half", 5.0, positive, "seconds > 0, inf for no aging"),)
HALF = 0


@kernel()
def work(n):
    """Query-key pairs of the first n tokens."""
    return 0.5 * n * (n + 1.0)


@kernel()
def log_priority(lane, r):
    """Logarithm of a prompt's priority; the largest goes first."""
    request, computed = lane.requests[r], known_computed(lane, r)
    cached = computed if request.phase == WAITING else request.num_cached_tokens
    whole = work(request.prefill_tokens)
    age = (lane.sim.clock_s - request.arrival_s) / lane.knobs.own[HALF]
    return age * math.log(2.0) - math.log(max(1.0, whole - work(cached))) - math.log(max(1.0, whole - work(computed)))


@kernel()
def next_prompt(lane, admitting, hold, limit):
    """The prompt that goes first and is not in the batch, started or, if `admitting`, waiting; -1 if there is none."""
    best, best_key = -1, -math.inf
    for i in range(lane.sim.num_running):
        r = lane.running[i]
        if is_prefill(lane.requests[r]) and is_free(lane, r) and not (hold and not can_make_ttft(lane, r)):
            key = log_priority(lane, r)
            if key > best_key or (key == best_key and r < best):
                best, best_key = r, key
    for i in range(lane.sim.num_waiting if admitting else 0):
        r = lane.waiting[i]
        if not is_free(lane, r) or (limit and uncached_prefill(lane, r) > lane.batch.limit):
            continue
        if hold and not can_make_ttft(lane, r):
            continue
        key = log_priority(lane, r)
        if key > best_key or (key == best_key and r < best):
            best, best_key = r, key
    return best


def preflow(lane):
    """Every decode, then prompts by priority; one that finds no blocks keeps the others out."""
    open_batch(lane)
    add_all_decodes(lane)
    add_prompts_by(lane, next_prompt)
    keep_going(lane)


SCHEDULERS = {
    "preflow": Compiled(
        "PREFLOW: all decodes, then prompts by age over own and remaining attention (vllm-ascend pull request 16360)",
        preflow,
        {"token_budget": VLLM_TOKEN_BUDGET},
        own=OWN,
    ),
}
