"""Simulator against model: figures of agreement by hand, the scaled-down world, the page, the env on the model."""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest

from llmsched_gym.config import scenario
from llmsched_gym.cost import load_profile
from llmsched_gym.evaluation import metrics
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.real_backend.sim2real import agreement, small_world
from llmsched_gym.real_backend.sim2real.agreement import ABSOLUTE, RELATIVE
from llmsched_gym.workload import make_table

FIELDS = dict.fromkeys((*RELATIVE, *ABSOLUTE), 1.0)


def rows_of(*runs):
    """Rows from (policy, backend, fields)."""
    return pd.DataFrame(
        [{"policy": p, "load": 1.0, "seed": 0, "backend": side, **FIELDS, **fields} for p, side, fields in runs]
    )


def test_step_errors_by_hand():
    steps = pd.DataFrame(
        {
            "policy": ["a", "a", "b", "b"],
            "load": 1.0,
            "seed": 0,
            "duration_s": [1.0, 2.0, 1.0, 1.0],
            "predicted_s": [1.1, 2.2, 0.5, 0.5],
        }
    )
    found = agreement.step_errors(steps)
    assert found["steps"] == 4 and found["mape"] == pytest.approx((0.1 + 0.1 + 0.5 + 0.5) / 4)
    assert found["bias"] == pytest.approx((0.1 + 0.1 - 0.5 - 0.5) / 4)
    assert found["total"] == pytest.approx(4.3 / 5.0 - 1.0)
    assert found["mape_at_run_speed"] == pytest.approx(0.0, abs=1e-12), "both runs are off by a factor only"


def test_errors_of_pairs_by_hand():
    pairs = agreement.paired(
        rows_of(
            ("a", "real", {"ttft_p50_s": 2.0, "slo_attainment": 0.8, "ttft_p99_s": None}),
            ("a", "sim", {"ttft_p50_s": 1.5, "slo_attainment": 0.9, "ttft_p99_s": None}),
            ("b", "real", {"ttft_p99_s": None}),
            ("b", "sim", {"ttft_p99_s": 5.0}),
        )
    ).set_index("policy")
    assert pairs.loc["a", "ttft_p50_s_error"] == pytest.approx(-0.25)
    assert pairs.loc["a", "slo_attainment_error"] == pytest.approx(0.1)
    assert pairs.loc["a", "ttft_p99_s_error"] == 0.0 and math.isinf(pairs.loc["a", "ttft_p99_s_real"])
    assert pairs.loc["b", "ttft_p99_s_error"] == -1.0


def test_kendall_by_hand():
    assert agreement.kendall_tau([1, 2, 3], [10, 20, 30]) == pytest.approx(1.0)
    assert agreement.kendall_tau([1, 2, 3], [30, 20, 10]) == pytest.approx(-1.0)
    assert agreement.kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert agreement.kendall_tau([1, 2, math.inf], [1, 5, math.inf]) == pytest.approx(1.0)
    assert agreement.kendall_tau([1, 1, 1], [1, 2, 3]) is None and agreement.kendall_tau([1], [1]) is None


def test_clear_pairs_by_hand():
    real, sim = np.array([0.5, 0.51, 0.9]), np.array([0.6, 0.5, 0.4])
    assert agreement.clear_pairs(real, sim, 0.02, relative=False) == {"clear_pairs": 2, "clear_kept": 0}
    assert agreement.clear_pairs(real, real, 0.02, relative=False) == {"clear_pairs": 2, "clear_kept": 2}
    real, sim = np.array([1.0, 1.05, math.inf, math.inf]), np.array([1.0, 2.0, 3.0, math.inf])
    assert agreement.clear_pairs(real, sim, 0.1, relative=True) == {"clear_pairs": 4, "clear_kept": 4}


