"""Measured runs: what is read, what is refused, and that a run of our own replays without any error."""

import gzip
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import TICK_S
from helpers import profile as ticking

from llmsched_gym.cli import main
from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.cost import load_profile
from llmsched_gym.evaluation.replay import LATENCIES, replay
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.workload import TraceError, TraceWarning
from llmsched_gym.workload.served_runs import CSV_COLUMNS, load_run

ROOT = Path(__file__).resolve().parents[1]
DATA_DIR = os.environ.get("LLMSCHED_DATA_DIR")
RTX = "rtx6000ada-mistral-7b"
ERRORS = ["mean_error", "p50_error", "p90_error", "p99_error", "mape"]
LIMITS = {"max_num_seqs": 24, "max_num_batched_tokens": 700, "num_kv_blocks": 1200}
"""Of the run made below: short of memory, and no default of anything."""


def csv_run(path, *rows):
    path.write_text("\n".join([",".join(CSV_COLUMNS), *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


@pytest.fixture(scope="module")
def served():
    """A run of our own vllm-v1 under LIMITS, from which files are made."""
    world = scenario("paper", qps=4.0, num_requests=120, watermark=0.0, **LIMITS)
    episode = simulate(world, "vllm-v1[budget=700]", 3)
    assert episode.sim.num_preemptions > 20 and episode.sim.num_finished == 120
    return episode


@pytest.fixture
def own_csv(served, tmp_path):
    """The run as a CSV file."""
    times = [served.requests[name].tolist() for name in ("arrival_s", "first_scheduled_s", "first_token_s")]
    times.append(served.requests["last_token_s"].tolist())
    lengths = served.table.prompt_tokens, served.table.output_tokens
    return csv_run(tmp_path / "own.csv", *zip(*lengths, *times, strict=True))


@pytest.fixture
def own_bench(served):
    """The run as `vllm bench serve` would save it, two failed requests among the others."""
    requests = served.requests
    first_s, last_s = requests["first_token_s"], requests["last_token_s"]
    found = {
        "backend": "vllm",
        "request_rate": 4.0,
        "input_lens": served.table.prompt_tokens.tolist(),
        "output_lens": served.table.output_tokens.tolist(),
        "ttfts": (first_s - requests["arrival_s"]).tolist(),
        "itls": [[gap_s / 4, 3 * gap_s / 4] if gap_s else [] for gap_s in (last_s - first_s).tolist()],
        "start_times": (353399.7 + requests["arrival_s"]).tolist(),
        "generated_texts": [""] * len(requests),
        "errors": [""] * len(requests),
    }
    failed = {"input_lens": 50, "output_lens": 0, "ttfts": 0.0, "itls": [], "start_times": 353400.0, "errors": "Bad"}
    for place, change in ((7, {}), (60, {"errors": ""})):
        for key, value in (failed | change).items():
            found[key].insert(place, value)
    return found


# What is read


def test_a_csv_file_is_sorted_by_arrival_and_starts_at_0(tmp_path):
    path = csv_run(tmp_path / "run.csv", (5, 3, 12.5, 12.5, 13, 14), (7, 1, 10, 10.25, 11, 11))
    for file in (path, tmp_path / "run.csv.gz"):
        if file.suffix == ".gz":
            file.write_bytes(gzip.compress(path.read_bytes()))
        run = load_run(file)
        assert run.row.tolist() == [3, 2] and run.prompt_tokens.tolist() == [7, 5] and run.num_failed == 0
        assert run.arrival_s.tolist() == [0.0, 2.5] and run.queue_time_s.tolist() == [0.25, 0.0]
        assert run.ttft_s.tolist() == [1.0, 0.5] and run.e2e_latency_s.tolist() == [1.0, 1.5] and run.end_s == 4.0
        assert math.isnan(run.tpot_s[0]) and run.tpot_s[1] == 0.5


def test_failed_requests_of_a_benchmark_are_left_out_and_counted(own_bench, served, tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(own_bench))
    with pytest.warns(TraceWarning, match=r"bench\.json: 2 of its 122 requests failed"):
        run = load_run(path)
    assert (len(run), run.num_failed) == (120, 2) and 7 not in run.row and 60 not in run.row
    assert np.array_equal(run.output_tokens, served.table.output_tokens)
    assert run.end_s == pytest.approx(np.max(served.requests["last_token_s"]) - served.table.arrival_s[0], abs=1e-6)


@pytest.mark.parametrize(
    ("line", "row", "words"),
    [
        (3, "100,5,1,1,2", "line 3, column 'last_token_s': more or fewer fields"),
        (3, "100,5,1,1,2,3,4", "line 3, column 'last_token_s': more or fewer fields"),
        (3, "0,5,1,1,2,3", "line 3, column 'input_toks': expected a whole number >= 1, got '0'"),
        (2, "100,2.5,1,1,2,3", "line 2, column 'output_toks': expected a whole number >= 1, got '2.5'"),
        (2, "1_0,5,1,1,2,3", "line 2, column 'input_toks'"),
        (2, "100,3000000000,1,1,2,3", "line 2, column 'output_toks'"),
        (2, "100,5,nan,1,2,3", "line 2, column 'queued_s': expected a time in seconds, at most 1e+11, got 'nan'"),
        (2, "100,5,1,,2,3", "line 2, column 'scheduled_s': expected a time in seconds, not before queued_s"),
        (2, "100,5,1,0.5,2,3", "line 2, column 'scheduled_s'"),
        (2, "100,5,1,1,2,1e300", "line 2, column 'last_token_s': expected a time in seconds, not before first_token_s"),
        (2, "100,5,-1e300,1,2,3", "line 2, column 'queued_s': expected a time in seconds, at most 1e+11, got '-1e300'"),
        (2, "100,5,0,1e-320,1e-310,1", "line 2, column 'first_token_s': expected a time after queued_s, got '1e-310'"),
        (2, "100,5,0,1,2,2e8", "expected a run of at most 1e+08 s, got 2e+08 s up to line 2 of run.csv"),
        (1, "input_toks,output_toks,queued_s,scheduled_s,first_token_s,last_token_s,input_toks", "is there 2 times"),
        (2, "100,5,1,1,1,3", "line 2, column 'first_token_s': expected a time after queued_s, got '1'"),
        (2, "100,5,1,1,3,2", "line 2, column 'last_token_s': expected a time in seconds, not before first_token_s"),
        (1, "input_toks,output_toks,queued_s,scheduled_s,first_token_s", "line 1: no column 'last_token_s'"),
    ],
)
def test_bad_rows_are_one_line(line, row, words, tmp_path, capsys):
    path = csv_run(tmp_path / "run.csv", (100, 5, 0, 0, 1, 2), (100, 5, 0, 0, 1, 2))
    lines = path.read_text().splitlines()
    lines[line - 1] = row
    path.write_text("\n".join(lines))
    check_refused(path, words, capsys)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"start_times": None}, "no 'start_times', without which nobody knows when requests arrived"),
        ({"itls": None}, "no 'itls': expected what `vllm bench serve --save-result --save-detailed` writes"),
        ({"ttfts": [0.1]}, "'ttfts': expected a list of 2 values, one for each request, got 1"),
        ({"input_lens": 3}, "'input_lens': expected a list"),
        ({"ttfts": [0.1, 0.0]}, "'ttfts', request 1: expected seconds from 1e-06 to 1e+08, got 0.0"),
        ({"itls": [[0.1], [0.1, -1.0]]}, "'itls', request 1: expected a list of seconds from 0 to 1e+08"),
        ({"itls": [0.1, [0.1]]}, "'itls', request 0: expected a list of seconds from 0 to 1e+08, got 0.1"),
        ({"start_times": [True, 1.0]}, "'start_times', request 0: expected a time in seconds, at most 1e+11, got True"),
        ({"start_times": [1e300, 1.0]}, "'start_times', request 0: expected a time in seconds, at most 1e+11"),
        ({"ttfts": [1e300, 1.0]}, "'ttfts', request 0: expected seconds from 1e-06 to 1e+08, got 1e+300"),
        ({"output_lens": [2, 2.5]}, "'output_lens', request 1: expected a whole number >= 1, got 2.5"),
        ({"errors": ["Bad", "Bad"]}, "2 requests, and all failed"),
        ({name: [] for name in ("input_lens", "output_lens", "start_times", "ttfts", "itls", "errors")}, "no requests"),
    ],
)
def test_bad_benchmarks_are_one_line(change, words, tmp_path, capsys):
    data = {"input_lens": [9, 9], "output_lens": [2, 2], "start_times": [1.0, 2.0], "ttfts": [0.1, 0.1]}
    data |= {"itls": [[0.1], [0.1]], "errors": ["", ""]} | change
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    check_refused(path, words, capsys)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        ("a,b\n1,2\n", "line 1: no column 'input_toks'"),
        (",".join(CSV_COLUMNS) + "\n", "no rows behind the header"),
        ('{"input_lens": [1,\n2', "line 2, column 2: not JSON"),
        ('{"date": "a"}\n{"date": "b"}', "line 2: expected the result of one run, got several"),
        ("[1, 2]", "expected a JSON object, got [1, 2]"),
        ("[" * 100_000, "not JSON"),
        (b"\xff\xfe\x00", "not a text file"),
    ],
)
def test_what_is_no_run_is_one_line(text, words, tmp_path, capsys):
    path = tmp_path / "run"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    check_refused(path, words, capsys)


