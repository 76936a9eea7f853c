"""The published schedulers' decision logs, replayed: every batch is the same set of (request, kind, tokens)."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.conformance import Recording, compare, main, read_log, read_requests
from llmsched_gym.config import scenario
from llmsched_gym.engine import Batch, Engine, check
from llmsched_gym.scheduler import install, make_scheduler

ROOT = Path(__file__).parents[1]
LOGS = {
    "sarathi_fcfs": ("sarathi", 4020),
    "sarathi_spf": ("sarathi-spf", 4019),
    "slai_fcfs_fixed": ("slai-fcfs-fixed", 4115),
    "slai_spf_dynamic": ("slai", 4134),
    "slai_spf_dyn_prio": ("slai-priority", 4134),
    "vllm": ("vllm-v0", 3596),
}


def paths(golden, log):
    return golden / f"case_a_{log}.jsonl.gz", golden / "case_a_requests.csv"


@pytest.mark.conformance
@pytest.mark.parametrize("log", LOGS)
def test_decisions_equal_the_published_schedulers(golden, log):
    policy, iterations = LOGS[log]
    result = compare(*paths(golden, log), policy)
    assert result == {"iterations": iterations, "mismatches": 0, "first_mismatch": None}


@pytest.mark.conformance
@pytest.mark.parametrize("log", ["slai_spf_dynamic", "slai_fcfs_fixed"])
def test_clock_mean_and_offset_equal_the_published_ones(golden, log):
    """Start times and running means to the last bit, so that no deadline can fall on the other side of a clock."""
    path, requests = paths(golden, log)
    with gzip.open(path, "rt") as file:
        lines = [json.loads(text) for text in file]
    table, scheduler = read_requests(requests), make_scheduler(LOGS[log][0])
    world = scenario("paper", num_requests=len(table), max_model_len=8193)
    engine = Engine(world, len(table), backend=Recording([line["dur"] for line in lines]))
    engine.reset(table)
    install(scheduler, engine.state)
    sim = engine.state.sims[0]
    for line in lines:
        while sim.num_waiting + sim.num_running == 0:
            engine.step(scheduler)
        assert (float(sim.clock_s), float(sim.mean_batch_s)) == (line["t"], line["mean_batch_dur"])
        engine.step(scheduler)
        assert engine.state.knobs[0].offset == (line["offset"] or 5)  # the log starts with an unset one
    check(engine.state)


@pytest.mark.conformance
@pytest.mark.parametrize(("log", "policy"), [("slai_spf_dynamic", "slai-fcfs-fixed"), ("sarathi_fcfs", "sarathi-spf")])
def test_another_scheduler_does_not_conform(golden, log, policy):
    result = compare(*paths(golden, log), policy)
    assert result["mismatches"] > 100
    assert 0 <= result["first_mismatch"] < 100


@pytest.mark.conformance
def test_with_few_blocks_the_replay_differs(golden):
    result = compare(*paths(golden, "sarathi_fcfs"), "sarathi", kv_blocks=3000)
    assert result["mismatches"] > 0


@pytest.mark.conformance
def test_the_script_prints_one_json_line(golden):
    log, requests = paths(golden, "slai_spf_dynamic")
    command = [sys.executable, "-m", "benchmarks.conformance", "--log", log, "--requests", requests, "--policy", "slai"]
    done = subprocess.run([*command, "--kv-blocks", "14733"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout) == {"iterations": 4134, "mismatches": 0, "first_mismatch": None}


# --- the script itself, on a run of three requests that is worked out by hand


REQUESTS = """index,arrival,prompt_tokens,decode_tokens,strict,tbt_deadline
0,0.5,600,1,0,0.5
1,0.5,10,2,1,0.1
2,9.0,16,1,0,0.5
"""
BATCHES = [
    [[0, "prefill", 512]],
    [[0, "prefill", 88], [1, "prefill", 10]],
    [[0, "decode", 1], [1, "decode", 1]],
    [[1, "decode", 1]],
    [[2, "prefill", 16]],
    [[2, "decode", 1]],
]


def write(folder, batches=BATCHES, requests=REQUESTS, name="log.jsonl"):
    log, table = folder / name, folder / "requests.csv"
    lines = [json.dumps({"iteration": i, "t": 0.0, "dur": 0.25, "batch": batch}) for i, batch in enumerate(batches)]
    data = ("\n".join(lines) + "\n").encode()
    log.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    table.write_text(requests)
    return log, table


@pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.gz"])
def test_a_log_made_by_hand(tmp_path, name):
    log, table = write(tmp_path, name=name)
    assert compare(log, table, "sarathi") == {"iterations": 6, "mismatches": 0, "first_mismatch": None}
    assert len(read_log(log)) == 6
    assert read_requests(table).output_tokens.tolist() == [2, 3, 2]


def test_the_order_inside_a_batch_does_not_matter(tmp_path):
    assert compare(*write(tmp_path, [batch[::-1] for batch in BATCHES]), "sarathi")["mismatches"] == 0


def test_a_prefix_of_a_run_is_compared_as_far_as_it_goes(tmp_path):
    result = compare(*write(tmp_path, BATCHES[:3]), "sarathi")
    assert result == {"iterations": 3, "mismatches": 0, "first_mismatch": None}


def test_after_a_mismatch_the_replay_goes_on_with_its_own_state(tmp_path):
    changed = [BATCHES[0], [[0, "prefill", 88]], *BATCHES[2:]]
    assert compare(*write(tmp_path, changed), "sarathi") == {"iterations": 6, "mismatches": 1, "first_mismatch": 1}
    wrong_kind = [*BATCHES[:3], [[1, "prefill", 1]], *BATCHES[4:]]
    assert compare(*write(tmp_path, wrong_kind), "sarathi") == {"iterations": 6, "mismatches": 1, "first_mismatch": 3}


def test_a_log_that_goes_on_behind_our_end_mismatches(tmp_path):
    longer = [*BATCHES, [[0, "decode", 1]], [[0, "decode", 1]]]
    assert compare(*write(tmp_path, longer), "sarathi") == {"iterations": 8, "mismatches": 2, "first_mismatch": 6}


def test_blocks_are_a_setting(tmp_path):
    # 602 tokens need 38 blocks: with 30 the request is rejected
    assert compare(*write(tmp_path), "sarathi", kv_blocks=30)["first_mismatch"] == 0
    assert compare(*write(tmp_path), "sarathi", kv_blocks=60)["mismatches"] == 0


def run_main(capsys, log, table, policy="sarathi", *more):
    code = main(["--log", str(log), "--requests", str(table), "--policy", policy, *more])
    return code, *capsys.readouterr()


def test_main_prints_json(tmp_path, capsys):
    code, out, err = run_main(capsys, *write(tmp_path))
    assert (code, err) == (0, "")
    assert json.loads(out) == {"iterations": 6, "mismatches": 0, "first_mismatch": None}


def damaged(folder, case):
    """Files with one thing wrong, and what the message must say."""
    log, table = write(folder)
    if case == "missing log":
        return folder / "none.jsonl", table, "none.jsonl"
    if case == "missing requests":
        return log, folder / "none.csv", "none.csv"
    if case == "no json":
        log.write_text(log.read_text() + "not json\n")
        return log, table, "log.jsonl: line 7: expected an iteration with dur and batch"
    if case == "no batch":
        log.write_text('{"dur": 1.0}\n')
        return log, table, "log.jsonl: line 1: expected an iteration with dur and batch"
    if case == "negative duration":
        log.write_text('{"dur": -1.0, "batch": []}\n')
        return log, table, "log.jsonl: line 1: expected an iteration with dur and batch: dur is -1.0"
    if case == "empty log":
        log.write_text("")
        return log, table, "log.jsonl: expected at least one iteration"
    if case == "half a gzip":
        broken = folder / "half.jsonl.gz"
        broken.write_bytes(gzip.compress(log.read_bytes())[:-20])
        return broken, table, "half.jsonl.gz: not a whole gzip file"
    if case == "no gzip":
        log = log.rename(folder / "plain.jsonl.gz")
        return log, table, "Not a gzipped file"
    text = {
        "no column": REQUESTS.replace("tbt_deadline", "deadline"),
        "negative length": REQUESTS.replace("1,0.5,10", "1,0.5,-10"),
        "nan arrival": REQUESTS.replace("2,9.0", "2,nan"),
        "words": REQUESTS.replace("1,0.5,10,2", "1,0.5,10,two"),
        "unsorted": REQUESTS.replace("2,9.0", "2,0.1"),
        "no rows": REQUESTS.splitlines()[0] + "\n",
        "empty": "",
    }[case]
    table.write_text(text)
    message = {
        "no column": "requests.csv: line 1: missing column 'tbt_deadline'",
        "negative length": "requests.csv: line 3: prompt_tokens: expected a number",
        "nan arrival": "requests.csv: line 4: arrival: expected a number, got 'nan'",
        "words": "requests.csv: line 3: decode_tokens: expected a number, got 'two'",
        "unsorted": "requests.csv: arrival: expected requests sorted by arrival",
        "no rows": "requests.csv: expected at least one request",
        "empty": "requests.csv: not a CSV file",
    }[case]
    return log, table, message


FAULTS = ["missing log", "missing requests", "no json", "no batch", "negative duration", "empty log", "half a gzip"]
FAULTS += ["no gzip", "no column", "negative length", "nan arrival", "words", "unsorted", "no rows", "empty"]


@pytest.mark.parametrize("case", FAULTS)
def test_bad_files_are_one_clear_line(tmp_path, capsys, case):
    log, table, message = damaged(tmp_path, case)
    code, out, err = run_main(capsys, log, table)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def test_bad_settings_are_one_clear_line(tmp_path, capsys):
    files = write(tmp_path)
    code, out, err = run_main(capsys, *files, "sarathy")
    assert (code, out) == (2, "") and "did you mean 'sarathi'?" in err
    code, out, err = run_main(capsys, *files, "sarathi", "--kv-blocks", "0")
    assert (code, out) == (2, "") and "num_kv_blocks: expected a whole number >= 1, got 0" in err


class Idler:
    """Nothing is ever scheduled, every line is a mismatch."""

    def schedule(self, view):
        return Batch()


def test_a_scheduler_that_never_runs_anything_ends(tmp_path):
    assert compare(*write(tmp_path), "test_conformance:Idler") == {
        "iterations": 6,
        "mismatches": 6,
        "first_mismatch": 0,
    }
