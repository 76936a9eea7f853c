"""What `info` says: the same flat keys everywhere, numpy scalars, and the episode's figures as `evaluate` has them."""

import json
import math

import gymnasium as gym
import numpy as np
import pytest

from llmsched_gym.config import ACTIONS, env_config
from llmsched_gym.env import LLMSchedEnv, LLMSchedVectorEnv
from llmsched_gym.env.episode import METRICS
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate

STEP = ["duration_s", "discount", "reward_on_time", "reward_expired", "reward_lateness", "reward_refused"]
KEYS = [*STEP, "seed", "qps"]
EPISODE_KEYS = [f"episode_{name}" for name in METRICS]


def run(env, seed):
    """Infos of an episode under Sarathi-Serve's knobs, the reset's first."""
    infos, rewards, over = [env.reset(seed=seed)[1]], [0.0], False
    while not over:
        _, reward, terminated, truncated, info = env.step(np.zeros(env.action_space.shape, np.int64))
        infos.append(info)
        rewards.append(reward)
        over = terminated or truncated
    return infos, rewards


@pytest.mark.parametrize("metrics", [False, True])
@pytest.mark.parametrize("action", ACTIONS)
def test_the_same_flat_keys_in_reset_and_step_all_numpy_scalars(action, metrics):
    env = gym.make("LLMSched-v0", action=action, episode_metrics=metrics, horizon_s=3.0, max_backlog=5)
    env.action_space.seed(0)
    infos = [env.reset(seed=4)[1]]
    while True:
        *_, terminated, truncated, info = env.step(env.action_space.sample())
        infos.append(info)
        if terminated or truncated:
            break
    for info in infos:
        assert list(info) == KEYS + EPISODE_KEYS * metrics
        assert all(type(v) is (np.int64 if k == "seed" else np.float64) for k, v in info.items())
        assert info["seed"] == 4 and info["qps"] == infos[0]["qps"]
    assert infos[0]["duration_s"] == 0.0 and infos[0]["discount"] == 1.0
    for info in infos[:-1]:
        assert all(math.isnan(info[key]) for key in EPISODE_KEYS * metrics)
    assert not metrics or infos[-1]["episode_tokens_per_s"] > 0.0
    json.dumps({k: v.item() for k, v in infos[-1].items()})


def test_the_parts_of_the_reward_are_its_parts():
    env = LLMSchedEnv(qps=2.0, num_requests=60, warmup_s=0.0, reward_scale=0.5, patience_s=2.0)
    infos, rewards = run(env, 3)
    for info, reward in zip(infos, rewards, strict=True):
        parts = [info[key] for key in STEP[2:]]
        assert 0.5 * sum(parts) == pytest.approx(reward, abs=1e-12)
    assert env.reward_terms() == {key.removeprefix("reward_"): infos[-1][key] for key in STEP[2:]}
    assert sum(info["reward_on_time"] for info in infos) > 10 and sum(info["reward_lateness"] for info in infos) < 0


@pytest.mark.parametrize(
    ("suite", "fields"),
    [
        ("default", {"qps": 2.2, "num_requests": 150, "patience_s": 5.0}),
        ("tenants", {"qps": 2.6, "num_requests": 150, "patience_s": 2.0, "drain_s": 3.0}),
        ("paper", {"qps": 1.5, "num_requests": 60, "max_model_len": 1500, "tbt_rule": "fraction:0.99"}),
        ("default", {"qps": 2.0, "num_requests": 80, "credit": "finish", "tbt_rule": "deadline"}),
        ("chat", {"qps": 3.0, "num_requests": 300, "patience_s": 2.0, "warmup_s": 0.0}),
    ],
)
def test_an_episodes_figures_are_those_of_evaluate(suite, fields):
    env = LLMSchedEnv(suite, episode_metrics=True, **fields)
    infos, rewards = run(env, 6)
    found = {name: infos[-1][f"episode_{name}"] for name in METRICS}
    assert env.episode_metrics() == {name: float(value) for name, value in found.items()}
    right = row(simulate(env_config(suite, **fields), "sarathi", 6))
    counted = right["num_requests"] - right["num_to_come"]
    lost = sum(right[f"num_{name}"] for name in ("refused", "rejected", "abandoned", "cancelled")) / counted
    assert (right["num_cancelled"] > 0) == (suite == "chat")
    assert found["attainment"] == pytest.approx(right["slo_attainment"], abs=1e-12)
    assert found["lost"] == pytest.approx(lost, abs=1e-12)
    for name in ("ttft_p50_s", "ttft_p99_s", "itl_p99_s"):
        assert found[name] == (math.inf if right[name] is None else pytest.approx(right[name], rel=1e-12))
    assert found["utility"] == pytest.approx(sum(rewards) / counted, abs=1e-9)
    if right["num_unfinished"] == 0:
        assert found["utility"] == pytest.approx(right["mean_utility"], abs=1e-9)
    assert found["tokens_per_s"] > 0.0


def test_figures_at_any_time_and_without_recorded_gaps():
    env, envs = LLMSchedEnv(horizon_s=30.0, max_backlog=0), LLMSchedVectorEnv(2, horizon_s=30.0, max_backlog=0)
    assert all(math.isnan(value) for value in env.episode_metrics().values())
    env.reset(seed=8)
    envs.reset(seed=8)
    for _ in range(200):
        env.step(np.zeros(7, np.int64))
        envs.step(np.zeros((2, 7), np.int64))
    now = env.episode_metrics()
    assert list(now) == list(METRICS)
    assert math.isnan(now["itl_p99_s"]) and 0.0 < now["ttft_p50_s"] < 10.0
    assert {name: values[0] for name, values in envs.episode_metrics().items()} == pytest.approx(now, nan_ok=True)


def test_recorded_gaps_find_room_in_every_episode():
    envs = LLMSchedVectorEnv(3, autoreset_mode="same_step", episode_metrics=True, horizon_s=4.0, qps_range=(0.5, 6.0))
    envs.reset(seed=0)
    ended = 0
    for _ in range(400):
        *_, info = envs.step(np.zeros((3, 7), np.int64))
        if "final_info" in info:
            done = info["_final_info"]
            ended += done.sum()
            served = np.isfinite(info["final_info"]["episode_ttft_p50_s"][done])
            assert np.isfinite(info["final_info"]["episode_itl_p99_s"][done][served]).all()
            assert np.isnan(info["episode_attainment"]).all()
        gaps = [int(t.output_tokens.sum()) - len(t) for t in envs.core.tables]
        assert envs.core.engine.state.gaps.shape[1] >= max(gaps)
    assert ended > 5
