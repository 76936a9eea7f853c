"""Environment steps over all environments of an engine: decode the action, run the engine, pay, observe."""

from __future__ import annotations

import math

from llmsched_gym.engine.batch import (
    add_chunk,
    add_decode,
    can_admit,
    chunk_room,
    decode_fits,
    is_decoding,
    is_free,
    open_batch,
    remaining_prefill,
)
from llmsched_gym.engine.jit import entry, kernel
from llmsched_gym.engine.pack import pack
from llmsched_gym.engine.records import WAITING
from llmsched_gym.engine.run import advance, noise_due, run_lane
from llmsched_gym.engine.state import OWN_MEMORY, lane_of, unpack
from llmsched_gym.engine.step import clear_batch, has_work, is_over
from llmsched_gym.env.actions.knobs import clip, has_these_values, set_knobs
from llmsched_gym.env.arrays import (
    DISCOUNT,
    DURATION_S,
    FIRST_TERM,
    PAUSED,
    REWARD,
    TERMINATED,
    TRUNCATED,
    unpack_arrays,
)
from llmsched_gym.env.features import observe_features
from llmsched_gym.env.reward import pay_resolved
from llmsched_gym.env.slots import NUM_SLOTS, num_visible, observe_slots, slot_request

REFUSED = -1  # what a step returns when an action is outside its space; nothing has changed
FEW_ENVS = 128  # their records stay in the processor's own cache


@kernel()
def end_step(lane, world, a, env, start_s):
    """Reward, duration, discount, the end of the episode and the observation, after the engine's steps."""
    rules, outcome = a.rules[0], a.outcomes[env]
    outcome[:] = 0.0
    terms = outcome[FIRST_TERM:]
    paid = pay_resolved(lane, world, rules, terms)
    paid += observe_features(lane, a.features[env], not rules.at_finish, world, rules, terms)
    outcome[REWARD] = rules.scale * paid
    outcome[DURATION_S] = lane.sim.clock_s - start_s
    outcome[DISCOUNT] = math.exp(-outcome[DURATION_S] / rules.tau_s)
    over = is_over(lane, world)
    resolved = world.drain_all != 0 and world.num_unresolved == 0
    outcome[TERMINATED] = over and resolved
    outcome[TRUNCATED] = over and not resolved


@kernel()
def fetch(lane):
    """Read a word of each cache line that a step needs of the running requests; returns something of them.

    Nothing in this loop waits for anything else in it, so the processor fetches many lines at once; the loops that do
    the work would wait for one after the other. With 1,024 environments the records are far from the processor.
    """
    total = 0.0
    for i in range(lane.sim.num_running):
        request = lane.requests[lane.running[i]]
        total += request.num_blocks + request.max_gap_s
    return total


@kernel()
def pack_by_score(lane, scores, order):
    """Pack visible requests greedily by score, the highest first; those with a score below 0 are left out.

    Running decodes beyond the visible slots come last, so that nobody is out of the agent's and the packer's sight.
    """
    open_batch(lane)
    visible = num_visible(lane)
    for slot in range(visible):  # insertion sort of slots by score, ties by slot
        j = slot - 1
        while j >= 0 and scores[order[j]] < scores[slot]:
            order[j + 1] = order[j]
            j -= 1
        order[j + 1] = slot
    for i in range(visible):
        slot = order[i]
        if not scores[slot] >= 0.0:
            break
        add_slot(lane, slot, 1)
    add_hidden_decodes(lane)


@kernel()
def add_slot(lane, slot, tile):
    """Add the request of a slot to the batch: a decode, or as much of its prompt as fits; returns whether it fitted.

    A chunk that does not finish its prompt is rounded down to a multiple of `tile`.
    """
    r = slot_request(lane, slot)
    if not is_free(lane, r):
        return False
    if is_decoding(lane, r):
        if not decode_fits(lane, r):
            return False
        add_decode(lane, r)
        return True
    n = chunk_room(lane, r)
    if n < remaining_prefill(lane.requests[r]) and n > tile:
        n -= n % tile
    if n <= 0 or (lane.requests[r].phase == WAITING and not can_admit(lane, r, n)):
        return False
    add_chunk(lane, r, n)
    return True


@kernel()
def add_hidden_decodes(lane):
    for i in range(NUM_SLOTS, lane.sim.num_running):
        r = lane.running[i]
        if is_free(lane, r) and is_decoding(lane, r) and decode_fits(lane, r):
            add_decode(lane, r)


