"""Runs in parts: tables drawn in chunks are the whole table, and a run through a window is the whole run."""

from dataclasses import replace

import numpy as np
import pytest

from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.evaluation.capacity import capacity
from llmsched_gym.evaluation.grid import evaluate
from llmsched_gym.evaluation.long_run import long_run
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.outcomes import Outcomes
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.workload import RequestTable, make_table
from llmsched_gym.workload.chunks import table_chunks

COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens", "slo_class", "ttft_slo_s", "tbt_slo_s", "length_hint")
TIMES = ("arrival_s", "first_scheduled_s", "first_token_s", "last_token_s", "resolved_s")
WORLDS = {
    "poisson": {"warmup_s": 20.0},
    "all drained": {"drain_s": float("inf"), "warmup_s": 0.0},
    "no more arrivals": {"arrivals_continue": False},
    "bursts": {"arrivals": "gamma", "burstiness": 0.3, "length_hint": "noisy:0.5"},
    "two rates": {"arrivals": "mmpp", "qps": None},
    "switching": {"arrivals": "switching", "qps": None, "ttft_class_scales": (1.0, 2.0)},
}


def world(name, suite="paper", **fields):
    return scenario(suite, **{"qps": 2.0, "num_requests": 150, "drain_s": 30.0, **WORLDS[name], **fields})


@pytest.mark.parametrize("name", WORLDS)
def test_a_table_in_chunks_is_the_table(name):
    whole = make_table(world(name), 3)
    for size in (1, 37, 64, len(whole), 1000):
        parts = list(table_chunks(world(name), 3, size))
        for column in COLUMNS:
            np.testing.assert_array_equal(np.concatenate([getattr(p, column) for p in parts]), getattr(whole, column))
        measured = np.concatenate(
            [(np.arange(len(p)) >= p.cohort_start) & (np.arange(len(p)) < p.cohort_stop) for p in parts]
        )
        assert np.flatnonzero(measured).tolist() == list(range(whole.cohort_start, whole.cohort_stop))
        assert {(p.qps, p.cost_scale, p.arrivals) for p in parts} == {(whole.qps, whole.cost_scale, whole.arrivals)}


@pytest.mark.parametrize(
    ("fields", "word"),
    [({"num_requests": None}, "num_requests"), ({"workload": "chat", "num_requests": 5}, "workload")],
)
def test_what_needs_the_whole_table_is_refused(fields, word):
    with pytest.raises(ConfigError, match=f"^{word}: expected"):
        table_chunks(scenario("default", **fields), 0, 10)


CASES = [
    ("slai", "poisson", {}),
    ("slai", "poisson", {"num_kv_blocks": 700, "max_num_seqs": 24, "patience_s": 15.0}),  # a long line, evictions
    ("srpt-capped", "all drained", {"jitter": 0.1, "qps": 4.0}),
    ("sarathi", "switching", {"patience_s": 8.0, "num_kv_blocks": 700}),
    ("sarathi-spf", "no more arrivals", {}),
]


@pytest.mark.parametrize(("policy", "name", "fields"), CASES)
def test_a_run_through_a_window_is_the_whole_run(policy, name, fields):
    given = world(name, **fields)
    whole = simulate(given, policy, 5)
    parts = []
    found = long_run(given, policy, 5, chunk=40, seen=parts.append)
    expected = row(whole)
    assert len(parts) > 3
    rows = np.concatenate([part.requests for part in parts])
    rows = rows[np.lexsort((rows["prompt_tokens"], rows["arrival_s"]))]
    for column in (
        "arrival_s",
        "first_scheduled_s",
        "first_token_s",
        "last_token_s",
        "resolved_s",
        "phase",
        "max_gap_s",
    ):
        np.testing.assert_array_equal(rows[column], whole.requests[whole.cohort][column], err_msg=column)
    exact = "num_requests num_finished num_rejected num_refused num_abandoned iterations sim_time_s slo_attainment"
    for figure in (*exact.split(), "slo_attainment_by_class", "request_goodput"):
        assert found[figure] == expected[figure], figure
    assert found["mean_utility"] == pytest.approx(expected["mean_utility"], rel=1e-12)
    ttft_s = np.quantile(Outcomes(whole).ttft_s, 0.5, method="higher")
    assert found["ttft_p50_s"] == (pytest.approx(ttft_s, rel=2e-3) if np.isfinite(ttft_s) else None)
    assert found["itl_p50_s"] == pytest.approx(expected["itl_p50_s"], rel=2e-3)