def test_a_file_that_is_not_there_is_one_line(tmp_path, capsys):
    check_refused(tmp_path / "gone.csv", "cannot read", capsys)


def check_refused(path, words, capsys):
    with pytest.raises(TraceError):
        load_run(path)
    assert main(["replay", str(path), "--profile", RTX]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and str(path) in err and words in err, err


# What is simulated, and compared


def test_a_run_of_our_own_has_no_error(own_csv, served):
    result = replay(load_run(own_csv), "vllm-v1", RTX, **LIMITS)
    assert result.episode.sim.num_preemptions == served.sim.num_preemptions
    assert np.array_equal(result.episode.requests["num_preemptions"], served.requests["num_preemptions"])
    errors = result.errors()
    assert list(errors) == ["ttft", "tpot", "e2e", "end_error"] and list(errors["e2e"]) == ERRORS
    for error in (errors["end_error"], *(errors[latency][name] for latency in LATENCIES for name in ERRORS)):
        assert abs(error) < 1e-9


@pytest.mark.filterwarnings("ignore::llmsched_gym.workload.traces.TraceWarning")
def test_the_same_run_as_a_benchmark_has_none_either(own_bench, tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(own_bench))
    result = replay(load_run(path), "vllm-v1", RTX, **LIMITS)
    errors = result.errors()
    assert all(errors[latency]["mape"] < 1e-5 for latency in LATENCIES) and abs(errors["end_error"]) < 1e-6
    assert np.isnan(result.measured.queue_time_s).all() and not np.isnan(result.simulated.queue_time_s).any()


@pytest.mark.parametrize(("limit", "other"), [("max_num_seqs", 4), ("max_num_batched_tokens", 300)])
def test_every_limit_counts(own_csv, limit, other):
    result = replay(load_run(own_csv), "vllm-v1", RTX, **{**LIMITS, limit: other})
    assert result.errors()["ttft"]["mape"] > 0.01


def test_blocks_count_and_are_the_profiles_unless_given(own_csv):
    result = replay(load_run(own_csv), "vllm-v1", RTX, max_num_seqs=24, max_num_batched_tokens=700)
    assert result.episode.sim.num_preemptions == 0 and result.errors()["e2e"]["mape"] > 0.01
    assert result.episode.sim.total_blocks == load_profile(RTX).num_kv_blocks


@pytest.mark.parametrize(
    ("policy", "given", "budget", "chunks"),
    [
        ("vllm-v1", None, 2048, 3),  # vLLM's own on this device
        ("vllm-v1", 1000, 1000, 5),
        ("vllm-v1", 16_384, 16_384, 1),  # above the engine's usual limit
        ("vllm-v1[budget=512]", 1000, 512, 10),
        ("vllm-v1[budget=2000]", 1000, 1000, 5),
        ("sarathi", 1000, 512, 10),
    ],
)
def test_the_token_budget_is_the_runs(policy, given, budget, chunks, tmp_path):
    own = tmp_path / "ticking.json"
    ticking(kv_blocks=1000).to_json(own)
    run = load_run(csv_run(tmp_path / "run.csv", (5000, 2, 0, 0, 1, 2)))
    result = replay(run, policy, str(own), max_num_batched_tokens=given)
    assert result.token_budget == budget
    assert result.simulated.ttft_s.tolist() == [chunks * TICK_S]


def test_errors_by_hand(tmp_path):
    """Every batch takes a tick; measured times are twice and four times as long, and a lone token has no TPOT."""
    own, t = tmp_path / "ticking.json", TICK_S
    ticking().to_json(own)
    path = csv_run(
        *(tmp_path / "run.csv", (16, 3, 0, 0, 2 * t, 6 * t), (16, 2, 64 * t, 64 * t, 68 * t, 70 * t)),
        (16, 1, 128 * t, 128 * t, 129 * t, 129 * t),
    )
    errors = replay(load_run(path), "vllm-v1", str(own)).errors()
    # TTFT 1, 1, 1 ticks for 2, 4, 1; TPOT 1, 1 for 2, 2; E2E 3, 2, 1 for 6, 6, 1
    assert errors["ttft"]["mean_error"] == pytest.approx(3 / 7 - 1)
    assert errors["ttft"]["p50_error"] == pytest.approx(1 / 2 - 1)
    assert errors["ttft"]["mape"] == pytest.approx((0.5 + 0.75 + 0.0) / 3)
    assert errors["tpot"] == pytest.approx(dict.fromkeys(ERRORS[:4], -0.5) | {"mape": 0.5})
    assert errors["e2e"]["mean_error"] == pytest.approx(6 / 13 - 1)
    assert errors["e2e"]["mape"] == pytest.approx((0.5 + 4 / 6) / 3)
    assert errors["end_error"] == 0.0


def test_without_a_tpot_its_errors_are_none(tmp_path, capsys):
    path = csv_run(tmp_path / "run.csv", (16, 1, 0, 0, 1, 1), (16, 4, 0, 0, 1, 1))
    assert main(["replay", str(path), "--profile", RTX, "--json", "--max-error", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["tpot"] == dict.fromkeys(ERRORS)
    assert main(["replay", str(path), "--profile", RTX, "--out", str(tmp_path / "out")]) == 0
    assert "TPOT" not in capsys.readouterr().out and (tmp_path / "out" / "replay.png").exists()


@pytest.mark.parametrize("policy", ["sarathi", "slai", "on-time", "shortest-total", "learned", "vllm-v0"])
def test_others_can_have_served_it(policy, own_csv):
    result = replay(load_run(own_csv), policy, RTX, num_kv_blocks=1200)
    assert not np.isnan(result.simulated.e2e_latency_s).any() and (result.simulated.ttft_s > 0.0).all()


# The command


def test_json_is_all_there_is_on_stdout_and_errors_decide_the_status(own_csv, capsys):
    args = ["replay", str(own_csv), "--profile", RTX, "--max-num-seqs", "24", "--json"]
    args += ["--max-num-batched-tokens", "700", "--kv-blocks"]
    assert main([*args, "1200", "--max-error", "1e-9"]) == 0
    assert capsys.readouterr().err == ""
    assert main([*args, "2000"]) == 0
    out, err = capsys.readouterr()
    errors = json.loads(out)
    assert set(errors) == {"ttft", "tpot", "e2e", "end_error"} and err == ""
    assert all(list(errors[latency]) == ERRORS for latency in LATENCIES)
    means = {latency: abs(errors[latency]["mean_error"]) for latency in LATENCIES}
    assert main([*args, "2000", "--max-error", repr(max(means.values()))]) == 0  # as large is not larger
    capsys.readouterr()
    worst = max(means, key=means.get)
    assert main([*args, "2000", "--max-error", repr(0.999 * means[worst])]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == errors and err.startswith(f"llmsched: the mean of {worst} is off by")
    assert err.count("\n") == sum(mean > 0.999 * means[worst] for mean in means.values())


def test_a_folder_gets_requests_side_by_side_and_a_plot(own_csv, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert main(["replay", str(own_csv), "--profile", RTX, "--kv-blocks", "2000", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80 and "TPOT (ms)" in printed and "2,000 KV blocks" in printed
    assert sorted(path.name for path in out.iterdir()) == ["replay.png", "requests.csv"]
    header, *rows = [line.split(",") for line in (out / "requests.csv").read_text().splitlines()]
    own = [line.split(",") for line in own_csv.read_text().splitlines()]
    assert len(rows) == 120
    for row in rows:
        values = dict(zip(header, row, strict=True))
        line = own[int(values["row"]) - 1]
        assert [values["prompt_tokens"], values["output_tokens"]] == line[:2]
        assert float(values["measured_e2e_latency_s"]) == pytest.approx(float(line[5]) - float(line[2]))
        assert float(values["simulated_ttft_s"]) > 0.0
    assert (out / "replay.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kv-blocks", "3"], "num_kv_blocks: expected at least"),
        (["--kv-blocks", "0"], "num_kv_blocks: expected a whole number >= 1, got 0"),
        (["--max-num-seqs", "0"], "max_num_seqs: expected a whole number >= 1, got 0"),
        (["--max-num-batched-tokens", "0"], "max_num_batched_tokens: expected a whole number >= 1, got 0"),
        (["--max-num-batched-tokens", "many"], "--max-num-batched-tokens"),
        (["--max-error", "-0.1"], "max_error: expected a fraction >= 0, got -0.1"),
        (["--max-error", "nan"], "max_error: expected a fraction >= 0, got nan"),
        (["--policy", "vllm-v1,slai"], "policy: expected one name, got 'vllm-v1,slai'"),
        (["--policy", "vllm-v2"], "did you mean"),
        (["--profile", "gone.json"], "gone.json: cannot read"),
        (["--out", "/dev/null/out"], "/dev/null/out"),
    ],
)
def test_bad_options_are_one_line(options, words, own_csv, capsys):
    assert main(["replay", str(own_csv), "--profile", RTX, *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err, err


def test_too_few_blocks_name_the_request(tmp_path):
    run = load_run(csv_run(tmp_path / "run.csv", (16, 1, 0, 0, 1, 1), (170, 7, 0, 0, 1, 2)))
    assert replay(run, "vllm-v1", RTX, num_kv_blocks=12).episode.sim.num_finished == 2
    with pytest.raises(ConfigError, match=r"at least 12, for the 177 tokens of line 3 of run\.csv, got 11"):
        replay(run, "vllm-v1", RTX, num_kv_blocks=11)


def test_errors_beyond_measure_still_fit_into_80_columns(tmp_path, capsys):
    path = csv_run(tmp_path / "run.csv", (12, 3, 0, 0, 1e-6, 2e-6), (12, 3, 9e7, 9e7, 9.5e7, 9.9e7))
    assert main(["replay", str(path), "--profile", RTX]) == 0
    out = capsys.readouterr().out
    assert "e+0" in out and max(map(len, out.splitlines())) <= 80


def test_one_of_everything_is_in_the_singular(tmp_path, capsys):
    path = csv_run(tmp_path / "run.csv", (12, 3, 0, 0, 1, 2))
    limits = ["--max-num-seqs", "1", "--max-num-batched-tokens", "1", "--kv-blocks", "1"]
    assert main(["replay", str(path), "--profile", RTX, *limits]) == 0
    title = [line.strip() for line in capsys.readouterr().out.splitlines()[:3]]
    assert title == ["run.csv: 1 request", f"vllm-v1, {RTX}", "1 sequence, 1 token a batch, 1 KV block"]


# The documentation, and a real run


def test_the_example_of_the_page_is_what_the_command_prints(tmp_path, monkeypatch, capsys):
    blocks = dict(re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "docs" / "replay.md").read_text(), re.M | re.S))
    (tmp_path / "run.csv").write_text(blocks["csv"])
    monkeypatch.chdir(tmp_path)
    assert main(blocks["sh"].split()[1:]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert printed[: len(blocks["text"].splitlines())] == blocks["text"].splitlines()
    exec(compile(blocks["python"], "replay.md", "exec"), {})
    assert "measured_ttft_s" in capsys.readouterr().out


def test_a_measured_run():
    """300 requests on a real vLLM: an additive profile of its GPU's order comes near, another GPU's does not."""
    path = Path(DATA_DIR or "", "facts", "vllm_runs", "RTXPRO6000", "run_RTXPRO6000_llama31_8b.csv")
    if not DATA_DIR or not path.exists():
        pytest.skip(f"needs {path.name} below the folder named by LLMSCHED_DATA_DIR")
    run = load_run(path)
    assert (len(run), run.num_failed) == (300, 0) and run.arrival_s[0] == 0.0
    # its first row, by hand
    assert run.ttft_s[0] == pytest.approx(0.169525) and run.e2e_latency_s[0] == pytest.approx(15.713402)
    assert run.tpot_s[0] == pytest.approx((15.713402 - 0.169525) / 530)
    limits = {"max_num_seqs": 128, "max_num_batched_tokens": 2048, "num_kv_blocks": 32_600}
    result = replay(run, "vllm-v1", RTX, **limits)
    assert result.episode.sim.num_finished == 300 and result.episode.sim.num_preemptions == 0
    assert result.token_budget == 2048 and result.episode.sim.max_num_seqs == 128
    # twice its bandwidth: the RTX 6000 Ada takes longer for everything
    assert all(result.errors()[latency]["mean_error"] > 0.2 for latency in LATENCIES)
    assert 0.0 < result.errors()["end_error"] < 1.0
