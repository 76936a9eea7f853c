"""The Stable-Baselines3 face of the native vector environment."""

import runpy
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")

from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from llmsched_gym.config import ConfigError
from llmsched_gym.env import LLMSchedVectorEnv
from llmsched_gym.env.sb3 import LLMSchedVecEnv


def test_it_is_the_native_vector_env():
    face, native = LLMSchedVecEnv(3, horizon_s=4.0), LLMSchedVectorEnv(3, autoreset_mode="same_step", horizon_s=4.0)
    face.seed(50)
    assert np.array_equal(face.reset(), native.reset(seed=50)[0])
    for _ in range(200):
        action = np.zeros((3, 7), np.int64)
        observations, rewards, done, infos = face.step(action)
        expected, paid, terminated, truncated, info = native.step(action)
        assert np.array_equal(observations, expected)
        assert np.array_equal(rewards, paid.astype(np.float32))
        for i in np.flatnonzero(done):
            assert infos[i]["TimeLimit.truncated"] and truncated[i] and not terminated[i]
            assert np.array_equal(infos[i]["terminal_observation"], info["final_obs"][i])
            assert infos[i]["episode"]["l"] > 10
        last = info.get("final_info", info)
        assert [entry["discount"] for entry in infos] == np.where(done, last["discount"], info["discount"]).tolist()


def test_episode_statistics_are_the_return():
    face = LLMSchedVecEnv(1, "paper", num_requests=15, qps=1.5)
    face.seed(3)
    face.reset()
    total = 0.0
    for _ in range(20000):
        _, rewards, done, infos = face.step(np.zeros((1, 7), np.int64))
        total += float(rewards[0])
        if done[0]:
            break
    assert face.env_is_wrapped(Monitor) == [True]  # what SB3 asks before it trusts infos for episodes
    assert face.env_is_wrapped(gym.wrappers.TimeLimit) == [False]
    assert not infos[0]["TimeLimit.truncated"]
    assert infos[0]["episode"]["r"] == pytest.approx(total, abs=1e-4)


def test_ppo_learns_on_features_and_slots():
    for observation, policy in (("features", "MlpPolicy"), ("slots", "MultiInputPolicy")):
        env = LLMSchedVecEnv(4, observation=observation, horizon_s=10.0)
        model = PPO(policy, env, n_steps=32, batch_size=64, n_epochs=1, seed=0, device="cpu")
        before = [p.clone() for p in model.policy.parameters()]
        model.learn(256)
        assert any(
            not np.array_equal(a.detach(), b.detach()) for a, b in zip(before, model.policy.parameters(), strict=True)
        )
        assert np.isfinite(evaluate_policy(model, env, n_eval_episodes=2, warn=False)[0])


def test_maskable_ppo_takes_only_legal_actions():
    sb3_contrib = pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
    from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported

    env = LLMSchedVecEnv(3, action="request", qps=2.0)
    assert is_masking_supported(env)
    assert not is_masking_supported(LLMSchedVecEnv(1, action="priority"))
    model = sb3_contrib.MaskablePPO("MlpPolicy", env, n_steps=32, batch_size=48, n_epochs=1, seed=0, device="cpu")
    model.learn(192)
    env.seed(1)
    observations = env.reset()
    for _ in range(100):
        masks = get_action_masks(env)
        assert masks.shape == (3, 65)
        actions, _ = model.predict(observations, action_masks=masks)
        assert masks[np.arange(3), actions].all()
        observations, *_ = env.step(actions)


def test_the_ppo_example_runs(tmp_path, monkeypatch, capsys):
    script = Path(__file__).resolve().parents[1] / "examples" / "ppo.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "8192"])
    runpy.run_path(str(script), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()[-5:]
    assert [line.split()[0] for line in lines] == ["greedy", "sampled", "slai", "on-time", "sarathi"]
    assert (tmp_path / "out" / "ppo.zip").exists()


def test_the_mode_of_resets_is_not_a_choice():
    with pytest.raises(ConfigError, match="autoreset_mode: expected none"):
        LLMSchedVecEnv(2, autoreset_mode="next_step")
