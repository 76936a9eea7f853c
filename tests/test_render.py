"""Frames of every mode, before the first step and after it, for every kind of action; what they say is true."""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from PIL import Image

import llmsched_gym  # noqa: F401
from examples import animation
from llmsched_gym.cli import main, watch
from llmsched_gym.config import ACTIONS
from llmsched_gym.env import LLMSchedEnv, LLMSchedVectorEnv
from llmsched_gym.env.policy import SchedulerPolicy


@pytest.mark.parametrize("action", ACTIONS)
def test_every_mode_gives_what_gymnasium_expects(action, capsys):
    for mode, expected in (("ansi", str), ("rgb_array", np.ndarray), ("human", type(None))):
        env = LLMSchedEnv(action=action, qps=2.0, render_mode=mode)
        env.action_space.seed(0)
        env.reset(seed=0)
        frames = [env.render()]
        for _ in range(40):
            env.step(env.action_space.sample())
        frames.append(env.render())
        env.close()
        assert all(isinstance(frame, expected) for frame in frames)
        if mode == "rgb_array":
            assert {frame.shape for frame in frames} == {(540, 960, 3)}
            assert frames[0].dtype == np.uint8
            assert not np.array_equal(*frames)
        if mode == "ansi":
            assert "none yet" in frames[0] and "ms" in frames[1]
            assert max(len(line) for frame in frames for line in frame.splitlines()) <= 76  # 80 with the panel's frame


def test_gymnasiums_checker_accepts_every_mode(capsys):
    env = gym.make("LLMSched-v0", horizon_s=2.0, render_mode="rgb_array").unwrapped
    check_env(env)  # makes the environment again in each of the other modes


def test_the_panel_shows_its_last_frame_once_where_there_is_no_terminal(capsys):
    env = LLMSchedEnv(qps=2.0, render_mode="human")
    env.reset(seed=0)
    for _ in range(20):
        env.step(np.zeros(7, np.int64))
    env.close()
    env.close()
    out = capsys.readouterr().out
    assert out.count("arrived") == 1 and "batch 20" in out


def test_the_text_frame_counts_what_the_engine_counts():
    env = LLMSchedEnv("paper", qps=2.0, num_requests=30, render_mode="ansi")
    env.reset(seed=1)
    for _ in range(400):
        env.step(np.zeros(7, np.int64))
    sim = env.core.engine.state.sims[0]
    frame = env.render()
    assert f"arrived {env.core.engine.state.episodes[0].num_arrived}" in frame
    assert f"finished {sim.num_finished}" in frame
    assert f"{sim.num_waiting} waiting" in frame
    assert f"{sim.last_batch_decodes} decode" in frame


def test_counts_of_a_resolved_run_are_its_return():
    """With beta 0 the return counts the requests that attained: the ones "on time"."""
    env = LLMSchedEnv("paper", qps=2.0, num_requests=30, beta=0.0, render_mode="ansi")
    env.reset(seed=0)
    total, done = 0.0, False
    while not done:
        _, reward, terminated, truncated, _ = env.step(np.zeros(7, np.int64))
        total += reward
        done = terminated or truncated
    frame = env.render()
    assert terminated and 0 < total < 30
    assert f"on time {total:.0f}   late {30 - total:.0f}" in frame
    assert "decodes 0" in frame and "0 started, 0 waiting" in frame


def test_looking_changes_nothing():
    def run(looks):
        env = LLMSchedEnv(action="request", qps=2.0, render_mode="rgb_array")
        env.reset(seed=3)
        rng = np.random.default_rng(0)
        seen = []
        for _ in range(150):
            action = rng.choice(np.flatnonzero(env.action_masks()))
            seen.append([env.step(action)[1], *env.core.observation(0)])
            if looks:
                env.render()
        return np.array(seen)

    assert np.array_equal(run(True), run(False))


def test_a_new_episode_forgets_the_last_ones_history():
    env = LLMSchedEnv(qps=2.0, render_mode="rgb_array")
    env.reset(seed=5)
    first = env.render()
    for _ in range(60):
        env.step(np.zeros(7, np.int64))
        env.render()
    env.reset(seed=5)
    assert np.array_equal(env.render(), first)


def test_a_decodes_bar_keeps_its_place():
    env = LLMSchedEnv(qps=2.0, render_mode="rgb_array")
    env.reset(seed=2)
    policy = SchedulerPolicy(env, "slai")
    last = {}
    for _ in range(300):
        policy.step()
        env.render()
        places = env._viewer._places
        assert len(set(places.values())) == len(places)
        assert all(last[r] == place for r, place in places.items() if r in last)
        last = dict(places)
    assert len(last) > 5


