"""Schedulers as agents of an environment: wrappers are obeyed, and actions do what the scheduler does."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import wrappers

import llmsched_gym  # noqa: F401
from llmsched_gym.config import ACTIONS, ConfigError, EnvConfig, scenario
from llmsched_gym.env import LLMSchedEnv, LLMSchedVectorEnv
from llmsched_gym.env.policy import SchedulerPolicy
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.policies import write_folder
from llmsched_gym.policies.folder import spec_for
from tests.test_policies import mlp_folder

WORLD = {"num_requests": 60, "qps": 2.0, "warmup_s": 10.0}


def test_users_import_the_bridges_from_the_environment():
    from llmsched_gym.env import policy
    from llmsched_gym.policies import bridge

    assert {name: getattr(policy, name) for name in policy.__all__} == {
        "PolicyScheduler": bridge.PolicyScheduler,
        "SchedulerPolicy": bridge.SchedulerPolicy,
    }
    with pytest.raises(ImportError, match="cannot import name 'knobs_now'"):
        from llmsched_gym.env.policy import knobs_now  # noqa: F401


def play(env, name, how, limit=None):
    """Return, steps, and the requests at the end, of one episode."""
    env.reset(seed=5)
    policy, total, steps, done = SchedulerPolicy(env, name), 0.0, 0, False
    while not done and steps != limit:
        _, reward, terminated, truncated, _ = how(env, policy)
        total, steps, done = total + reward, steps + 1, terminated or truncated
    base = env.unwrapped
    return total, steps, base.core.engine.state.requests[0][: len(base.core.tables[0])].tobytes()


def by_step(env, policy):
    return policy.step()


def by_action(env, policy):
    action = policy.action()
    assert action in env.action_space
    return env.step(action)


def by_copy(env, policy):
    return env.step(np.array(policy.action()))


@pytest.mark.parametrize("name", ["sarathi[budget=2048]", "on-time", "srpt-capped", "rad", "edf"])
def test_a_scheduler_steps_alike_whatever_the_actions_are(name):
    fields = {**WORLD, "token_budget": 300}
    played = {action: play(LLMSchedEnv(action=action, **fields), name, by_step) for action in ACTIONS}
    assert len(set(played.values())) == 1


def test_an_agent_takes_over_from_a_scheduler_with_its_own_budget():
    """A request action after a scheduler's step opens a batch of the environment's tokens, not of the scheduler's."""
    env = LLMSchedEnv(action="request", token_budget=300, qps=3.0)
    env.reset(seed=1)
    policy = SchedulerPolicy(env, "sarathi[budget=2048]")
    for _ in range(20):
        policy.step()
        assert env.core.engine.state.batches[0].token_room == 300
        env.step(int(np.flatnonzero(env.action_masks())[0]))
        assert env.core.engine.state.knobs[0]["token_budget"] == 300


@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize(
    "name", ["slai", "on-time", "on-time[quiet=10]", "learned", "tuned-linear", "sarathi[cap=0.8]"]
)
def test_an_action_does_what_a_step_does_and_what_evaluate_does(name, repeat):
    made = [gym.make("LLMSched-Drift-v0", action_repeat=repeat, **WORLD) for _ in range(2)]
    stepped, acted = play(made[0], name, by_step), play(made[1], name, by_action)
    assert stepped == acted
    episode = simulate(scenario("drift", **WORLD), name, 5)
    wanted = episode.requests["first_token_s"]
    state = made[0].unwrapped.core.engine.state
    assert np.array_equal(state.requests[0][: len(wanted)]["first_token_s"], wanted, equal_nan=True)


def test_copies_of_actions_are_the_nearest_that_the_space_has():
    env = gym.make("LLMSched-v0", **WORLD)
    exact = play(env, "slai", by_step)
    assert play(env, "slai", by_copy) == exact  # the knobs have every value of slai's
    near = play(env, "on-time", by_copy)
    assert near != play(env, "on-time", by_step) and near[0] == pytest.approx(exact[0], abs=30)


def test_plain_actions_after_a_scheduler_are_plain(tmp_path):
    slow = f"{mlp_folder(tmp_path / 'p')}[decision_s=0.5]"
    env = LLMSchedEnv(**WORLD)
    env.reset(seed=1)
    SchedulerPolicy(env, slow).step()
    assert env.core.engine.state.sims[0].decision_s == 0.5
    env.step(np.zeros(7, np.int64))
    assert env.core.engine.state.sims[0].decision_s == 0.0


class Recorder(gym.Wrapper):
    """What a collector of data sees."""

    def __init__(self, env):
        super().__init__(env)
        self.seen = []

    def step(self, action):
        out = self.env.step(action)
        self.seen.append((np.array(action), out[1]))
        return out


