"""Charts draw what there is, within their axes."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.lines import Line2D

from llmsched_gym.config import scenario
from llmsched_gym.fluid import fluid_capacity
from llmsched_gym.report import (
    batch_charts,
    bounds,
    load_charts,
    load_section,
    plots,
    request_charts,
    statistics,
)
from llmsched_gym.report.results import read_results
from llmsched_gym.report.write import ReportError, write_report
from tests.report_folders import attainment, itl_of, make_folder, requests_of, row, steps_of

pytest.importorskip("plotly")


def ttft(rows, percentile=50):
    columns = {"all": f"ttft_p{percentile}_s"}
    return load_charts.against_load("t", rows, columns, "TTFT", "TTFT (s, log scale)", log=True)


def test_charts_draw_what_there_is_and_nothing_where_there_is_nothing():
    one = statistics.tidy([row("a", 1.0, 0), row("never", 1.0, 0, ttft_s=None)])
    assert [t["y"] for t in ttft(one).traces] == [["a"], ["never"]] and ttft(one).layout["rows"] == 2
    two = statistics.tidy([row(p, q, 0, ttft_s=t) for q in (1.0, 2.0) for p, t in (("a", 0.3), ("never", None))])
    found = ttft(two, 99)
    assert found.layout["yaxis"]["type"] == "log" and found.layout["xaxis"]["title"]["text"] == "Load (requests/s)"
    lost = next(t for t in found.traces if t["meta"]["policy"] == "never")
    assert lost["meta"]["symbols"] == ["triangle-up-open"] * 2 and "∞" in lost["text"][0]
    top = 10 ** found.layout["yaxis"]["range"][1]
    assert all(top / 1.2 < y < top for y in lost["y"])  # infinite values stand inside the upper edge
    never = [row("never", 1.0, 0)]
    for nothing in (
        ttft(statistics.tidy([row("never", 1.0, 0, ttft_s=None)])),
        request_charts.ttft_cdf(requests_of(never, 20)),
        request_charts.ttft_by_prompt(requests_of(never, 20)),
        request_charts.scatter(requests_of(never, 20)),
        request_charts.itl_cdf(itl_of(["a"], 1.0, ["relaxed"]), "strict", 0.1),
        batch_charts.timeline(steps_of(["a"], 1.0), []),
        load_charts.reduction_chart(statistics.ttft_reduction(statistics.tidy([row("sarathi", 1.0, 0)]))),
    ):
        assert nothing is None


def test_misses_are_what_attainment_leaves_and_none_is_a_triangle():
    rows = statistics.tidy([row(p, q, 0, attained=a) for q in (1.0, 2.0) for p, a in (("a", 0.9), ("best", 1.0))])
    columns = {"all": "slo_attainment"}
    chart = load_charts.against_load("m", rows, columns, "missed", "%", scale=100, log=True, missed=True)
    a, best = chart.traces
    assert a["y"] == [10, 10] and a["meta"]["symbols"] == [None, None]
    assert best["y"] == [0.5, 0.5] and best["meta"]["symbols"] == ["triangle-down-open"] * 2  # half of 1 in 100
    assert "0" in best["text"][0] and 10 ** chart.layout["yaxis"]["range"][0] < 0.5


def test_charts_show_the_fluid_capacity_near_their_loads():
    fluid = fluid_capacity(scenario("paper"))
    assert bounds.shown_capacity(fluid, [1.0, 1.8]) == fluid.qps
    assert bounds.shown_capacity(fluid, [1.0, 1.6]) is bounds.shown_capacity(fluid, [3.0]) is None
    assert bounds.shown_capacity(None, [1.8]) is None
    two = statistics.tidy([row(p, q, 0) for q in (1.0, 1.8) for p in ("a", "shortest-total")])
    layout = attainment(two, fluid_qps=2.0).layout
    assert layout["annotations"][0]["text"] == "fluid capacity 2.00" and layout["shapes"][0]["x0"] == 2.0
    assert not attainment(two).layout["shapes"]
    figure = plots.plot_attainment(two, fluid_qps=2.0)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "fluid capacity, 2.00 requests/s" in labels and "shortest-total (oracle)" in labels


def test_shares_by_prompt_length_are_of_tenths():
    lengths = np.arange(1, 101)
    requests = pd.DataFrame({"policy": "a", "prompt_tokens": lengths, "attained": lengths <= 25, "phase": "finished"})
    shares = request_charts.share_by_prompt(requests, "a").traces[0]["y"]
    assert shares == pytest.approx([100, 100, 50, 0, 0, 0, 0, 0, 0, 0])
    same = requests.assign(prompt_tokens=7)
    assert request_charts.share_by_prompt(same, "a").traces[0]["y"] == pytest.approx([25])


def test_the_scatter_marks_misses_and_leaves_few_of_them_out():
    requests = requests_of([row(p, 1.0, s) for p in "ab" for s in range(3)], 1000)
    requests = requests.assign(attained=np.arange(len(requests)) % 20 > 0)
    chart = request_charts.scatter(requests)
    points = {(t["meta"]["policy"], t["meta"]["missed"]): 0 for t in chart.traces}
    for trace in chart.traces:
        points[trace["meta"]["policy"], trace["meta"]["missed"]] += len(trace["x"])
    assert points == {(p, True): 150 for p in "ab"} | {(p, False): 850 for p in "ab"}
    assert "1,000 are shown" in chart.caption and len(chart.traces[0]["customdata"][0]) == len(chart.layout["figures"])


def test_batches_are_averaged_over_busy_time():
    steps = pd.DataFrame({"start_s": [0.0, 1.5], "duration_s": [1.0, 0.5], "decode_tokens": [10, 30]})
    assert batch_charts.averaged(steps, "decode_tokens", np.array([0.0, 1.0, 2.0, 3.0])) == pytest.approx([10, 30, 0])
    assert batch_charts.averaged(steps, "decode_tokens", np.array([0.0, 2.0])) == pytest.approx([(10 + 15) / 1.5])


def test_the_axis_of_kv_use_goes_from_0_to_what_was_used():
    steps = steps_of(["a"], 1.0, 40)
    both = pd.concat([steps.assign(replica=i) for i in range(2)])
    for chart in (batch_charts.replicas_over_time(both, ["a"]), batch_charts.timeline(steps, ["a"])):
        assert "range" not in chart.layout["yaxis3"] and chart.layout["yaxis3"]["rangemode"] == "tozero"


def test_a_limit_is_the_paper_s_only_where_it_is(tmp_path):
    for i, (suite, slo_s, is_papers) in enumerate([("paper", 0.5, True), ("mine", 0.5, False)]):
        folder = make_folder(tmp_path / str(i), [row("slai", 1.0, 0, suite=suite)])
        config = json.loads((folder / "config.json").read_text())
        config["scenario"]["ttft_slo_s"] = slo_s
        (folder / "config.json").write_text(json.dumps(config))
        charts = load_section.against_all_loads(read_results(folder)).shown
        (caption,) = [chart.caption for chart in charts if chart.name == "ttft-median"]
        assert ("the paper's limit" in caption) == is_papers and "in this scenario" in caption


@pytest.mark.parametrize("missing", ["runs.parquet", "requests.parquet", "config.json"])
def test_a_folder_without_a_file_is_one_line(tmp_path, missing):
    folder = make_folder(tmp_path / "out", [row("a", 1.0, 0)])
    (folder / missing).unlink()
    with pytest.raises(ReportError, match=missing) as error:
        write_report(folder)
    assert "\n" not in str(error.value) and isinstance(error.value, ValueError)


def test_marks_beyond_the_axes_stand_inside_them_and_captions_speak_of_no_others():
    rows = [row(p, q, 0, ttft_s=t) for q in (1.0, 2.0) for p, t in (("sarathi", 0.3), ("never", None), ("slow", 9.0))]
    two = statistics.tidy(rows)
    for figure in (plots.plot_ttft(two, 99), plots.plot_ttft_reduction(statistics.ttft_reduction(two))):
        figure.draw_without_rendering()
        ax = figure.axes[0]
        low, high = ax.get_window_extent().intervaly
        marks = [line for line in ax.lines if line.get_marker() in "^v" and line.get_linestyle() == "None"]
        assert marks
        for line in marks:
            middle = line.get_transform().transform(line.get_xydata())[:, 1]
            half = line.get_markersize() / 2 / 72 * figure.dpi
            assert (middle + half <= high + 1).all() and (middle - half >= low - 1).all()
    assert "Triangles" in load_section.infinite(two, 99) and "Triangles" in load_section.reduction(two).caption
    lowest = load_section.reduction(two).traces
    assert any("triangle-down-open" in t["meta"]["symbols"] for t in lowest)
    fine = statistics.tidy([r for r in rows if r["policy"] == "sarathi"] + [row("slai", q, 0) for q in (1.0, 2.0)])
    assert load_section.infinite(fine, 99) == "" and "Triangles" not in load_section.reduction(fine).caption


def test_a_figure_of_one_load_shows_whole_marks_and_intervals():
    shares = {"all": 1.0, "none": 0.0}
    one = statistics.tidy(
        [row(p, 1.0, s, attained=a, ttft_s=0.3 + 0.3 * s) for p, a in shares.items() for s in range(10)]
    )
    axes = plots.plot_attainment(one).axes[0]
    assert all(not line.get_clip_on() for line in axes.lines if line.get_marker() in Line2D.filled_markers)
    axes = plots.plot_ttft(one).axes[0]
    low, high = axes.get_xlim()
    ends = [x for line in axes.lines for x in line.get_xdata()]
    assert low < min(ends) and max(ends) < high
    slow = [row("sarathi", 1.0, 0, ttft_s=0.1), row("slow", 1.0, 0, ttft_s=90.0), row("slai", 1.0, 0, ttft_s=0.05)]
    axes = plots.plot_ttft_reduction(statistics.ttft_reduction(statistics.tidy(slow))).axes[0]
    assert axes.get_xlim()[0] >= -66 and "◂ −89,900" in [t.get_text().replace("-", "−") for t in axes.texts]
