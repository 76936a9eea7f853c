"""Rewards and observations over all environments at once: what they tell is what views and transitions tell of one."""

import gymnasium as gym
import numpy as np
import pytest

from llmsched_gym.config import ConfigError, env_config, scenario
from llmsched_gym.engine.view import VISIBLE
from llmsched_gym.env import LLMSchedEnv, LLMSchedVectorEnv, batched
from llmsched_gym.env.policy import PolicyScheduler
from llmsched_gym.env.route import LLMRouteEnv
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.scheduler import make_scheduler

WORLD = {"qps": 2.0, "num_requests": 8, "warmup_s": 0.0, "drain_s": 30.0, "allow_refusal": True}
FIGURES = ("now_s", "num_running", "num_waiting", "free_blocks", "kv_cache_usage", "mean_batch_s", "last_batch_s")


def of_view(view):
    """Numbers that differ wherever a list, a field or a figure does."""
    lists = [
        sum(float(np.dot(rows[name], 1.0 + np.arange(len(rows)))) for name in ("index", "arrival_s", "num_blocks"))
        for rows in (view.running, view.waiting)
    ]
    return [view.now_s, len(view.running), len(view.waiting), view.free_blocks, view.kv_cache_usage, *lists]


def of_moments(moments):
    lists = []
    for rows in (moments.running, moments.waiting):
        place = np.concatenate([1.0 + np.arange(n) for n in rows.count()])
        lists.append(sum(rows.sum(rows[name] * place) for name in ("index", "arrival_s", "num_blocks")))
    figures = (moments.now_s, moments.num_running, moments.num_waiting, moments.free_blocks, moments.kv_cache_usage)
    return np.stack([*figures, *lists], axis=1)


class Alone:
    space = gym.spaces.Box(0.0, np.inf, (7,), np.float64)

    def observe(self, view):
        return of_view(view)


class Together:
    space = Alone.space

    @batched
    def observe(self, moments):
        return of_moments(moments)


def pay_alone(transition):
    late = float(np.sum(transition.resolved["lateness_s"])) + float(np.sum(transition.resolved["num_output_tokens"]))
    return transition.duration_s + 3.0 * len(transition.resolved) + late + 7.0 * transition.terms["on_time"]


@batched
def pay_together(moments):
    over = moments.resolved
    late = over.sum(over["lateness_s"]) + over.sum(over["num_output_tokens"])
    return moments.duration_s + 3.0 * over.count() + late + 7.0 * moments.terms["on_time"]


def agent_of_a_replica():
    return PolicyScheduler(lambda seen: 0, env_config("default", action="preset", observation=Together()))


ALONE = {"reward": pay_alone, "observation": Alone()}
TOGETHER = {"reward": pay_together, "observation": Together()}


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            same(a.values(), b.values())
        elif isinstance(a, np.ndarray) and a.dtype == object:
            same(list(a), list(b))
        else:
            np.testing.assert_allclose(a, b, rtol=1e-12) if a is not None else None
            assert (a is None) == (b is None)


@pytest.mark.parametrize("mode", ["next_step", "same_step"])
@pytest.mark.parametrize("fields", [{}, {"action": "request"}, {"action_repeat": 5}, {"num_threads": 2}])
def test_together_equals_one_by_one(mode, fields):
    one, all_ = (
        LLMSchedVectorEnv(3, autoreset_mode=mode, max_episode_steps=90, **WORLD, **fields, **how)
        for how in (ALONE, TOGETHER)
    )
    same(one.reset(seed=5), all_.reset(seed=5))
    one.action_space.seed(0)
    ended = 0
    for _ in range(300):
        action = one.action_space.sample()
        ours, theirs = one.step(action), all_.step(action)
        same(ours, theirs)
        ended += int((theirs[2] | theirs[3]).sum())
    assert ended >= 3, "episodes have ended and begun anew"


def test_one_environment_takes_them_too():
    one, all_ = LLMSchedEnv(**WORLD, **ALONE), LLMSchedEnv(**WORLD, **TOGETHER)
    same(one.reset(seed=5), all_.reset(seed=5))
    one.action_space.seed(0)
    for step in range(200):
        if step % 3:
            action = one.action_space.sample()
            ours, theirs = one.step(action), all_.step(action)
        else:
            ours, theirs = (env.step_scheduler(make_scheduler("slai")) for env in (one, all_))
        same(ours, theirs)
        assert isinstance(theirs[0], np.ndarray) and theirs[0].shape == (7,)
        if ours[2] or ours[3]:
            break


def test_a_dictionary_is_a_space_too():
    class Queue:
        space = gym.spaces.Dict({"queue": gym.spaces.Box(0, np.inf, (1,), np.float32)})

        @batched
        def observe(self, moments):
            return {"queue": moments.num_waiting[:, None].astype(np.float32)}

    vector = LLMSchedVectorEnv(2, observation=Queue(), **WORLD)
    assert vector.observation_space.contains(vector.reset(seed=0)[0])
    assert LLMSchedEnv(observation=Queue(), **WORLD).reset(seed=0)[0]["queue"].shape == (1,)


class Callable:
    @batched
    def __call__(self, moments):
        return moments.reward + 1.0


