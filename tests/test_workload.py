"""The request table: lengths, arrivals, classes, noise; and that nothing but the seed and the setting moves them."""

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from llmsched_gym.config import SUITES, ConfigError, Scenario, scenario
from llmsched_gym.workload import (
    NOISE_BLOCK,
    WORKLOADS,
    RequestTable,
    describe_workloads,
    load_trace,
    make_table,
    noise_block,
)
from llmsched_gym.workload import fit as fit_module
from llmsched_gym.workload.lengths import DATA_DIR as TABLES
from llmsched_gym.workload.lengths import length_workloads, load_lengths

DATA_DIR = os.environ.get("LLMSCHED_DATA_DIR")
TRACES = {"sharegpt": "openchat_sharegpt4.csv", "azure-conv": "azure_llm_2023_conv.csv"}
ARRAYS = ("arrival_s", "prompt_tokens", "output_tokens", "slo_class", "ttft_slo_s", "tbt_slo_s", "length_hint")
PAPER = SUITES["paper"].scenario


def finite(**fields):
    """A finite run from time 0 that ends with its cohort."""
    return PAPER.replace(**{"num_requests": 200, "qps": 2.0, **fields})


def assert_same(a, b, n, skip=()):
    for name in ARRAYS:
        if name not in skip:
            np.testing.assert_array_equal(getattr(a, name)[:n], getattr(b, name)[:n], err_msg=name)


def trace_path(workload):
    path = Path(DATA_DIR or "", "traces", TRACES[workload])
    if not DATA_DIR or not path.exists():
        pytest.skip(f"needs {TRACES[workload]} below the folder named by LLMSCHED_DATA_DIR")
    return path


def write_trace(path, rows, header="arrived_at,num_prefill_tokens,num_decode_tokens"):
    path.write_text(header + "\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    return str(path)


# Lengths


@pytest.mark.parametrize("workload", TRACES)
def test_fit_to_the_real_trace(workload, tmp_path):
    report = fit_module.fit_report(trace_path(workload), workload, tmp_path)
    assert max(report["ks_prompt"], report["ks_output"], report["ks_total"]) < 0.02
    assert abs(report["fitted"]["correlation"] - report["trace"]["correlation"]) < 0.03
    for part in ("prompt_tokens", "output_tokens", "total_tokens"):
        for figure, tolerance in (("mean", 0.02), ("p90", 0.03), ("p99", 0.03)):
            assert report["fitted"][part][figure] == pytest.approx(report["trace"][part][figure], rel=tolerance)
    assert Path(report["plot"]).stat().st_size > 10_000
    assert Path(report["plot"]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("workload", TRACES)
def test_shipped_table_is_what_the_command_writes(workload, tmp_path):
    shipped = json.loads((TABLES / f"{workload}.json").read_text())
    total = str(shipped["max_total_tokens"])
    args = [
        str(trace_path(workload)),
        "--name",
        workload,
        "--out",
        str(tmp_path / "w.json"),
        "--max-total-tokens",
        total,
    ]
    result = run_fit([*args, "--source", shipped["source"]])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "w.json").read_text()) == shipped


def test_published_statistics():
    """Figures of the data sets' documentation; p50/p90/p99 and mean, tokens."""
    for workload, prompt, output in (
        ("sharegpt", (1730, 5696, 7434, 2340), (415, 834, 998, 439)),
        ("azure-conv", (1020, 2734, 4142, 1155), (129, 424, 601, 211)),
    ):
        drawn = fit_module.draw(load_lengths(workload), 200_000, seed=5)
        for tokens, figures in zip(drawn, (prompt, output), strict=True):
            assert (*np.percentile(tokens, [50, 90, 99]), tokens.mean()) == pytest.approx(figures, rel=0.03)


@given(st.lists(st.tuples(*[st.floats(0.0, 1.0, exclude_max=True)] * 2), min_size=1, max_size=50))
@settings(max_examples=50, deadline=None)
def test_lengths_are_legal_and_each_depends_on_its_own_draws(uniforms):
    for workload in length_workloads():
        table = load_lengths(workload)
        prompt, output = table.draw(np.array(uniforms))
        assert prompt.dtype == output.dtype == np.int32
        assert prompt.min() >= 1 and output.min() >= 1 and (prompt + output).max() <= table.max_total_tokens
        alone = table.draw(np.array(uniforms[-1:]))
        assert (alone[0][0], alone[1][0]) == (prompt[-1], output[-1])


