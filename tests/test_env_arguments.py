"""Arguments of environments and runs: unknown, bad at once, NumPy's own, and a spec that survives JSON."""

import inspect
import json
import math

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec

from llmsched_gym.config import (
    OF_THE_VECTOR,
    ConfigError,
    DeviceSpec,
    EnvConfig,
    Scenario,
    UnknownField,
    env_config,
    scenario,
)
from llmsched_gym.cost import load_profile
from llmsched_gym.env import LLMSchedEnv, LLMSchedVectorEnv
from llmsched_gym.env.reward import as_reward, as_rewards
from llmsched_gym.env.route import LLMRouteEnv
from llmsched_gym.evaluation.capacity import capacity
from llmsched_gym.evaluation.grid import evaluate
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.policies import read_folder, write_folder
from llmsched_gym.policies.folder import spec_for
from llmsched_gym.scheduler import make_scheduler

LENGTHS = "num_prefill_tokens,num_decode_tokens\n100,5\n"


@pytest.mark.parametrize(
    "make",
    [
        lambda: gym.make("LLMSched-v0", frameskip=4),
        lambda: gym.make_vec("LLMSched-v0", num_envs=2, vectorization_mode="vector_entry_point", frameskip=4),
        lambda: LLMSchedEnv(frameskip=4),
        lambda: LLMSchedVectorEnv(2, frameskip=4),
        lambda: env_config("paper", frameskip=4),
        lambda: scenario("paper", frameskip=4),
        lambda: Scenario().replace(frameskip=4),
    ],
)
def test_an_unknown_field_is_an_unexpected_keyword_argument(make):
    """TorchRL's GymEnv tries frameskip= and waits for a TypeError with these words."""
    with pytest.raises(UnknownField, match="got an unexpected keyword argument 'frameskip'") as error:
        make()
    assert isinstance(error.value, TypeError) and isinstance(error.value, ValueError)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", OF_THE_VECTOR)
@pytest.mark.parametrize(
    "make",
    [
        lambda **fields: gym.make("LLMSched-v0", **fields),
        lambda **fields: gym.make_vec("LLMSched-v0", **{"num_envs": 2} | fields, vectorization_mode="sync"),
        lambda **fields: scenario("default", **fields),
    ],
)
def test_an_argument_of_the_vector_environment_elsewhere_is_told_whose_it_is(make, name):
    if name == "num_envs" and "make_vec" in make.__code__.co_names:
        return  # gymnasium's own argument there
    with pytest.raises(UnknownField, match=f"'{name}'; only LLMSchedVectorEnv has it") as error:
        make(**{name: 2})
    assert "did you mean" not in str(error.value)


def test_arguments_of_the_vector_environment_are_not_fields():
    assert not set(OF_THE_VECTOR) & set(env_config().to_dict())
    assert set(OF_THE_VECTOR) <= set(inspect.signature(LLMSchedVectorEnv).parameters)


class NoSpace:
    def observe(self, view):
        return 0


@pytest.mark.parametrize("make", [LLMSchedEnv, lambda **fields: LLMSchedVectorEnv(2, **fields)])
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"workload": "foo"}, "workload: expected one of"),
        ({"workload": "no/such.json"}, "workload: cannot read"),
        ({"trace": "no/such.csv"}, "no/such.csv: cannot read"),
        ({"profile": "tpu-v9"}, "profile"),
        ({"scheduler_profile": "tpu-v9"}, "profile"),
        ({"arrivals": "replay"}, "arrivals: replay needs a trace"),
        ({"qps": 1e6, "horizon_s": 1e6}, "qps: about"),
        ({"observation": NoSpace()}, "observation: expected an object with a gymnasium space"),
    ],
)
def test_what_cannot_be_had_fails_in_the_constructor(make, fields, words):
    with pytest.raises(ValueError, match=words) as error:
        make(**fields)
    assert "\n" not in str(error.value)


