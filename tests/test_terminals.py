"""Terminals that are not UTF-8, streams that are closed, and folders that two processes want."""

import io
import os
import shutil
import subprocess
import sys
import time
from functools import cache

import pytest
from rich.console import Console

from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.cost import load_profile
from llmsched_gym.evaluation.grid import evaluate
from llmsched_gym.evaluation.store import lock_folder
from llmsched_gym.report.terminal import comparison
from llmsched_gym.scheduler import PolicyError, make_scheduler
from llmsched_gym.workload.traces import cached_trace

RUN = ["evaluate", "--policy", "slai", "--suite", "paper", "--num-requests", "20", "--qps", "1.0", "--seeds", "1"]
ASCII = {"PYTHONIOENCODING": "ascii"}
C_LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def shell(*arguments, redirect="", **environment):
    line = f'exec "{sys.executable}" -m llmsched_gym.cli "$@" {redirect}'
    env = {k: v for k, v in os.environ.items() if k not in ("LC_ALL", "LANG", "PYTHONIOENCODING")} | environment
    command = ["sh", "-c", line, "sh", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env=env, timeout=300)


@cache
def wide(*command):
    return shell(*command, PYTHONIOENCODING="utf-8").stdout.decode().splitlines()


@pytest.mark.parametrize("environment", [ASCII, C_LOCALE], ids=["ascii", "C"])
@pytest.mark.parametrize("command", [["suites"], ["policies"], ["workloads"], ["profiles"], ["evaluate", "--help"]])
def test_lists_fall_back_to_ascii(command, environment):
    done = shell(*command, **environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode("ascii").splitlines()
    if "--help" not in command:
        assert [len(line) for line in lines] == [len(line) for line in wide(*command)]  # columns stay in line
        assert any(set(line.strip()) == {"-"} for line in lines)


@pytest.mark.parametrize("environment", [ASCII, C_LOCALE], ids=["ascii", "C"])
def test_a_report_is_not_lost_to_a_terminal(tmp_path, environment):
    done = shell(*RUN, "--out", tmp_path / "r", **environment)
    assert done.returncode == 0, done.stderr
    done.stdout.decode("ascii")
    assert (tmp_path / "r" / "report.html").stat().st_size > 1000 and (tmp_path / "r" / "report.md").exists()


def test_a_report_is_not_lost_to_a_closed_stdout(tmp_path):
    done = shell(*RUN, "--out", tmp_path / "r", redirect=">&-")
    assert done.returncode == 1 and b"llmsched: stdout is closed" in done.stderr and b"Traceback" not in done.stderr
    assert (tmp_path / "r" / "report.html").exists()
    full = shell(*RUN, "--out", tmp_path / "s", redirect=">/dev/full")
    assert full.returncode == 1 and b"llmsched: stdout: No space left on device\n" in full.stderr
    assert b"Exception ignored" not in full.stderr and (tmp_path / "s" / "report.html").exists()


@pytest.mark.parametrize(
    ("redirect", "code", "out", "err"),
    [
        (">&-", 1, b"", b"llmsched: stdout is closed: there is nowhere to print to\n"),
        ("2>&-", 0, None, b""),
        ("<&- 2>&-", 0, None, b""),
        (">&- 2>&-", 1, b"", b""),
    ],
)
def test_closed_streams_are_one_line_at_most(redirect, code, out, err):
    done = shell("policies", "--json", redirect=redirect)
    assert (done.returncode, done.stderr) == (code, err)
    assert (b'"slai"' in done.stdout) if out is None else done.stdout == out


def test_a_closed_stderr_does_not_speak_on_stdout(tmp_path):
    done = shell(*RUN, "--json", "--out", tmp_path / "r", redirect="2>&-")
    assert done.returncode == 0 and done.stdout.startswith(b"[\n{") and done.stdout.endswith(b"}\n]\n")


HOLD = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from llmsched_gym.evaluation.store import lock_folder\n"
    "lock_folder(Path(sys.argv[1]))\n"
    "print('held', flush=True)\n"
    "time.sleep(300)\n"
)


def test_the_second_process_on_a_folder_says_why_it_stops(tmp_path):
    out = tmp_path / "r"
    out.mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE) as first:
        try:
            assert first.stdout.readline() == b"held\n"
            done = shell(*RUN, "--out", out)
            assert done.returncode == 2 and done.stdout == b""
            assert done.stderr.decode().splitlines()[-1] == (
                f"llmsched: out: another process is writing to {out}; wait for it, or choose another folder"
            )
            assert sorted(path.name for path in out.iterdir()) == []
        finally:
            first.kill()  # a crash: nothing is tidied up
    assert shell(*RUN, "--out", out).returncode == 0


