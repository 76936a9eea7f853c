"""The one checker of the engine's rules (design rules 1, 4, 5, 11): call it after any step, on any backend.

Of one lane (:func:`check`), or of all replicas of an episode, with what is afoot between them (:func:`check_lanes`, for
`cluster.invariants`). Long, as every rule is a line that stands beside those it depends on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from llmsched_gym.config import blocks_needed
from llmsched_gym.engine.blocks import (
    BY_PROMPT,
    LAST,
    NAMED,
    NEXT,
    OWNER,
    POSITION,
    PREVIOUS,
    SAME,
    USERS,
    listed,
    owner_of,
)
from llmsched_gym.engine.due import next_due_s, open_waits
from llmsched_gym.engine.queue import rank
from llmsched_gym.engine.records import (
    ABANDONED,
    CANCELLED,
    FINISHED,
    NONE,
    PENDING,
    PHASES,
    REFUSED,
    REJECTED,
    RUNNING,
    WAITING,
    has_come,
)
from llmsched_gym.engine.rows import phases_of
from llmsched_gym.engine.state import State


class InvariantError(AssertionError):
    """A rule of the engine does not hold; the message names it."""


class Afoot(NamedTuple):
    """What of an episode on several replicas is not as between two steps of a single engine; arrays by replica."""

    now_s: float
    executing: np.ndarray  # bool: a batch is under way, its blocks are taken, and no token is there
    behind: np.ndarray  # bool: its clock is yet to be set to now
    held: list[int]  # waiting requests that no replica has
    moving: list[tuple[int, int, int, int]]  # running ones that none has: request, source, target or NONE, blocks there
    num_abandoned: int  # clients of either that left
    is_cluster: bool = True  # requests enter one by one, and can come from a replica that failed


Require = Callable[[Any, str], None]


def check(state: State, env: int = 0, previous_clock_s: float = -np.inf) -> float:
    """Raise :class:`InvariantError` unless every invariant of environment `env` holds; returns its clock.

    Of a state with one lane for each environment, between two steps. Pass the returned clock to the next call to have
    its monotony checked too.
    """
    clocks_s = np.array([previous_clock_s, previous_clock_s])
    return float(check_lanes(state, env, clocks_s, Afoot(state.sims[env].clock_s, *_AT_REST))[0])


_AT_REST: Any = (np.zeros(1, np.bool_), np.zeros(1, np.bool_), [], [], 0, False)


def check_lanes(state: State, env: int, previous_s: Any, afoot: Afoot) -> np.ndarray:
    """:func:`check` of all lanes of an environment, whatever is `afoot`; returns the time, then each lane's clock."""
    num_lanes = len(state.sims) // len(state.episodes)
    lanes = range(env * num_lanes, (env + 1) * num_lanes)
    sims, episode, world, now_s = state.sims[lanes[0] : lanes[-1] + 1], state.episodes[env], state.worlds[env], afoot[0]
    requests = state.requests[env][: world.num_requests]
    outputs = state.output_tokens[env][: world.num_requests]
    phase = phases_of(state, env, int(world.num_requests))

    def require(condition: Any, rule: str) -> None:
        if not np.all(condition):
            raise InvariantError(f"env {env} at {now_s:.6f} s: {rule}")

    clocks_s = np.array([now_s, *sims["clock_s"]])
    require(clocks_s >= previous_s, f"a clock went back from {previous_s} s")

    counts = {p: int(np.sum(phase == p)) for p in range(len(PHASES))}
    total = {name: int(sims[name].sum()) for name in sims.dtype.names if name.startswith("num_")}
    require(counts[WAITING] == total["num_waiting"] + len(afoot.held), "waiting count differs from the phases")
    running = total["num_running"] + total["num_ending"] + len(afoot.moving)
    require(counts[RUNNING] == running, "running count differs from the phases")
    require(counts[FINISHED] == total["num_finished"], "finished count differs from the phases")
    require(counts[REJECTED] == episode.num_rejected, "rejected count differs from the phases")
    require(counts[REFUSED] == total["num_refused"], "refused count differs from the phases")
    require(
        counts[ABANDONED] == total["num_abandoned"] + afoot.num_abandoned, "abandoned count differs from the phases"
    )
    require(counts[CANCELLED] == world.num_cancelled, "cancelled count differs from the phases")
    arrived, arrival_s = has_come(phase), state.arrivals[env][: world.num_requests]["arrival_s"]
    require(episode.num_arrived == arrived.sum(), "arrived != waiting + running + resolved")
    is_root = state.arrivals[env]["parent"][world.num_past : world.next_arrival] == NONE
    require(arrived[world.num_past : world.next_arrival] | ~is_root, "an arrived request is pending")
    require(requests["arrival_s"][arrived] == arrival_s[arrived], "a request's arrival has changed")
    require(arrival_s[arrived] <= now_s, "a request came before its arrival")
    to_come = arrival_s[world.num_past :][phase[world.num_past :] == PENDING]
    overlooked = to_come < min(now_s, world.stop_s) if afoot.is_cluster else to_come <= now_s  # one decision at a time
    require(~overlooked, "an arrival was overlooked")
    _check_turns(state, env, require)
    require(requests["prompt_tokens"][~arrived] == 0, "a request can be read before its arrival")

    everywhere = [*afoot.held, *(r for r, *_ in afoot.moving)]
    for k in lanes:
        everywhere += state.waiting[k][: state.sims[k].num_waiting].tolist()
        everywhere += _running(state, k).tolist()
    require(len(set(everywhere)) == len(everywhere), "a request is in two places")
    require(phase[afoot.held] == WAITING, "who is held at the router does not wait")
    require(phase[[r for r, *_ in afoot.moving]] == RUNNING, "who is in transfer does not run")

    require(requests["num_blocks"] >= 0, "a request holds a negative number of blocks")
    require(requests["num_blocks"][phase != RUNNING] == 0, "a request that does not run holds blocks")
    computed, prefill = requests["num_computed_tokens"], requests["prefill_tokens"]
    emitted = requests["num_output_tokens"]
    require(computed[phase == WAITING] == 0, "a waiting request holds KV")
    moved = np.array([r for r, *_ in afoot.moving], np.int64)
    in_flight = []  # requests whose next token is: its KV counts as computed
    for replica, k in enumerate(lanes):
        _check_lane(state, env, k, replica, afoot, require)
        in_flight += _check_flight(state, env, k, require)
    marked = requests["num_scheduled_tokens"] != 0
    in_batches = [r for k in lanes if afoot.executing[k - lanes[0]] for r in _items(state, k)]
    require(set(np.flatnonzero(marked).tolist()) <= set(in_batches), "a request is marked as scheduled between steps")
    decoding = np.flatnonzero((phase == RUNNING) & (computed >= prefill))
    require(np.isin(moved, decoding), "a request in transfer has not computed its prompt")
    tokens = requests["prompt_tokens"][decoding] + emitted[decoding] - 1 + np.isin(decoding, in_flight)
    require(computed[decoding] == tokens, "a decode's KV is not its prompt and emitted tokens but the last")

    require(requests["num_preemptions"].sum() == total["num_preemptions"], "preemptions != sum over requests")
    require(emitted.sum() == sims["tokens_emitted"].sum(), "tokens emitted != sum over requests")
    require((emitted >= 0) & (emitted <= outputs), "a request emitted more than its output")
    require(emitted[phase == FINISHED] == outputs[phase == FINISHED], "a finished request lacks tokens")
    require(emitted[phase == RUNNING] < outputs[phase == RUNNING], "a complete request still runs")
    # a smaller replica may have rejected what another had begun
    out = (PENDING, REFUSED, CANCELLED) if afoot.is_cluster else (PENDING, REJECTED, REFUSED, CANCELLED)
    require(emitted[np.isin(phase, out)] == 0, "a request out of service emitted tokens")

    require(requests["lateness_s"] <= episode.patience_s, "a lateness exceeds the patience")
    resolved = np.isin(phase, (FINISHED, REJECTED, REFUSED, ABANDONED))
    require(np.isnan(requests["resolved_s"]) == ~resolved, "resolved_s and phase disagree")
    require(~(requests["resolved_s"] > now_s), "a request was resolved later than now")
    listed = np.sort(state.resolved[env][: episode.num_resolved])
    require(np.array_equal(listed, np.flatnonzero(resolved)), "list of resolved requests and phases differ")
    cohort = slice(world.cohort_start, world.cohort_stop)
    over = resolved | (phase == CANCELLED)
    require(np.sum(~over[cohort]) == world.num_unresolved, "unresolved count differs from the phases")
    return clocks_s