def test_a_trace_without_times_cannot_keep_them(tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text(LENGTHS)
    LLMSchedEnv(trace=path)  # a Path is a file's name too
    with pytest.raises(ValueError, match="keep needs arrival times"):
        LLMSchedEnv(trace=str(path), trace_arrivals="keep")


def test_an_infinite_time_constant_discounts_nothing():
    env = LLMSchedEnv(tau_s=math.inf)
    env.reset(seed=0)
    *_, info = env.step(np.zeros(7, np.int64))
    assert info["duration_s"] > 0.0 and info["discount"] == 1.0
    with pytest.raises(ValueError, match="tau_s"):
        LLMSchedEnv(tau_s=0.0)


NUMPY = {
    "qps": np.float32(1.5),
    "qps_range": np.array([1.0, 2.0]),
    "strict_share": (np.float64(0.1), np.float32(0.5)),
    "num_requests": np.int64(20),
    "max_num_seqs": np.array(100),
    "warmup_s": np.int32(0),
    "jitter": np.float64(0.0),
    "patience_s": np.float64("inf"),
    "allow_refusal": np.bool_(True),
    "ttft_class_scales": [np.float16(1.0), np.int8(2)],
    "suite": np.str_("paper"),
    "action_repeat": np.uint8(2),
    "beta": np.longdouble(0.25),
}


def test_numpy_scalars_are_numbers_in_configs():
    fields = {k: v for k, v in NUMPY.items() if k != "suite"}
    config = env_config(NUMPY["suite"], **fields)
    for value in config.to_dict().values():
        for one in value if isinstance(value, tuple) else [value]:
            assert one is None or type(one) in (int, float, bool, str), value
    expected = {"qps": 1.5, "qps_range": (1.0, 2.0), "num_requests": 20, "max_num_seqs": 100, "beta": 0.25}
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.allow_refusal is True and config.ttft_class_scales == (1.0, 2) and config.strict_share == (0.1, 0.5)
    hash(config)
    with pytest.raises(ValueError, match="num_requests: expected a whole number"):
        EnvConfig(num_requests=np.float64(2.5))
    with pytest.raises(ValueError, match="allow_refusal"):
        EnvConfig(allow_refusal=np.int64(1))


def test_numpy_scalars_are_seeds_and_numbers_of_things():
    env = LLMSchedEnv(num_requests=5)
    first, info = env.reset(seed=np.int64(3))
    assert info["seed"] == 3
    assert np.array_equal(first, env.reset(seed=3)[0])
    vector = LLMSchedVectorEnv(np.int64(2), num_requests=5)
    wanted = vector.reset(seed=[3, 4])[0]
    for seeds in (np.array([3, 4]), [np.int32(3), np.uint64(4)], np.int64(3)):
        assert np.array_equal(vector.reset(seed=seeds)[0], wanted)
    for bad in (np.float64(1.5), np.int64(-1), True, "3"):
        with pytest.raises(ValueError, match="seed: expected a whole number >= 0"):
            env.reset(seed=bad)


def test_rows_are_what_json_takes():
    world = scenario("paper", qps=np.float64(1.5), num_requests=np.int64(5), patience_s=np.float32(60.0))
    json.dumps(row(simulate(world, "slai", np.int64(3))), allow_nan=False)
    numbers = {"seeds": np.int64(1), "first_seed": np.int64(2)}
    rows = evaluate(world, ["slai"], qps=np.array([1.0, 1.5]), **numbers)
    json.dumps(rows, allow_nan=False)
    assert [r["seed"] for r in rows] == [2, 2]
    found = capacity(world, ["slai"], "attainment:0.5", qps=np.array([0.5, 1.0]), **numbers)
    json.dumps([item.to_row() for item in found], allow_nan=False)


def test_folders_of_results_take_numpy_scalars_as_numbers(tmp_path):
    world = scenario("paper", num_requests=5)
    first = evaluate(world, ["slai"], qps=[np.float64(1.0)], seeds=np.int64(1), out=tmp_path / "r")
    assert evaluate(world, ["slai"], qps=[1.0], seeds=1, out=tmp_path / "r") == first


@pytest.mark.parametrize("limit", [np.int64(6500), np.float64(6500)])
def test_numpy_scalars_are_numbers_in_brackets(limit):
    cap = np.float64(0.5)
    for spec in (f"slai[limit={limit},cap={cap}]", f"slai[{limit=},{cap=}]"):
        scheduler = make_scheduler(spec)
        assert (scheduler.settings["limit"], scheduler.settings["cap"]) == (6500, 0.5)
    with pytest.raises(ValueError, match="limit: expected whole number"):
        make_scheduler("slai[limit=6500.5]")
    with pytest.raises(ValueError, match="limit: expected whole number"):
        make_scheduler("slai[limit=inf]")


def test_numpy_scalars_in_folders_and_profiles(tmp_path):
    training = {"steps": np.int64(5), "utility": np.float32(0.5)}
    spec = spec_for(EnvConfig(), {"kind": "constant"}, training=training, decision_s=np.float64(0.0))
    write_folder(tmp_path / "p", spec, {"action": np.zeros(7, np.int64)})
    assert read_folder(tmp_path / "p")[0].training == {"steps": 5, "utility": 0.5}
    profile = load_profile("a100-mistral-7b").scaled(np.float64(2.0))
    profile.to_json(tmp_path / "twice.json")
    assert load_profile(str(tmp_path / "twice.json")).overhead_ms == profile.overhead_ms
    assert type(DeviceSpec("x", np.int64(1), np.float32(1), 1.0).memory_bytes) is int


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"qps_range": (1.0, 2.0), "ttft_class_scales": (1.0, 2.0)},
        {"qps": np.float32(1.5), "num_requests": np.int64(5)},
        {"strict_share": np.array([0.1, 0.2]), "max_episode_steps": 7},
        {"patience_s": math.inf, "render_mode": "ansi"},
    ],
)
def test_a_spec_read_back_from_json_is_equal(fields):
    for env in (
        gym.make("LLMSched-Tenants-v0", **fields),
        gym.make_vec(
            "LLMSched-Tenants-v0",
            num_envs=2,
            vectorization_mode="vector_entry_point",
            **{k: v for k, v in fields.items() if k not in ("render_mode", "max_episode_steps")},
        ),
    ):
        spec = env.unwrapped.spec
        again = EnvSpec.from_json(spec.to_json())
        assert again == spec
        if isinstance(env.unwrapped, LLMSchedEnv):
            assert EnvSpec.from_json(env.spec.to_json()) == env.spec
            assert gym.make(again).unwrapped.config == env.unwrapped.config
    for name in ("LLMSched-v0", "LLMSched-Tenants-v0"):
        assert EnvSpec.from_json(gym.spec(name).to_json()) == gym.spec(name)


