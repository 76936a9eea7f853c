"""Capacities of known curves, criteria and what they say, and what a run is expected to cost."""

import json
import math

import numpy as np
import pytest

from llmsched_gym.cli import main
from llmsched_gym.config import SLO_CLASSES, ConfigError, scenario
from llmsched_gym.evaluation import cells
from llmsched_gym.evaluation.capacity import LOW_QPS, STEP, Search, capacity, crossing, ratios
from llmsched_gym.evaluation.criteria import LATENCIES, OF_CLASSES, criterion, file_name
from llmsched_gym.evaluation.grid import evaluate
from llmsched_gym.workload import make_table

SMALL = scenario("paper", num_requests=60)


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