def _items(state: State, k: int) -> list[int]:
    found: list[int] = state.items[k, : state.batches[k].num_items]["request"].tolist()
    return found


def _running(state: State, k: int) -> np.ndarray:
    """Who runs on lane `k`, who ends with the batch in flight included; int32 (n,)."""
    running: np.ndarray = state.running[k][: state.sims[k].num_running + state.sims[k].num_ending]
    return running


def _check_lane(state: State, env: int, k: int, replica: int, afoot: Afoot, require: Require) -> None:
    """One replica: its lists, its blocks, its clients' patience."""
    sim, requests, clock_s = state.sims[k], state.requests[env], state.sims[k].clock_s
    waiting, running = state.waiting[k][: sim.num_waiting], _running(state, k)
    phase = requests["phase"]
    require(clock_s <= afoot.now_s, "a replica is ahead of the time")
    require(len(np.unique(waiting)) == len(waiting) and phase[waiting] == WAITING, "waiting list and phases differ")
    require(requests["prefill_tokens"][waiting].sum() == sim.waiting_tokens, "waiting tokens != sum over waiting")
    require(len(np.unique(running)) == len(running) and phase[running] == RUNNING, "running list and phases differ")
    require(len(running) <= sim.max_num_seqs, "more sequences run than max_num_seqs")

    executing = bool(afoot.executing[replica])
    if executing:
        scheduled = requests["num_scheduled_tokens"][_items(state, k)]
        require(scheduled.sum() == state.batches[k].num_tokens > 0, "tokens of the batch under way != sum over items")
    leaving = [r for r, source, *_ in afoot.moving if source == replica]
    coming = sum(blocks for *_, target, blocks in afoot.moving if target == replica)
    holders = np.array([*running, *leaving], np.int64)
    if sim.prefix_caching:
        _check_places(state, env, k, executing, require)
    else:
        used = requests["num_blocks"][holders].sum() + coming
        require(used + sim.free_blocks == sim.total_blocks, "blocks used + free != total")
    require(0 <= sim.free_blocks <= sim.total_blocks, "free blocks out of range")
    computed = requests["num_computed_tokens"][holders] + requests["num_scheduled_tokens"][holders]
    held = np.maximum(computed, requests["prefill_tokens"][holders]) if sim.admission == BY_PROMPT else computed
    blocks = requests["num_blocks"][holders]
    require(blocks == blocks_needed(held, sim.block_size), "blocks held != ceil(tokens held / block size)")

    active = requests[[*waiting, *running]]
    since_s, slo_s = open_waits(active)
    late_s = active["lateness_s"] + np.maximum(0.0, clock_s - (since_s + slo_s))
    patience_s = state.episodes[env].patience_s
    require(late_s < patience_s + 1e-9 * (1.0 + clock_s), "a client whose patience is over is still here")
    _check_index(state, env, k, executing or bool(afoot.behind[replica]), require)


