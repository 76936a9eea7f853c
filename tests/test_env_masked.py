"""Masks of legal actions inside observations: names, shapes, everywhere where an observation is handed out."""

import pickle
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import SyncVectorEnv

from llmsched_gym.config import ConfigError, env_config, route_config
from llmsched_gym.env import LLMSchedEnv, LLMSchedVectorEnv, batched
from llmsched_gym.env.policy import PolicyScheduler
from llmsched_gym.env.route import LLMRouteEnv, LLMRouteVectorEnv
from llmsched_gym.env.route.policy import PolicyRouter
from llmsched_gym.evaluation.clusters import simulate_cluster
from llmsched_gym.evaluation.run import simulate

NAMES = {
    "rllib": ("observations", "action_mask", np.float32),
    "torchrl": ("observation", "action_mask", np.bool_),
    "tianshou": ("obs", "mask", np.bool_),
    ("seen", "legal"): ("seen", "legal", np.bool_),
}
REQUEST = {"action": "request", "horizon_s": 0.5, "max_backlog": 8}
ROUTE = {"qps": 3.0, "horizon_s": 8.0, "warmup_s": 2.0}


def legal_action(env, rng):
    return int(rng.choice(np.flatnonzero(env.unwrapped.action_masks())))


@pytest.mark.parametrize("given", NAMES)
@pytest.mark.parametrize(("env_id", "fields"), [("LLMSched-v0", REQUEST), ("LLMRoute-v0", ROUTE)])
def test_each_library_finds_observation_and_mask_under_its_names(env_id, fields, given):
    name, mask, dtype = NAMES[given]
    env, plain, rng = gym.make(env_id, mask_in_observation=given, **fields), gym.make(env_id, **fields), None
    assert env.observation_space[name] == plain.observation_space
    assert env.observation_space[mask] == spaces.Box(0, 1, (env.action_space.n,), dtype)
    seen, bare = env.reset(seed=3)[0], plain.reset(seed=3)[0]
    rng, hidden = np.random.default_rng(0), 0
    for _ in range(40):
        assert seen in env.observation_space and seen[mask].dtype == dtype
        assert np.array_equal(seen[name], bare)
        assert np.array_equal(seen[mask], plain.unwrapped.action_masks())
        hidden += int((seen[mask] == 0).sum())
        action = legal_action(plain, rng)
        seen, _, terminated, truncated, _ = env.step(action)
        bare = plain.step(action)[0]
        if terminated or truncated:
            break
    assert hidden or env_id == "LLMRoute-v0"
    assert np.array_equal(seen[mask], plain.unwrapped.action_masks()) and np.array_equal(seen[name], bare)


def test_by_default_the_observation_is_bare():
    assert env_config().mask_in_observation is None and route_config().mask_in_observation is None
    assert isinstance(LLMSchedEnv(action="request").observation_space, spaces.Box)


def test_knobs_have_the_masks_of_all_entries_one_behind_the_other():
    env = LLMSchedEnv(mask_in_observation="torchrl")
    seen, _ = env.reset(seed=0)
    assert seen["action_mask"].shape == (int(env.action_space.nvec.sum()),) and seen["action_mask"].all()
    assert seen in env.observation_space


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mask_in_observation": "sb3"}, "mask_in_observation: expected None, rllib, torchrl, tianshou, or two names"),
        ({"mask_in_observation": ("a", "a")}, "two names, of the observation and of the mask, got"),
        ({"mask_in_observation": ("a",)}, "two names"),
        ({"mask_in_observation": True}, "two names"),
        ({"mask_in_observation": {"obs": "mask"}}, "two names"),
        ({"mask_in_observation": "rllib", "action": "priority"}, "expected None with action='priority'"),
        ({"mask_in_observation": "tianshou"}, r"one number \(preset, request\).*got action='knobs'"),
    ],
)
def test_what_cannot_be_is_one_line(fields, words):
    for make in (LLMSchedEnv, lambda **f: LLMSchedVectorEnv(2, **f)):
        with pytest.raises(ConfigError, match=words) as error:
            make(**fields)
        assert "\n" not in str(error.value)
    if "action" in fields or fields["mask_in_observation"] == "tianshou":
        with pytest.raises(ConfigError, match=words):
            PolicyScheduler(lambda *seen: 0, env_config(**fields))
    else:
        with pytest.raises(ConfigError, match=words):
            LLMRouteEnv(**fields)


def test_the_face_of_stable_baselines_has_masks_of_its_own():
    sb3 = pytest.importorskip("llmsched_gym.env.sb3", reason="stable-baselines3 is not installed")
    for face in (sb3.LLMSchedVecEnv, sb3.LLMRouteVecEnv):
        with pytest.raises(ConfigError, match=r"expected None, as sb3-contrib asks action_masks\(\), got 'rllib'"):
            face(2, mask_in_observation="rllib")


@pytest.mark.parametrize("env_id", ["LLMSched-v0", "LLMRoute-v0"])
def test_gymnasium_finds_nothing_to_say(env_id):
    fields = REQUEST if env_id == "LLMSched-v0" else ROUTE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(env_id, mask_in_observation="rllib", **fields).unwrapped, skip_render_check=True)


def same(left, right):
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return left.dtype == right.dtype and np.array_equal(left, right)


