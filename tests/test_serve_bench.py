"""`llmsched serve-bench`: rows and reports as of evaluate, labels beside each other, one line for what is wrong."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer

pytest.importorskip("aiohttp")
pytest.importorskip("prometheus_client")

from fake_server import FakeServer, Plan

from llmsched_gym.cli import app, main
from llmsched_gym.config import scenario
from llmsched_gym.evaluation.store import read_rows
from llmsched_gym.serving.saved import read_saved
from llmsched_gym.workload import make_table

TRACE_ROWS = [(0.04 * i, 20 + i, 3 + i % 9) for i in range(24)]


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "short.csv"
    lines = ["arrived_at,num_prefill_tokens,num_decode_tokens"] + [f"{a},{p},{o}" for a, p, o in TRACE_ROWS]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def arguments(trace, out, label="stock", **more):
    options = {"label": label, "trace": trace, "trace-arrivals": "poisson", "qps": 40, "num-requests": 20, "seeds": 2}
    options |= {"out": out} | more
    fields = "warmup_s=0 arrivals_continue=false ttft_slo_s=1.5 strict_tbt_slo_s=1 relaxed_tbt_slo_s=2"
    words = ["serve-bench", *(word for field in fields.split() for word in ("--set", field))]
    return [*words, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def compared(trace, tmp_path_factory):
    """A folder with a quick server and a slow one, and what its commands printed."""
    out = tmp_path_factory.mktemp("compared") / "out"
    for label, plan in {"stock": Plan(0.05, 0.004), "slow": Plan(2.0, 0.004)}.items():
        with FakeServer(plan) as fake:
            assert main([*arguments(trace, out, label, url=fake.url), "--check-metrics", "--send-slos"]) == 0
    return out


def test_two_servers_are_paired_on_the_same_requests(compared, trace):
    rows = read_rows(compared)
    assert [(row["policy"], row["seed"]) for row in rows] == [("stock", 0), ("stock", 1), ("slow", 0), ("slow", 1)]
    requests = pd.read_parquet(compared / "requests.parquet")
    world = scenario("default", trace=trace, trace_arrivals="poisson", qps=40.0, num_requests=20, warmup_s=0.0)
    for seed in (0, 1):
        table = make_table(world, seed)
        for label in ("stock", "slow"):
            own = requests[(requests.policy == label) & (requests.seed == seed)]
            assert own.prompt_tokens.tolist() == table.prompt_tokens[:20].tolist()
            assert own.output_tokens.tolist() == table.output_tokens[:20].tolist()
            assert np.allclose(own.arrival_s - own.sent_late_s, table.arrival_s[:20])
            assert (own.sent_late_s >= 0.0).all() and (own.reason == "").all()
    assert [row["num_attained"] for row in rows] == [20, 20, 0, 0]  # TTFT SLOs are 1.51 s
    assert all(
        row["metrics_agree"] is not None and row["backend"] == "server" and row["model"] == "fake" for row in rows
    )
    assert all(row["num_preemptions"] is None and row["mean_batch_s"] is None for row in rows)
    itl = pd.read_parquet(compared / "itl.parquet")
    assert set(itl.policy) == {"stock", "slow"} and len(itl) == 2 * 400 * itl.slo_class.nunique()


def test_rows_have_all_columns_of_evaluate(compared, trace, tmp_path):
    args = ["evaluate", "--policy", "sarathi", "--trace", trace, "--num-requests", "5", "--seeds", "1", "--no-bound"]
    assert main([*args, "--set", "warmup_s=0", "--out", str(tmp_path / "sim")]) == 0
    simulated = read_rows(tmp_path / "sim")[0]
    assert set(simulated) <= set(read_rows(compared)[0])
    columns = pd.read_parquet(tmp_path / "sim" / "requests.parquet").columns
    assert set(columns) <= set(pd.read_parquet(compared / "requests.parquet").columns)


def test_the_report_says_how_was_measured_and_is_written_again(compared, capsys):
    (compared / "report.md").unlink()
    assert main(["report", str(compared)]) == 0
    text = (compared / "report.md").read_text()
    for words in (
        "every chunk says how many it carries (usage)",
        "| Sent behind plan | p50",
        "| Round trip |",
        "stock: fake, version 1.2.3; prompts are token ids",
        "/metrics of slow, seed 1 | TTFT: p50 20",
        "llmsched serve-bench",
    ):
        assert words in text, words
    for words in ("KV blocks", "Cost profile", "max_num_seqs"):
        assert words not in text.split("## ")[0], words


def test_a_label_is_a_folder_of_results_and_complete_ones_are_not_run_again(compared, trace, capsys):
    assert main(["report", str(compared / "servers" / "stock")]) == 0
    before = read_rows(compared)
    with FakeServer(Plan(0.05, 0.004)) as fake:
        assert main([*arguments(trace, compared, url=fake.url), "--send-slos"]) == 0
        assert len(fake.logs) == 1  # the probe
    assert read_rows(compared) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": "other", "qps": 30}, "its label 'slow' was measured with another qps"),
        ({"label": "other", "strict-share": 0.5}, "its label 'slow' was measured with another strict_share"),
        ({"set": "patience_s=9"}, "its label 'slow' was measured with another patience_s"),
    ],
)
def test_a_folder_takes_no_other_requests(compared, trace, capsys, change, words):
    options = {name.replace("_", "-"): value for name, value in change.items()}
    with FakeServer() as fake:
        assert main([*arguments(trace, compared, **{"url": fake.url} | options), "--send-slos"]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_label_goes_on_where_it_stopped(trace, tmp_path):
    out = tmp_path / "out"
    with FakeServer(Plan(1.0, 0.002)) as fake:
        args = arguments(trace, out, url=fake.url, seeds=4)
        process = subprocess.Popen(
            [sys.executable, "-m", "llmsched_gym.cli", *args], stderr=subprocess.PIPE, text=True, env={**os.environ}
        )
        lines = out / "servers" / "stock" / "partial" / "rows.jsonl"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (lines.exists() and len(lines.read_text().splitlines()) >= 1):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=30)[1]
        assert process.returncode == 130 and error.strip().splitlines()[-1].startswith(
            "llmsched: interrupted: the same command"
        ), error
        kept = [json.loads(line) for line in lines.read_text().splitlines()]
        assert 1 <= len(kept) < 4
        assert not (out / "runs.parquet").exists()
        # what is left is run, what is there is kept
        config = json.loads((out / "servers" / "stock" / "config.json").read_text())
        assert config["seeds"] == 4
        before = len(fake.logs)
        fake.plan = Plan(0.001, 0.0)
        assert main(args) == 0
        rows = read_rows(out)
        assert [row["seed"] for row in rows] == list(range(4))
        assert [row["ttft_p50_s"] for row in rows[: len(kept)]] == [line["row"]["ttft_p50_s"] for line in kept]
        assert len(fake.logs) - before == 1 + 20 * (4 - len(kept))


def test_failures_are_said_and_their_rows_stand(trace, tmp_path, capsys):
    with FakeServer(Plan(), plans={5: Plan(status=500), 6: Plan(fault="close", fault_after=2)}) as fake:
        assert main([*arguments(trace, tmp_path / "out", url=fake.url, seeds=1), "--json"]) == 0
    out, error = capsys.readouterr()
    (row,) = json.loads(out)
    lost = row["num_failed"]
    assert 0 < lost == row["num_requests"] - row["num_finished"] and row["num_attained"] == row["num_finished"]
    assert f"seed 0: {lost} of 20 failed: " in error and "HTTP 500" in error
    text = (tmp_path / "out" / "report.md").read_text()
    assert "of requests failed and count as misses: stock:" in text


def test_labels_that_were_measured_in_other_ways_stand_side_by_side(trace, tmp_path):
    out = tmp_path / "out"
    for label, server, more in (
        ("a", {}, []),
        ("b", {"usage": False}, ["--check-metrics"]),
        ("c", {"refuses": ("ids",)}, []),
    ):
        with FakeServer(Plan(per_chunk=2), **server) as fake:
            assert main([*arguments(trace, out, label, url=fake.url, seeds=1), *more]) == 0
    rows = read_rows(out)
    assert [row["policy"] for row in rows] == ["a", "b", "c"]
    assert [row["counted_by"] for row in rows] == ["usage", "total", "usage"]
    assert [row["metrics_agree"] is None for row in rows] == [True, False, True]
    text = (out / "report.md").read_text()
    assert "a, c: between tokens: every chunk says" in text and "b: between tokens: the end of the stream" in text
    assert "c: fake, version 1.2.3; prompts are text of so many words" in text


def test_the_page_on_deploying_uses_options_that_there_are(capsys):
    page = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^llmsched (\S+)(.*)$", page, re.MULTILINE)
    assert {name for name, _ in commands} == {"trace", "evaluate", "serve-bench", "report"}
    group = typer.main.get_command(app)
    for name, rest in commands:
        known = {option for parameter in group.commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, (name, rest)


# What is wrong


def test_what_is_wrong_with_a_server_is_one_line(trace, tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    cases = [
        (dict(), {"model": "gpt"}, "model: 'gpt' is not served at http://127.0.0.1:", "it has fake"),
        (dict(models=()), {}, "lists no model", "url"),
        (dict(plan=Plan(status=500)), {}, "HTTP 500: out of order", "/v1/completions"),
        (dict(plan=Plan(status=404)), {}, "HTTP 404: out of order", "/v1/completions"),
        (dict(plan=Plan(fault="bad json")), {}, "the stream holds what is no JSON", "/v1/completions"),
        (dict(plan=Plan(fault="no stream")), {}, "the server does not stream: it sent application/json", "url"),
        (dict(plan=Plan(fault="close")), {}, "ends a stream without an end", "url"),
        (dict(refuses=("model",)), {}, "takes none of our requests: HTTP 400: unknown field model", "url"),
        (dict(metrics=False), {"check": True}, "/metrics says HTTP 404", "check_metrics"),
    ]
    for server, change, *words in cases:
        with FakeServer(**server) as fake:
            check = ["--check-metrics"] * change.pop("check", False)
            assert main([*arguments(trace, tmp_path / "out", url=fake.url, **change), *check]) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error and error.startswith("llmsched: "), error
        assert all(text in error for text in words), error
    assert main(arguments(trace, tmp_path / "out", url=nobody)) == 2
    error = capsys.readouterr().err.strip()
    assert error == f"llmsched: url: no answer from {nobody}/v1/models: Connection refused"
    assert not (tmp_path / "out").exists()


def test_a_server_of_something_else_is_one_line(trace, tmp_path, capsys):
    def speak(listening):
        for _ in range(2):
            connection, _ = listening.accept()
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n<html/>")
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=speak, args=(listening,), daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        assert main(arguments(trace, tmp_path / "out", url=url)) == 2
    assert "expected a list of models in JSON at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": "a/b"}, "label: expected letters"),
        ({"url": "localhost"}, "url: expected http://HOST:PORT, got 'localhost'"),
        ({"url": "http://[::1"}, "url: expected http://HOST:PORT, got 'http://[::1'"),
        ({"url": "http://127.0.0.1:99999"}, "url: expected http://HOST:PORT, got 'http://127.0.0.1:99999'"),
        ({"seeds": 0}, "seeds: expected a whole number >= 1"),
        ({"saved": "x.json"}, "url: expected one of --url and --saved"),
        ({"api-key-env": "NO_SUCH_KEY"}, "no environment variable 'NO_SUCH_KEY'"),
        ({"qps": "fast"}, "qps: expected numbers"),
    ],
)
def test_bad_options_are_one_line(trace, tmp_path, capsys, change, words):
    assert main(arguments(trace, tmp_path / "out", **{"url": "http://127.0.0.1:9"} | change)) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error


# Results of vllm bench serve


@pytest.fixture
def saved(tmp_path):
    """Three answered requests and one that failed, as `vllm bench serve --save-detailed` writes them."""
    data = {
        "input_lens": [10, 20, 30, 40],
        "output_lens": [4, 3, 1, 0],
        "start_times": [100.0, 100.5, 101.5, 101.0],
        "ttfts": [0.2, 0.6, 0.1, 0.0],
        "itls": [[0.1, 0.2, 0.6], [0.3], [], []],  # the second had two tokens in one chunk
        "errors": ["", "", "", "Connection reset"],
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(data))
    return path


@pytest.mark.filterwarnings("ignore::llmsched_gym.workload.TraceWarning")
def test_a_saved_benchmark_gets_our_rows(saved, tmp_path, capsys):
    out = tmp_path / "out"
    for label, rule in (("theirs", "every-gap"),):
        args = ["serve-bench", "--saved", str(saved), "--label", label, "--tbt-rule", rule, "--out", str(out)]
        assert main(args) == 0
    (row,) = read_rows(out)
    assert row["num_requests"] == 4 and row["num_failed"] == 1 and row["counted_by"] == "total"
    # SLOs of 0.5 s: a gap of 0.6 s, a TTFT of 0.6 s and a failure are misses
    assert row["num_finished"] == 3 and row["num_attained"] == 1
    assert row["num_gaps_by_class"] == {"strict": 0, "relaxed": 5}
    assert row["qps"] == pytest.approx(3 / 1.5)
    assert "1 failed" in (out / "report.md").read_text()
    run = read_saved(saved, scenario("default"))
    assert [a.counts for a in run.answers if a.counts] == [[1, 1, 1, 1], [1, 2], [1]]


def test_a_csv_run_has_no_gaps(tmp_path, capsys):
    path = tmp_path / "run.csv"
    path.write_text("input_toks,output_toks,queued_s,scheduled_s,first_token_s,last_token_s\n10,5,0,0.1,0.2,0.5\n")
    assert main(["serve-bench", "--saved", str(path), "--label", "x", "--out", str(tmp_path / "out")]) == 2
    assert "expected the JSON of `vllm bench serve --save-detailed`" in capsys.readouterr().err
