"""What a router sees: reports of the replicas, and of each replica what it would mean for the request at hand."""

from __future__ import annotations

import math

from llmsched_gym.cluster.records import DECODE, PREFILL
from llmsched_gym.engine.batch import is_prefill, remaining_prefill
from llmsched_gym.engine.blocks import NAMED, owner_of, slot_of
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.predict import prompt_s
from llmsched_gym.engine.records import NONE
from llmsched_gym.engine.state import lane_of

STRICT = 0  # place in config.SLO_CLASSES


@kernel()
def mean_output_tokens(s, env):
    """Of all responses that have gone through the router to their end; 0 before the first."""
    num_replicas = s.sims.shape[0] // s.episodes.shape[0]
    total, finished = 0.0, 0
    for k in range(env * num_replicas, (env + 1) * num_replicas):
        total += s.sims[k].output_length_sum
        finished += s.sims[k].num_finished
    return total / finished if finished > 0 else 0.0


@kernel()
def _output_tokens_left(request, mean):
    """Tokens that a request is expected to emit still: by its hint, or as long as others were; one at least."""
    expected = mean if math.isnan(request.length_hint) else request.length_hint
    return max(1.0, expected - request.num_output_tokens)


@kernel()
def write_report(s, c, k, report_s, mean):
    """Let lane `k` report how it stands; of a batch under way blocks are taken, and no token is there."""
    lane, report = lane_of(s, k), c.reports[k]
    sim, requests = lane.sim, lane.requests
    prompt_tokens, output_tokens, strict = float(sim.waiting_tokens), 0.0, 0
    for i in range(sim.num_running):
        request = requests[lane.running[i]]
        if is_prefill(request):
            prompt_tokens += remaining_prefill(request)
        output_tokens += _output_tokens_left(request, mean)
        strict += request.slo_class == STRICT
    for i in range(sim.num_waiting):
        request = requests[lane.waiting[i]]
        output_tokens += _output_tokens_left(request, mean)
        strict += request.slo_class == STRICT
    report.report_s = report_s
    report.mean_batch_s = sim.mean_batch_s
    report.kv_usage = (sim.total_blocks - sim.free_blocks) / sim.total_blocks
    report.prompt_tokens_left = prompt_tokens
    report.output_tokens_left = output_tokens
    report.num_waiting, report.num_running, report.num_strict = sim.num_waiting, sim.num_running, strict
    report.free_blocks = sim.free_blocks


@kernel()
def keep_report(s, c, k, env, now_s):
    """If a report of lane `k` fell due since the last one, write it: of the state up to `now_s`, which is to change."""
    route, node = c.routes[env], c.nodes[k]
    if route.staleness_s == 0.0 or node.is_down:
        return
    num_replicas = s.sims.shape[0] // s.episodes.shape[0]
    phase = (k - env * num_replicas) / num_replicas
    number = math.floor(now_s / route.staleness_s - phase)
    if number <= node.report or number < 0:
        return
    node.report = number
    send_report(s, c, k, env, (number + phase) * route.staleness_s)


@kernel()
def send_report(s, c, k, env, report_s):
    """Let lane `k` report how it stands and what it has cached: from now on that is what is known of it."""
    node = c.nodes[k]
    write_report(s, c, k, report_s, mean_output_tokens(s, env))
    node.num_dispatched = 0
    node.dispatched_tokens = 0
    node.dispatched_strict = 0
    if c.identities.shape[1] > 0:
        blocks, kept = s.blocks[k], c.identities[k]
        for i in range(kept.shape[0]):
            for j in range(kept.shape[1]):
                kept[i, j] = blocks[i, j]


@kernel()
def _is_cached(blocks, mask, prefixes, r, position, block_bits):
    owner = owner_of(prefixes, r, position, block_bits)
    return blocks[slot_of(blocks, mask, owner, position), NAMED] != NONE


