"""Environment steps over all environments of an engine: put the action, run the engine, pay, observe.

An action is put where the scheduler that it is for reads it, in the lane's settings and memory; from there on its
batches are formed as any scheduler's are. The loops here take these functions as arguments and are inlined, so that
each action has its own compiled loop (see ``env/actions``): as function pointers they cost 130 ns more of the 1,700 ns
that a step takes.
"""

from __future__ import annotations

import math

from llmsched_gym.engine.batch import open_batch
from llmsched_gym.engine.handles import unpack
from llmsched_gym.engine.jit import entry, kernel
from llmsched_gym.engine.run import advance, noise_due, see_flight
from llmsched_gym.engine.state import OWN_MEMORY, env_of, lane_of
from llmsched_gym.engine.step import clear_batch, has_work, is_over
from llmsched_gym.env.arrays import (
    DISCOUNT,
    DURATION_S,
    FIRST_TERM,
    PAUSED,
    REWARD,
    TERMINATED,
    TRUNCATED,
)
from llmsched_gym.env.features import observe_features
from llmsched_gym.env.reward import pay_resolved
from llmsched_gym.env.slots import observe_slots

REFUSED = -1  # what a step returns when an action is outside its space; nothing has changed
FEW_ENVS = 128  # their records stay in the processor's own cache
CLOSED = OWN_MEMORY  # where an action that adds one item to the batch says whether it has closed it


@kernel()
def end_step(lane, world, a, env, start_s):
    """Reward, duration, discount, the end of the episode and the observation, after the engine's steps."""
    rules, outcome = a.rules[0], a.outcomes[env]
    outcome[:] = 0.0
    terms = outcome[FIRST_TERM:]
    paid = pay_resolved(lane, world, lane.sim.clock_s, rules, terms)
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


@entry()
def observe_env(s, a, env):
    """The observation of one environment between steps, or of one lane where there are several replicas."""
    state = unpack(s)
    arrays, lane, world = unpack(a), lane_of(state, env), state.worlds[env_of(state, env)]
    observe_features(lane, arrays.features[env], False, world, arrays.rules[0], arrays.outcomes[env])


@entry(nogil=True)
def observe_slots_of(s, a, first, stop):
    """The requests' rows of environments first, ..., stop - 1; compiled only where they are asked for."""
    state = unpack(s)
    arrays = unpack(a)
    for env in range(first, stop):
        observe_slots(lane_of(state, env), arrays.rows[env], arrays.in_use[env])


@entry()
def settle(s, a, env, start_s):
    """Pay for engine steps that were made outside these kernels, and observe."""
    state = unpack(s)
    end_step(lane_of(state, env), state.worlds[env], unpack(a), env, start_s)


@kernel()
def use_budget(lane, rules):
    """The settings of a batch that no knobs form: a token budget, no cap."""
    lane.knobs.token_budget = rules.token_budget
    lane.knobs.cap = math.inf


@kernel()
def reopen(lane, rules):
    """Start the next batch that actions fill item by item."""
    clear_batch(lane)
    use_budget(lane, rules)
    open_batch(lane)


@entry()
def reopen_env(s, a, env):
    """:func:`reopen` for environment `env`, for Python."""
    reopen(lane_of(unpack(s), env), unpack(a).rules[0])


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
def step_all(s, a, first, stop, is_legal, put, schedule, by_item):
    """One decision of environments first, ..., stop - 1; returns how many used up a block of noise.

    REFUSED if any action, of whichever environment, is outside the space.

    With `by_item` the scheduler adds one item to the batch being formed and says in ``memory[CLOSED]`` whether it is
    complete.
    """
    for env in range(s.sims.shape[0]):  # before the first is taken: one outside the space changes nothing
        if a.outcomes[env, PAUSED] == 0.0 and not is_legal(a, env):
            return REFUSED
    due = 0
    for env in range(first, stop):
        if a.outcomes[env, PAUSED] != 0.0:
            continue
        lane, world = lane_of(s, env), s.worlds[env]
        if s.sims.shape[0] > FEW_ENVS:
            a.outcomes[env, REWARD] = fetch(lane)
        start_s = lane.sim.clock_s
        put(lane, a, env)
        for _ in range(a.rules[0].action_repeat):
            see_flight(s, env, lane)
            if form(lane, schedule, by_item):
                if advance(s, env, lane):
                    due += noise_due(s, env)
                if by_item:
                    reopen(lane, a.rules[0])
            if is_over(lane, world):
                break
        end_step(lane, world, a, env, start_s)
    return due


@kernel(inline="always")
def decide_one(s, a, env, put, schedule, by_item):
    """The decision alone, for a batch that the engine executes; returns whether it is closed."""
    lane = lane_of(s, env)
    put(lane, a, env)
    see_flight(s, env, lane)
    return form(lane, schedule, by_item)
