"""Grids of runs and the folders they leave behind."""

import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.engine import Batch
from llmsched_gym.evaluation import cells, grid
from llmsched_gym.evaluation import store as stores
from llmsched_gym.evaluation.bench import PlainSarathi
from llmsched_gym.evaluation.grid import evaluate
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.evaluation.store import read_rows
from llmsched_gym.report.bounds import scenario_from_json

SMALL = scenario("paper", num_requests=60)
REQUIRED = """
policy suite profile workload qps seed num_requests num_finished num_rejected num_refused num_abandoned
num_unfinished ttft_p50_s ttft_p90_s ttft_p99_s ttft_mean_s itl_p50_s itl_p99_s itl_p99_s_by_class itl_on_time_by_class
slo_attainment slo_attainment_by_class mean_utility request_goodput throughput_tok_s mean_batch_s mean_batch_tokens
kv_cache_usage_max num_preemptions iterations sim_time_s wall_time_s
"""


def timeless(rows):
    return [{k: v for k, v in row.items() if k != "wall_time_s"} for row in rows]


class Lazy:
    """A scheduler that serves nobody."""

    def schedule(self, view):
        return Batch()


# Grids


def test_one_row_per_policy_load_and_seed_with_all_fields():
    rows = evaluate(SMALL, ["slai", "sarathi"], qps=[1.0, 2.0], seeds=2, first_seed=5)
    found = [(row["policy"], row["qps"], row["seed"]) for row in rows]
    assert found == [(p, q, s) for p in ("slai", "sarathi") for q in (1.0, 2.0) for s in (5, 6)]
    assert not set(REQUIRED.split()) - set(rows[0])
    json.dumps(rows, allow_nan=False)
    assert len({row["config_hash"] for row in rows}) == 1


def test_worker_processes_change_nothing(monkeypatch):
    here = evaluate(SMALL, ["slai", "random"], qps=[2.0], seeds=2)
    monkeypatch.setattr(cells, "SPAWN_S", 0.0)
    there = evaluate(SMALL, ["slai", "random"], qps=[2.0], seeds=2, workers=2)
    assert timeless(here) == timeless(there)


def test_every_policy_meets_the_same_requests(tmp_path):
    evaluate(SMALL, ["slai", "sarathi"], qps=[1.0, 2.0], seeds=2, out=tmp_path)
    requests = pd.read_parquet(tmp_path / "requests.parquet")
    columns = ["prompt_tokens", "output_tokens", "slo_class"]
    by_run = [group.reset_index(drop=True) for _, group in requests.groupby(["seed", "qps", "policy"], observed=True)]
    assert len(by_run) == 8 and all(len(group) == 60 for group in by_run)
    for i in range(0, 8, 4):
        for other in by_run[i + 1 : i + 4]:
            pd.testing.assert_frame_equal(by_run[i][columns], other[columns])
        np.testing.assert_array_equal(by_run[i]["arrival_s"], by_run[i + 1]["arrival_s"])
        np.testing.assert_allclose(by_run[i]["arrival_s"], 2.0 * by_run[i + 2]["arrival_s"])


def test_rates_are_drawn_per_seed_where_the_suite_says_so():
    rows = evaluate(scenario("default", num_requests=20), ["sarathi"], seeds=3)
    assert len({row["qps"] for row in rows}) == 3 and {row["requested_qps"] for row in rows} == {None}


def test_a_continuing_scenario_is_measured_over_a_finite_run():
    assert grid.finite(scenario("default")).num_requests == 2000
    assert grid.finite(scenario("default", num_requests=7)).num_requests == 7


