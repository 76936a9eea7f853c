"""The one checker of the engine's rules (design rules 1, 4, 5, 11): call it after any step, on any backend.

Of one lane (:func:`check`), or of all replicas of an episode, with what is afoot between them (:func:`check_lanes`, for
`cluster.invariants`). Tests call it after every step, so records are read once, as plain objects: an attribute of a
NumPy record takes 3 us, which once was most of the time of the engine's tests.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from llmsched_gym.config import blocks_needed
from llmsched_gym.engine.blocks import BY_PROMPT
from llmsched_gym.engine.due import open_waits
from llmsched_gym.engine.invariants_linked import Require, check_index, check_places
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
    num_lanes, now_s = len(state.sims) // len(state.episodes), afoot.now_s
    lanes = range(env * num_lanes, (env + 1) * num_lanes)
    sims = _plain(state.sims[lanes.start : lanes.stop])
    (episode,), (world,) = _plain(state.episodes[env : env + 1]), _plain(state.worlds[env : env + 1])
    requests, outputs = state.requests[env][: world.num_requests], state.output_tokens[env][: world.num_requests]
    phase = phases_of(state, env, world.num_requests)
    is_in = [phase == p for p in range(len(PHASES))]
    counts = [int(np.count_nonzero(members)) for members in is_in]

    def require(condition: Any, rule: str, *values: Any) -> None:
        if not (condition.all() if isinstance(condition, np.ndarray) else condition):
            raise InvariantError(f"env {env} at {now_s:.6f} s: {rule.format(*values)}")

    def total(name: str) -> int:
        return sum(getattr(sim, name) for sim in sims)

    clocks_s = np.array([now_s, *(sim.clock_s for sim in sims)])
    require(clocks_s >= previous_s, "a clock went back from {} s", previous_s)

    require(counts[WAITING] == total("num_waiting") + len(afoot.held), "waiting count differs from the phases")
    running = total("num_running") + total("num_ending") + len(afoot.moving)
    require(counts[RUNNING] == running, "running count differs from the phases")
    require(counts[FINISHED] == total("num_finished"), "finished count differs from the phases")
    require(counts[REJECTED] == episode.num_rejected, "rejected count differs from the phases")
    require(counts[REFUSED] == total("num_refused"), "refused count differs from the phases")
    abandoned = total("num_abandoned") + afoot.num_abandoned
    require(counts[ABANDONED] == abandoned, "abandoned count differs from the phases")
    require(counts[CANCELLED] == world.num_cancelled, "cancelled count differs from the phases")
    arrived, arrival_s = has_come(phase), state.arrivals[env]["arrival_s"][: world.num_requests]
    require(episode.num_arrived == np.count_nonzero(arrived), "arrived != waiting + running + resolved")
    is_root = state.arrivals[env]["parent"][world.num_past : world.next_arrival] == NONE
    require(arrived[world.num_past : world.next_arrival] | ~is_root, "an arrived request is pending")
    require(requests["arrival_s"][arrived] == arrival_s[arrived], "a request's arrival has changed")
    require(arrival_s[arrived] <= now_s, "a request came before its arrival")
    to_come = arrival_s[world.num_past :][is_in[PENDING][world.num_past :]]
    overlooked = to_come < min(now_s, world.stop_s) if afoot.is_cluster else to_come <= now_s  # one decision at a time
    require(~overlooked, "an arrival was overlooked")
    _check_turns(state, env, world, phase, require)
    require(requests["prompt_tokens"][~arrived] == 0, "a request can be read before its arrival")

    moved = [r for r, *_ in afoot.moving]
    everywhere = [*afoot.held, *moved]
    for k, sim in zip(lanes, sims, strict=True):
        everywhere += state.waiting[k][: sim.num_waiting].tolist() + _running(state, k, sim).tolist()
    require(len(set(everywhere)) == len(everywhere), "a request is in two places")
    require(phase[afoot.held] == WAITING, "who is held at the router does not wait")
    require(phase[moved] == RUNNING, "who is in transfer does not run")

    require(requests["num_blocks"] >= 0, "a request holds a negative number of blocks")
    require(requests["num_blocks"][~is_in[RUNNING]] == 0, "a request that does not run holds blocks")
    computed, emitted = requests["num_computed_tokens"], requests["num_output_tokens"]
    require(computed[is_in[WAITING]] == 0, "a waiting request holds KV")
    in_flight: set[int] = set()  # requests whose next token is: its KV counts as computed
    in_batches: set[int] = set()
    for replica, (k, sim) in enumerate(zip(lanes, sims, strict=True)):
        _check_lane(state, env, k, replica, sim, episode.patience_s, afoot, require)
        in_flight.update(_check_flight(state, env, k, sim, require))
        in_batches.update(_items(state, k) if afoot.executing[replica] else ())
    marked = np.flatnonzero(requests["num_scheduled_tokens"]).tolist()
    require(in_batches.issuperset(marked), "a request is marked as scheduled between steps")
    decoding = np.flatnonzero(is_in[RUNNING] & (computed >= requests["prefill_tokens"]))
    require(set(moved).issubset(decoding.tolist()), "a request in transfer has not computed its prompt")
    coming = np.array([r in in_flight for r in decoding.tolist()], np.int64)
    tokens = requests["prompt_tokens"][decoding] + emitted[decoding] - 1 + coming
    require(computed[decoding] == tokens, "a decode's KV is not its prompt and emitted tokens but the last")

    require(requests["num_preemptions"].sum() == total("num_preemptions"), "preemptions != sum over requests")
    require(emitted.sum() == total("tokens_emitted"), "tokens emitted != sum over requests")
    require((emitted >= 0) & (emitted <= outputs), "a request emitted more than its output")
    require((emitted == outputs)[is_in[FINISHED]], "a finished request lacks tokens")
    require((emitted < outputs)[is_in[RUNNING]], "a complete request still runs")
    # a smaller replica may have rejected what another had begun
    out = (PENDING, REFUSED, CANCELLED) if afoot.is_cluster else (PENDING, REJECTED, REFUSED, CANCELLED)
    require(emitted[_any_of(is_in, out)] == 0, "a request out of service emitted tokens")

    require(requests["lateness_s"] <= episode.patience_s, "a lateness exceeds the patience")
    resolved = _any_of(is_in, (FINISHED, REJECTED, REFUSED, ABANDONED))
    require(np.isnan(requests["resolved_s"]) == ~resolved, "resolved_s and phase disagree")
    require(~(requests["resolved_s"] > now_s), "a request was resolved later than now")
    noted = sorted(state.resolved[env][: episode.num_resolved].tolist())
    require(noted == np.flatnonzero(resolved).tolist(), "list of resolved requests and phases differ")
    over = (resolved | is_in[CANCELLED])[world.cohort_start : world.cohort_stop]
    require(np.count_nonzero(~over) == world.num_unresolved, "unresolved count differs from the phases")
    return clocks_s


def _plain(records: np.ndarray) -> list[Any]:
    """Records (n,) as n objects whose attributes are Python's numbers."""
    return [SimpleNamespace(**dict(zip(records.dtype.names or (), row, strict=True))) for row in records.tolist()]


