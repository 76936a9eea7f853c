"""Trace files: every format by its header, and one clear line for every way a file can be bad."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from llmsched_gym.workload import TraceError, TraceWarning, load_trace

DATA_DIR = os.environ.get("LLMSCHED_DATA_DIR")

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2225670,879,55
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:00.017335+00:00,2399,6
"""
MOONCAKE = """{"timestamp": 27482, "input_length": 955, "output_length": 52, "hash_ids": [46, 47]}
{"timestamp": 30535, "input_length": 672, "output_length": 26, "hash_ids": [46, 2353]}
"""
BURSTGPT = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,1003,4.2,ChatGPT,472,18,490,Conversation log
45,,2.1,ChatGPT,1087,230,1317,API log
118,1003,7,GPT-4,417,276,693,Conversation log
"""
BURSTGPT_FIRST = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,GPT-4,1087,230,1317,API log
"""
LENGTHS = """num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio
74,918,992,0.0806
290,905,1195,0.3204
"""
VIDUR = """arrived_at,num_prefill_tokens,num_decode_tokens
0.25,100,10.0
0.75,200,20.0
"""


AZURE_LMM = """TIMESTAMP,NumImages,ContextTokens,GeneratedTokens
2024-10-01 00:00:00+00:00,2,900,10
2024-10-01 00:00:01.500000+00:00,0,100,20
"""


def bailian(turn, parent, at, prompt, output, ids):
    keys = ("chat_id", "parent_chat_id", "timestamp", "input_length", "output_length", "hash_ids")
    return json.dumps(dict(zip(keys, (turn, parent, at, prompt, output, ids), strict=True))) + "\n"


BAILIAN = (
    bailian(0, -1, 0.25, 40, 5, [1, 2, 3])
    + bailian(1, 0, 2.25, 90, 6, [1, 2, 4, 5, 6, 7])
    + bailian(2, 77, 5.25, 30, 7, [1, 9])
)


def copilot(*calls):
    """A session of one turn."""
    calls = [
        {"timestamp": t, "duration_ms": 900, "tokens": {"prompt": p, "completion": c, "cached": 8}} for t, p, c in calls
    ]
    return {"session_id": "s", "date": "x", "turns": [{"turn_id": 1, "llm_calls": calls, "tool_batches": []}]}


COPILOT = (
    json.dumps(copilot(("2026-06-01T00:00:10Z", 100, 5), ("2026-06-01T00:00:12.5Z", 130, 6)))
    + "\n"
    + json.dumps(copilot(("2026-06-01T00:00:11Z", 50, 7)) | {"session_id": "t"})
    + "\n"
)


def tracelab(second, total, prefix, output):
    stamp = "2026-08-25T00:00:{:02}Z"
    events = [("tool_result", second - 2), ("user_message", second), ("text", second + 1), ("tool_result", second + 2)]
    return {
        "provider": "p",
        "session_id": "s",
        "round_index": 0,
        "input_tokens_total": total,
        "prefix_tokens": prefix,
        "newly_append_tokens": total - prefix,
        "output_tokens": output,
        "timing_events": [{"event_type": kind, "timestamp": stamp.format(at)} for kind, at in events],
        "tools": [],
    }


TRACELAB = "\n".join(json.dumps(tracelab(*row)) for row in ((10, 200, 0, 4), (13, 260, 204, 5)))
SIMULATED = """{"session_id": "a", "arrival_time_ns": 1000000000, "sub_requests": [
 {"input_toks": 10, "output_toks": 2, "tool_duration_ns": 500000000}, {"input_toks": 20, "output_toks": 3}]}
{"input_toks": 30, "output_toks": 4, "arrival_time_ns": 1250000000}
""".replace("[\n", "[")
SIMULATED_FLAT = """{"input_toks": 30, "output_toks": 4, "arrival_time_ns": 5}
{"input_toks": 31, "output_toks": 5, "arrival_time_ns": 2000000005}
"""