def test_faults_are_found_before_the_first_run(monkeypatch, tmp_path):
    monkeypatch.setattr(grid, "Runner", None)
    for change in (
        dict(policies=["slai", "nope"]),
        dict(scenario=SMALL.replace(profile="nope")),
        dict(scenario=SMALL.replace(scheduler_profile="nope")),
        dict(scenario=SMALL.replace(trace=str(tmp_path / "missing.csv"))),
        dict(qps=[1.0, 0.0]),
        dict(qps=[math.nan]),
        dict(qps=[]),
        dict(seeds=0),
        dict(first_seed=-1),
        dict(policies=[]),
    ):
        settings = dict(scenario=SMALL, policies=["slai"], qps=[1.0], seeds=1) | change
        with pytest.raises(ValueError) as caught:
            evaluate(settings.pop("scenario"), settings.pop("policies"), **settings)
        assert "\n" not in str(caught.value)


def test_plain_python_schedulers_are_evaluated_like_compiled_ones():
    mine = simulate(SMALL.replace(qps=1.0), PlainSarathi(), 0)
    reference = simulate(SMALL.replace(qps=1.0), "sarathi", 0)
    np.testing.assert_array_equal(mine.requests["first_token_s"], reference.requests["first_token_s"])
    named = evaluate(SMALL, ["llmsched_gym.evaluation.bench:PlainSarathi"], qps=[1.0], seeds=1)[0]
    assert named["sim_time_s"] == float(reference.sim.clock_s)


def test_a_policy_that_serves_nobody_loses_everybody():
    (row,) = evaluate(SMALL.replace(patience_s=5.0, num_requests=5), [f"{__name__}:Lazy"], qps=[5.0], seeds=1)
    assert (row["num_abandoned"], row["slo_attainment"], row["mean_utility"]) == (5, 0.0, -0.5)
    assert row["ttft_p50_s"] is None and row["mean_batch_s"] is None and row["iterations"] == 0


# Folders


def interrupted(out, after, monkeypatch):
    """Start a grid that is interrupted behind `after` of its eight runs."""
    run_cell, done = cells.run_cell, []

    def until_interrupted(*args):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(args)
        return run_cell(*args)

    monkeypatch.setattr(cells, "run_cell", until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(SMALL, ["slai", "sarathi"], qps=[1.0, 2.0], seeds=2, out=out)
    monkeypatch.undo()


def test_an_interrupted_grid_is_completed(tmp_path, monkeypatch):
    whole = evaluate(SMALL, ["slai", "sarathi"], qps=[1.0, 2.0], seeds=2, out=tmp_path / "whole")
    interrupted(tmp_path / "parts", 3, monkeypatch)
    with (tmp_path / "parts/partial/rows.jsonl").open("a") as file:
        file.write('{"cell": 3, "row": {"pol')  # what a crash leaves
    seen = []
    rows = evaluate(
        SMALL,
        ["slai", "sarathi"],
        qps=[1.0, 2.0],
        seeds=2,
        out=tmp_path / "parts",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 8) for done in range(3, 9)]
    assert timeless(rows) == timeless(whole)
    for name in ("requests", "steps", "itl"):
        one, two = (pd.read_parquet(tmp_path / folder / f"{name}.parquet") for folder in ("whole", "parts"))
        pd.testing.assert_frame_equal(one, two)
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )


