"""Options of our own PPO against noise in advantages, and where an actor starts: by hand, and exact on resuming."""

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
pytest.importorskip("tensorboard", reason="tensorboard is not installed")
pytest.importorskip("torch", reason="torch is not installed")

import torch

from benchmarks import without_teacher
from llmsched_gym.agents.advantages import Advantages, Variant, others_mean
from llmsched_gym.agents.collect import networks_of
from llmsched_gym.agents.options import parse
from llmsched_gym.agents.ppo import Config, Learner, make_collector, make_policy, train
from llmsched_gym.agents.priors import NEVER
from llmsched_gym.agents.run_folder import start_run
from llmsched_gym.config import ConfigError
from llmsched_gym.env.actions.request import CLOSE
from llmsched_gym.env.features import AT
from llmsched_gym.policies import read_folder

WORLD = {"horizon_s": 4.0, "qps": 2.0, "max_backlog": 8, "warmup_s": 0.0, "drain_s": 4.0}
TINY = Config(action="preset", num_envs=8, n_steps=32, steps=1024, batch_size=64, epochs=2, action_repeat=2, set=WORLD)
TINY = replace(TINY, hidden=(16,), threads=1, eval_seeds=1, eval_requests=1, eval_every=512, checkpoint_every=256)
OPTIONS = {
    "group": {"group": 4},
    "shaping": {"shaping": 0.5},
    "average": {"average": True},
    "prior": {"prior": "tuned-constant"},
    "linear prior": {"prior": "tuned-linear", "action": "knobs", "activation": "relu", "hidden": (32,)},
    "work-conserving": {"work_conserving": True, "action": "request"},
    "together": {"group": 2, "shaping": 0.5, "average": True, "prior": "slai"},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def collected(config, num_rollouts=1):
    """A collector after some rollouts of a policy that does not tell all observations apart, and the policy."""
    collector = make_collector(config)
    policy = make_policy(config, collector)
    collector.start()
    for step in range(num_rollouts):
        collector.collect(*networks_of(policy), step)
    return collector, policy


def again(collector, variant, gae_lambda=0.9, *, first=None, cut=None):
    """The advantages of a collector's last rollout by another variant, and its figures."""
    advantages = Advantages(variant, collector.core, gae_lambda)
    first = np.zeros(collector.num_envs, np.int64) if first is None else first
    figures = advantages.learn(collector.rollout, collector.core.arrays.features, cut or {}, first)
    return collector.rollout.advantages.copy(), figures


def test_without_options_the_rollout_is_as_it_was_and_the_same_sums_find_its_advantages():
    collector, _ = collected(replace(TINY, gae_lambda=0.9, set={"horizon_s": 300.0, "qps": 2.0}))
    b = collector.rollout
    assert collector.advantages is None and collector.figures == {}
    assert not b.baselines.any() and not b.ended.any() and np.array_equal(b.paid, b.rewards)
    assert np.allclose(np.exp(-b.durations / 120.0), b.discounts, atol=1e-6)
    assert np.allclose(b.clocks[:, :-1] + b.durations[:, :-1], b.clocks[:, 1:])
    plain = b.advantages.copy()
    assert np.abs(plain).max() > 0.0 and np.allclose(again(collector, Variant())[0], plain, atol=1e-6)


def test_members_of_a_group_have_the_same_requests_and_begin_together():
    collector, policy = collected(replace(TINY, group=4, set={"horizon_s": 12.0, "qps": 2.0}), 0)
    num_ended = 0
    for step in range(12):
        collector.collect(*networks_of(policy), step)
        seeds, clocks = collector.core.seeds.reshape(2, 4), collector.core.engine.state.sims["clock_s"].reshape(2, 4)
        assert len(np.unique(collector.num_episodes[:4])) == len(np.unique(collector.num_episodes[4:])) == 1
        assert (seeds == seeds[:, :1]).all() and seeds[0, 0] != seeds[1, 0]
        for members, ended in zip(clocks, collector.rollout.ended.reshape(2, -1).any(1), strict=True):
            assert not ended or len(set(members)) == 1
            num_ended += ended
    actions = collector.rollout.actions[:4, :, 0]
    assert num_ended > 2 and len(np.unique(actions, axis=0)) == 4


def test_baselines_by_hand():
    clocks = np.array([[0.0, 2.0, 4.0, 1.0], [1.0, 3.0, 0.0, 2.0], [0.0, 1.0, 2.0, 3.0]])
    numbers = np.array([[5, 5, 5, 6], [5, 5, 6, 6], [6, 6, 6, 6]])
    advantages = np.array([[1.0, 3.0, 5.0, 7.0], [10.0, 20.0, 30.0, 50.0], [0.0, 4.0, 8.0, 8.0]], np.float32)
    found, known = others_mean(advantages, clocks, numbers, 3)
    # member 0: at 0 s of episode 5 member 1 has not begun; at 2 s it is half way from 10 to 20; at 4 s it is past it;
    # at 1 s of episode 6 member 1 is half way from 30 to 50, and member 2 has 4; there member 0 itself has 7
    assert known[0].tolist() == [False, True, False, True] and found[0].tolist() == [0.0, 15.0, 0.0, 22.0]
    assert found[1].tolist() == [2.0, 4.0, 0.0, 8.0] and known[1].all()
    assert found[2].tolist() == [30.0, 23.5, 50.0, 0.0] and known[2].tolist() == [True, True, True, False]


def test_a_baseline_depends_on_nothing_that_its_environment_did():
    collector, _ = collected(replace(TINY, group=4, n_steps=64), 2)
    b, rng = collector.rollout, np.random.default_rng(0)
    numbers = np.cumsum(b.ended, 1) - b.ended
    before, known = others_mean(b.advantages, b.clocks, numbers, 4)
    assert known.mean() > 0.2 and collector.figures["advantages/baselined"] > 0.2
    other = b.advantages.copy()
    other[1] = rng.standard_normal(64)
    after, _ = others_mean(other, b.clocks, numbers, 4)
    assert np.array_equal(before[1], after[1]) and not np.array_equal(before[0], after[0])


def test_the_critic_learns_what_the_actors_baseline_leaves_alone():
    collector, policy = collected(replace(TINY, group=4))
    b, learner = collector.rollout, Learner(TINY, policy, collector.rollout.widths)
    assert b.baselines.any()
    returns = learner.data_of(b).returns
    assert np.array_equal(returns, (b.advantages + b.values[:, :-1]).ravel())
    states = []
    for baselines in (b.baselines.copy(), np.zeros_like(b.baselines)):
        b.baselines[...] = baselines
        policy = make_policy(TINY, collector)
        Learner(TINY, policy, b.widths).learn(b, 0)
        states.append(policy.state_dict())
    same = {name: torch.equal(states[0][name], states[1][name]) for name in states[0]}
    assert not same["action_net.weight"]


def test_shaping_telescopes():
    collector, _ = collected(replace(TINY, set={"horizon_s": 300.0, "qps": 2.0, "max_backlog": 32}))
    b, variant = collector.rollout, Variant(shaping=2.0)
    plain, _ = again(collector, Variant(), 1.0)
    shaped, _ = again(collector, variant, 1.0)
    potential = Advantages(variant, collector.core, 1.0).potential
    columns = [AT.waiting_tokens, AT.started_tokens]
    now, last = potential(b.features[..., columns]), potential(collector.core.arrays.features[:, columns])
    left = np.cumprod(b.discounts[:, ::-1], 1)[:, ::-1]  # discount from each decision to the end of the rollout
    assert now.min() < -0.05 * TINY.reward_scale and np.allclose(shaped - plain, left * last[:, None] - now, atol=1e-5)
    tokens = collector.core.engine.state.sims["waiting_tokens"]
    assert tokens.max() > 1000 and np.allclose(
        np.expm1(collector.core.arrays.features[:, AT.waiting_tokens] * np.log1p(1e6)), tokens, rtol=1e-4
    )


def test_shaped_rewards_are_not_logged():
    config = replace(TINY, n_steps=128)
    returns = []
    for shaping in (0.0, 3.0):
        collector = make_collector(replace(config, shaping=shaping))
        policy = make_policy(config, collector)
        collector.start()
        returns.append([episode["r"] for episode in collector.collect(*networks_of(policy), 0)])
    assert len(returns[0]) > 4 and returns[0] == returns[1]


def test_at_truncations_the_potential_is_that_of_what_was_seen_last():
    collector, _ = collected(replace(TINY, n_steps=128))
    b = collector.rollout
    env, t = np.argwhere(b.ended)[0]
    seen = np.zeros(b.features.shape[2], np.float32)
    seen[AT.waiting_tokens] = 0.5
    (without, _), (with_it, _) = (again(collector, Variant(shaping=1.0), cut=cut) for cut in ({}, {(env, t): seen}))
    scale = Advantages(Variant(shaping=1.0), collector.core, 1.0).scale
    assert with_it[env, t] - without[env, t] == pytest.approx(-b.discounts[env, t] * scale * (1e6**0.5), rel=1e-2)
    assert np.array_equal(with_it[env, t + 1 :], without[env, t + 1 :])


def test_average_rewards_are_less_their_mean_per_second():
    collector, _ = collected(replace(TINY, set={"horizon_s": 300.0, "qps": 2.0}))
    b = collector.rollout
    before, figures = again(collector, Variant(average=True), 1.0)
    rate = figures["advantages/reward_per_s"]
    assert rate == pytest.approx(b.paid.sum() / b.durations.sum(), rel=1e-5)
    wanted = (b.paid - rate * b.durations).sum(1) + b.values[:, -1] - b.values[:, 0]
    assert np.allclose(before[:, 0], wanted, atol=1e-5) and abs(b.values[:, :-1].mean()) < 1e-6
    b.values[...] += 7.0  # a critic's constant means nothing
    assert np.allclose(again(collector, Variant(average=True), 1.0)[0], before, atol=1e-4)


def test_a_work_conserving_agent_closes_last():
    config = replace(TINY, action="request", work_conserving=True, entropy=0.1)
    collector, policy = collected(config, 2)
    b, learner = collector.rollout, Learner(config, policy, collector.rollout.widths)
    learner.learn(b, 0)
    collector.collect(*networks_of(policy), 2)
    could = b.masks[..., :CLOSE].any(-1)
    assert 0.0 < could.mean() < 1.0 and np.array_equal(b.actions[..., 0] == CLOSE, ~could)
    assert policy.action_net.bias[CLOSE] == NEVER and not policy.action_net.weight[CLOSE].any()
    mask = np.zeros(CLOSE + 1, bool)
    mask[[3, CLOSE]] = True
    for deterministic in (True, False):
        assert policy.predict(b.features[0, 0], action_masks=mask, deterministic=deterministic)[0] == 3
    plain, _ = collected(replace(config, work_conserving=False), 2)
    assert (plain.rollout.actions[plain.rollout.masks[..., :CLOSE].any(-1)] == CLOSE).any()


def test_agents_with_masks_are_judged_by_both_measures():
    light = {"qps": 1.0, "warmup_s": 0.0}
    config = replace(TINY, action="request", eval_seeds=1, eval_requests=3, set={**TINY.set, **light})
    collector, policy = collected(config, 1)
    assert all(np.isfinite(without_teacher.both(policy, config, collector.config)))


def curve(out):
    lines = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


@pytest.mark.parametrize("name", OPTIONS)
def test_interrupted_trainings_and_more_threads_change_no_figure(name, tmp_path):
    config = replace(TINY, **OPTIONS[name])
    train(replace(config, out=str(tmp_path / "whole"), threads=2))
    broken = replace(config, out=str(tmp_path / "broken"))

    def interrupt(step, utility):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, interrupt)
    train(replace(broken, resume=True))
    whole = curve(tmp_path / "whole")
    assert curve(tmp_path / "broken") == whole and len(whole) == 4
    (_, mine), (_, theirs) = (read_folder(tmp_path / run / "policy") for run in ("whole", "broken"))
    assert all(np.array_equal(mine[key], theirs[key]) for key in mine)