def _any_of(is_in: list[np.ndarray], phases: tuple[int, ...]) -> np.ndarray:
    """Who is in one of the phases, of who `is_in` each; bool (n,)."""
    return np.logical_or.reduce([is_in[p] for p in phases])


def _items(state: State, k: int) -> list[int]:
    found: list[int] = state.items["request"][k, : state.batches["num_items"][k]].tolist()
    return found


def _running(state: State, k: int, sim: Any) -> np.ndarray:
    """Who runs on lane `k`, who ends with the batch in flight included; int32 (n,)."""
    running: np.ndarray = state.running[k][: sim.num_running + sim.num_ending]
    return running


def _check_lane(
    state: State, env: int, k: int, replica: int, sim: Any, patience_s: float, afoot: Afoot, require: Require
) -> None:
    """One replica: its lists, its blocks, its clients' patience."""
    requests, clock_s = state.requests[env], sim.clock_s
    waiting, running = state.waiting[k][: sim.num_waiting], _running(state, k, sim)
    phase, prefill = requests["phase"], requests["prefill_tokens"]
    require(clock_s <= afoot.now_s, "a replica is ahead of the time")
    require(_are_distinct(waiting) & (phase[waiting] == WAITING), "waiting list and phases differ")
    require(prefill[waiting].sum() == sim.waiting_tokens, "waiting tokens != sum over waiting")
    require(_are_distinct(running) & (phase[running] == RUNNING), "running list and phases differ")
    require(len(running) <= sim.max_num_seqs, "more sequences run than max_num_seqs")

    executing = bool(afoot.executing[replica])
    if executing:
        scheduled = requests["num_scheduled_tokens"][_items(state, k)].sum()
        is_sum = scheduled == state.batches["num_tokens"][k] > 0
        require(is_sum, "tokens of the batch under way != sum over items")
    leaving = [r for r, source, *_ in afoot.moving if source == replica]
    holders = np.concatenate((running, np.array(leaving, np.int64)))
    blocks = requests["num_blocks"][holders]
    if sim.prefix_caching:
        check_places(state, env, k, sim, executing, require)
    else:
        used = blocks.sum() + sum(blocks for *_, target, blocks in afoot.moving if target == replica)
        require(used + sim.free_blocks == sim.total_blocks, "blocks used + free != total")
    require(0 <= sim.free_blocks <= sim.total_blocks, "free blocks out of range")
    computed = requests["num_computed_tokens"][holders] + requests["num_scheduled_tokens"][holders]
    held = np.maximum(computed, prefill[holders]) if sim.admission == BY_PROMPT else computed
    require(blocks == blocks_needed(held, sim.block_size), "blocks held != ceil(tokens held / block size)")

    active = requests[np.concatenate((waiting, running))]
    since_s, slo_s = open_waits(active)
    late_s = active["lateness_s"] + np.maximum(0.0, clock_s - (since_s + slo_s))
    require(late_s < patience_s + 1e-9 * (1.0 + clock_s), "a client whose patience is over is still here")
    check_index(requests, waiting, sim, executing or bool(afoot.behind[replica]), require)


