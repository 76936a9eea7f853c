"""Bounds on prefill under vLLM's scheduler: how many prompts at once, and how many batches of prompts in a row.

`max-prefills`: vLLM pull request 55256 (`--max-concurrent-prefills`), its description read. `vllm-v1` that admits
nobody while `n` prompts are unfinished: those that had tokens left when the batch was formed, and those admitted in
it. What has been admitted goes on. Guessed: that a prompt whose last chunk is in this batch still counts.

`interleave`: issue 109 and pull request 119 of tenstorrent/vllm-tt-plugin, their descriptions read. Batches of one
phase, prompts first, but behind `k` batches of prompts in a row come `m` of decodes. Guessed: that nothing is counted
while there are no decodes, and that batches of either phase are filled as vLLM fills its own.
"""

from llmsched_gym.baselines.vllm_v1 import OWN, enter, fill_v1, serve_running
from llmsched_gym.engine.batch import is_prefill, is_thrashing, open_batch
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.pack import FCFS, admission_filters, keep_going, next_waiting
from llmsched_gym.scheduler import VLLM_TOKEN_BUDGET, Compiled, Own, positive_int

OWN_MOST = (*OWN, Own("n", 2, positive_int, "whole number of prompts >= 1"))
MOST = len(OWN)
OWN_TURNS = (
    *OWN,
    Own("k", 2, positive_int, "whole number of batches >= 1"),
    Own("m", 1, positive_int, "whole number of batches >= 1"),
)
PROMPT_TURNS, DECODE_TURNS = len(OWN), len(OWN) + 1
# Places in the lane's memory.
IN_A_ROW = 0  # batches of prompts since the last of decodes
DUE = 1  # batches of decodes that are to come before the next of prompts


@kernel()
def unfinished_prompts(lane):
    """How many running requests have prompt tokens left to compute."""
    count = 0
    for i in range(lane.sim.num_running):
        count += is_prefill(lane.requests[lane.running[i]])
    return count


def max_prefills(lane):
    """`vllm-v1` with at most so many prompts under way."""
    open_batch(lane)
    fill_v1(lane, max(0, int(lane.knobs.own[MOST]) - unfinished_prompts(lane)))


@kernel()
def add_prompt_batch(lane):
    """Chunks of started prompts, then those that wait."""
    serve_running(lane, True, False)
    if lane.batch.num_preempt > 0:
        return
    hold, limit = admission_filters(lane)
    for _ in range(lane.sim.max_num_seqs):
        # the first of running need not be in this batch, so it does not always go on
        r = -1 if is_thrashing(lane) else next_waiting(lane, FCFS, hold, limit)
        if r < 0 or not enter(lane, r):
            break


def interleave(lane):
    """Prompts, at most `k` batches in a row, then `m` batches of decodes; prompts or decodes, whoever there is."""
    open_batch(lane)
    sim, batch, memory = lane.sim, lane.batch, lane.memory
    prompts = unfinished_prompts(lane)
    decodes = sim.num_running - prompts
    if decodes == 0:
        memory[IN_A_ROW] = memory[DUE] = 0.0
    if (sim.num_waiting > 0 or prompts > 0) and memory[DUE] == 0.0:
        add_prompt_batch(lane)
        if batch.num_items > 0 or batch.num_preempt > 0:
            memory[IN_A_ROW] += decodes > 0
            if memory[IN_A_ROW] >= lane.knobs.own[PROMPT_TURNS]:
                memory[IN_A_ROW], memory[DUE] = 0.0, lane.knobs.own[DECODE_TURNS]
            return
    memory[IN_A_ROW], memory[DUE] = 0.0, max(0.0, memory[DUE] - 1.0)
    serve_running(lane, False, True)
    keep_going(lane)


SCHEDULERS = {
    "max-prefills": Compiled(
        "vLLM V1 that admits nobody while n prompts are unfinished (vLLM pull request 55256)",
        max_prefills,
        {"token_budget": VLLM_TOKEN_BUDGET},
        admission="prompt-check",
        options=("reserve",),
        own=OWN_MOST,
    ),
    "interleave": Compiled(
        "batches of one phase: prompts, at most k in a row, then m of decodes (vllm-tt-plugin pull request 119)",
        interleave,
        {"token_budget": VLLM_TOKEN_BUDGET},
        admission="prompt-check",
        options=("reserve",),
        own=OWN_TURNS,
    ),
}
