"""Sessions and reuse in trace files: ids of blocks, chains of calls, turns that wait for answers."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import typer
from test_traces import BAILIAN, BURSTGPT, COPILOT, MOONCAKE, SIMULATED, TRACELAB, copilot, tracelab, write
from typer.testing import CliRunner

from llmsched_gym.cli import main
from llmsched_gym.config import ConfigError, Scenario, scenario
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.report.trace_facts import facts
from llmsched_gym.workload import TraceError, TraceWarning, load_trace, make_table
from llmsched_gym.workload.generate import trace_remarks
from llmsched_gym.workload.identity import found_share, shares_of_chains
from llmsched_gym.workload.trace_sessions import main as write_main
from llmsched_gym.workload.trace_sessions import write_sessions

DATA_DIR = os.environ.get("LLMSCHED_DATA_DIR")


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def mooncake(*rows):
    """Rows of (timestamp in ms, prompt, output, ids)."""
    keys = ("timestamp", "input_length", "output_length", "hash_ids")
    return lines(*(dict(zip(keys, row, strict=True)) for row in rows))


def kept(path, n, **fields):
    return make_table(scenario("paper", trace=str(path), qps=None, num_requests=n, **fields), 0)


# Ids of blocks


def test_prompts_share_what_their_ids_share(tmp_path):
    trace = load_trace(write(tmp_path, MOONCAKE))
    assert (trace.block_tokens, trace.parent, trace.think_s) == (512, None, None)
    assert trace.shares[0].tolist() == [-1, 0] and trace.shares[1].tolist() == [0, 512]
    with pytest.warns(TraceWarning, match="1 request continues a chat that began outside the file"):
        trace = load_trace(write(tmp_path, BAILIAN))
    assert (trace.block_tokens, trace.num_outside) == (16, 1)
    # the third block of the first has 8 tokens, and another id than the second's third
    assert trace.shares[0].tolist() == [-1, 0, 0] and trace.shares[1].tolist() == [0, 32, 16]


def test_the_last_block_may_be_shorter(tmp_path):
    text = mooncake((0, 600, 1, [1, 2]), (1, 700, 1, [1, 2]), (2, 650, 1, [1, 2]), (3, 512, 1, [1]), (4, 1, 1, [1]))
    trace = load_trace(write(tmp_path, text))
    assert trace.shares[0].tolist() == [-1, 0, 1, 0, 0] and trace.shares[1].tolist() == [0, 600, 650, 512, 1]
    # found: nothing, 512, 512, none as the last token must be computed, none
    assert found_share(trace.shares[1], trace.prompt_tokens, 512) == pytest.approx(1024 / 2463)


def test_a_file_without_ids_says_nothing_of_reuse(tmp_path):
    text = mooncake((0, 600, 1, [1, 2]), (1, 700, 1, [1, 2])).replace("hash_ids", "ids")
    trace = load_trace(write(tmp_path, text))
    assert trace.shares is None and trace.block_tokens == 0
    found = facts(trace, 8192)
    assert found["hit_rate"] is None and found["block_tokens"] is None
    assert kept(tmp_path / "trace.csv", 2).shares_with is None


@pytest.mark.parametrize(
    "row, message",
    [
        ((5, 1025, 1, [1, 2]), "expected 3 ids for 1025 tokens in blocks of 512, got 2"),
        ((5, 1024, 1, [1, 2, 3]), "expected 2 ids for 1024 tokens in blocks of 512, got 3: blocks of another size"),
        ((5, 512, 1, ["a"]), "expected 1 ids for 512 tokens in blocks of 512, all of them whole numbers"),
        ((5, 512, 1, [1.5]), "all of them whole numbers"),
        ((5, 512, 1, [[1]]), "all of them whole numbers"),
        ((5, 512, 1, [None]), "all of them whole numbers"),
        ((5, 512, 1, None), "got None"),
        ((5, 512, 1, "1"), "got '1'"),
    ],
)
def test_bad_ids(tmp_path, row, message):
    path = write(tmp_path, mooncake((0, 600, 1, [1, 2]), row))
    with pytest.raises(TraceError) as error:
        load_trace(path)
    assert str(error.value).startswith(f"{path}: line 2, column 'hash_ids': ") and message in str(error.value)
    assert "\n" not in str(error.value)
    assert load_trace(path, "drop").num_dropped == 1


def chat(turn, parent, at):
    return {"chat_id": turn, "parent_chat_id": parent, "timestamp": at, "input_length": 3, "output_length": 1}


@pytest.mark.parametrize(
    "rows, message",
    [
        ([chat(1, 1, 0)], "line 1: chat_id 1 is its own parent"),
        ([chat(1, 2, 0), chat(2, -1, 1)], "line 2: chat_id 2 comes behind chat_id 1, whose parent it is"),
        ([chat(1, 3, 0), chat(2, 1, 1), chat(3, 2, 2)], "line 3: chat_id 3 comes behind chat_id 1"),
    ],
)
def test_parents_that_cannot_be(tmp_path, rows, message):
    path = write(tmp_path, lines(*rows))
    with pytest.raises(TraceError, match=message) as error:
        load_trace(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def session_of_tools(**fields):
    session = copilot(("2026-06-01T00:00:10Z", 100, 5), ("2026-06-01T00:00:12Z", 130, 6))
    session["turns"][0] |= fields
    return session


def slow(duration_ms):
    session = session_of_tools()
    session["turns"][0]["llm_calls"][1]["duration_ms"] = duration_ms
    return session


@pytest.mark.filterwarnings("ignore:.*outside the file")
@pytest.mark.parametrize(
    "good, bad, message, kept_rows",
    [
        (chat(1, -1, 0), chat(1, -1, 5), "column 'chat_id': expected another one in every row, got 1 again", 1),
        (
            session_of_tools(),
            session_of_tools(tool_batches=[{"duration_ms": 30}, {"duration_ms": -30}]),
            "column 'tool_batches.duration_ms': expected milliseconds >= 0, got -30",
            4,
        ),
        (session_of_tools(), slow(-1), "column 'llm_calls.duration_ms': expected milliseconds >= 0, got -1", 3),
        (session_of_tools(), slow("1 s"), "column 'llm_calls.duration_ms': expected milliseconds >= 0, got '1 s'", 3),
        (session_of_tools(), slow(math.nan), "column 'llm_calls.duration_ms': expected milliseconds >= 0, got nan", 3),
        (session_of_tools(), session_of_tools(llm_calls=[]), "column 'turns': expected a session with llm_calls", 2),
        (session_of_tools(), session_of_tools() | {"turns": []}, "column 'turns': expected a session with", 2),
        (
            tracelab(10, 20, 0, 4),
            tracelab(13, 30, 0, 4) | {"tools": [{"name": "sh", "latency_ms": -5}]},
            "column 'tools.latency_ms': expected milliseconds >= 0, got -5",
            1,
        ),
        (
            tracelab(10, 20, 0, 4),
            tracelab(13, 30, 0, 4) | {"timing_events": []},
            "column 'timing_events': expected the events of a round, got []",
            1,
        ),
        (
            {"arrival_time_ns": 0, "sub_requests": [{"input_toks": 1, "output_toks": 1}]},
            {"arrival_time_ns": 1, "sub_requests": []},
            "column 'sub_requests': expected a list of calls, got []",
            1,
        ),
        (
            {"arrival_time_ns": 0, "sub_requests": [{"input_toks": 1, "output_toks": 1}]},
            {"arrival_time_ns": 1, "sub_requests": [{"input_toks": 0, "output_toks": 1}]},
            "column 'input_toks': expected a whole number >= 1, got '0'",
            1,
        ),
    ],
)
def test_a_damaged_session_is_one_line(tmp_path, good, bad, message, kept_rows):
    path = write(tmp_path, lines(good, bad))
    with pytest.raises(TraceError) as error:
        load_trace(path)
    assert str(error.value).startswith(f"{path}: line 2, {message}") and "\n" not in str(error.value)
    trace = load_trace(path, "drop")
    assert trace.num_dropped == 1 and len(trace) == kept_rows


def test_a_file_of_damaged_sessions_alone_has_nothing_to_drop_to(tmp_path):
    with pytest.raises(TraceError, match="1 row, and all are invalid"):
        load_trace(write(tmp_path, lines({"arrival_time_ns": 1, "sub_requests": []})), "drop")


# Tables of kept times


def test_a_replayed_trace_shares_and_its_ttft_slo_counts_what_is_new(tmp_path):
    text = mooncake((0, 600, 1, [1, 2]), (1000, 700, 1, [1, 3]), (2000, 1000, 1, [1, 3]))
    path = write(tmp_path, text)
    table = kept(path, 3, ttft_slo_s=1.0, ttft_slo_per_token_s=0.01)
    assert table.shares_with.tolist() == [-1, 0, 1] and table.shared_tokens.tolist() == [0, 512, 700]
    np.testing.assert_allclose(table.ttft_slo_s, [7.0, 1.0 + 1.88, 4.0])
    assert table.parent is None
    with pytest.warns(TraceWarning, match="start over"):
        again = kept(path, 5, ttft_slo_s=1.0, ttft_slo_per_token_s=0.01)
    assert again.shares_with.tolist() == [-1, 0, 1, -1, 3] and again.shared_tokens.tolist() == [0, 512, 700, 0, 512]
    drawn = kept(path, 5, trace_arrivals="poisson", ttft_slo_s=1.0, ttft_slo_per_token_s=0.01)
    (remark,) = trace_remarks(scenario("paper", trace=str(path), trace_arrivals="poisson"), 0)
    assert "no two prompts have anything in common" in remark
    assert drawn.shares_with is None
    np.testing.assert_allclose(drawn.ttft_slo_s, 1.0 + 0.01 * drawn.prompt_tokens)


@pytest.mark.filterwarnings("ignore::llmsched_gym.workload.TraceWarning")
def test_a_continuing_run_from_the_middle_shares_with_whom_it_has(tmp_path):
    rows = [(1000 * i, 1024, 1, [7, i]) for i in range(10)]
    path = write(tmp_path, mooncake(*rows))
    starts = set()
    for seed in range(12):
        table = make_table(Scenario(trace=str(path), horizon_s=12.5), seed)
        assert len(table) == 13
        lap = np.flatnonzero(table.shares_with < 0)
        starts.add(len(lap) == 1 or 10 - int(lap[1]))
        # the first of a lap is new, the others share the common block with it
        first = np.maximum.accumulate(np.where(table.shares_with < 0, np.arange(13), 0))
        new = table.shares_with < 0
        np.testing.assert_array_equal(table.shares_with[~new], first[~new])
        assert (table.shared_tokens[~new] == 512).all() and (table.shared_tokens[new] == 0).all()
        # what the file had before counts as seen
        assert (table.ttft_slo_s < 0.5 + 0.0005 * 513).sum() >= 11
    assert len(starts) > 3


# Chains of calls of known lengths


def test_chains():
    parent = np.array([-1, 0, 1, 2, 3])
    prompt, output = np.array([100, 150, 155, 40, 10]), np.array([20, 9, 3, 5, 1])
    shares_with, shared = shares_of_chains(parent, prompt, output, np.array([0, 0, 0, 32, 99]))
    # 150 >= 100 + 20; 155 >= 150 without the output; 40 < 155 with 32 cached; 10 < 40, all of it cached
    assert shared.tolist() == [0, 120, 150, 32, 10]
    assert shares_with.tolist() == [-1, 0, 1, 2, 3]
    shares_with, shared = shares_of_chains(parent, prompt, output)
    assert shared.tolist() == [0, 120, 150, 0, 0] and shares_with.tolist() == [-1, 0, 1, -1, -1]


def test_burstgpt_keeps_its_times_and_continues_its_sessions(tmp_path):
    text = BURSTGPT + "130,1003,1,GPT-4,800,5,805,Conversation log\n"
    trace = load_trace(write(tmp_path, text))
    assert trace.think_s is None and trace.parent is None
    # 417 < 472: a new chain; 800 >= 417 + 276
    assert trace.shares[0].tolist() == [-1, -1, -1, 2] and trace.shares[1].tolist() == [0, 0, 0, 693]
    table = kept(tmp_path / "trace.csv", 4)
    assert table.parent is None and table.arrival_s.tolist() == [0.0, 40.0, 113.0, 125.0]
    np.testing.assert_allclose(table.ttft_slo_s, 0.5 + 0.0005 * np.array([472, 1087, 417, 107]))


@pytest.mark.parametrize(
    "text, think_s, shared, parent",
    [
        (SIMULATED, [0.0, 0.0, 0.5], [0, 0, 12], [-1, -1, 0]),
        # the first call is answered at 10.9, the next begins at 12.5
        (COPILOT, [0.0, 0.0, 1.6], [0, 0, 105], [-1, -1, 0]),
        # answered when its text is there, at 11; tools until the next begins at 13
        (TRACELAB, [0.0, 2.0], [0, 204], [-1, 0]),
    ],
)
def test_turns_that_wait_for_answers(tmp_path, text, think_s, shared, parent):
    trace = load_trace(write(tmp_path, text))
    assert trace.think_s.tolist() == pytest.approx(think_s, abs=1e-6)
    assert trace.shares[1].tolist() == shared and trace.parent.tolist() == parent


def test_a_session_of_a_file_is_closed_loop(tmp_path):
    """The flat request stands behind the session whose first call came before it."""
    table = kept(write(tmp_path, SIMULATED), 3, ttft_slo_s=1.0, ttft_slo_per_token_s=0.1)
    assert table.prompt_tokens.tolist() == [10, 20, 30] and table.parent.tolist() == [-1, 0, -1]
    assert table.arrival_s[[0, 2]].tolist() == [0.0, 0.25] and math.isnan(table.arrival_s[1])
    assert table.think_s.tolist() == [0.0, 0.5, 0.0] and table.new_tokens.tolist() == [10, 8, 30]
    assert table.shares_with.tolist() == [-1, 0, -1] and table.shared_tokens.tolist() == [0, 12, 0]
    np.testing.assert_allclose(table.ttft_slo_s, [2.0, 1.8, 4.0])
    assert table.arrivals == "trace" and table.qps == pytest.approx(4.0)  # sessions a second
    assert table.max_output_tokens.tolist() == [4, 4, 4]  # the longest of the file, as nobody says more
    with pytest.warns(TraceWarning, match="start over"):
        assert kept(tmp_path / "trace.csv", 7).prompt_tokens.tolist() == [10, 20, 30, 10, 20, 30, 10, 20]


def test_drawn_arrivals_bring_random_sessions_of_the_file(tmp_path):
    fields = {"trace_arrivals": "poisson", "length_hint": "noisy:0.3"}
    path = write(tmp_path, SIMULATED)
    table = make_table(scenario("paper", trace=str(path), qps=2.0, num_requests=600, **fields), 0)
    turns = np.diff(np.append(np.flatnonzero(table.parent < 0), len(table)))
    assert set(turns) == {1, 2} and (turns == 2).mean() == pytest.approx(0.5, abs=0.08)
    assert table.qps == 2.0 and len(np.unique(table.session_id)) == len(turns)
    gaps = np.diff(table.arrival_s[table.parent < 0])
    assert gaps.mean() == pytest.approx(0.5, rel=0.15)
    longer = make_table(scenario("paper", trace=str(path), qps=4.0, num_requests=900, **fields), 0)
    for name in ("prompt_tokens", "slo_class", "length_hint", "think_s"):
        np.testing.assert_array_equal(getattr(longer, name)[: len(table)], getattr(table, name), err_msg=name)


def ten_sessions(calls=5):
    """One begins every 20 s: calls 10 s apart, each of 40 new tokens behind its parent's context."""
    call = [{"input_toks": 60 + 50 * i, "output_toks": 10, "tool_duration_ns": 10_000_000_000} for i in range(calls)]
    return lines(*({"session_id": i, "arrival_time_ns": 20_000_000_000 * i, "sub_requests": call} for i in range(10)))