def write(tmp_path, text, name="trace.csv"):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    "text, fmt, arrival_s, prompt, output",
    [
        (AZURE, "azure", [0.0, 4.314579, 4.541977], [374, 396, 879], [44, 109, 55]),
        (AZURE_2024, "azure", [0.0, 0.007405], [2162, 2399], [5, 6]),
        (MOONCAKE, "mooncake", [0.0, 3.053], [955, 672], [52, 26]),
        (BURSTGPT, "burstgpt", [0.0, 40.0, 113.0], [472, 1087, 417], [18, 230, 276]),
        (BURSTGPT_FIRST, "burstgpt", [0.0, 40.0], [472, 1087], [18, 230]),
        (LENGTHS, "lengths", None, [74, 290], [918, 905]),
        (VIDUR, "vidur", [0.0, 0.5], [100, 200], [10, 20]),
        pytest.param(
            *(BAILIAN, "bailian", [0.0, 2.0, 5.0], [40, 90, 30], [5, 6, 7]),
            marks=pytest.mark.filterwarnings("ignore:.*outside the file"),
        ),
        (COPILOT, "copilot", [0.0, 1.0, 2.5], [100, 50, 130], [5, 7, 6]),
        (TRACELAB, "tracelab", [0.0, 3.0], [200, 260], [4, 5]),
        (SIMULATED, "llmservingsim", [0.0, 0.25, 0.5], [10, 30, 20], [2, 4, 3]),
        (SIMULATED_FLAT, "llmservingsim", [0.0, 2.0], [30, 31], [4, 5]),
        pytest.param(
            *(AZURE_LMM, "azure-lmm", [0.0, 1.5], [900, 100], [10, 20]),
            marks=pytest.mark.filterwarnings("ignore:.*images"),
        ),
    ],
)
@pytest.mark.parametrize("dress", ["plain", "gzip", "bom", "crlf"])
def test_formats(tmp_path, text, fmt, arrival_s, prompt, output, dress):
    data = {"crlf": text.replace("\n", "\r\n").encode(), "bom": b"\xef\xbb\xbf" + text.encode()}.get(
        dress, text.encode()
    )
    trace = load_trace(write(tmp_path, gzip.compress(data, mtime=0) if dress == "gzip" else data, "any.name"))
    assert (trace.format, trace.name, trace.num_dropped, len(trace)) == (fmt, "any.name", 0, len(prompt))
    assert trace.prompt_tokens.tolist() == prompt and trace.output_tokens.tolist() == output
    assert trace.prompt_tokens.dtype == trace.output_tokens.dtype == np.int32
    if arrival_s is None:
        assert trace.arrival_s is None and trace.qps is None
    else:
        assert trace.arrival_s.tolist() == pytest.approx(arrival_s, abs=1e-9)
        assert trace.qps == pytest.approx((len(prompt) - 1) / arrival_s[-1])


@pytest.mark.filterwarnings("ignore:.*outside the file")
def test_sessions(tmp_path):
    assert load_trace(write(tmp_path, BURSTGPT)).session_id.tolist() == [0, -1, 0]
    assert load_trace(write(tmp_path, BURSTGPT_FIRST)).session_id is None
    assert load_trace(write(tmp_path, AZURE)).session_id is None
    # a chat is called after its first turn, and one whose parent lies outside the file is another
    assert load_trace(write(tmp_path, BAILIAN)).session_id.tolist() == [0, 0, 1]
    assert load_trace(write(tmp_path, COPILOT)).session_id.tolist() == [0, 1, 0]
    assert load_trace(write(tmp_path, TRACELAB)).session_id.tolist() == [0, 0]
    assert load_trace(write(tmp_path, SIMULATED)).session_id.tolist() == [0, -1, 0]


def test_seconds_are_not_taken_for_milliseconds(tmp_path):
    keys = ("chat_id", "parent_chat_id", "timestamp", "input_length", "output_length", "hash_ids")
    rows = [dict(zip(keys, (i, -1, 1.25 * i, 10, 2, [i]), strict=True)) for i in range(5)]
    assert load_trace(write(tmp_path, "\n".join(map(json.dumps, rows)))).qps == pytest.approx(4 / 5)


