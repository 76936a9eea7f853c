"""The rules of the engine that are about links (:mod:`llmsched_gym.engine.invariants`): the index and the blocks.

Columns are read element by element with ``item``, which is ten times as fast as a record's attribute.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from llmsched_gym.engine.blocks import (
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
from llmsched_gym.engine.due import open_waits
from llmsched_gym.engine.queue import rank
from llmsched_gym.engine.records import NONE, RUNNING
from llmsched_gym.engine.state import State

Require = Callable[..., None]  # (condition, rule, *values of the rule): raises unless the condition holds everywhere


class _Shared(NamedTuple):
    """What `owner_of` asks of a PREFIX record."""

    shares_with: int
    shared_tokens: int


def check_places(state: State, env: int, k: int, sim: Any, executing: bool, require: Require) -> None:
    """The places of lane `k`'s blocks: who holds them, the line of free ones, what can be found."""
    requests, prefixes, places = state.requests[env], state.prefixes[env], state.blocks[k]
    total, bits = sim.total_blocks, sim.block_bits
    owner, position_of = places[:total, OWNER], places[:total, POSITION]
    after, before, same, last_of = (places[:, column] for column in (NEXT, PREVIOUS, SAME, LAST))
    running = state.running[k][: sim.num_running]
    own_rows, num_blocks = prefixes["row"][running].tolist(), requests["num_blocks"][running].tolist()
    held = [listed(sim, places, row, np.arange(n)) for row, n in zip(own_rows, num_blocks, strict=True)]
    users = np.bincount(np.concatenate([np.zeros(0, np.int32), *held]), minlength=total)
    require(users == np.maximum(places[:total, USERS], 0), "users of a block != its holders")
    require(len(set(own_rows)) == len(own_rows), "two requests have one row of blocks")
    count = int(state.worlds["num_requests"][env])
    rows = prefixes["row"][:count][requests["phase"][:count] != RUNNING]
    require(rows == NONE, "a request that does not run has a row of blocks")

    line: list[int] = []
    b = after.item(total)
    while b != total and len(line) <= total:
        require(before.item(after.item(b)) == b, "the line of free blocks is torn")
        line.append(b)
        b = after.item(b)
    require(len(line) == sim.free_blocks and len(set(line)) == len(line), "free blocks != those in their line")
    in_line = np.zeros(total, bool)
    in_line[line] = True
    require(in_line == (users == 0), "blocks used + cached + free != total")

    shared = list(map(_Shared, prefixes["shares_with"].tolist(), prefixes["shared_tokens"].tolist()))
    computed = requests["num_computed_tokens"][running] + requests["num_scheduled_tokens"][running] * executing
    for r, full, own in zip(running.tolist(), (computed >> bits).tolist(), held, strict=True):
        names = [(owner_of(shared, r, i, bits), i) for i in range(full)]
        found = list(zip(owner[own[:full]].tolist(), position_of[own[:full]].tolist(), strict=True))
        require(found == names, "a full block does not have the identity of its tokens")
        require(owner[own[full:]] == NONE, "a block that is not full has an identity")

    seen: list[int] = []
    oldest: dict[tuple[int, int], int] = {}
    named = places[: sim.table_mask + 1, NAMED]
    for first in named[named != NONE].tolist():
        identity = owner.item(first), position_of.item(first)
        oldest[identity] = first
        b, last = first, first
        while b != NONE and len(seen) <= total:
            require((owner.item(b), position_of.item(b)) == identity, "equal blocks have two identities")
            require(b == first or last_of.item(b) == NONE, "a block is taken for the oldest of its equals")
            seen.append(b)
            last, b = b, same.item(b)
        require(last_of.item(first) == last, "the newest of equal blocks is not the last")
    require(sorted(seen) == np.flatnonzero(owner != NONE).tolist(), "a cached block cannot be found")

    for r in state.waiting[k][: sim.num_waiting].tolist():
        known = prefixes[r]
        if known["found_version"] != sim.blocks_version or known["found_left"] <= sim.last_evicted:
            continue  # it will be looked up again
        names = [(owner_of(shared, r, i, bits), i) for i in range(int(requests[r]["prefill_tokens"] - 1) >> bits)]
        places_found = [oldest[name] for name in itertools.takewhile(oldest.__contains__, names)]
        if known["found_blocks"] == len(places_found) and known["users_version"] == sim.users_version:
            require(
                known["found_in_use"] == np.sum(users[places_found] > 0), "cached blocks in use were looked up wrongly"
            )
        # where more came to be there, the first of them will be noticed
        require(known["found_blocks"] <= len(places_found), "a block that was evicted is taken for cached")


def check_index(requests: np.ndarray, waiting: np.ndarray, sim: Any, may_lag: bool, require: Require) -> None:
    """The parts of the waiting line and its trees hold whom they are to hold, in order; see `engine.queue`.

    They are put right when a lane's clock is set: until then (`may_lag`) who has just been delivered can be overdue.
    """
    rows, now_s, may_expire = requests[waiting], sim.clock_s, not sim.prefix_caching
    require(rows["place"][1:] > rows["place"][:-1], "places do not grow along the waiting list")
    since_s, slo_s = open_waits(rows)
    gone = may_expire & (rows["num_output_tokens"] == 0) & (slo_s - (now_s - since_s) <= 0.0)
    if may_lag:
        flagged = rows["has_expired"] != 0
        require(flagged <= gone, "a request has expired before its time")
        gone = flagged
    is_open = _are_linked(requests, waiting[~gone], sim.first_open, sim.last_open)
    require(is_open, "open requests: wrong list")
    expired, due_s = waiting[gone], (since_s + slo_s)[gone]
    by_deadline = expired[np.lexsort((expired, due_s))]
    has_expired = _are_linked(requests, by_deadline, sim.first_expired, sim.last_expired)
    require(has_expired, "expired requests: wrong list")
    by_length = expired[np.lexsort((expired, rows["prefill_tokens"][gone]))]
    is_strict = requests["slo_class"][by_length] == 0
    for root, members in ((sim.expired_strict, is_strict), (sim.expired_others, ~is_strict)):
        require(_in_order(requests, root) == by_length[members].tolist(), "expired requests: wrong tree")


def _are_linked(requests: np.ndarray, members: np.ndarray, first: int, last: int) -> bool:
    """Whether `members` int32 (n,) are linked both ways in that order, and begin and end where the replica says."""
    line = np.concatenate(([NONE], members, [NONE]))
    ends = (first, last) == (line[1], line[-2])
    links = requests["earlier"][members] == line[:-2], requests["later"][members] == line[2:]
    return ends and all(link.all() for link in links)


def _in_order(requests: np.ndarray, root: int) -> list[int] | None:
    """The requests of a tree from the shortest to the longest; None if a child outranks its parent or comes twice."""
    shorter, longer = requests["shorter"], requests["longer"]
    found: list[int] = []
    path: list[tuple[int, int]] = []  # requests whose shorter side is being walked, with their ranks
    r, above = root, math.inf
    while (path or r != NONE) and len(found) + len(path) <= len(requests):
        if r != NONE:
            own = rank(r)
            if own > above:
                return None
            path.append((r, own))
            r, above = shorter.item(r), own
        else:
            r, above = path.pop()
            found.append(r)
            r = longer.item(r)
    return found if not path and r == NONE else None