NOMINAL = {"ttft_slo_s": 2.0, "ttft_slo_per_token_s": 0.0, "strict_tbt_slo_s": 0.2}  # a call takes 1 + 9 x 0.1 s


@pytest.mark.filterwarnings("ignore::llmsched_gym.workload.TraceWarning")
def test_a_continuing_run_of_a_file_begins_in_mid_life(tmp_path):
    """Calls come at 0, 11.9, 23.8, 35.7 and 47.6 s: who began 20 s ago has had two, who began 40 s ago four."""
    path = write(tmp_path, ten_sessions())
    for seed in range(6):
        table = make_table(Scenario(trace=str(path), horizon_s=90.0, **NOMINAL), seed)
        assert table.num_past == 2 and (table.cohort_start, table.cohort_stop) == (2, len(table))
        np.testing.assert_allclose(table.arrival_s[:2], [35.7 - 40.0, 11.9 - 20.0][::-1])
        assert table.prompt_tokens[:2].tolist() == [110, 210]
        roots = np.flatnonzero(table.parent < 0)[2:]
        np.testing.assert_allclose(table.arrival_s[roots], [0.0, 23.8 - 20.0, 47.6 - 40.0, 20.0, 40.0, 60.0, 80.0])
        assert table.shares_with[roots].tolist() == [-1, 0, 1, -1, -1, -1, -1]
        assert table.shared_tokens[roots[1:3]].tolist() == [120, 220]
        assert table.prompt_tokens[roots[:4]].tolist() == [60, 160, 260, 60]
        turns = np.diff(np.append(roots, len(table)))
        assert turns.tolist() == [5, 3, 1, 5, 5, 5, 5]


