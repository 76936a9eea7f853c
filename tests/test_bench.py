"""`llmsched bench`: every figure is there, for what it says it is of."""

import json
import math

from llmsched_gym.evaluation import bench


def numbers(value):
    """All numbers of an object, whatever holds them."""
    if isinstance(value, dict):
        return [found for inner in value.values() for found in numbers(inner)]
    return [value] if isinstance(value, int | float) else []


def test_a_small_bench_has_every_figure(monkeypatch):
    small = {"ENGINE_REQUESTS": 20, "REPEATS": 1, "NUM_ENVS": (1, 2), "ENV_STEPS": 40, "MAX_CALLS": 20}
    small |= {"LOADS": (1.0,), "NUM_REQUESTS": 20, "PAPER_POLICIES": ("sarathi", "slai")}
    for name, value in small.items():
        monkeypatch.setattr(bench, name, value)
    told = []
    found = bench.bench(note=told.append)
    assert told == ["engine", "evaluation grid", "environments"]
    assert json.loads(json.dumps(found)) == found
    assert all(math.isfinite(number) and number > 0 for number in numbers(found))
    assert set(found["engine_iterations_per_s"]) == {"sarathi", "slai"}
    assert found["evaluate_grid"] == {"policies": 2, "loads": 1, "num_requests": 20, "seeds": 1}
    assert (
        set(found["vector_env_steps_per_s"]) == set(found["reference"]["cartpole_vector_env_steps_per_s"]) == {"1", "2"}
    )
    assert set(found["vector_env_steps_per_s_with_two_threads"]) == {"2"}  # one environment has nothing to share out
    # the mean over time is no more than the most that may run, and somebody runs in every batch
    assert 1 <= found["engine_setting"]["mean_running"] <= 20
    compiled, plain = (
        found["engine_iterations_per_s"]["sarathi"],
        found["reference"]["plain_python_scheduler_iterations_per_s"],
    )
    assert compiled > plain


def test_the_best_of_three_is_told_and_all_are_warmed_up(monkeypatch):
    clock = iter([0.0, 5.0, 5.0, 7.0, 7.0, 10.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    calls = []
    assert bench._timed(calls.append, 90) == 2.0
    assert calls == [30, 90, 90, 90]
