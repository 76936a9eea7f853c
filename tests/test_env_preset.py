"""Presets are the schedulers that they are called after, batch by batch."""

import numpy as np
import pytest

from llmsched_gym.config import ConfigError, env_config
from llmsched_gym.env import LLMSchedEnv, LLMSchedVectorEnv
from llmsched_gym.env.actions.preset import NUM_PRESETS, PRESETS, preset_action
from llmsched_gym.env.policy import PolicyScheduler, SchedulerPolicy
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.registry import make_scheduler
from llmsched_gym.scheduler import settings_of


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_scheduler_of_its_name(name):
    index = list(PRESETS).index(name)
    scheduler = make_scheduler(name)
    assert preset_action(settings_of(scheduler.knobs)) == index
    env = LLMSchedEnv(action="preset", qps=2.0)
    env.reset(seed=1)
    env.step(index)
    ours, theirs = settings_of(env.core.engine.state.knobs[0]), settings_of(scheduler.knobs)
    np.testing.assert_equal(ours, theirs)


def test_all_are_different_schedulers():
    assert NUM_PRESETS == 32 == len({str(settings_of(make_scheduler(name).knobs)) for name in PRESETS})


@pytest.mark.parametrize("name", ["sarathi", "slai", "tuned-constant"])
def test_held_throughout_it_makes_the_run_of_that_scheduler(name):
    index = list(PRESETS).index(name)
    world = env_config("default", action="preset", action_repeat=8, qps=2.0, num_requests=60)
    agent, scheduler = simulate(world, PolicyScheduler(lambda seen: index, world), 3), simulate(world, name, 3)
    assert agent.sim.clock_s == scheduler.sim.clock_s
    assert agent.sim.num_batches == scheduler.sim.num_batches
    np.testing.assert_array_equal(agent.requests["last_token_s"], scheduler.requests["last_token_s"])


def test_a_scheduler_as_an_agent_is_its_preset():
    env = LLMSchedEnv(action="preset", qps=2.0)
    env.reset(seed=1)
    policy = SchedulerPolicy(env, "slai[hold=always]")
    for _ in range(30):
        action = policy.action()
        assert action.shape == () and action == list(PRESETS).index("slai[hold=always]")
        assert action in env.action_space
        env.step(action)
    with pytest.raises(ConfigError, match="no preset has its settings"):
        SchedulerPolicy(env, "slai[budget=300]").action()


def test_a_vector_of_them_equals_single_ones():
    vector = LLMSchedVectorEnv(3, action="preset", action_repeat=4, qps=2.0)
    singles = [LLMSchedEnv(action="preset", action_repeat=4, qps=2.0) for _ in range(3)]
    vector.reset(seed=7)
    for i, env in enumerate(singles):
        env.reset(seed=7 + i)
    vector.action_space.seed(0)
    for _ in range(100):
        actions = vector.action_space.sample()
        observations, rewards, *_ = vector.step(actions)
        for i, env in enumerate(singles):
            observation, reward, *_ = env.step(actions[i])
            assert np.array_equal(observation, observations[i]) and reward == rewards[i]


def test_the_longest_cached_prefix_first_with_caching():
    env = LLMSchedEnv("chat", action="preset")
    env.reset(seed=0)
    env.step(list(PRESETS).index("sarathi[order=lpm]"))
    assert make_scheduler("sarathi[order=lpm]").knobs["order"] == env.core.engine.state.knobs[0]["order"]
