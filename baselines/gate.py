"""Gate-and-route's gate: a class's prompt enters while fewer of its requests run than a fluid model says is best.

Source, second-hand: arXiv 2602.02987. A linear program of the fluid limit gives the rate at which each class is served,
and with it how many of its requests run; a prompt of a class enters while its occupancy is below that target, and
decodes are work-conserving: every one is in every batch.

Guessed: all of how this is done. Classes are strict users and the others. The program is

    maximise x_0 + x_1   where 0 <= x_i <= lambda_i,  sum(x_i w_i) <= 1,  sum(x_i t_i c_i) <= KV,

with lambda_i the share of class i in the arrivals per second so far or, if that is more, of the last minute; w_i the
seconds of the device that a mean request of the class takes in batches of `budget` = 512 tokens; t_i the seconds that
it runs, a mean batch a token and a chunk; c_i its mean tokens. Outputs are the mean of all finished (512 tokens before
the first). Targets x_i t_i are stretched until they fill the memory, so that nobody waits for what nobody uses, and are
at least 1. Prompts are chunked and go first come first served, past those whose class is full.
"""

import math

from llmsched_gym.baselines.rad import expected_output
from llmsched_gym.engine.batch import (
    add_chunk,
    can_admit,
    chunk_room,
    is_free,
    is_prefill,
    open_batch,
    uncached_prefill,
)
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.pack import add_all_decodes, admission_filters, keep_going
from llmsched_gym.engine.predict import can_make_ttft
from llmsched_gym.scheduler import Compiled

CLASSES = 2
# Places in the lane's memory, CLASSES each.
ARRIVED, PROMPTS, TARGETS, RUN = 0, 2, 4, 6  # requests, prompt tokens, the plan, who runs in the batch being formed


@kernel()
def class_of(request):
    """0 for strict users, 1 for all others."""
    return 0 if request.slo_class == 0 else 1


@kernel()
def fluid_rates(most_0, most_1, work_0, work_1, kv_0, kv_1, kv):
    """The (x_0, x_1) that maximises their sum within the loads, one second of work a second, and the memory.

    x_0 + the largest x_1 beside it is concave and linear between the x_0 at which another bound on x_1 takes over.
    Where it is as good, both are served in proportion to their loads.
    """
    end = min(most_0, 1.0 / work_0, kv / kv_0)
    part = min(1.0, 1.0 / (work_0 * most_0 + work_1 * most_1), kv / (kv_0 * most_0 + kv_1 * most_1))
    best_0, best_1 = part * most_0, part * most_1
    best = (best_0 + best_1) * (1.0 + 1e-9)
    for i in range(5):
        x_0 = end
        if i == 0:
            x_0 = 0.0
        elif i == 1:  # the load of class 1 and the work
            x_0 = (1.0 - work_1 * most_1) / work_0
        elif i == 2:  # its load and the memory
            x_0 = (kv - kv_1 * most_1) / kv_0
        elif i == 3:  # the work and the memory
            slope = kv_0 / kv_1 - work_0 / work_1
            x_0 = (kv / kv_1 - 1.0 / work_1) / slope if slope != 0.0 else 0.0
        x_0 = min(max(x_0, 0.0), end)
        x_1 = max(0.0, min(most_1, (1.0 - work_0 * x_0) / work_1, (kv - kv_0 * x_0) / kv_1))
        if x_0 + x_1 > best:
            best, best_0, best_1 = x_0 + x_1, x_0, x_1
    return best_0, best_1


@kernel()
def note_arrivals(lane):
    """Count newcomers, the end of the line, by class; returns whether there were any. Their `lst_s` is free for it."""
    sim, memory, any_came = lane.sim, lane.memory, False
    for i in range(sim.num_waiting - 1, -1, -1):
        request = lane.requests[lane.waiting[i]]
        if not math.isnan(request.lst_s) or request.num_preemptions > 0:
            break
        request.lst_s, any_came = sim.clock_s, True
        memory[ARRIVED + class_of(request)] += 1.0
        memory[PROMPTS + class_of(request)] += request.prompt_tokens
    return any_came


