"""The price of mixing as a feature: where it exists, what it says, and who sees it."""

import gymnasium as gym
import numpy as np
import pytest

from llmsched_gym.config import EnvConfig, env_config, scenario
from llmsched_gym.cost import load_profile
from llmsched_gym.engine.mixing import price_of_mixing
from llmsched_gym.engine.state import lane_of
from llmsched_gym.env import LLMSchedEnv, LLMSchedVectorEnv, kernels
from llmsched_gym.env.arrays import handle_of
from llmsched_gym.env.core import make_arrays
from llmsched_gym.env.features import FEATURES, MIXING, MIXING_TOKENS
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.policies import PolicySpec, load_policy, read_folder, write_folder
from llmsched_gym.policies.bridge import PolicyScheduler, SchedulerPolicy
from llmsched_gym.policies.folder import spec_for
from llmsched_gym.scheduler import PolicyError
from tests.test_policies import edit, mlp_folder, mlp_tensors

WITH_MIXING = (*FEATURES, MIXING)
SURFACE = "rtx4090-llama-3.1-8b-vllm"
WORLD = {"qps": 2.5, "num_requests": 80, "warmup_s": 0.0, "num_kv_blocks": 6000}


def test_it_exists_where_the_schedulers_profile_has_a_surface():
    names = [f.name for f in FEATURES]
    for executing, own, wanted in [
        ("rtx6000ada-mistral-7b", None, names),
        (SURFACE, None, [*names, "price_of_mixing"]),
        (SURFACE, "rtx6000ada-mistral-7b", names),
        ("rtx6000ada-mistral-7b", SURFACE, [*names, "price_of_mixing"]),
    ]:
        fields = {"profile": executing, "scheduler_profile": own}
        for env in (LLMSchedEnv(**fields), LLMSchedVectorEnv(2, **fields)):
            assert env.feature_names == wanted
            assert env.observation_space.shape[-1] == len(wanted)
        rows = LLMSchedEnv(observation="slots", **fields)
        assert rows.observation_space["features"].shape == (len(wanted),)
        assert rows.reset(seed=0)[0] in rows.observation_space


def test_the_others_are_what_they_are_without_it():
    env = LLMSchedEnv(profile=SURFACE, **WORLD)
    arrays = make_arrays(env.config, 1, len(FEATURES))
    handle = handle_of(arrays)
    env.reset(seed=2)
    for _ in range(60):
        observation = env.step(np.zeros(7, np.int64))[0]
        kernels.observe_env(env.core.engine.handle, handle, 0)
        assert np.array_equal(arrays.features[0], observation[:-1])


def test_it_says_what_the_rule_goes_by_and_stays_within_its_bounds():
    env = LLMSchedEnv(profile=SURFACE, **WORLD)
    env.action_space.seed(1)
    observation, _ = env.reset(seed=1)
    device, prices = load_profile(SURFACE), []
    for _ in range(300):
        lane, view = lane_of(env.core.engine.state, 0), env.core.engine.view()
        contexts = [int(r.num_computed_tokens) + 1 for r in view.decodes]
        prompts = sum(int(r.prefill_tokens - r.num_computed_tokens) for r in (*view.waiting, *view.prefills))
        wanted, chunk = 0.0, min(MIXING_TOKENS, prompts)
        if contexts and chunk:
            apart = device.predict_s([(0, chunk)], []) + device.predict_s([], contexts)
            wanted = device.predict_s([(0, chunk)], contexts) / apart
        assert price_of_mixing(lane, MIXING_TOKENS) == pytest.approx(wanted, rel=1e-9)
        assert observation[-1] == pytest.approx(min(1.0, wanted / 2), rel=1e-6)
        assert observation in env.observation_space
        prices.append(wanted)
        observation, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            break
    assert min(prices) == 0.0 and max(prices) > 0.9


def test_it_does_not_depend_on_the_batch_before():
    """Neither the knobs nor the room of the last batch, which actions set, are in it."""
    env = LLMSchedEnv(profile=SURFACE, **WORLD)
    observation, _ = env.reset(seed=4)
    while observation[-1] == 0.0:
        observation = env.step(np.zeros(7, np.int64))[0]
    state = env.core.engine.state
    state.knobs[0]["token_budget"], state.knobs[0]["cap"], state.batches[0]["token_room"] = 128, 0.5, 1
    env.core.observe(0)
    assert env.core.observation(0)[-1] == observation[-1]


def sensitive(path, weight=40.0, mean=0.4):
    """A folder whose knobs hang on the price of mixing."""
    folder = mlp_folder(path, seed=6, profile=SURFACE)
    spec, tensors = read_folder(folder)
    tensors["normalise.mean"][-1], tensors["normalise.scale"][-1] = mean, 1.0
    tensors["hidden.0.weight"][:, -1] *= weight
    return write_folder(folder, spec, tensors)


