"""The checker of the engine's rules: each that `test_engine_rules.DAMAGE` leaves out, broken alone, by its name."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from helpers import Run, Scripted, request
from test_engine_async import lagging
from test_engine_prefix import run as sharing
from test_engine_sessions import root, sessions, turn

from llmsched_gym.engine import InvariantError, check
from llmsched_gym.engine.blocks import LAST, NAMED, NEXT, OWNER, POSITION, PREVIOUS, SAME, USERS, listed
from llmsched_gym.engine.invariants import Afoot, check_lanes
from llmsched_gym.engine.records import NONE


class Parts(NamedTuple):
    """Arrays of a state's only environment, to be damaged."""

    sim: np.record
    world: np.record
    requests: np.ndarray
    arrivals: np.ndarray
    outputs: np.ndarray
    due: np.ndarray
    waiting: np.ndarray
    running: np.ndarray
    prefixes: np.ndarray
    blocks: np.ndarray
    flight: np.record
    flying: np.ndarray


def parts_of(state):
    names = ("sims", "worlds", "requests", "arrivals", "output_tokens", "due", "waiting", "running", "prefixes")
    return Parts(*(getattr(state, name)[0] for name in (*names, "blocks", "flights", "flying")))


def plain():
    """0 decodes with 20 tokens of KV, 1 is a started prompt, 2 waits, 3 has finished, 4 is still to come."""
    rows = [request(prompt=20, output=5), request(), request(ttft=2.0), request(output=1), request(9.0)]
    found = Run(Scripted({0: 20, 1: 8, 3: 16}), rows, patience_s=5.0)
    found.step()
    return found


def overloaded():
    """0 runs; behind it 1 to 8 have missed their SLO, of both classes, and 9 and 10 can still be in time."""
    late = [request(0.0, 100 + i, 5, 0.1 if i % 4 == 0 else 0.5, 0.1) for i in range(9)]
    found = Run("sarathi", [*late, request(), request()], max_num_seqs=1)
    while found.sim.clock_s < 0.2:
        found.step()
    return found


def in_flight():
    """The tokens of 0 to 2 are in flight, the last ones of 0 and 1; 3 waits."""
    found = lagging("vllm-v1", [request(output=1), request(output=1), request(output=9), request()], max_num_seqs=3)
    found.step()
    return found


def talking():
    """0 runs, with turn 1; 2 has finished, with turn 3 that came and 4 and 5 that are due; 6 failed and with it 7."""
    roots = [root(0.0, 40, 90), turn(0, 0.0, 140, 1), root(0.0, 40, 1), turn(2, 0.0, 60, 90), turn(2, 5.0, 60, 1)]
    found = Run("vllm-v1", sessions(*roots, turn(2, 6.0, 60, 1), root(0.0, 9000, 1), turn(6, 0.0, 9010, 1)))
    found.steps(3)
    return found


def cached():
    """0 and 1 share three blocks and have equal fourth ones, 2 runs with a block that is not full, 3 is to come."""
    found = sharing("vllm-v1", (0, "abcd", 64, 9), (0, "abcd", 64, 9), (0, "xyz", 40, 9), (9, "a", 16, 1))
    found.step()
    return found


def looked_up():
    """0 runs with five of nine blocks; 1 waits for memory, and has found the two that it shares."""
    found = sharing("vllm-v1", (0, "abcde", 80, 9), (0, "abuvwxyz", 128, 1), num_kv_blocks=9)
    found.steps(2)
    return found


def names(p):
    """Blocks that the table of identities names."""
    named = p.blocks[: p.sim.table_mask + 1, NAMED]
    return named[named != NONE]


def block(p, r, position):
    return int(listed(p.sim, p.blocks, p.prefixes[r].row, position))


def give_the_row_of_another(p):
    for position in range(4):
        p.blocks[block(p, 1, position), USERS] -= 1
        p.blocks[block(p, 0, position), USERS] += 1
    p.prefixes[1].row = p.prefixes[0].row


def put_a_block_in_use_in_line(p):
    end, b = int(p.sim.total_blocks), block(p, 0, 0)
    second = p.blocks[p.blocks[end, NEXT], NEXT]
    p.blocks[b, [NEXT, PREVIOUS]] = second, end
    p.blocks[end, NEXT] = p.blocks[second, PREVIOUS] = b


