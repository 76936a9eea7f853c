"""What a report says of a folder: the head, bounds and remarks; broken folders are one line."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from llmsched_gym.config import scenario
from llmsched_gym.fluid import fluid_capacity
from llmsched_gym.report import (
    findings,
    plots,
    settings,
    statistics,
)
from llmsched_gym.report.results import read_results
from llmsched_gym.report.text import load_label
from llmsched_gym.report.write import ReportError, write_report
from tests.report_folders import make_folder, row

pytest.importorskip("plotly")


def test_the_summary_says_up_to_which_load_gaps_are_in_time(tmp_path):
    late = {"itl_p99_s_by_class": {"strict": 0.2, "relaxed": 0.3}}
    lost = {"itl_p99_s_by_class": {"strict": None, "relaxed": None}}
    rows = [row(p, q, 0, strict=0.5) for q in (1.0, 2.0) for p in ("good",)]
    rows += [row("half", 1.0, 0, strict=0.5), row("half", 2.0, 0, strict=0.5, **late)]
    rows += [row(p, q, 0, strict=0.5, **(late if p == "bad" else lost)) for q in (1.0, 2.0) for p in ("bad", "never")]
    text = findings.overall(read_results(make_folder(tmp_path / "out", rows)))[1]
    assert text.endswith("at all loads under `good`; up to 1 requests/s under `half`; at none under `bad` and `never`.")


def bounded_rows(better=0.0):
    """Two schedulers and the clairvoyant one, which attains 4 points more than slai, less `better`, at both loads."""
    attained = {"sarathi": 0.7, "slai": 0.9 + better, "shortest-total": 0.94}
    return [
        row(p, q, s, attained=a + 0.001 * s, strict=0.5)
        for p, a in attained.items()
        for q in (1.8, 2.2)
        for s in range(10)
    ]


def test_a_report_says_how_far_from_the_best(tmp_path):
    folder = make_folder(tmp_path / "out", bounded_rows())
    write_report(folder)
    text = (folder / "report.md").read_text()
    html = re.sub(r"</?(strong|code)>", "", (folder / "report.html").read_text())
    for part in (re.sub(r"[`*]", "", text), html):
        assert "sustains more than 2.01 requests/s" in part and "so does KV memory" in part
        assert "The highest load that was run is 110 % of it." in part
        assert "the best of the others attains 4.0 points [4.0–4.0] less at 2.2 requests/s (slai)" in part
        assert "slai has the highest SLO attainment" in part and "is possible" not in part
        assert "shortest-total (oracle) is told every output length" in part
        assert "1.8 (90 %)" in part and "2.2 (110 %)" in part
    assert "| slai | **−4.0** [−4.0 to −4.0] | **−4.0** [−4.0 to −4.0] |" in text
    assert "| shortest-total | 94.4 | 94.4 |" in text  # never emphasised
    assert html.count('"fluid capacity 2.01"') == 6  # charts


def test_a_scheduler_may_attain_more_than_the_clairvoyant_one(tmp_path):
    results = read_results(make_folder(tmp_path / "out", [r for r in bounded_rows(0.05) if r["seed"] < 3]))
    text = findings.overall(results)[1]
    assert "attains 1.0 points more at 2.2 requests/s (`slai`). More than `shortest-total` is possible" in text
    gaps = statistics.attainment_gap(results.rows)
    assert gaps["policy"].tolist() == ["sarathi", "slai"] * 2
    assert gaps["value"].tolist() == pytest.approx([-0.24, 0.01] * 2)


@pytest.mark.parametrize(
    "change",
    [
        {"scenario": None},
        {"scenario": {"trace": "no/such/trace.csv"}},
        {"scenario": {"frob": 1}},
        {"scenario": {"profile": "no-such-profile"}},
        {"scenario": {"backend": "transformers"}},
    ],
)
def test_without_a_fluid_capacity_there_is_still_a_report(tmp_path, change):
    folder = make_folder(tmp_path / "out", [row(p, q, 0) for p in ("slai", "sarathi") for q in (1.8, 2.2)])
    path = folder / "config.json"
    config = json.loads(path.read_text())
    scenario_fields = change["scenario"] and config["scenario"] | change["scenario"]
    path.write_text(json.dumps(config | {"scenario": scenario_fields}))
    assert read_results(folder).fluid is None
    text = write_report(folder).read_text()
    assert "luid capacity" not in text and "How far from the best" not in text


def test_broken_files_and_no_folder_are_one_line(tmp_path):
    with pytest.raises(ReportError, match="nowhere"):
        write_report(tmp_path / "nowhere")
    folder = make_folder(tmp_path / "out", [row("a", 1.0, 0)])
    for name in ("config.json", "requests.parquet", "capacity.json"):
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_bytes(b"{ no")
        with pytest.raises(ReportError, match=re.escape(name)) as error:
            read_results(folder)
        assert "\n" not in str(error.value)
        if before is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(before)
    assert read_results(folder).focus == 1.0


def settings_of(folder):
    return dict(settings.settings(read_results(folder)))


def test_the_head_says_what_was_run_not_what_the_suite_would_do(tmp_path):
    rows = [row("a", q, s, arrivals="gamma") for q in (1.0, 2.0) for s in range(2)]
    found = settings_of(make_folder(tmp_path / "one", rows, arrivals="gamma", burstiness=0.25, warmup_s=30.0))
    assert found["Suite"] == "paper" and found["Arrivals"] == "gamma of shape 0.25 at 1, 2 requests/s"
    assert found["Around them"] == "30 s of warm-up; no arrivals behind them, until all are served"
    assert found["Engine"].startswith("14,733 KV blocks, max_num_seqs 128, max_num_batched_tokens 8,192, max_model_len")
    kept = [row("a", 5.9, s, requested=None, arrivals="trace", profile="a100-mistral-7b") for s in range(10)]
    folder = make_folder(tmp_path / "two", kept, num_kv_blocks=2000)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"trace_remarks": ["its 20 requests start over"]}))
    found = settings_of(folder)
    assert found["Arrivals"] == "the trace's own times, as they are" and found["Engine"].startswith("2,000 KV blocks")
    assert found["Cost profile"] == "a100-mistral-7b (linear layers measured, attention a roofline)"
    assert found["Trace"] == "its 20 requests start over"
    assert load_label(read_results(folder).rows, 5.9) == "the trace's own 5.9 requests/s"


def test_there_are_no_intervals_where_all_seeds_have_the_same_requests(tmp_path):
    rows = [
        row(p, 5.9, s, requested=None, arrivals="trace", attained=0.8 + 0.01 * s, ttft_s=t)
        for p, t in (("sarathi", 0.5), ("slai", 0.4))
        for s in range(10)
    ]
    assert statistics.comparison_table(rows)[["low", "high"]].isna().all(axis=None)
    assert statistics.ttft_reduction(statistics.tidy(rows))[["low", "high"]].isna().all(axis=None)
    folder = make_folder(tmp_path / "out", rows)
    text = write_report(folder).with_suffix(".md").read_text()
    assert "all seeds have the same requests" in text and "bootstrap" not in text and "Ranges are 95 %" not in text
    drawn = statistics.comparison_table([r | {"arrivals": "poisson"} for r in rows])
    assert drawn["low"].notna().any()


def test_rejections_name_the_setting(tmp_path):
    rows = [row("a", 1.0, s, num_rejected=3, num_too_long=2) for s in range(2)]
    results = read_results(make_folder(tmp_path / "out", rows, max_model_len=4000))
    text = " ".join(findings.remarks(results, statistics.comparison_table(results.rows)))
    assert "3.00 % of requests were rejected on arrival" in text and "p99 TTFT is infinite" in text
    assert "2.00 % are longer than `max_model_len=4000`; 1.00 % need more KV blocks than there are" in text


def test_a_capacity_above_the_fluid_one_is_remarked_on(tmp_path):
    capacity = [
        {"policy": p, "criterion": "ttft-median", "capacity_qps": q, "ci_low": None, "ci_high": None}
        | {"attained_by_decile": [1.0] * 9 + [0.25]}
        for p, q in (("slai", 1.7), ("on-time", 2.31))
    ]
    rows = [row(p, q, 0) for p in ("slai", "on-time") for q in (1.8, 2.2)]
    folder = make_folder(tmp_path / "out", rows, capacity=capacity)
    text = write_report(folder).with_suffix(".md").read_text()
    assert "Above the fluid capacity, 2.01: `on-time` 2.31." in text
    assert "long prompts that starve (of the tenth with the longest prompts 25 % attain)" in text
    figure = plots.plot_capacity(read_results(folder).capacity, fluid_qps=2.01)
    assert "fluid capacity, 2.01 requests/s" in [t.get_text() for t in figure.legends[0].get_texts()]


def test_a_folder_keeps_its_fluid_capacity(tmp_path):
    fluid = fluid_capacity(scenario("paper"))
    folder = make_folder(tmp_path / "out", [row("slai", 1.8, 0)])
    config = json.loads((folder / "config.json").read_text())
    kept = json.loads(json.dumps(dataclasses.asdict(fluid) | {"qps": 9.99}))
    (folder / "config.json").write_text(json.dumps(config | {"fluid": kept}))
    assert read_results(folder).fluid.qps == 9.99
