"""Environments go on from a saved state, a pickle or a copy as they would have gone on themselves, bit for bit."""

import copy
import pickle

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmsched_gym  # noqa: F401
from llmsched_gym.config import CLUSTER_SUITES, SUITES, ConfigError
from llmsched_gym.engine import check
from llmsched_gym.engine.records import ABANDONED, REFUSED
from llmsched_gym.env import LLMSchedEnv, LLMSchedVectorEnv
from llmsched_gym.env.policy import SchedulerPolicy
from llmsched_gym.env.route import LLMRouteEnv, LLMRouteVectorEnv
from llmsched_gym.env.route.policy import RouterPolicy
from llmsched_gym.env.sb3 import LLMSchedVecEnv
from llmsched_gym.scheduler import make_scheduler
from llmsched_gym.workload import NOISE_BLOCK
from tests.test_policies import mlp_folder

IDS = [suite.env_id for suite in (*SUITES.values(), *CLUSTER_SUITES.values())]
SHORT = {"horizon_s": 6.0, "patience_s": 3.0, "num_kv_blocks": 700, "max_num_seqs": 12}  # evictions, clients that leave
ROUTED = {"num_replicas": 2, "horizon_s": 5.0, "patience_s": 3.0, "max_num_seqs": 12}
SCHEDULED = (  # suite, other settings
    ("default", {"action": "knobs", "qps": 4.0, "allow_refusal": True, "max_backlog": 20}),
    ("drift", {"action": "priority", "observation": "slots", "qps": 4.0, "max_backlog": 20, "episode_metrics": True}),
    ("tenants", {"action": "request", "observation": "slots", "qps": 4.0, "max_backlog": 20}),
    ("burst", {"action": "knobs", "num_requests": 8, "warmup_s": 1.0, "drain_s": 4.0, "episode_metrics": True}),
    ("chat", {"action": "preset", "qps": 1.5, "num_kv_blocks": 1500}),
    ("default", {"action": "preset", "qps": 4.0, "max_backlog": 20, "async_lag": True}),
    ("chat", {"action": "request", "qps": 1.5, "credit": "finish", "num_kv_blocks": 1500}),
)
WAYS = {
    "pickle": lambda env: pickle.loads(pickle.dumps(env)),
    "deepcopy": copy.deepcopy,
    "cloudpickle": lambda env: pickle.loads(cloudpickle.dumps(env)),
}


