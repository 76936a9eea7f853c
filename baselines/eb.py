"""EB: never mix the phases; decode until so many slots are free, then prefill as many whole prompts.

Source: arXiv 2606.00516 and its patch, as this project's notes on them state the rule.

- `eb` decodes everybody until a share theta of the slots is free, then prefills theta * slots whole prompts, in as many
  batches as they need. theta solves theta / (1 - theta) + ln(1 - theta) = p0 * a_p / a_d: p0 is the probability that a
  decode ends its request, a_p and a_d are the fixed costs of a batch of prompts and of decodes. `k` sets their number.
- `eb+` predicts the throughput of that and of batches that mix every decode with the chunk that keeps up with them, and
  does what is faster.

Estimated here: p0 is one over the mean output of finished requests, 512 tokens before the first, and the prompt the
mean of those that have come. a_d is the time of one token, a_p the time of the largest prompt batch less what its
tokens cost at the slope of its second half, at least 1 % of it, both by the scheduler's own profile.

Guessed: slots are `max_num_seqs`, or as many mean requests as the KV cache holds, if those are fewer; where fewer than
theta * slots prompts wait they are prefilled once the slots are free; an engine without decodes takes whoever waits.
Throughput is predicted of full slots, of requests in the middle of their output.
"""

import math

from llmsched_gym.baselines.rad import expected_output
from llmsched_gym.baselines.whole_prompt import add_whole_prompts
from llmsched_gym.engine.batch import batch_s, is_prefill, open_batch
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.pack import FCFS, add_all_decodes, add_prompts, keep_going
from llmsched_gym.engine.predict import prompt_s
from llmsched_gym.engine.surface import chunk_s, has_surface, surface_s
from llmsched_gym.scheduler import Compiled, Own, not_negative_int

OWN = (Own("k", 0, not_negative_int, "whole number of prompts, 0 for the share that the costs imply"),)
COUNT = 0
MIXED_BUDGET = 512  # tokens of a batch that mixes, as Sarathi-Serve's
# Places in the lane's memory.
TO_ADMIT = 0  # prompts of this turn that are still to be admitted
PLANNED_AT = 1  # requests that had finished, and one, when the three below were found
AT_ONCE = 2  # prompts to prefill at once
SLOTS = 3
MIXES = 4  # whether mixed batches are predicted to be faster


@kernel()
def free_share(cost):
    """theta: the root in (0, 1) of theta / (1 - theta) + ln(1 - theta) = cost, for a cost >= 0."""
    low, high = 0.0, 1.0 - 1e-9
    for _ in range(40):
        theta = 0.5 * (low + high)
        if theta / (1.0 - theta) + math.log(1.0 - theta) < cost:
            low = theta
        else:
            high = theta
    return 0.5 * (low + high)


