"""An episode on several replicas, event by event: requests enter, are delivered, batches begin and end.

Each replica has its own clock. The earliest event comes next; of equal times first replicas that fail or are back, then
requests that enter, then KV that has been moved, then replicas by index: their batch ends, and the next one begins. The
loop leaves compiled code where somebody in Python has to decide, or an array is full; the codes say which.
"""

from __future__ import annotations

import math

from llmsched_gym.cluster.look import STRICT, could_take, keep_report, look, send_report, takes
from llmsched_gym.cluster.records import PREFILL
from llmsched_gym.cluster.state import PROMPTS
from llmsched_gym.cluster.timeline import first_of, set_event
from llmsched_gym.cluster.transfer import (
    drop_transfer,
    finish_transfer,
    first_transfer,
    leave_in_transfer,
    make_route,
    move_away,
    start_transfers,
    wake,
)
from llmsched_gym.engine.due import open_lateness_s
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.lifecycle import (
    average,
    deliver,
    enter,
    leave_running,
    lose_patience,
    resolve,
    take_next,
)
from llmsched_gym.engine.queue import leave_waiting
from llmsched_gym.engine.records import ABANDONED, NONE, REJECTED, WAITING
from llmsched_gym.engine.run import execute_s, log_step, noise_due
from llmsched_gym.engine.state import episode_of, lane_of
from llmsched_gym.engine.step import apply_batch, clear_batch, commit, has_work
from llmsched_gym.engine.turns import follow

# What the loop asks for when it returns.
OVER, ROUTE, FORM, REFILL, ROOM, CHANGE, STALLED, MORE, NOTHING = range(9)


@kernel()
def pass_time(lane, of, now_s):
    """Set a replica's clock; clients leave. Who comes is delivered when it comes."""
    elapsed_s = now_s - lane.sim.clock_s
    lane.sim.clock_s = now_s
    if of.world.has_turns:
        follow(of)
    lose_patience(lane, of, now_s)
    average(lane.sim, elapsed_s)


@kernel()
def send(s, c, env, r, replica):
    """Deliver request `r` of environment `env` to a replica; False if its line has no room: make some and ask again."""
    num_replicas = s.sims.shape[0] // s.episodes.shape[0]
    k, route = env * num_replicas + replica, c.routes[env]
    lane, node, of = lane_of(s, k), c.nodes[k], episode_of(s, env)
    if lane.sim.num_waiting + lane.sim.num_running >= s.waiting.shape[1]:
        return False
    keep_report(s, c, k, env, route.now_s)
    route.deciding = NONE
    route.num_decisions += 1
    c.replica_of[env, r] = replica
    request = lane.requests[r]
    tokens = request.prompt_tokens + of.output_tokens[r]
    if node.role != PREFILL and tokens > lane.sim.largest_request:  # rule 7, of this replica
        _reject(s, c, of, env, r)
        return True
    node.num_delivered += 1
    node.num_dispatched += 1
    node.dispatched_strict += request.slo_class == STRICT
    node.dispatched_tokens += request.prefill_tokens - c.candidates[k].cached_tokens
    if lane.sim.prefix_caching:
        lane.prefixes[r].found_version = 0  # what was found was another replica's
    deliver(lane, r)
    if request.num_output_tokens > 0:  # it is back from a replica that failed: its client waits for the next token
        leaves_s = request.last_token_s + request.tbt_slo_s + of.episode.patience_s - request.lateness_s
        lane.sim.next_departure_s = min(lane.sim.next_departure_s, leaves_s)
    if route.now_s == 0.0:
        lane.sim.new_arrivals = lane.sim.new_tokens = 0  # who is there from the start tells nothing of the rate
    wake(s, c, env, replica)
    return True


@kernel()
def _reject(s, c, of, env, r):
    """Be done with request `r`, which no replica has. Whoever idles looks up, as at an arrival."""
    of.episode.num_rejected += 1
    resolve(of, of.world, r, REJECTED, c.routes[env].now_s)
    if of.world.has_turns:
        follow(of)  # who is rejected takes its turns with it
    _wake_all(s, c, env)