@pytest.mark.filterwarnings("ignore::llmsched_gym.workload.TraceWarning")
def test_mid_life_of_random_sessions_of_a_file(tmp_path):
    path = write(tmp_path, ten_sessions())
    past = []
    for seed in range(40):
        table = make_table(Scenario(trace=str(path), trace_arrivals="poisson", qps=0.5, horizon_s=5.0, **NOMINAL), seed)
        past.append(table.num_past)
        goes_on = np.flatnonzero(table.shares_with >= 0)
        goes_on = goes_on[table.shares_with[goes_on] < table.num_past]
        assert len(goes_on) == table.num_past and (table.arrival_s[goes_on] >= 0.0).all()
        np.testing.assert_array_equal(table.prompt_tokens[goes_on] - table.shared_tokens[goes_on], 40)
    assert np.mean(past) == pytest.approx(0.5 * 47.6, rel=0.1)  # Little's law


@pytest.mark.filterwarnings("ignore::llmsched_gym.workload.TraceWarning")
def test_a_session_that_the_model_is_too_short_for_is_over(tmp_path):
    path = write(tmp_path, ten_sessions())
    # the fourth call, of 210 and 10 tokens, does not fit: who has had four is over
    table = make_table(Scenario(trace=str(path), horizon_s=5.0, max_model_len=219, **NOMINAL), 0)
    assert table.num_past == 1 and table.prompt_tokens[0] == 110