def test_images_and_steps_back_in_time_are_said(tmp_path):
    with pytest.warns(TraceWarning, match="2 images are not simulated"):
        assert load_trace(write(tmp_path, AZURE_LMM)).num_images == 2
    joined = VIDUR + "".join(f"{t},5,5\n" for t in (0.25, 0.5, 0.125))  # 0.75 is followed by 0.25, 0.5 by 0.125
    with pytest.warns(TraceWarning, match="time runs backwards 2 times"):
        trace = load_trace(write(tmp_path, joined))
    assert trace.num_steps_back == 2 and trace.arrival_s.tolist() == [0, 0.125, 0.125, 0.375, 0.625]
    assert load_trace(write(tmp_path, COPILOT)).num_steps_back == 0  # sessions overlap


def test_rows_that_differ_in_their_fraction_are_one_format(tmp_path):
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:01+00:00,1,1\n2024-05-10 00:00:01.5+00:00,1,1\n"
    assert load_trace(write(tmp_path, text)).arrival_s.tolist() == [0.0, 0.5]


def test_calls_that_failed_are_rows_that_break_a_rule(tmp_path):
    session = copilot(("2026-06-01T00:00:10Z", 100, 5), ("2026-06-01T00:00:12Z", 130, 6))
    session["turns"][0]["llm_calls"][1]["status_code"] = 429
    path = write(tmp_path, json.dumps(session))
    with pytest.raises(TraceError, match="line 1: a call that did not succeed"):
        load_trace(path)
    assert load_trace(path, "drop").num_dropped == 1


def servegen(tmp_path, windows, lengths=None):
    """A folder with one client."""
    lengths = lengths or {"0": {"input_tokens": "{5: 0.25, 7: 0.75}", "output_tokens": "{3: 1.0}"}}
    folder = tmp_path / "clients"
    folder.mkdir(exist_ok=True)
    (folder / "chunk-0-trace.csv").write_text("".join(",".join(map(str, w)) + "\n" for w in windows))
    (folder / "chunk-0-dataset.json").write_text(json.dumps(lengths))
    return folder


@pytest.mark.parametrize("kind", [("Gamma", 0.5, 99.0), ("Weibull", 0.5, 99.0), ("", "", "")])
def test_a_client_of_servegen_sends_at_its_rate_whatever_its_scale(tmp_path, kind):
    folder = servegen(tmp_path, [(0, 4.0, 1.0, *kind), (600, 0.0, 0.0, "", "", ""), (1200, 8.0, 1.0, *kind)])
    trace = load_trace(folder)
    arrival_s = trace.arrival_s
    assert trace.format == "servegen" and trace.session_id.tolist() == [0] * len(trace)
    first, none, last = (((arrival_s >= t) & (arrival_s < t + 595)).sum() for t in (0, 601, 1200))
    assert none == 0 and first == pytest.approx(4 * 600, rel=0.2) and last == pytest.approx(8 * 600, rel=0.2)
    assert set(trace.prompt_tokens) == {5, 7} and set(trace.output_tokens) == {3}
    assert (trace.prompt_tokens == 7).mean() == pytest.approx(0.75, abs=0.04)
    np.testing.assert_array_equal(load_trace(folder).arrival_s, arrival_s)


def test_a_folder_of_servegen_is_drawn_for_an_hour(tmp_path):
    folder = servegen(tmp_path, [(7200 + 600 * i, 1.0, 1.0, "", "", "") for i in range(12)])
    with pytest.warns(TraceWarning, match="the first hour of the 2"):
        assert load_trace(folder).arrival_s[-1] == pytest.approx(3600, abs=30)


@pytest.mark.parametrize(
    ("windows", "lengths", "message"),
    [
        ([("x", 1, 1, "", "", "")], None, "chunk-0-trace.csv: line 1: expected start"),
        ([(0, 1, 1, "Pareto", 1, 1)], None, "line 1: expected a rate >= 0 and Gamma"),
        ([(0, -1, 1, "", "", "")], None, "line 1: expected a rate"),
        ([(0, 1, 1, "", "", "")], {"0": {"input_tokens": "__import__('os')", "output_tokens": "{}"}}, "dataset.json"),
        ([(0, 1, 1, "", "", "")], {"0": {"input_tokens": "{}", "output_tokens": "{}"}}, "no lengths"),
        ([(0, 0, 1, "", "", "")], None, "no client sends anything"),
    ],
)
def test_bad_folders_of_servegen(tmp_path, windows, lengths, message):
    with pytest.raises(TraceError, match=message) as error:
        load_trace(servegen(tmp_path, windows, lengths))
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.*backwards")
def test_columns_in_any_order_and_blank_lines(tmp_path):
    trace = load_trace(write(tmp_path, "\nnum_decode_tokens, arrived_at ,x,num_prefill_tokens\n1,9,q,2\n\n3,8,q,4\n\n"))
    assert trace.format == "vidur"
    assert trace.arrival_s.tolist() == [0.0, 1.0] and trace.prompt_tokens.tolist() == [4, 2]


