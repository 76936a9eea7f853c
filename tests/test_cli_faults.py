"""The command line: exit codes, one line for everything that is wrong, and how it ends early."""

import os
import signal
import subprocess
import sys
import time

import pytest
from command_line import RUN, llmsched, remarks, trace

from llmsched_gym.cli import main


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "command"),
        (["frobnicate"], "frobnicate"),
        (["evaluate"], "--policy"),
        (["evaluate", "--policy", "slai", "--frobnicate"], "--frobnicate"),
        (["evaluate", "--policy", "slaii"], "did you mean 'slai'"),
        (["evaluate", "--policy", "slai,"], "policy"),
        (["evaluate", "--policy", "slai[hold"], "slai[hold"),
        (["evaluate", "--policy", "slai[budget=0]"], "budget"),
        (["evaluate", "--policy", "no_such_module:Policy"], "no_such_module"),
        (["evaluate", "--policy", "slai", "--suite", "frob"], "suite"),
        (["evaluate", "--policy", "slai", "--qps", "0"], "qps"),
        (["evaluate", "--policy", "slai", "--qps", "1.5,nan"], "qps"),
        (["evaluate", "--policy", "slai", "--qps", "-1"], "qps"),
        (["evaluate", "--policy", "slai", "--qps", "fast"], "qps"),
        (["evaluate", "--policy", "slai", "--seeds", "0"], "seeds"),
        (["evaluate", "--policy", "slai", "--seeds", "many"], "--seeds"),
        (["evaluate", "--policy", "slai", "--first-seed", "-1"], "first_seed"),
        (["evaluate", "--policy", "slai", "--num-requests", "0"], "num_requests"),
        (["evaluate", "--policy", "slai", "--jitter", "nan"], "jitter"),
        (["evaluate", "--policy", "slai", "--patience", "0"], "patience_s"),
        (["evaluate", "--policy", "slai", "--strict-share", "1.5"], "strict_share"),
        (["evaluate", "--policy", "slai", "--ttft-slo", "1,2,3"], "ttft_slo: expected one or two numbers"),
        (["evaluate", "--policy", "slai", "--tbt-slo", "fast"], "tbt_slo"),
        (["evaluate", "--policy", "slai", "--tbt-slo", "0"], "strict_tbt_slo_s"),
        (["evaluate", "--policy", "slai", "--workload", "frob"], "workload"),
        (["evaluate", "--policy", "slai", "--profile", "frob"], "profile"),
        (["evaluate", "--policy", "slai", "--tbt-rule", "frob"], "tbt_rule"),
        (["evaluate", "--policy", "slai", "--set", "frob=1"], "set: the scenario has no field 'frob'"),
        (["evaluate", "--policy", "slai", "--set", "watermark"], "FIELD=VALUE"),
        (["evaluate", "--policy", "slai", "--trace-arrivals", "keep"], "trace"),
        (["evaluate", "--policy", "slai", "--trace", "missing.csv"], "missing.csv"),
        (["evaluate", "--policy", "slai", "--trace", "missing.csv", "--workload", "sharegpt"], "workload"),
        (["evaluate", "--policy", "slai", "--out", "/dev/null/out"], "/dev/null/out"),
        (["capacity", "--policy", "slai"], "--criterion"),
        (["capacity", "--policy", "slai", "--criterion", "frob"], "criterion"),
        (["capacity", "--policy", "slai", "--criterion", "ttft.p95<=1"], "got 'ttft.p95'"),
        (["capacity", "--policy", "slai", "--criterion", "paper", "--qps", "1.5"], "qps"),
        (["capacity", "--policy", "slai", "--criterion", "paper", "--qps", "2,1"], "qps"),
        (["capacity", "--policy", "slai", "--criterion", "paper", "--router", "jsq"], "router"),
        (["capacity", "--policy", "slai", "--criterion", "paper", "--replicas", "4"], "replicas"),
        (["capacity", "--suite", "hetero", "--policy", "slai", "--criterion", "paper", "--replicas", "4"], "replicas"),
        (["capacity", "--suite", "cluster", "--policy", "slai", "--criterion", "paper", "--replicas", "x"], "replicas"),
        (["report", "missing"], "missing"),
        (["report"], "DIR"),
    ],
)
def test_one_line_and_exit_code_2(args, words, capsys):
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n") and err.count("\n") == 1 and err.startswith("llmsched: ")
    assert words in err