def test_sharegpt_totals_fit_the_model():
    prompt, output = fit_module.draw(load_lengths("sharegpt"), 300_000, seed=0)
    assert (prompt + output).max() <= 8192


def test_quantiles_of_a_trace_made_by_hand(tmp_path):
    """Output is 10 for the shorter half of prompts and 1000 for the longer: the fit must keep the two apart."""
    rows = [(p, 10 if p <= 500 else 1000) for p in range(1, 1001)]  # half of the 32 bins on either side
    trace = load_trace(write_trace(tmp_path / "t.csv", rows, "num_prefill_tokens,num_decode_tokens"))
    path = tmp_path / "made.json"
    path.write_text(json.dumps(fit_module.fit_lengths(trace, "made", "by hand")))
    table = make_table(finite(workload=str(path), num_requests=5000), 3)
    assert table.prompt_tokens.mean() == pytest.approx(500.5, rel=0.03)
    np.testing.assert_array_equal(table.output_tokens, np.where(table.prompt_tokens <= 500, 10, 1000))


def test_describe_workloads():
    rows = {row["name"]: row for row in describe_workloads()}
    assert set(rows) == set(WORKLOADS) == {"sharegpt", "azure-conv", "chat", "agents", "mixed"}
    assert set(length_workloads()) == {"sharegpt", "azure-conv"}
    assert rows["sharegpt"]["prompt_tokens"]["p50"] == 1730 and "Apache-2.0" in rows["sharegpt"]["source"]
    assert rows["azure-conv"]["output_tokens"]["p90"] == 424 and "CC-BY" in rows["azure-conv"]["source"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt": None}, "prompt: expected an object"),
        ({"output": {"probs": [0, "x"], "tokens": [[1, 2]]}}, "output: expected an object"),
        ({"output": {"probs": [0, 1]}}, "missing field 'tokens'"),
        ({"max_total_tokens": 5}, "max_total_tokens: expected more than"),
        ({"output": {"probs": [0, 1], "tokens": [[3, 1]]}}, "output.tokens: expected non-decreasing"),
        ({"output": {"probs": [0, 0.5], "tokens": [[1, 2]]}}, "output.probs: expected increasing numbers from 0 to 1"),
        ({"output": {"probs": [0, 1], "tokens": [[0, 2]]}}, "output.tokens"),
    ],
)
def test_damaged_workload_files(tmp_path, change, message):
    good = {
        "name": "x",
        "source": "",
        "max_total_tokens": 100,
        "prompt": {"probs": [0, 1], "tokens": [1, 9]},
        "output": {"probs": [0, 1], "tokens": [[1, 9]]},
    }
    path = tmp_path / "w.json"
    path.write_text(json.dumps(good))
    assert make_table(finite(workload=str(path)), 0).prompt_tokens.max() <= 9
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**good, **change}))
    with pytest.raises(ConfigError, match=message) as error:
        make_table(finite(workload=str(path)), 0)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_unknown_workloads(tmp_path):
    with pytest.raises(ConfigError, match="workload: expected one of agents, azure-conv, chat, mixed, sharegpt"):
        make_table(finite(workload="sharegtp"), 0)
    with pytest.raises(ConfigError, match="cannot read"):
        make_table(finite(workload=str(tmp_path / "gone.json")), 0)
    (tmp_path / "not.json").write_text("{")
    with pytest.raises(ConfigError, match="not a JSON file"):
        make_table(finite(workload=str(tmp_path / "not.json")), 0)


def run_fit(args):
    return CliRunner().invoke(fit_module.app, args)


