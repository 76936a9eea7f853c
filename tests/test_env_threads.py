"""Threads share the environments of a step; what happens does not depend on how many there are."""

import threading

import numpy as np
import pytest

from llmsched_gym.config import ConfigError
from llmsched_gym.env import LLMSchedVectorEnv

NUM_ENVS, STEPS = 7, 40
SPACES = {
    "knobs": {"action": "knobs", "episode_metrics": True},
    "priority": {"action": "priority", "observation": "slots"},
    "request": {"action": "request", "observation": "slots"},
}


def trajectory(num_threads, **fields):
    """Everything that is returned in some steps of short, noisy episodes, as one list of arrays."""
    envs = LLMSchedVectorEnv(NUM_ENVS, num_threads=num_threads, horizon_s=2.0, jitter=0.2, **fields)
    envs.action_space.seed(3)
    found = [envs.reset(seed=5)]
    found += [envs.step(envs.action_space.sample()) for _ in range(STEPS)]
    envs.close()
    arrays = []
    for obs, *rest, info in found:
        arrays += [*(obs.values() if isinstance(obs, dict) else [obs]), *rest, *(info[name] for name in sorted(info))]
    return arrays


@pytest.mark.parametrize("space", SPACES)
def test_the_same_whatever_the_number(space):
    alone = trajectory(1, **SPACES[space])
    assert any(a.any() for a in alone[-20:])
    for num_threads in (2, 3, 100):
        shared = trajectory(num_threads, **SPACES[space])
        assert len(shared) == len(alone)
        for a, b in zip(alone, shared, strict=True):
            np.testing.assert_array_equal(a, b)


def test_an_action_outside_the_space_leaves_every_thread_where_it_was():
    envs = LLMSchedVectorEnv(4, num_threads=2)
    envs.reset(seed=0)
    before = envs.core.engine.state.sims.tolist()
    actions = np.zeros((4, 7), np.int64)
    actions[3, 0] = 99
    with pytest.raises(ValueError, match="99"):
        envs.step(actions)
    assert envs.core.engine.state.sims.tolist() == before
    envs.close()


def test_threads_end_with_the_environment():
    before = threading.active_count()
    envs = LLMSchedVectorEnv(4, num_threads=3)
    envs.reset(seed=0)
    envs.step(np.zeros((4, 7), np.int64))
    assert before < threading.active_count() <= before + 2
    envs.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, None])
def test_a_bad_number_is_one_clear_line(value):
    with pytest.raises(ConfigError, match=r"^num_threads: expected a whole number >= 1, got [^\n]*$"):
        LLMSchedVectorEnv(2, num_threads=value)
