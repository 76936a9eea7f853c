"""The native vector environment beside gymnasium's SyncVectorEnv of the single one, transition by transition."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from llmsched_gym.config import ConfigError
from llmsched_gym.env import LLMSchedEnv, LLMSchedVectorEnv

MODES = ("next_step", "same_step", "disabled")


def assert_same(ours, theirs, where=""):
    """Equal in structure, dtype, shape and value, nan included."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, tuple):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(theirs, np.ndarray) and theirs.dtype == object:
        assert_same(tuple(ours), tuple(theirs), where)
    elif theirs is None:
        assert ours is None, where
    else:
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, where
        assert np.array_equal(ours, theirs, equal_nan=np.issubdtype(theirs.dtype, np.floating)), (where, ours, theirs)


def step_and_reset(envs, actions, seed):
    """A step; in disabled mode the environments that have ended are reset behind it."""
    out = envs.step(actions)
    ended = out[2] | out[3]
    if envs.unwrapped.autoreset_mode == AutoresetMode.DISABLED and ended.any():
        seeds = None if seed % 2 else [seed + i for i in range(envs.num_envs)]
        return out, ended, envs.reset(seed=seeds, options={"reset_mask": ended.copy()})
    return out, ended, ()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("suite", "fields"),
    [
        ("default", {"horizon_s": 6.0}),
        ("drift", {"horizon_s": 3.0, "observation": "slots", "action": "request"}),
        ("tenants", {"horizon_s": 4.0, "action": "priority", "action_repeat": 3, "episode_metrics": True}),
        ("paper", {"num_requests": 3, "observation": "slots", "allow_refusal": True, "episode_metrics": True}),
        ("burst", {"num_requests": 4, "warmup_s": 1.0, "drain_s": 5.0, "reward": lambda t: -t.duration_s}),
    ],
)
def test_it_equals_gymnasiums_vector_of_single_environments(suite, fields, mode):
    ours = LLMSchedVectorEnv(3, suite, autoreset_mode=mode, **fields)
    make = [lambda: LLMSchedEnv(suite, **fields)] * 3
    theirs = SyncVectorEnv(make, autoreset_mode=AutoresetMode[mode.upper()])
    assert ours.single_action_space == theirs.single_action_space and ours.action_space == theirs.action_space
    assert ours.observation_space == theirs.observation_space
    ours.action_space.seed(3)
    assert_same(ours.reset(seed=40), theirs.reset(seed=40))
    ends = t = 0
    while ends < 5 or t < 150:
        t += 1
        actions = ours.action_space.sample()
        mine = step_and_reset(ours, actions, t)
        assert_same(mine, step_and_reset(theirs, actions, t), f"step {t}")
        ends += int(mine[1].sum())
    assert_same(ours.reset(seed=[7, None, 9]), theirs.reset(seed=[7, None, 9]))
    assert_same(ours.reset(options={"qps": 2.5}), theirs.reset(options={"qps": 2.5}))


@pytest.mark.parametrize("mode", MODES)
def test_a_limit_of_steps_is_gymnasiums_time_limit(mode):
    kwargs = {"max_episode_steps": 5, "horizon_s": 0.4, "episode_metrics": True}
    ours = gym.make_vec(
        "LLMSched-v0", 3, vectorization_mode="vector_entry_point", vector_kwargs={}, autoreset_mode=mode, **kwargs
    )
    vector_kwargs = {"autoreset_mode": AutoresetMode[mode.upper()]}
    theirs = gym.make_vec("LLMSched-v0", 3, vectorization_mode="sync", vector_kwargs=vector_kwargs, **kwargs)
    assert_same(ours.reset(seed=1), theirs.reset(seed=1))
    for t in range(30):
        actions = np.zeros((3, 7), np.int64)
        assert_same(step_and_reset(ours, actions, t), step_and_reset(theirs, actions, t), f"step {t}")
    assert isinstance(ours.unwrapped, LLMSchedVectorEnv)


def test_the_mode_is_declared_and_next_step_unless_said_otherwise():
    envs = gym.make_vec("LLMSched-Drift-v0", num_envs=3, vectorization_mode="vector_entry_point", action_repeat=2)
    assert envs.metadata["autoreset_mode"] is envs.unwrapped.autoreset_mode is AutoresetMode.NEXT_STEP
    for mode in AutoresetMode:
        for spelling in (mode, mode.value, mode.name.lower()):
            envs = LLMSchedVectorEnv(1, autoreset_mode=spelling)
            assert envs.metadata["autoreset_mode"] is envs.autoreset_mode is mode
    assert LLMSchedVectorEnv.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP


def test_next_steps_reset_transition_is_worth_nothing_and_ignores_its_action():
    envs = LLMSchedVectorEnv(2, horizon_s=0.5)
    envs.reset(seed=0)
    actions = np.zeros((2, 7), np.int64)
    while not (over := np.logical_or(*envs.step(actions)[2:4])).any():
        pass
    actions[over] = 99  # of an action that nobody takes
    _, rewards, terminated, truncated, info = envs.step(actions)
    assert not (terminated | truncated)[over].any()
    assert (rewards[over] == 0).all() and (info["duration_s"][over] == 0).all() and (info["discount"][over] == 1).all()
    assert (envs.core.engine.state.sims["clock_s"][over] == 0).all()


