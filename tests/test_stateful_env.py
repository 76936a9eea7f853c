"""Environments under any order of calls: spaces and rules hold, bad actions change nothing, moments come back.

Each action with an observation of its own; a vector environment with resets of some of its slots beside single ones.
"""

import math
import pickle

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from stateful import one_line, sized
from test_env_states import same

from llmsched_gym.config import ConfigError
from llmsched_gym.engine import check
from llmsched_gym.env import LLMSchedEnv, LLMSchedVectorEnv
from llmsched_gym.env.actions import InvalidAction

SMALL = {"horizon_s": 1.5, "patience_s": 0.8, "num_kv_blocks": 700, "max_num_seqs": 8, "qps": 6.0, "max_backlog": 12}
WORLDS = {
    "knobs": {"observation": "features", "allow_refusal": True, "action_repeat": 2},
    "preset": {"observation": "features", "suite": "chat", "episode_metrics": True, "num_kv_blocks": 1500},
    "request": {"observation": "slots", "suite": "tenants"},
    "priority": {"observation": "slots", "suite": "drift", "async_lag": True},
}
ODD = [None, "1", 1.5, math.nan, -1, 10**6, True, [], [0.5], [-1] * 3, {}, 2**70, [[0]], np.float32(0.5), np.int8(-1)]
SEEDS = st.integers(0, 30)


def make(action, kind=LLMSchedEnv, *args, **more):
    fields = SMALL | {"suite": "default", **WORLDS[action]} | more
    return kind(*args, action=action, **fields)


def legal(env, rng):
    """A random action; of single choices one that the mask allows."""
    if isinstance(env.action_space, gym.spaces.Discrete):
        return int(rng.choice(np.flatnonzero(env.action_masks())))
    env.action_space.seed(int(rng.integers(2**31)))
    return env.action_space.sample()


def is_open(core, index=0):
    """Whether request actions have begun a batch, whose requests are marked."""
    return core.config.action == "request" and core.engine.state.batches[index].num_items > 0