def test_bad_files_are_named(tmp_path, capsys):
    header, negative, profile = (tmp_path / name for name in ("header.csv", "negative.csv", "broken.json"))
    header.write_text("a,b,c\n1,2,3\n")
    profile.write_text('{"name": "broken"')
    for args, words in (
        (["--trace", str(header)], ["header.csv", "unknown header"]),
        (["--trace", trace(negative, l17="8.0,100,-5")], ["negative.csv", "line 17", "num_decode_tokens", "-5"]),
        (["--profile", str(profile)], ["broken.json"]),
        (["--out", str(header)], ["header.csv"]),
    ):
        assert main([*RUN, *args]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and all(word in err for word in words), err


def test_an_illegal_batch_is_one_line_too(tmp_path, capsys, monkeypatch):
    (tmp_path / "greedy_policy.py").write_text(
        "from llmsched_gym.engine import Batch\n"
        "class Greedy:\n"
        "    def schedule(self, view):\n"
        "        return Batch({int(r.index): 9999 for r in view.waiting})\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["evaluate", "--policy", "greedy_policy:Greedy", "--seeds", "1", "--num-requests", "5"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "rule 1" in err


def test_no_traceback_and_no_box_from_a_process():
    result = llmsched("evaluate", "--policy", "nope")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr and "─" not in result.stderr


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--set", "num_kv_blocks=3000000000"], "num_kv_blocks: expected a whole number <= 2,147,483,647"),
        (["--set", "max_num_seqs=100000000000"], "max_num_seqs: expected a whole number <= 1,048,576"),
        (["--first-seed", "99999999999999999999"], "seeds: expected at most 1,000,000, below 2**63"),
        (["--seeds", "99999999999999"], "seeds: expected at most 1,000,000, below 2**63"),
        (["--set", 'suite="x"'], "suite is no field of the scenario; use --suite"),
        (["--policy", "nosuch/"], "policy 'nosuch/': no such policy folder"),
    ],
)
def test_numbers_that_records_cannot_hold_and_the_like_are_one_line(options, line, capsys):
    given = ["evaluate", "--policy", "sarathi", "--num-requests", "5", "--qps", "1", *options]
    assert main(given) == 2
    out, err = capsys.readouterr()
    assert line in err and err.count("\n") == 1 and not out


def test_a_plot_that_cannot_be_written_is_one_line(tmp_path, capsys):
    path = tmp_path / "own.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,100,5\n1.0,100,5\n")
    assert main(["trace", str(path), "--plot", str(tmp_path / "no" / "x.png")]) == 2
    out, err = capsys.readouterr()
    assert "plot: cannot write to" in err and err.count("\n") == 1 and not out


def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen(
        [sys.executable, "-m", "llmsched_gym.cli", "suites"], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert process.communicate(timeout=60)[1] == ""


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_interrupt_is_one_line(tmp_path, workers):
    args = [
        "evaluate",
        "--policy",
        "random",
        "--suite",
        "paper",
        "--seeds",
        "50",
        "--qps",
        "2",
        "--num-requests",
        "100",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "llmsched_gym.cli", *args, "--workers", workers, "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = tmp_path / "partial" / "rows.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not lines.exists() or not lines.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, remarks(err)) == (
        130,
        "",
        "llmsched: interrupted: the same command goes on where it stopped\n",
    )
    assert not (tmp_path / "runs.parquet").exists()
