"""Who won, the report of capacities, and several folders compared."""

from __future__ import annotations

import json
import sys

import pandas as pd
import pytest

from llmsched_gym.cli import main as llmsched
from llmsched_gym.config import scenario
from llmsched_gym.files import encode
from llmsched_gym.report import statistics, verdict
from llmsched_gym.report.write import ReportError, write_report
from tests.report_folders import charts_of, itl_of, make_folder, row

pytest.importorskip("plotly")


def rows_of(shares, seeds=10, loads=(1.0, 2.0), **fields):
    """Rows whose attainment is a function of the seed, by policy."""
    return [row(p, q, s, attained=f(s), **fields) for p, f in shares.items() for q in loads for s in range(seeds)]


# Who won


def test_a_winner_is_told_with_its_lead_and_an_interval():
    rows = statistics.tidy(
        rows_of({"a": lambda s: 0.90 + 0.001 * s, "b": lambda s: 0.88 + 0.0011 * s, "c": lambda s: 0.5})
    )
    found = verdict.verdict(rows)
    assert (found.leader, found.next, found.is_clear) == ("a", "b", True)
    # differences 0.02 - 0.0001 s: mean 0.01955, standard error 0.0001 * 3.0277 / sqrt(10), t(9) = 2.262
    assert (found.lead, found.low, found.high) == pytest.approx((0.01955, 0.019333, 0.019767), abs=1e-5)
    text = "**Winner: `a`**, 90.5 % SLO attainment over the 2 loads: 2.0 points [1.9–2.0] more than `b`, the next"
    assert verdict.sentence(rows) == f"{text}, paired by seed."
    table = verdict.table(rows)
    assert [[cell.text for cell in cells] for cells in table.rows] == [
        [load, "a", "90.5", "b", "2.0", "clear"] for load in ("1", "2")
    ]


def test_there_is_no_clear_winner_where_an_interval_contains_zero():
    rows = rows_of({"a": lambda s: 0.9 + 0.01 * (-1) ** s, "b": lambda s: 0.899 - 0.01 * (-1) ** s, "c": lambda s: 0.5})
    text = verdict.sentence(statistics.tidy(rows))
    assert text.startswith("**No clear winner:** `a` leads") and "its interval against `b` contains 0" in text
    assert "too few seeds" in verdict.sentence(statistics.tidy([r for r in rows if r["seed"] < 9]))
    kept = statistics.tidy([r | {"arrivals": "trace"} for r in rows])
    assert "all seeds have the same requests" in verdict.sentence(kept)


def test_a_verdict_is_of_the_loads_that_all_have_run():
    easy = [row(policy, 1.0, seed, attained=0.95 + 0.001 * (seed % 3)) for policy in "ab" for seed in range(10)]
    hard = [row(policy, 2.0, seed, attained=0.5) for policy in "ab" for seed in range(10)]
    newcomer = [row("c", 1.0, seed, attained=0.9 + 0.001 * (seed % 3)) for seed in range(10)]
    df = statistics.tidy(easy + hard + newcomer)
    found = verdict.verdict(df)
    assert found is not None and found.leader == "a" and found.share == pytest.approx(0.9509)
    assert "95.1 % SLO attainment at what all ran (1 requests/s)" in verdict.sentence(df)
    alone_above = statistics.tidy(easy + hard[:10] + newcomer)  # at the higher load b has not run
    assert [cells[0].text for cells in verdict.table(alone_above).rows] == ["1"]
    nothing_shared = statistics.tidy(hard + newcomer)
    assert verdict.verdict(nothing_shared) is None and verdict.sentence(nothing_shared) == ""


def test_a_verdict_needs_rivals_that_know_no_lengths():
    alone = statistics.tidy(rows_of({"a": lambda s: 0.9, "shortest-total": lambda s: 0.95}))
    assert verdict.sentence(alone) == "" and verdict.table(alone) is None
    same = statistics.tidy(rows_of({"a": lambda s: 0.9, "b": lambda s: 0.9}, seeds=2))
    assert "attain the same, 90.0 %" in verdict.sentence(same)


# Capacities