@kernel()
def fixed_costs(lane):
    """(a_p, a_d): seconds that a batch of prompts and one of decodes take whatever is in them."""
    most = max(2, min(lane.knobs.token_budget, lane.sim.max_num_batched_tokens))
    whole_s, half_s = lane.linear_s[most], lane.linear_s[most // 2]
    slope = (whole_s - half_s) / (most - most // 2)
    return max(0.01 * whole_s, whole_s - slope * most), lane.linear_s[1]


@kernel()
def mean_prompt(episode):
    """Mean prompt of all who have come, tokens."""
    return max(1.0, episode.arrived_tokens / max(1, episode.num_arrived))


@kernel()
def num_slots(lane, prompt, output):
    """Requests that run at once: as many as the engine or the memory allows."""
    kv_tokens = float(lane.sim.total_blocks * lane.sim.block_size)
    return max(1, min(lane.sim.max_num_seqs, int(kv_tokens / (prompt + output))))


@kernel()
def decodes_s(lane, num_decodes, context, chunk):
    """Predicted seconds of so many decodes with such a context each, beside a chunk of a prompt."""
    most = lane.sim.max_num_batched_tokens
    num_tokens = min(num_decodes + chunk, most)
    kv_tokens = num_decodes * context
    if has_surface(lane.coef_s):
        chunk_seconds = chunk_s(lane.coef_s, 0, chunk) if chunk > 0 else 0.0
        chunks = 1 if chunk > 0 else 0
        return surface_s(lane.linear_s, lane.coef_s, num_tokens, num_decodes, kv_tokens, context, chunks, chunk_seconds)
    pairs = 0.5 * chunk * (chunk + 1.0)
    return batch_s(lane.linear_s, lane.coef_s, num_tokens, pairs, kv_tokens + chunk)


@kernel()
def mixing_pays(lane, slots, at_once, prompt, output):
    """Whether mixed batches are predicted to finish more requests a second than batches of one phase."""
    budget = max(1, min(lane.knobs.token_budget, lane.sim.max_num_batched_tokens))
    tokens, context = max(1, int(prompt)), prompt + 0.5 * output
    # one phase: a turn of `at_once` prompts, then decodes until as many have ended
    turns = -math.log(1.0 - min(at_once / slots, 0.999)) * output
    prefill_s = at_once * prompt_s(lane.linear_s, lane.coef_s, 0, tokens, budget)
    apart = at_once / (prefill_s + turns * decodes_s(lane, slots, context, 0))
    # mixed: slots / output requests end in each batch, and as many prompts are computed in it, as far as they fit
    wanted = slots * prompt / output
    chunk = max(1, min(int(wanted), MIXED_BUDGET - slots))
    share = min(1.0, chunk / wanted)
    together = share * (slots / output) / decodes_s(lane, max(1, int(share * slots)), context, chunk)
    return together > apart


@kernel()
def plan(lane, plus):
    """Find how many prompts make a turn, and whether to mix, anew whenever a request has finished."""
    memory, sim = lane.memory, lane.sim
    if memory[PLANNED_AT] == sim.num_finished + 1:
        return
    memory[PLANNED_AT] = sim.num_finished + 1
    prompt, output = mean_prompt(lane.episode), max(1.0, expected_output(sim))
    prompt_fixed_s, decode_fixed_s = fixed_costs(lane)
    slots = num_slots(lane, prompt, output)
    at_once = int(lane.knobs.own[COUNT])
    if at_once == 0:
        at_once = math.ceil(free_share(prompt_fixed_s / (output * decode_fixed_s)) * slots)
    memory[AT_ONCE], memory[SLOTS] = min(max(1, at_once), slots), slots
    memory[MIXES] = plus and mixing_pays(lane, slots, memory[AT_ONCE], prompt, output)


@kernel()
def form_batch(lane, plus):
    """A turn of prompts once so many slots are free, else every decode; or both, where that is faster."""
    open_batch(lane)
    sim, memory = lane.sim, lane.memory
    plan(lane, plus)
    if memory[MIXES] != 0.0:
        memory[TO_ADMIT] = 0.0
        add_all_decodes(lane)
        lane.batch.token_room = min(lane.batch.token_room, max(0, MIXED_BUDGET - lane.batch.num_tokens))
        add_prompts(lane, FCFS)
        keep_going(lane)
        return
    started, decodes = 0, 0
    for i in range(sim.num_running):
        if is_prefill(lane.requests[lane.running[i]]):
            started += 1
        else:
            decodes += 1
    is_due = decodes == 0 or memory[SLOTS] - sim.num_running >= memory[AT_ONCE]
    if memory[TO_ADMIT] == 0.0 and started == 0 and sim.num_waiting > 0 and is_due:
        memory[TO_ADMIT] = memory[AT_ONCE]
    if memory[TO_ADMIT] > 0.0 or started > 0:
        if add_whole_prompts(lane, int(memory[TO_ADMIT]) + started) > 0:
            memory[TO_ADMIT] = max(0.0, memory[TO_ADMIT] - lane.batch.num_admitted)
            return
        memory[TO_ADMIT] = 0.0
    add_all_decodes(lane)
    keep_going(lane)


def eb(lane):
    """Batches of one phase, prompts once enough slots are free."""
    form_batch(lane, False)


def eb_plus(lane):
    """The same, or mixed batches where they are predicted to be faster."""
    form_batch(lane, True)


SCHEDULERS = {
    "eb": Compiled(
        "EB: decodes until so many slots are free, then as many whole prompts; never both (arXiv 2606.00516)",
        eb,
        {"token_budget": 8192},
        own=OWN,
    ),
    "eb+": Compiled(
        "EB+: eb, or mixed batches of 512 tokens where their predicted throughput is higher (arXiv 2606.00516)",
        eb_plus,
        {"token_budget": 8192},
        own=OWN,
    ),
}
