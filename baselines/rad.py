"""RAD, Resource-Aware Dynamic scheduling (arXiv 2508.01002): optimal tiling and dynamic resource allocation.

The authors published no code for RAD and this project had only the paper's abstract at hand: what follows is our
reading of its two principles. See docs/schedulers.md.
"""

import math

from llmsched_gym.config import BLOCK_SIZE
from llmsched_gym.engine.batch import (
    add_chunk,
    add_decode,
    can_admit,
    can_make_ttft,
    chunk_room,
    is_prefill,
    open_batch,
)
from llmsched_gym.engine.batch import remaining_prefill as remaining
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.pack import FCFS, admission_filters
from llmsched_gym.scheduler import Compiled

FIRST_OUTPUT_GUESS = 512.0


@kernel()
def best_batch_tokens(lane, most):
    """The multiple of the tile that is processed fastest per token, up to `most`; `most` if no tile fits."""
    tile = int(lane.coef_s[2])
    best, best_rate = most, 0.0
    for k in range(1, most // tile + 1):
        rate = k * tile / lane.linear_s[k * tile]
        if rate > best_rate:
            best, best_rate = k * tile, rate
    return best


@kernel()
def expected_output(sim):
    """Mean output length of finished requests."""
    return sim.output_length_sum / sim.num_finished if sim.num_finished > 0 else FIRST_OUTPUT_GUESS


@kernel()
def reserved_blocks(lane, output):
    """Blocks held, and those that running requests are expected to need still."""
    sim = lane.sim
    blocks = sim.total_blocks - sim.free_blocks
    for i in range(sim.num_running):
        emitted = lane.requests[lane.running[i]].num_output_tokens
        blocks += math.ceil(max(0.0, output - emitted) / BLOCK_SIZE)
    return blocks


@kernel()
def place_prompts(lane, tokens, dry):
    """Give up to `tokens` to prompts, started ones first, then first come first served; returns the tokens placed.

    Prompts are admitted only while the memory that everybody is expected to need is there. A dry run adds nothing.
    """
    sim, requests = lane.sim, lane.requests
    placed = 0
    for i in range(sim.num_running):
        r = lane.running[i]
        if placed < tokens and is_prefill(requests[r]):
            n = min(chunk_room(lane, r), tokens - placed)
            placed += n
            if n > 0 and not dry:
                add_chunk(lane, r, n)
    if placed >= tokens:
        return placed
    output = expected_output(sim)
    reserved = reserved_blocks(lane, output)
    hold, limit = admission_filters(lane)
    seqs = sim.num_running
    for i in range(sim.num_waiting):
        r = lane.waiting[i]
        if placed >= tokens or seqs >= sim.max_num_seqs:
            break
        if (limit and requests[r].prefill_tokens > lane.knobs.limit) or (hold and not can_make_ttft(lane, r)):
            continue
        need = math.ceil((requests[r].prompt_tokens + output) / BLOCK_SIZE)
        if seqs > 0 and reserved + need + sim.watermark_blocks > sim.total_blocks:
            break
        n = min(chunk_room(lane, r), tokens - placed)
        if n <= 0 or not can_admit(lane, r, n):
            break
        reserved += need
        seqs += 1
        placed += n
        if not dry:
            add_chunk(lane, r, n)
    return placed


@kernel()
def add_oldest_decodes(lane, count):
    """Let the `count` decodes whose last token is the oldest decode, ties by request index."""
    scratch = lane.scratch
    n = 0
    for i in range(lane.sim.num_running):
        r = lane.running[i]
        request = lane.requests[r]
        if is_prefill(request) or request.num_scheduled_tokens != 0:
            continue
        j = n - 1
        while j >= 0:
            other_s = lane.requests[scratch[j]].last_token_s
            if other_s < request.last_token_s or (other_s == request.last_token_s and scratch[j] < r):
                break
            scratch[j + 1] = scratch[j]
            j -= 1
        scratch[j + 1] = r
        n += 1
    for i in range(min(count, n)):
        add_decode(lane, scratch[i])


def rad(lane):
    """A batch of k tiles, split between decodes and prompts by the work that each side has."""
    open_batch(lane)
    sim, batch = lane.sim, lane.batch
    if lane.memory[0] == 0.0:
        lane.memory[0] = best_batch_tokens(lane, batch.token_room)
    size = int(lane.memory[0])
    decodes, prompt_tokens = 0, sim.waiting_tokens
    for i in range(sim.num_running):
        request = lane.requests[lane.running[i]]
        if is_prefill(request):
            prompt_tokens += remaining(request)
        else:
            decodes += 1
    work = decodes + prompt_tokens
    share = round(size * decodes / work) if work > 0 else 0
    if decodes > 0:
        share = min(max(share, 1), decodes)
    if prompt_tokens > 0:
        share = min(share, size - 1)
    # what prompts cannot use goes to decodes
    prompts = place_prompts(lane, size - share, True) if prompt_tokens > 0 else 0
    total = min(decodes, size - prompts) + prompts
    tile = int(lane.coef_s[2])
    if total > tile:
        total -= total % tile
    prompts = max(0, min(prompts, total - min(decodes, size - prompts)))
    if prompts > 0:
        prompts = place_prompts(lane, prompts, False)
    add_oldest_decodes(lane, min(decodes, total - prompts))


SCHEDULERS = {
    "rad": Compiled(
        "RAD: batches of whole tiles, split by the work of each phase; our reading of arXiv 2508.01002",
        rad,
        {"order": FCFS, "token_budget": 8192},
    ),
    "rad-512": Compiled(
        "RAD with batches of at most 512 tokens, for latency", rad, {"order": FCFS, "token_budget": 512}
    ),
}