def test_the_animation_is_made(tmp_path, capsys):
    out = tmp_path / "clip.gif"
    animation.main(["--out", str(out), "--start", "3", "--seconds", "1"])
    with Image.open(out) as clip:
        assert clip.size == (960, 540) and clip.n_frames > 5
        assert 800 <= sum(clip.info["duration"] for k in range(clip.n_frames) if clip.seek(k) is None) <= 1300


@pytest.mark.parametrize("fields", [{}, {"action_repeat": 4}, {"async_lag": True}])
def test_the_history_has_the_batches_between_frames_and_looking_on_changes_nothing(fields):
    env, blind = LLMSchedEnv(qps=2.0, render_mode="rgb_array", **fields), LLMSchedEnv(qps=2.0, **fields)
    env.reset(seed=0), blind.reset(seed=0)
    for _ in range(50):
        (seen, *told), (expected, *paid) = env.step(np.zeros(7, np.int64)), blind.step(np.zeros(7, np.int64))
        assert np.array_equal(seen, expected) and told == paid
    frame, viewer = env.render(), env._viewer
    sim = env.core.engine.state.sims[0]
    runs = list(viewer._runs)
    assert len(runs) == sim.num_batches >= 50 * fields.get("action_repeat", 1) - 1
    assert sum(run.duration_s for run in runs) == pytest.approx(sim.busy_s)
    assert len(viewer._attainment) > 20
    panel = frame[352:396, 648:944].reshape(-1, 3)
    shown = (panel == (0, 114, 178)).all(axis=1) | (panel == (230, 159, 0)).all(axis=1)  # decodes, prompts
    columns = shown.reshape(44, 296).any(axis=0)
    assert columns.sum() > 0.8 * 296 * min(1.0, sim.clock_s / 20.0) > 10
    env.reset(seed=1)
    env.render()
    assert not env._viewer._runs


def test_schedulers_vectors_and_copies_fill_the_history_as_well():
    env = LLMSchedEnv(qps=2.0, render_mode="rgb_array", action_repeat=3)
    env.reset(seed=0)
    policy = SchedulerPolicy(env, "slai")
    for _ in range(5):
        policy.step()
    twins = copy.deepcopy(env), pickle.loads(pickle.dumps(env))
    for one in (env, *twins):
        one.step(np.zeros(7, np.int64))
    frame = env.render()
    for twin in twins:
        assert np.array_equal(twin.render(), frame) and len(twin._viewer._runs) == len(env._viewer._runs) == 18
    envs = LLMSchedVectorEnv(2, qps=2.0, render_mode="rgb_array")
    envs.reset(seed=0)
    for _ in range(6):
        envs.step(np.zeros((2, 7), np.int64))
    frames = envs.render()
    assert [len(one._viewer._runs) for one in envs.envs] == [6, 6] and not np.array_equal(*frames)


def test_nobody_is_told_of_batches_without_pictures():
    for mode in (None, "ansi", "human"):
        env = LLMSchedEnv(render_mode=mode, action_repeat=2)
        assert not env.core._watchers and not env.core._outside


def test_watching_prints_a_line_every_few_seconds_where_there_is_no_terminal(capsys):
    asked = ["watch", "--policy", "slai", "--suite", "paper", "--qps", "2.4", "--speed", "inf", "--seconds", "60"]
    assert main([*asked, "--every", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" s ")[0].strip() for line in lines] == ["20", "40", "60"]
    assert max(map(len, lines)) <= 80 and all("running KV" in line and "on time" in line for line in lines)
    assert main([*asked[:-2], "--num-requests", "30"]) == 0  # to the end of the run
    assert capsys.readouterr().out.splitlines()[-1].split()[2:7] == ["0", "waiting", "0", "running", "KV"]


def test_watching_says_what_happens_in_the_simulator():
    env, policy = watch._make("slai", "paper", 2.4, None, None, None, None, 0)
    watch._run_to(env, policy, 40.0)
    requests, clock_s = env.core.engine.state.requests[0], float(env.core.engine.state.sims[0].clock_s)
    came = np.count_nonzero(requests["num_output_tokens"] > 0)
    assert 40.0 <= clock_s < 41.0 and len(watch.recent_ttft_s(env)) == came > 20
    watch._run_to(env, policy, 90.0)
    ttft_s = watch.recent_ttft_s(env)
    assert 20 < len(ttft_s) < np.count_nonzero(requests["num_output_tokens"] > 0) and (ttft_s > 0.0).all()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--speed", "0"], "speed"),
        (["--speed", "1e-300"], "speed"),
        (["--suite", "cluster"], "suite"),
        (["--policy", "slai,sarathi"], "policy"),
    ],
)
def test_what_cannot_be_watched_is_one_line(args, words, capsys):
    assert main(["watch", *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"llmsched: {words}: expected" in err
