"""Figures over seeds, checked by hand on tiny frames, and how they are printed."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest

from llmsched_gym.report import (
    distance,
    findings,
    statistics,
    tables,
)
from llmsched_gym.report.results import read_results
from llmsched_gym.report.text import estimate, number
from llmsched_gym.report.write import ReportError
from tests.report_folders import line, make_folder, row

pytest.importorskip("plotly")


def test_figures_are_over_seeds_and_need_ten_for_an_interval():
    rows = [row("a", 1.0, s, ttft_s=0.1 * (s + 1)) for s in range(4)]
    few = line(statistics.comparison_table(rows), "a", "ttft_p50_s")
    assert few["value"] == pytest.approx(0.25) and few["num_seeds"] == 4
    assert math.isnan(few["low"]) and math.isnan(few["high"])
    rows = [row("a", 1.0, s, ttft_s=0.1 * (s + 1)) for s in range(10)]
    many = line(statistics.comparison_table(rows), "a", "ttft_p50_s")
    assert many["value"] == pytest.approx(0.55) and (many["low"], many["high"]) == pytest.approx((0.2, 0.9))
    rows = [row("a", 1.0, s, attained=0.1 * s) for s in range(10)]
    share = line(statistics.comparison_table(rows), "a", "slo_attainment")
    # t(9) = 2.262 times the standard error 0.3028 / sqrt(10)
    assert (share["value"], share["low"], share["high"]) == pytest.approx((0.45, 0.2334, 0.6666), abs=1e-3)


def test_classes_may_be_structs_or_text_and_are_left_out_where_there_is_nobody():
    rows = [row("a", 1.0, 0, strict=0.5), row("a", 1.0, 1)]
    as_text = [r | {k: json.dumps(v) for k, v in r.items() if k.endswith("_by_class")} for r in rows]
    for given in (rows, as_text):
        strict = line(statistics.comparison_table(given), "a", "slo_attainment_strict")
        assert strict["value"] == 0.5 and strict["num_seeds"] == 1
    table = statistics.comparison_table([row("a", 1.0, 0)])
    assert "slo_attainment_strict" not in set(table["metric"]) and "slo_attainment_relaxed" in set(table["metric"])


def test_a_missing_percentile_of_ttft_is_infinite():
    table = statistics.comparison_table(
        [row("a", 1.0, 0), row("a", 1.0, 1, ttft_s=None), row("b", 1.0, 0), row("b", 1.0, 1)]
    )
    lost = line(table, "a", "ttft_p50_s")
    assert math.isinf(lost["value"]) and not lost["best"]
    assert number(lost["value"]) == "∞"


def test_a_figure_says_on_how_many_seeds_it_is_infinite():
    rows = [row("a", 1.0, s, ttft_s=None if s < 3 else 0.1 * s, num_requests=5000) for s in range(10)]
    labels, cells = _printed(rows, "a")
    cell = dict(zip(labels, cells, strict=True))["p99 (s)"]
    assert cell.text == "7.50" and cell.interval == "4.00–∞; ∞ in 3 of 10 seeds"  # of 3 to 9 s and three infinite ones


@pytest.mark.parametrize(("num_requests", "grey"), [(999, True), (1000, False)])
def test_a_percentile_is_grey_below_100_samples_beyond_it_in_all_runs(num_requests, grey):
    rows = [
        row(p, 1.0, s, strict=0.5, num_requests=num_requests, ttft_s=t)
        for p, t in (("a", 0.4), ("b", 0.5))
        for s in range(10)
    ]
    table = statistics.comparison_table(rows)
    p99 = line(table, "a", "ttft_p99_s")
    assert p99["grey"] == grey and p99["best"] == (not grey)
    assert not line(table, "a", "ttft_p50_s")["grey"]
    assert line(table, "a", "itl_p99_s_strict")["grey"]  # 5,000 gaps: 50 beyond
    assert not line(table, "a", "itl_p99_s_relaxed")["grey"]  # 200,000
    cells = {label: cell for label, cell in zip(*_printed(rows, "a"), strict=True)}
    assert (cells["p99 (s)"].kind == tables.GREY) == grey


def _printed(rows, policy):
    df = statistics.tidy(rows)
    table = tables.comparison_tables(df, statistics.comparison_table(df))[0]
    return table.labels, next(cells for cells in table.rows if cells[0].text == policy)


def test_best_is_emphasised_and_what_cannot_be_told_apart_is_marked():
    noise = np.linspace(-0.05, 0.05, 10)
    rows = [row("best", 1.0, s, attained=0.90 + noise[s]) for s in range(10)]
    rows += [row("same", 1.0, s, attained=0.899 - noise[s]) for s in range(10)]
    rows += [row("worse", 1.0, s, attained=0.88 + noise[s]) for s in range(10)]  # paired: always 0.02 below
    table = statistics.comparison_table(rows)
    found = {p: tuple(line(table, p, "slo_attainment")[["best", "tied"]]) for p in ("best", "same", "worse")}
    assert found == {"best": (True, False), "same": (False, True), "worse": (False, False)}
    assert not line(table, "best", "kv_cache_usage_max")["best"]  # neither more nor less is better
    assert not table[table["metric"] == "itl_p99_s_relaxed"]["best"].any()  # all the same
    text = findings.summary(statistics.tidy(rows), table)[0]
    assert "`best` has the highest SLO attainment, 90.0 %" in text and "`same` cannot be told apart" in text


def test_ttft_reduction_is_the_ratio_of_means_over_common_seeds():
    rows = [row("sarathi", 1.0, s, ttft_s=1.0 + s) for s in range(3)]
    rows += [row("slai", 1.0, s, ttft_s=0.5 * (1.0 + s)) for s in range(4)]
    found = statistics.ttft_reduction(statistics.tidy(rows))
    assert found["policy"].tolist() == ["slai"]
    assert found["value"].iloc[0] == pytest.approx(0.5) and found["num_seeds"].iloc[0] == 3


def test_figures_beside_the_paper():
    rows = [row(p, q, 0, ttft_s=t) for q, t in ((1.6, 0.5), (1.8, 0.3)) for p, t in (("sarathi", 1.0), ("slai", t))]
    beside = statistics.reduction_against_reference(statistics.ttft_reduction(statistics.tidy(rows))).set_index("load")
    assert beside.index.tolist() == [1.6, 1.73, 1.8]  # 1.0 and 1.36 lie outside what was run
    assert beside.loc[1.6, "difference"] == pytest.approx(0.5 - 0.44)
    assert beside.loc[1.73, "ours"] == pytest.approx(0.5 + 0.2 * 0.65) and beside.loc[1.73, "interpolated"]
    capacity = pd.DataFrame(
        [
            {"policy": p, "criterion": "ttft-median", "capacity_qps": q, "ci_low": math.nan, "ci_high": math.nan}
            for p, q in (("sarathi", 1.4), ("slai", 1.68), ("mine", 2.0))
        ]
    )
    table = tables.capacity_reference_table(capacity)
    assert [[cell.text for cell in cells] for cells in table.rows] == [
        ["sarathi", "1.40", "1.36", "–", "+0.04"],
        ["slai", "1.68", "1.68", "–", "+0.00"],
        ["slai / sarathi", "1.20", "1.24", "1.26", "−0.04"],
    ]


def test_rates_drawn_per_seed_are_one_load_in_tables_and_bins_in_figures():
    rates = np.linspace(1.0, 2.2, 12)
    drawn = statistics.tidy([row(p, rates[s], s, requested=None) for p in "ab" for s in range(12)])
    assert drawn["load"].nunique() == 1
    bins = statistics.binned_loads(drawn)
    assert bins.groupby("load")["seed"].nunique().tolist() == [3, 3, 3, 3]
    assert bins["load"].min() == pytest.approx(rates[:3].mean())
    without = [{k: v for k, v in r.items() if k != "requested_qps"} for r in drawn.to_dict("records")]
    assert statistics.tidy(without)["drawn"].all()
    given = statistics.tidy([row("a", q, s) for q in (1.0, 2.0) for s in range(3)])
    assert sorted(given["load"].unique()) == [1.0, 2.0] and statistics.binned_loads(given) is given


@pytest.mark.parametrize(
    ("rows", "what"),
    [([], "policy"), ([{"policy": "a"}], "qps"), ([row("a", 1.0, 0), row("a", 1.0, 0)], "twice")],
)
def test_rows_that_make_no_table(rows, what):
    with pytest.raises(ReportError, match=what):
        statistics.comparison_table(rows)


def test_numbers_as_text():
    assert [number(v) for v in (0.09512, 0.4567, 12.34, 345.6, 12345.0, -0.5, math.nan)] == [
        "0.0951", "0.457", "12.3", "346", "12,345", "−0.500", "–",
    ]  # fmt: skip
    assert estimate(94.94, 93.8, 95.9, " %", 1) == "94.9 % [93.8–95.9]"
    assert estimate(1.0, -0.5, math.nan, "", 1) == "1.0"


def test_equal_figures_are_emphasised_alike(tmp_path):
    rows = [row(p, q, 0, attained=a) for q in (1.0, 2.0) for p, a in (("a", 0.90001), ("b", 0.90004), ("c", 0.8))]
    matrix = tables.attainment_matrix(statistics.tidy(rows))
    assert [[cell.kind for cell in cells[1:]] for cells in matrix.rows] == [["best"] * 2, ["best"] * 2, [""] * 2]
    bounded = [*rows, *(row("shortest-total", q, 0, attained=0.95) for q in (1.0, 2.0))]
    gaps = distance.gap_table(read_results(make_folder(tmp_path / "out", bounded)))
    assert [[cell.kind for cell in cells[1:]] for cells in gaps.rows] == [["best"] * 2, ["best"] * 2, [""] * 2]