def rotate(p):
    """The same order by length, but the root's child above it."""
    top = int(p.sim.expired_others)
    side, other = ("shorter", "longer") if p.requests[top].shorter != NONE else ("longer", "shorter")
    child = int(p.requests[top][side])
    p.requests[top][side], p.requests[child][other] = p.requests[child][other], top
    p.sim.expired_others = child


def put(array, index, value):
    array[index] = value


def puts(array, *names_and_values):
    """Set field after field of a record."""
    for name, value in zip(names_and_values[::2], names_and_values[1::2], strict=True):
        array[name] = value


def swap(array, i, j):
    array[[i, j]] = array[[j, i]]


def first_alone(p):
    """A block that can be found and has no equal."""
    return next(int(b) for b in names(p) if p.blocks[b, SAME] == NONE)


def first_of_two(p):
    return next(int(b) for b in names(p) if p.blocks[b, SAME] != NONE)


class Case(NamedTuple):
    rule: str
    world: Callable
    damage: Callable
    afoot: dict | None = None  # what of Afoot is not as between two steps


BROKEN = [
    Case("cancelled count differs from the phases", plain, lambda p: puts(p.world, "num_cancelled", 1)),
    Case("an arrived request is pending", plain, lambda p: puts(p.world, "next_arrival", 5)),
    Case(
        "a request came before its arrival",
        plain,
        lambda p: (puts(p.arrivals[0], "arrival_s", 1.0), puts(p.requests[0], "arrival_s", 1.0)),
    ),
    Case(
        "who is held at the router does not wait",
        plain,
        lambda p: puts(p.sim, "num_waiting", 0),
        {"held": [3]},
    ),
    Case(
        "who is in transfer does not run",
        plain,
        lambda p: puts(p.sim, "num_running", 1),
        {"moving": [(3, 0, NONE, 0)]},
    ),
    Case(
        "a request in transfer has not computed its prompt",
        plain,
        lambda p: puts(p.sim, "num_running", 1),
        {"moving": [(1, 0, NONE, 0)]},
    ),
    Case("a request holds a negative number of blocks", plain, lambda p: puts(p.requests[2], "num_blocks", -1)),
    Case("a request emitted more than its output", plain, lambda p: put(p.outputs, 0, 0)),
    Case("a finished request lacks tokens", plain, lambda p: put(p.outputs, 3, 2)),
    Case("a complete request still runs", plain, lambda p: put(p.outputs, 0, 1)),
    Case(
        "a request out of service emitted tokens",
        plain,
        lambda p: (puts(p.requests[4], "num_output_tokens", 1), puts(p.sim, "tokens_emitted", 3)),
    ),
    Case("a request was resolved later than now", plain, lambda p: puts(p.requests[3], "resolved_s", 9.0)),
    Case("a replica is ahead of the time", plain, lambda p: None, {"now_s": 0.0}),
    Case("waiting list and phases differ", plain, lambda p: put(p.waiting, 0, 4)),
    Case("running list and phases differ", plain, lambda p: put(p.running, 1, 3)),
    Case(
        "tokens of the batch under way != sum over items",
        plain,
        lambda p: None,
        {"executing": np.ones(1, bool)},
    ),
    Case(
        "free blocks out of range",
        plain,
        lambda p: puts(p.sim, "total_blocks", p.sim.total_blocks - p.sim.free_blocks - 1, "free_blocks", -1),
    ),
    Case(
        "a request ends with a batch in flight, and none is",
        plain,
        lambda p: puts(p.sim, "num_running", 1, "num_ending", 1),
    ),
    Case("a batch is in flight between steps", plain, lambda p: puts(p.sim, "in_flight", 1)),
    Case("places do not grow along the waiting list", overloaded, lambda p: swap(p.waiting, 0, 1)),
    Case(
        "a request has expired before its time",
        overloaded,
        lambda p: puts(p.requests[10], "has_expired", 1),
        {"behind": np.ones(1, bool)},
    ),
    Case("open requests: wrong list", overloaded, lambda p: puts(p.sim, "first_open", 10)),
    Case("open requests: wrong list", overloaded, lambda p: puts(p.requests[10], "earlier", NONE)),
    Case("expired requests: wrong list", overloaded, lambda p: puts(p.sim, "last_expired", 1)),
    Case("expired requests: wrong list", overloaded, lambda p: puts(p.requests[4], "later", NONE)),
    Case("expired requests: wrong tree", overloaded, lambda p: puts(p.sim, "expired_strict", NONE)),
    Case("expired requests: wrong tree", overloaded, lambda p: puts(p.sim, "expired_others", p.sim.expired_strict)),
    Case("expired requests: wrong tree", overloaded, rotate),
    Case("a token that is in flight counts as emitted", in_flight, lambda p: puts(p.flight, "is_foreseen", 1)),
    Case("an empty batch is in flight", in_flight, lambda p: puts(p.flight, "num_tokens", 0)),
    Case("an empty batch is in flight", in_flight, lambda p: puts(p.flight, "duration_s", np.nan)),
    Case("a request is in flight twice", in_flight, lambda p: puts(p.flying[1], "request", 0)),
    Case("a request in flight does not run", in_flight, lambda p: puts(p.flying[1], "request", 3)),
    Case(
        "a request in flight emits if and only if its prompt is complete",
        in_flight,
        lambda p: puts(p.flying[1], "emits", 0),
    ),
    Case(
        "hidden requests are not those that end with the batch in flight",
        in_flight,
        lambda p: puts(p.requests[0], "max_output_tokens", 2),
    ),
    Case("hidden requests are out of order", in_flight, lambda p: swap(p.running, 1, 2)),
    Case("a turn came before its parent had finished", talking, lambda p: puts(p.arrivals[3], "parent", 0)),
    Case(
        "a turn is cancelled if and only if its parent will not finish",
        talking,
        lambda p: puts(p.arrivals[7], "parent", 2),
    ),
    Case("the due turns are not those whose parents have finished", talking, lambda p: put(p.due, 0, 1)),
    Case("the due turns are no heap", talking, lambda p: swap(p.due, 0, 1)),
    Case("users of a block != its holders", cached, lambda p: put(p.blocks, (block(p, 0, 0), USERS), 1)),
    Case("two requests have one row of blocks", cached, give_the_row_of_another),
    Case("a request that does not run has a row of blocks", cached, lambda p: puts(p.prefixes[3], "row", 7)),
    Case(
        "the line of free blocks is torn",
        cached,
        lambda p: put(p.blocks, (p.blocks[p.sim.total_blocks, PREVIOUS], PREVIOUS), 0),
    ),
    Case("free blocks != those in their line", cached, lambda p: puts(p.sim, "free_blocks", p.sim.free_blocks - 1)),
    Case("blocks used + cached + free != total", cached, put_a_block_in_use_in_line),
    Case(
        "a full block does not have the identity of its tokens",
        cached,
        lambda p: put(p.blocks, (block(p, 2, 1), POSITION), 0),
    ),
    Case("a block that is not full has an identity", cached, lambda p: put(p.blocks, (block(p, 2, 2), OWNER), 2)),
    Case("equal blocks have two identities", cached, lambda p: put(p.blocks, (first_alone(p), SAME), first_of_two(p))),
    Case(
        "a block is taken for the oldest of its equals",
        cached,
        lambda p: put(p.blocks, (p.blocks[first_of_two(p), SAME], LAST), 0),
    ),
    Case("the newest of equal blocks is not the last", cached, lambda p: put(p.blocks, (first_of_two(p), LAST), 0)),
    Case(
        "a cached block cannot be found",
        cached,
        lambda p: put(p.blocks[:, NAMED], p.blocks[:, NAMED] == first_alone(p), NONE),
    ),
    Case("cached blocks in use were looked up wrongly", looked_up, lambda p: puts(p.prefixes[1], "found_in_use", 1)),
    Case("a block that was evicted is taken for cached", looked_up, lambda p: puts(p.prefixes[1], "found_blocks", 3)),
]


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.rule)
def test_the_checker_names_the_rule_that_is_broken(case):
    found = case.world()
    state = found.engine.state
    assert check(state) == found.clock_s
    case.damage(parts_of(state))
    rest = Afoot(found.clock_s, np.zeros(1, bool), np.zeros(1, bool), [], [], 0, False)
    afoot = rest._replace(**(case.afoot or {}))
    with pytest.raises(InvariantError) as error:
        check_lanes(state, 0, -np.inf, afoot)
    assert str(error.value) == f"env 0 at {afoot.now_s:.6f} s: {case.rule}"


@pytest.mark.parametrize("world", [plain, overloaded])
def test_a_tree_with_a_loop_is_wrong(world):
    """Of nobody, and of those who are overdue."""
    found = world()
    p = parts_of(found.engine.state)
    p.sim.expired_others = top = max(p.sim.expired_others, 0)
    p.requests[top].shorter = top
    with pytest.raises(InvariantError, match="expired requests: wrong tree"):
        check(found.engine.state)