def test_fit_command(tmp_path):
    rows = [(1 + 3 * i % 700, 1 + i % 50) for i in range(1000)]
    trace = write_trace(tmp_path / "t.csv", rows, "num_prefill_tokens,num_decode_tokens")
    result = run_fit([trace, "--name", "mine", "--out", str(tmp_path / "m.json"), "--report", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["ks_prompt"] < 0.02
    assert (tmp_path / "fit_mine.png").exists()
    assert load_lengths(str(tmp_path / "m.json")).name == "mine"

    short = write_trace(tmp_path / "short.csv", rows[:5], "num_prefill_tokens,num_decode_tokens")
    for bad in (short, str(tmp_path / "gone.csv")):
        result = run_fit([bad, "--name", "x", "--out", str(tmp_path / "x.json")])
        assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert not (tmp_path / "x.json").exists()


# The table


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("seed", [0, 7])
def test_tables_keep_their_contract(suite, seed):
    table = make_table(scenario(suite), seed)
    n = len(table)
    assert n > 100 and table.seed == seed
    roots = table.arrival_s[table.is_root]
    assert (np.diff(roots[table.num_past :]) >= 0.0).all() and (roots[table.num_past :] >= 0.0).all()
    assert np.isnan(table.arrival_s[~table.is_root]).all() and (roots[: table.num_past] < 0.0).all()
    dtypes = {"prompt_tokens": "int32", "output_tokens": "int32", "slo_class": "int8", "session_id": "int64"}
    for name in (*ARRAYS, "session_id"):
        assert getattr(table, name).shape == (n,)
        assert getattr(table, name).dtype == dtypes.get(name, "float64"), name
    assert table.prompt_tokens.min() >= 1 and table.output_tokens.min() >= 1
    assert 0 <= table.cohort_start < table.cohort_stop <= n
    assert ((table.session_id == -1) == (table.parent is None)).all() and np.isnan(table.length_hint).all()
    np.testing.assert_array_equal(table.tbt_slo_s, np.where(table.slo_class == 0, 0.1, 0.5))


@pytest.mark.parametrize("suite", SUITES)
def test_same_seed_same_table_and_other_seed_other_table(suite):
    a, b, c = (make_table(scenario(suite), seed) for seed in (0, 0, 1))
    assert_same(a, b, len(a))
    assert (a.qps, a.cost_scale) == (b.qps, b.cost_scale)
    assert not np.array_equal(a.prompt_tokens[:50], c.prompt_tokens[:50])


@pytest.mark.parametrize("arrivals", ["poisson", "gamma", "mmpp", "switching"])
@given(seed=st.integers(0, 2**64), n=st.integers(1, 60))
@settings(max_examples=25, deadline=None)
def test_a_longer_run_begins_with_the_shorter_one(arrivals, seed, n):
    common = {"arrivals": arrivals, "burstiness": 0.3, "length_hint": "noisy:0.4", "ttft_class_scales": (0.5, 1.0, 3.0)}
    assert_same(
        make_table(finite(num_requests=n, **common), seed), make_table(finite(num_requests=7 * n, **common), seed), n
    )


@pytest.mark.parametrize("arrivals", ["poisson", "gamma"])
def test_same_requests_at_every_load(arrivals):
    slow, fast = (make_table(finite(qps=qps, arrivals=arrivals, burstiness=0.25), 0) for qps in (0.8, 1.6))
    assert_same(slow, fast, 200, skip=("arrival_s",))
    np.testing.assert_array_equal(slow.arrival_s, 2.0 * fast.arrival_s)
    assert (slow.qps, fast.qps) == (0.8, 1.6)


def test_same_requests_at_every_load_with_warmup_and_backlog():
    fields = {"warmup_s": 50.0, "arrivals_continue": True, "drain_s": 20.0}
    slow, fast = (make_table(finite(qps=qps, **fields), 0) for qps in (1.0, 3.0))
    assert_same(slow, fast, min(len(slow), len(fast)), skip=("arrival_s",))
    slow, fast = (make_table(Scenario(qps=qps, max_backlog=20), 4) for qps in (1.0, 3.0))
    assert_same(slow, fast, len(slow), skip=("arrival_s",))


def test_settings_do_not_move_other_draws():
    """Common random numbers: a changed share of strict users leaves lengths and arrivals as they are."""
    plain = make_table(finite(), 0)
    changed = make_table(
        finite(strict_share=(0.0, 0.5), cost_scale=(0.8, 1.25), ttft_class_scales=(1, 2), length_hint="noisy:1"), 0
    )
    for name in ("arrival_s", "prompt_tokens", "output_tokens"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(changed, name))


@pytest.mark.parametrize("seed", [-1, 1.5, "0", True, None])
def test_bad_seeds(seed):
    for make in (lambda: make_table(finite(), seed), lambda: noise_block(Scenario(), seed, 0)):
        with pytest.raises(ConfigError, match="seed: expected a whole number >= 0"):
            make()


def test_numpy_seeds_count():
    assert_same(make_table(finite(), np.int64(3)), make_table(finite(), 3), 200)


# Arrivals


def test_poisson_and_gamma_gaps():
    for arrivals, cv in (("poisson", 1.0), ("gamma", 2.0)):  # a Gamma of shape 0.25 has CV 1 / sqrt(0.25)
        gaps = np.diff(make_table(finite(num_requests=100_000, arrivals=arrivals, burstiness=0.25), 0).arrival_s)
        assert gaps.mean() == pytest.approx(0.5, rel=0.03)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)


def test_switching_rates_hold_for_the_times_asked_for():
    """Counts in windows of 1 s tell the two rates apart where they are far apart."""
    fields = {"arrivals": "switching", "qps_range": (10.0, 100.0), "switch_every_s": (50.0, 80.0)}
    table = make_table(finite(num_requests=100_000, qps=None, **fields), 0)
    counts = np.bincount(table.arrival_s.astype(int))[:-1]
    fast = counts > 40
    assert counts[fast].mean() == pytest.approx(100.0, rel=0.03) and counts[~fast].mean() == pytest.approx(
        10.0, rel=0.06
    )
    holds = np.diff(np.flatnonzero(np.diff(fast)))
    assert holds.min() >= 49 and holds.max() <= 81
    assert table.qps == 55.0


@pytest.mark.parametrize("arrivals", ["switching", "mmpp"])
def test_two_rates_have_the_mean_asked_for(arrivals):
    fields = {"arrivals": arrivals, "switch_every_s": (1.0, 3.0), "num_requests": 60_000}
    table = make_table(finite(qps=4.0, **fields), 1)
    assert table.qps == 4.0
    assert len(table) / table.arrival_s[-1] == pytest.approx(4.0, rel=0.03)
    gaps = np.diff(table.arrival_s)
    assert gaps.std() / gaps.mean() > 1.02  # burstier than Poisson


def test_both_sides_start():
    fields = {"arrivals": "switching", "qps_range": (0.1, 10.0), "switch_every_s": (50.0, 50.0), "max_backlog": 0}
    early = [np.count_nonzero(make_table(Scenario(**fields), seed).arrival_s < 50.0) for seed in range(40)]
    assert 8 < sum(count > 250 for count in early) < 32
    assert all(count > 250 or count < 30 for count in early)


def test_rate_drawn_once_an_episode():
    rates = np.array([make_table(Scenario(), seed).qps for seed in range(200)])
    assert rates.min() >= 1.0 and rates.max() <= 2.2 and np.ptp(rates) > 1.1
    assert rates.mean() == pytest.approx(1.6, abs=0.08)


# Episodes


def test_finite_cohort():
    fields = {"num_requests": 100, "warmup_s": 30.0, "drain_s": 20.0}
    table = make_table(Scenario(qps=2.0, **fields), 0)
    start, stop = table.cohort_start, table.cohort_stop
    assert stop - start == 100 and start > 30
    assert table.arrival_s[start - 1] < 30.0 <= table.arrival_s[start]
    assert table.arrival_s[stop - 1] + 18.0 < table.arrival_s[-1] <= table.arrival_s[stop - 1] + 20.0
    ended = make_table(Scenario(qps=2.0, arrivals_continue=False, **fields), 0)
    assert len(ended) == stop and ended.cohort_stop == stop
    assert_same(table, ended, stop)


def test_endless_drain_is_cut_off():
    table = make_table(Scenario(qps=1.0, num_requests=10, warmup_s=0.0, drain_s=math.inf), 0)
    last = table.arrival_s[table.cohort_stop - 1]
    assert table.cohort_start == 0 and last + 580.0 < table.arrival_s[-1] <= last + 600.0


def test_continuing_episode_and_its_backlog():
    tables = [make_table(Scenario(qps=2.0, max_backlog=9), seed) for seed in range(100)]
    backlogs = [np.count_nonzero(table.arrival_s == 0.0) for table in tables]
    assert set(backlogs) == set(range(10))
    for table in tables:
        assert (table.cohort_start, table.cohort_stop) == (0, len(table))
        assert 250.0 < table.arrival_s[-1] <= 300.0
    without = make_table(Scenario(qps=2.0, max_backlog=0), 3)
    with_backlog = tables[3].arrival_s[backlogs[3] :]
    np.testing.assert_array_equal(with_backlog, without.arrival_s)
    np.testing.assert_array_equal(tables[3].prompt_tokens[: len(without)], without.prompt_tokens)


def test_a_short_horizon_may_be_empty():
    table = make_table(Scenario(qps=0.001, horizon_s=0.1, max_backlog=0), 0)
    assert len(table) == 0 and table.cohort_stop == 0


def test_too_many_requests_is_one_clear_error():
    with pytest.raises(ConfigError, match="qps: about 6e"):
        make_table(Scenario(qps=1e6, horizon_s=600.0), 0)


# Classes, hints, noise


def test_strict_share_and_slos():
    table = make_table(finite(num_requests=50_000), 0)
    assert np.mean(table.slo_class == 0) == pytest.approx(0.05, abs=0.003)
    np.testing.assert_allclose(table.ttft_slo_s, 0.5 + 0.0005 * table.prompt_tokens, rtol=1e-15)
    shares = [np.mean(make_table(scenario("tenants", qps=20.0), seed).slo_class == 0) for seed in range(60)]
    assert min(shares) < 0.05 and max(shares) > 0.45 and np.mean(shares) == pytest.approx(0.25, abs=0.06)
    assert (make_table(finite(strict_share=0.0), 0).slo_class == 1).all()
    assert (make_table(finite(strict_share=1.0), 0).slo_class == 0).all()


def test_ttft_classes():
    table = make_table(scenario("tenants", qps=20.0), 0)
    scale = table.ttft_slo_s / (0.5 + 0.0005 * table.prompt_tokens)
    for value in (0.5, 1.0, 3.0):
        assert np.mean(np.abs(scale - value) < 1e-9) == pytest.approx(1 / 3, abs=0.03)


def test_length_hints():
    oracle = make_table(finite(length_hint="oracle"), 0)
    np.testing.assert_array_equal(oracle.length_hint, oracle.output_tokens)
    noisy = make_table(finite(length_hint="noisy:0.5", num_requests=20_000), 0)
    error = np.log(noisy.length_hint / noisy.output_tokens)
    assert error.mean() == pytest.approx(0.0, abs=0.02) and error.std() == pytest.approx(0.5, rel=0.02)
    np.testing.assert_array_equal(
        noisy.length_hint[:100], make_table(finite(length_hint="noisy:0.5", num_requests=100), 0).length_hint
    )


def test_cost_scale():
    scales = [make_table(scenario("drift"), seed).cost_scale for seed in range(200)]
    assert min(scales) >= 0.8 and max(scales) <= 1.25 and np.mean(scales) == pytest.approx(1.025, abs=0.03)
    assert make_table(Scenario(), 0).cost_scale == 1.0


def test_noise():
    quiet = noise_block(Scenario(jitter=0.0), 0, 5)
    np.testing.assert_array_equal(quiet, [1.0])
    blocks = [noise_block(Scenario(jitter=0.2), 0, block) for block in range(8)]
    assert all(block.shape == (NOISE_BLOCK,) for block in blocks)
    logs = np.log(np.concatenate(blocks))
    assert np.median(logs) == pytest.approx(0.0, abs=0.005) and logs.std() == pytest.approx(0.2, rel=0.02)
    assert len({block[0] for block in blocks}) == 8
    np.testing.assert_array_equal(blocks[3], noise_block(Scenario(jitter=0.2), 0, 3))
    assert not np.array_equal(blocks[3], noise_block(Scenario(jitter=0.2), 1, 3))


def test_stragglers():
    plain = noise_block(Scenario(jitter=0.05), 0, 0)
    noise = noise_block(Scenario(jitter=0.05, straggler_share=0.1, straggler_factor=4.0), 0, 0)
    slowed = noise / plain
    assert np.mean(np.isclose(slowed, 4.0)) == pytest.approx(0.1, abs=0.02)
    assert (np.isclose(slowed, 4.0) | (slowed == 1.0)).all()
    only = noise_block(Scenario(jitter=0.0, straggler_share=0.5), 0, 0)
    assert set(np.unique(only)) == {1.0, 3.0}


# Traces as workloads

ROWS = [(10.0, 100, 1), (11.0, 200, 2), (13.0, 300, 3), (16.0, 400, 4)]  # mean gap 2 s


def test_kept_times_in_order_and_repeated(tmp_path):
    path = write_trace(tmp_path / "t.csv", ROWS)
    table = make_table(finite(trace=path, trace_arrivals="keep", qps=None, num_requests=9), 0)
    np.testing.assert_array_equal(table.arrival_s, [0, 1, 3, 6, 8, 9, 11, 14, 16])
    np.testing.assert_array_equal(table.prompt_tokens, [100, 200, 300, 400, 100, 200, 300, 400, 100])
    np.testing.assert_array_equal(table.output_tokens, [1, 2, 3, 4, 1, 2, 3, 4, 1])
    assert table.qps == 0.5
    scaled = make_table(finite(trace=path, trace_arrivals="keep", qps=2.0, num_requests=9), 0)
    np.testing.assert_allclose(scaled.arrival_s, table.arrival_s / 4.0, rtol=1e-12)
    assert scaled.qps == 2.0
    replay = make_table(finite(trace=path, arrivals="replay", qps=None, num_requests=9), 0)
    assert_same(table, replay, 9)


def test_kept_times_in_a_continuing_episode(tmp_path):
    path = write_trace(tmp_path / "t.csv", ROWS)
    tables = [make_table(Scenario(trace=path, trace_arrivals="keep", horizon_s=20.0), seed) for seed in range(30)]
    assert {table.prompt_tokens[0] for table in tables} == {100, 200, 300, 400}  # a window from a random row
    for table in tables:
        assert table.arrival_s[0] == 0.0 and table.arrival_s[1] > 0.0 and table.arrival_s[-1] <= 20.0
        assert len(table) in (10, 11)


def test_drawn_arrivals_resample_rows(tmp_path):
    path = write_trace(tmp_path / "t.csv", [row[1:] for row in ROWS], "num_prefill_tokens,num_decode_tokens")
    table = make_table(finite(trace=path, num_requests=8000), 0)
    np.testing.assert_array_equal(table.prompt_tokens, 100 * table.output_tokens)
    assert np.bincount(table.output_tokens)[1:] == pytest.approx([2000] * 4, rel=0.08)
    np.testing.assert_array_equal(table.arrival_s, make_table(finite(num_requests=8000), 0).arrival_s)
    bursty = make_table(finite(trace=path, trace_arrivals="gamma", burstiness=0.25, num_requests=8000), 0)
    assert np.diff(bursty.arrival_s).std() > 0.9
    switching = finite(trace=path, arrivals="switching", qps=None, num_requests=50)
    np.testing.assert_array_equal(
        make_table(switching, 0).arrival_s, make_table(switching.replace(trace=None), 0).arrival_s
    )


def test_sessions_are_kept_with_kept_times(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "0,a,1,m,10,1,11,x\n1,,1,m,20,1,21,x\n2,a,1,m,30,1,31,x\n3,b,1,m,40,1,41,x\n"
    )
    table = make_table(finite(trace=str(path), trace_arrivals="keep", qps=None, num_requests=8), 0)
    assert table.session_id.tolist() == [0, -1, 0, 1, 2, -1, 2, 3]
    assert (make_table(finite(trace=str(path), trace_arrivals="poisson"), 0).session_id == -1).all()


def test_a_trace_with_times_keeps_them_and_one_without_draws_them(tmp_path):
    timed = write_trace(tmp_path / "timed.csv", ROWS)
    table = make_table(finite(trace=timed, qps=None, num_requests=4), 0)
    assert table.arrivals == "trace"
    np.testing.assert_array_equal(table.arrival_s, [row[0] - ROWS[0][0] for row in sorted(ROWS)][:4])
    assert make_table(finite(trace=timed, trace_arrivals="poisson"), 0).arrivals == "poisson"
    untimed = write_trace(tmp_path / "lengths.csv", [row[1:] for row in ROWS], "num_prefill_tokens,num_decode_tokens")
    assert make_table(finite(trace=untimed), 0).arrivals == "poisson"
    assert make_table(finite(trace=untimed, arrivals="gamma"), 0).arrivals == "gamma"


def test_a_changed_trace_is_read_again(tmp_path):
    path = tmp_path / "t.csv"
    write_trace(path, [(0, 5, 1), (1, 5, 1)])
    assert (make_table(finite(trace=str(path)), 0).prompt_tokens == 5).all()
    write_trace(path, [(0, 6, 1), (1, 6, 1)])
    os.utime(path, ns=(1, 1))
    assert (make_table(finite(trace=str(path)), 0).prompt_tokens == 6).all()


def test_traces_that_cannot_be_replayed(tmp_path):
    lengths = write_trace(tmp_path / "l.csv", [(5, 1)], "num_prefill_tokens,num_decode_tokens")
    with pytest.raises(ConfigError, match=r"keep needs arrival times; l\.csv \(lengths\) has none"):
        make_table(finite(trace=lengths, trace_arrivals="keep"), 0)
    at_once = write_trace(tmp_path / "o.csv", [(5, 1, 1), (5, 1, 1)])
    with pytest.raises(ConfigError, match=r"keep needs a rate; o\.csv has a single arrival time"):
        make_table(finite(trace=at_once, trace_arrivals="keep"), 0)
    with pytest.raises(ConfigError, match="arrivals: replay needs a trace"):
        make_table(finite(arrivals="replay"), 0)


def test_the_azure_trace_replayed():
    table = make_table(
        finite(trace=str(trace_path("azure-conv")), trace_arrivals="keep", qps=None, num_requests=19_366), 0
    )
    assert table.qps == pytest.approx(5.53, abs=0.005)
    gaps = np.diff(table.arrival_s)
    assert gaps.std() / gaps.mean() == pytest.approx(1.09, abs=0.01)
    assert table.prompt_tokens[:2].tolist() == [374, 396] and table.output_tokens[:2].tolist() == [44, 109]


def test_a_table_of_given_requests_takes_one_number_for_all_or_one_each():
    table = RequestTable.of([0.0, 1.5, 2.0], 10, [3, 4, 5], slo_class=[0, 1, 1], tbt_slo_s=0.5, cohort=(1, 3), seed=7)
    assert table.prompt_tokens.tolist() == [10, 10, 10] and table.output_tokens.tolist() == [3, 4, 5]
    assert table.slo_class.tolist() == [0, 1, 1] and table.tbt_slo_s.tolist() == [0.5] * 3
    assert np.isinf(table.ttft_slo_s).all() and np.isnan(table.length_hint).all()
    assert (table.cohort_start, table.cohort_stop, table.seed, table.arrivals) == (1, 3, 7, "given")
    made = make_table(scenario("paper", num_requests=3), 0)
    for field in dataclasses.fields(RequestTable):
        ours, theirs = getattr(table, field.name), getattr(made, field.name)
        assert not isinstance(theirs, np.ndarray) or (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    with pytest.raises(ConfigError, match=r"^output_tokens: expected one number or 3, got an array of shape \(2,\)$"):
        RequestTable.of([0.0, 1.5, 2.0], 10, [3, 4])


@pytest.mark.parametrize("name", ["prompt_tokens", "output_tokens"])
@pytest.mark.parametrize("tokens", [0, -5, 2.5, math.nan, 2.0**31, 1e300])
def test_a_request_has_whole_tokens_from_one_on(name, tokens):
    lengths = {"prompt_tokens": [10.0, 20.0], "output_tokens": [3.0, 4.0]}
    lengths[name][1] = tokens
    with pytest.raises(ConfigError, match=f"{name}: expected a whole number from 1 to 2,147,483,647 for request 1"):
        RequestTable.of([0.0, 1.5], **lengths)
    table = RequestTable.of([0.0, 1.5], 10, 3)
    with pytest.raises(ConfigError, match=f"{name}: expected a whole number from 1 .* for request 0, got"):
        dataclasses.replace(table, **{name: np.array([tokens, 1.0])})
    with pytest.raises(ConfigError, match=f"{name}: expected 2 whole numbers, got int64 of shape"):
        dataclasses.replace(table, **{name: np.ones(3, np.int64)})
