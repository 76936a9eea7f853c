"""The environment as a Gymnasium citizen: checkers, spaces, seeds, errors, vectors, Stable-Baselines3."""

import os
import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from benchmarks.thresholds import returns
from llmsched_gym import SUITES
from llmsched_gym.config import ACTIONS
from llmsched_gym.engine.rows import rows_of
from llmsched_gym.env import LLMSchedEnv, LLMSchedVectorEnv
from llmsched_gym.env.features import FEATURES
from llmsched_gym.workload import make_table

IDS = [suite.env_id for suite in SUITES.values()]
OBSERVATIONS = ("features", "slots")


def leaves(observation):
    return list(observation.values()) if isinstance(observation, dict) else [observation]


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def sample_actions(space, count, seed):
    space.seed(seed)
    return [space.sample() for _ in range(count)]


def rollout(env, actions, seed):
    """Observations, rewards, ends and durations under a list of actions."""
    observation, _ = env.reset(seed=seed)
    out = [[observation], [], [], []]
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        for column, value in zip(out, (observation, reward, (terminated, truncated), info["duration_s"]), strict=True):
            column.append(value)
        if terminated or truncated:
            break
    return out


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("env_id", IDS)
def test_gymnasium_checker_passes(env_id, action):
    for observation in OBSERVATIONS:
        env = gym.make(env_id, action=action, observation=observation)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_env(env.unwrapped, skip_render_check=True)


@pytest.mark.parametrize("env_id", IDS)
def test_sb3_checker_passes(env_id):
    checker = pytest.importorskip("stable_baselines3.common.env_checker", reason="stable-baselines3 is not installed")
    for action in ACTIONS:
        for observation in OBSERVATIONS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                checker.check_env(gym.make(env_id, action=action, observation=observation).unwrapped)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_single_equals_vector_with_seed_plus_i(action, observation):
    fields = {"action": action, "observation": observation, "horizon_s": 20.0}
    vector = LLMSchedVectorEnv(5, autoreset_mode="same_step", **fields)
    streams = [sample_actions(vector.single_action_space, 400, seed=i) for i in range(5)]
    observations, _ = vector.reset(seed=30)
    history = [observations]
    rewards, ends = [], []
    for t in range(400):
        observations, reward, terminated, truncated, info = vector.step(np.stack([stream[t] for stream in streams]))
        history.append((observations, info))
        rewards.append(reward)
        ends.append(terminated | truncated)
    for i in (0, 3, 4):
        single = LLMSchedEnv(**fields)
        seen = rollout(single, streams[i], seed=30 + i)
        steps = len(seen[1])
        assert steps > 50
        assert seen[1] == [reward[i] for reward in rewards[:steps]]
        for t in range(steps):
            observations, info = history[t + 1]
            if ends[t][i]:
                assert equal(seen[0][t + 1], info["final_obs"][i])
                assert info["_final_obs"][i]
                break
            row = {k: v[i] for k, v in observations.items()} if isinstance(observations, dict) else observations[i]
            assert equal(seen[0][t + 1], row)


def test_unseeded_resets_continue_np_random():
    env, twin = LLMSchedEnv(), LLMSchedEnv()
    seeds = []
    for e in (env, twin):
        e.reset(seed=4)
        seeds.append([e.reset()[1]["seed"] for _ in range(3)])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 3


def test_seed_zero_is_a_seed():
    env = LLMSchedEnv()
    first = env.reset(seed=0)[0]
    env.reset(seed=1)
    assert equal(first, env.reset(seed=0)[0])
    assert env.core.tables[0].seed == 0


def test_reset_draws_the_table_of_evaluate():
    env = LLMSchedEnv("drift", num_requests=150, qps=1.7)
    env.reset(seed=12)
    expected = make_table(env.config, 12)
    rows = rows_of(env.core.engine.state, 0, expected)
    assert np.array_equal(env.core.engine.state.arrivals["arrival_s"][0][: len(expected)], expected.arrival_s)
    assert np.array_equal(rows["arrival_s"], expected.arrival_s)
    assert np.array_equal(rows["prompt_tokens"], expected.prompt_tokens)
    assert np.array_equal(env.core.engine.state.output_tokens[0][: len(expected)], expected.output_tokens)


def test_truncation_at_the_horizon_and_termination_when_resolved():
    env = LLMSchedEnv(horizon_s=5.0)
    out = rollout(env, [np.zeros(7, np.int64)] * 5000, seed=0)
    assert out[2][-1] == (False, True)
    env = LLMSchedEnv("paper", num_requests=20)
    out = rollout(env, [np.zeros(7, np.int64)] * 20000, seed=0)
    assert out[2][-1] == (True, False)


def test_info_carries_time():
    env = LLMSchedEnv(tau_s=60.0)
    env.reset(seed=3)
    clock = 0.0
    for _ in range(50):
        *_, info = env.step(np.zeros(7, np.int64))
        clock += info["duration_s"]
        assert info["discount"] == pytest.approx(np.exp(-info["duration_s"] / 60.0), rel=1e-12)
        assert clock == pytest.approx(float(env.core.engine.state.sims[0].clock_s), abs=1e-9)


