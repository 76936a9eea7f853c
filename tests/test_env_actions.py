"""Actions outside their space: refused in one line, without a trace in the state, and never an index."""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llmsched_gym import config
from llmsched_gym.engine.state import lane_of
from llmsched_gym.env import InvalidAction, LLMSchedEnv, LLMSchedVectorEnv
from llmsched_gym.env.actions import ACTIONS, check_range
from llmsched_gym.env.actions.knobs import KNOBS
from llmsched_gym.env.observations import OBSERVATIONS

KINDS = tuple(ACTIONS)
NAN = float("nan")
HOSTILE = [
    ("knobs", [512, 0, 0, 0, 0, 0, 0], "action: token_budget: expected the index of a value, 0 to 7, got 512"),
    ("knobs", [0, 0, 0, 0, -1, 0, 0], "action: order: expected the index of a value, 0 to 5, got -1"),
    ("knobs", np.array([0, 2**63] + [0] * 5, np.uint64), "cap: expected the index of a value, 0 to 6, got 92233720"),
    ("knobs", 0, "action: expected integers of shape (7,), got int64 of shape ()"),
    ("knobs", np.full(7, 0.5), "action: expected integers of shape (7,), got float64 of shape (7,)"),
    ("knobs", np.zeros(7, bool), "action: expected integers of shape (7,), got bool of shape (7,)"),
    ("knobs", [0] * 8, "action: expected integers of shape (7,), got int64 of shape (8,)"),
    ("knobs", [[0], [0, 1]], "action: expected integers of shape (7,), got list that is no array"),
    ("knobs", None, "action: expected integers of shape (7,), got object of shape ()"),
    ("knobs", [10**30] * 7, "action: expected integers of shape (7,), got object of shape (7,)"),
    ("preset", 32, "action: expected a preset, 0 to 31, got 32"),
    ("preset", -1, "action: expected a preset, 0 to 31, got -1"),
    ("preset", [3], "action: expected an integer, got int64 of shape (1,)"),
    ("preset", 0.5, "action: expected an integer, got float64 of shape ()"),
    ("priority", np.full(64, NAN, np.float32), "action: slot 0: expected a score from -1 to 1, got nan"),
    ("priority", [0.0] * 63 + [1.5], "action: slot 63: expected a score from -1 to 1, got 1.5"),
    ("priority", np.full(64, 1e300), "action: slot 0: expected a score from -1 to 1, got 1e+300"),
    ("priority", np.zeros((64, 1)), "action: expected numbers of shape (64,), got float64 of shape (64, 1)"),
    ("priority", np.zeros(64, complex), "action: expected numbers of shape (64,), got complex128 of shape (64,)"),
    ("request", 65, "action: expected a slot, 0 to 63, or 64 to close the batch, got 65"),
    ("request", 999, "action: expected a slot, 0 to 63, or 64 to close the batch, got 999"),
    ("request", -1, "action: expected a slot, 0 to 63, or 64 to close the batch, got -1"),
    ("request", 1.0, "action: expected an integer, got float64 of shape ()"),
    ("request", [3], "action: expected an integer, got int64 of shape (1,)"),
    ("request", True, "action: expected an integer, got bool of shape ()"),
]


def state_of(env):
    """All that a step can change, input arrays left out."""
    core = env.unwrapped.core
    arrays = {**core.engine.state._asdict(), "outcomes": core.arrays.outcomes, "features": core.arrays.features}
    return {name: array.tobytes() for name, array in arrays.items()}


def warm(env, steps=20):
    """An environment with running requests."""
    env.reset(seed=3)
    env.action_space.seed(0)
    for _ in range(steps):
        env.step(env.action_space.sample())
    return env


@pytest.mark.parametrize(("kind", "action", "words"), HOSTILE)
def test_hostile_actions_are_refused_in_one_line_and_change_nothing(kind, action, words):
    env = warm(gym.make("LLMSched-v0", action=kind, max_backlog=20))
    before = state_of(env)
    with pytest.raises(InvalidAction) as error:
        env.step(action)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert isinstance(error.value, ValueError) and isinstance(error.value, gym.error.InvalidAction)
    assert state_of(env) == before
    env.step(env.action_space.sample())