@pytest.mark.filterwarnings("ignore::llmsched_gym.workload.TraceWarning")
def test_what_is_past_of_a_file_is_cached(tmp_path):
    path = write(tmp_path, ten_sessions())
    world = Scenario(trace=str(path), horizon_s=10.0, prefix_caching=True, **NOMINAL)
    table, episode = make_table(world, 0), simulate(world, "sarathi", 0)
    came = [table.shares_with.tolist().index(past) for past in range(2)]
    # whole blocks of what was computed: the last token of 120 and of 220 was not
    assert episode.requests["num_cached_tokens"][came].tolist() == [112, 208]


def test_calls_that_overlap_follow_at_once(tmp_path):
    session = copilot(("2026-06-01T00:00:10Z", 100, 5), ("2026-06-01T00:00:10.5Z", 130, 6))
    assert load_trace(write(tmp_path, lines(session))).think_s.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("pause", [-5, "soon", [1]])
def test_bad_pauses(tmp_path, pause):
    calls = [{"input_toks": 10, "output_toks": 2, "tool_duration_ns": pause}, {"input_toks": 20, "output_toks": 3}]
    path = write(tmp_path, lines({"session_id": "a", "arrival_time_ns": 0, "sub_requests": calls}))
    with pytest.raises(TraceError, match=r"line 1, column 'sub_requests\.tool_duration_ns': expected nanoseconds >= 0"):
        load_trace(path)