def test_request_actions_pass_time_only_on_closing():
    env = LLMSchedEnv(action="request", qps=2.0)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    closings = 0
    for _ in range(600):
        action = int(rng.choice(np.flatnonzero(env.action_masks())))
        *_, info = env.step(action)
        assert (info["duration_s"] > 0) == (action == 64)
        assert (info["discount"] == 1.0) == (action != 64)
        closings += action == 64
    assert closings > 10


def test_masked_actions_are_the_ones_that_add_something():
    env = LLMSchedEnv(action="request", qps=2.0)
    env.reset(seed=5)
    rng = np.random.default_rng(1)
    for _ in range(300):
        mask = env.action_masks()
        before = int(env.core.engine.state.batches[0].num_items)
        illegal = np.flatnonzero(~mask)
        if len(illegal) and rng.random() < 0.1:
            *_, info = env.step(int(rng.choice(illegal)))
            assert info["duration_s"] > 0  # it closed the batch
            continue
        action = int(rng.choice(np.flatnonzero(mask)))
        env.step(action)
        if action != 64:
            assert env.core.engine.state.batches[0].num_items == before + 1


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"suite": "papper"}, "suite"),
        ({"qps": -1.0}, "qps"),
        ({"qps": "fast"}, "qps"),
        ({"qps": float("nan")}, "qps"),
        ({"action": "none"}, "action"),
        ({"observation": "pixels"}, "observation"),
        ({"num_request": 5}, "num_request"),
        ({"action_repeat": 0}, "action_repeat"),
        ({"jitter": None}, "jitter"),
        ({"profile": "tpu-v9"}, "profile"),
        ({"workload": "wikipedia"}, "workload"),
        ({"trace": "no/such.csv"}, "no/such.csv"),
        ({"render_mode": "3d"}, "render_mode"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_bad_arguments_give_one_line_that_names_the_field(fields, name):
    with pytest.raises(ValueError, match=name) as error:
        gym.make("LLMSched-v0", **fields).reset(seed=0)
    assert "\n" not in str(error.value)


def test_features_are_named_and_bounded():
    env = LLMSchedEnv("tenants", qps=2.4, horizon_s=120.0)
    assert env.feature_names == [f.name for f in FEATURES]
    assert len(set(env.feature_names)) == len(FEATURES)
    out = rollout(env, sample_actions(env.action_space, 3000, 1), seed=2)
    seen = np.stack(out[0])
    assert env.observation_space.contains(seen[-1])
    assert seen.min() >= 0.0 and seen.max() <= 1.0
    moving = (seen.max(axis=0) > seen.min(axis=0)).mean()
    assert moving > 0.9  # hardly a constant entry


def test_another_process_and_no_jit_give_the_same_trajectory():
    code = (
        "import hashlib, numpy as np\n"
        "from llmsched_gym.env import LLMSchedEnv\n"
        "h = hashlib.sha256()\n"
        "for action in ('knobs', 'priority', 'request'):\n"
        "    env = LLMSchedEnv('tenants', action=action, observation='slots', qps=2.0, max_backlog=12)\n"
        "    env.action_space.seed(1)\n"
        "    env.reset(seed=9)\n"
        "    for _ in range(60):\n"
        "        o, r, te, tr, info = env.step(env.action_space.sample())\n"
        "        for x in (*o.values(), np.float64(r), np.float64(info['duration_s'])):\n"
        "            h.update(x.tobytes())\n"
        "print(h.hexdigest())\n"
    )
    digests = []
    for jit_off in ("0", "0", "1"):
        environment = {**os.environ, "NUMBA_DISABLE_JIT": jit_off}
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True, timeout=300
        )
        digests.append(result.stdout.strip())
    assert digests[0] == digests[1] == digests[2]


def test_no_module_level_rng_is_touched():
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    env = LLMSchedEnv("drift")
    rollout(env, sample_actions(env.action_space, 50, 0), seed=1)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_arrays_grow_for_a_table_larger_than_expected():
    env = LLMSchedEnv(num_requests=30, qps=2.0)
    env.reset(seed=0)
    capacity = env.core.engine.state.requests.shape[1]
    env.core.engine.reserve(capacity + 100)
    assert env.core.engine.state.requests.shape[1] == capacity + 100
    rollout(env, [np.zeros(7, np.int64)] * 100, seed=0)
    fresh = LLMSchedEnv(num_requests=30, qps=2.0)
    assert (
        rollout(env, [np.zeros(7, np.int64)] * 200, seed=1)[1]
        == rollout(fresh, [np.zeros(7, np.int64)] * 200, seed=1)[1]
    )


@pytest.mark.parametrize("name", SUITES)
def test_the_reward_threshold_is_registered(name):
    suite = SUITES[name]
    assert gym.spec(suite.env_id).reward_threshold == suite.reward_threshold is not None


def test_the_reward_threshold_is_what_slai_earns():
    earned = returns("LLMSched-v0", "slai", 20)
    assert np.mean(earned) == pytest.approx(SUITES["default"].reward_threshold, abs=0.1)