def _are_distinct(members: np.ndarray) -> bool:
    return len(set(members.tolist())) == len(members)


def _check_flight(state: State, env: int, k: int, sim: Any, require: Require) -> list[int]:
    """The batch in flight of lane `k`, see `engine.lag`; returns the requests that get a token of it."""
    requests, (flight,) = state.requests[env], _plain(state.flights[k : k + 1])
    if not sim.in_flight:
        require(sim.num_ending == 0, "a request ends with a batch in flight, and none is")
        return []
    require(sim.async_lag, "a batch is in flight between steps")
    require(not flight.is_foreseen, "a token that is in flight counts as emitted")
    require(flight.num_tokens > 0 and flight.duration_s >= 0.0, "an empty batch is in flight")
    items = state.flying[k][: flight.num_items]
    r, emits = items["request"], items["emits"] != 0
    require(_are_distinct(r), "a request is in flight twice")
    require(requests["phase"][r] == RUNNING, "a request in flight does not run")
    complete = requests["num_computed_tokens"][r] >= requests["prefill_tokens"][r]
    require(emits == complete, "a request in flight emits if and only if its prompt is complete")
    emitting = r[emits]
    most = np.minimum(requests["max_output_tokens"], sim.max_model_len - requests["prompt_tokens"])
    ends = emitting[requests["num_output_tokens"][emitting] + 1 >= most[emitting]]
    hidden = _running(state, k, sim)[sim.num_running :]
    is_theirs = sorted(hidden.tolist()) == sorted(ends.tolist())
    require(is_theirs, "hidden requests are not those that end with the batch in flight")
    place = requests["place"][hidden]
    require(place[1:] > place[:-1], "hidden requests are out of order")
    found: list[int] = emitting.tolist()
    return found


def _check_turns(state: State, env: int, world: Any, phase: np.ndarray, require: Require) -> None:
    """Who of a session has come, is due, or never will; see `engine.turns`."""
    arrivals = state.arrivals[env][: world.num_requests]
    turns = np.flatnonzero(arrivals["parent"] != NONE)
    own, parent = phase[turns], phase[arrivals["parent"][turns]]
    due = state.due[env][: world.num_due]
    require(has_come(own) <= (parent == FINISHED), "a turn came before its parent had finished")
    lost = (parent == REJECTED) | (parent == REFUSED) | (parent == ABANDONED) | (parent == CANCELLED)
    require((own == CANCELLED) == lost, "a turn is cancelled if and only if its parent will not finish")
    waits = turns[(parent == FINISHED) & (own == PENDING)]
    require(sorted(due.tolist()) == waits.tolist(), "the due turns are not those whose parents have finished")
    times = arrivals["arrival_s"][due]
    require(times[(np.arange(1, len(due)) - 1) // 2] <= times[1:], "the due turns are no heap")