@kernel()
def load_of(lane, i):
    """Requests per second of a class."""
    sim, memory = lane.sim, lane.memory
    total = memory[ARRIVED] + memory[ARRIVED + 1]
    rate = max(total / sim.clock_s, sim.arrivals_60s) if sim.clock_s > 0.0 else total
    return max(memory[ARRIVED + i] / total * rate, 1e-9)


@kernel()
def means_of(lane, i):
    """(w, t, c) of a mean request of a class: seconds of the device, seconds that it runs, tokens that it holds."""
    budget = max(1, min(lane.knobs.token_budget, lane.sim.max_num_batched_tokens))
    output, memory = max(1.0, expected_output(lane.sim)), lane.memory
    prompt = memory[PROMPTS + i] / memory[ARRIVED + i] if memory[ARRIVED + i] > 0.0 else 1.0
    token_s, batch_s = lane.linear_s[budget] / budget, lane.linear_s[budget]
    kv_tokens = prompt + output * (prompt + 0.5 * output)
    work_s = token_s * (prompt + output) + lane.coef_s[0] * 0.5 * prompt * prompt + lane.coef_s[1] * kv_tokens
    if lane.sim.num_batches > 0:
        batch_s = lane.sim.mean_batch_s
    return work_s, (prompt / budget + output) * batch_s, prompt + 0.5 * output


@kernel()
def plan(lane):
    """Set the targets."""
    memory, kv = lane.memory, float(lane.sim.total_blocks * lane.sim.block_size)
    work_0, time_0, tokens_0 = means_of(lane, 0)
    work_1, time_1, tokens_1 = means_of(lane, 1)
    kv_0, kv_1 = time_0 * tokens_0, time_1 * tokens_1
    x_0, x_1 = fluid_rates(load_of(lane, 0), load_of(lane, 1), work_0, work_1, kv_0, kv_1, kv)
    stretch = kv / max(1e-9, x_0 * kv_0 + x_1 * kv_1)
    memory[TARGETS] = max(1.0, x_0 * time_0 * stretch)
    memory[TARGETS + 1] = max(1.0, x_1 * time_1 * stretch)


@kernel()
def next_below_target(lane, hold, limit):
    """The first of the line whose class is below its target; -1 if there is none."""
    memory = lane.memory
    for i in range(lane.sim.num_waiting):
        r, request = lane.waiting[i], lane.requests[lane.waiting[i]]
        j = class_of(request)
        if not is_free(lane, r) or memory[RUN + j] >= memory[TARGETS + j]:
            continue
        if (limit and uncached_prefill(lane, r) > lane.batch.limit) or (hold and not can_make_ttft(lane, r)):
            continue
        return r
    return -1


def gate(lane):
    """Every decode, prompts under way, then those whose class is below its target."""
    open_batch(lane)
    sim, batch, memory = lane.sim, lane.batch, lane.memory
    if note_arrivals(lane):
        plan(lane)
    add_all_decodes(lane)
    memory[RUN] = memory[RUN + 1] = 0.0
    for i in range(sim.num_running):
        r = lane.running[i]
        memory[RUN + class_of(lane.requests[r])] += 1.0
        if is_prefill(lane.requests[r]):
            n = chunk_room(lane, r)
            if n > 0:
                add_chunk(lane, r, n)
    hold, limit = admission_filters(lane)
    for _ in range(sim.max_num_seqs - sim.num_running):
        r = next_below_target(lane, hold, limit) if batch.token_room > 0 else -1
        n = chunk_room(lane, r) if r >= 0 else 0
        if n <= 0 or not can_admit(lane, r, n):
            break
        add_chunk(lane, r, n)
        memory[RUN + class_of(lane.requests[r])] += 1.0
    keep_going(lane)


SCHEDULERS = {
    "gate": Compiled(
        "a class's prompt enters while fewer of it run than a fluid program says (arXiv 2602.02987, second-hand)",
        gate,
    ),
}
