"""RAD, Resource-Aware Dynamic scheduling (arXiv 2508.01002): optimal tiling and dynamic resource allocation.

The authors published no code for RAD and this project had only the paper's abstract at hand: what follows is our
reading of its two principles. See docs/schedulers.md.
"""

import math

from llmsched_gym.engine.batch import (
    add_chunk,
    add_decode,
    can_admit,
    chunk_room,
    insert_sorted,
    is_prefill,
    open_batch,
    uncached_prefill,
    waiting_prefill,
)
from llmsched_gym.engine.batch import remaining_prefill as remaining
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.pack import FCFS, admission_filters, keep_going
from llmsched_gym.engine.predict import can_make_ttft
from llmsched_gym.scheduler import Compiled

FIRST_OUTPUT_GUESS = 512.0


@kernel()
def best_batch_tokens(lane, most, tile):
    """The multiple of the tile that is processed fastest per token, up to `most`; `most` if no tile fits."""
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
        blocks += math.ceil(max(0.0, output - emitted) / lane.sim.block_size)
    return blocks


@kernel()
def place_prompts(lane, tokens, dry):
    """Give up to `tokens` to prompts, started ones first, then first come first served; returns the tokens placed.

    Prompts are admitted only while the memory that everybody is expected to need is there. A dry run adds nothing and
    knows no limit on the batch.
    """
    sim, requests = lane.sim, lane.requests
    placed = 0
    for i in range(sim.num_running):
        r = lane.running[i]
        if placed < tokens and is_prefill(requests[r]):
            n = min(remaining(requests[r]) if dry else chunk_room(lane, r), tokens - placed)
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
        if (limit and uncached_prefill(lane, r) > lane.batch.limit) or (hold and not can_make_ttft(lane, r)):
            continue
        need = math.ceil((requests[r].prompt_tokens + output) / lane.sim.block_size)
        if seqs > 0 and reserved + need + sim.watermark_blocks > sim.total_blocks:
            break
        n = min(uncached_prefill(lane, r) if dry else chunk_room(lane, r), tokens - placed)
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
    n = 0
    for i in range(lane.sim.num_running):
        r = lane.running[i]
        request = lane.requests[r]
        if is_prefill(request) or request.num_scheduled_tokens != 0:
            continue
        insert_sorted(lane, n, r, request.last_token_s)
        n += 1
    for i in range(min(count, n)):
        add_decode(lane, lane.scratch[i])


@kernel()
def paced(lane, at_hand, decodes):
    """Prompt tokens of this batch while memory or sequence slots keep everybody else waiting.

    One of the decodes finishes, and makes room for the next prompt, once in output / decodes batches. Prompts at hand
    are spread over two such times, so that nearly every batch has some of them: run at once, they leave batches of few
    decodes alone behind, which cost nearly as much as full ones.
    """
    return math.ceil(0.5 * at_hand * decodes / expected_output(lane.sim))


@kernel()
def tiles_around(lane, tokens, tile, most):
    """Two multiples of the tile around `tokens` whose alternation to that mean costs least time; at most `most`."""
    low = max(tile, tokens // tile * tile)
    best, small, large = math.inf, low, min(low + tile, most)
    for a in range(low, 0, -tile):
        for b in range(low + tile, most + 1, tile):
            cost = lane.linear_s[a] + (lane.linear_s[b] - lane.linear_s[a]) * (tokens - a) / (b - a)
            if cost < best:
                best, small, large = cost, a, b
    return small, large


@kernel()
def form_batch(lane, tile, tiled, dynamic):
    """A batch of k tiles, split between decodes and prompts by the work that each side has.

    Not `tiled`: of all tokens that the budget allows, cut nowhere. Not `dynamic`: each side owns half, used or not.
    """
    open_batch(lane)
    sim = lane.sim
    if lane.memory[0] == 0.0:
        room = lane.batch.token_room
        lane.memory[0] = best_batch_tokens(lane, room, tile) if tiled else room
    size = int(lane.memory[0])
    decodes, prompt_tokens = 0, waiting_prefill(lane, math.inf)
    for i in range(sim.num_running):
        request = lane.requests[lane.running[i]]
        if is_prefill(request):
            prompt_tokens += remaining(request)
        else:
            decodes += 1
    at_hand = place_prompts(lane, prompt_tokens, True) if prompt_tokens > 0 else 0
    work = decodes + prompt_tokens
    share = round(size * decodes / work) if work > 0 else 0
    if dynamic and decodes > 0 and at_hand < prompt_tokens:
        tokens = decodes + paced(lane, at_hand, decodes)
        if tiled and tokens < size:
            small, large = tiles_around(lane, max(tokens, tile), tile, size)
            tokens = large if tokens > small and decodes + at_hand >= large else small
        size = min(size, tokens)
        share = decodes
    if decodes > 0:
        share = min(max(share, 1), decodes)
    if prompt_tokens > 0:
        share = min(share, size - 1)
    if not dynamic:
        share = size // 2
    # what one side cannot use goes to the other
    prompts = min(at_hand, size - share)
    most_decodes = min(decodes, size - prompts if dynamic else share)
    total = most_decodes + prompts
    if tiled and total > tile:
        total -= total % tile
    prompts = max(0, min(prompts, total - most_decodes))
    if prompts > 0:
        prompts = place_prompts(lane, prompts, False)
    add_oldest_decodes(lane, min(decodes if dynamic else share, total - prompts))
    keep_going(lane)


def rad(lane):
    """Whole tiles, no fixed split."""
    form_batch(lane, int(lane.coef_s[2]), True, True)


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
