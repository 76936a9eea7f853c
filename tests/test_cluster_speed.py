"""`benchmarks.cluster_speed`: what it measures is there and adds up, and bad arguments are one line."""

import pytest

from benchmarks import cluster_speed
from llmsched_gym.cluster import Cluster
from llmsched_gym.config import scenario
from llmsched_gym.registry import make_router
from llmsched_gym.workload import make_table


def test_a_run_and_the_look_of_its_router():
    found = cluster_speed.measure(2, 300, 0.5, "jsq", "slai")
    assert found["replicas"] == 2 and found["requests"] >= 300
    assert found["request_us"] == pytest.approx(1e6 * found["cpu_s"] / found["requests"])
    assert found["look_us"] > 0.0 and 0.0 < found["batch_us"] < found["request_us"]
    assert 0.3 < found["hit_rate"] < 1.0 and found["before_mb"] > 10.0 and found["grown_mb"] >= 0.0
    line = cluster_speed.replicas_text([found]).splitlines()[-1]
    assert line.startswith("| 2 | 3") and len(line) <= 80


def test_looks_are_taken_at_decisions_and_leave_the_run_whole():
    world = scenario("cluster", num_requests=50, warmup_s=0.0, qps=4.0, arrivals_continue=False)
    table = make_table(world, 0)
    cluster = Cluster(world, len(table), scheduler="slai")
    assert cluster_speed.look_us(cluster, table, make_router("prefix-affinity")) > 0.0
    assert cluster.nodes.routes[0].num_decisions > 0


def test_the_command_prints_both_tables(capsys):
    assert cluster_speed.main(["--replicas", "1", "--requests", "50", "--envs", "1,2", "--steps", "64"]) == 0
    out = capsys.readouterr().out
    assert "| replicas | requests | CPU s |" in out and "| environments |" in out and out.count("\n| 2 | ") == 1


@pytest.mark.parametrize("wrong", [["--router", "nobody"], ["--scheduler", "nobody"]])
def test_unknown_names_are_one_line(wrong, capsys):
    assert cluster_speed.main(["--replicas", "1", "--requests", "10", *wrong]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit):
        cluster_speed.main(["--replicas", "0"])
    for name in ("--requests", "--steps"):
        with pytest.raises(SystemExit):
            cluster_speed.main([name, "0"])
