"""Grids of runs, the folders they leave behind, and the search for capacity."""

import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from llmsched_gym.cli import main
from llmsched_gym.config import SLO_CLASSES, ConfigError, scenario
from llmsched_gym.engine import Batch
from llmsched_gym.evaluation import cells, grid
from llmsched_gym.evaluation import store as stores
from llmsched_gym.evaluation.bench import PlainSarathi
from llmsched_gym.evaluation.capacity import LOW_QPS, STEP, Search, capacity, crossing, ratios
from llmsched_gym.evaluation.criteria import LATENCIES, OF_CLASSES, criterion, file_name
from llmsched_gym.evaluation.grid import evaluate
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.evaluation.store import read_rows
from llmsched_gym.report.bounds import scenario_from_json
from llmsched_gym.workload import make_table

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


# Capacity


def made_up(latency):
    """`simulate` of a search whose policies have median TTFTs `latency(policy, qps, seed)`; counts runs."""
    runs = []

    def simulate(policy, pairs):
        runs.extend((policy, *pair) for pair in pairs)
        return [world(ttft_p50_s=latency(policy, qps, seed)) for qps, seed in pairs]

    return simulate, runs


def world(**figures):
    """A row of somebody who is served well."""
    share = {"strict": 1.0, "relaxed": 1.0}
    fine = dict(ttft_p50_s=0.1, slo_attainment=1.0, slo_attainment_by_class=share, num_requests=100)
    fine |= dict(num_refused=0, num_abandoned=0, num_gaps_by_class={"strict": 10, "relaxed": 10})
    fine |= dict(num_requests_by_class={"strict": 50, "relaxed": 50})
    fine |= dict(itl_p99_s_by_class={"strict": 0.05, "relaxed": 0.05})
    fine |= dict(tbt_slo_s_by_class={"strict": 0.1, "relaxed": 0.5})
    fine |= {f"{name}_by_decile": [0.0] * 10 for name in ("refused", "abandoned")}
    return fine | dict(attained_by_decile=[1.0] * 10) | figures


def smooth(capacity_qps):
    """A latency that crosses 0.5 s at `capacity_qps`; seeds shift it by up to 5 %."""
    return lambda qps, seed: 0.5 * (qps / (capacity_qps * (1 + 0.01 * ((seed * 7) % 11 - 5)))) ** 3


@pytest.mark.parametrize("true", [0.3, 1.0, 1.37, 5.0])
def test_capacity_of_a_known_curve(true):
    simulate, runs = made_up(lambda policy, qps, seed: smooth(true)(qps, seed))
    found = Search(criterion("ttft-median"), simulate, range(11)).find("any")
    assert found.qps == pytest.approx(true, rel=0.01)
    assert found.ci_low < true < found.ci_high and found.ci_high / found.ci_low < 1.06
    assert len(runs) == len(set(runs))  # nothing is run twice
    assert found.shares["at_qps"] <= found.qps < found.shares["at_qps"] * STEP * 1.0001
    assert found.limited_by == "median TTFT"


def test_rates_lie_on_one_grid():
    simulate, runs = made_up(lambda policy, qps, seed: smooth(1.5)(qps, seed))
    Search(criterion("ttft-median"), simulate, range(3)).find("any")
    places = np.log([qps for _, qps, _ in runs]) / math.log(STEP)
    np.testing.assert_allclose(places, np.rint(places), atol=1e-9)


def test_ratios_are_paired_by_seed():
    def latency(policy, qps, seed):
        return smooth({"base": 1.0, "better": 1.25}[policy])(qps, seed)

    simulate, _ = made_up(latency)
    search = Search(criterion("ttft-median"), simulate, range(20))
    base, better = (search.find(policy) for policy in ("base", "better"))
    same, ratio = ratios([base, better])
    assert (same["ratio"], same["ratio_ci_low"], same["ratio_ci_high"]) == (1.0, 1.0, 1.0)
    assert ratio["ratio_to"] == "base" and ratio["ratio"] == pytest.approx(1.25, rel=0.005)
    # seeds move both alike, which leaves the ratio far narrower than either
    assert ratio["ratio_ci_high"] - ratio["ratio_ci_low"] < 0.3 * (better.ci_high - better.ci_low)


def test_few_seeds_have_no_interval():
    simulate, _ = made_up(lambda policy, qps, seed: smooth(1.0)(qps, seed))
    found = Search(criterion("ttft-median"), simulate, range(9)).find("any")
    assert found.qps and (found.ci_low, found.ci_high, found.resamples) == (None, None, None)


@pytest.mark.parametrize(("latency", "word"), [(0.1, "still met at 16"), (None, "not met at 0.1")])
def test_a_capacity_outside_the_searched_rates_says_so(latency, word):
    simulate, _ = made_up(lambda policy, qps, seed: latency)
    found = Search(criterion("ttft-median"), simulate, range(2), (LOW_QPS * 0.999, 16.2)).find("any")
    assert found.qps is None and found.note.startswith(word)
    assert found.to_row()["capacity_qps"] is None