def test_an_object_that_can_be_called_and_the_built_in_reward():
    ours, plain = LLMSchedVectorEnv(2, reward=Callable(), **WORLD), LLMSchedVectorEnv(2, **WORLD)
    ours.reset(seed=0), plain.reset(seed=0)
    for _ in range(30):
        action = plain.action_space.sample()
        assert np.array_equal(ours.step(action)[1], plain.step(action)[1] + 1.0)


def test_figures_are_those_of_views():
    seen = []

    @batched
    def look(moments):
        seen.append({name: getattr(moments, name) for name in FIGURES} | {"features": moments.features})
        return np.zeros(moments.num_envs)

    vector = LLMSchedVectorEnv(2, reward=look, **WORLD)
    vector.reset(seed=3)
    for _ in range(20):
        observations, *_ = vector.step(vector.action_space.sample())
        assert np.array_equal(seen[-1]["features"], observations)
        for env in range(2):
            view = vector.core.engine.view(env)
            for name in FIGURES:
                expected = len(getattr(view, name[4:])) if name.startswith("num_") else getattr(view, name)
                assert seen[-1][name][env] == expected, name


def test_nothing_is_told_that_a_view_hides():
    told = {}

    @batched
    def look(moments):
        told["live"] = moments.running.names
        with pytest.raises(KeyError, match="expected one of"):
            moments.waiting["phase"]
        with pytest.raises(AttributeError, match="figures are now_s"):
            moments.next_arrival_s  # noqa: B018
        return np.zeros(moments.num_envs)

    env = LLMSchedEnv(reward=look, **WORLD)
    env.reset(seed=0)
    env.step(env.action_space.sample())
    assert set(told["live"]) <= set(VISIBLE.names)


def test_an_agent_on_them_is_evaluated_as_it_acts():
    """By :class:`PolicyScheduler` in a run, batch by batch as in the environment; not as a replica."""
    fields = {**WORLD, "action": "preset", "action_repeat": 4}
    seen = {}
    for name, observation in (("alone", Alone()), ("together", Together())):
        world = env_config("default", **fields, observation=observation)
        told = seen[name] = []
        agent = PolicyScheduler(lambda o, told=told: told.append(np.array(o)) or int(o[1]) % 32, world)
        episode = simulate(world, agent, 5)
        seen[name, "end"] = episode.sim.clock_s
    assert len(seen["alone"]) > 10 and seen["alone", "end"] == seen["together", "end"]
    np.testing.assert_allclose(seen["alone"], seen["together"], rtol=1e-12)
    env = LLMSchedEnv(observation=Together(), **fields)
    first, _ = env.reset(seed=5)
    assert np.allclose(first, seen["together"][0])
    cluster = scenario("cluster", num_requests=5, warmup_s=0.0, num_replicas=2)
    with pytest.raises(ConfigError, match="observation: one marked as batched is of environments"):
        simulate(cluster, f"jsq+{__name__}:agent_of_a_replica", 0)


def test_an_observation_stays_when_its_buffer_is_used_again():
    class Buffered:
        space = gym.spaces.Box(0.0, np.inf, (1,), np.float32)
        buffer = np.zeros((3, 1), np.float32)

        @batched
        def observe(self, moments):
            self.buffer[: moments.num_envs, 0] = moments.now_s
            return self.buffer[: moments.num_envs]

    vector = LLMSchedVectorEnv(3, observation=Buffered(), **WORLD)
    first, _ = vector.reset(seed=0)
    kept = first.copy()
    for _ in range(5):
        vector.step(vector.action_space.sample())
    assert np.array_equal(first, kept) and (Buffered.buffer > 0).any()


def test_sums_are_of_one_value_a_request():
    @batched
    def reward(moments):
        with pytest.raises(ValueError, match=r"requests: expected values of shape \(\d+,\), got \(0,\)"):
            (moments.waiting if len(moments.waiting) else moments.running).sum(np.zeros(0))
        return moments.reward

    env = LLMSchedEnv(reward=reward, **{**WORLD, "qps": 20.0, "num_requests": 40})
    env.reset(seed=0)
    for _ in range(20):
        env.step(env.action_space.sample() * 0)
        if env.core.engine.state.sims[0].num_waiting:
            break
    else:
        raise AssertionError("nobody waited")


@pytest.mark.parametrize("paid", [None, 0.0, [0.0], np.zeros((2, 1)), [0.0, np.nan], ["a", "b"]])
def test_what_is_no_array_of_rewards_is_one_line(paid):
    vector = LLMSchedVectorEnv(2, reward=batched(lambda moments: paid), **WORLD)
    vector.reset(seed=0)
    with pytest.raises(ValueError, match=r"reward: expected 2 finite numbers, shape \(2,\)") as error:
        vector.step(vector.action_space.sample())
    assert "\n" not in str(error.value)


def test_observations_of_another_shape_and_environments_without_the_form_are_one_line():
    class Narrow:
        space = gym.spaces.Box(0.0, np.inf, (3,), np.float32)

        @batched
        def observe(self, moments):
            return np.zeros((moments.num_envs, 2))

    with pytest.raises(ValueError, match="observation: expected an element of Box"):
        LLMSchedVectorEnv(2, observation=Narrow(), **WORLD).reset(seed=0)
    for fields in ({"observation": Narrow()}, {"reward": pay_together}):
        with pytest.raises(ValueError, match="only LLMSched environments take one marked as batched"):
            LLMRouteEnv(**fields)
