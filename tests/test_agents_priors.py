"""Rules that an actor of our own PPO starts from: it decides as they do, and by their side at first."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmsched_gym.agents.ppo import Config, begin, make_collector, make_policy, prepared
from llmsched_gym.agents.priors import rule_action
from llmsched_gym.config import ConfigError, EnvConfig, env_config
from llmsched_gym.env.actions import action_of
from llmsched_gym.env.actions.knobs import knobs_for
from llmsched_gym.env.actions.preset import PRESETS
from llmsched_gym.env.features import FEATURES, MIXING, features_of
from llmsched_gym.policies import LoadedPolicy, read_folder, write_folder
from llmsched_gym.policies.folder import spec_for
from llmsched_gym.policies.knob_rules import KnobScores
from llmsched_gym.registry import make_scheduler

WORLD = {"horizon_s": 4.0, "qps": 2.0, "max_backlog": 8, "warmup_s": 0.0, "drain_s": 4.0}
TINY = Config(action="knobs", num_envs=8, n_steps=32, steps=256, batch_size=64, epochs=2, action_repeat=2, set=WORLD)
TINY = replace(TINY, hidden=(48, 32), activation="relu", threads=1, eval_seeds=1, eval_requests=1)
SEEN = ("kv_cache_usage", "num_waiting", "promise_slack", "mean_batch")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def begun(config):
    """An actor before it has learnt anything, and its world."""
    collector = make_collector(config)
    policy = make_policy(config, collector)
    begin(policy, config)
    return policy, collector.config


def shares(policy, world, features):
    """The probabilities of each entry's values, (observations, values) each."""
    with torch.no_grad():
        seen = policy.extract_features(torch.from_numpy(features.astype(np.float32)))
        scores = policy.action_net(policy.mlp_extractor.forward_actor(seen))
    widths = [len(choice.labels) for choice in action_of(world).choices(world)]
    return [part.softmax(1).numpy() for part in torch.split(scores, widths, 1)]


def observations(world, n=300):
    rng = np.random.default_rng(0)
    return rng.choice([0.0, 0.3, 1.0, 2.0], (n, 1)) * rng.normal(0.4, 0.6, (n, len(features_of(world))))


def linear_rule(folder, world, scale=0.4):
    """A policy folder with a linear rule whose scores lie in, beside and beyond 0 to 1."""
    rng, scores = np.random.default_rng(1), KnobScores(knobs_for(world)).num_scores
    spec = spec_for(world, {"kind": "linear"})
    spec = replace(spec, observation={**spec.observation, "features": list(SEEN)})
    tensors = {"weight": rng.normal(0.0, scale, (scores, len(SEEN))), "bias": rng.normal(0.5, 0.3, scores)}
    return str(write_folder(folder, spec, {k: v.astype(np.float32) for k, v in tensors.items()}))


@pytest.mark.parametrize(
    ("action", "rule"), [("preset", "tuned-constant"), ("knobs", "tuned-constant"), ("preset", "slai")]
)
def test_an_actor_starts_from_a_rule(action, rule):
    policy, world = begun(replace(TINY, action=action, prior=rule, prior_share=0.4, activation="tanh"))
    chosen = rule_action(rule, world)
    for part, index in zip(shares(policy, world, observations(world, 5)), chosen, strict=True):
        assert np.allclose(part[:, index], 0.4, atol=0.03)
    assert action == "knobs" or list(PRESETS)[chosen[0]] == rule


@pytest.mark.parametrize("hidden", [(8,), (48,), (32, 16)])
def test_an_actor_decides_as_the_linear_rule_that_it_starts_from(tmp_path, hidden):
    world = env_config("default", action="knobs", **WORLD)
    rule = linear_rule(tmp_path / "rule", world)
    policy, world = begun(replace(TINY, prior=rule, hidden=hidden))
    features, theirs = observations(world), LoadedPolicy(*read_folder(rule))
    wanted = np.array([theirs.policy(row) for row in features.astype(np.float32)])
    found = np.stack([part.argmax(1) for part in shares(policy, world, features)], 1)
    assert (found == wanted).mean() > 0.995  # others are at a tie, as far as float32 tells
    assert all(len(np.unique(column)) > 1 for column in wanted.T)