def test_a_warm_start_that_was_interrupted_before_its_first_checkpoint_is_one_still(tmp_path):
    train(replace(TINY, out=str(tmp_path / "source")))
    going_on = replace(TINY, learning_rate=1e-9, warm_start=str(tmp_path / "source"))
    train(replace(going_on, out=str(tmp_path / "whole")))
    broken = replace(going_on, out=str(tmp_path / "broken"))
    start_run(broken)  # and no more
    train(replace(broken, resume=True))
    (_, mine), (_, theirs) = (read_folder(tmp_path / run / "policy") for run in ("whole", "broken"))
    assert all(np.array_equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": 3}, "group: expected a divisor of the 8 environments, got 3"),
        ({"average": True, "set": {"num_requests": 5}}, "average: expected episodes that do not end"),
        ({"work_conserving": True}, "work_conserving: expected --action request, got preset"),
        ({"prior": "slai", "action": "request"}, "prior: expected --action knobs or preset, got request"),
        (
            {"prior": "on-time"},
            "prior: expected a rule with fixed settings, .* such as tuned-linear, got 'on-time'",
        ),
        ({"prior": "sarathi[budget=300]"}, "prior: no preset action does what sarathi.budget=300. does: no preset has"),
        ({"prior": "sarathi[budget=300]", "action": "knobs"}, "no setting of the knob 'token_budget' is 300"),
        ({"prior": "slai", "prior_share": 1.0}, "prior_share: expected a number between 0 and 1, got 1"),
        ({"prior": "slai", "warm_start": "."}, "prior: expected no --warm-start"),
    ],
)
def test_what_makes_no_sense_is_one_line(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        train(replace(TINY, out=str(tmp_path / "run"), **changes))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_options_are_options_of_the_command_line():
    given = ["--group", "4", "--shaping", "0.5", "--average", "--prior", "slai", "--work-conserving"]
    found = parse(Config, given, None)
    assert (found.group, found.shaping, found.average) == (4, 0.5, True)
    assert (found.prior, found.work_conserving) == ("slai", True)
    with pytest.raises(ConfigError, match="--shaping: expected a number >= 0"):
        parse(Config, ["--shaping", "-1"], None)