@kernel()
def _use_defaults(lane, rule):
    """The settings under which priority and request actions pack: a token budget, no cap."""
    lane.knobs.token_budget = rule.token_budget
    lane.knobs.cap = math.inf


@kernel()
def _are_scores(scores):
    """Whether every score is within -1 and 1; nan is not."""
    legal = True
    for slot in range(scores.shape[0]):
        legal &= -1.0 <= scores[slot] <= 1.0
    return legal


@kernel()
def reopen(lane, rule):
    """Start the next batch that request actions will fill."""
    clear_batch(lane)
    _use_defaults(lane, rule)
    open_batch(lane)


@kernel()
def can_add(lane, slot, tile):
    """Whether :func:`add_slot` would succeed."""
    r = slot_request(lane, slot)
    if not is_free(lane, r):
        return False
    if is_decoding(lane, r):
        return decode_fits(lane, r)
    n = chunk_room(lane, r)
    if n < remaining_prefill(lane.requests[r]) and n > tile:
        n -= n % tile
    return n > 0 and (lane.requests[r].phase != WAITING or can_admit(lane, r, n))


@entry()
def mask_requests(s, masks):
    """Legal request actions; `masks` (num_envs, NUM_SLOTS + 1) bool. Closing is always legal."""
    for env in range(masks.shape[0]):
        lane = lane_of(s, env)
        tile = max(1, int(lane.coef_s[2]))
        visible = num_visible(lane)
        for slot in range(NUM_SLOTS):
            masks[env, slot] = slot < visible and can_add(lane, slot, tile)
        masks[env, NUM_SLOTS] = True


@entry()
def observe_env(s, a, env):
    """The observation of one environment between steps."""
    lane = lane_of(s, env)
    observe_features(lane, a.features[env], False, s.worlds[env], a.rules[0], a.outcomes[env])


@entry()
def observe_slots_of(s, a, first, stop):
    """The requests' rows of environments first, ..., stop - 1; compiled only where they are asked for."""
    for env in range(first, stop):
        observe_slots(lane_of(s, env), a.rows[env], a.in_use[env])


@entry()
def settle(s, a, env, start_s):
    """Pay for engine steps that were made outside these kernels, and observe."""
    state = unpack(s)
    end_step(lane_of(state, env), state.worlds[env], unpack_arrays(a), env, start_s)


# An action is put where the scheduler that it is for reads it, in the lane's settings and memory; from there on its
# batches are formed as any scheduler's are. The loops take these functions as arguments and are inlined, so that each
# action has its own compiled loop: as function pointers they cost 130 ns more of the 1,700 ns that a step takes.
SLOT, CLOSED = OWN_MEMORY, OWN_MEMORY + 1  # places in memory of a request action: whether it has closed the batch


@kernel()
def legal_knobs(a, env):
    return has_these_values(a.knob_actions[env])


@kernel()
def legal_scores(a, env):
    return _are_scores(a.scores[env])


@kernel()
def legal_slot(a, env):
    return 0 <= a.slots[env] <= NUM_SLOTS


@kernel()
def put_knobs(lane, a, env):
    set_knobs(lane.knobs, a.knob_actions[env], a.values)


@kernel()
def put_scores(lane, a, env):
    _use_defaults(lane, a.rules[0])
    for slot in range(NUM_SLOTS):
        lane.memory[OWN_MEMORY + slot] = a.scores[env, slot]


@kernel()
def put_slot(lane, a, env):
    _use_defaults(lane, a.rules[0])
    lane.memory[SLOT] = a.slots[env] if legal_slot(a, env) else NUM_SLOTS


@kernel()
def by_score(lane):
    """Form the batch by one score per slot."""
    pack_by_score(lane, lane.memory[OWN_MEMORY:], lane.scratch)


@kernel()
def by_request(lane):
    """Add the request of a slot to the batch being formed, or close it.

    A slot that cannot be added closes the batch: the mask of legal actions says so beforehand.
    """
    slot, tile = int(lane.memory[SLOT]), max(1, int(lane.coef_s[2]))
    if 0 <= slot < num_visible(lane) and add_slot(lane, slot, tile):
        lane.memory[CLOSED] = 0.0
        return
    add_hidden_decodes(lane)
    lane.memory[CLOSED] = 1.0