@kernel()
def cached_tokens(sim, blocks, prefixes, request, r):
    """Tokens of the prompt of `r` that a replica has cached, short of its last block.

    A block was left no earlier than those behind it, and is evicted no earlier: what is cached is cached from the first
    block on, and where it ends is found by bisection.
    """
    bits, mask = sim.block_bits, sim.table_mask
    blocks_known = (request.prefill_tokens - 1) >> bits
    # nobody but itself can have computed a block that ends in its own tokens
    stop = blocks_known
    if request.num_preemptions == 0 and request.num_output_tokens == 0 and math.isnan(request.first_scheduled_s):
        stop = min(stop, prefixes[r].shared_tokens >> bits)
    if stop <= 0 or not _is_cached(blocks, mask, prefixes, r, 0, bits):
        return 0
    if _is_cached(blocks, mask, prefixes, r, stop - 1, bits):
        return stop << bits
    low, high = 1, stop - 1  # the first `low` are cached, that at `high` is not
    for _ in range(32):
        if high - low <= 0:
            break
        middle = (low + high) // 2
        if _is_cached(blocks, mask, prefixes, r, middle, bits):
            low = middle + 1
        else:
            high = middle
    return low << bits


@kernel()
def look(s, c, env, r, is_prompt):
    """Fill the candidates for request `r`, whose prompt is to be computed, or which is to go on decoding."""
    num_replicas = s.sims.shape[0] // s.episodes.shape[0]
    first, route, request = env * num_replicas, c.routes[env], s.requests[env, r]
    mean = mean_output_tokens(s, env)
    for k in range(first, first + num_replicas):
        keep_report(s, c, k, env, route.now_s)
        if route.staleness_s == 0.0:
            write_report(s, c, k, route.now_s, mean)
        sim, node, report, candidate = s.sims[k], c.nodes[k], c.reports[k], c.candidates[k]
        cached = 0
        if sim.prefix_caching:
            blocks = c.identities[k] if c.identities.shape[1] > 0 else s.blocks[k]
            if route.staleness_s == 0.0 or node.report >= 0:
                cached = cached_tokens(sim, blocks, s.prefixes[env], request, r)
        new, new_strict, new_tokens = 0, 0, 0.0
        if route.staleness_s > 0.0:
            new, new_strict, new_tokens = node.num_dispatched, node.dispatched_strict, float(node.dispatched_tokens)
        new += node.num_coming
        candidate.age_s = route.now_s - report.report_s
        candidate.mean_batch_s = report.mean_batch_s
        candidate.kv_usage = report.kv_usage
        candidate.prompt_tokens_left = report.prompt_tokens_left + new_tokens
        candidate.output_tokens_left = report.output_tokens_left + new * max(1.0, mean)
        candidate.tokens_per_s = node.tokens_per_s
        candidate.cached_tokens = cached
        candidate.uncached_tokens = request.prefill_tokens - cached
        candidate.num_waiting = report.num_waiting + new
        candidate.num_running = report.num_running
        candidate.num_strict = report.num_strict + new_strict
        candidate.num_dispatched = new
        candidate.free_blocks = report.free_blocks
        candidate.total_blocks = sim.total_blocks
        candidate.max_num_seqs = sim.max_num_seqs
        candidate.predicted_ttft_s = _predicted_ttft_s(s, k, node, candidate, request.prefill_tokens)
        candidate.is_up = node.is_down == 0
        candidate.is_legal = takes(s, c, k, env, r, is_prompt)


@kernel()
def _predicted_ttft_s(s, k, node, candidate, prompt):
    """Seconds until a prompt would be complete behind all that is ahead of it, by the scheduler's own profile."""
    sim = s.sims[k]
    linear_s, coef_s = s.own_linear_s[sim.profile], s.own_coef_s[sim.profile]
    n = prompt - candidate.cached_tokens
    chunk = min(2048, sim.max_num_batched_tokens)
    alone_s = prompt_s(linear_s, coef_s, candidate.cached_tokens, n, chunk)
    return candidate.prompt_tokens_left / node.tokens_per_s + alone_s + 0.5 * candidate.mean_batch_s


@kernel()
def takes(s, c, k, env, r, is_prompt):
    """Whether lane `k` may be sent request `r`: it is up, does such work, and can hold it."""
    return c.nodes[k].is_down == 0 and could_take(s, c, k, env, r, is_prompt)


@kernel()
def could_take(s, c, k, env, r, is_prompt):
    """Whether lane `k`, were it up, does such work and can hold request `r`."""
    if c.nodes[k].role == (DECODE if is_prompt else PREFILL):
        return False
    return s.requests[env, r].prefill_tokens < s.sims[k].largest_request  # how many tokens will follow nobody knows