@pytest.mark.parametrize("mode", ["next_step", "same_step"])
@pytest.mark.parametrize(
    ("vector", "single", "fields"),
    [(LLMSchedVectorEnv, LLMSchedEnv, REQUEST), (LLMRouteVectorEnv, LLMRouteEnv, ROUTE)],
)
def test_the_vector_environment_is_gymnasiums_of_single_ones_final_observations_too(vector, single, fields, mode):
    fields = {**fields, "mask_in_observation": "rllib"}
    envs = vector(2, autoreset_mode=mode, **fields)
    others = SyncVectorEnv([lambda: single(**fields)] * 2, autoreset_mode=envs.autoreset_mode)
    assert envs.observation_space == others.observation_space
    seen, expected, rng, ends = envs.reset(seed=5)[0], others.reset(seed=5)[0], np.random.default_rng(1), 0
    for _ in range(500):
        assert same(seen, expected)
        assert same(seen["action_mask"], envs.action_masks().astype(np.float32))
        actions = np.array([rng.choice(np.flatnonzero(row)) for row in seen["action_mask"]])
        seen, _, terminated, truncated, info = envs.step(actions)
        expected, *_, told = others.step(actions)
        done = terminated | truncated
        ends += int(done.sum())
        if mode == "same_step" and done.any():
            for i in np.flatnonzero(done):
                assert same(info["final_obs"][i], told["final_obs"][i])
                assert info["final_obs"][i] in envs.single_observation_space
        if ends >= 2:
            return
    raise AssertionError("no episode ended")


def test_states_and_pickles_have_the_mask():
    env, rng = LLMSchedEnv(mask_in_observation="tianshou", **{**REQUEST, "horizon_s": 3.0}), np.random.default_rng(2)
    env.reset(seed=1)
    for _ in range(5):
        seen = env.step(legal_action(env, rng))[0]
    state, twin = env.get_state(), pickle.loads(pickle.dumps(env))
    action = legal_action(env, rng)
    later = env.step(action)[0]
    assert not same(later, seen)
    assert (
        same(env.set_state(state)[0], seen) and same(env.step(action)[0], later) and same(twin.step(action)[0], later)
    )
    with pytest.raises(ConfigError, match="state: expected one with mask_in_observation=None, got 'tianshou'"):
        LLMSchedEnv(**{**REQUEST, "horizon_s": 3.0}).set_state(state)


class Queue:
    space = spaces.Box(0.0, np.inf, (1,), np.float32)

    def observe(self, view):
        return np.array([len(view.waiting)], np.float32)


class Queues:
    space = Queue.space

    @batched
    def observe(self, moments):
        return moments.num_waiting[:, None].astype(np.float32)


@pytest.mark.parametrize("observation", ["slots", Queue(), Queues()])
def test_other_observations_have_it_as_well(observation):
    fields = {**REQUEST, "observation": observation, "mask_in_observation": ("seen", "legal")}
    env, envs = LLMSchedEnv(**fields), LLMSchedVectorEnv(2, **fields)
    seen, both = env.reset(seed=4)[0], envs.reset(seed=4)[0]
    assert seen in env.observation_space and both in envs.observation_space
    assert np.array_equal(both["legal"][0], seen["legal"]) and seen["legal"][-1]
    if observation == "slots":
        assert np.array_equal(both["seen"]["slots"][0], seen["seen"]["slots"])
    else:
        assert np.array_equal(both["seen"][0], seen["seen"])


class LastLegal:
    """An agent that acts by the mask that it sees, and counts what it has seen."""

    def __init__(self):
        self.seen = []

    def __call__(self, seen, mask=None):
        assert mask is None or np.array_equal(mask, seen["action_mask"])
        self.seen.append(seen["observations"])
        return int(np.flatnonzero(seen["action_mask"])[-1 if len(self.seen) % 3 == 0 else 0])


@pytest.mark.parametrize("action", ["request", "preset"])
def test_an_agent_of_such_observations_runs_where_schedulers_do(action):
    config = env_config(action=action, horizon_s=3.0, max_backlog=8, mask_in_observation="rllib")
    env, agent, done = LLMSchedEnv(**config.to_dict()), LastLegal(), False
    seen, _ = env.reset(seed=6)
    while not done:
        seen, _, terminated, truncated, _ = env.step(agent(seen))
        done = terminated or truncated
    scheduler = pickle.loads(pickle.dumps(PolicyScheduler(LastLegal(), config)))
    run = simulate(config, scheduler, seed=6)
    ours = env.core.engine.state.requests[0, : len(run.requests)]
    assert np.array_equal(run.requests["num_output_tokens"], ours["num_output_tokens"])
    assert len(agent.seen) == len(scheduler.policy.seen) and np.array_equal(agent.seen[-1], scheduler.policy.seen[-1])


def test_a_router_sees_the_replicas_that_may_take_the_request():
    config, masks = route_config(mask_in_observation="tianshou", qps=3.0, horizon_s=5.0, warmup_s=0.0), []

    def route(seen, mask):
        masks.append(np.array_equal(seen["mask"], mask) and seen["obs"].ndim == 1)
        return int(np.flatnonzero(seen["mask"])[-1])

    simulate_cluster(config, "slai", 0, router=PolicyRouter(route, config))
    assert masks and all(masks)