@pytest.mark.parametrize("profile", [SURFACE, "rtx6000ada-mistral-7b"])
@pytest.mark.parametrize("sees", [True, False])
def test_every_path_takes_the_same_decisions(tmp_path, profile, sees):
    folder = sensitive(tmp_path / "p") if sees else mlp_folder(tmp_path / "p", seed=6)
    world = scenario("default", profile=profile, **WORLD)
    compiled = simulate(world, str(folder), 5, num_steps=20_000)
    stepped = load_policy(folder)
    stepped.network = None
    assert np.array_equal(simulate(world, stepped, 5, num_steps=20_000).steps, compiled.steps)
    assert len(set(compiled.steps["prefill_tokens"].tolist())) > 3

    # in the environment, by its own observations, whatever they have of it, and as an agent
    wanted = compiled.requests["first_token_s"]
    for how in ("agent", "by hand"):
        env = LLMSchedEnv("default", profile=profile, **WORLD)
        observation, _ = env.reset(seed=5)
        agent, done = SchedulerPolicy(env, f"{folder}"), False
        policy = load_policy(folder)
        env.core.engine.state.sims[0].decision_s = policy.decision_s
        while not done:
            out = agent.step() if how == "agent" else env.step(policy.policy(observation))
            observation, done = out[0], out[2] or out[3]
        served = env.core.engine.state.requests[0][: len(wanted)]["first_token_s"]
        assert np.array_equal(served, wanted, equal_nan=True), how


def test_numpys_layers_see_it_too(tmp_path):
    """Priorities do not run in compiled code."""
    config = EnvConfig(action="priority", profile=SURFACE)
    spec = spec_for(config, {"kind": "mlp", "layers": 1, "activation": "relu"})
    tensors = mlp_tensors(np.random.default_rng(2), outputs=64, inputs=len(WITH_MIXING))
    tensors["hidden.0.weight"][:, -1] *= 10.0
    policy = load_policy(write_folder(tmp_path / "p", spec, tensors))
    x = np.random.default_rng(3).random(len(WITH_MIXING)).astype(np.float32)
    without = np.append(x[:-1], np.float32(0))
    assert np.array_equal(policy.policy(x[:-1]), policy.policy(without))
    assert not np.array_equal(policy.policy(x), policy.policy(without))
    for profile in (SURFACE, "rtx6000ada-mistral-7b"):
        assert simulate(scenario("default", profile=profile, **WORLD), policy, 2).sim.num_finished > 0


def test_where_there_is_no_surface_it_is_nothing(tmp_path):
    folders = [str(sensitive(tmp_path / str(weight), weight, mean=0.0)) for weight in (40.0, -7.0)]
    for profile, same in (("rtx6000ada-mistral-7b", True), (SURFACE, False)):
        world = scenario("default", profile=profile, **WORLD)
        first, second = (simulate(world, folder, 1, num_steps=20_000).steps for folder in folders)
        assert np.array_equal(first, second) == same


def test_a_function_sees_what_its_configuration_has():
    for profile, width in ((SURFACE, len(WITH_MIXING)), ("rtx6000ada-mistral-7b", len(FEATURES))):
        seen = []

        def policy(observation, seen=seen):
            seen.append(observation)
            return np.zeros(7, np.int64)

        config = env_config("default", profile=profile, **WORLD)
        simulate(config, PolicyScheduler(policy, config), 0)
        assert {x.shape for x in seen} == {(width,)}
        assert (np.stack(seen)[:, -1] > 0.4).any()


def test_other_names_stay_errors(tmp_path):
    folder = mlp_folder(tmp_path / "p", profile=SURFACE)
    assert read_folder(folder)[0].observation["features"][-1] == MIXING.name
    edit(folder, lambda spec: spec["observation"]["features"].append("price_of_tea"))
    with pytest.raises(PolicyError, match="this version has no 'price_of_tea'"):
        load_policy(folder)
    edit(folder, lambda spec: spec["observation"].update(features=[f.name for f in FEATURES]))
    with pytest.raises(PolicyError, match=r"policy.safetensors: normalise.mean: expected shape \(58,\)"):
        load_policy(folder)


def test_the_vector_environment_has_the_single_ones():
    fields = {"profile": SURFACE, **WORLD}
    vector = gym.make_vec("LLMSched-v0", num_envs=2, **fields)
    singles = [LLMSchedEnv(**fields) for _ in range(2)]
    seen, _ = vector.reset(seed=7)
    own = [env.reset(seed=7 + i)[0] for i, env in enumerate(singles)]
    for _ in range(60):
        assert np.array_equal(seen, np.stack(own))
        seen = vector.step(np.zeros((2, 7), np.int64))[0]
        own = [env.step(np.zeros(7, np.int64))[0] for env in singles]


def test_a_spec_names_what_it_was_made_for():
    assert isinstance(spec := spec_for(EnvConfig(profile=SURFACE), {"kind": "constant"}), PolicySpec)
    assert spec.observation["features"] == [f.name for f in WITH_MIXING]
    assert spec_for(EnvConfig(), {"kind": "constant"}).observation["features"] == [f.name for f in FEATURES]
