"""`benchmarks.routers`: what its tables and figures say of known figures, and runs that go on where they stopped."""

import numpy as np
import pytest

from benchmarks import routers as benchmark
from benchmarks.routers import World

RNG = np.random.default_rng(0)
COMMON = RNG.uniform(-0.05, 0.05, 10)  # what seeds share


def rows_of(mean, hit_rate=0.5):
    """Rows of ten seeds: as much noise in common as between policies is hardly any."""
    utility = mean + COMMON + RNG.normal(0, 0.001, 10)
    return [
        {
            "mean_utility": float(u),
            "slo_attainment": float(u),
            "prefix_hit_rate": hit_rate,
            "imbalance": 1.0,
            "tokens_by_replica": [300, 100],
        }
        for u in utility
    ]


def test_who_wins_and_who_is_not_told_apart():
    found = {name: benchmark.values(rows_of(mean), "mean_utility") for name, mean in (("a", 0.8), ("b", 0.9))}
    assert benchmark.best_and_ties(found) == ("b", [])
    found["c"] = [value + error for value, error in zip(found["b"], 0.0011 * np.tile([1, -1.01], 5), strict=True)]
    assert benchmark.best_and_ties(found) == ("b", ["c"])
    (a, b, c) = benchmark.marked([found], ["a", "b", "c"], 3)
    assert b[1].startswith("**0.9") and c[1].endswith("*") and not c[1].startswith("*") and a[1][-1].isdigit()


def test_an_interval_needs_ten_seeds():
    assert benchmark.plus_minus([0.5] * 9, 3) == "0.500"
    assert benchmark.plus_minus([0.4, 0.6] * 5, 2) == "0.50 ±.08"


def test_the_tables_name_the_winner_of_each_world():
    found = {
        World("hetero", 0.9, 0.0, scheduler, router): rows_of(
            0.9 if (router == "jsq") == (scheduler == "slai") else 0.7
        )
        for scheduler in ("slai", "on-time")
        for router in ("jsq", "session")
    }
    text = benchmark.suites_text(found)
    first = text.splitlines()[4:6]
    assert "slai | jsq |" in first[0] and "on-time | session |" in first[1]
    assert "| jsq | 50, 1.50 | 50, 1.50 |" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_the_weights_and_ages_have_tables_and_figures():
    weights = benchmark.WEIGHTS
    found = {
        World("cluster", 0.9, 0.0, "slai", benchmark.affinity(w, i)): rows_of(0.5 + 0.01 * place)
        for i, chosen in (("32", weights), ("inf", benchmark.UNCHECKED))
        for place, w in enumerate(chosen)
    }
    lines = benchmark.weight_text(found).splitlines()
    assert len(lines) == 4 + len(found) and lines[4].startswith("| 0 | 32 |") and "| inf |" in lines[-1]
    best = [line for line in lines if "**" in line]
    assert len(best) == 1 and best[0].startswith("| 16 | 32 |")
    figure = benchmark.plot_weight(found)
    assert len(figure.axes) == 3 and len(figure.axes[0].lines[0].get_xdata()) == len(weights)

    found = {
        World("disagg", 0.9, age_s, "slai", router): rows_of(0.8 - 0.02 * age_s, None)
        for age_s in benchmark.STALENESS_S
        for router in ("jsq", "least-kv")
    }
    assert "always fresh | 0.1 s | 1 s | 5 s" in benchmark.staleness_text(found)
    (panel,) = benchmark.plot_staleness(found).axes
    assert [line.get_label() for line in panel.lines] == ["jsq", "least-kv"]
    assert panel.get_xlabel().endswith("(s)")


ARGUMENTS = ["--suite", "disagg", "--router", "jsq", "--policy", "slai", "--share", "0.4", "--seeds", "2"]


def test_a_run_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    command = [*ARGUMENTS, "--num-requests", "20", "--workers", "1", "--out", str(tmp_path), "--section", "suites"]
    assert benchmark.main(command) == 0
    text = capsys.readouterr().out
    assert "| disagg | 0.4 | slai | jsq |" in text and (tmp_path / "suites.md").read_text().strip() == text.strip()
    monkeypatch.setattr("llmsched_gym.evaluation.cells.simulate", None)  # nothing is left to run
    assert benchmark.main(command) == 0
    assert capsys.readouterr().out == text


def test_what_is_asked_of_old_reports(tmp_path):
    args = type("", (), {"suite": ["disagg"], "router": ["random", "jsq"], "policy": ["slai", "on-time"]})
    worlds = benchmark.staleness(args)
    assert {w.router for w in worlds} == {"jsq"} and {w.scheduler for w in worlds} == {"on-time"}
    assert [w.staleness_s for w in worlds] == list(benchmark.STALENESS_S)
    assert len({w.folder for w in worlds}) == 4 and benchmark.weight(args) == []


@pytest.mark.parametrize("wrong", [["--router", "nobody"], ["--policy", "nobody"], ["--seeds", "0"]])
def test_bad_arguments_are_one_line(wrong, tmp_path, capsys):
    assert benchmark.main([*ARGUMENTS, *wrong, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not any(tmp_path.iterdir())


def test_no_workers_are_a_bad_argument_and_an_interrupt_is_one_line(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        benchmark.main([*ARGUMENTS, "--workers", "0", "--out", str(tmp_path / "none")])
    assert "expected a whole number >= 1, got '0'" in capsys.readouterr().err and not (tmp_path / "none").exists()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "run_cells", interrupted)
    assert benchmark.main([*ARGUMENTS, "--section", "suites", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted: the same command goes on\n"