@kernel(inline="always")
def form(lane, schedule, by_item):
    """Form the next batch by the action that was put before the lane; returns whether it is closed."""
    if by_item:
        schedule(lane)
        return lane.memory[CLOSED] != 0.0
    clear_batch(lane)
    if has_work(lane):
        schedule(lane)
    return True


@kernel(inline="always")
def _step(s, a, is_legal, put, schedule, by_item):
    for env in range(s.sims.shape[0]):  # before the first is taken: one outside the space changes nothing
        if a.outcomes[env, PAUSED] == 0.0 and not is_legal(a, env):
            return REFUSED
    due = 0
    for env in range(s.sims.shape[0]):
        if a.outcomes[env, PAUSED] != 0.0:
            continue
        lane, world = lane_of(s, env), s.worlds[env]
        if s.sims.shape[0] > FEW_ENVS:
            a.outcomes[env, REWARD] = fetch(lane)
        start_s = lane.sim.clock_s
        put(lane, a, env)
        for _ in range(a.rules[0].action_repeat):
            if form(lane, schedule, by_item):
                if advance(s, env, lane):
                    due += noise_due(s, env)
                if by_item:
                    reopen(lane, a.rules[0])
            if is_over(lane, world):
                break
        end_step(lane, world, a, env, start_s)
    return due


@kernel()
def _step_knobs(s, a):
    return _step(s, a, legal_knobs, put_knobs, pack, False)


@entry()
def step_knobs(s, a):
    """One decision of every environment by knobs; returns how many used up a block of noise, or REFUSED."""
    return _step_knobs(unpack(s), unpack_arrays(a))


@kernel()
def _step_priority(s, a):
    return _step(s, a, legal_scores, put_scores, by_score, False)


@entry()
def step_priority(s, a):
    """One decision of every environment by one score per slot; returns what :func:`step_knobs` does."""
    return _step_priority(unpack(s), unpack_arrays(a))


@kernel()
def _step_request(s, a):
    return _step(s, a, legal_slot, put_slot, by_request, True)


@entry()
def step_request(s, a):
    """One decision of every environment: add the request of a slot, or close the batch (NUM_SLOTS).

    Returns what :func:`step_knobs` does.
    """
    return _step_request(unpack(s), unpack_arrays(a))


# Several batches of one decision, for policies that the engine runs.


@kernel()
def _run_knobs(s, a, env, max_steps, max_idle_steps):
    clip(a.knob_actions[env])  # of what nobody else has checked
    put_knobs(lane_of(s, env), a, env)
    return run_lane(s, env, pack, max_steps, max_idle_steps)


@entry()
def run_knobs(s, a, env, max_steps, max_idle_steps):
    """Step under the same knobs until `max_steps` are done, the run is over or a noise block is used up.

    Returns the number of steps done; see :func:`llmsched_gym.engine.run.run`.
    """
    return _run_knobs(unpack(s), unpack_arrays(a), env, max_steps, max_idle_steps)


@kernel()
def _run_priority(s, a, env, max_steps, max_idle_steps):
    put_scores(lane_of(s, env), a, env)
    return run_lane(s, env, by_score, max_steps, max_idle_steps)


@entry()
def run_priority(s, a, env, max_steps, max_idle_steps):
    """:func:`run_knobs` under the same scores."""
    return _run_priority(unpack(s), unpack_arrays(a), env, max_steps, max_idle_steps)


# The decision alone, for batches that the engine executes.


@entry()
def decide_knobs(s, a, env):
    arrays, lane = unpack_arrays(a), lane_of(s, env)
    clip(arrays.knob_actions[env])
    put_knobs(lane, arrays, env)
    return form(lane, pack, False)


@entry()
def decide_priority(s, a, env):
    arrays, lane = unpack_arrays(a), lane_of(s, env)
    put_scores(lane, arrays, env)
    return form(lane, by_score, False)


@entry()
def decide_request(s, a, env):
    arrays, lane = unpack_arrays(a), lane_of(s, env)
    put_slot(lane, arrays, env)
    return form(lane, by_request, True)


@entry()
def reopen_env(s, a, env):
    reopen(lane_of(s, env), a.rules[0])


STEP = {"knobs": step_knobs, "priority": step_priority, "request": step_request}
RUN = {"knobs": run_knobs, "priority": run_priority}
DECIDE = {"knobs": decide_knobs, "priority": decide_priority, "request": decide_request}
