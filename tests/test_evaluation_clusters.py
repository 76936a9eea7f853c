"""Routers with schedulers in `evaluate`: pairs, rows, the matrix of the report, and errors of one line."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from llmsched_gym.cli import main
from llmsched_gym.cluster.router import check_replica
from llmsched_gym.config import ClusterScenario, ConfigError, scenario
from llmsched_gym.cost import load_profile
from llmsched_gym.evaluation.cells import steps_frame
from llmsched_gym.evaluation.clusters import simulate_cluster, split_policy
from llmsched_gym.evaluation.grid import evaluate
from llmsched_gym.evaluation.metrics import requests_frame, row
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.evaluation.store import read_rows
from llmsched_gym.report import batch_charts, page
from llmsched_gym.report import clusters as report
from llmsched_gym.scheduler import PolicyError

ONE = scenario("paper", num_requests=60, qps=1.4, warmup_s=0.0)
TWO = ClusterScenario(**ONE.replace(qps=2.6).to_dict(), num_replicas=2)
ABOUT_REPLICAS = 12  # columns


class First:
    """Always the first replica."""

    def route(self, view):
        return 0


@pytest.mark.parametrize(
    "policy, parts",
    [
        ("jsq+slai", ("jsq", "slai")),
        ("a[b=x+y]+rad[c=1+2]", ("a[b=x+y]", "rad[c=1+2]")),
        ("a+b+c", ("a", "b+c")),
        ("slai[hold=true]", ("least-tokens", "slai[hold=true]")),
    ],
)
def test_a_policy_is_split_at_the_first_plus_outside_brackets(policy, parts):
    assert split_policy(policy, "least-tokens") == parts


def test_a_router_that_names_the_first_replica_has_the_row_of_one_engine():
    alone = row(simulate(ONE, "slai", 3))
    world = ClusterScenario(**ONE.to_dict(), num_replicas=3)
    routed = row(simulate_cluster(world, "slai", 3, router=First()))
    shared = set(alone) - {"wall_time_s"}
    assert {name: routed[name] for name in shared} == {name: alone[name] for name in shared}
    assert len(set(routed) - set(alone)) == ABOUT_REPLICAS
    assert routed["requests_by_replica"] == [60, 0, 0] and routed["imbalance"] == pytest.approx(3.0)


def test_rows_say_who_routed_and_what_each_replica_did():
    found = evaluate(TWO, ["jsq+slai", "round-robin+sarathi"], seeds=2)
    assert [(r["policy"], r["router"], r["scheduler"]) for r in found[::2]] == [
        ("jsq+slai", "jsq", "slai"),
        ("round-robin+sarathi", "round-robin", "sarathi"),
    ]
    for r in found:
        assert r["num_replicas"] == 2 and sum(r["requests_by_replica"]) == 60
        assert 1.0 <= r["imbalance"] <= 2.0 and all(0.0 < share <= 1.0 for share in r["busy_share_by_replica"])
        assert r["hit_rate_by_replica"] == [None, None]
        json.dumps(r, allow_nan=False)
    assert found[2]["requests_by_replica"] == [30, 30]  # in turn


def test_the_frame_of_requests_says_where_each_went():
    frame = requests_frame(simulate(TWO, "round-robin+slai", 0))
    assert sorted(frame["replica"].unique()) == [0, 1]
    assert "replica" not in requests_frame(simulate(ONE, "slai", 0))


def test_batches_are_logged_of_every_replica():
    found = simulate(TWO, "round-robin+slai", 0, num_steps=20)
    assert [len(log) for log in found.steps_by_replica] == [20, 20]
    assert any(np.array_equal(found.steps, log) for log in found.steps_by_replica)
    frame = steps_frame(found)
    assert frame["replica"].tolist() == [0] * 20 + [1] * 20
    assert frame["start_s"].tolist() == np.concatenate([log["start_s"] for log in found.steps_by_replica]).tolist()
    assert "replica" not in steps_frame(simulate(ONE, "slai", 0, num_steps=20))


def log_of(policy, replica, running, num_batches=40, batch_s=1.0):
    start_s = batch_s * np.arange(num_batches)
    fixed = {"num_waiting": replica, "num_running": running, "kv_cache_usage": 0.25 * (1 + replica)}
    fixed |= {"decode_tokens": running, "prefill_tokens": 0, "duration_s": batch_s}
    return pd.DataFrame({"policy": policy, "replica": replica, "start_s": start_s, **fixed})


def test_all_replicas_are_in_one_chart_with_one_legend():
    logs = [log_of("a+b", 0, 2), log_of("a+b", 1, 5, num_batches=20), log_of("c+d", 0, 1), log_of("c+d", 1, 1)]
    chart = batch_charts.replicas_over_time(pd.concat(logs), ["a+b", "c+d"], bin_s=1.0)
    shown = {(t["meta"]["pick"], t["yaxis"], t["name"]): t for t in chart.traces}
    assert list(chart.pick) == ["a+b", "c+d"] and len(shown) == len(chart.traces) == 2 * 3 * 2
    assert shown["a+b", "y2", "replica 0"]["y"] == [2] * 40
    assert shown["a+b", "y2", "replica 1"]["y"] == [5] * 20 + [0] * 20  # it has nothing to do behind its last batch
    assert shown["a+b", "y3", "replica 1"]["y"][:20] == [50] * 20  # % of its blocks
    both = [shown["a+b", "y2", f"replica {j}"] for j in (0, 1)]
    assert both[0]["stackgroup"] == both[1]["stackgroup"] and both[0]["meta"]["ink"] != both[1]["meta"]["ink"]
    in_legend = [t["name"] for t in chart.traces if t["meta"]["pick"] == "a+b" and t["showlegend"]]
    assert in_legend == ["replica 0", "replica 1"]
    assert set(t["meta"]["ink"] for t in chart.traces) <= set(page.INKS)
    assert batch_charts.replicas_over_time(pd.concat(logs).drop(columns="replica"), ["a+b"]) is None


def test_the_batches_of_one_replica_are_those_of_the_busiest():
    logs = pd.concat(
        [log_of("a+b", 0, 2, num_batches=10), log_of("a+b", 1, 5), log_of("c+d", 0, 7), log_of("c+d", 1, 1, 9)]
    )
    assert batch_charts.busiest(logs).groupby("policy")["num_running"].unique().map(list).to_dict() == {
        "a+b": [5],
        "c+d": [7],
    }


@pytest.mark.parametrize("given", [{"watch": lambda engine: 1}, {"profile": load_profile(ONE.profile)}])
def test_what_is_of_one_engine_is_refused_for_replicas(given):
    (name,) = given
    with pytest.raises(ConfigError, match=rf"^{name}: expected [^\n]*for a cluster") as error:
        simulate(TWO, "slai", 0, **given)
    assert "\n" not in str(error.value)


def test_hits_are_counted_at_the_replica_that_had_them():
    world = scenario("cluster", num_requests=80, warmup_s=0.0, qps=4.0, workload="chat", arrivals_continue=False)
    found = row(simulate(world, "session[slack=inf]+slai", 0))
    hits = [h for h in found["hit_rate_by_replica"] if h is not None]
    assert hits and all(0.0 <= h < 1.0 for h in hits)
    assert min(hits) <= found["prefix_hit_rate"] <= max(hits)


def test_the_matrix_has_routers_in_lines_and_schedulers_in_columns():
    rows = pd.DataFrame(evaluate(TWO, ["jsq+slai", "jsq+sarathi", "random+slai", "random+sarathi"], seeds=3))
    tables = report.matrices(rows)
    assert [table.labels for table in tables] == [["router", "slai", "sarathi"]] * len(tables)
    assert [line[0].text for line in tables[0].rows] == ["jsq", "random"]
    mean = 100 * rows[rows.policy == "jsq+slai"]["slo_attainment"].mean()
    assert math.isclose(float(tables[0].rows[0][1].text), mean, abs_tol=0.06)
    one = report.matrices(rows[rows.scheduler == "slai"])  # one column each would say no more in tables of their own
    assert len(one) == 1 and one[0].labels[:3] == ["router", "SLO attainment (%)", "Mean utility"]
    assert [[cell.text for cell in line[:2]] for line in one[0].rows] == [
        [line[0].text, line[1].text] for line in tables[0].rows
    ]
    assert report.matrices(pd.DataFrame([row(simulate(ONE, "slai", 0))])) == []
    busy, *_ = batch_charts.replicas(rows)
    assert [len(trace["y"]) for trace in busy.traces] == [2] * 4
    assert busy.traces[0]["y"] == pytest.approx(
        100 * np.mean(rows[rows.policy == "jsq+slai"]["busy_share_by_replica"].tolist(), axis=0), rel=1e-3
    )


@pytest.mark.parametrize(
    "given, said",
    [
        ("--suite default --router jsq --policy slai", "router: expected a suite of several replicas"),
        ("--suite cluster --router jsk --policy slai", "router 'jsk' is unknown (did you mean 'jsq'?)"),
        ("--suite cluster --router jsq[x=1] --policy slai", "router 'jsq[x=1]': unknown parameter 'x', it has none"),
        ("--suite cluster --router , --policy slai", "router: expected names separated by commas"),
        ("--suite cluster --router jsq --policy slay", "policy 'slay' is unknown"),
        ("--suite cluster --router none:Class --policy slai", "router 'none:Class': cannot import 'none'"),
        ("--suite cluster --replicas 0 --policy slai", "num_replicas: expected a whole number >= 1, got 0"),
        ("--suite hetero --replicas 2 --policy slai", "replicas: expected 8, as suite 'hetero' names replica_profiles"),
        ("--suite cluster --staleness -1 --policy slai", "router_staleness_s: expected a number >= 0, got -1"),
        ("--suite default --replicas 2 --policy slai", "replicas: expected a suite of several replicas"),
        (
            '--suite cluster --policy slai --set roles=["prefill","prefill","prefill","prefill"]',
            "roles: expected at least",
        ),
    ],
)
def test_bad_input_is_one_line(capsys, given, said):
    assert main(["evaluate", *given.split()]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_runs_without_prefix_caching_are_kept(tmp_path):
    found = evaluate(TWO, ["jsq+slai"], seeds=2, out=tmp_path / "out")  # whose hit rates are lists of nothing
    assert read_rows(tmp_path / "out") == found and found[0]["hit_rate_by_replica"] == [None, None]


@pytest.mark.parametrize("named", [float("inf"), float("nan"), 1.0, np.array([1, 2]), None, "1", True, np.True_, -1, 4])
def test_what_is_no_replica_is_one_line(named):
    with pytest.raises(PolicyError, match="router 'mine': expected a replica from 0 to 3, got"):
        check_replica("mine", named, np.ones(4, np.bool_))
    assert check_replica("mine", np.int32(2), np.ones(4, np.bool_)) == 2


class Gone:
    """Names a replica that is not there."""

    def route(self, view):
        return 7


def test_a_router_that_names_no_replica_is_one_line(capsys):
    given = "--suite cluster --router test_evaluation_clusters:Gone --policy slai --num-requests 5 --seeds 1 --qps 4"
    assert main(["evaluate", *given.split()]) == 2
    assert "Gone': expected a replica from 0 to 3, got 7" in capsys.readouterr().err


def test_a_report_has_the_routers(tmp_path, capsys):
    given = "--suite cluster --router jsq,random --policy slai,sarathi --num-requests 40 --seeds 2 --qps 4"
    given += " --set warmup_s=5 --set drain_s=5 --set workload=chat --workers 1 --out"
    assert main(["evaluate", *given.split(), str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert "Routers" in text and "router-replicas" in text and "replicas-over-time" in text


def test_routers_are_listed(capsys):
    assert main(["routers", "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert listed["prefix-affinity[weight=1,imbalance=32]"]["parameters"] == {"weight": "1", "imbalance": "32"}
    assert {"jsq", "rad-route", "power-of-two"} <= set(listed)