@pytest.mark.filterwarnings("ignore:.*backwards")
def test_times_are_sorted_stably(tmp_path):
    text = "arrived_at,num_prefill_tokens,num_decode_tokens\n5,1,1\n3,2,1\n5,3,1\n3,4,1\n-1,5,1\n"
    trace = load_trace(write(tmp_path, text))
    assert trace.arrival_s.tolist() == [0.0, 4.0, 4.0, 6.0, 6.0]
    assert trace.prompt_tokens.tolist() == [5, 2, 4, 1, 3]


def test_arrays_cannot_be_changed(tmp_path):
    with pytest.raises(ValueError, match="read-only"):
        load_trace(write(tmp_path, VIDUR)).prompt_tokens[0] = 7


def vidur_with(line, row):
    """24 good rows, with one of the file's lines replaced."""
    lines = ["arrived_at,num_prefill_tokens,num_decode_tokens", *(f"{i}.5,{100 + i},{10 + i}" for i in range(24))]
    lines[line - 1] = row
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "text, where, message",
    [
        (vidur_with(17, "3,-4,5"), "line 17, column 'num_prefill_tokens'", "expected a whole number >= 1, got '-4'"),
        (vidur_with(2, "3,4,0"), "line 2, column 'num_decode_tokens'", "got '0'"),
        (vidur_with(25, "3,4.5,1"), "line 25, column 'num_prefill_tokens'", "got '4.5'"),
        (vidur_with(9, "3,,1"), "line 9, column 'num_prefill_tokens'", "got ''"),
        (vidur_with(9, "3,four,1"), "line 9, column 'num_prefill_tokens'", "got 'four'"),
        (vidur_with(9, "3,nan,1"), "line 9, column 'num_prefill_tokens'", "got 'nan'"),
        (vidur_with(9, "3,1e12,1"), "line 9, column 'num_prefill_tokens'", "got '1e12'"),
        (vidur_with(9, "inf,4,1"), "line 9, column 'arrived_at'", "expected a finite time in s, got 'inf'"),
        (vidur_with(9, "NaN,4,1"), "line 9, column 'arrived_at'", "got 'NaN'"),
        (vidur_with(9, "-1,-1,-1"), "line 9, column 'num_prefill_tokens'", "got '-1'"),
        (vidur_with(9, "3,4"), "line 9, column 'num_decode_tokens'", "more or fewer fields"),
        (vidur_with(9, "3,4,5,6"), "line 9, column", "more or fewer fields"),
        (AZURE.replace("2023-11-16 18:15:50.9951690", "yesterday"), "line 3, column 'TIMESTAMP'", "a date and time"),
        (AZURE.replace("2023-11-16 18:15:50", "-223-11-16 18:15:50"), "line 3, column 'TIMESTAMP'", "a date and time"),
        (AZURE.replace(",109", ",-109"), "line 3, column 'GeneratedTokens'", "got '-109'"),
        (BURSTGPT.replace("1087,230", "1087,0"), "line 3, column 'Response tokens'", "got '0'"),
        (MOONCAKE.replace('"output_length": 26, ', ""), "line 2, column 'output_length'", "got ''"),
        (MOONCAKE.replace("672", "true"), "line 2, column 'input_length'", "got 'true'"),
        (MOONCAKE.replace("672", "null"), "line 2, column 'input_length'", "got 'null'"),
        (MOONCAKE.replace("30535", "NaN"), "line 2, column 'timestamp'", "expected a finite time in ms, got 'NaN'"),
        (MOONCAKE + "\n[1, 2]\n", "line 4", r"expected a JSON object, got '\[1, 2\]'"),
        (MOONCAKE + "{broken\n", "line 3", "not JSON"),
        ('{"prompt": 3, "completion": 4}\n', "line 1", "unknown header 'prompt,completion'"),
        ('{"timestamp": 1, "messages": []}\n', "line 1", "'messages' holds text; expected lengths in tokens"),
        ("a,b,c\n1,2,3\n", "line 1", "unknown header 'a,b,c'; known columns are azure-lmm: TIMESTAMP,ContextTokens"),
        ("num_prefill_tokens,tokens\n1,2\n", "line 1", "unknown header"),
        ("", "trace.csv", "the file is empty"),
        ("\n \n", "trace.csv", "the file is empty"),
        (LENGTHS.split("\n")[0], "trace.csv", "no rows behind the header"),
        (b"\xff\xfe\x00\x01binary", "trace.csv", "not a text file"),
        (gzip.compress(VIDUR.encode(), mtime=0)[:-9], "trace.csv", "cannot read"),
        (gzip.compress(VIDUR.encode(), mtime=0)[:20] + b"\0" * 30, "trace.csv", "cannot read"),
    ],
)
def test_bad_files(tmp_path, text, where, message):
    path = write(tmp_path, text)
    with pytest.raises(TraceError, match=message) as error:
        load_trace(path)
    assert str(error.value).startswith(f"{path}: ") and where in str(error.value) and "\n" not in str(error.value)
    assert isinstance(error.value, ValueError)