@kernel()
def _wake_all(s, c, env):
    for replica in range(s.sims.shape[0] // s.episodes.shape[0]):
        wake(s, c, env, replica)


@kernel()
def _hold(c, env, r):
    """Keep request `r` at the router."""
    route = c.routes[env]
    c.held[env, route.num_held] = r
    route.num_held += 1


@kernel()
def _is_taken(s, c, env, r, if_up):
    """Whether a replica takes request `r`; with `if_up` whether one would, were all up."""
    num_replicas = s.sims.shape[0] // s.episodes.shape[0]
    for k in range(env * num_replicas, (env + 1) * num_replicas):
        if could_take(s, c, k, env, r, True) if if_up else takes(s, c, k, env, r, True):
            return True
    return False


@kernel()
def _next_held(s, c, of, env):
    """The first request at the router that a replica can take now, off the list; clients that lost patience leave.

    So does what no replica will ever hold: with what it has emitted it has outgrown those that compute prompts.
    """
    route, kept, found = c.routes[env], 0, NONE
    for i in range(route.num_held):
        r = c.held[env, i]
        request = of.requests[r]
        if request.lateness_s + open_lateness_s(request, route.now_s) >= of.episode.patience_s:
            request.lateness_s = of.episode.patience_s
            route.num_abandoned += 1
            resolve(of, of.world, r, ABANDONED, route.now_s)
            if of.world.has_turns:
                follow(of)
        elif not _is_taken(s, c, env, r, True):
            _reject(s, c, of, env, r)
        elif found == NONE and _is_taken(s, c, env, r, False):
            found = r
        else:
            c.held[env, kept] = r
            kept += 1
    route.num_held = kept
    return found


@kernel()
def _ask(s, c, env, r):
    """Request `r` is the one to be routed."""
    route, last = c.routes[env], r
    for _ in range(c.before.shape[1]):  # a session may fork, and the one before it not have come
        last = c.before[env, last]
        if last == NONE or c.replica_of[env, last] != NONE:
            break
    route.deciding = r
    route.asked_s = route.now_s
    route.last_replica = c.replica_of[env, last] if last != NONE else NONE
    look(s, c, env, r, True)


@kernel(inline="always")
def _enter_next(s, c, of, env):
    """Let the request that comes next in; returns whether it is to be routed now."""
    r = take_next(of)
    if r == NONE:
        return False
    if not enter(of, r):
        if of.world.has_turns:
            follow(of)
        _wake_all(s, c, env)
        return False
    of.requests[r].phase = WAITING
    if not _is_taken(s, c, env, r, False):
        _hold(c, env, r)
        return False
    _ask(s, c, env, r)
    return True


@kernel(inline="always")
def begin(s, c, env, k, lane):
    """Execute the batch that lane `k` has formed; an empty one lets it idle until somebody comes, or its next look."""
    node, world = c.nodes[k], s.worlds[env]
    num_replicas = s.sims.shape[0] // s.episodes.shape[0]
    sim = lane.sim
    apply_batch(lane, world)
    if world.has_turns and lane.batch.num_refuse > 0:
        follow(episode_of(s, env))
    if lane.batch.num_tokens > 0:
        node.duration_s = execute_s(s, k, lane, world)
        node.is_executing = 1
        event_s = sim.clock_s + (node.duration_s + sim.decision_s)
    else:
        clear_batch(lane)
        event_s = world.stop_s
        if has_work(lane):
            event_s = min(event_s, sim.clock_s + sim.idle_step_s)
            sim.num_idle_steps += 1
    set_event(c, env, k - env * num_replicas, event_s)


@kernel(inline="always")
def end_batch(s, c, env, k, lane, of):
    """The batch under way at lane `k` has ended: its tokens are there. Its clock is left to :func:`pass_time`."""
    node = c.nodes[k]
    node.is_executing = 0
    node.has_ended = 1
    commit(lane, of.world, of.output_tokens, s.gaps[env], of.arrivals, node.duration_s + lane.sim.decision_s)
    if node.role == PREFILL:
        move_away(s, c, env, k, lane)
    if of.world.has_turns:
        follow(of)


@kernel()
def hand_back(s, c, env, k):
    """Lane `k` fails: its batch is lost, and its requests are the router's again, running ones first."""
    num_replicas = s.sims.shape[0] // s.episodes.shape[0]
    lane, route, replica = lane_of(s, k), c.routes[env], k - env * num_replicas
    keep_report(s, c, k, env, route.now_s)
    clear_batch(lane)
    for _ in range(lane.sim.num_running):
        r = lane.running[0]
        leave_running(lane, r)
        _return(c, lane, env, r)
    for _ in range(lane.sim.num_waiting):
        r = lane.waiting[0]
        leave_waiting(lane, r)
        _return(c, lane, env, r)
    i = 0
    for _ in range(route.num_moving):
        transfer = c.moving[env, i]
        if transfer.source == replica:
            if transfer.target != NONE:
                target = env * num_replicas + transfer.target
                keep_report(s, c, target, env, route.now_s)
                s.sims[target].free_blocks += transfer.num_blocks
                c.nodes[target].num_coming -= 1
                wake(s, c, env, transfer.target)
            s.requests[env, transfer.request].num_blocks = 0
            _return(c, lane, env, transfer.request)
            drop_transfer(c, env, i)
            continue
        if transfer.target == replica:
            transfer.target = NONE
            transfer.num_blocks = 0
            transfer.end_s = math.inf
        i += 1
    c.nodes[k].is_down = 1
    c.nodes[k].is_executing = 0
    c.nodes[k].num_coming = 0
    set_event(c, env, replica, math.inf)


@kernel()
def _return(c, lane, env, r):
    """Request `r`, which holds nothing any more, is the router's again; its client keeps the tokens that it has."""
    request = lane.requests[r]
    request.phase = WAITING
    request.num_computed_tokens = 0
    request.prefill_tokens = request.prompt_tokens + request.num_output_tokens
    request.lst_s = math.nan
    c.routes[env].num_handed_back += 1
    _hold(c, env, r)


@kernel()
def come_back(s, c, env, k):
    """Lane `k` is up again, empty, and says so."""
    num_replicas = s.sims.shape[0] // s.episodes.shape[0]
    c.nodes[k].is_down = 0
    send_report(s, c, k, env, c.routes[env].now_s)
    set_event(c, env, k - env * num_replicas, c.routes[env].now_s)


@kernel(inline="always")
def advance(s, c, env, schedule, forms, router, routes, decode_route, to_the_end, max_idle_steps, max_events):
    """Run environment `env` on until somebody is to be asked, see the codes; at most `max_events` events.

    With `forms` the compiled `schedule` forms batches, with `routes` the compiled `router` routes. Else the loop
    returns FORM, with the lane in ``route.lane``, or ROUTE. Without `to_the_end` nobody enters behind the horizon.
    """
    num_replicas = s.sims.shape[0] // s.episodes.shape[0]
    of, route = episode_of(s, env), c.routes[env]
    world = of.world
    for _ in range(max_events):
        if route.deciding != NONE:
            if not routes:
                return ROUTE
            replica = router(make_route(s, c, env, route.deciding, PROMPTS))
            if not (0 <= replica < num_replicas) or not c.candidates[env * num_replicas + replica].is_legal:
                route.lane = replica
                return ROUTE  # for Python to say what is wrong with it
            if not send(s, c, env, route.deciding, replica):
                route.lane = replica
                return ROOM
            continue
        if world.drain_all != 0 and world.num_unresolved == 0:
            return OVER
        if route.num_moving > 0:
            leave_in_transfer(s, c, of, env)
        if route.num_held > 0 and route.now_s < world.stop_s:
            r = _next_held(s, c, of, env)
            if r != NONE:
                _ask(s, c, env, r)
                continue
        replica = first_of(c, env)
        k = env * num_replicas + replica
        node = c.nodes[k]
        event_s, move_s, enter_s = node.event_s, first_transfer(c, env), world.next_arrival_s
        if not to_the_end and enter_s >= world.stop_s:
            enter_s = math.inf
        change_s = route.next_change_s if route.next_change_s < world.stop_s else math.inf
        is_quiet = min(event_s, move_s) == math.inf and enter_s >= world.stop_s
        if is_quiet and (route.num_held + route.num_moving == 0 or change_s == math.inf):
            if world.stop_s < math.inf:  # whoever is still at the router has waited up to the end
                route.now_s = max(route.now_s, world.stop_s)
            return OVER  # all replicas are past the end, or nothing is to come
        if change_s <= min(event_s, min(move_s, enter_s)):
            route.now_s = max(route.now_s, change_s)
            return CHANGE
        if enter_s <= min(event_s, move_s):
            route.now_s = max(route.now_s, enter_s)
            _enter_next(s, c, of, env)
            continue
        if move_s <= event_s:
            route.now_s = move_s
            finish_transfer(s, c, env)
            continue
        route.now_s = event_s
        keep_report(s, c, k, env, event_s)
        lane = lane_of(s, k)
        start_s = lane.sim.clock_s
        if node.is_executing:
            end_batch(s, c, env, k, lane, of)
            comes = world.next_arrival_s <= event_s and (to_the_end or world.next_arrival_s < world.stop_s)
            if comes and not (world.drain_all != 0 and world.num_unresolved == 0):
                continue  # a turn that follows at once is there before the next batch begins
        ran = node.has_ended != 0
        node.has_ended = 0
        pass_time(lane, of, event_s)
        if ran and s.steps.shape[1] > 0:
            log_step(s, k, lane, start_s, node.duration_s)
        if route.num_moving > 0:
            start_transfers(s, c, of, env, event_s, decode_route)
        if lane.sim.clock_s >= world.stop_s:
            set_event(c, env, replica, math.inf)
            continue
        if ran and noise_due(s, k):
            route.lane = k
            return REFILL  # and come back: it begins its next batch then
        if world.drain_all != 0 and world.num_unresolved == 0:
            return OVER
        if lane.sim.num_idle_steps > max_idle_steps:
            return STALLED
        clear_batch(lane)
        if has_work(lane):
            if not forms:
                route.lane = k
                return FORM
            schedule(lane)
        begin(s, c, env, k, lane)
    return MORE
