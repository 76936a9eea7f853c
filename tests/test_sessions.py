"""Workloads of sessions: their tables keep the contract of sessions, and nothing but seed and setting moves them."""

import json
import math

import numpy as np
import pytest

from llmsched_gym.config import ConfigError, Scenario, scenario
from llmsched_gym.workload import make_table, shares_of_turns
from llmsched_gym.workload.lengths import DATA_DIR, load_lengths
from llmsched_gym.workload.mixture import load_sessions
from llmsched_gym.workload.session_statistics import session_statistics, workload_statistics
from llmsched_gym.workload.sessions import SessionStream

LIMITS = {"chat": 8192, "agents": 32_768, "mixed": 32_768}
WORKLOADS = sorted(LIMITS)
TURN_COLUMNS = ("prompt_tokens", "output_tokens", "new_tokens", "think_s", "max_output_tokens", "ttft_slo_s")


def finite(workload, **fields):
    given = {"workload": workload, "max_model_len": LIMITS[workload], "qps": 0.5, "num_requests": 400, **fields}
    return scenario("paper", **given)


def continuing(workload, **fields):
    return Scenario(**{"workload": workload, "max_model_len": LIMITS[workload], "qps": 0.5, "horizon_s": 900, **fields})


def roots_of(table):
    return np.flatnonzero(table.parent < 0)


def turns_of(table):
    return np.diff(np.append(roots_of(table), len(table)))


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("make", [finite, continuing])
def test_a_turn_continues_the_turn_before_it(workload, make):
    table = make_table(make(workload), 3)
    turn = table.parent >= 0
    assert turn.sum() > 100
    at = np.flatnonzero(turn)
    np.testing.assert_array_equal(table.parent[at], at - 1)
    before = at - 1
    context = table.prompt_tokens[before] + table.output_tokens[before]
    np.testing.assert_array_equal(table.prompt_tokens[at], context + table.new_tokens[at])
    np.testing.assert_array_equal(table.shares_with[at], before)
    np.testing.assert_array_equal(table.shared_tokens[at], context)
    assert np.isnan(table.arrival_s[turn]).all() and (np.diff(table.arrival_s[~turn]) >= 0.0).all()
    assert (table.think_s[~turn] == 0.0).all() and (table.think_s[turn] > 0.0).all()
    for name in ("session_id", "slo_class", "tbt_slo_s", "prefix_id"):
        column = getattr(table, name)
        np.testing.assert_array_equal(column[at], column[before], err_msg=name)
    ids = table.session_id[table.num_past :][~turn[table.num_past :]]
    assert len(np.unique(ids)) == len(ids)


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("limit", [6200, 8192, 32_768])
def test_every_turn_fits_the_model_and_a_session_ends_before_one_that_does_not(workload, limit):
    table = make_table(finite(workload, max_model_len=limit, num_requests=3000), 0)
    total = table.prompt_tokens + table.output_tokens
    assert total.max() <= limit and total.max() > 0.95 * min(limit, 20_000)
    assert table.prompt_tokens.min() >= 1 and table.output_tokens.min() >= 1 and table.new_tokens.min() >= 1
    assert (table.output_tokens <= table.max_output_tokens).all()
    assert (table.prompt_tokens + table.max_output_tokens <= limit).all()
    endless = make_table(finite(workload, max_model_len=10**6, num_requests=3000), 0)
    cut = min(len(roots_of(table)), len(roots_of(endless)))
    assert (turns_of(table)[:cut] <= turns_of(endless)[:cut]).all()


def test_roots_share_a_system_prompt_with_the_first_that_has_it():
    table = make_table(finite("agents", num_requests=2000), 1)
    roots, lengths = roots_of(table), load_sessions("agents").system_tokens
    np.testing.assert_array_equal(table.prefix_tokens, lengths[table.prefix_id])
    np.testing.assert_array_equal(table.prompt_tokens[roots], (table.prefix_tokens + table.new_tokens)[roots])
    for which in range(len(lengths)):
        same = roots[table.prefix_id[roots] == which]
        assert len(same) > 3
        assert table.shares_with[same[0]] == -1 and table.shared_tokens[same[0]] == 0
        assert (table.shares_with[same[1:]] == same[0]).all() and (
            table.shared_tokens[same[1:]] == lengths[which]
        ).all()
    plain = make_table(finite("chat", num_requests=2000), 1)
    none = (plain.prefix_id == -1) & (plain.parent < 0)
    assert 0.05 < none[roots_of(plain)].mean() < 0.15
    assert (plain.shares_with[none] == -1).all() and (plain.prefix_tokens[none] == 0).all()