def requests_of(side, attained, policy="a", load=1.0):
    """Requests of a run, of utility 1 where attained."""
    frame = pd.DataFrame({"attained": np.array(attained, bool), "utility": np.array(attained, float)})
    return frame.assign(index=range(len(frame)), policy=policy, load=load, seed=0, backend=side)


def test_fates_and_differences_of_policies_by_hand():
    good, bad = [1] * 40, [1, 0] * 20
    same = [requests_of(side, fates, p) for side in ("real", "sim") for p, fates in (("a", good), ("b", bad))]
    found = agreement.request_agreement(pd.concat(same, ignore_index=True))
    assert (found["compared"], found["fates_differ"]) == (80, 0.0)
    assert (found["significant_pairs"], found["significant_kept"]) == (1, 1)
    turned = [*same[:1], requests_of("real", good, "b"), *same[2:]]  # on the model b is as good
    found = agreement.request_agreement(pd.concat(turned, ignore_index=True))
    assert found["fates_differ"] == 0.25 and found["fates_differ_by_policy"] == {"a": 0.0, "b": 0.5}
    assert (found["significant_pairs"], found["significant_kept"]) == (1, 0)


def test_a_simulator_compared_with_itself_agrees():
    fields = [{"mean_utility": u, "slo_attainment": u, "ttft_p50_s": 1 - u} for u in (0.2, 0.5, 0.9)]
    rows = rows_of(*((p, side, f) for p, f in zip("abc", fields, strict=True) for side in ("real", "sim")))
    steps = pd.DataFrame({"policy": ["a"], "load": 1.0, "seed": 0, "duration_s": [0.5], "predicted_s": [0.5]})
    found = agreement.summary(rows, steps, pd.concat([requests_of(side, [1, 0, 1]) for side in ("real", "sim")]))
    assert set(found["mean_kendall_tau"].values()) == {1.0} and found["clear_pairs"] == found["clear_kept"] == 9
    assert set(found["median_relative_error"].values()) == {0.0} and found["step_time"]["mape"] == 0.0
    json.dumps(found, allow_nan=False)


def test_the_small_world_is_the_default_one_seen_from_afar(tmp_path):
    profile = load_profile("rtx6000ada-mistral-7b")
    world = small_world.make_world(profile, 1 / 16, tmp_path, 50, 920)
    s = world.scenario
    assert (s.max_model_len, s.max_num_batched_tokens, world.token_budget) == (512, 512, 64)
    assert (s.ttft_slo_s / s.strict_tbt_slo_s, s.patience_s / s.ttft_slo_s) == pytest.approx((5.0, 120.0))
    table = make_table(s.replace(qps=1.0, num_requests=4000), 0)
    large = make_table(scenario("default", qps=1.0, num_requests=4000, warmup_s=0.0, arrivals_continue=False), 0)
    assert table.prompt_tokens.mean() == pytest.approx(large.prompt_tokens.mean() / 16, rel=0.02)
    assert (table.prompt_tokens + table.output_tokens).max() <= 512
    loads = [s.replace(qps=f * world.saturation_qps, num_requests=300) for f in (0.5, 2.0)]
    light, heavy = (metrics.row(simulate(at, "sarathi[budget=64]", 0))["slo_attainment"] for at in loads)
    assert light > 0.9 and heavy < 0.5, "load 1 is about where a server saturates"
    assert world.policy("slai") == "slai[budget=64]" and world.policy("rad") == "rad"
    assert world.policy("sarathi[budget=8]") == "sarathi[budget=8]"


def test_the_world_at_full_scale_is_the_default_one(tmp_path):
    profile = load_profile("rtx6000ada-mistral-7b")
    world = small_world.make_world(profile, 1.0, tmp_path, 10, profile.num_kv_blocks)
    assert world.time_unit == pytest.approx(1.0) and world.token_budget == 512 and not list(tmp_path.iterdir())
    assert world.scenario.workload == "sharegpt" and world.scenario.max_num_batched_tokens == 8192
    assert 1.0 < world.saturation_qps < 3.0


