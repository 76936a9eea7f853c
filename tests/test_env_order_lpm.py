"""The order `lpm` of the knobs: there with prefix caching, and nowhere else."""

import numpy as np
import pytest

from llmsched_gym.config import EnvConfig, scenario
from llmsched_gym.engine.pack import ORDERS
from llmsched_gym.env import LLMSchedEnv, LLMSchedVectorEnv
from llmsched_gym.env.actions import InvalidAction
from llmsched_gym.env.actions.knobs import KNOBS, ORDER, WITH_CACHING, adapt, knobs_for
from llmsched_gym.env.core import action_space, space_settings
from llmsched_gym.env.policy import PolicyScheduler, knobs_now
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.policies import load_policy, read_folder, write_folder
from llmsched_gym.policies.folder import spec_for
from llmsched_gym.scheduler import make_scheduler

LPM = ORDERS.index("lpm")
WORLD = {"qps": 3.0, "num_requests": 60, "warmup_s": 0.0, "workload": "chat", "max_model_len": 32_768}
BY_PREFIX = np.array([0, 0, 0, 0, LPM, 0, 0])


def test_only_prefix_caching_brings_it():
    plain = [len(knob.values) for knob in KNOBS]
    assert plain[ORDER] == LPM == 6
    for refusal in (False, True):
        without, cached = (EnvConfig(allow_refusal=refusal, prefix_caching=c) for c in (False, True))
        assert action_space(without).nvec.tolist() == plain[: 7 + refusal]
        assert action_space(cached).nvec.tolist() == [n + (i == ORDER) for i, n in enumerate(plain[: 7 + refusal])]
        assert knobs_for(cached)[ORDER].label(LPM) == "lpm"
    assert [a.values for a in KNOBS if a.name != "order"] == [a.values for a in WITH_CACHING if a.name != "order"]
    assert space_settings(action_space(EnvConfig(prefix_caching=True)))["prefix_caching"] is True


def test_without_it_is_refused_and_with_it_acted_on():
    for env in (LLMSchedEnv("default"), LLMSchedVectorEnv(2, "default")):
        env.reset(seed=0)
        action = np.broadcast_to(BY_PREFIX, env.action_space.shape)
        with pytest.raises(InvalidAction, match="order: expected the index of a value, 0 to 5, got 6"):
            env.step(action)
    env = LLMSchedEnv("default", prefix_caching=True)
    env.reset(seed=0)
    env.step(BY_PREFIX)
    assert env.core.engine.state.knobs[0].order == LPM
    with pytest.raises(InvalidAction, match="order: expected the index of a value, 0 to 6, got 7"):
        env.step(BY_PREFIX + np.eye(7, dtype=int)[ORDER])


def test_the_action_is_the_scheduler():
    world = scenario("default", prefix_caching=True, **WORLD)
    config = EnvConfig(prefix_caching=True)
    by_action = simulate(world, PolicyScheduler(lambda observation: BY_PREFIX, config), 3)
    by_name = simulate(world, "sarathi[order=lpm]", 3)
    assert np.array_equal(by_action.requests["first_token_s"], by_name.requests["first_token_s"], equal_nan=True)
    env = LLMSchedEnv("default", prefix_caching=True)
    env.reset(seed=0)
    assert (
        knobs_now(make_scheduler("sarathi[order=lpm]"), env.core.engine, 0, env.config).tolist() == BY_PREFIX.tolist()
    )


def test_without_prefix_caching_it_is_first_come_first_served():
    plain, cached = EnvConfig(), EnvConfig(prefix_caching=True)
    assert adapt(BY_PREFIX, cached, plain).tolist() == [0] * 7
    assert adapt(BY_PREFIX, cached, cached).tolist() == BY_PREFIX.tolist()
    env = LLMSchedEnv("default")
    env.reset(seed=0)
    assert knobs_now(make_scheduler("sarathi[order=lpm]"), env.core.engine, 0, env.config).tolist() == [0] * 7
    world = scenario("default", **WORLD)
    for policy in ("sarathi[order=lpm]", PolicyScheduler(lambda observation: BY_PREFIX, cached)):
        found, wanted = simulate(world, policy, 3), simulate(world, "sarathi", 3)
        assert np.array_equal(found.requests["first_token_s"], wanted.requests["first_token_s"], equal_nan=True)


def test_a_policy_folder_says_whether_it_knows_it(tmp_path):
    config = EnvConfig(prefix_caching=True)
    folder = write_folder(tmp_path / "p", spec_for(config, {"kind": "constant"}), {"action": BY_PREFIX})
    assert read_folder(folder)[0].config.prefix_caching
    assert load_policy(folder).settings["order"] == LPM
    spec = spec_for(EnvConfig(), {"kind": "constant"})
    assert not spec.config.prefix_caching and spec.action["knobs"]["order"] == list(ORDERS[:LPM])