def test_shares_are_those_of_the_turns():
    table = make_table(finite("agents"), 0)
    columns = (table.parent, table.new_tokens, table.prompt_tokens, table.output_tokens)
    for mine, theirs in zip(
        table.identity(), shares_of_turns(*columns, table.prefix_id, table.prefix_tokens), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_ttft_slo_counts_new_tokens(workload):
    table = make_table(finite(workload, ttft_slo_s=2.0, ttft_slo_per_token_s=0.01), 0)
    np.testing.assert_allclose(table.ttft_slo_s, 2.0 + 0.01 * table.new_tokens)
    scaled = make_table(finite(workload, ttft_slo_s=2.0, ttft_slo_per_token_s=0.01, ttft_class_scales=(1, 3)), 0)
    scale = scaled.ttft_slo_s / table.ttft_slo_s
    assert set(np.round(scale, 9)) == {1.0, 3.0}
    at = np.flatnonzero(scaled.parent >= 0)
    np.testing.assert_allclose(scale[at], scale[at - 1])


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("arrivals", ["poisson", "gamma", "mmpp", "switching"])
def test_a_longer_run_and_another_load_have_the_same_sessions(workload, arrivals):
    fields = {"arrivals": arrivals, "length_hint": "noisy:0.4", "ttft_class_scales": (0.5, 2.0)}
    short = make_table(finite(workload, num_requests=50, **fields), 2)
    for other in ({"num_requests": 700}, {"qps": 2.0}, {"arrivals_continue": True, "drain_s": 100.0}):
        table = make_table(finite(workload, **{"num_requests": 50, **fields, **other}), 2)
        n = len(short)
        assert len(table) >= n
        for name in (*TURN_COLUMNS, "slo_class", "length_hint", "session_id", "parent", "shares_with", "shared_tokens"):
            np.testing.assert_array_equal(getattr(table, name)[:n], getattr(short, name)[:n], err_msg=name)
        if "qps" not in other:
            np.testing.assert_array_equal(table.arrival_s[:n], short.arrival_s)
        elif arrivals in ("poisson", "gamma"):
            np.testing.assert_allclose(4.0 * table.arrival_s[:n], short.arrival_s)


def test_a_stream_drawn_in_parts_is_one_drawn_at_once():
    model = load_sessions("chat")
    whole, parts = (SessionStream(model, np.random.default_rng(4), 8192) for _ in range(2))
    parts.first(3), parts.first(10)
    for a, b in zip(vars(whole.first(70)).values(), vars(parts.first(70)).values(), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(whole.first(5).think_s, parts.first(5).think_s)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_cohort_is_whole_sessions_of_the_measured_window(workload):
    table = make_table(finite(workload, num_requests=60, warmup_s=80.0, drain_s=50.0, arrivals_continue=True), 0)
    start, stop = table.cohort_start, table.cohort_stop
    assert table.parent[start] == -1 and table.parent[stop] == -1
    roots = roots_of(table)
    assert table.arrival_s[roots[roots < start]].max() < 80.0 <= table.arrival_s[start]
    last = roots[roots < stop][-1]
    assert last - start < 60 <= stop - start  # without its last session it would be too few
    assert table.arrival_s[roots[-1]] <= table.arrival_s[last] + 50.0
    assert table.qps == 0.5 and table.num_past == 0
    alone = make_table(finite(workload, num_requests=60, warmup_s=80.0), 0)
    assert len(alone) == alone.cohort_stop == stop


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_continuing_run_begins_in_mid_life(workload):
    table = make_table(continuing(workload), 5)
    past = table.num_past
    assert past > 20
    assert (table.cohort_start, table.cohort_stop) == (past, len(table))
    assert (table.arrival_s[:past] < 0.0).all() and (np.diff(table.arrival_s[:past]) >= 0.0).all()
    assert (table.parent[:past] == -1).all()
    roots = roots_of(table)[past:]
    assert table.arrival_s[roots[0]] >= 0.0
    goes_on = roots[table.session_id[roots] < past]
    # every past has one who goes on with it, whole context and all
    np.testing.assert_array_equal(np.sort(table.shares_with[goes_on]), np.arange(past))
    over = table.shares_with[goes_on]
    np.testing.assert_array_equal(table.session_id[goes_on], over)
    context = table.prompt_tokens[over] + table.output_tokens[over]
    np.testing.assert_array_equal(table.shared_tokens[goes_on], context)
    np.testing.assert_array_equal(table.prompt_tokens[goes_on], context + table.new_tokens[goes_on])
    np.testing.assert_allclose(table.ttft_slo_s[goes_on], 0.5 + 0.0005 * table.new_tokens[goes_on])
    np.testing.assert_array_equal(table.slo_class[goes_on], table.slo_class[over])
    gap_s = table.arrival_s[goes_on] - table.arrival_s[over]
    think_s = [part.think_s for part in load_sessions(workload).parts]
    assert (gap_s > min(q.low for q in think_s)).all() and gap_s.max() < max(q.high for q in think_s) + 60.0


@pytest.mark.parametrize("workload", WORKLOADS)
def test_mid_life_is_stationary(workload):
    """Turns begin at the same rate early and late, were each served by the nominal timetable; by Little's law the
    sessions under way at time 0 are as many as begin in the time that one lasts."""
    early, late, under_way, lasts_s = [], [], [], []
    for seed in range(30):
        table = make_table(continuing(workload, horizon_s=1800.0), seed)
        lasted = 0.5 * table.ttft_slo_s + 0.5 * 0.1 * (table.output_tokens - 1)
        first = np.maximum.accumulate(np.where(table.parent < 0, np.arange(len(table)), 0))
        since = np.cumsum(table.think_s + lasted) - lasted
        came_s = (table.arrival_s[first] + since - since[first])[table.num_past :]
        early.append(np.count_nonzero(came_s < 300.0))
        late.append(np.count_nonzero((came_s >= 1500.0) & (came_s < 1800.0)))
        roots, turns = roots_of(table), turns_of(table)
        new = (table.session_id[roots] >= table.num_past) & (roots >= table.num_past)
        last = (roots + turns - 1)[new]
        lasts_s += (since[last] - since[roots[new]]).tolist()  # to the arrival of the last turn
        under_way.append(table.num_past)
    assert np.mean(early) == pytest.approx(np.mean(late), rel=0.1)
    assert np.mean(under_way) == pytest.approx(0.5 * np.mean(lasts_s), rel=0.1)


def test_mid_life_is_the_same_at_every_horizon_and_newcomers_at_every_load():
    short, long = (make_table(continuing("chat", horizon_s=h), 1) for h in (100.0, 400.0))
    assert short.num_past == long.num_past > 0
    n = short.num_past
    for name in ("arrival_s", *TURN_COLUMNS):
        np.testing.assert_array_equal(getattr(short, name)[:n], getattr(long, name)[:n])
    slow, fast = (make_table(continuing("chat", qps=qps), 1) for qps in (0.5, 1.0))
    new = [t.new_tokens[(t.session_id >= t.num_past) & (t.arrival_s >= 0.0)] for t in (slow, fast)]
    assert len(new[0]) > 100
    np.testing.assert_array_equal(new[0], new[1][: len(new[0])])


@pytest.mark.parametrize("workload", ["agents", "chat"])
def test_figures_of_the_shipped_workloads(workload):
    """On file they are what the command prints, and what the workloads promise."""
    shipped = json.loads((DATA_DIR / f"{workload}.json").read_text())
    assert workload_statistics(workload, LIMITS[workload]) == shipped["statistics"]
    fields = {"turns", "first_tokens", "new_tokens", "output_tokens", "think_s", "system_prompts", "max_output_tokens"}
    assert fields <= set(shipped["sources"])
    found = shipped["statistics"]
    if workload == "chat":
        assert found["prompt_tokens"]["mean"] <= 4000 and found["output_tokens"]["mean"] <= 500
        assert 10.0 < found["think_s"]["p50"] < 100.0
        assert found["turns"]["mean"] == pytest.approx(3.51, rel=0.05)  # ShareGPT
        assert found["output_tokens"]["mean"] == pytest.approx(438.7, rel=0.01)  # openchat_sharegpt4
    else:
        assert 0.8 <= found["hit_rate"] <= found["seen_share"] <= 0.95
        table = make_table(finite("agents", num_requests=20_000), 7)
        turns, tools_s = turns_of(table), table.think_s[table.parent >= 0]
        assert turns.min() >= 10 and turns.max() <= 60
        assert tools_s.min() >= 0.1 and tools_s.max() <= 30.0
        assert (table.prompt_tokens + table.output_tokens).max() > 32_000


HAND = {
    "kind": "sessions",
    "name": "hand",
    "source": "by hand",
    "turns": {"median": 2, "sigma": 0, "low": 2, "high": 2},
    "first_tokens": {"probs": [0, 1], "values": [10, 10]},
    "new_tokens": {"median": 5, "sigma": 0, "low": 5, "high": 5},
    "spread": 0,
    "output_tokens": {"median": 7, "sigma": 0, "low": 7, "high": 7},
    "think_s": {"median": 3, "sigma": 0, "low": 3, "high": 3},
    "system_prompts": {"tokens": [40], "shares": [1]},
    "max_output_tokens": 9,
}


def hand(tmp_path, **changes):
    path = tmp_path / f"hand-{len(list(tmp_path.iterdir()))}.json"
    path.write_text(json.dumps({**HAND, **changes}))
    return str(path)


def by_hand(path, **fields):
    return scenario("paper", workload=path, qps=1.0, num_requests=4, **fields)


def test_two_sessions_by_hand(tmp_path):
    table = make_table(by_hand(hand(tmp_path)), 0)
    assert table.prompt_tokens.tolist() == [50, 62, 50, 62]
    assert table.new_tokens.tolist() == [10, 5, 10, 5] and table.think_s.tolist() == [0.0, 3.0, 0.0, 3.0]
    assert table.parent.tolist() == [-1, 0, -1, 2]
    assert table.shares_with.tolist() == [-1, 0, 0, 2] and table.shared_tokens.tolist() == [0, 57, 40, 57]
    figures = session_statistics(table)
    assert (figures["num_requests"], figures["num_sessions"]) == (4, 2)
    assert figures["seen_share"] == pytest.approx(154 / 224, abs=1e-4)
    assert figures["hit_rate"] == pytest.approx((0 + 48 + 32 + 48) / 224, abs=1e-4)
    assert figures["prompt_tokens"]["mean"] == 56.0 and figures["turns"]["p50"] == 2.0
    one = make_table(by_hand(hand(tmp_path), max_model_len=68), 0)  # the second turn would need 69
    assert one.prompt_tokens.tolist() == [50] * 4 and one.max_output_tokens.tolist() == [9] * 4
    tight = make_table(by_hand(hand(tmp_path), max_model_len=69), 0)
    assert tight.max_output_tokens.tolist() == [9, 7, 9, 7]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"turns": {"median": 2}}, "turns: expected numbers in median, sigma, low and high, or in probs and values"),
        ({"turns": {"median": 2, "sigma": 0, "low": 3, "high": 4}}, "turns: expected 1 <= low <= median <= high"),
        ({"think_s": {"probs": [0, 1], "values": [2]}}, "think_s: expected increasing probs from 0 to 1"),
        ({"think_s": {"probs": [0, 1], "values": [-2, 1]}}, "think_s: expected increasing probs from 0 to 1"),
        ({"spread": "x"}, "spread: expected a number, got 'x'"),
        ({"spread": -1}, "spread: expected a number from 0 to 10"),
        ({"system_prompts": [3]}, "system_prompts: expected an object with numbers in tokens"),
        ({"system_prompts": {"tokens": [40], "shares": [1.5]}}, "system_prompts.shares: expected numbers > 0"),
        ({"system_prompts": {"tokens": [40], "shares": []}}, "system_prompts.tokens: expected whole numbers >= 1"),
        ({"max_output_tokens": 3}, "max_output_tokens: expected 7 or more"),
        ({"turns": {"median": 2, "sigma": 1, "low": 1, "high": 1e6}}, "turns: expected at most 10,000"),
    ],
)
def test_damaged_files_of_sessions(tmp_path, changes, message):
    path = hand(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message) as error:
        make_table(by_hand(path), 0)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_what_sessions_cannot_be_used_for(tmp_path):
    path = hand(tmp_path)
    (tmp_path / "less.json").write_text(json.dumps({k: v for k, v in HAND.items() if k != "think_s"}))
    with pytest.raises(ConfigError, match="missing field 'think_s'"):
        make_table(by_hand(str(tmp_path / "less.json")), 0)
    with pytest.raises(ConfigError, match="expected a length distribution, got 'chat', which has sessions"):
        load_lengths("chat")
    with pytest.raises(ConfigError, match="max_model_len: expected 48 or more with workload hand, got 47"):
        make_table(by_hand(path, max_model_len=47), 0)
    assert load_sessions("sharegpt") is None


def test_a_large_table_is_small():
    """Bytes a turn as docs/workloads.md says: 200,000 turns are 17 MB."""
    table = make_table(finite("chat", num_requests=200_000), 0)
    assert len(table) >= 200_000
    size = sum(column.nbytes for column in vars(table).values() if isinstance(column, np.ndarray))
    assert size / len(table) == pytest.approx(85.0, abs=0.5)


def test_an_empty_horizon_has_only_what_was_there_before():
    table = make_table(continuing("chat", qps=0.02, horizon_s=0.001), 0)
    assert table.cohort_stop == len(table) and table.num_past == np.count_nonzero(table.arrival_s < 0.0)
    assert math.isclose(table.qps, 0.02)