def capacity_folder(folder, *, low=1.2, high=1.6):
    folder.mkdir()
    base = {"criterion": "attainment:0.9", "ci_low": None, "ci_high": None, "note": None, "ratio_to": "sarathi"}
    none = {"ratio": 1.0, "ratio_ci_low": 1.0, "ratio_ci_high": 1.0}
    results = [
        base | none | {"policy": "sarathi", "capacity_qps": 1.4},
        base | {"policy": "slai", "capacity_qps": 2.1, "ratio": 1.5, "ratio_ci_low": low, "ratio_ci_high": high},
        base | none | {"policy": "never", "capacity_qps": None, "note": "not met at any rate"},
    ]
    curves = {"sarathi": [{"qps": 1.3, "attainment": -0.1}, {"qps": 1.5, "attainment": 0.1}], "slai": []}
    world = encode(scenario("default", num_requests=100).to_dict())
    config = {"scenario": world, "policies": ["sarathi", "slai"], "criterion": "attainment:0.9", "qps": [0.1, 16.0]}
    kept = {"config": config | {"seeds": 10, "first_seed": 0}, "results": results, "curves": curves}
    (folder / "capacity-attainment-0.9.json").write_text(json.dumps(kept))
    return folder


def test_a_folder_of_capacities_has_a_report(tmp_path):
    folder = capacity_folder(tmp_path / "out")
    write_report(folder)
    text = (folder / "report.md").read_text()
    assert "**Winner: `slai`** under `attainment:0.9`: 2.10 requests/s, 1.50 [1.20–1.60] times `sarathi`'s" in text
    assert "not met at any rate" in text and "Above the fluid capacity, 2.01: `slai` 2.10." in text
    assert "llmsched capacity --suite default --policy sarathi,slai --criterion attainment:0.9 --qps 0.1,16" in text
    charts = charts_of(folder)
    assert list(charts) == ["capacity-attainment-0.9", "capacity-attainment-0.9-attainment"]
    assert [t["y"] for t in charts["capacity-attainment-0.9-attainment"]["traces"]] == [[-0.1, 0.1]]
    assert pd.read_csv(folder / "tables" / "capacity-under-attainment-0.9.csv")["policy"].tolist()[:2] == [
        "sarathi",
        "slai",
    ]


def test_capacities_that_cannot_be_told_apart_have_no_clear_winner(tmp_path):
    folder = capacity_folder(tmp_path / "out", low=0.9)
    assert "No clear winner" in write_report(folder).read_text()
    path = folder / "capacity-attainment-0.9.json"
    path.write_text("{}")
    with pytest.raises(ReportError, match=r"capacity-attainment-0\.9\.json"):
        write_report(folder)


def test_without_the_charting_library_nothing_is_written_and_one_line_says_so(tmp_path, capsys, monkeypatch):
    folder = capacity_folder(tmp_path / "out")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert llmsched(["report", str(folder)]) == 2
    assert capsys.readouterr().err.endswith("needs plotly, which is not installed: pip install plotly\n")
    assert [path.name for path in folder.iterdir()] == ["capacity-attainment-0.9.json"]


# Several folders


def two_folders(tmp_path, **other):
    folders = []
    for name, fields in (("one", {}), ("two", other)):
        rows = rows_of({"slai": lambda s: 0.9, f"mine-{name}": lambda s: 0.8}, seeds=2)
        folders.append(make_folder(tmp_path / name, rows, itl=itl_of(["slai"], 2.0), **fields))
    return folders


def test_folders_are_compared_by_policy_and_name(tmp_path, capsys):
    one, two = two_folders(tmp_path, jitter=0.2)
    out = tmp_path / "both"
    assert llmsched(["report", str(one), str(two), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    rows = pd.read_parquet(out / "runs.parquet")
    assert list(rows["policy"].unique()) == ["slai (one)", "mine-one", "slai (two)", "mine-two"]
    assert "jitter: 0.0 in one, 0.2 in two" in text and "in worlds that differ" in text
    assert "llmsched report" in text and "--out both" in text
    assert llmsched(["report", str(one), str(two), "--out", str(out)]) == 0  # its own folder again


def test_what_cannot_be_compared_is_one_line(tmp_path, capsys):
    one, two = two_folders(tmp_path)
    before = sorted(path.name for path in one.iterdir())
    for words, message in (
        ([str(one), str(two)], "--out FOLDER"),
        ([str(one), "--out", str(tmp_path / "x")], "--out FOLDER"),
        ([str(one), str(one), "--out", str(tmp_path / "x")], "one twice"),
        ([str(one), str(two), "--out", str(two)], "holds results of its own"),
        ([str(one), str(tmp_path / "no"), "--out", str(tmp_path / "x")], "is no folder"),
    ):
        assert llmsched(["report", *words]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert sorted(path.name for path in one.iterdir()) == before and not (tmp_path / "x").exists()
