"""Reports of sessions and the prefix cache."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from llmsched_gym.config import scenario
from llmsched_gym.report import (
    plots,
    statistics,
    tables,
)
from llmsched_gym.report.text import load_label
from llmsched_gym.report.write import write_report
from tests.report_folders import attainment, charts_of, row

pytest.importorskip("plotly")


def of_sessions(policy, qps, seed, **fields):
    """A run of 100 turns of 25 sessions with a prefix cache."""
    found = dict(num_cancelled=4, num_to_come=0, num_sessions=25, session_on_time=0.8)
    found |= dict(session_p50_s=100.0, session_p99_s=400.0, prefix_hit_rate=0.75)
    found |= dict(num_cached_tokens=30_000, num_recached_tokens=1_000, computed_tokens=10_000)
    return row(policy, qps, seed, **(found | fields))


def test_the_table_of_sessions_has_means_of_shares_and_medians_of_times():
    rows = [of_sessions("a", 0.5, s, session_on_time=0.1 * s, session_p50_s=t) for s, t in enumerate((1.0, 2.0, 9.0))]
    table = tables.session_table(statistics.tidy(rows))
    labels = ["policy", "load (sessions/s)", "on time (%)", "p50 (s)", "p99 (s)", "cancelled (%)", "hit rate (%)"]
    assert table.labels == [*labels, "saved (1000)", "saved after preemptions (1000)", "computed (1000)"]
    assert [c.text for c in table.rows[0]] == ["a", "0.5", "10.0", "2.00", "400", "4.0", "75.0", "30", "1", "10"]
    assert [c.kind for c in table.rows[0][2:5]] == ["", "grey", "grey"]  # 37 of 75 sessions lie beyond the median
    assert sum(span for _, span in table.groups) == len(table.labels) and "†" in table.notes[-1]


def test_what_is_not_there_is_left_out_of_the_table_of_sessions():
    no_cache = dict(prefix_hit_rate=None, num_cached_tokens=None, num_recached_tokens=None)
    no_turns = dict(num_sessions=None, session_on_time=None, session_p50_s=None, session_p99_s=None, num_cancelled=0)
    alone = tables.session_table(statistics.tidy([of_sessions("a", 0.5, 0, **no_cache)]))
    assert alone.labels[2:] == ["on time (%)", "p50 (s)", "p99 (s)", "cancelled (%)"]
    cached = tables.session_table(statistics.tidy([of_sessions("a", 0.5, 0, **no_turns)]))
    assert cached.labels[1:3] == ["load (requests/s)", "hit rate (%)"] and not cached.notes
    neither = statistics.tidy([of_sessions("a", 0.5, 0, **no_cache, **no_turns)])
    assert tables.session_table(neither) is None
    assert tables.session_table(statistics.tidy([row("a", 0.5, 0)])) is None  # rows made before there were such columns


def test_loads_at_which_everything_is_infinite_are_within_the_axes():
    rows = statistics.tidy([row("a", 1.0, 0), row("a", 8.0, 0, ttft_s=None), row("b", 1.0, 0), row("b", 8.0, 0)])
    for given in (rows, rows[rows["policy"] == "a"]):
        low, high = plots.plot_ttft(given).axes[0].get_xlim()
        assert low < 1.0 and 8.0 < high < 9.0


def test_loads_of_sessions_are_sessions_per_second():
    rows = statistics.tidy([of_sessions("a", q, s) for q in (0.5, 1.0) for s in range(2)])
    assert load_label(rows, 0.5) == "0.5 sessions/s" and load_label(rows, 1.0) == "1 session/s"
    assert attainment(rows).layout["xaxis"]["title"]["text"] == "Load (sessions/s)"


def test_a_report_of_sessions(tmp_path):
    from llmsched_gym.evaluation.grid import evaluate

    # overloaded: some turns are abandoned, and those behind them cancelled
    world = scenario("chat", num_requests=150, warmup_s=0.0, patience_s=1.0)
    rows = evaluate(world, ["slai", "vllm-v1"], qps=[0.5, 3.0], seeds=1, out=tmp_path)
    assert max(r["num_cancelled"] for r in rows) > 0
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "## Sessions and prefix cache" in text and "requests/s" not in text.replace("(requests/s)", "")
    assert "0.5, 3 sessions/s" in text and "cancelled" in text and "ms per new prompt token" in text
    assert charts_of(tmp_path).keys() >= {"sessions-on-time", "prefix-hit-rate"}
    assert not [a for a in charts_of(tmp_path)["goodput"]["layout"]["annotations"] if "fluid" in a["text"]]

    for name in ("runs", "requests"):  # a folder made before there were such columns
        path = tmp_path / f"{name}.parquet"
        frame = pd.read_parquet(path)
        new = [c for c in frame if re.match("num_cancelled|num_to_come|num_sess|session|prefix_hit|turn|new_tok", c)]
        frame.drop(columns=[*new, *(c for c in frame if "cached" in c or c == "computed_tokens")]).to_parquet(path)
    write_report(tmp_path)
    assert "Sessions" not in (tmp_path / "report.md").read_text()
