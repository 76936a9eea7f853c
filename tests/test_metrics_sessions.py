"""Rows and request frames of runs with sessions and a prefix cache: small runs whose figures are known beforehand."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from test_engine_sessions import root, sessions, turn
from test_metrics import client, episode

from llmsched_gym.config import scenario
from llmsched_gym.evaluation.grid import evaluate
from llmsched_gym.evaluation.metrics import gaps_of, requests_frame, row
from llmsched_gym.evaluation.outcomes import Outcomes
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.evaluation.store import read_rows

WORLD = scenario("default", num_requests=3, jitter=0.0)
OUTCOMES = ("finished", "rejected", "refused", "abandoned", "cancelled", "unfinished", "to_come")


def run(*rows, policy="vllm-v1", cohort=None, **fields):
    return simulate(WORLD.replace(**fields), policy, 0, table=replace(sessions(*rows, cohort=cohort), qps=1.0))


def by_hand(clients, parent, **fields):
    """What a run would leave behind that had served `clients` so, of which `parent` names the parents."""
    found = episode(clients, **fields)
    turns = np.array(parent) >= 0
    found.requests["arrival_s"][[c.get("never", False) for c in clients]] = math.nan
    found.table.arrival_s[turns] = math.nan
    return replace(found, table=replace(found.table, parent=np.array(parent, np.int32), think_s=np.zeros(len(turns))))


def never(phase):
    """A turn that has not come."""
    return client(phase) | {"never": True}


def counts(figures):
    return {name: figures[f"num_{name}"] for name in OUTCOMES if figures[f"num_{name}"]}


def test_a_turn_behind_a_rejected_one_is_cancelled_and_a_miss():
    found = run(root(0.0, 40, 10), turn(0, 1.0, 9000, 1), turn(1, 1.0, 9010, 1))
    figures, frame = row(found), requests_frame(found)
    assert counts(figures) == dict(finished=1, rejected=1, cancelled=1) and figures["num_requests"] == 3
    assert figures["num_too_long"] == 1  # the cancelled one, longer still, never asked
    assert figures["slo_attainment"] == figures["mean_utility"] == 1 / 3
    assert figures["slo_attainment_by_class"]["relaxed"] == 1 / 3
    assert (figures["num_sessions"], figures["session_on_time"], figures["session_p50_s"]) == (1, 0.0, None)
    # of the two that came, one has no first token
    assert figures["ttft_p50_s"] is None and figures["ttft_p90_s"] is None
    assert frame["ttft_s"].isna().tolist() == [False, True, True]
    assert frame["arrival_s"].isna().tolist() == [False, False, True]
    assert frame["phase"].tolist() == ["finished", "rejected", "cancelled"]
    assert frame["utility"].tolist() == [1.0, 0.0, 0.0]
    json.dumps(figures, allow_nan=False)


def test_who_never_came_is_in_no_percentile():
    rows = [root(float(k), 40, 2) for k in range(8)]
    served = row(run(*rows))
    rows[8:] = [root(8.0, 9000, 1)] + [turn(8 + k, 0.0, 9001 + k, 1) for k in range(90)]
    with_cancelled = row(run(*rows, cohort=(0, 99)))
    assert with_cancelled["num_cancelled"] == 90 and with_cancelled["slo_attainment"] == 8 / 99
    for name in ("ttft_p50_s", "queue_time_p50_s", "e2e_p50_s"):  # one infinite of nine, not 91 of 99
        assert with_cancelled[name] == pytest.approx(served[name], rel=0.02)
    assert sum(counts(with_cancelled).values()) == 99


def test_turns_still_to_come_are_in_no_share():
    # served at 1.0; abandoned at 3.0, its turn cancelled; running when the run ends at 20.0, its two turns to come
    clients = [client("finished", 1.0), client("abandoned", arrival=1.0, late=10.0, resolved=13.0), never("cancelled")]
    clients += [client("running", 19.5, arrival=19.0, output=9), never("pending"), never("pending")]
    found = by_hand(clients, [-1, -1, 1, -1, 3, 4])
    figures = row(found)
    assert counts(figures) == dict(finished=1, abandoned=1, cancelled=1, unfinished=1, to_come=2)
    assert figures["slo_attainment"] == 1 / 4  # of the three that came and the cancelled one
    assert figures["mean_utility"] == (1.0 - 0.5 + 0.0 + 0.0) / 4
    assert figures["ttft_p50_s"] == 1.0  # of 1.0, 0.5 and infinity
    assert (figures["num_sessions"], figures["session_on_time"]) == (3, 1 / 3)
    # roots came at 0, 1 and 19: one of three sessions' requests in time, three sessions less one in 19 s
    assert figures["request_goodput"] == 1 / 3 * 2 / 19.0


def test_a_session_lasts_from_its_first_arrival_to_its_last_token():
    two = [client("finished", 0.5), client("finished", 3.5, 4.0, arrival=3.0)]
    three = [client("finished", 2.5, arrival=2.0), client("finished", 8.5, arrival=6.0), client("finished", 7.0)]
    three[2]["arrival"] = 6.5  # a fork of the first, whose answer comes before the other's
    broken = [client("finished", 9.5, arrival=9.0), client("refused", arrival=10.0, resolved=10.0)]
    figures = row(by_hand([*two, *three, *broken], [-1, 0, -1, 2, 2, -1, 5]))
    assert (figures["num_sessions"], figures["num_attained"]) == (3, 5)  # the turn at 6.0 waited 2.5 s
    assert figures["session_on_time"] == 1 / 3
    assert figures["session_p50_s"] == 0.5 * (4.0 + 6.5)
    assert figures["session_p99_s"] == pytest.approx(4.0 + 0.99 * 2.5)


def test_the_last_request_that_came_ends_the_run_for_vllms_rates():
    clients = [client("finished", 1.0, 1.5), client("rejected", arrival=4.0, resolved=4.0), never("cancelled")]
    figures = row(by_hand(clients, [-1, 0, 1]))
    assert figures["vllm_request_goodput"] == 1 / 4.0 and figures["vllm_output_throughput"] == 2 / 4.0


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_hit_rate_of_a_fork(prefix_caching):
    # 64 + 17 tokens, of which the last has no KV: both turns find five blocks of 16
    rows = (root(0.0, 64, 17), turn(0, 1.0, 101, 1), turn(0, 30.0, 101, 1))
    found = run(*rows, prefix_caching=prefix_caching)
    figures, frame = row(found), requests_frame(found)
    assert figures["computed_tokens"] == 64 + 2 * 101 - 160 * prefix_caching
    if prefix_caching:
        assert (figures["num_cached_tokens"], figures["num_recached_tokens"]) == (160, 0)
        assert figures["prefix_hit_rate"] == 160 / (64 + 101 + 101)
        assert frame["num_cached_tokens"].tolist() == [0, 80, 80]
    else:
        assert figures["prefix_hit_rate"] is figures["num_cached_tokens"] is figures["num_recached_tokens"] is None
        assert frame["num_cached_tokens"].isna().all()
    assert frame["session"].tolist() == [0, 0, 0] and frame["turn"].tolist() == [0, 1, 1]
    assert frame["new_tokens"].tolist() == [64, 20, 20]


def test_what_is_found_again_after_a_preemption_is_apart():
    # Ten blocks: both hold five when the first needs a sixth and a seventh. It takes the other's last two, which finds
    # three full blocks when it comes back.
    rows = (root(0.0, 64, 41), root(0.0, 64, 41))
    figures = row(run(*rows, prefix_caching=True, num_kv_blocks=10, watermark=0.0))
    assert figures["num_preemptions"] == 1
    assert (figures["num_cached_tokens"], figures["num_recached_tokens"]) == (0, 48)
    assert (figures["prefix_hit_rate"], figures["computed_tokens"]) == (0.0, 128)


def test_only_sessions_of_the_cohort_are_measured():
    rows = (root(0.0, 64, 17), turn(0, 1.0, 101, 1), root(9.0, 48, 1), turn(2, 1.0, 65, 1))
    found = run(*rows, cohort=(2, 4), prefix_caching=True)
    figures, frame = row(found), requests_frame(found)
    assert (figures["num_sessions"], figures["num_requests"]) == (1, 2)
    assert figures["prefix_hit_rate"] == 48 / (48 + 65)
    assert frame["session"].tolist() == [2, 2] and frame["index"].tolist() == [2, 3]


def test_without_sessions_their_figures_are_missing():
    found = simulate(scenario("default", num_requests=20, qps=1.0), "sarathi", 0)
    figures, frame = row(found), requests_frame(found)
    for name in ("num_sessions", "session_on_time", "session_p50_s", "session_p99_s", "prefix_hit_rate"):
        assert figures[name] is None
    assert figures["num_cancelled"] == figures["num_to_come"] == 0
    assert figures["computed_tokens"] == frame["prompt_tokens"].sum()
    assert frame[["session", "turn", "new_tokens", "num_cached_tokens"]].isna().all(axis=None)


@pytest.mark.parametrize("fields", [{}, {"horizon_s": 300.0, "num_requests": None}, {"drain_s": 1.0}])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_rows_of_sessions_add_up(fields, prefix_caching):
    world = scenario("default", workload="chat", qps=2.5, patience_s=2.0, allow_refusal=True)
    world = world.replace(**{"num_requests": 400, "prefix_caching": prefix_caching, **fields})
    found = simulate(world, "slai", 0)
    figures, frame, o = row(found), requests_frame(found), Outcomes(found)
    assert sum(counts(figures).values()) == figures["num_requests"] == len(frame)
    assert figures["num_cancelled"] > 0
    came = frame["arrival_s"].notna()
    counted = came | (frame["phase"] == "cancelled")
    assert (came == o.came).all() and figures["num_to_come"] == (~counted).sum()
    assert figures["slo_attainment"] == pytest.approx(figures["num_attained"] / counted.sum())
    assert figures["mean_utility"] == pytest.approx(frame["utility"][counted].mean())
    assert (frame["utility"][~came] == 0.0).all() and not frame["attained"][~came].any()
    assert frame.loc[~came, ["ttft_s", "queue_time_s", "e2e_latency_s", "num_cached_tokens"]].isna().all(axis=None)
    assert figures["ttft_p99_s"] is None or figures["ttft_p99_s"] == pytest.approx(
        np.quantile(frame["ttft_s"][came].fillna(math.inf), 0.99)
    )
    by_session = frame.groupby("session")
    assert figures["num_sessions"] == by_session.ngroups
    assert figures["session_on_time"] == pytest.approx(by_session["attained"].all().mean())
    admitted = frame["queue_time_s"].notna()
    prompts = frame["prompt_tokens"][admitted].sum()
    assert figures["computed_tokens"] + (figures["num_cached_tokens"] or 0) == prompts
    if prefix_caching:
        assert 0.0 < figures["prefix_hit_rate"] == pytest.approx(frame["num_cached_tokens"].sum() / prompts)
    assert gaps_of(found, o).num_gaps(0) == figures["num_gaps_by_class"]["strict"]


def test_rows_and_frames_come_back_from_a_folder(tmp_path):
    world = scenario("default", workload="chat", num_requests=60, prefix_caching=True)
    rows = evaluate(world, ["slai", "vllm-v1"], qps=[0.5], seeds=2, out=tmp_path)
    assert read_rows(tmp_path) == rows
    frame = pd.read_parquet(tmp_path / "requests.parquet")
    cached = frame.groupby(["policy", "seed"], observed=True)["num_cached_tokens"].sum()
    assert cached.to_dict() == {(r["policy"], r["seed"]): r["num_cached_tokens"] for r in rows}
    assert (frame["turn"].max() > 1) and frame["session"].notna().all()