@pytest.mark.parametrize("workload", ["chat", "agents"])
def test_written_sessions_are_read_again(tmp_path, workload):
    fields = {"workload": workload, "max_model_len": 32_768, "qps": 1.0, "num_requests": 200}
    table = make_table(scenario("paper", **fields), 0)
    path = tmp_path / "sessions.jsonl"
    write_sessions(table, path)
    again = kept(path, len(table))
    for name in ("prompt_tokens", "output_tokens", "parent"):
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))
    np.testing.assert_allclose(again.think_s, table.think_s, atol=1e-8)
    turn = table.parent >= 0
    np.testing.assert_array_equal(again.new_tokens[turn], table.new_tokens[turn])
    np.testing.assert_array_equal(again.shared_tokens[turn], table.shared_tokens[turn])
    roots_s = table.arrival_s[~turn]
    np.testing.assert_allclose(again.arrival_s[~turn], roots_s - roots_s[0], atol=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == ["sessions.jsonl"]


def test_the_command_writes_what_it_draws(tmp_path):
    app = typer.Typer()
    app.command()(write_main)
    path = tmp_path / "s.jsonl"
    done = CliRunner().invoke(app, ["chat", "--out", str(path), "--qps", "2", "--num-requests", "50", "--seed", "3"])
    assert done.exit_code == 0, done.output
    table = make_table(scenario("paper", workload="chat", qps=2.0, num_requests=50), 3)
    np.testing.assert_array_equal(kept(path, len(table)).prompt_tokens, table.prompt_tokens)
    for bad in (["sharegpt", "--out", str(path)], ["chat", "--out", str(tmp_path / "gone" / "s.jsonl")]):
        done = CliRunner().invoke(app, bad)
        assert done.exit_code == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_written_sessions_are_served_alike(tmp_path):
    """Without a cache it is the same work at the same times."""
    fields = {"num_requests": 120, "patience_s": math.inf}
    table = make_table(scenario("paper", workload="chat", qps=0.4, **fields), 0)
    write_sessions(table, tmp_path / "s.jsonl")
    drawn = simulate(scenario("paper", workload="chat", qps=0.4, **fields), "sarathi", 0).sim
    read = simulate(scenario("paper", trace=str(tmp_path / "s.jsonl"), qps=None, **fields), "sarathi", 0).sim
    assert drawn.num_finished == read.num_finished == len(table)
    assert read.clock_s + table.arrival_s[0] == pytest.approx(drawn.clock_s, rel=1e-6)


def test_only_what_is_to_come_is_written(tmp_path):
    table = make_table(Scenario(workload="chat", qps=0.5, horizon_s=60.0), 0)
    assert table.num_past > 0
    write_sessions(table, tmp_path / "s.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert sum(len(row["sub_requests"]) for row in rows) == len(table) - table.num_past
    assert min(row["arrival_time_ns"] for row in rows) >= 0


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match="table: expected one with sessions"):
        write_sessions(make_table(scenario("paper", num_requests=3), 0), tmp_path / "s.jsonl")
    table = make_table(scenario("paper", workload="chat", num_requests=3), 0)
    with pytest.raises(ConfigError, match="out: cannot write to"):
        write_sessions(table, tmp_path / "gone" / "s.jsonl")
    assert list(tmp_path.iterdir()) == []


# What `llmsched trace` says


def test_the_command_tells_turns_and_reuse(tmp_path, capsys):
    assert main(["trace", str(write(tmp_path, SIMULATED)), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["num_sessions"], found["turns_mean"], found["turns_max"]) == (1, 2.0, 2)
    assert found["seen_share"] == pytest.approx(12 / 60) and found["hit_rate"] == 0.0  # no full block of 16
    assert found["think_p50_s"] == 0.5
    assert main(["trace", str(tmp_path / "trace.csv")]) == 0
    out = capsys.readouterr().out
    assert "turns: mean 2.0, max 2" in out and "hits of an infinite cache" in out and "full blocks of 16" in out


@pytest.mark.parametrize(
    "name, hits", [("mooncake_conversation_first6000.jsonl.gz", "0.353"), ("mooncake_synthetic.jsonl.gz", "0.650")]
)
def test_hits_of_the_public_traces(name, hits, capsys):
    path = Path(DATA_DIR or "", "traces", name)
    if not DATA_DIR or not path.exists():
        pytest.skip(f"needs {name} below the folder named by LLMSCHED_DATA_DIR")
    assert main(["trace", str(path)]) == 0
    assert f"{hits} of prompt tokens, by full blocks of 512" in capsys.readouterr().out


ODD = (None, 5, -1, 0.5, "x", True, [], [1], {}, {"a": 1}, 1e300, 10**30, "2026-06-01T00:00:10Z")


def oddities(item):
    """The object with each of its values replaced by each of the odd ones, and without it."""
    for key in item if isinstance(item, dict) else range(len(item)):
        for odd in ODD:
            copy = json.loads(json.dumps(item))
            copy[key] = odd
            yield copy
        if isinstance(item[key], dict | list):
            for changed in oddities(item[key]):
                copy = json.loads(json.dumps(item))
                copy[key] = changed
                yield copy
        if isinstance(item, dict):
            yield {name: value for name, value in item.items() if name != key}


@pytest.mark.filterwarnings("ignore::llmsched_gym.workload.TraceWarning")
@pytest.mark.parametrize("text", [MOONCAKE, BAILIAN, COPILOT, TRACELAB, SIMULATED], ids=lambda text: text[:20])
def test_a_damaged_row_is_one_line_of_error_or_a_trace(tmp_path, text):
    first, *others = text.strip().splitlines()
    read = refused = 0
    for changed in oddities(json.loads(others[0])):
        path = write(tmp_path, "\n".join([first, json.dumps(changed)]))
        try:
            trace = load_trace(path)
        except TraceError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refused += 1
        else:
            read += 1
            assert len(trace) >= 1 and (trace.think_s is None or (trace.think_s >= 0.0).all())
            if trace.shares is not None:
                assert (trace.shares[1] <= trace.prompt_tokens).all()
    assert read > 5 and refused > 5