def _check_flight(state: State, env: int, k: int, require: Require) -> list[int]:
    """The batch in flight of lane `k`, see `engine.lag`; returns the requests that get a token of it."""
    sim, flight, requests = state.sims[k], state.flights[k], state.requests[env]
    if not sim.in_flight:
        require(sim.num_ending == 0, "a request ends with a batch in flight, and none is")
        return []
    require(sim.async_lag, "a batch is in flight between steps")
    require(not flight.is_foreseen, "a token that is in flight counts as emitted")
    require(flight.num_tokens > 0 and flight.duration_s >= 0.0, "an empty batch is in flight")
    items = state.flying[k, : flight.num_items]
    r = items["request"]
    require(len(np.unique(r)) == len(r), "a request is in flight twice")
    require(requests["phase"][r] == RUNNING, "a request in flight does not run")
    complete = requests["num_computed_tokens"][r] >= requests["prefill_tokens"][r]
    require((items["emits"] != 0) == complete, "a request in flight emits if and only if its prompt is complete")
    emitting = r[items["emits"] != 0]
    most = np.minimum(requests["max_output_tokens"], sim.max_model_len - requests["prompt_tokens"])
    ends = np.sort(emitting[requests["num_output_tokens"][emitting] + 1 >= most[emitting]])
    hidden = _running(state, k)[sim.num_running :]
    require(np.array_equal(np.sort(hidden), ends), "hidden requests are not those that end with the batch in flight")
    require(np.diff(requests["place"][hidden]) > 0, "hidden requests are out of order")
    found: list[int] = emitting.tolist()
    return found


