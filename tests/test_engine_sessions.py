"""Sessions in the engine: turns come after their parents, or never."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import Run, request, table
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.engine import Engine, check
from llmsched_gym.engine.records import CANCELLED, FINISHED, PENDING, PHASES, REFUSED
from llmsched_gym.engine.rows import phases_of
from llmsched_gym.workload import shares_of_ids, shares_of_turns


def sessions(*rows, cohort=None, num_past=0, **columns):
    """A table of (arrival of a root, or the index of a parent; think_s; prompt; output)."""
    given = table([request(np.nan if parent else when, prompt, output) for parent, when, _, prompt, output in rows])
    parent = np.array([when if is_turn else -1 for is_turn, when, _, _, _ in rows], np.int32)
    think_s = np.array([think for _, _, think, _, _ in rows], np.float64)
    prompt, output = given.prompt_tokens, given.output_tokens
    new = prompt - np.where(parent >= 0, (prompt + output)[parent], 0)
    shares = shares_of_turns(parent, new, prompt, output)
    start, stop = cohort or (num_past, len(rows))
    return replace(
        given,
        parent=parent,
        think_s=think_s,
        new_tokens=new.astype(np.int32),
        shares_with=shares[0],
        shared_tokens=shares[1],
        cohort_start=start,
        cohort_stop=stop,
        num_past=num_past,
        **columns,
    )


def root(when, prompt, output):
    return False, when, 0.0, prompt, output


def turn(parent, think_s, prompt, output):
    return True, parent, think_s, prompt, output


def test_a_turn_comes_after_its_parent_and_its_think_time():
    found = Run("vllm-v1", sessions(root(0.0, 40, 10), turn(0, 5.0, 60, 3), turn(1, 0.0, 70, 2)))
    found.drain()
    rows = found.requests
    assert (rows["phase"][:3] == FINISHED).all()
    assert rows["arrival_s"][1] == rows["resolved_s"][0] + 5.0
    assert rows["arrival_s"][2] == rows["resolved_s"][1]
    assert found.episode.num_arrived == 3
    assert found.engine.is_over()


def test_turns_of_several_sessions_come_in_the_order_of_their_times():
    found = Run(
        "vllm-v1",
        sessions(root(0.0, 40, 2), turn(0, 3.0, 60, 1), turn(0, 1.0, 60, 1), root(2.0, 40, 1), turn(3, 0.5, 60, 1)),
    )
    found.drain()
    came = found.requests["arrival_s"][:5]
    assert came[0] < came[2] < came[3] < came[4] < came[1]


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_a_turn_finds_what_its_session_has_computed(prefix_caching):
    given = sessions(root(0.0, 40, 10), turn(0, 5.0, 60, 3))
    found = Run("vllm-v1", given, prefix_caching=prefix_caching, num_kv_blocks=40)
    found.drain()
    # of 40 + 10 tokens the last has no KV: three blocks of 16 are full
    assert found.requests["num_cached_tokens"][:2].tolist() == [0, 48 if prefix_caching else 0]


def test_descendants_of_a_rejected_request_never_come():
    rows = (root(0.0, 40, 10), turn(0, 1.0, 9000, 1), turn(1, 1.0, 9010, 1), turn(0, 1.0, 60, 1), root(1.0, 16, 1))
    found = Run("vllm-v1", sessions(*rows))
    found.drain()
    phases = [PHASES[p] for p in phases_of(found.engine.state, 0, 5)]
    assert phases == ["finished", "rejected", "cancelled", "finished", "finished"]
    assert (found.episode.num_arrived, found.engine.state.worlds[0].num_cancelled) == (4, 1)
    assert found.engine.is_over()
    with pytest.raises(IndexError, match="request 2 has not arrived"):
        found.engine.view().can_make_ttft(2)


def test_descendants_of_somebody_who_left_never_come():
    rows = (root(0.0, 4000, 500), root(0.0, 4000, 10), turn(1, 0.0, 4020, 5), turn(2, 0.0, 4030, 5))
    given = replace(sessions(*rows), ttft_slo_s=np.array([np.inf, 0.1, np.inf, np.inf]))
    found = Run("vllm-v1", given, patience_s=0.05, max_num_seqs=1)
    found.drain()
    assert phases_of(found.engine.state, 0, 4)[2:].tolist() == [CANCELLED, CANCELLED]
    assert found.requests["phase"][2:4].tolist() == [PENDING, PENDING]  # as schedulers see them
    assert found.engine.is_over()


def test_what_is_past_is_cached_and_never_comes():
    past = replace(sessions(root(-3.0, 40, 10), root(1.0, 60, 3), num_past=1))
    past = replace(past, shares_with=np.array([-1, 0], np.int32), shared_tokens=np.array([0, 50], np.int32))
    found = Run("vllm-v1", past, prefix_caching=True, num_kv_blocks=40)
    assert found.episode.num_arrived == 0
    found.drain()
    assert found.requests["num_cached_tokens"][:2].tolist() == [0, 48]
    assert found.episode.num_arrived == 1
    assert found.engine.is_over()


def test_of_too_much_past_the_last_stays():
    rows = [root(-3.0 + k, 16 * 4, 1) for k in range(3)] + [root(float(k), 16 * 4 + 1, 1) for k in range(3)]
    past = sessions(*rows, num_past=3)
    shares = np.array([-1, -1, -1, 0, 1, 2], np.int32), np.array([0, 0, 0, 64, 64, 64], np.int32)
    past = replace(past, shares_with=shares[0], shared_tokens=shares[1])
    found = Run("vllm-v1", past, prefix_caching=True, num_kv_blocks=9)
    found.drain()
    # 9 places: the last two contexts and a block of the first, whose last blocks went first
    assert found.requests["num_cached_tokens"][3] == 16


@pytest.mark.parametrize(
    ("parent", "message"),
    [
        ([-1, 7], "has parent 7, which does not exist"),
        ([-1, 2, 1], "request 1 is an ancestor of its own"),
        ([-1, 2, -1], "request 1 comes before its parent, request 2"),
        ([-1, -1, 0], "expected a session's requests side by side, got request 2 with its parent, request 0"),
        ([-2], "expected a request or -1 for request 0, got -2"),
    ],
)
def test_parents_that_make_no_sessions(parent, message):
    rows = table([request(0.0, 16, 1)] * len(parent))
    with pytest.raises(ConfigError, match=f"^parent: .*{message}"):
        replace(rows, parent=np.array(parent, np.int32), think_s=np.zeros(len(parent)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cohort_start": 1}, "cohort_start: expected whole sessions, got 1, whose parent is request 0"),
        ({"cohort_stop": 1}, "cohort_stop: expected whole sessions, got 1, whose parent is request 0"),
        ({"cohort_start": 3}, "cohort: expected requests within 0 to 3, got 3 to 2"),
        ({"num_past": -1}, "num_past: expected 0 to 3, got -1"),
        ({"num_past": 2}, "num_past: expected requests without a parent, got request 1 among them"),
        ({"num_past": 1}, "arrival_s: expected a time before 0, as it is past for request 0, got 1"),
        (
            {"arrival_s": np.array([np.nan, np.nan, 2.0])},
            "arrival_s: expected seconds from 0 on for request 0, got nan",
        ),
        ({"arrival_s": np.array([3.0, np.nan, 2.0])}, "arrival_s: expected seconds from 3 on for request 2, got 2"),
        (
            {"arrival_s": np.array([3.0, np.nan, np.inf])},
            "arrival_s: expected seconds from 3 on for request 2, got inf",
        ),
        (
            {"shares_with": np.array([-1, 0, 1]), "shared_tokens": np.array([0, 17, 18])},
            "shares_with: expected a request without a parent or an ancestor of request 2, got 1, which may come later",
        ),
    ],
)
def test_sessions_that_cannot_be(change, message):
    given = sessions(root(1.0, 16, 1), turn(0, 1.0, 20, 1), root(2.0, 20, 1), cohort=(0, 2))
    with pytest.raises(ConfigError, match=f"^{message}"):
        replace(given, **change)


def test_two_siblings_that_fail_cancel_what_is_below_them_once():
    failing = [turn(0, 1.0, 9000, 1), turn(0, 1.0, 9000, 1)]
    below = [turn(1, 0.0, 9010, 1), turn(3, 0.0, 9020, 1), turn(2, 0.0, 9010, 1)]
    found = Run("vllm-v1", sessions(root(0.0, 40, 10), *failing, *below, root(50.0, 40, 10)))
    found.drain()
    assert found.engine.state.worlds[0].num_cancelled == 3
    assert found.requests["phase"][6] == FINISHED


def test_the_checker_looks_at_the_requests_that_there_are():
    given = table([request(0.0, 16, 1), request(0.0, 16, 1)])
    engine = Engine(scenario("paper", prefix_caching=True), 6)
    engine.reset(given)
    check(engine.state)


def test_a_time_to_think_is_finite():
    rows = table([request(0.0, 16, 1), request(0.0, 16, 1)])
    with pytest.raises(ConfigError, match=r"^think_s: expected finite seconds >= 0 for request 1, got nan"):
        replace(rows, parent=np.array([-1, 0], np.int32), think_s=np.array([0.0, np.nan]))


@st.composite
def forests(draw):
    """Sessions of up to six requests, some too long, with parents anywhere before them in their session."""
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        first = len(rows)
        context = [draw(st.integers(1, 300)), draw(st.integers(1, 12))]
        rows.append(root(draw(st.floats(0.0, 3.0)), *context))
        for _ in range(draw(st.integers(0, 5))):
            parent = draw(st.integers(first, len(rows) - 1))
            known = rows[parent][3] + rows[parent][4]
            new = draw(st.sampled_from([0, 1, 40, 9000]))
            rows.append(turn(parent, draw(st.sampled_from([0.0, 0.01, 2.0])), known + new, draw(st.integers(1, 12))))
    times = sorted(row[1] for row in rows if not row[0])
    return [row if row[0] else root(times.pop(0), *row[3:]) for row in rows]


@given(
    forests(),
    st.sampled_from(["vllm-v1", "slai", "on-time", "random", "sglang", "sglang[order=hrrn]", "trtllm"]),
    st.booleans(),
    st.sampled_from([0.2, np.inf]),
)
@settings(max_examples=60, deadline=None)
def test_everybody_is_served_or_accounted_for(rows, policy, prefix_caching, patience_s):
    given = sessions(*rows)
    found = Run(policy, given, prefix_caching=prefix_caching, patience_s=patience_s, num_kv_blocks=700)
    found.drain()  # under the checker
    check(found.engine.state)
    phase = found.requests["phase"][: len(rows)]
    assert (phase != REFUSED).all()
    assert found.episode.num_arrived + found.engine.state.worlds[0].num_cancelled == len(rows)
    assert found.engine.is_over()


@given(st.integers(1, 200), st.integers(1, 60), st.integers(1, 90), st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_the_hit_rate_of_one_session_in_closed_form(first, output, new, num_turns):
    """Of a turn's prompt all full blocks are cached that its parent's prompt and output but the last token fill."""
    prompts = [first + k * (output + new) for k in range(num_turns)]
    rows = [root(0.0, first, output)] + [turn(k, 1.0, prompts[k + 1], output) for k in range(num_turns - 1)]
    found = Run("vllm-v1", sessions(*rows), prefix_caching=True, num_kv_blocks=1000)
    found.drain()
    expected = [0] + [16 * ((prompt + output - 1) // 16) for prompt in prompts[:-1]]
    assert found.requests["num_cached_tokens"][:num_turns].tolist() == expected


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_hit_rate_of_a_tree_of_forks_in_closed_form(depth):
    """Three forks of each node, every edge two blocks: each edge is computed once."""
    words, fresh = [""], iter(range(33, 10_000))
    leaves = [""]
    for _ in range(depth):
        leaves = [word + 2 * chr(next(fresh)) for word in leaves for _ in range(3)]
        words += leaves
    prompts = words[1:]
    ids = [[ord(letter) for letter in word] for word in prompts]
    tokens = np.array([16 * len(word) for word in prompts], np.int32)
    given = table([request(10.0 * i, int(n), 1) for i, n in enumerate(tokens)])
    shares = shares_of_ids(ids, tokens, 16)
    found = Run("vllm-v1", replace(given, shares_with=shares[0], shared_tokens=shares[1]), prefix_caching=True)
    found.drain()
    cached = found.requests["num_cached_tokens"][: len(prompts)]
    assert (cached == tokens - 32).all()  # a prompt finds its parent, whole
    assert 1 - cached.sum() / tokens.sum() == pytest.approx(32 * len(prompts) / tokens.sum())
