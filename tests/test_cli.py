"""The command line: what it prints where, and what its options do."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import RUN, llmsched, refuse, remarks, trace

from llmsched_gym.cli import lists, main
from llmsched_gym.cli.endings import interrupted
from llmsched_gym.cli.values import split_policies
from llmsched_gym.config import CLUSTER_SUITES, SUITES, ConfigError
from llmsched_gym.report import console, terminal


def test_slos_are_options(capsys):
    args = [
        "evaluate",
        "--policy",
        "sarathi",
        "--suite",
        "paper",
        "--qps",
        "1.6",
        "--seeds",
        "1",
        "--num-requests",
        "40",
    ]
    shares = {}
    for slos in ("", "--ttft-slo 60 --tbt-slo 9", "--ttft-slo 60 --tbt-slo 9,0.001", "--ttft-slo 0.01,0.0001"):
        assert main([*args, *slos.split(), "--json", "--workers", "1"]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        shares[slos] = row["slo_attainment_by_class"]
        if "9," in slos:
            assert row["tbt_slo_s_by_class"] == {"strict": 9.0, "relaxed": 0.001}
    unbounded, strict_only, tight = list(shares.values())[1:]
    assert unbounded == {"strict": 1.0, "relaxed": 1.0}
    assert strict_only["strict"] == 1.0 and strict_only["relaxed"] < 0.5
    assert tight["strict"] == tight["relaxed"] == 0.0


def test_json_is_all_there_is_on_stdout():
    result = llmsched(*RUN, "--json")
    assert result.returncode == 0 and remarks(result.stderr) == ""
    rows = json.loads(result.stdout, parse_constant=refuse)
    assert [(row["policy"], row["qps"], row["seed"]) for row in rows] == [("slai", 1.5, 0), ("slai", 1.5, 1)]


def test_the_table_has_one_line_per_policy_and_load(capsys):
    assert main([*RUN[:2], "slai,slai[hold=true,limit=6500]", *RUN[3:], "--qps", "1,1.5"]) == 0
    out, err = capsys.readouterr()
    assert remarks(err) == ""
    lines = [line.split() for line in out.splitlines() if line.strip().startswith("slai")]
    cells = [[name, qps] for name in ("slai", "slai[hold=true,limit=6500]") for qps in ("1", "1.5")]
    assert [line[:2] for line in lines] == [*cells, *cells]  # who is served in time, and how fast
    assert "(1/s)" in out and "TTFT (s)" in out and "every-gap" in out and "2 seeds" in out


def test_a_folder_gets_tables_and_a_report(tmp_path, capsys):
    out = tmp_path / "new" / "results"
    assert main([*RUN, "--out", str(out), "--json"]) == 0
    printed, err = capsys.readouterr()
    assert [row["policy"] for row in json.loads(printed)] == ["slai"] * 2 + ["shortest-total"] * 2
    told = [line for line in err.splitlines() if " runs after " not in line]  # which a slow machine says
    assert len(told) == 2 and "report.html" in told[0] and "--no-bound" in told[1]
    names = {path.name for path in out.iterdir()}
    assert names >= {"runs.parquet", "requests.parquet", "config.json", "report.html", "report.md"}
    assert not [name for name in names if "partial" in name]
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").stat().st_size > 1000


@pytest.mark.parametrize(
    ("named", "options", "run"),
    [
        ("slai", ["--no-bound"], ["slai"]),
        ("slai,shortest-total", [], ["slai", "shortest-total"]),
        ("shortest-total[cap=0.8],slai", [], ["shortest-total[cap=0.8]", "slai"]),
    ],
)
def test_the_bound_stays_out_when_told_to_or_named_already(tmp_path, capsys, named, options, run):
    assert main([*RUN[:2], named, *RUN[3:], *options, "--out", str(tmp_path), "--json"]) == 0
    printed, err = capsys.readouterr()
    assert list(dict.fromkeys(row["policy"] for row in json.loads(printed))) == run
    assert err.count("\n") == 1 and ("--no-bound" in (tmp_path / "report.md").read_text()) == bool(options)


def test_the_command_of_a_report_makes_the_same_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*RUN, "--strict-share", "0.3", "--out", "one"]) == 0
    command = next(line for line in Path("one/report.md").read_text().splitlines() if line.startswith("llmsched "))
    words = shlex.split(command)
    assert main([*words[1:-1], "two"]) == 0
    capsys.readouterr()
    assert Path("one/config.json").read_text() == Path("two/config.json").read_text()
    assert Path("one/report.md").read_text() == Path("two/report.md").read_text().replace("--out two", "--out one")


def test_settings_reach_the_run(tmp_path, capsys):
    given = [
        "--jitter",
        "0.1",
        "--patience",
        "inf",
        "--strict-share",
        "1",
        "--cost-scale",
        "2",
        "--tbt-rule",
        "deadline",
    ]
    args = [*RUN, *given, "--set", "num_kv_blocks=2000", "--set", "warmup_s=5", "--json"]
    assert main([*args, "--trace", trace(tmp_path / "own.csv"), "--trace-arrivals", "keep"]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert (row["jitter"], row["cost_scale"], row["tbt_rule"], row["workload"]) == (0.1, 2.0, "deadline", "own.csv")
    assert row["num_requests_by_class"] == {"strict": 20, "relaxed": 0}
    assert row["slo_attainment_by_class"]["relaxed"] is None


def test_a_trace_keeps_its_times_unless_told_otherwise(tmp_path, capsys):
    rows = "".join(f"{t},100,5\n" for t in (0.0, 0.5, 0.5, 0.5, 2.0))
    path = tmp_path / "own.csv"
    path.write_text(f"arrived_at,num_prefill_tokens,num_decode_tokens\n{rows}")
    args = ["evaluate", "--policy", "slai", "--suite", "paper", "--seeds", "10", "--num-requests", "8", "--trace"]
    assert main([*args, str(path), "--workers", "1"]) == 0
    out, err = capsys.readouterr()
    assert "2 trace" in out and "drawn" not in out and "[" not in out  # no interval over equal requests
    assert "50 % of the gaps between arrivals are 0" in err and "its 5 requests are too few for the run" in err
    assert err.count("\n") == 2
    assert main([*args, str(path), "--trace-arrivals", "poisson", "--workers", "1"]) == 0
    out, err = capsys.readouterr()
    assert "drawn" in out and "[" in out and remarks(err) == ""


def test_invalid_rows_can_be_left_out(tmp_path, capsys):
    path = tmp_path / "own.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,5,1\n1,5,0\n2,5,1\n")
    args = [
        "evaluate",
        "--policy",
        "slai",
        "--suite",
        "paper",
        "--seeds",
        "1",
        "--num-requests",
        "2",
        "--trace",
        str(path),
    ]
    assert main([*args, "--json"]) == 2
    assert "line 3, column 'num_decode_tokens'" in capsys.readouterr().err
    out = tmp_path / "out"
    assert main([*args, "--trace-invalid", "drop", "--json", "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)[0]["num_finished"] == 2
    assert "1 invalid rows were left out" in (out / "report.md").read_text()
    assert main([*args, "--trace-invalid", "ignore"]) == 2
    assert "trace_invalid: expected one of raise, drop" in capsys.readouterr().err
    assert main(["evaluate", "--policy", "slai", "--trace-invalid", "drop"]) == 2
    assert "needs --trace" in capsys.readouterr().err


def test_what_a_trace_is(tmp_path, capsys):
    path = tmp_path / "own.csv"
    rows = [(0, 10, 2), (30, 9000, 1), (90, 20, 3), (60, 30, 4), (120, 40, 5), (180, 50, 6)]
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + "".join(f"{a},{b},{c}\n" for a, b, c in rows))
    assert main(["trace", str(path), "--json", "--plot", str(tmp_path / "own.png")]) == 0
    out, err = capsys.readouterr()
    (found,) = json.loads(out, parse_constant=refuse)
    assert (found["format"], found["num_requests"], found["num_steps_back"]) == ("vidur", 6, 1)
    assert found["qps"] == pytest.approx(5 / 180) and found["peak_qps"] == 2 / 60 and found["zero_gaps"] == 0.0
    assert found["over_max_model_len"] == 1 / 6 and found["prompt_tokens_max"] == 9000.0
    assert "backwards 1 time" in err and (tmp_path / "own.png").read_bytes().startswith(b"\x89PNG")
    assert main(["trace", str(path), "--max-model-len", "10000"]) == 0
    out = capsys.readouterr().out
    assert "0.00 %" in out and "steps back in time" in out and max(map(len, out.splitlines())) <= 80
    path.write_text("num_prefill_tokens,num_decode_tokens\n3,4\n")
    assert main(["trace", str(path), "--plot", str(tmp_path / "lengths.png")]) == 0
    assert "arrivals are drawn" in capsys.readouterr().out
    assert main(["trace", str(tmp_path / "gone.csv")]) == 2


def test_tables_fit_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("llmsched_gym.report.console.PIPE_WIDTH", 80)
    args = ["--suite", "paper", "--seeds", "10", "--num-requests", "20", "--workers", "1", "--policy"]
    assert main(["evaluate", *args, "slai,faster-transformer", "--qps", "1.8"]) == 0
    assert main(["capacity", *args, "slai,sarathi", "--criterion", "attainment:0.5", "--qps", "0.5,60"]) == 0
    printed = "\n".join(capsys.readouterr())
    assert max(len(line) for line in printed.splitlines() if not line.startswith("llmsched:")) <= 80
    assert "faster-transformer" in printed and "sarathi attained" in printed  # not cut into pieces


def test_numbers_and_names_are_in_one_line_at_80_columns(capsys, monkeypatch):
    monkeypatch.setattr("llmsched_gym.report.console.PIPE_WIDTH", 80)
    assert main(["profiles"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("rtxpro6000-llama-3.1-8b-vllm ") == 2
    name = "slai[order=feasible,hold=always,budget=1024]"
    row = {"policy": name, "limited_by": "p99 TTFT of relaxed users", "note": None}
    row |= {"capacity_qps": 12.345, "ci_low": 10.316, "ci_high": 14.158}
    row |= {"ratio": 1.234, "ratio_ci_low": 1.111, "ratio_ci_high": 1.333}
    console.print_table(terminal.capacities([row]))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for figure in ("12.345", "[10.316, 14.158]", "1.234", "[1.111, 1.333]"):
        assert figure in printed
    assert "ratio to the first" in printed


@pytest.mark.parametrize("command", ["evaluate", "capacity"])
def test_help_has_an_example_that_can_be_copied(command, capsys):
    assert main([command, "--help"]) == 0
    *_, heading, example = capsys.readouterr().out.rstrip().splitlines()
    assert heading == "  Example:" and example.startswith(f"    llmsched {command} --policy slai")
    assert len(example) <= 80


def test_an_interrupt_says_how_to_go_on(monkeypatch):
    monkeypatch.setenv("LLMSCHED_SERVE_BENCH_OUT", "o")
    assert interrupted(["serve-bench"]).endswith("goes on where it stopped")
    assert interrupted(["-q", "evaluate", "--policy", "slai", "--out", "o"]).endswith("goes on where it stopped")
    assert interrupted(["evaluate", "--policy", "slai"]) == "interrupted"
    assert interrupted(["capacity", "--policy", "slai", "--out=o"]).endswith("goes on where it stopped")
    assert interrupted(["arena", "--out", "o"]).endswith("goes on where it stopped")


@pytest.mark.parametrize("command", ["train", "ppo", "tune", "search"])
def test_an_interrupt_of_a_training_names_resume_where_there_is_something_to_resume(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, out in (([command], tmp_path / "runs" / command), ([command, "--out", "o"], tmp_path / "o")):
        assert interrupted(words) == "interrupted"
        out.mkdir(parents=True)
        (out / "config.json").write_text("{}")
        assert "with --resume the same command goes on" in interrupted(words)


def test_more_memory_than_there_is_is_one_line(monkeypatch, capsys):
    def too_large(*_):
        raise MemoryError("Unable to allocate 7. TiB for an array")

    monkeypatch.setattr(lists, "find_suite", too_large)
    assert main(["suite", "paper"]) == 1
    assert capsys.readouterr().err == "llmsched: not enough memory: Unable to allocate 7. TiB for an array\n"


def test_profiles_say_what_was_measured(capsys):
    assert main(["profiles", "--json"]) == 0
    basis = {row["name"]: row["basis"] for row in json.loads(capsys.readouterr().out)}
    assert basis["rtx6000ada-mistral-7b"] == basis["h100-mistral-7b"] == "measured"
    assert basis["a100-mistral-7b"] == "linear layers measured, attention a roofline"


def test_capacity_prints_rows_and_who_was_served(capsys, tmp_path):
    args = ["capacity", "--policy", "sarathi,slai", "--suite", "paper", "--criterion", "attainment:0.9"]
    args += ["--num-requests", "100", "--seeds", "2", "--qps", "0.5,8", "--workers", "1", "--out", str(tmp_path)]
    assert main([*args, "--json"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out, parse_constant=refuse)
    assert [(row["policy"], row["criterion"]) for row in rows] == [
        ("sarathi", "attainment:0.9"),
        ("slai", "attainment:0.9"),
    ]
    for row in rows:
        assert 0.5 < row["capacity_qps"] < 8.0 and row["ci_low"] is None and row["ci_high"] is None
        assert len(row["attained_by_decile"]) == len(row["abandoned_by_decile"]) == 10
    assert rows[1]["ratio"] == pytest.approx(rows[1]["capacity_qps"] / rows[0]["capacity_qps"])
    assert "slai attained" in err and "sarathi refused" in err and "cancelled" not in err + out
    assert main(args) == 0
    assert "capacity (1/s)" in capsys.readouterr().out


def test_capacity_of_sessions_counts_cancelled_turns_and_says_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr("llmsched_gym.report.console.LINE_S", 0.0)
    args = ["capacity", "--policy", "slai", "--suite", "chat", "--criterion", "attainment:0.5"]
    assert main([*args, "--num-requests", "200", "--seeds", "1", "--qps", "0.5,1.2", "--workers", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    (row,) = json.loads(out, parse_constant=refuse)
    lost = [row[name] for name in ("refused", "abandoned", "cancelled")]
    assert row["cancelled"] > 0.0 and row["attained"] + sum(lost) <= 1.0 + 1e-9
    assert len(row["cancelled_by_decile"]) == 10 and max(row["cancelled_by_decile"]) >= row["cancelled"]
    assert "slai cancelled" in err and "llmsched: 0 of 1 runs after 0 s" in err


def test_a_capacity_outside_the_range_is_said_on_stderr(capsys):
    args = ["capacity", "--policy", "sarathi", "--suite", "paper", "--criterion", "ttft-median", "--num-requests", "20"]
    assert main([*args, "--seeds", "1", "--qps", "0.5,0.6", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)[0]["capacity_qps"] is None
    assert "sarathi" in err and "still met" in err and "sustains more than 2.01 requests/s" in err


@pytest.mark.parametrize("command", ["policies", "routers", "suites", "workloads", "profiles"])
def test_lists(command, capsys):
    assert main([command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert main([command]) == 0
    table = capsys.readouterr().out
    assert rows and all(row["name"] in table for row in rows)
    if command == "suites":
        assert [row["name"] for row in rows] == [*SUITES, *CLUSTER_SUITES]


def test_lists_are_quick_to_come():
    slow = ["pandas", "matplotlib", "scipy.stats", "pyarrow", "llmsched_gym.evaluation.grid"]
    script = (
        "import sys; from llmsched_gym.cli import main; code = main([sys.argv[1]]);"
        f"print([name for name in {slow} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    for command in ("policies", "suites", "profiles"):
        result = subprocess.run([sys.executable, "-c", script, command], capture_output=True, text=True, timeout=60)
        assert (result.returncode, result.stderr) == (0, "[]\n")


def test_brackets_keep_their_commas():
    texts = ["slai[hold=true,limit=6500],sarathi", "m:C, ./my_policy"]
    assert split_policies(texts) == ["slai[hold=true,limit=6500]", "sarathi", "m:C", "./my_policy"]
    with pytest.raises(ConfigError):
        split_policies(["slai,,edf"])


def test_prefix_caching_is_an_option_of_runs_with_sessions(capsys):
    run = ["evaluate", "--policy", "sarathi", "--qps", "0.5", "--seeds", "1", "--num-requests", "30", "--json"]
    rows = []
    for more in (["--workload", "chat"], ["--workload", "chat", "--prefix-caching"], ["--suite", "chat"]):
        assert main([*run, *more]) == 0
        rows += json.loads(capsys.readouterr().out)
    assert main([*run, "--suite", "chat", "--no-prefix-caching"]) == 0
    rows += json.loads(capsys.readouterr().out)
    assert [row["prefix_hit_rate"] is None for row in rows] == [True, False, False, True]
    assert all(row["num_sessions"] > 3 for row in rows)
