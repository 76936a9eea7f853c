"""A run recorded batch by batch: the same run, what each request did in it, and its trace for Perfetto."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from llmsched_gym.cli import main as llmsched
from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.engine.records import PENDING
from llmsched_gym.evaluation import lives
from llmsched_gym.evaluation import record as recordings
from llmsched_gym.evaluation.metrics import requests_frame
from llmsched_gym.evaluation.perfetto import REQUESTS, trace, write_trace
from llmsched_gym.evaluation.record import items_of, record, segments
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.report import lives as told

WORLD = scenario("default", qps=2.0, num_requests=60, warmup_s=0.0, num_kv_blocks=1500)
"""So little memory that requests are preempted."""


@pytest.fixture(scope="module")
def recording():
    return record(WORLD, "vllm-v1", 0)


def came(recording):
    return np.flatnonzero(recording.episode.requests["phase"] != PENDING)


def life_of(recording, r):
    request = recording.episode.requests[r]
    end_s = float(request["resolved_s"])
    end_s = float(recording.episode.sim.clock_s) if math.isnan(end_s) else end_s
    return request, segments(recording, r, items_of(recording, r), float(request["arrival_s"]), end_s), end_s


def test_a_recorded_run_is_the_same_run(recording):
    plain = simulate(WORLD, "vllm-v1", 0, num_steps=100_000)
    assert recording.episode.requests.tobytes() == plain.requests.tobytes()
    assert recording.start_s == pytest.approx(plain.steps["start_s"])
    assert (recording.num_running == plain.steps["num_running"]).all()
    tokens = np.add.reduceat(recording.tokens, recording.first[:-1])
    prompt = np.add.reduceat(np.where(recording.is_prefill, recording.tokens, 0), recording.first[:-1])
    assert (tokens == plain.steps["decode_tokens"] + plain.steps["prefill_tokens"]).all()
    assert (prompt == plain.steps["prefill_tokens"]).all()
    assert recording.emitted.sum() == plain.requests["num_output_tokens"].sum()


def test_segments_are_a_whole_life(recording):
    preempted = 0
    for r in came(recording):
        request, parts, end_s = life_of(recording, r)
        assert parts[0].start_s == pytest.approx(request["arrival_s"])
        assert parts[-1].stop_s == pytest.approx(end_s)
        assert all(a.stop_s == pytest.approx(b.start_s) for a, b in pairwise(parts))
        assert all(a.kind != b.kind for a, b in pairwise(parts))
        waited = sum(p.stop_s - p.start_s for p in parts if p.kind == "queue")
        assert waited == pytest.approx(np.fmin(request["first_scheduled_s"], end_s) - request["arrival_s"], abs=1e-6)
        if request["num_preemptions"] == 0 and request["num_output_tokens"] > 0:
            assert sum(p.tokens for p in parts if p.kind == "prefill") == request["prompt_tokens"]
            assert sum(p.tokens for p in parts if p.kind == "decode") == request["num_output_tokens"] - 1
        preempted += sum(p.kind == "preempted" for p in parts)
    assert preempted > 0 and len(recording.lost) == recording.episode.requests["num_preemptions"].sum()


def test_windows_keep_what_lies_in_them(recording, monkeypatch):
    monkeypatch.setattr(recordings, "MARGIN_S", 1.0)
    monkeypatch.setattr(recordings, "SKIPPED", 4)
    request, parts, end_s = life_of(recording, 40)
    part = record(WORLD, "vllm-v1", 0, [(float(request["arrival_s"]), end_s)])
    assert 0 < len(part.start_s) < len(recording.start_s)
    assert life_of(part, 40)[1] == parts
    assert part.episode.requests.tobytes() == recording.episode.requests.tobytes()


def test_what_cannot_be_recorded_is_one_line():
    with pytest.raises(ConfigError, match="recorded"):
        record(WORLD.replace(async_lag=True), "vllm-v1", 0)


# Traces


def test_a_trace_is_of_chromes_format_and_its_slices_nest(recording, tmp_path):
    write_trace(recording, tmp_path / "trace.json")
    found = json.loads((tmp_path / "trace.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found.keys() == {"traceEvents", "displayTimeUnit", "otherData"}
    tracks: dict[tuple[int, int], list] = {}
    named = set()
    for event in found["traceEvents"]:
        assert event["ph"] in "XCMi" and isinstance(event["name"], str)
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        if event["ph"] == "M":
            named.add((event["pid"], event["tid"]))
            continue
        assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
            tracks.setdefault((event["pid"], event["tid"]), []).append(event)
        if event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())
    assert tracks.keys() <= named
    for events in tracks.values():
        open_until = [math.inf]
        for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
            while event["ts"] >= open_until[-1] - 1e-3:
                open_until.pop()
            assert event["ts"] + event["dur"] <= open_until[-1] + 1e-3, event
            open_until.append(event["ts"] + event["dur"])
    batches = [e for e in found["traceEvents"] if e["ph"] == "X" and e["pid"] == 1]
    assert len(batches) == len(recording.start_s)
    assert sum(e["args"]["prefill_tokens"] + e["args"]["decode_tokens"] for e in batches) == recording.tokens.sum()
    lives_there = [e for e in found["traceEvents"] if e["ph"] == "X" and e["pid"] == REQUESTS and "users" in e["args"]]
    assert len(lives_there) == len(came(recording))
    assert trace(recording)["otherData"]["policy"] == "vllm-v1"


def test_the_command_line_writes_a_trace_of_one_run_only(tmp_path, capsys):
    options = ["evaluate", "--policy", "vllm-v1", "--num-requests", "20", "--seeds", "1", "--workers", "1"]
    path = tmp_path / "trace.json"
    assert llmsched([*options, "--qps", "1.5", "--perfetto", str(path)]) == 0
    assert json.loads(path.read_text())["otherData"]["qps"] == 1.5
    capsys.readouterr()
    assert llmsched([*options, "--qps", "1.5,2", "--perfetto", str(path)]) == 2
    assert "perfetto: expected one policy" in capsys.readouterr().err
    path.write_text("mine")
    assert llmsched([*options, "--qps", "1.5", "--perfetto", str(path)]) == 2
    assert "file of something else" in capsys.readouterr().err and path.read_text() == "mine"
    assert llmsched([*options, "--qps", "1.5", "--perfetto", str(tmp_path / "no" / "t.json")]) == 2
    assert "no folder" in capsys.readouterr().err


# Lives


def test_the_worst_are_the_latest_in_all_by_first_token_and_by_gaps():
    requests = pd.DataFrame(
        {
            "arrival_s": [0.0, 1.0, 2.0, 3.0, math.nan],
            "ttft_s": [0.1, 5.0, 1.0, math.nan, math.nan],
            "ttft_slo_s": 0.5,
            "attained": [True, False, False, False, False],
            "lateness_s": [0.0, 4.5, 0.5, 60.0, 0.0],
            "num_late_gaps": [0, 0, 7, 0, 0],
        }
    )
    assert lives.worst(requests).index.tolist() == [3, 1, 2]
    assert lives.worst(requests.assign(attained=True)).index.tolist() == [3]
    assert lives.worst(requests[:1]).index.tolist() == [0]


def test_a_life_says_why_it_missed(recording):
    frame = requests_frame(recording.episode)
    lost = frame[(frame["num_preemptions"] > 0) & (frame["num_late_gaps"] > 0)]
    line = lost.iloc[0].to_dict()
    found = json.loads(json.dumps(lives.life(recording, "vllm-v1", line), allow_nan=False))
    assert sum(b - a for a, b, *_ in found["segments"]) == pytest.approx(found["e2e_latency_s"], abs=0.1)
    assert found["longest"]["gap_s"] == pytest.approx(line["max_itl_s"], abs=1e-3)
    assert told.spent(found)["preempted"] > 0


def made_up(**fields):
    segments = [[0.0, 4.0, "queue", 0, 0], [4.0, 5.0, "prefill", 2, 900], [5.0, 9.0, "decode", 40, 40]]
    longest = {"gap_s": 0.7, "token": 5, "batches": 1, "held": 0, "prefill_tokens": 8000, "preempted": False}
    usual = dict(policy="p", index=3, seed=0, slo_class="strict", phase="finished", prompt_tokens=900, output_tokens=41)
    usual |= dict(num_output_tokens=41, attained=False, ttft_s=5.0, ttft_slo_s=0.95, tbt_slo_s=0.1, num_late_gaps=0)
    usual |= dict(num_preemptions=0, segments=segments, batches=[[0.0, 0.1, 5]], longest=longest)
    return usual | fields


def test_sentences_on_lives():
    late = "First token after 5.00 s, SLO 0.950 s: 4.00 s in the queue (80 %), 1.00 s prefill (20 %)."
    assert told.why(made_up()) == late
    gaps = "3 gaps beyond 0.100 s, the longest 0.700 s before token 5: one batch with 8,000 prompt tokens of others."
    assert told.why(made_up(ttft_s=0.5, num_late_gaps=3)) == gaps
    assert told.why(made_up(ttft_s=0.5, attained=True)) == "In time."
    assert "nor ever (left)" in told.why(made_up(ttft_s=None, phase="abandoned"))
    held = made_up()["longest"] | {"held": 4}
    assert "held back for 4 batches" in told.why(made_up(num_late_gaps=1, longest=held))
    chosen = [made_up(policy=p, index=i) for p in "ab" for i in range(20)]
    assert len(told.shown(chosen)) == told.MOST and {life["policy"] for life in told.shown(chosen)} == {"a", "b"}
