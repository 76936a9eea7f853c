"""Frames of every mode, before the first step and after it, for every kind of action."""

import numpy as np
import pytest

from llmsched_gym.env import LLMSchedEnv


@pytest.mark.parametrize("action", ["knobs", "priority", "request"])
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
            assert "KV" in frames[1] and frames[0] != frames[1]


def test_the_text_frame_counts_what_the_engine_counts():
    env = LLMSchedEnv("paper", qps=2.0, num_requests=30, render_mode="ansi")
    env.reset(seed=1)
    for _ in range(400):
        env.step(np.zeros(7, np.int64))
    sim = env.core.engine.state.sims[0]
    frame = env.render()
    assert f"arrived {sim.num_arrived}" in frame
    assert f"finished {sim.num_finished}" in frame
    assert f"waiting {sim.num_waiting} prompts" in frame