def test_ended_environments_are_not_stepped_in_silence():
    env = LLMSchedEnv(horizon_s=0.2)
    with pytest.raises(gym.error.ResetNeeded, match="reset"):
        env.step(np.zeros(7, np.int64))
    env.reset(seed=0)
    while not any(env.step(np.zeros(7, np.int64))[2:4]):
        pass
    with pytest.raises(gym.error.ResetNeeded, match="reset"):
        env.step(np.zeros(7, np.int64))
    for mode in MODES:
        envs = LLMSchedVectorEnv(2, autoreset_mode=mode, horizon_s=0.2)
        with pytest.raises(gym.error.ResetNeeded, match="reset"):
            envs.step(np.zeros((2, 7), np.int64))
    envs.reset(seed=0)
    while not np.logical_or(*envs.step(np.zeros((2, 7), np.int64))[2:4]).any():
        pass
    with pytest.raises(gym.error.ResetNeeded, match=r"\[[01]"):
        envs.step(np.zeros((2, 7), np.int64))


def test_a_rate_given_at_reset_is_that_episodes():
    env = LLMSchedEnv(horizon_s=30.0)
    assert env.reset(seed=3, options={"qps": 4.5})[1]["qps"] == 4.5
    many = int(env.core.engine.state.worlds[0].num_requests)
    assert env.reset(seed=3)[1]["qps"] != 4.5
    assert many > int(env.core.engine.state.worlds[0].num_requests)
    fixed = LLMSchedEnv(horizon_s=30.0, qps=4.5)
    fixed.reset(seed=3)
    env.reset(seed=3, options={"qps": 4.5})
    for _ in range(100):
        assert np.array_equal(env.step(np.zeros(7, np.int64))[0], fixed.step(np.zeros(7, np.int64))[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"speed": 1}, "options: expected qps, got 'speed'"),
        ({"qps": float("nan")}, "qps: expected a number"),
        ({"qps": float("inf")}, "qps: expected a number"),
        ({"qps": -1}, "qps: expected a number"),
        ({"qps": "fast"}, "qps: expected a number"),
        ([("qps", 1.0)], "options: expected a dict, got list"),
        ({"reset_mask": np.ones(1, bool)}, "options: expected qps, got 'reset_mask'"),
    ],
)
def test_other_options_of_reset_are_errors(options, words):
    env = LLMSchedEnv()
    env.reset(seed=1)
    before = env.core.engine.state.requests.tobytes()
    with pytest.raises(ConfigError, match=words):
        env.reset(options=options)
    assert env.core.engine.state.requests.tobytes() == before


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"seed": [1, 2]}, "seed: expected 3 seeds, got 2"),
        ({"seed": [1, 2, -3]}, "seed: expected a whole number"),
        ({"seed": [1, 2, 0.5]}, "seed: expected a whole number"),
        ({"seed": 2**63 - 2}, "seed: expected a whole number"),
        ({"seed": True}, "seed: expected a whole number"),
        ({"seed": "7"}, "seed: expected a whole number"),
        ({"options": {"reset_mask": np.ones(2, bool)}}, "reset_mask: expected bool of shape"),
        ({"options": {"reset_mask": np.ones(3, int)}}, "reset_mask: expected bool of shape"),
        ({"options": {"reset_mask": np.zeros(3, bool)}}, "reset_mask: .*got no True"),
        ({"options": {"mask": np.zeros(3, bool)}}, "options: expected qps or reset_mask, got 'mask'"),
    ],
)
def test_a_vector_reset_checks_its_arguments_before_it_resets_anything(kwargs, words):
    envs = LLMSchedVectorEnv(3)
    envs.reset(seed=5)
    envs.step(np.zeros((3, 7), np.int64))
    before = {name: array.tobytes() for name, array in envs.core.engine.state._asdict().items()}
    with pytest.raises(ConfigError, match=words):
        envs.reset(**kwargs)
    for name, array in envs.core.engine.state._asdict().items():
        assert before[name] == array.tobytes(), name


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"num_envs": 0}, "num_envs"),
        ({"num_envs": 2.0}, "num_envs"),
        ({"num_envs": True}, "num_envs"),
        ({"autoreset_mode": "later"}, "autoreset_mode"),
        ({"autoreset_mode": None}, "autoreset_mode"),
        ({"max_episode_steps": 0}, "max_episode_steps"),
        ({"render_mode": "human"}, "render_mode"),
    ],
)
def test_bad_arguments_of_the_vector_environment(kwargs, name):
    with pytest.raises(ConfigError, match=f"^{name}: expected"):
        LLMSchedVectorEnv(**kwargs)


def test_call_and_attributes_are_gymnasiums():
    fields = {"horizon_s": 5.0, "episode_metrics": True, "render_mode": "ansi"}
    ours = LLMSchedVectorEnv(2, **fields)
    theirs = SyncVectorEnv([lambda: LLMSchedEnv(**fields)] * 2)
    for envs in (ours, theirs):
        envs.reset(seed=11)
        for _ in range(30):
            envs.step(np.zeros((2, 7), np.int64))
    for name in ("config", "feature_names", "render_mode", "np_random_seed"):
        assert ours.get_attr(name) == theirs.get_attr(name)
    for name in ("reward_terms", "episode_metrics"):
        assert ours.call(name) == theirs.call(name)
    assert ours.np_random_seed == theirs.np_random_seed == (11, 12)
    assert ours.render() == theirs.render()
    assert_same(ours.call("action_masks"), theirs.call("action_masks"))
    assert {k: v.tolist() for k, v in ours.reward_terms().items()} == {
        k: [one[k] for one in theirs.call("reward_terms")] for k in ours.reward_terms()
    }
    ours.set_attr("note", ["a", "b"])
    assert ours.get_attr("note") == ("a", "b")
    with pytest.raises(AttributeError):
        ours.set_attr("config", None)  # it would change nothing
    with pytest.raises(ValueError, match="expected 2 values, got 3"):
        ours.set_attr("note", [1, 2, 3])
    with pytest.raises(AttributeError):
        ours.call("step", np.zeros(7, np.int64))
    ours.close()