@pytest.mark.parametrize("name", ["slai", "rad-512", "random", "learned"])
def test_wrappers_are_obeyed(name):
    env = gym.make("LLMSched-v0", max_episode_steps=40, action_repeat=2, **WORLD)
    env = Recorder(wrappers.TransformReward(env, lambda r: 10.0 * r + 1.0))
    env = wrappers.RecordEpisodeStatistics(env)
    total, steps, requests = play(env, name, by_step)
    plain = LLMSchedEnv(action_repeat=2, **WORLD)
    wanted, _, same = play(plain, name, by_step, limit=40)
    assert steps == 40 and requests == same
    assert total == pytest.approx(10.0 * wanted + 40.0)
    assert env.get_wrapper_attr("time_queue") is not None and env.return_queue[-1] == pytest.approx(total)
    recorder = env.env
    assert len(recorder.seen) == 40 and all(action in env.action_space for action, _ in recorder.seen)


@pytest.mark.parametrize("kind", ["knobs", "priority", "request"])
def test_wrappers_of_actions_have_nothing_to_change(kind):
    base = LLMSchedEnv(action=kind, **WORLD)
    scale = gym.spaces.Box(-7.0, 7.0, (3,), np.float32)
    members = {"knobs": np.zeros(7, np.int64), "priority": np.zeros(64, np.float32), "request": 64}
    env = wrappers.TransformAction(base, lambda action: members[kind], scale)
    stepped = play(env, "slai", by_step)
    assert stepped == play(LLMSchedEnv(action=kind, **WORLD), "slai", by_step)
    with pytest.raises(ConfigError, match="wrappers change the action space"):
        SchedulerPolicy(env, "slai").action()


def other_folder(path, kind):
    rng = np.random.default_rng(0)
    config = EnvConfig(action=kind, allow_refusal=kind == "knobs")
    spec = spec_for(config, {"kind": "mlp", "layers": 0, "activation": "tanh"})
    inputs, outputs = len(spec.observation["features"]), {"priority": 64, "request": 65, "knobs": 53}[kind]
    if kind == "knobs":
        outputs = sum(len(values) for values in spec.action["knobs"].values())
    tensors = {"normalise.mean": np.zeros(inputs, np.float32), "normalise.scale": np.ones(inputs, np.float32)}
    tensors |= {"out.weight": rng.standard_normal((outputs, inputs)).astype(np.float32)}
    tensors |= {"out.bias": np.zeros(outputs, np.float32)}
    if kind == "knobs":
        tensors["out.bias"][-1] = 1e6  # refuses whenever it may
    return str(write_folder(path, spec, tensors))


@pytest.mark.parametrize("kind", ["priority", "request"])
def test_policies_of_other_actions_have_them(tmp_path, kind):
    folder = other_folder(tmp_path / "p", kind)
    env = LLMSchedEnv(action=kind, **WORLD)
    stepped, acted = play(env, folder, by_step), play(env, folder, by_action)
    assert stepped[0] == acted[0] and stepped[2] == acted[2]


def test_what_no_action_expresses_is_one_line(tmp_path):
    knobs, refusing = mlp_folder(tmp_path / "k"), other_folder(tmp_path / "refuse", "knobs")
    priority = other_folder(tmp_path / "p", "priority")
    cases = [
        ({}, "rad-512", "rad-512: .*neither a setting of the packing kernel nor a policy"),
        ({}, "slai[budget=500]", "no setting of the knob 'token_budget' is 500"),
        ({"action": "priority"}, "slai", "it sets knobs, and the environment has priority actions"),
        ({"action": "request"}, str(knobs), "it takes knobs actions, and the environment has request actions"),
        ({}, priority, "it takes priority actions, and the environment has knobs actions"),
        ({"action": "priority", "token_budget": 600}, priority, "its token_budget is 512"),
        ({}, refusing, "it refuses requests"),
    ]
    for fields, name, words in cases:
        env = LLMSchedEnv(**WORLD | fields)
        env.reset(seed=1)
        policy = SchedulerPolicy(env, name)
        with pytest.raises(ConfigError, match=words) as error:
            policy.action()
        assert "\n" not in str(error.value)
        policy.step()  # a batch needs no action
    env = LLMSchedEnv(allow_refusal=True, **WORLD)
    env.reset(seed=1)
    assert SchedulerPolicy(env, str(knobs)).action()[-1] == 0
    assert SchedulerPolicy(env, refusing).action()[-1] == 1


def test_only_single_environments_of_ours():
    for env in (LLMSchedVectorEnv(2), gym.make("CartPole-v1")):
        with pytest.raises(ConfigError, match="env: expected a single LLMSched environment"):
            SchedulerPolicy(env, "slai")
    with pytest.raises(ConfigError, match="admission: expected 'chunk'"):
        SchedulerPolicy(LLMSchedEnv(), "slai[admission=chunk]")
