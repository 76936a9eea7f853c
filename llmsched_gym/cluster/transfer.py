"""Prefill and decode on different replicas: KV moves over a link behind the first token, and takes room on both sides.

A request whose prompt is complete at a replica that only prefills leaves its batches, not its memory. Its blocks at the
chosen replica are taken as soon as they are free there; from then on the link needs its time; then it runs there. The
wait is part of the gap between its first and its second token. (Zhong et al., DistServe, OSDI 2024.)
"""

from __future__ import annotations

import math

from llmsched_gym.cluster.look import keep_report, look
from llmsched_gym.cluster.state import DECODES, Route
from llmsched_gym.cluster.timeline import set_event
from llmsched_gym.engine.batch import is_prefill
from llmsched_gym.engine.blocks import blocks_for
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.lifecycle import open_lateness_s, resolve, take_off_running
from llmsched_gym.engine.records import ABANDONED, NONE, REJECTED, RUNNING
from llmsched_gym.engine.state import lane_of
from llmsched_gym.engine.turns import follow


@kernel()
def move_away(s, c, env, k, lane):
    """Requests of the batch that has just ended at lane `k`, which only prefills, go on elsewhere."""
    num_replicas = s.sims.shape[0] // s.episodes.shape[0]
    for i in range(lane.batch.num_items):
        r = lane.items[i].request
        request = lane.requests[r]
        if request.phase != RUNNING or is_prefill(request) or request.num_output_tokens == 0:
            continue
        take_off_running(lane, r)
        transfer = c.moving[env, c.routes[env].num_moving]
        c.routes[env].num_moving += 1
        transfer.request = r
        transfer.source = k - env * num_replicas
        transfer.target = NONE
        transfer.num_blocks = 0
        transfer.end_s = math.inf


@kernel()
def start_transfers(s, c, of, env, now_s, decode_route):
    """Give those who want to move a destination, and let them go as soon as it has room: first come first."""
    num_replicas = s.sims.shape[0] // s.episodes.shape[0]
    route, first = c.routes[env], env * num_replicas
    route.now_s = now_s
    i = 0
    for _ in range(route.num_moving):
        transfer = c.moving[env, i]
        r = transfer.request
        if transfer.target == NONE:
            look(s, c, env, r, False)
            target = decode_route(make_route(s, c, env, r, DECODES))
            if 0 <= target < num_replicas and c.candidates[first + target].is_legal:
                transfer.target = target
                c.nodes[first + target].num_coming += 1
                if s.requests[env, r].prompt_tokens + of.output_tokens[r] > s.sims[first + target].largest_request:
                    of.episode.num_rejected += 1  # rule 7, of that replica
                    _end_in_transfer(s, c, of, env, i, REJECTED)
                    continue
        i += 1
        if transfer.target == NONE or transfer.num_blocks > 0:
            continue
        sim, request = s.sims[first + transfer.target], s.requests[env, r]
        need = blocks_for(sim, request.num_computed_tokens)
        if need <= sim.free_blocks and sim.num_running + _arriving(c, env, transfer.target) < sim.max_num_seqs:
            keep_report(s, c, first + transfer.target, env, now_s)
            transfer.num_blocks = need
            sim.free_blocks -= need
            transfer.end_s = now_s + need * sim.block_size * route.link_s_per_token


@kernel()
def leave_in_transfer(s, c, of, env):
    """Let everybody go who has lost patience while no replica had their request."""
    route, i = c.routes[env], 0
    for _ in range(route.num_moving):
        request = of.requests[c.moving[env, i].request]
        if request.lateness_s + open_lateness_s(request, route.now_s) < of.episode.patience_s:
            i += 1
            continue
        request.lateness_s = of.episode.patience_s
        route.num_abandoned += 1
        _end_in_transfer(s, c, of, env, i, ABANDONED)