@pytest.mark.parametrize("fields", [{}, {"reward": lambda transition: 0.0}], ids=["compiled", "python"])
@pytest.mark.parametrize(("kind", "action", "words"), HOSTILE)
def test_a_vector_names_the_environment_and_steps_none(kind, action, words, fields):
    envs = warm(LLMSchedVectorEnv(3, action=kind, **fields))
    before = state_of(envs)
    with pytest.raises(InvalidAction) as error:
        envs.step([action] * 3)
    message = str(error.value)
    assert "\n" not in message
    if "of shape" not in message and "no array" not in message:
        assert words.removeprefix("action: ") in message and message.startswith("action of environment 0: ")
    assert state_of(envs) == before


def test_stable_baselines_face_refuses_them_too():
    sb3 = pytest.importorskip("llmsched_gym.env.sb3", reason="stable-baselines3 is not installed")
    env = sb3.LLMSchedVecEnv(2)
    env.reset()
    with pytest.raises(InvalidAction, match="action of environment 1: order: expected the index of a value, 0 to 5"):
        env.step(np.array([[0] * 7, [0, 0, 0, 0, 6, 0, 0]]))
    with pytest.raises(InvalidAction, match=r"expected integers of shape \(2, 7\), got float32"):
        env.step(np.zeros((2, 7), np.float32))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int64, np.uint64])
def test_integers_of_any_width_and_lists_are_actions(dtype):
    wanted = [5, 6, 8, 4, 5, 2, 8]
    single, vector = LLMSchedEnv(max_backlog=9), LLMSchedVectorEnv(2, max_backlog=9)
    single.reset(seed=1)
    vector.reset(seed=1)
    seen = single.step(wanted)[0]
    assert np.array_equal(vector.step(np.array([wanted, wanted], dtype))[0][0], seen)
    assert single.core.actions.tolist() == [wanted]
    assert np.array_equal(single.step(np.array(wanted, dtype))[0], vector.step([wanted, tuple(wanted)])[0][0])
    request = LLMSchedEnv(action="request")
    request.reset(seed=1)
    for action in (64, dtype(64), np.array(64, dtype)):
        request.step(action)


def numbers_of(shape):
    """Arrays of a shape: every dtype, every value."""
    dtypes = st.one_of(hnp.integer_dtypes(), hnp.unsigned_integer_dtypes(), hnp.floating_dtypes(), hnp.boolean_dtypes())
    shapes = st.one_of(st.just(shape), hnp.array_shapes(min_dims=0, max_dims=3, max_side=8))
    return dtypes.flatmap(lambda dtype: shapes.flatmap(lambda s: hnp.arrays(dtype, s)))


@pytest.mark.parametrize("kind", KINDS)
def test_any_array_is_either_an_action_of_the_space_or_refused(kind):
    env, envs = warm(LLMSchedEnv(action=kind)), warm(LLMSchedVectorEnv(2, action=kind, horizon_s=20.0))

    def drive(env, action, space):
        before = state_of(env)
        try:
            env.step(action)
        except InvalidAction:
            inside = action.shape == space.shape and action.dtype.kind in ("iu" if kind != "priority" else "fiu")
            with np.errstate(over="ignore"):
                assert not (inside and space.contains(action.astype(space.dtype)))
            assert state_of(env) == before
        else:
            with np.errstate(over="ignore"):
                assert action.dtype.kind in "fiu" and space.contains(action.astype(space.dtype))
        if getattr(env, "_is_over", None) is True:
            env.reset(seed=0)

    @settings(max_examples=150)
    @given(st.data())
    def check(data):
        drive(env, data.draw(numbers_of(env.action_space.shape)), env.action_space)
        drive(envs, data.draw(numbers_of(envs.action_space.shape)), envs.action_space)

    check()


def test_kernels_clip_what_gets_past_python():
    """Whatever is written into the arrays between the check and the kernel, no index leaves its array."""
    for index in (10**9, -(10**9), np.iinfo(np.int64).max, np.iinfo(np.int64).min):
        env = warm(LLMSchedEnv(action="knobs"))
        env.core.actions[:] = index
        env.core.decide(0)
        knobs = env.core.engine.state.knobs[0]
        assert knobs["token_budget"] == KNOBS[0].values[-1 if index > 0 else 0]
        env = warm(LLMSchedEnv(action="request"))
        env.core.actions[:] = index
        assert env.core.decide(0)


def test_the_tables_have_what_the_configuration_names():
    assert list(ACTIONS) == list(config.ACTIONS) and all(action.name == name for name, action in ACTIONS.items())
    assert tuple(OBSERVATIONS) == config.OBSERVATIONS