class EnvMachine(RuleBasedStateMachine):
    action = ""
    moments = Bundle("moments")

    @initialize()
    def begin(self):
        self.env = make(self.action, render_mode="ansi")
        self.is_over, self.clock_s = True, -math.inf

    def told(self, observation, info):
        assert self.env.observation_space.contains(observation)
        assert not any(isinstance(value, dict) for value in info.values())
        if not self.is_over:
            assert info["duration_s"] >= 0.0 and 0.0 < info["discount"] <= 1.0

    def stepped(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.told(observation, info)
        assert math.isfinite(reward) and not terminated  # episodes go on to their horizon
        self.is_over = terminated or truncated
        return observation, reward, terminated, truncated, info

    @rule(seed=st.one_of(st.none(), SEEDS), qps=st.one_of(st.none(), st.floats(0.5, 9.0)))
    def reset(self, seed, qps):
        options = None if qps is None else {"qps": qps}
        observation, info = self.env.reset(seed=seed, options=options)
        self.is_over, self.clock_s = False, -math.inf
        self.told(observation, info)
        if seed is not None:
            assert info["seed"] == seed
            assert same(self.env.reset(seed=seed, options=options), (observation, info))

    @rule(options=st.sampled_from([{"qps": -1.0}, {"qps": math.nan}, {"qps": "x"}, {"rate": 1.0}, 3, [1]]))
    def reset_wrongly(self, options):
        before = self.moment()
        with one_line(ConfigError):
            self.env.reset(options=options)
        with one_line(ConfigError):
            self.env.reset(seed=-1)
        self.unchanged(before)

    @precondition(lambda self: not self.is_over)
    @rule(seed=st.integers(0, 999), count=st.integers(1, 12))
    def step(self, seed, count):
        rng = np.random.default_rng(seed)
        for _ in range(count):
            if not self.is_over:
                self.stepped(legal(self.env, rng))

    @precondition(lambda self: not self.is_over)
    @rule(action=st.sampled_from(ODD), at=st.integers(0, 70))
    def step_wrongly(self, action, at):
        space = self.env.action_space
        if isinstance(action, float | int) and not isinstance(space, gym.spaces.Discrete):
            action_of = space.sample()  # one entry of it
            if not -(2**31) <= action < 2**31 if not isinstance(action, float) else False:
                return
            action_of = action_of.astype(float if isinstance(action, float) else action_of.dtype)
            action_of[at % len(action_of)] = action
            action = action_of
        if isinstance(space, gym.spaces.Discrete) and action is True:
            return  # an integer to Python
        before = self.moment()
        try:
            self.stepped(action)
        except InvalidAction as error:
            assert str(error) and "\n" not in str(error)
            self.unchanged(before)
        else:
            assert space.contains(np.asarray(action, space.dtype))

    @precondition(lambda self: self.is_over)
    @rule()
    def step_after_the_end(self):
        before = self.moment()
        with one_line(gym.error.ResetNeeded):
            self.env.step(self.env.action_space.sample())
        self.unchanged(before)

    def moment(self):
        return None if self.env.core.tables[0] is None else self.env.get_state()

    def unchanged(self, before):
        now = self.moment()
        assert (now is None) == (before is None)
        assert now is None or (now.moment.saved, now.moment.arrays) == (before.moment.saved, before.moment.arrays)
        assert now is None or now.generator == before.generator

    @rule()
    def render(self):
        before = self.moment()
        if before is not None:
            assert isinstance(self.env.render(), str)
        self.unchanged(before)

    @rule()
    def close(self):
        """The picture is closed; the environment goes on."""
        self.env.close()

    @rule(target=moments, seed=st.integers(0, 99))
    def keep(self, seed):
        if self.moment() is None:
            self.reset(0, None)
        state, is_over = self.env.get_state(), self.is_over
        future = self.future(seed)
        self.go_back((state, is_over, seed, None))
        return state, is_over, seed, future

    def future(self, seed):
        rng, told = np.random.default_rng(seed), []
        for _ in range(8):
            told.append(self.env.reset() if self.is_over else self.stepped(legal(self.env, rng)))
            self.is_over = self.is_over and len(told[-1]) == 5
        return told

    @rule(moment=moments)
    def go_back(self, moment):
        state, is_over, seed, future = moment
        for _ in range(1 if future is None else 2):
            observation, info = self.env.set_state(state)
            self.is_over, self.clock_s = is_over, -math.inf
            self.told(observation, info)
            assert info["seed"] == state.moment.seed
            self.unchanged(state)
            if future is not None:
                assert same(self.future(seed), future)
                future = None

    @rule()
    def copy(self):
        before = self.moment()
        self.env = pickle.loads(pickle.dumps(self.env))
        self.unchanged(before)

    @invariant()
    def rules_hold(self):
        if hasattr(self, "env") and self.env.core.tables[0] is not None and not is_open(self.env.core):
            self.clock_s = check(self.env.core.engine.state, 0, self.clock_s)


class VectorMachine(RuleBasedStateMachine):
    """Each slot equals a single environment that is given the same actions and seeds."""

    action = "knobs"

    @initialize(
        mode=st.sampled_from(["next_step", "same_step", "disabled"]), seed=SEEDS, limit=st.sampled_from([9, None])
    )
    def begin(self, mode, seed, limit):
        self.mode, self.limit = mode, limit
        self.envs = make(self.action, LLMSchedVectorEnv, 3, autoreset_mode=mode, max_episode_steps=limit)
        self.single = [make(self.action) for _ in range(3)]
        self.over, self.steps = np.zeros(3, bool), np.zeros(3, int)
        told, _ = self.envs.reset(seed=seed)
        self.agree(told, [env.reset(seed=seed + i)[0] for i, env in enumerate(self.single)])

    def agree(self, told, expected):
        assert self.envs.observation_space.contains(told)
        for i, one in enumerate(expected):
            mine = {name: part[i] for name, part in told.items()} if isinstance(told, dict) else told[i]
            assert one is None or same(mine, one), i

    @rule(mask=st.lists(st.booleans(), min_size=3, max_size=3), seed=st.one_of(st.none(), SEEDS))
    def reset_some(self, mask, seed):
        options = {"reset_mask": np.array(mask)}
        if not any(mask):
            with one_line(ConfigError):
                self.envs.reset(options=options)
            return
        told, _ = self.envs.reset(seed=seed, options=options)
        found = [None] * 3
        for i in np.flatnonzero(mask):
            found[i], _ = self.single[i].reset(seed=None if seed is None else seed + int(i))
            self.over[i], self.steps[i] = False, 0
        self.agree(told, found)

    @precondition(lambda self: not self.over.any() or self.mode == "next_step")
    @rule(seed=st.integers(0, 999), count=st.integers(1, 6))
    def step(self, seed, count):
        rng = np.random.default_rng(seed)
        for _ in range(count):
            if self.over.any() and self.mode != "next_step":
                return
            actions = [legal(env, rng) for env in self.single]
            told, rewards, terminated, truncated, info = self.envs.step(np.array(actions))
            expected = []
            for i, env in enumerate(self.single):
                if self.over[i]:
                    self.over[i], self.steps[i] = False, 0
                    expected.append(env.reset()[0])
                    assert (rewards[i], terminated[i], truncated[i]) == (0.0, False, False)
                    continue
                one, reward, ended, cut, _ = env.step(actions[i])
                self.steps[i] += 1
                cut = cut or self.steps[i] == self.limit
                assert (rewards[i], terminated[i], truncated[i]) == (reward, ended, cut)
                self.over[i] = ended or cut
                if self.over[i] and self.mode == "same_step":
                    assert same(info["final_obs"][i], one)
                    one, self.over[i], self.steps[i] = env.reset()[0], False, 0
                expected.append(one)
            self.agree(told, expected)

    @precondition(lambda self: self.over.any() and self.mode == "disabled")
    @rule()
    def step_after_the_end(self):
        before = [self.envs.get_state(i).moment.saved for i in range(3)]
        with one_line(gym.error.ResetNeeded):
            self.envs.step(self.envs.action_space.sample())
        assert before == [self.envs.get_state(i).moment.saved for i in range(3)]

    @rule(at=st.integers(0, 2), value=st.sampled_from([-1, 99]))
    def step_wrongly(self, at, value):
        if self.over.any():
            return
        actions = np.array([legal(env, np.random.default_rng(0)) for env in self.single])
        actions[at].flat[0] = value
        if actions.ndim == 1:
            actions[at] = value
        before = [self.envs.get_state(i).moment.saved for i in range(3)]
        with one_line(InvalidAction):
            self.envs.step(actions)
        assert before == [self.envs.get_state(i).moment.saved for i in range(3)]

    @rule(source=st.integers(0, 2), slot=st.integers(0, 2))
    def move(self, source, slot):
        """A slot goes on from where another one is."""
        self.envs.set_state(slot, self.envs.get_state(source))
        self.single[slot].set_state(self.single[source].get_state())
        self.over[slot], self.steps[slot] = self.over[source], self.steps[source]

    @invariant()
    def rules_hold(self):
        for i in range(3 if hasattr(self, "envs") else 0):
            if not is_open(self.envs.core, i):
                check(self.envs.core.engine.state, i)


@pytest.mark.parametrize("action", sorted(WORLDS))
def test_environments(action):
    run_state_machine_as_test(type("Machine", (EnvMachine,), {"action": action}), settings=sized(20, 20))


@pytest.mark.parametrize("action", ["knobs", "request"])
def test_vector_environments(action):
    run_state_machine_as_test(type("Machine", (VectorMachine,), {"action": action}), settings=sized(20, 20))
