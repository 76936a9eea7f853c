"""The order `lpm` of the knobs and their rule of eviction: there with prefix caching, and nowhere else."""

import numpy as np
import pytest

from llmsched_gym.config import EnvConfig, scenario
from llmsched_gym.engine.pack import ORDERS
from llmsched_gym.env import LLMSchedEnv, LLMSchedVectorEnv
from llmsched_gym.env.actions import InvalidAction
from llmsched_gym.env.actions.knobs import KNOBS, ORDER, WITH_CACHING, adapt, knobs_for
from llmsched_gym.env.core import action_space, space_settings
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.policies import load_policy, read_folder, write_folder
from llmsched_gym.policies.bridge import PolicyScheduler, knobs_now
from llmsched_gym.policies.folder import spec_for
from llmsched_gym.scheduler import make_scheduler

LPM = ORDERS.index("lpm")
WORLD = {"qps": 3.0, "num_requests": 60, "warmup_s": 0.0, "workload": "chat", "max_model_len": 32_768}
BY_PREFIX = np.array([0, 0, 0, 0, LPM, 0, 0, 0])
BY_SESSION = np.array([0, 0, 0, 0, 0, 0, 0, 1])


def test_only_prefix_caching_brings_it():
    plain = [len(knob.values) for knob in KNOBS]
    assert plain[ORDER] == LPM == 6
    for refusal in (False, True):
        without, cached = (EnvConfig(allow_refusal=refusal, prefix_caching=c) for c in (False, True))
        assert action_space(without).nvec.tolist() == plain[: 7 + refusal]
        ordered = [n + (i == ORDER) for i, n in enumerate(plain[: 7 + refusal])]
        assert action_space(cached).nvec.tolist() == [*ordered, 2]
        assert knobs_for(cached)[ORDER].label(LPM) == "lpm"
        assert [knobs_for(cached)[-1].label(i) for i in range(2)] == ["lru", "session"]
    assert [a.values for a in KNOBS if a.name != "order"] == [a.values for a in WITH_CACHING[:-1] if a.name != "order"]
    assert space_settings(action_space(EnvConfig(prefix_caching=True)))["prefix_caching"] is True


def test_without_it_is_refused_and_with_it_acted_on():
    for env in (LLMSchedEnv("default"), LLMSchedVectorEnv(2, "default")):
        env.reset(seed=0)
        action = np.broadcast_to(BY_PREFIX[:7], env.action_space.shape)
        with pytest.raises(InvalidAction, match="order: expected the index of a value, 0 to 5, got 6"):
            env.step(action)
    env = LLMSchedEnv("default", prefix_caching=True)
    env.reset(seed=0)
    env.step(BY_PREFIX)
    assert env.core.engine.state.knobs[0].order == LPM
    with pytest.raises(InvalidAction, match="order: expected the index of a value, 0 to 6, got 7"):
        env.step(BY_PREFIX + np.eye(8, dtype=int)[ORDER])
    with pytest.raises(InvalidAction, match="evict: expected the index of a value, 0 to 1, got 2"):
        env.step(2 * BY_SESSION)


@pytest.mark.parametrize("refusal", [False, True])
@pytest.mark.parametrize("evict", [0, 1])
def test_the_last_knob_evicts_and_the_one_before_refuses(refusal, evict):
    env = LLMSchedEnv("default", prefix_caching=True, allow_refusal=refusal)
    env.reset(seed=0)
    env.step(np.array([0] * 7 + [1 - evict] * refusal + [evict]))
    knobs = env.core.engine.state.knobs[0]
    assert (knobs.evict, knobs.refuse) == (evict, (1 - evict) * refusal)


@pytest.mark.parametrize("action, name", [(BY_PREFIX, "sarathi[order=lpm]"), (BY_SESSION, "sarathi[evict=session]")])
def test_the_action_is_the_scheduler(action, name):
    world = scenario("default", prefix_caching=True, **WORLD)
    config = EnvConfig(prefix_caching=True)
    by_action = simulate(world, PolicyScheduler(lambda observation: action, config), 3)
    by_name = simulate(world, name, 3)
    assert np.array_equal(by_action.requests["first_token_s"], by_name.requests["first_token_s"], equal_nan=True)
    env = LLMSchedEnv("default", prefix_caching=True)
    env.reset(seed=0)
    assert knobs_now(make_scheduler(name), env.core.engine, 0, env.config).tolist() == action.tolist()


def test_without_prefix_caching_it_is_first_come_first_served():
    plain, cached = EnvConfig(), EnvConfig(prefix_caching=True)
    assert adapt(BY_PREFIX, cached, plain).tolist() == [0] * 7
    assert adapt(BY_PREFIX, cached, cached).tolist() == BY_PREFIX.tolist()
    assert adapt(BY_SESSION, cached, plain).tolist() == [0] * 7
    assert adapt(np.arange(7) % 2, plain, cached).tolist() == [0, 1, 0, 1, 0, 1, 0, 0]
    refusing = EnvConfig(prefix_caching=True, allow_refusal=True)
    assert adapt(BY_SESSION, cached, refusing).tolist() == [0] * 8 + [1]
    assert adapt(np.array([0] * 8 + [1]), refusing, cached).tolist() == BY_SESSION.tolist()
    with pytest.raises(ValueError, match="it refuses requests"):
        adapt(np.array([0] * 7 + [1, 1]), refusing, cached)
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
    assert load_policy(folder).settings["order"] == LPM and load_policy(folder).settings["evict"] == 0
    folder = write_folder(tmp_path / "q", spec_for(config, {"kind": "constant"}), {"action": BY_SESSION})
    assert load_policy(folder).settings["evict"] == 1
    spec = spec_for(EnvConfig(), {"kind": "constant"})
    assert not spec.config.prefix_caching and spec.action["knobs"]["order"] == list(ORDERS[:LPM])