def test_what_is_not_met_at_the_lowest_rate_is_named():
    def simulate(policy, pairs):
        return [world(ttft_p99_s=None, num_rejected=2) for _ in pairs]

    found = Search(criterion("attainment>=0.9,ttft.p99<=2"), simulate, range(2)).find("any")
    assert "the end of the searched range: p99 TTFT (2 % are rejected, too long for max_model_len" in found.note


def test_the_crossing_of_a_fit():
    rates = [1, 2, 3, 4]
    assert crossing(rates, np.array([-2.0, -1.0, 1.0, 2.0])) == 2.5
    # 1 and -3 are pooled to -1: a lucky rate does not undo an unlucky one
    assert crossing(rates, np.array([-1.0, 1.0, -3.0, 1.0])) == 3.5
    assert crossing(rates, np.array([1.0, 1.0, 1.0, 1.0])) == 1.0
    assert crossing(rates, np.array([-1.0, -1.0, -1.0, -0.5])) == 4.0
    assert crossing(rates, np.array([-1.0, math.nan, 1.0, 1.0])) == 2.0
    assert crossing(rates, np.full(4, math.nan)) == 4.0


def met(text, **figures):
    return all(
        c.excess(world(**figures)) is None or c.excess(world(**figures)) <= 0 for c in criterion(text).conditions
    )


def test_criteria():
    assert met("ttft-median", ttft_p50_s=0.5) and not met("ttft-median", ttft_p50_s=0.51)
    assert not met("ttft-median", ttft_p50_s=None)
    slow = {"itl_p99_s_by_class": {"strict": 0.11, "relaxed": 0.4}}
    assert met("ttft-median", **slow) and not met("paper", **slow) and met("paper")
    assert not met("paper", itl_p99_s_by_class={"strict": 0.05, "relaxed": 0.6})
    nobody = dict(num_gaps_by_class={"strict": 0, "relaxed": 9}, itl_p99_s_by_class={"strict": None, "relaxed": 0.1})
    assert met("paper", **nobody)
    assert met("attainment:0.9", slo_attainment=0.9) and not met("attainment:0.9", slo_attainment=0.89)
    unfair = dict(slo_attainment=0.95, num_refused=5, attained_by_decile=[1.0] * 9 + [0.5])
    assert met("attainment:0.9", **unfair)
    assert met("serve-all:0.9", num_refused=1)
    for fault in (
        dict(num_refused=1, num_abandoned=1),
        dict(slo_attainment=0.89),
        dict(slo_attainment_by_class={"strict": 0.89, "relaxed": 1.0}),
        dict(attained_by_decile=[1.0] * 9 + [0.49]),
    ):
        assert not met("serve-all:0.9", **fault)
    assert met("serve-all:0.9", slo_attainment_by_class={"strict": None, "relaxed": 1.0})


def test_criteria_of_ones_own():
    tail = "ttft.p99<=2,tpot.p99<=0.05"
    assert criterion(f" {tail.replace(',', ', ')} ").name == tail
    assert met(tail, ttft_p99_s=2.0, tpot_p99_s=0.05)
    assert not met(tail, ttft_p99_s=2.1, tpot_p99_s=0.01) and not met(tail, ttft_p99_s=0.1, tpot_p99_s=0.051)
    assert not met(tail, ttft_p99_s=None, tpot_p99_s=0.01)  # infinite
    assert met(tail, ttft_p99_s=1.0, tpot_p99_s=None)  # nobody has a second token
    strict = "itl.strict.p99<=0.1,attainment.strict>=0.9,attainment>=0.5"
    assert met(strict, slo_attainment=0.6)
    assert not met(strict, itl_p99_s_by_class={"strict": 0.11, "relaxed": 0.01})
    assert not met(strict, slo_attainment_by_class={"strict": 0.8, "relaxed": 1.0})
    assert met("itl.strict.p99<=0.01", num_gaps_by_class={"strict": 0, "relaxed": 5})
    assert met("ttft.p50<=0.5", ttft_p50_s=0.5) and not met("paper,attainment>=0.9", slo_attainment=0.8)
    names = [c.name for c in criterion("ttft.mean<=1,queue_time.p50<=1,e2e.p99<=9,ttft.relaxed.p99<=3").conditions]
    assert names == ["mean TTFT", "median queue time", "p99 E2E", "p99 TTFT of relaxed users"]


def test_rows_have_every_figure_that_a_criterion_can_bound():
    (figures,) = evaluate(SMALL, ["slai"], qps=[1.0], seeds=1)
    terms = [f"{metric}.{figure}" for metric, known in LATENCIES.items() for figure in known]
    terms += [f"{m}.{c}.{figure}" for m, known in OF_CLASSES.items() for c in ("strict", "relaxed") for figure in known]
    for term in terms:
        (tight,), (loose,) = (criterion(f"{term}<={limit}").conditions for limit in ("1e-9", "9000"))
        assert loose.excess(figures) < 0 < tight.excess(figures), term