def test_arrivals_of_a_trace_need_one():
    with pytest.raises(ValueError, match="trace_arrivals: needs a trace"):
        gym.make("LLMSched-v0", trace_arrivals="keep")


@pytest.mark.parametrize("name", ["LLMSched-v0", "LLMRoute-v0"])
@pytest.mark.parametrize("paid", [None, math.nan, math.inf, "much", np.zeros(2)])
def test_a_reward_that_is_no_number_is_said_at_once(name, paid):
    fields = {"num_requests": 5, "warmup_s": 0.0, "qps": 3.0, "reward": lambda transition: paid}
    env = gym.make(name, disable_env_checker=True, **fields)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="reward: expected a finite number, got"):
        env.step(env.action_space.sample())


class Seen:
    """An observation that answers whatever it is given."""

    space = gym.spaces.Box(0.0, 1.0, (2,), np.float32)

    def __init__(self, answer):
        self.answer = answer

    def observe(self, view):
        return self.answer


@pytest.mark.parametrize("make", [LLMSchedEnv, lambda **fields: LLMSchedVectorEnv(2, **fields), LLMRouteEnv])
def test_an_observation_of_the_users_is_one_of_its_space(make):
    for answer in (None, 0.5, [0.5], [[0.5, 0.5]], [0.5, math.nan], [0.5, 1.5], "ab", [None, 0]):
        with pytest.raises(ValueError, match=r"observation: expected an element of Box\(") as error:
            make(observation=Seen(answer)).reset(seed=0)
        assert "\n" not in str(error.value)
    seen = make(observation=Seen([0, 0.5])).reset(seed=0)[0]
    assert seen.dtype == np.float32 and seen.reshape(-1, 2).tolist() == [[0.0, 0.5]] * (seen.size // 2)


@pytest.mark.parametrize("make", [LLMSchedEnv, lambda **fields: LLMSchedVectorEnv(2, **fields), LLMRouteEnv])
def test_parts_of_an_observation_are_cast_as_a_whole_is(make):
    class Parts(Seen):
        space = gym.spaces.Dict(a=Seen.space, b=gym.spaces.Tuple([gym.spaces.Discrete(3), Seen.space]))

    good = {"a": [0.5, 0], "b": [1, np.ones(2)]}
    seen = make(observation=Parts(good)).reset(seed=0)[0]
    assert seen["a"].dtype == seen["b"][1].dtype == np.float32
    for answer in ({}, {**good, "a": None}, {**good, "b": (1,)}, {**good, "c": 0}, {**good, "a": [0, 0, 0]}, [], "x"):
        with pytest.raises(ValueError, match=r"observation: expected an element of Dict\(") as error:
            make(observation=Parts(answer)).reset(seed=0)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("paid", [1j, np.complex128(1 + 2j), np.ma.masked, np.ma.array(1.0, mask=True)])
def test_a_reward_that_is_complex_or_masked_is_one_line(paid):
    with pytest.raises(ValueError, match=r"^reward: expected a finite number, got"):
        as_reward(paid)
    with pytest.raises(ValueError, match=r"^reward: expected 2 finite numbers, shape"):
        as_rewards(np.ma.array([1.0, 2.0], mask=[False, True]), 2)
    with pytest.raises(ValueError, match=r"^reward: expected 2 finite numbers, shape"):
        as_rewards(np.array([1.0, 2j]), 2)
    assert as_reward(np.ma.array(1.5)) == 1.5 and as_rewards(np.ma.array([1.0, 2.0]), 2).tolist() == [1.0, 2.0]


def test_a_bad_rate_leaves_the_seeds_of_episodes_alone():
    env, twin = LLMSchedEnv(horizon_s=2.0), LLMSchedEnv(horizon_s=2.0)
    for one in (env, twin):
        one.reset(seed=3)
    with pytest.raises(ConfigError, match=r"^qps: expected"):
        env.reset(options={"qps": -1.0})
    assert env.reset()[1]["seed"] == twin.reset()[1]["seed"]
