"""Schedulers that never split a prompt: vLLM V0, Orca, FasterTransformer."""

from llmsched_gym.engine.batch import add_chunk, can_admit, chunk_room, open_batch, uncached_prefill
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.pack import FCFS, add_all_decodes, admission_filters, keep_going, next_started, next_waiting
from llmsched_gym.engine.records import WAITING
from llmsched_gym.scheduler import Compiled

GROUP_SIZE = 32


@kernel()
def add_whole_prompts(lane, most):
    """Add up to `most` whole prompts, first come first served; returns how many.

    The batch's first prompt is taken whatever the budget and cap say, as it would never fit otherwise. Only one longer
    than `max_num_batched_tokens` is split; one that finds no room beside the decodes waits for fewer of them.
    """
    batch = lane.batch
    hold, limit = admission_filters(lane)
    count = 0
    for _ in range(most):
        r = next_started(lane, FCFS, False)
        if r < 0:
            r = next_waiting(lane, FCFS, hold, limit)
        if r < 0:
            break
        n = uncached_prefill(lane, r)
        if chunk_room(lane, r) < n:
            room = lane.sim.max_num_batched_tokens - batch.num_tokens
            if count > 0 or room < n <= lane.sim.max_num_batched_tokens:
                break
            n = min(n, room)
        if n <= 0 or (lane.requests[r].phase == WAITING and not can_admit(lane, r, n)):
            break
        add_chunk(lane, r, n)
        count += 1
    return count


def vllm_v0(lane):
    """If any waiting prompt is admissible, a batch of whole prompts; else every decode (vLLM 0.x's default)."""
    open_batch(lane)
    if add_whole_prompts(lane, lane.sim.max_num_seqs) == 0:
        add_all_decodes(lane)
    keep_going(lane)


def orca(lane):
    """Whole prompts together with all decodes: iteration-level scheduling (Yu et al., OSDI 2022)."""
    open_batch(lane)
    add_all_decodes(lane)
    add_whole_prompts(lane, lane.sim.max_num_seqs)
    keep_going(lane)


def faster_transformer(lane):
    """Admit a group of up to 32, run it to completion, then the next: request-level batching.

    ``memory[0]`` holds how many of the group are still to be admitted; long groups prefill over several batches.
    """
    open_batch(lane)
    if lane.sim.num_running == 0:
        lane.memory[0] = min(GROUP_SIZE, lane.sim.num_waiting)
    started = next_started(lane, FCFS, False) >= 0
    if lane.memory[0] > 0 or started:
        admitted = add_whole_prompts(lane, int(lane.memory[0]) + started)
        if admitted > 0:
            lane.memory[0] -= lane.batch.num_admitted
            return
        lane.memory[0] = 0
    add_all_decodes(lane)
    keep_going(lane)


SCHEDULERS = {
    "vllm-v0": Compiled(
        "vLLM 0.x: whole prompts up to 8,192 tokens first, decodes only when none is admissible",
        vllm_v0,
        {"token_budget": 8192},
    ),
    "orca": Compiled(
        "Orca: whole prompts first come first served with all decodes, up to 8,192 tokens (OSDI 2022)",
        orca,
        {"token_budget": 8192},
    ),
    "faster-transformer": Compiled(
        "FasterTransformer: groups of up to 32 requests, each run to completion before the next",
        faster_transformer,
        {"token_budget": 8192},
    ),
}