@kernel()
def _end_in_transfer(s, c, of, env, i, phase):
    """Be done with the request of transfer `i`, and free what it holds on both sides."""
    first, route, transfer = env * (s.sims.shape[0] // s.episodes.shape[0]), c.routes[env], c.moving[env, i]
    source, target, r = transfer.source, transfer.target, transfer.request
    keep_report(s, c, first + source, env, route.now_s)
    s.sims[first + source].free_blocks += of.requests[r].num_blocks
    of.requests[r].num_blocks = 0
    wake(s, c, env, source)
    if target != NONE:
        keep_report(s, c, first + target, env, route.now_s)
        s.sims[first + target].free_blocks += transfer.num_blocks
        c.nodes[first + target].num_coming -= 1
        wake(s, c, env, target)
    drop_transfer(c, env, i)
    resolve(of, of.world, r, phase, route.now_s)
    if of.world.has_turns:
        follow(of)


@kernel()
def _arriving(c, env, target):
    """Transfers to `target` that are under way."""
    count = 0
    for i in range(c.routes[env].num_moving):
        count += c.moving[env, i].target == target and c.moving[env, i].num_blocks > 0
    return count


@kernel(inline="always")  # a compiled function cannot return records
def make_route(s, c, env, r, which):
    """What a compiled router gets to decide on request `r`; `which` of the two it is."""
    num_replicas = s.sims.shape[0] // s.episodes.shape[0]
    candidates = c.candidates[env * num_replicas : (env + 1) * num_replicas]
    return Route(c.routes[env], s.requests[env, r], candidates, c.memory[env, which], c.options[env, which])


@kernel()
def first_transfer(c, env):
    """When the next transfer ends; inf without any."""
    end_s = math.inf
    for i in range(c.routes[env].num_moving):
        end_s = min(end_s, c.moving[env, i].end_s)
    return end_s


@kernel()
def drop_transfer(c, env, i):
    """Take transfer `i` off the list, the order of the others kept."""
    route = c.routes[env]
    for j in range(i, route.num_moving - 1):
        c.moving[env, j] = c.moving[env, j + 1]
    route.num_moving -= 1


@kernel()
def finish_transfer(s, c, env):
    """The KV of the transfer that ends first is at its destination, where the request goes on."""
    num_replicas = s.sims.shape[0] // s.episodes.shape[0]
    route, best = c.routes[env], 0
    for i in range(1, route.num_moving):
        if c.moving[env, i].end_s < c.moving[env, best].end_s:
            best = i
    transfer = c.moving[env, best]
    r, first = transfer.request, env * num_replicas
    source, target = first + transfer.source, first + transfer.target
    sim, request = s.sims[target], s.requests[env, r]
    if sim.num_running >= sim.max_num_seqs or sim.num_waiting + sim.num_running >= s.waiting.shape[1]:
        transfer.end_s = route.now_s + sim.idle_step_s  # somebody who was preempted there took its place
        return
    keep_report(s, c, source, env, route.now_s)
    keep_report(s, c, target, env, route.now_s)
    s.sims[source].free_blocks += request.num_blocks
    request.num_blocks = transfer.num_blocks
    lane = lane_of(s, target)
    lane.running[sim.num_running] = r
    sim.num_running += 1
    patience_s = s.episodes[env].patience_s
    leaves_s = request.last_token_s + request.tbt_slo_s + patience_s - request.lateness_s
    sim.next_departure_s = min(sim.next_departure_s, leaves_s)
    c.replica_of[env, r] = transfer.target
    c.nodes[target].num_coming -= 1
    c.nodes[target].num_dispatched += 1
    c.nodes[target].num_delivered += 1
    route.num_transfers += 1
    wake(s, c, env, transfer.source)
    wake(s, c, env, transfer.target)
    drop_transfer(c, env, best)


@kernel()
def wake(s, c, env, replica):
    """Let a replica that does not execute look for work now."""
    k, now_s = env * (s.sims.shape[0] // s.episodes.shape[0]) + replica, c.routes[env].now_s
    node = c.nodes[k]
    if not node.is_executing and not node.is_down and node.event_s > now_s and s.sims[k].clock_s < s.worlds[env].stop_s:
        set_event(c, env, replica, now_s)