def same(a, b):
    """Whether two outcomes, or parts of them, are the same to the last bit; nan is nan."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype == object:
        return a.shape == b.shape and all(map(same, a.ravel(), b.ravel()))
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def play(env, actions):
    """What a single environment says to the actions, with the first observations of the episodes in between."""
    told = []
    for action in actions:
        told.append(env.step(action))
        if told[-1][2] or told[-1][3]:
            told.append(env.reset())
    return told


def play_all(envs, actions):
    return [envs.step(action) for action in actions]


def sampled(space, count, seed):
    space.seed(seed)
    return [space.sample() for _ in range(count)]


@pytest.mark.parametrize("env_id", IDS)
def test_every_environment_is_pickled_and_copied_in_the_middle_of_an_episode(env_id):
    env = gym.make(env_id, max_episode_steps=60)
    env.reset(seed=3)
    actions = sampled(env.action_space, 80, 0)
    play(env, actions[:30])
    twins = [way(env) for way in WAYS.values()]
    assert all(twin.action_space.sample() is not None for twin in twins)
    told = play(env, actions[30:])
    for twin in twins:
        assert same(told, play(twin, actions[30:]))


@settings(max_examples=20)
@given(
    which=st.integers(0, len(SCHEDULED) - 1),
    seed=st.integers(0, 99),
    before=st.integers(1, 150),
    between=st.integers(0, 150),
    way=st.sampled_from(sorted(WAYS)),
)
def test_single_environments_go_back(which, seed, before, between, way):
    suite, fields = SCHEDULED[which]
    env = LLMSchedEnv(suite, **SHORT | fields)
    env.reset(seed=seed)
    actions = sampled(env.action_space, before + between + 150, seed)
    play(env, actions[:before])
    state, twin, now = env.get_state(), WAYS[way](env), env.core.observation(0)
    told = play(env, actions[before:])  # past the end of episodes, which the generator seeds
    assert same(told, play(twin, actions[before:]))
    for saved in (state, pickle.loads(pickle.dumps(state))):
        play(env, actions[:between])  # whatever comes in between is forgotten
        observation, info = env.set_state(saved)
        assert same(observation, now) and info["seed"] == state.moment.seed
        if env.core.engine.state.batches[0].num_items == 0:  # request actions may have left a batch half formed
            check(env.core.engine.state, 0)
        assert same(told, play(env, actions[before:]))
    other = LLMSchedEnv(suite, **SHORT | fields)  # which has not been reset
    other.set_state(state)
    assert same(told, play(other, actions[before:]))


@settings(max_examples=12)
@given(
    which=st.integers(0, len(SCHEDULED)),
    mode=st.sampled_from(["next_step", "same_step"]),
    seed=st.integers(0, 99),
    before=st.integers(1, 120),
    slots=st.permutations(range(3)),
)
def test_slots_of_vector_environments_go_back_and_change_places(which, mode, seed, before, slots):
    fields = {"autoreset_mode": mode, "max_episode_steps": 70}
    if which == len(SCHEDULED):
        envs = LLMRouteVectorEnv(3, **ROUTED | fields)
    else:
        suite, more = SCHEDULED[which]
        envs = LLMSchedVectorEnv(3, suite, **SHORT | fields | more)
    envs.reset(seed=seed)
    actions = [np.stack([action] * 3) for action in sampled(envs.single_action_space, before + 120, seed)]
    play_all(envs, actions[:before])
    states, twin = [envs.get_state(slot) for slot in range(3)], copy.deepcopy(envs)
    told = play_all(envs, actions[before:])
    assert same(told, play_all(twin, actions[before:]))
    for slot, other in enumerate(slots):
        envs.set_state(slot, states[other])
    for (observations, rewards, *ends, _), moved in zip(told, play_all(envs, actions[before:]), strict=True):
        for slot, other in enumerate(slots):
            seen = {"": observations} if isinstance(observations, np.ndarray) else observations
            seen_now = {"": moved[0]} if isinstance(moved[0], np.ndarray) else moved[0]
            assert all(same(seen[key][other], seen_now[key][slot]) for key in seen)
            assert same([rewards[other], *(end[other] for end in ends)], [m[slot] for m in moved[1:4]])


@pytest.mark.parametrize(
    ("suite", "fields"),
    [
        ("cluster", {"workload": "chat", "num_kv_blocks": 900, "router_staleness_s": 0.3}),
        (
            "cluster",
            {
                "qps": 8.0,
                "replica_failures": ((0, 1.0, 2.5), (1, 1.0, 2.5)),
                "episode_metrics": True,
                "observation": "replicas",
            },
        ),
        ("disagg", {"num_replicas": 4}),
        ("cluster", {"replica_scheduler": "examples.custom_scheduler:ShortestFirst"}),
        ("cluster", {"replica_scheduler": "learned"}),
    ],
)
def test_routing_environments_go_back(suite, fields):
    env = LLMRouteEnv(suite, **ROUTED | fields)
    env.reset(seed=1)
    actions = sampled(env.action_space, 60, 2)
    play(env, actions[:5])
    routes = env.core.cluster.nodes.routes
    while env.config.replica_failures and routes["num_held"][0] < 3:  # both come back to many requests
        env.step(0)
    while suite == "disagg" and routes["num_moving"][0] == 0:
        assert not any(env.step(0)[2:4]), "nothing was moved"
    state, twin = env.get_state(), pickle.loads(pickle.dumps(env))
    env.core.cluster.nodes.held[:], env.core.cluster.nodes.moving[:]["request"] = 0, 0
    env.set_state(state)
    told = play(twin, actions[5:])
    for _ in range(2):
        assert same(told, play(env, actions[5:]))
        env.set_state(state)


def test_every_part_of_an_episode_comes_back():
    """Cohort, patience, settled rewards, recorded gaps: the arrays are what they were, whatever has been in between."""
    fields = {**SHORT, "qps": 6.0, "max_backlog": 30, "allow_refusal": True, "episode_metrics": True}
    env = LLMSchedEnv("drift", **fields)
    env.reset(seed=0)
    actions = sampled(env.action_space, 700, 0)
    for action in actions[:200]:
        env.step(action)
    engine = env.core.engine
    state, clock_s, figures = env.get_state(), float(engine.state.sims[0].clock_s), env.episode_metrics()
    requests = engine.state.requests[0]
    assert clock_s > 1.0 and engine.state.episodes["num_settled"][0] > 0 and requests["paid_utility"].any()
    assert np.isin(requests["phase"], (REFUSED, ABANDONED)).any(), "nobody was lost: the world was too tame"
    kept = {name: array.tobytes() for name, array in engine.state._asdict().items()}
    for _ in range(2):
        env.reset(seed=9, options={"qps": 7.0})
        for action in actions[200:]:
            if any(env.step(action)[2:4]):
                env.reset()
        env.set_state(state)
        for name in ("sims", "episodes", "worlds", "knobs", "memory", "batches", "noise"):
            assert getattr(engine.state, name).tobytes() == kept[name], name
        for name in ("requests", "arrivals", "output_tokens"):
            found = getattr(engine.state, name)[0, : len(env.core.tables[0])].tobytes()
            assert found == kept[name][: len(found)], name
        assert same(env.episode_metrics(), figures)


def test_a_state_stays_as_it_is_and_is_small():
    env = LLMSchedEnv(qps=1.0)
    env.reset(seed=0)
    actions = sampled(env.action_space, 400, 0)
    play(env, actions[:100])
    state = env.get_state()
    before = pickle.dumps(state)
    play(env, actions)
    env.set_state(state)
    play(env, actions)
    assert pickle.dumps(state) == before
    assert state.nbytes < 40_000 and repr(state).startswith("EnvState(suite 'default', seed 0, ")


def test_noise_goes_on_or_is_another():
    env = LLMSchedEnv(jitter=0.3, horizon_s=1e4, qps=0.5)
    env.reset(seed=0)
    action = np.zeros(env.action_space.shape, np.int64)
    sims = env.core.engine.state.sims
    while sims["num_batches"][0] < NOISE_BLOCK - 20:
        env.step(action)
    state, clocks = env.get_state(), {}
    for name, seed in (("own", None), ("again", None), ("5", 5), ("5 again", 5), ("6", 6)):
        env.set_state(state, seed=seed)
        for _ in range(60):  # into the next block of noise
            env.step(action)
        clocks[name] = float(sims["clock_s"][0]), env.reset()[1]["seed"]
    assert clocks["own"] == clocks["again"] and clocks["5"] == clocks["5 again"]
    assert len(set(clocks.values())) == 3
    quiet = LLMSchedEnv(jitter=0.0)
    quiet.reset(seed=0)
    state = quiet.get_state()
    told = play(quiet, [action] * 50)
    quiet.set_state(state, seed=5)
    assert same(told, play(quiet, [action] * 50))


def test_a_single_environment_and_a_slot_exchange_states():
    single, envs = LLMSchedEnv(**SHORT), LLMSchedVectorEnv(2, **SHORT)
    single.reset(seed=4)
    envs.reset(seed=0)
    actions = sampled(single.action_space, 100, 0)
    play(single, actions[:40])
    envs.set_state(1, single.get_state())
    told = play(single, actions[40:60])
    moved = play_all(envs, [np.stack([a, a]) for a in actions[40:60]])
    assert [t[1] for t in told] == [m[1][1] for m in moved]
    single.reset(seed=8)
    single.set_state(envs.get_state(1))
    again = play(single, actions[60:])
    assert [t[1] for t in again] == [m[1][1] for m in play_all(envs, [np.stack([a, a]) for a in actions[60:]])]


def test_turns_that_are_due_and_what_schedulers_remember_come_back():
    env = LLMSchedEnv("agents", horizon_s=40.0)
    env.reset(seed=0)
    action, state = np.zeros(env.action_space.shape, np.int64), env.core.engine.state
    while state.worlds["num_due"][0] < 3:
        env.step(action)
    state.memory[0] = np.arange(state.memory.shape[1])
    now, count = env.get_state(), int(state.worlds["num_due"][0])
    due, memory, blocks = state.due[0, :count].copy(), state.memory.tobytes(), state.blocks.tobytes()
    env.reset(seed=1)
    state = env.core.engine.state  # which may have grown
    state.due[:], state.memory[:] = 0, 0.0
    play(env, [action] * 50)
    env.set_state(now)
    state = env.core.engine.state
    assert state.worlds["num_due"][0] == count and np.array_equal(state.due[0, :count], due) and due.any()
    assert (state.memory.tobytes(), state.blocks.tobytes()) == (memory, blocks)


@pytest.mark.parametrize("name", ["slai", "rad", "sglang", "learned"])
def test_schedulers_go_on_from_a_state(name):
    admission = getattr(make_scheduler(name), "admission", "prompt")
    env = LLMSchedEnv(num_requests=60, qps=3.0, warmup_s=0.0, admission=admission)
    env.reset(seed=0)
    policy = SchedulerPolicy(env, name)
    for _ in range(60):
        policy.step()
    state, pair = env.get_state(), pickle.loads(pickle.dumps((env, policy)))
    told = [policy.step() for _ in range(80)]
    assert pair[1].env is pair[0] and same(told, [pair[1].step() for _ in range(80)])
    if name != "learned":  # which holds its actions itself
        env.set_state(state)
        assert same(told, [policy.step() for _ in range(80)])


def test_a_router_that_was_asked_in_another_future_is_asked_again():
    env = LLMRouteEnv(**ROUTED)
    env.reset(seed=0)
    policy = RouterPolicy(env, "least-tokens")
    state, found = env.get_state(), []
    for replica in (0, 1):
        env.set_state(state)
        for _ in range(6):
            env.step(replica)
        found.append(policy.action())
    assert found == [1, 0]


def test_a_policy_folder_is_pickled_with_the_replicas_that_it_schedules(tmp_path):
    folder = mlp_folder(tmp_path / "policy")
    env = LLMRouteEnv(**ROUTED, replica_scheduler=str(folder))
    env.reset(seed=0)
    play(env, [0] * 5)
    twin = pickle.loads(pickle.dumps(env))
    assert same(play(env, [1, 0] * 5), play(twin, [1, 0] * 5))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"qps": 1.5}, r"^state: expected one with qps=1.5, got None$"),
        ({"suite": "drift"}, "^state: expected one with suite='drift', got 'default'$"),
        ({"profile": "h100-mistral-7b"}, "^state: expected one with profile='h100-mistral-7b', got "),
        ({"tau_s": 3.0}, "^state: expected one with tau_s=3.0, got 120.0$"),
    ],
)
def test_a_state_of_another_environment_is_refused(fields, match):
    env = LLMSchedEnv()
    env.reset(seed=0)
    other = LLMSchedEnv(**fields)
    other.reset(seed=1)
    before = other.get_state()
    with pytest.raises(ConfigError, match=match):
        other.set_state(env.get_state())
    assert pickle.dumps(other.get_state()) == pickle.dumps(before)


def test_what_is_no_state_or_of_other_code_is_refused():
    env, route = LLMSchedEnv(), LLMRouteEnv(**ROUTED)
    with pytest.raises(gym.error.ResetNeeded, match=r"^get_state: no episode has begun, call reset\(\)$"):
        env.get_state()
    env.reset(seed=0)
    route.reset(seed=0)
    state = env.get_state()
    for wrong, match in (
        ({}, r"^state: expected what get_state\(\) returned, got dict$"),
        (route.get_state(), "^state: expected one of EnvCore, got one of RouteCore$"),
        (_with_origin(state, code="0" * 16), "^state: expected one of the same version of llmsched-gym, got one of"),
        (_with_origin(state, costs="0" * 16), "^state: expected one of the same cost profile, got one of another$"),
    ):
        with pytest.raises(ConfigError, match=match):
            env.set_state(wrong)
    with pytest.raises(ConfigError, match=r"^seed: expected"):
        env.set_state(state, seed=-1)
    envs = LLMSchedVectorEnv(2)
    envs.reset(seed=0)
    for slot in (2, -1, "0"):
        with pytest.raises(IndexError, match=r"^slot: expected 0 to 1, got"):
            envs.get_state(slot)
    with pytest.raises(AttributeError, match="expected a call of the vector environment's"):
        envs.envs[0].get_state()


def _with_origin(state, **fields):
    moment = state.moment._replace(origin=state.moment.origin._replace(**fields))
    return pickle.loads(pickle.dumps(state)).__class__(moment, state.generator, state.generator_seed, state.is_over)


def test_an_open_window_is_left_behind():
    env = gym.make("LLMSched-v0", render_mode="ansi")
    env.reset(seed=0)
    first = env.render()
    twin = copy.deepcopy(env)
    assert twin.render() == first and twin.unwrapped._viewer is not env.unwrapped._viewer


def test_a_reward_without_a_name_is_one_line_and_goes_with_cloudpickle():
    env = LLMSchedEnv(reward=lambda transition: transition.duration_s)
    env.reset(seed=0)
    with pytest.raises((pickle.PicklingError, AttributeError), match=r"lambda") as error:
        pickle.dumps(env)
    assert "\n" not in str(error.value)
    action = env.action_space.sample()
    twins = [pickle.loads(cloudpickle.dumps(env)), copy.deepcopy(env)]
    told = env.step(action)
    assert all(same(told, twin.step(action)) for twin in twins)


def test_a_real_backend_cannot_be_copied():
    env = LLMSchedEnv()
    env.reset(seed=0)
    env.core.engine.backend = object()  # as if there were one
    for act in (env.get_state, lambda: pickle.dumps(env), lambda: copy.deepcopy(env)):
        with pytest.raises(ConfigError, match=r"^backend: expected the simulated device for .*, got object, which"):
            act()


def test_threads_go_on_in_a_copy():
    envs = LLMSchedVectorEnv(4, num_threads=2, **SHORT)
    envs.reset(seed=0)
    actions = [np.stack([a] * 4) for a in sampled(envs.single_action_space, 40, 0)]
    twin = copy.deepcopy(envs)
    assert twin.core._threads is not None and same(play_all(envs, actions), play_all(twin, actions))
    envs.close()
    assert copy.deepcopy(envs).core._threads is None


def test_the_face_of_stable_baselines3_is_pickled_and_goes_back():
    sb3 = pytest.importorskip("llmsched_gym.env.sb3", reason="stable-baselines3 is not installed")
    for face in (sb3.LLMSchedVecEnv(3, **SHORT), sb3.LLMRouteVecEnv(2, **ROUTED)):
        face.reset()
        actions = [np.stack([a] * face.num_envs) for a in sampled(face.action_space, 400, 0)]
        for action in actions[:50]:
            face.step(action)
        twin, states = pickle.loads(pickle.dumps(face)), [face.get_state(slot) for slot in range(face.num_envs)]
        told = [timeless(face.step(action)) for action in actions[50:]]
        assert any("episode" in info for step in told for info in step[3])
        assert same(told, [timeless(twin.step(action)) for action in actions[50:]])
        for slot, state in enumerate(states):
            face.set_state(slot, state)
        assert same(told, [timeless(face.step(action)) for action in actions[50:]])


def timeless(step):
    """A step without the wall time of its episodes."""
    for info in step[3]:
        info.get("episode", {}).pop("t", None)
    return step


def test_a_state_goes_on_whoever_has_stepped_since():
    """A scheduler's settings are part of it, with request actions too: a new one of its name continues."""
    env = LLMSchedEnv(action="request", qps=3.0)
    env.reset(seed=4)
    policy = SchedulerPolicy(env, "sarathi[budget=2048]")
    for _ in range(40):
        policy.step()
    state = env.get_state()
    told = [policy.step() for _ in range(60)]
    SchedulerPolicy(env, "slai").step()
    for saved in (state, pickle.loads(pickle.dumps(state))):
        env.set_state(saved)
        again = SchedulerPolicy(env, "sarathi[budget=2048]")
        assert same(told, [again.step() for _ in range(60)])


@pytest.mark.parametrize("make", [lambda: LLMSchedVectorEnv(3), lambda: LLMSchedVecEnv(3)])
def test_a_slot_is_one_environment(make):
    envs = make()
    envs.reset() if isinstance(envs, LLMSchedVecEnv) else envs.reset(seed=0)
    vector = getattr(envs, "env", envs)
    vector._steps[:] = 8
    state = envs.get_state(np.int64(1))
    vector._steps[:] = 9
    envs.set_state(True, state)  # an integer to Python
    assert vector._steps.tolist() == [9, 8, 9]
    for slot in (3, -1, None, 0.5):
        with pytest.raises(IndexError, match="slot: expected 0 to 2"):
            envs.get_state(slot)
        with pytest.raises(IndexError, match="slot: expected 0 to 2"):
            envs.set_state(slot, state)