def test_where_a_linear_rule_says_exactly_a_value_it_has_its_share(tmp_path):
    world = env_config("default", action="knobs", **WORLD)
    knobs = knobs_for(world)
    scores, action = KnobScores(knobs), np.array([4, 3, 5, 1, 2, 1, 4])
    spec = spec_for(world, {"kind": "linear"})
    spec = replace(spec, observation={**spec.observation, "features": list(SEEN)})
    tensors = {"weight": np.zeros((scores.num_scores, len(SEEN))), "bias": scores.scores(action)}
    rule = str(write_folder(tmp_path / "rule", spec, {k: v.astype(np.float32) for k, v in tensors.items()}))
    policy, world = begun(replace(TINY, prior=rule, prior_share=0.7))
    for knob, part, index in zip(knobs, shares(policy, world, observations(world, 3)), action, strict=True):
        by_size = part[0][KnobScores([knob]).ranks[0]]  # of the smallest value first
        top = int(by_size.argmax())
        assert part[0].argmax() == index and by_size[top] == pytest.approx(0.7, abs=0.03), knob.name
        if knob.name != "order":  # beside the rule, the nearer the likelier
            assert np.all(np.diff(by_size[: top + 1]) > 0) and np.all(np.diff(by_size[top:]) < 0)


def test_a_linear_rule_starts_where_there_are_more_knobs():
    config = replace(TINY, suite="agents", prior="tuned-linear", prior_share=0.6)
    config = replace(config, set={**WORLD, "qps": 0.2, "allow_refusal": True}, hidden=(32, 32))
    policy, world = begun(config)
    features, theirs = observations(world), make_scheduler("tuned-linear")
    ours = {choice.name: choice.labels for choice in action_of(world).choices(world)}
    names = [knob.name for knob in knobs_for(theirs.config)]
    wanted = [theirs.policy(row) for row in features[:, : len(FEATURES)].astype(np.float32)]
    found = dict(zip(ours, shares(policy, world, features), strict=True))
    for name, column in zip(names, np.array(wanted).T, strict=True):
        assert (found[name].argmax(1) == column).mean() > 0.99, name  # indices are the same, as `lpm` is the last order
    for name in set(ours) - set(names):
        assert np.allclose(found[name][:, 0], 0.6, atol=1e-5), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "tanh"}, "prior: a linear rule needs --activation relu, .* got tanh"),
        ({"hidden": (64, 29)}, "prior: this linear rule needs hidden layers of at least 30, got 29"),
        ({"action": "preset"}, "prior: expected --action knobs for the linear rule tuned-linear, got preset"),
        ({"prior_share": 0.3}, "prior_share: expected more than 1/3 for a linear rule, got 0.3"),
    ],
)
def test_where_a_linear_rule_does_not_fit_one_line_says_so(changes, message):
    with pytest.raises(ConfigError, match=message):
        prepared(replace(TINY, prior="tuned-linear", **changes))


def test_what_a_rule_cannot_be_is_one_line(tmp_path):
    spec, tensors = make_scheduler("tuned-linear").spec, make_scheduler("tuned-linear").tensors
    seen = [*spec.observation["features"][1:], MIXING.name]
    elsewhere = write_folder(
        tmp_path / "mixing", replace(spec, observation={**spec.observation, "features": seen}), tensors
    )
    steep = write_folder(tmp_path / "steep", spec, {**tensors, "weight": np.float32(3e37) * np.sign(tensors["weight"])})
    for rule, message in (
        (elsewhere, f"prior: .*mixing looks at {MIXING.name}, and observations of this world have no such"),
        (steep, "prior: .*steep has weights that are too large for float32"),
        (tmp_path / "none", "prior: policy '.*none': no such policy folder"),
        ("learned", "prior: expected a rule with fixed settings"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepared(replace(TINY, prior=str(rule)))


def test_a_training_goes_on_without_its_rule(tmp_path):
    world = env_config("default", action="knobs", **WORLD)
    config = replace(TINY, prior=linear_rule(tmp_path / "rule", world))
    _, whole = prepared(config)
    shutil.rmtree(tmp_path / "rule")
    with pytest.raises(ConfigError, match="no such policy folder"):
        prepared(config)
    _, bare = prepared(config, starts=False)  # its weights come from a checkpoint
    assert {*bare.state_dict()} == {*whole.state_dict()}


def test_a_rule_with_knobs_that_the_world_lacks_is_refused(tmp_path):
    rule = linear_rule(tmp_path / "rule", EnvConfig(action="knobs", allow_refusal=True))
    with pytest.raises(ConfigError, match="sets refuse, and actions of this world do not"):
        prepared(replace(TINY, prior=rule))
    cached = linear_rule(tmp_path / "cached", env_config("chat", action="knobs"))
    with pytest.raises(ConfigError, match="chooses from other values of order than"):
        prepared(replace(TINY, prior=cached))