def test_files_that_are_not_there(tmp_path):
    for path in (tmp_path / "gone.csv", tmp_path):
        with pytest.raises(TraceError, match="cannot read") as error:
            load_trace(path)
        assert str(path) in str(error.value)


def test_dropping_is_asked_for_and_counted(tmp_path):
    text = BURSTGPT.replace("1087,230", "1087,0") + "120,1,1,m,5\n"
    trace = load_trace(write(tmp_path, text), on_invalid="drop")
    assert trace.num_dropped == 2 and trace.prompt_tokens.tolist() == [472, 417]
    assert trace.arrival_s.tolist() == [0.0, 113.0] and trace.session_id.tolist() == [0, 0]
    with pytest.raises(TraceError, match="1 row, and all are invalid"):
        load_trace(write(tmp_path, "num_prefill_tokens,num_decode_tokens\n0,0\n"), on_invalid="drop")
    with pytest.raises(ValueError, match="on_invalid"):
        load_trace(write(tmp_path, VIDUR), on_invalid="ignore")


def test_many_rows_across_chunks(tmp_path):
    """The 120,001st row is as easy to find as the first."""
    rows = [f"{i},{1 + i % 7},1" for i in range(120_000)]
    text = "arrived_at,num_prefill_tokens,num_decode_tokens\n" + "\n".join(rows) + "\n"
    assert len(load_trace(write(tmp_path, text))) == 120_000
    with pytest.raises(TraceError, match="line 120002, column 'num_prefill_tokens'"):
        load_trace(write(tmp_path, text + "1,0,1\n"))


def test_mooncake_extras_are_ignored(tmp_path):
    text = json.dumps({"timestamp": 0, "input_length": 3, "output_length": 4, "turn": 2}) + "\n"
    assert len(load_trace(write(tmp_path, text, "t.jsonl"))) == 1


@pytest.mark.parametrize(
    "name, rows, fmt, prompt, output",
    [
        ("openchat_sharegpt4.csv", 30_731, "lengths", (1730, 5696, 7434, 2340), (415, 834, 998, 439)),
        ("azure_llm_2023_conv.csv", 19_366, "azure", (1020, 2734, 4142, 1155), (129, 424, 601, 211)),
    ],
)
def test_real_traces(name, rows, fmt, prompt, output):
    path = Path(DATA_DIR or "", "traces", name)
    if not DATA_DIR or not path.exists():
        pytest.skip(f"needs {name} below the folder named by LLMSCHED_DATA_DIR")
    trace = load_trace(path)
    assert (len(trace), trace.format) == (rows, fmt)
    for tokens, figures in ((trace.prompt_tokens, prompt), (trace.output_tokens, output)):
        assert (*np.percentile(tokens, [50, 90, 99]), tokens.mean()) == pytest.approx(figures, abs=0.6)
    if trace.qps is not None:
        assert trace.qps == pytest.approx(5.53, abs=0.005)