@pytest.mark.parametrize(
    ("policy", "fields", "line"),
    [
        ("random", {}, "policy: expected a compiled scheduler"),
        ("slai", {"prefix_caching": True}, "prefix_caching: expected false"),
        ("slai", {"async_lag": True}, "async_lag: expected false"),
    ],
)
def test_what_a_window_cannot_hold_is_refused(policy, fields, line):
    with pytest.raises(ConfigError, match=f"^{line}"):
        long_run(world("poisson", **fields), policy, 0)


def test_a_window_that_is_too_small_says_so():
    with pytest.raises(ConfigError, match=r"^chunk: expected more requests than come during one batch"):
        long_run(world("no more arrivals", qps=500.0), "slai", 0, chunk=1)


def shifted(table, by_s):
    return replace(table, arrival_s=table.arrival_s + by_s)


@pytest.mark.parametrize("policy", ["slai", "srpt-capped"])
@pytest.mark.parametrize("by_s", [1e6 + 0.5, 1e9])
def test_requests_that_come_a_billion_seconds_later_are_served_alike(policy, by_s):
    given = world("poisson", warmup_s=0.0)
    table = make_table(given, 1)
    here, there = (simulate(given, policy, 1, table=each, num_steps=10_000) for each in (table, shifted(table, by_s)))
    for column in ("decode_tokens", "prefill_tokens", "num_running", "num_waiting"):
        np.testing.assert_array_equal(here.steps[column], there.steps[column])
    np.testing.assert_allclose(there.steps["start_s"] - by_s, here.steps["start_s"], rtol=0.0, atol=1e-6)
    for column in TIMES:
        np.testing.assert_allclose(there.requests[column] - by_s, here.requests[column], rtol=0.0, atol=1e-6)
    assert row(there)["slo_attainment"] == row(here)["slo_attainment"]
    assert there.table.arrival_s[0] == table.arrival_s[0] + by_s


@pytest.mark.parametrize("late_s", [1e10, float("inf")])
def test_times_that_float64_cannot_tell_apart_are_refused(late_s):
    given = world("poisson")
    with pytest.raises(ConfigError, match=r"^arrival_s: expected times below 4,294,967,296 s"):
        simulate(given, "slai", 0, table=RequestTable.of([late_s], 5, 5))


@pytest.mark.parametrize("num_requests", [None, 20])
def test_rates_that_switch_without_end_before_somebody_comes_are_refused(num_requests, monkeypatch):
    monkeypatch.setattr("llmsched_gym.workload.arrivals.MAX_SWITCHES", 10_000)
    with pytest.raises(ConfigError, match=r"^qps: at 6.25e-07 requests a second the rate switches too often"):
        make_table(scenario("drift", qps=1e-6, num_requests=num_requests), 0)


@pytest.mark.parametrize("suite", ["paper", "chat", "cluster"])
def test_rates_at_which_requests_come_that_late_are_refused_before_anything_is_written(suite, tmp_path):
    given = scenario(suite, num_requests=50_000)
    with pytest.raises(ConfigError, match=r"^arrival_s: expected times below .* at 1e-06 arrivals a second$"):
        evaluate(given, ["slai"], qps=[1.0, 1e-6], seeds=1, out=tmp_path / "grid")
    with pytest.raises(ConfigError, match=r"^arrival_s: expected times below"):
        capacity(given, ["slai"], "ttft-median", qps=(1e-6, 1.0), seeds=1, out=tmp_path / "search")
    with pytest.raises(ConfigError, match=r"^arrival_s: expected times below"):
        simulate(given.replace(qps=1e-6), "slai", 0)
    assert not list(tmp_path.iterdir())