def _check_turns(state: State, env: int, require: Require) -> None:
    """Who of a session has come, is due, or never will; see `engine.turns`."""
    world = state.worlds[env]
    phase = phases_of(state, env, int(world.num_requests))
    arrivals = state.arrivals[env][: world.num_requests]
    turns = np.flatnonzero(arrivals["parent"] != NONE)
    parent = phase[arrivals["parent"][turns]]
    due = state.due[env][: world.num_due]
    require(has_come(phase[turns]) <= (parent == FINISHED), "a turn came before its parent had finished")
    lost = np.isin(parent, (REJECTED, REFUSED, ABANDONED, CANCELLED))
    require((phase[turns] == CANCELLED) == lost, "a turn is cancelled if and only if its parent will not finish")
    waits = turns[(parent == FINISHED) & (phase[turns] == PENDING)]
    require(np.array_equal(np.sort(due), waits), "the due turns are not those whose parents have finished")
    times = arrivals["arrival_s"][due]
    require(times[(np.arange(1, len(due)) - 1) // 2] <= times[1:], "the due turns are no heap")


def _check_places(state: State, env: int, k: int, executing: bool, require: Require) -> None:
    """The places of lane `k`'s blocks: who holds them, the line of free ones, what can be found."""
    sim, requests, prefixes = state.sims[k], state.requests[env], state.prefixes[env]
    places, total, bits = state.blocks[k], int(state.sims[k].total_blocks), int(state.sims[k].block_bits)
    blocks, running = places[:total], state.running[k][: sim.num_running].tolist()
    owner, position_of = blocks[:, OWNER], blocks[:, POSITION]
    held = [[int(listed(sim, places, prefixes[r].row, i)) for i in range(requests[r].num_blocks)] for r in running]
    users = np.bincount([b for own in held for b in own], minlength=total)
    require(users == blocks[:, USERS], "users of a block != its holders")
    rows = prefixes["row"][: state.worlds[env].num_requests]
    require(len({int(rows[r]) for r in running}) == len(running), "two requests have one row of blocks")
    require(rows[requests["phase"][: len(rows)] != RUNNING] == NONE, "a request that does not run has a row of blocks")

    line: list[int] = []
    b = int(places[total, NEXT])
    while b != total and len(line) <= total:
        require(places[places[b, NEXT], PREVIOUS] == b, "the line of free blocks is torn")
        line.append(b)
        b = int(places[b, NEXT])
    require(len(line) == sim.free_blocks and len(set(line)) == len(line), "free blocks != those in their line")
    in_line = np.zeros(total, bool)
    in_line[line] = True
    require(in_line == (users == 0), "blocks used + cached + free != total")

    for r, own in zip(running, held, strict=True):
        full = int(requests[r].num_computed_tokens + requests[r].num_scheduled_tokens * executing) >> bits
        names = [(int(owner_of(prefixes, r, i, bits)), i) for i in range(full)]
        found = list(zip(owner[own[:full]].tolist(), position_of[own[:full]].tolist(), strict=True))
        require(found == names, "a full block does not have the identity of its tokens")
        require(owner[own[full:]] == NONE, "a block that is not full has an identity")

    seen: list[int] = []
    named = places[: sim.table_mask + 1, NAMED]
    for first in named[named != NONE].tolist():
        b, last = first, first
        while b != NONE and len(seen) <= total:
            same = (owner[b], position_of[b]) == (owner[first], position_of[first])
            require(same, "equal blocks have two identities")
            require(b == first or places[b, LAST] == NONE, "a block is taken for the oldest of its equals")
            seen.append(b)
            last, b = b, int(places[b, SAME])
        require(places[first, LAST] == last, "the newest of equal blocks is not the last")
    require(np.array_equal(np.sort(seen), np.flatnonzero(owner != NONE)), "a cached block cannot be found")


def _check_index(state: State, env: int, k: int, may_lag: bool, require: Require) -> None:
    """The parts of the waiting line and its trees hold whom they are to hold, in order; see `engine.queue`.

    They are put right when a lane's clock is set: until then (`may_lag`) who has just been delivered can be overdue.
    """
    sim, requests = state.sims[k], state.requests[env]
    waiting = state.waiting[k][: sim.num_waiting]
    require(np.diff(requests["place"][waiting]) > 0, "places do not grow along the waiting list")
    now_s, rows = sim.clock_s, requests[waiting]
    may_expire = not sim.prefix_caching
    since_s, slo_s = open_waits(rows)
    gone = may_expire & (rows["num_output_tokens"] == 0) & (slo_s - (now_s - since_s) <= 0.0)
    if may_lag:
        flagged = rows["has_expired"] != 0
        require(flagged <= gone, "a request has expired before its time")
        gone = flagged
    expired = waiting[gone].tolist()
    require(_chain(requests, sim.first_open, sim.last_open) == waiting[~gone].tolist(), "open requests: wrong list")
    by_deadline = sorted(expired, key=lambda r: (next_due_s(requests[r]), r))
    require(_chain(requests, sim.first_expired, sim.last_expired) == by_deadline, "expired requests: wrong list")
    for root, strict in ((sim.expired_strict, True), (sim.expired_others, False)):
        members = [r for r in expired if (requests[r].slo_class == 0) == strict]
        by_length = sorted(members, key=lambda r: (requests[r].prefill_tokens, r))
        require(_in_order(requests, int(root)) == by_length, "expired requests: wrong tree")


def _chain(requests: np.ndarray, first: int, last: int) -> list[int] | None:
    """The requests linked from `first` to `last`; None if their links disagree."""
    found: list[int] = []
    r, before = int(first), NONE
    while r != NONE and len(found) < len(requests):
        if requests[r].earlier != before:
            return None
        found.append(r)
        before, r = r, int(requests[r].later)
    return found if before == last else None


def _in_order(requests: np.ndarray, root: int) -> list[int] | None:
    """The requests of a tree from the shortest to the longest; None if a child outranks its parent."""
    found: list[int] = []
    path: list[int] = []
    r = root
    while (path or r != NONE) and len(found) < len(requests):
        if r != NONE:
            for child in (requests[r].shorter, requests[r].longer):
                if child != NONE and rank(int(child)) > rank(r):
                    return None
            path.append(r)
            r = int(requests[r].shorter)
        else:
            r = path.pop()
            found.append(r)
            r = int(requests[r].longer)
    return found