def test_a_killed_process_loses_no_finished_run(tmp_path):
    script = (
        "import sys; from llmsched_gym.config import scenario; from llmsched_gym.evaluation.grid import evaluate;"
        "evaluate(scenario('paper', num_requests=60), ['random'], qps=[2.0], seeds=40, out=sys.argv[1])"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    lines = tmp_path / "partial" / "rows.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not lines.exists() or lines.read_text().count("\n") < 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = [json.loads(line) for line in lines.read_text().splitlines()[:2]]
    config = json.loads((tmp_path / "config.json").read_text())
    store = stores.Store(tmp_path, config)
    held = store.open()
    assert len(held) >= 2 and all(held[entry["cell"]] == entry["row"] for entry in kept)
    assert all(cells.part_path(store.partial, "requests", cell).exists() for cell in held)


def test_a_complete_folder_is_read_not_run(tmp_path, monkeypatch):
    rows = evaluate(SMALL, ["slai"], qps=[1.0], seeds=2, out=tmp_path)
    monkeypatch.setattr(cells, "run_cell", None)
    assert evaluate(SMALL, ["slai"], qps=[1.0], seeds=2, out=tmp_path) == rows == read_rows(tmp_path)


@pytest.mark.parametrize("change", [dict(seeds=3), dict(qps=[1.5]), dict(policies=["edf"])])
def test_a_folder_of_another_grid_is_left_alone(tmp_path, change):
    settings = dict(policies=["slai"], qps=[1.0], seeds=1)
    evaluate(SMALL, settings.pop("policies"), out=tmp_path, **settings)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    changed = dict(policies=["slai"]) | settings | change
    with pytest.raises(ConfigError, match="another configuration"):
        evaluate(SMALL, changed.pop("policies"), out=tmp_path, **changed)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_changed_policy_is_another_grid(tmp_path, monkeypatch):
    module = tmp_path / "own_policy.py"
    module.write_text("from llmsched_gym.evaluation.bench import PlainSarathi\n")
    monkeypatch.syspath_prepend(tmp_path)
    world = scenario("paper", num_requests=5)
    evaluate(world, ["own_policy:PlainSarathi"], qps=[1.0], seeds=1, out=tmp_path / "out")
    module.write_text("from llmsched_gym.evaluation.bench import PlainSarathi  # another one\n")
    with pytest.raises(ConfigError, match="code"):
        evaluate(world, ["own_policy:PlainSarathi"], qps=[1.0], seeds=1, out=tmp_path / "out")


def test_a_folder_says_how_to_run_it_again(tmp_path):
    rows = evaluate(SMALL, ["slai"], qps=[1.0], seeds=1, out=tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    again = scenario_from_json(config["scenario"])
    assert again == SMALL and math.isinf(again.patience_s)
    repeated = evaluate(again, config["policies"], qps=config["qps"], seeds=config["seeds"])
    assert timeless(repeated) == timeless(rows)
    assert config["version"] and config["packages"]["numpy"]


def test_what_plots_need_is_kept(tmp_path):
    rows = evaluate(SMALL, ["slai"], qps=[1.0, 2.0], seeds=2, out=tmp_path)
    itl = pd.read_parquet(tmp_path / "itl.parquet")
    for _, mine in itl.groupby(["policy", "requested_qps", "slo_class"]):
        assert len(mine) == 400 and mine["itl_s"].is_monotonic_increasing and mine["prob"].iat[-1] == 1.0
    pooled = itl[(itl["requested_qps"] == 1.0) & (itl["slo_class"] == "relaxed")]
    assert pooled["num_gaps"].iat[0] == sum(row["num_gaps_by_class"]["relaxed"] for row in rows[:2])
    p50 = np.interp(0.5, pooled["prob"], pooled["itl_s"])
    assert min(r["itl_p50_s"] for r in rows[:2]) * 0.99 <= p50 <= max(r["itl_p50_s"] for r in rows[:2]) * 1.01
    steps = pd.read_parquet(tmp_path / "steps.parquet")
    assert set(steps["seed"]) == {0} and set(steps["qps"]) == {1.0, 2.0}
    assert (steps.groupby("qps").size() <= cells.LOGGED_STEPS).all()
    assert ((steps["prefill_tokens"] + steps["decode_tokens"]) > 0).all()


def test_large_grids_keep_the_requests_of_the_first_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "MAX_REQUEST_LINES", 130)
    evaluate(SMALL, ["slai"], qps=[1.0], seeds=4, out=tmp_path)
    assert sorted(pd.read_parquet(tmp_path / "requests.parquet")["seed"].unique()) == [0, 1]
    assert len(read_rows(tmp_path)) == 4


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        evaluate(SMALL, ["slai"], qps=[1.0], seeds=1, out=tmp_path / "file")