def test_a_folder_is_free_after_its_run_and_after_an_error(tmp_path):
    world = scenario("paper", qps=1.0, num_requests=5)
    rows = evaluate(world, ["slai"], seeds=1, out=tmp_path)
    for _ in range(2):
        with pytest.raises(ConfigError, match="another configuration"):
            evaluate(world, ["slai"], seeds=2, out=tmp_path)
    assert evaluate(world, ["slai"], seeds=1, out=tmp_path) == rows
    held = lock_folder(tmp_path)
    with pytest.raises(ConfigError, match="another process is writing"):
        evaluate(world, ["slai"], seeds=1, out=tmp_path)
    os.close(held)
    assert evaluate(world, ["slai"], seeds=1, out=tmp_path) == rows


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("C:/runs/policy", "no such policy folder"),
        (r"C:\runs\policy", "no such policy folder"),
        ("./runs/pol:icy", "no such policy folder"),
        ("~/policy", "no such policy folder"),
        ("runs/policy[decision_s=0]", "no such policy folder"),
    ],
)
def test_a_mistyped_path_is_no_module(name, words):
    with pytest.raises(PolicyError, match=words) as error:
        make_scheduler(name)
    assert "\n" not in str(error.value) and "import" not in str(error.value)


def test_a_file_is_no_policy_folder(tmp_path):
    (tmp_path / "policy.json").write_text("{}")
    with pytest.raises(PolicyError, match="expected a policy folder, got a file"):
        make_scheduler(f"{tmp_path}/policy.json")


def lengths(*rows):
    return "num_prefill_tokens,num_decode_tokens\n" + "".join(f"{p},{d}\n" for p, d in rows)


def test_the_trace_cache_sees_another_file(tmp_path, monkeypatch):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, prompt in ((a, 100), (b, 200)):
        folder.mkdir()
        (folder / "t.csv").write_text(lengths((prompt, 5)))
    os.utime(a / "t.csv", ns=(10**18, 10**18))
    os.utime(b / "t.csv", ns=(10**18, 10**18))
    monkeypatch.chdir(a)
    assert cached_trace("t.csv").prompt_tokens[0] == 100
    assert cached_trace("t.csv") is cached_trace("t.csv")
    monkeypatch.chdir(b)
    assert cached_trace("t.csv").prompt_tokens[0] == 200  # a relative path after a change of folder
    time.sleep(0.02)
    shutil.copy2(a / "t.csv", b / "t.csv")  # cp -p: the same time and size
    assert cached_trace("t.csv").prompt_tokens[0] == 100


def test_the_profile_cache_sees_another_file(tmp_path, monkeypatch):
    for name, factor in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        load_profile("a100-mistral-7b").scaled(factor).to_json(tmp_path / name / "p.json")
        os.utime(tmp_path / name / "p.json", ns=(10**18, 10**18))
    monkeypatch.chdir(tmp_path / "a")
    first = load_profile("p.json").overhead_ms
    monkeypatch.chdir(tmp_path / "b")
    assert load_profile("p.json").overhead_ms == 2.0 * first


def test_tables_of_sessions_fit_a_terminal():
    rows = evaluate(scenario("chat", num_requests=60, warmup_s=0.0), ["shortest-total"], qps=[0.5], seeds=2)
    shown = Console(width=80, record=True, file=io.StringIO(), highlight=False, markup=False)
    for table in comparison(rows):
        shown.print(table)
    text = shown.export_text()
    assert text.count("shortest-total") == 4  # in each table on one line
    (cached,) = {round(100 * sum(row["prefix_hit_rate"] for row in rows) / 2, 1)}
    assert f"{cached:.1f}" in text.split("at first admissions")[1]
    without = comparison(evaluate(scenario("default", num_requests=20), ["sarathi"], qps=[0.5], seeds=1))
    assert len(without) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
@pytest.mark.parametrize("command", [["profiles"], ["roofline", "qwen2.5-7b", "l40s"]], ids=" ".join)
def test_sentences_below_a_table_are_wrapped_between_words(command):
    import pty

    ours, theirs = pty.openpty()
    line = [sys.executable, "-m", "llmsched_gym.cli", *command]
    done = subprocess.run(line, stdout=theirs, env={**os.environ, "COLUMNS": "60", "NO_COLOR": "1"}, timeout=100)
    os.close(theirs)
    text = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.returncode == 0
    last = text.rstrip().splitlines()[-4:]
    assert max(map(len, last)) <= 60 and all(not line.startswith(" ") for line in last)