@pytest.fixture
def one_thread():
    torch = pytest.importorskip("torch", reason="the real backend needs torch")
    pytest.importorskip("transformers", reason="the real backend needs transformers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def profile_file(tmp_path):
    """About what random:tiny takes on one core, so that the test needs no calibration."""
    data = load_profile("rtx6000ada-mistral-7b").to_dict()
    data |= {"name": "guess", "linear": {"kind": "table", "tokens": [1, 512], "ms": [2.0, 20.0]}, "overhead_ms": 0.0}
    data |= {"pair_ms": 4e-5, "kv_ms": 3e-4, "fit": None}
    path = tmp_path / "guess.json"
    path.write_text(json.dumps(data))
    return path


def test_the_page_is_made_from_runs_on_both(tmp_path, one_thread, profile_file, capsys):
    from llmsched_gym.real_backend.sim2real.compare import main

    out = tmp_path / "page"
    command = ["--model", "random:tiny", "--device", "cpu", "--out", str(out), "--profile", str(profile_file)]
    command += ["--policy", "slai,sarathi", "--loads", "0.7", "--num-requests", "10", "--seeds", "1"]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["steps"] > 20 and printed["mape"] > 0.0
    rows = pd.read_json(out / "runs.json")
    assert sorted(zip(rows["policy"], rows["backend"], strict=True)) == [
        (p, b) for p in ("sarathi", "slai") for b in ("real", "sim")
    ]
    assert (rows["num_finished"] == 10).all()
    assert len(pd.read_parquet(out / "steps.parquet")) == printed["steps"]
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and not re.search(r'(src|href)="(?!data:)', page)
    assert "Kendall" in page and "nan" not in re.sub(r"base64,[^\"]+", "", page)
    text = (out / "report.md").read_text()
    assert text.count("![") == 3 and "| 0.7 | slai |" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--loads", "0.5,x"], "loads: expected numbers > 0"),
        (["--policy", "slai,,rad"], "policy: expected names"),
        (["--policy", "slay"], "did you mean 'slai'"),
        (["--scale", "2"], "scale: expected a number > 0 and <= 1"),
        (["--profile", "nowhere.json"], "nowhere.json: cannot read"),
    ],
)
def test_a_wrong_command_is_one_line(tmp_path, one_thread, profile_file, arguments, expected, capsys):
    from llmsched_gym.real_backend.sim2real.compare import main

    base = ["--model", "random:tiny", "--device", "cpu", "--out", str(tmp_path / "x"), "--profile", str(profile_file)]
    assert main([*base, *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and expected in errors[0]


def test_the_env_runs_on_the_model(tmp_path, one_thread):
    gym = pytest.importorskip("gymnasium")
    from gymnasium.utils.env_checker import check_env

    import llmsched_gym  # noqa: F401 - registers the environments
    from llmsched_gym.engine import check

    workload = small_world.scaled_workload("sharegpt", 1 / 16, tmp_path)
    fields = {"max_model_len": 512, "max_num_seqs": 16, "max_num_batched_tokens": 512, "workload": str(workload)}
    env = gym.make(
        "LLMSched-v0", backend="transformers", model="random:tiny", qps=3.0, max_backlog=3, horizon_s=20.0, **fields
    )
    check_env(env.unwrapped, skip_render_check=True)
    env.reset(seed=1)
    durations, clock_s = [], 0.0
    for _ in range(120):
        _, _, terminated, truncated, info = env.step(env.action_space.sample())
        durations.append(info["duration_s"])
        clock_s = check(env.unwrapped.core.engine.state, previous_clock_s=clock_s)
        if terminated or truncated:
            env.reset()
            clock_s = 0.0
    assert len({d for d in durations if d > 0.0}) > 20, "measured times are all different"
    backend = env.unwrapped.core.engine.backend
    backend.check()
    env.reset(seed=2)
    assert backend.blocks.num_free == backend.num_kv_blocks