@pytest.mark.parametrize("kind", KINDS)
def test_putting_an_action_touches_what_it_says_it_does(kind):
    env = warm(LLMSchedEnv(action=kind))
    core, action = env.core, ACTIONS[kind]
    arrays = {name: array for name, array in core.engine.state._asdict().items() if array.size}
    written = set()
    for _ in range(20):
        core.actions[:] = env.action_space.sample()
        core.engine.state.knobs[0]["token_budget"] = 7  # no setting of an action's
        before = {name: array.tobytes() for name, array in arrays.items()}
        action.put(lane_of(core.engine.state, 0), core.arrays, 0)
        written |= {name for name, array in arrays.items() if array.tobytes() != before[name]}
    assert written == set(action.touches)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_and_the_space_agree_on_what_is_legal(kind):
    """The compiled check, the one that words the error, and the space itself."""
    env = LLMSchedEnv(action=kind, allow_refusal=True)
    core, action, seen = env.core, ACTIONS[kind], set()
    rng = np.random.default_rng(0)
    for _ in range(300):
        value = env.action_space.sample()
        if rng.random() < 0.5:
            value = np.array(value)
            value[tuple(rng.integers(0, n) for n in value.shape)] = rng.choice([-2, -1, 0, 1, 2, 5, 8, 63, 64, 65])
        core.actions[:] = value
        inside = np.asarray(value, env.action_space.dtype) in env.action_space
        assert bool(action.legal(core.arrays, 0)) == inside
        if inside:
            check_range(action, env.config, core.actions)
        else:
            with pytest.raises(InvalidAction):
                check_range(action, env.config, core.actions)
        seen.add(inside)
    assert seen == {True, False}


@pytest.mark.parametrize("kind", KINDS)
def test_an_action_has_one_mask_entry_a_choice(kind):
    env = warm(LLMSchedEnv(action=kind))
    if not ACTIONS[kind].has_masks:
        with pytest.raises(AttributeError, match="no mask, every score is legal"):
            env.action_masks()
        return
    assert env.action_masks().shape == (gym.spaces.flatdim(env.action_space),) and env.action_masks().any()


def test_an_index_of_an_environment_is_checked():
    env = warm(LLMSchedEnv())
    engine = env.core.engine
    for call in (engine.view, engine.is_over, engine.execute, lambda i: engine.reset(env.core.tables[0], i)):
        for index in (1, -1, 10**12, 0.0, NAN, None):
            with pytest.raises(IndexError, match="env: expected 0 to 0"):
                call(index)
    for index in (1, -1):
        with pytest.raises(IndexError, match="env: expected 0 to 0"):
            engine.decide(None, index)


def test_a_view_is_asked_about_requests_and_tokens_that_exist():
    view = warm(LLMSchedEnv(max_backlog=20)).core.engine.view(0)
    r = int(view.running.index[0])
    assert view.predict_s({r: 1}) > 0.0
    for tokens in (-1, -(10**9), 0.5, NAN, float("inf"), 10**9, 10**400, None):
        with pytest.raises(ValueError, match=r"^predict_s: expected"):
            view.predict_s({r: tokens})
    for request in (-1, 10**9, NAN, 0.0, None):
        with pytest.raises(IndexError, match="has not arrived"):
            view.can_make_ttft(request)
        with pytest.raises(IndexError, match="has not arrived"):
            view.predict_s({request: 1})


def test_more_steps_an_action_than_a_block_of_noise_give_the_same_trajectory():
    fields = {"qps": 0.2, "horizon_s": 1200.0, "max_backlog": 0}
    long, short = LLMSchedEnv(action_repeat=5000, **fields), LLMSchedEnv(action_repeat=10, **fields)
    rewards = []
    for env in (long, short):
        env.reset(seed=2)
        total, over = 0.0, False
        while not over:
            _, reward, terminated, truncated, _ = env.step(np.zeros(7, np.int64))
            total, over = total + reward, terminated or truncated
        rewards.append(total)
    sims = [env.core.engine.state.sims[0] for env in (long, short)]
    assert sims[0].num_batches > 2 * 4096
    assert sims[0].clock_s == sims[1].clock_s and sims[0].num_batches == sims[1].num_batches
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-9)


BOUNDS = Path(__file__).with_name("bounds.py")


@pytest.mark.slow
def test_nothing_indexes_outside_an_array():
    """The same hostile calls in a process in which every index is checked."""
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    run = subprocess.run([sys.executable, str(BOUNDS)], env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "steps" in run.stdout