@pytest.mark.parametrize("text", ["", "best", "attainment", "attainment:0", "attainment:2", "serve-all:x", "paper:0.9"])
def test_unknown_criteria(text):
    with pytest.raises(ConfigError, match="criterion"):
        criterion(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ttfb.p99<=2", "expected one of ttft, itl, tpot, e2e, queue_time, attainment, got 'ttfb'"),
        ("ttft<=2", "expected one of ttft.p50, ttft.p90, ttft.p99, ttft.mean, got 'ttft'"),
        ("ttft.p95<=2", "ttft.p99, ttft.mean, got 'ttft.p95'"),
        ("ttft.strict.p90<=2", "expected one of ttft.strict.p50, ttft.strict.p99, got 'ttft.strict.p90'"),
        ("tpot.strict.p99<=2", "expected ttft and itl where a class is named"),
        ("ttft.p99>=2", "expected ttft.p99<=2, got 'ttft.p99>=2'"),
        ("attainment<=0.9", "expected attainment>=0.9"),
        ("attainment>0.9", "expected attainment>=0.9"),
        ("attainment>=95", "share above 0 and at most 1, got '95'"),
        ("attainment.p99>=0.9", "attainment.strict or attainment.relaxed"),
        ("ttft.p99<=2s", "expected seconds above 0 and below 10000, got '2s'"),
        ("ttft.p99<=nan", "seconds above 0"),
        ("ttft.p99<=1<=2", "METRIC.FIGURE<=SECONDS"),
        ("ttft.p99<=1,", "METRIC.FIGURE<=SECONDS"),
        ("ttft.p99", "quote it: a shell takes < and > for itself"),
        ("ttft.p99<=1,ttft.p99<=2", "got two of p99 TTFT"),
    ],
)
def test_criteria_that_say_nothing_are_one_clear_line(text, words):
    with pytest.raises(ConfigError) as error:
        criterion(text)
    assert words in str(error.value) and str(error.value).startswith("criterion: expected ")


def test_a_long_criterion_is_a_file_name(tmp_path):
    terms = [f"{metric}.{figure}<=100" for metric, figures in LATENCIES.items() for figure in figures]
    long = ",".join([*terms, *(f"{m}.{c}.{f}<=90" for m, fs in OF_CLASSES.items() for c in SLO_CLASSES for f in fs)])
    names = {file_name(long), file_name(long.replace("90", "91"))}
    assert len(names) == 2 and all(len(name) <= 150 for name in names)
    capacity(scenario("paper", num_requests=5), ["slai"], long, qps=(0.1, 0.2), seeds=1, out=tmp_path)
    assert main(["report", str(tmp_path)]) == 0


def test_who_is_served_at_capacity(tmp_path):
    small = scenario("paper", num_requests=150, allow_refusal=True)
    (found,) = capacity(small, ["slai[refuse=true]"], "attainment:0.9", seeds=2, qps=(1.0, 8.0), out=tmp_path)
    row = found.to_row()
    assert 1.0 < row["capacity_qps"] < 8.0
    assert row["attained"] >= 0.85 and row["refused"] > 0.0 and len(row["refused_by_decile"]) == 10
    written = json.loads((tmp_path / "capacity-attainment-0.9.json").read_text())
    assert file_name("ttft.p99<=2,attainment>=0.9") == "ttft.p99-max-2-attainment-min-0.9"
    assert written["results"][0]["capacity_qps"] == row["capacity_qps"]
    assert written["config"]["criterion"] == "attainment:0.9" and written["curves"]["slai[refuse=true]"]


@pytest.mark.parametrize("suite, qps", [("default", 2.0), ("chat", 0.6), ("agents", 0.15)])
def test_a_run_is_expected_to_cost_what_comes_in_it(suite, qps):
    """A session is many turns, and they come behind the cohort, too; prompts of cached blocks cost more."""
    world = scenario(suite, qps=qps, num_requests=1000)
    runner = cells.Runner(world)
    cell = cells.Cell(0, "sarathi", qps, 0)
    requests = len(make_table(world, 0))
    cost_s = runner._estimate_s(cell)
    if suite == "default":
        assert cost_s == pytest.approx(1240 * cells.COMPILED_S)  # measured, and before them
        return
    assert cost_s >= requests * cells.COMPILED_S > 2 * 1000 * cells.COMPILED_S
    assert cells.Runner(world.replace(prefix_caching=False))._estimate_s(cell) == pytest.approx(
        requests * cells.COMPILED_S
    )
    assert runner._estimate_s(cells.Cell(0, "sarathi", 2 * qps, 0)) > cost_s  # more of them come in as long a time
