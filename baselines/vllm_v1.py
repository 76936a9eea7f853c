"""vLLM V1's scheduler: one token budget, no distinction of phases."""

from llmsched_gym.engine.batch import (
    add_chunk,
    add_decode,
    blocks_to_hold,
    can_admit,
    chunk_room,
    decode_fits,
    is_prefill,
    open_batch,
    preempt,
)
from llmsched_gym.engine.pack import FCFS, admission_filters, next_waiting
from llmsched_gym.scheduler import Compiled


def vllm_v1(lane):
    """Running requests in admission order, a decode or a chunk each; then waiting ones, first come first served.

    Blocks are taken chunk by chunk; where one is missing the request admitted last is preempted, and nobody is admitted
    in such a step (vLLM `v1/core/sched/scheduler.py`).
    """
    open_batch(lane)
    sim, batch = lane.sim, lane.batch
    last = sim.num_running  # running[last:] have been preempted
    for i in range(sim.num_running):
        if i >= last or batch.token_room <= 0:
            break
        r = lane.running[i]
        prefill = is_prefill(lane.requests[r])
        n = chunk_room(lane, r) if prefill else 1
        if n <= 0 or (not prefill and not decode_fits(lane, r) and batch.num_items > 0):
            continue
        need = blocks_to_hold(sim, lane.requests[r], n) - lane.requests[r].num_blocks
        for _ in range(sim.num_running):
            if batch.free_blocks >= need or last <= i:
                break
            last -= 1
            preempt(lane, lane.running[last])
        if last <= i:
            break
        if prefill:
            add_chunk(lane, r, n)
        else:
            add_decode(lane, r)
    if batch.num_preempt > 0:
        return
    hold, limit = admission_filters(lane)
    for _ in range(sim.max_num_seqs):
        r = next_waiting(lane, FCFS, hold, limit)
        if r < 0:
            break
        n = chunk_room(lane, r)
        if n <= 0 or not can_admit(lane, r, n):
            break
        add_chunk(lane, r, n)


SCHEDULERS = {
    "vllm-v1": Compiled(
        "vLLM V1: running requests in admission order, then waiting ones, one budget of 2,048 tokens",
        vllm_v1,
        {"token_budget": 2048},
        admission="chunk",
    ),
}
