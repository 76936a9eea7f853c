"""`llmsched workload fit`: workloads fitted to traces, usable wherever one is named, and how far they are off."""

import json

import numpy as np
import pytest

from llmsched_gym.cli import main
from llmsched_gym.config import Scenario, find_suite, scenario
from llmsched_gym.evaluation.grid import evaluate
from llmsched_gym.workload import load_trace, make_table
from llmsched_gym.workload.fit_trace import arrivals, fit_workload
from llmsched_gym.workload.trace_sessions import write_sessions

SHORT = {"num_requests": 5, "warmup_s": 0.0, "qps": 1.0}


@pytest.fixture
def lengths(tmp_path):
    """2,000 rows at 4 requests/s with Gamma gaps of shape 0.5."""
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.gamma(0.5, 0.5, 2000)) * 1.0
    prompt, output = np.rint(rng.lognormal(6, 1, 2000) + 1), np.rint(rng.lognormal(4, 0.8, 2000) + 1)
    rows = "".join(f"{t:.6f},{p:.0f},{o:.0f}\n" for t, p, o in zip(times, prompt, output, strict=True))
    path = tmp_path / "lengths.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + rows)
    return path


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    """3,000 turns of the shipped conversations at 0.5 sessions/s."""
    path = tmp_path_factory.mktemp("traces") / "sessions.jsonl"
    world = Scenario(workload="chat", qps=0.5, num_requests=3000, warmup_s=0.0, arrivals_continue=False)
    write_sessions(make_table(world, 0), path)
    return path


def test_lengths_and_arrivals_of_a_trace(lengths, tmp_path, capsys):
    out, suite = tmp_path / "mine.json", tmp_path / "mine.toml"
    assert main(["workload", "fit", str(lengths), "--out", str(out), "--suite", str(suite), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["arrivals"]["qps"] == pytest.approx(load_trace(lengths).qps, rel=1e-5)
    assert told["arrivals"]["burstiness"] == pytest.approx(0.5, rel=0.1)
    assert [row["quantity"] for row in told["fit"]] == ["prompt", "output", "total"]
    trace = load_trace(lengths)
    for row in told["fit"]:
        assert row["ks_distance"] < 0.02 and abs(row["p50"]["error"]) < 0.03 and abs(row["p99"]["error"]) < 0.1
    assert told["fit"][0]["p90"]["trace"] == pytest.approx(np.quantile(trace.prompt_tokens, 0.9), abs=1e-3)
    world = scenario(str(suite), num_requests=4000, warmup_s=0.0)
    table = make_table(world, 0)
    assert (world.arrivals, world.qps) == ("gamma", told["arrivals"]["qps"])
    cohort = slice(table.cohort_start, table.cohort_stop)
    assert np.median(table.prompt_tokens[cohort]) == pytest.approx(np.median(trace.prompt_tokens), rel=0.06)
    assert find_suite(str(suite)).what == "fitted to lengths.csv"
    args = [
        "--policy",
        "sarathi",
        "--workload",
        str(out),
        "--qps",
        "1",
        "--seeds",
        "1",
        "--num-requests",
        "4",
        "--json",
    ]
    assert main(["evaluate", "--workers", "1", *args]) == 0
    assert json.loads(capsys.readouterr().out)[0]["workload"] == str(out)


def test_sessions_of_a_trace(sessions, tmp_path, capsys):
    out, suite = tmp_path / "chats.json", tmp_path / "chats.toml"
    assert main(["workload", "fit", str(sessions), "--out", str(out), "--suite", str(suite)]) == 0
    text = capsys.readouterr().out
    assert "think s" in text and "sessions/s" in text and "KS" in text and "distance" in text
    data, rows = fit_workload(load_trace(sessions), "chats", "made")
    assert data["kind"] == "sessions" and data["statistics"]["num_requests"] >= 3000
    found = {row["quantity"]: row for row in rows}
    assert set(found) == {"turns", "first_tokens", "new_tokens", "output_tokens", "think_s", "prompt"}
    for name in ("first_tokens", "new_tokens", "output_tokens", "think_s"):
        assert found[name]["ks_distance"] < 0.04 and abs(found[name]["p50"]["error"]) < 0.06
    # turns that no longer fit: the drawn contexts follow from all of these
    assert abs(found["turns"]["mean"]["error"]) < 0.12 and abs(found["prompt"]["mean"]["error"]) < 0.15
    world = scenario(str(suite))
    assert world.prefix_caching and world.qps == pytest.approx(0.5, rel=0.1)
    (row,) = evaluate(world.replace(**SHORT), ["sarathi"], seeds=1)
    assert row["num_sessions"] >= 1 and row["num_finished"] + row["num_rejected"] + row["num_abandoned"] >= 5


def test_rounded_times_say_nothing_about_bursts(tmp_path):
    path = tmp_path / "rounded.csv"
    rows = "".join(f"{3 * (k // 4)},100,10\n" for k in range(400))
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + rows)
    assert arrivals(load_trace(path)) == {"qps": pytest.approx(399 / 297, rel=1e-5)}
    path.write_text("num_prefill_tokens,num_decode_tokens\n" + "100,10\n" * 400)
    assert arrivals(load_trace(path)) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "trace.csv"),
        ("num_prefill_tokens,num_decode_tokens\n100,10\n", "trace.csv: 1 rows; a fit needs at least 320"),
        ("num_prefill_tokens,num_decode_tokens\n" + "100,10\n" * 400 + "0,10\n", "trace.csv: line 402"),
    ],
)
def test_a_trace_that_cannot_be_fitted_is_one_line_and_nothing_is_written(tmp_path, capsys, text, words):
    (tmp_path / "trace.csv").write_text(text)
    out = tmp_path / "deep" / "out.json"
    assert main(["workload", "fit", str(tmp_path / "trace.csv"), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert words.split(":")[0] in error and error.count("\n") == 1 and not out.parent.exists()


def test_what_lies_in_its_place_is_not_overwritten(lengths, tmp_path, capsys):
    for name, text in (("notes.json", '{"mine": 1}'), ("list.json", "[1]"), ("bad.json", "not json")):
        (tmp_path / name).write_text(text)
        assert main(["workload", "fit", str(lengths), "--out", str(tmp_path / name)]) == 2
        assert "of something else, and no workload" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == text
    assert main(["workload", "fit", str(lengths), "--out", str(tmp_path / "mine.csv")]) == 2
    assert "out: expected a .json file" in capsys.readouterr().err
    (tmp_path / "mine.toml").write_text("x = 1\n")
    args = [
        "workload",
        "fit",
        str(lengths),
        "--out",
        str(tmp_path / "new.json"),
        "--suite",
        str(tmp_path / "mine.toml"),
    ]
    assert main(args) == 2 and not (tmp_path / "new.json").exists()
    assert "of something else, and no suite" in capsys.readouterr().err
    for _ in range(2):  # its own is replaced
        assert main(["workload", "fit", str(lengths), "--out", str(tmp_path / "own.json")]) == 0
