"""A cap on running requests by memory and by measured TBT: dynamic batching under memory and SLA constraints.

Source: arXiv 2503.05248, second-hand. As `vllm-v1`, but nobody enters beyond the smaller of two caps:

- memory: floor((KV - margin) / mean tokens of a request), so that blocks do not run out;
- TBT: a bisection on the cap. While decodes' gaps are above the SLO the upper bound comes down to what runs, while
  they are below it the lower bound comes up; the bound on the other side gives way, so that the search goes on.

Guessed: the margin is a share of the cache, `margin` = 0.05; a request's mean tokens are the mean prompt that has come
and the mean output that has finished (512 before the first); the gap is a mean over batches with decodes, each with a
weight of 0.1, looked at every 10 of them, against the smallest TBT SLO of a running decode, 5 % around which nothing is
done; a bound gives way by 4 requests.
"""

from llmsched_gym.baselines.rad import expected_output
from llmsched_gym.baselines.vllm_v1 import OWN, fill_v1
from llmsched_gym.engine.batch import open_batch, smallest_tbt_slo_s
from llmsched_gym.engine.jit import kernel
from llmsched_gym.scheduler import VLLM_TOKEN_BUDGET, Compiled, Own, not_negative

OWN_CONTROL = (*OWN, Own("slack", 0.05, not_negative, "share of the TBT SLO >= 0"))
SLACK = len(OWN)
KV_MARGIN, WEIGHT, EVERY, STEP = 0.05, 0.1, 10, 4.0
# Places in the lane's memory.
LOW, HIGH = 0, 1  # bounds of the bisection; 0 before it starts
GAP_S = 2  # measured TBT
SEEN = 3  # batches, when it was measured
COUNTED = 4  # batches with decodes since the bounds were moved


@kernel()
def memory_cap(lane):
    """Requests whose mean tokens the KV cache holds, a margin left."""
    kv_tokens = (1.0 - KV_MARGIN) * lane.sim.total_blocks * lane.sim.block_size
    prompt = lane.episode.arrived_tokens / max(1, lane.episode.num_arrived)
    return max(1, int(kv_tokens / max(1.0, prompt + expected_output(lane.sim))))


@kernel()
def measure(lane):
    """Take the last batch into the mean gap if it had decodes; returns whether the bounds are to be moved."""
    sim, memory = lane.sim, lane.memory
    if memory[SEEN] == sim.num_batches:
        return False
    memory[SEEN] = sim.num_batches
    if sim.last_batch_decodes == 0:
        return False
    first = memory[GAP_S] == 0.0
    memory[GAP_S] += (1.0 if first else WEIGHT) * (sim.last_batch_s - memory[GAP_S])
    memory[COUNTED] += 1.0
    return memory[COUNTED] >= EVERY


@kernel()
def tbt_cap(lane):
    """Running requests that the bisection allows."""
    sim, memory = lane.sim, lane.memory
    if memory[HIGH] == 0.0:
        memory[LOW], memory[HIGH] = 1.0, float(sim.max_num_seqs)
    if measure(lane):
        memory[COUNTED] = 0.0
        slo_s, slack, running = smallest_tbt_slo_s(lane), lane.knobs.own[SLACK], float(sim.num_running)
        if memory[GAP_S] > (1.0 + slack) * slo_s:
            memory[HIGH] = max(running, memory[LOW] + STEP)
            memory[LOW] = max(1.0, memory[LOW] - STEP)
        elif memory[GAP_S] < (1.0 - slack) * slo_s:
            memory[LOW] = max(1.0, min(running, memory[HIGH] - STEP))
            memory[HIGH] = min(float(sim.max_num_seqs), memory[HIGH] + STEP)
    return max(1, int(0.5 * (memory[LOW] + memory[HIGH])))


def tbt_control(lane):
    """As `vllm-v1`, with at most so many running requests."""
    open_batch(lane)
    most = min(memory_cap(lane), tbt_cap(lane))
    fill_v1(lane, max(0, most - lane.sim.num_running))


SCHEDULERS = {
    "tbt-control": Compiled(
        "vLLM V1 with a cap on running requests by memory and by a bisection on measured TBT (arXiv 2503.05248)",
        tbt_control,
        {"token_budget": VLLM_TOKEN_BUDGET},
        admission="prompt-check",
        options=("reserve",),
        own=OWN_CONTROL,
    ),
}
