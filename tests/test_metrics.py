"""Rows and request frames from hand-made records with a known outcome; intervals over seeds."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsched_gym.config import scenario
from llmsched_gym.engine.records import PHASES, REPLICA, REQUEST
from llmsched_gym.evaluation.metrics import gaps_of, percentile, requests_frame, row
from llmsched_gym.evaluation.outcomes import Outcomes
from llmsched_gym.evaluation.run import Episode, simulate
from llmsched_gym.report import intervals
from llmsched_gym.workload import RequestTable

CLOCK_S = 20.0


def client(phase, *tokens, arrival=0.0, output=None, tbt=0.5, ttft=1.0, late=0.0, prompt=100, resolved=None):
    """A request whose tokens came at the given times; `late` seconds are booked already."""
    return dict(
        phase=phase,
        tokens=tokens,
        arrival=arrival,
        output=output or max(len(tokens), 1),
        tbt=tbt,
        ttft=ttft,
        late=late,
        prompt=prompt,
        resolved=resolved if resolved is not None else (tokens[-1] if phase == "finished" else math.nan),
    )


def episode(clients, *, cohort=None, clock_s=CLOCK_S, **fields):
    """What a run would leave behind that had served `clients` so."""
    world = scenario("paper", **{"qps": 1.5, "patience_s": 10.0, **fields})
    n = len(clients)
    requests = np.zeros(n, REQUEST)
    outputs = np.array([c["output"] for c in clients], np.int32)
    gaps = np.zeros(max(int(outputs.sum()) - n, 1), np.float32)
    start = 0
    for r, c in zip(requests, clients, strict=True):
        times = np.array(c["tokens"])
        between = np.diff(times)
        gaps[start : start + len(between)] = between
        start += c["output"] - 1
        due = c["arrival"] + c["ttft"] + np.arange(len(times)) * c["tbt"]
        r["arrival_s"], r["ttft_slo_s"], r["tbt_slo_s"] = c["arrival"], c["ttft"], c["tbt"]
        r["prompt_tokens"], r["num_output_tokens"], r["lateness_s"] = c["prompt"], len(times), c["late"]
        r["first_scheduled_s"] = r["first_token_s"] = times[0] if len(times) else math.nan
        r["last_token_s"] = times[-1] if len(times) else math.nan
        r["resolved_s"] = c["resolved"]
        r["max_gap_s"] = between.max() if len(between) else 0.0
        r["num_late_gaps"] = (between > c["tbt"]).sum()
        r["deadline_miss_s"] = (times - due).max() if len(times) else -math.inf
        r["slo_class"] = 0 if c["tbt"] <= 0.1 else 1
        r["phase"] = PHASES.index(c["phase"])
    sims = np.zeros(1, REPLICA)
    sims["clock_s"], sims["num_batches"], sims["mean_batch_s"] = clock_s, 50, 0.2
    sims["batch_tokens_sum"], sims["kv_cache_usage_max"] = 4000, 0.25
    sims["tokens_emitted"] = requests["num_output_tokens"].sum()
    table = RequestTable.of(
        requests["arrival_s"],
        requests["prompt_tokens"],
        outputs,
        slo_class=requests["slo_class"],
        ttft_slo_s=requests["ttft_slo_s"],
        tbt_slo_s=requests["tbt_slo_s"],
        cohort=cohort,
        qps=1.5,
        seed=3,
    )
    return Episode(world, "hand", 3, table, requests, gaps, np.zeros(0), sims[0], 0.5)


ATTAINS = client("finished", 0.5, 0.55, 0.64, tbt=0.1)
LATE_FIRST = client("finished", 2.0, 2.4, late=1.0)
LATE_GAP = client("finished", 1.0, 1.2, 2.0, arrival=0.5, late=0.3)
WAITING = client("waiting", arrival=4.0)
RUNNING = client("running", 10.0, 10.4, arrival=9.5, output=5)
REJECTED = client("rejected", resolved=0.0)
REFUSED = client("refused", resolved=1.0)
ABANDONED = client("abandoned", late=10.0, resolved=11.0)
EVERYBODY = [ATTAINS, LATE_FIRST, LATE_GAP, WAITING, RUNNING, REJECTED, REFUSED, ABANDONED]


def outcome(*clients, **fields):
    return Outcomes(episode(list(clients), **fields))


def test_counts_latencies_and_rates_of_a_hand_made_run():
    figures = row(episode(EVERYBODY))
    assert (figures["policy"], figures["suite"], figures["seed"], figures["qps"]) == ("hand", "paper", 3, 1.5)
    counted = {
        name: figures[f"num_{name}"]
        for name in ("finished", "rejected", "refused", "abandoned", "unfinished", "attained")
    }
    assert counted == dict(finished=3, rejected=1, refused=1, abandoned=1, unfinished=2, attained=1)
    assert figures["num_requests"] == 8
    assert figures["ttft_mean_s"] == pytest.approx((0.5 + 2.0 + 0.5 + 0.5) / 4)  # of those served
    assert figures["ttft_p50_s"] is None  # half of the cohort has no first token
    assert figures["slo_attainment"] == 1 / 8
    assert figures["slo_attainment_by_class"] == {"strict": 1.0, "relaxed": 0.0}
    # relaxed gaps: 0.4; 0.2, 0.8; 0.4 and the one open since 10.4
    assert figures["itl_on_time_by_class"] == {"strict": 1.0, "relaxed": 3 / 5}
    relaxed = np.float32([0.4, 0.2, 0.8, 0.4, 9.6]).astype(float)
    assert figures["itl_p99_s_by_class"]["relaxed"] == pytest.approx(np.quantile(relaxed, 0.99))
    assert figures["itl_p50_s"] == pytest.approx(np.float32(0.4))
    assert (figures["mean_batch_s"], figures["mean_batch_tokens"], figures["iterations"]) == (0.2, 80.0, 50)
    assert (figures["sim_time_s"], figures["wall_time_s"], figures["kv_cache_usage_max"]) == (CLOCK_S, 0.5, 0.25)


def test_utility_counts_lateness_up_to_the_patience_and_what_is_still_open():
    utility = outcome(*EVERYBODY).utility
    open_running = CLOCK_S - 10.4 - 0.5
    np.testing.assert_allclose(
        utility, [1.0, -0.5 * 0.1, -0.5 * 0.03, -0.5, -0.5 * open_running / 10.0, 0.0, -0.5, -0.5], rtol=1e-12
    )


def test_without_patience_only_refusal_costs_utility():
    utility = outcome(*EVERYBODY, patience_s=math.inf).utility
    assert utility.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, -0.5, 0.0]


@pytest.mark.parametrize(
    ("rule", "attained"),
    [("every-gap", False), ("fraction:0.5", True), ("fraction:0.51", False), ("deadline", True), ("mean", True)],
)
def test_rules_for_gaps(rule, attained):
    # one of two gaps is late; token k is due at 0.5 + 1.0 + 0.5 k: the last one came at 2.0, due at 2.5
    assert outcome(LATE_GAP, tbt_rule=rule).attained.tolist() == [attained]


def test_a_token_behind_its_deadline_fails_by_that_rule_alone():
    slow = client("finished", 0.9, 1.35, 1.85, 2.6, tbt=0.76)  # gaps in time, tokens due at 1.0, 1.76, 2.52, 3.28
    assert outcome(slow, tbt_rule="deadline").attained.tolist() == [True]
    late = client("finished", 1.5, 1.6, ttft=1.0)
    assert outcome(late, tbt_rule="deadline").attained.tolist() == [False]


def test_the_mean_gap_is_what_vllm_means_by_tpot():
    # gaps of 0.2, 0.2 and 1.1: a mean of 0.5 is in time, one of 0.501 is not, and a lone token has none to be late
    assert outcome(client("finished", 1.0, 1.2, 1.4, 2.5), tbt_rule="mean").attained.tolist() == [True]
    assert outcome(client("finished", 1.0, 1.2, 1.4, 2.503), tbt_rule="mean").attained.tolist() == [False]
    assert outcome(client("finished", 1.0), tbt_rule="mean").attained.tolist() == [True]
    assert outcome(client("running", 1.0, 1.2, output=9), tbt_rule="mean").attained.tolist() == [False]


def test_rates_are_over_the_time_in_which_the_cohort_arrived():
    before = client("finished", 1.0, 3.0, 5.0, 7.0, arrival=0.5)  # of the warm-up; two tokens while the cohort arrives
    good = client("finished", 4.0, 4.5, arrival=3.5)
    late = client("finished", 9.0, 9.5, 10.0, 10.5, arrival=5.0)  # its tokens come in the drain
    lost = client("abandoned", arrival=6.0, resolved=15.0)
    last = client("finished", 7.5, 8.0, arrival=7.5)
    behind = client("finished", 8.0, 20.0, arrival=7.9)
    figures = row(episode([before, good, late, lost, last, behind], cohort=(1, 5)))
    # from 3.5 to 7.5: two tokens of the first, two of the second, the first token of the last one
    assert figures["throughput_tok_s"] == (2 + 2 + 1) / 4.0
    assert (figures["num_attained"], figures["request_goodput"]) == (2, 0.5 * 3 / 4.0)
    # until its last request left at 15.0; tokens of those that finished
    assert figures["vllm_request_goodput"] == 2 / (15.0 - 3.5)
    assert figures["vllm_output_throughput"] == (2 + 4 + 2) / (15.0 - 3.5)


def test_rates_of_fewer_than_two_arrivals_are_null():
    for clients in ([ATTAINS], [ATTAINS, ATTAINS]):  # or of several at once
        figures = row(episode(clients))
        assert figures["request_goodput"] is None and figures["throughput_tok_s"] is None
        assert figures["vllm_request_goodput"] == pytest.approx(len(clients) / 0.64)


def test_goodput_is_near_the_rate_where_everybody_attains():
    run = simulate(scenario("default", num_requests=20, qps=1.0), "sarathi", 0)
    figures = row(run)
    arrival_s = run.table.arrival_s[run.cohort]
    span_s = arrival_s[-1] - arrival_s[0]
    assert figures["request_goodput"] == pytest.approx(figures["slo_attainment"] * 19 / span_s)
    assert figures["request_goodput"] > 0.5 and figures["vllm_request_goodput"] < figures["request_goodput"]


def test_a_share_of_late_gaps_is_not_lost_to_rounding():
    ten = client(
        "finished", *np.concatenate([np.arange(10) * 0.1, [5.0]])
    )  # 9 of 10 gaps in time; 0.9 * 10 > 9 - 1e-15
    assert outcome(ten, tbt_rule="fraction:0.9").attained.tolist() == [True]


def test_slos_are_met_at_the_limit():
    exact = client("finished", 1.0, 1.5, 2.0)
    assert outcome(exact).attained.tolist() == [True]


def test_empty_classes_and_runs_without_gaps_are_null():
    single = row(episode([client("finished", 0.5)]))
    assert single["itl_p50_s"] is None and single["itl_p99_s"] is None
    assert single["itl_p99_s_by_class"] == {"strict": None, "relaxed": None}
    assert single["slo_attainment_by_class"] == {"strict": None, "relaxed": 1.0}
    nobody = row(episode([REJECTED]))
    assert nobody["ttft_mean_s"] is None and nobody["ttft_p50_s"] is None
    for figures in (single, nobody, row(episode(EVERYBODY))):
        json.dumps(figures, allow_nan=False)


def test_only_the_cohort_is_measured():
    figures = row(episode([WAITING, ATTAINS, LATE_GAP, RUNNING], cohort=(1, 3)))
    assert (figures["num_requests"], figures["num_unfinished"], figures["num_attained"]) == (2, 0, 1)
    assert figures["num_gaps_by_class"] == {"strict": 2, "relaxed": 2}
    assert figures["itl_p99_s_by_class"]["relaxed"] == pytest.approx(np.quantile([0.2, 0.8], 0.99), rel=1e-6)


def test_a_client_that_left_between_tokens_leaves_an_open_gap():
    left = client("abandoned", 1.0, 1.2, output=9, late=10.0, resolved=12.0)
    figures = row(episode([left]))
    assert figures["itl_on_time_by_class"]["relaxed"] == 1 / 2
    assert figures["itl_p99_s"] == pytest.approx(np.quantile([0.2, 10.8], 0.99), rel=1e-6)
    assert figures["mean_utility"] == -0.5


def test_shares_by_tenth_of_prompt_length():
    clients = [client("finished", 0.5, prompt=p) for p in range(1, 10)] + [{**REFUSED, "prompt": 10}]
    figures = row(episode(clients))
    assert figures["attained_by_decile"] == [1.0] * 9 + [0.0]
    assert figures["refused_by_decile"] == [0.0] * 9 + [1.0]
    same = row(episode([client("finished", 0.5, prompt=7)] * 4))
    assert same["attained_by_decile"] == [None] * 9 + [1.0]  # the last tenth is never empty


def test_the_frame_agrees_with_the_row():
    run = episode(EVERYBODY)
    frame, figures = requests_frame(run), row(run)
    assert frame["attained"].sum() == figures["num_attained"]
    assert frame["utility"].mean() == figures["mean_utility"]
    assert frame["phase"].tolist() == [c["phase"] for c in EVERYBODY]
    assert frame["ttft_s"].isna().tolist() == [not c["tokens"] for c in EVERYBODY]
    assert frame["slo_class"].tolist() == ["strict"] + ["relaxed"] * 7
    assert frame["tpot_s"].iat[2] == pytest.approx((2.0 - 1.0) / 2)
    assert frame["max_itl_s"].iat[4] == pytest.approx(9.6)
    assert frame["e2e_latency_s"].iat[2] == pytest.approx(1.5)
    assert frame["num_late_gaps"].tolist() == [0, 0, 1, 0, 1, 0, 0, 0]


@given(
    st.lists(st.floats(0.0, 100.0, width=32), min_size=1, max_size=60),
    st.integers(0, 20),
    st.sampled_from([0.0, 0.01, 0.5, 0.9, 0.99, 1.0]),
)
def test_percentiles_are_those_of_numpy(values, num_infinite, q):
    values = np.array(values)
    assert percentile(values, q) == pytest.approx(np.quantile(values, q), rel=1e-12, abs=1e-12)
    with_infinite = np.concatenate([values, np.full(num_infinite, np.inf)])
    rank = math.ceil(q * (len(with_infinite) - 1))
    found = percentile(with_infinite, q)
    assert (found is None) == (rank >= len(values))


def assert_quantile(found, values, q):
    if len(values) == 0:
        assert found is None
    else:
        assert found == pytest.approx(np.quantile(values.astype(float), q), rel=1e-9, abs=1e-12)


@given(st.data())
def test_percentiles_of_gaps_are_exact(data):
    gaps = st.lists(st.floats(0.0, 50.0, width=32), max_size=6)
    clients = []
    for _ in range(data.draw(st.integers(1, 8))):
        times = np.cumsum([0.5, *data.draw(gaps)])
        done = data.draw(st.booleans())
        tbt = data.draw(st.sampled_from([0.1, 0.5]))
        output = len(times) + (0 if done else 3)
        clients.append(client("finished" if done else "running", *times, tbt=tbt, output=output))
    run = episode(clients, clock_s=1000.0)
    found = gaps_of(run, Outcomes(run))
    everything = []
    for slo_class, tbt in enumerate((0.1, 0.5)):
        mine = [c for c in clients if c["tbt"] == tbt]
        expected = [np.float32(np.diff(c["tokens"])) for c in mine]
        expected += [np.float32([1000.0 - c["tokens"][-1]]) for c in mine if c["phase"] == "running"]
        joined = np.concatenate(expected) if expected else np.zeros(0, np.float32)
        everything.append(joined)
        for q in (0.5, 0.99):
            assert_quantile(found.percentile(q, slo_class), joined, q)
        bins = found.bins()[slo_class]
        assert bins[2].sum() == len(joined)
        assert (bins[1] * bins[2]).sum() == pytest.approx(joined.astype(float).sum(), rel=2e-3, abs=1e-9)
    assert_quantile(found.percentile(0.5), np.concatenate(everything), 0.5)


@pytest.mark.parametrize("suite", ["paper", "default"])
def test_rows_of_a_real_run_add_up(suite):
    run = simulate(scenario(suite, num_requests=150, qps=2.2), "slai", 0)
    figures, frame = row(run), requests_frame(run)
    outcomes = ("finished", "rejected", "refused", "abandoned", "unfinished")
    assert sum(figures[f"num_{name}"] for name in outcomes) == figures["num_requests"] == len(frame) == 150
    served = frame["ttft_s"].dropna()
    assert figures["ttft_mean_s"] == pytest.approx(served.mean())
    assert figures["ttft_p50_s"] == pytest.approx(np.quantile(frame["ttft_s"].fillna(np.inf), 0.5))
    by_hand = (
        (frame["phase"] == "finished")
        & (frame["ttft_s"] <= frame["ttft_slo_s"])
        & ~(frame["max_itl_s"] > frame["tbt_slo_s"])
    )
    assert (by_hand == frame["attained"]).all()
    assert (
        figures["num_gaps_by_class"]["relaxed"]
        >= (frame["num_output_tokens"] - 1)[frame["slo_class"] == "relaxed"].sum()
    )
    arrival_s = run.table.arrival_s[run.cohort]
    times = [
        r["first_token_s"] + np.append(0.0, np.cumsum(run.gaps[start:][: r["num_output_tokens"] - 1], dtype=float))
        for r, start in zip(run.requests, run.table.gap_start, strict=True)
        if r["num_output_tokens"]
    ]
    meanwhile = np.concatenate(times)
    meanwhile = meanwhile[(meanwhile >= arrival_s[0]) & (meanwhile <= arrival_s[-1])]
    assert figures["throughput_tok_s"] == pytest.approx(len(meanwhile) / (arrival_s[-1] - arrival_s[0]))


# Intervals


def test_intervals_need_ten_seeds_and_finite_means():
    assert intervals.interval(range(9)) is None
    assert intervals.interval([*range(9), None]) is None
    assert intervals.interval([2.5] * 10) == (2.5, 2.5)
    assert intervals.mean([1.0, 3.0]) == 2.0 and intervals.mean([1.0, None]) is None and intervals.mean([]) is None


def test_intervals_cover_the_mean_about_as_often_as_they_say():
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(60):
        low, high = intervals.interval(rng.normal(3.0, 1.0, 20))
        covered += low <= 3.0 <= high
    assert 50 <= covered <= 60


def test_a_sample_with_one_odd_seed_has_an_interval():
    low, high = intervals.interval([0.0] * 19 + [1.0], within=(0.0, 1.0))
    assert low == 0.0 and 0.05 < high < 0.5


def test_a_median_has_the_interval_of_its_order_statistics():
    ten = [float(i) for i in range(1, 11)]
    # P(2nd <= median <= 9th) of ten = 1 - 2 (1 + 10) / 1024 = 0.979; of twenty, 6th to 15th: 0.959
    assert intervals.median_interval(ten) == (2.0, 9.0) and intervals.median(ten) == 5.5
    assert intervals.median_interval([float(i) for i in range(1, 21)]) == (6.0, 15.0)
    assert intervals.median_interval(ten[:9]) is None
    some = [*ten[:7], None, None, None]  # three seeds are infinite: the median is not, the upper end is
    assert intervals.median(some) == 5.5 and intervals.median_interval(some) == (2.0, math.inf)
    assert intervals.median([1.0, None, None]) is None and intervals.median([]) is None


def test_a_few_seeds_that_hold_the_mean_do_not_spoil_the_interval():
    """Seeds like those of a median TTFT near saturation: a long upper tail, whose mean no small sample finds."""
    rng = np.random.default_rng(3)
    pool = np.exp(1.3 * rng.standard_normal(100_000)) ** 1.5
    draws = pool[rng.integers(len(pool), size=(400, 10))]
    covered = [low <= np.median(pool) <= high for low, high in map(intervals.median_interval, draws.tolist())]
    assert np.mean(covered) > 0.95
    of_mean = [low <= pool.mean() <= high for low, high in map(intervals.interval, draws.tolist())]
    assert np.mean(of_mean) < 0.8  # why latencies have no interval of the mean


def test_quantiles_of_resamples_make_up_for_few_seeds():
    # of a mean: t's half width is 2.262 s / sqrt(10), a resample's deviation s / sqrt(10) * sqrt(9 / 10)
    low, high = intervals.resample_quantiles(10)
    assert low == pytest.approx(0.00856, abs=1e-4) and high == 1.0 - low
    assert intervals.resample_quantiles(100_000)[0] == pytest.approx(0.025, abs=1e-5)


def test_pairs_of_policies_that_seeds_do_not_tell_apart_count_both_ways():
    seeds = np.linspace(-0.01, 0.01, 10)
    first = {"a": 0.9 + seeds, "b": 0.5 + seeds, "c": 0.51 - 3 * seeds}
    swapped = {"a": 0.2 + seeds, "b": 0.5 + seeds, "c": 0.51 - 3 * seeds}
    tau, bounds = intervals.rank_agreement(first, first)
    assert tau == 1.0 and bounds == pytest.approx((1 / 3, 1.0))  # b and c may be the other way round
    tau, bounds = intervals.rank_agreement(first, swapped)
    assert tau == pytest.approx(-1 / 3) and bounds == pytest.approx((-1.0, -1 / 3))
    few = {policy: values[:9] for policy, values in first.items()}
    assert intervals.rank_agreement(few, few) == (1.0, None)


def test_paired_intervals_do_not_see_what_seeds_have_in_common():
    rng = np.random.default_rng(1)
    hard = rng.uniform(1.0, 100.0, 12)  # seeds differ far more than policies
    low, high = intervals.difference(hard + 1.0, hard)
    assert low == pytest.approx(1.0) and high == pytest.approx(1.0)
    low, high = intervals.reduction(0.8 * hard, hard)
    assert low == pytest.approx(0.2) and high == pytest.approx(0.2)


def test_comparison_pairs_by_seed_and_load():
    def runs(policy, qps, values):
        return [dict(policy=policy, requested_qps=qps, seed=s, ttft_p50_s=v) for s, v in values.items()]

    rows = runs("a", 1.0, {0: 1.0, 1: 2.0, 2: 9.0}) + runs("b", 1.0, {1: 4.0, 0: 2.0}) + runs("a", 2.0, {0: None})
    one, two = intervals.compare(rows, "ttft_p50_s", "a", "b")
    assert (one["requested_qps"], one["num_seeds"], one["difference"], one["reduction"]) == (1.0, 2, -1.5, 0.5)
    assert one["reduction_ci_low"] is None
    assert (two["num_seeds"], two["difference"], two["reduction"]) == (0, None, None)
