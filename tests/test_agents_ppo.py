"""Our own PPO: compiled rollouts against torch and the vector environment, advantages, updates, resuming."""

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
pytest.importorskip("tensorboard", reason="tensorboard is not installed")
pytest.importorskip("torch", reason="torch is not installed")

import torch
from gymnasium import spaces

from llmsched_gym.agents.collect import Collector, episode_seed, networks_of
from llmsched_gym.agents.networks import normaliser_of
from llmsched_gym.agents.ppo import Config, Learner, make_collector, make_policy, train
from llmsched_gym.agents.rollout import Rollouts
from llmsched_gym.config import ConfigError
from llmsched_gym.env.vector import LLMSchedVectorEnv
from llmsched_gym.policies import load_policy, read_folder
from llmsched_gym.policies.load import make_policy as policy_of

WORLD = {"horizon_s": 4.0, "qps": 2.0, "warmup_s": 0.0, "drain_s": 30.0, "max_backlog": 8}
TINY = Config(
    num_envs=6, n_steps=32, steps=2304, batch_size=64, epochs=2, action_repeat=2, set=WORLD, hidden=(16, 16), threads=1
)
TINY = replace(TINY, eval_seeds=1, eval_requests=10, eval_every=768, checkpoint_every=576)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def started(config, **changes):
    """Environments at their first observations, and a policy whose decisions and values differ from each other's."""
    collector = make_collector(replace(config, **changes))
    policy = make_policy(config, collector)
    normaliser_of(policy).mean += 0.1
    for parameter in policy.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    collector.start()
    return collector, policy


class SameEpisodes(LLMSchedVectorEnv):
    """The vector environment on the episodes that a collector chooses."""

    def _restart(self, env, seed, options):
        self.begun = getattr(self, "begun", np.zeros(self.num_envs, np.int64))
        super()._restart(env, episode_seed(0, env, int(self.begun[env])), options)
        self.begun[env] += 1


@pytest.mark.parametrize("action", ["knobs", "request"])
def test_a_rollout_is_torchs_policy_in_the_vector_environment(action):
    config = replace(TINY, action=action, n_steps=80)
    collector, policy = started(config)
    networks = networks_of(policy)
    env = SameEpisodes(config.num_envs, config.suite, autoreset_mode="same_step", **config.world())
    seen, num_ended, num_cut = env.reset()[0], 0, 0
    for step in (0, 1):
        b = collector.rollout
        ended = collector.collect(*networks, step)
        features = torch.from_numpy(b.features).flatten(0, 1)
        masks = torch.from_numpy(b.masks).flatten(0, 1) if action == "request" else None
        actions = torch.from_numpy(b.actions).flatten(0, 1)
        told = {} if masks is None else {"action_masks": masks}
        with torch.no_grad():
            values, log_probs, _ = policy.evaluate_actions(
                features, actions if masks is None else actions[:, 0], **told
            )
        assert np.abs(b.log_probs.ravel() - log_probs.numpy()).max() < 1e-5
        assert np.abs(b.values[:, :-1].ravel() - values.numpy()[:, 0]).max() < 1e-5
        assert len(np.unique(b.actions, axis=1)) > 1

        for t in range(config.n_steps):
            assert np.array_equal(b.features[:, t], seen)
            if masks is not None:
                assert np.array_equal(b.masks[:, t], env.action_masks())
                assert b.masks[np.arange(config.num_envs), t, b.actions[:, t, 0]].all()
            given = b.actions[:, t] if action == "knobs" else b.actions[:, t, 0]
            seen, rewards, terminated, truncated, info = env.step(given)
            assert np.array_equal(b.ended[:, t], terminated | truncated)
            for i in np.flatnonzero(terminated | truncated).tolist():
                num_ended += 1
                told = {name: values[i] for name, values in info["final_info"].items()}
                info["discount"][i] = told["discount"]
                if truncated[i]:
                    num_cut += 1
                    with torch.no_grad():
                        last = policy.predict_values(torch.from_numpy(info["final_obs"][i])[None])
                    rewards[i] += told["discount"] * float(last)
            assert np.allclose(b.rewards[:, t], rewards, atol=1e-5)
            assert np.allclose(b.discounts[:, t], info["discount"], rtol=1e-6)
        assert len(ended) == b.ended.sum() and all(0.0 <= e["episode_attainment"] <= 1.0 for e in ended)
    assert action == "request" or (num_ended > 0 and num_cut > 0)


@pytest.mark.parametrize("action", ["knobs", "request"])
def test_the_gradient_is_autograds(action):
    config = replace(TINY, action=action, entropy=0.1)
    collector, policy = started(config)
    collector.collect(*networks_of(policy), 0)
    for parameter in policy.parameters():  # learnt on, so that some ratios are outside the clip range
        parameter.data += 0.1 * torch.randn_like(parameter)
    learner, b = Learner(config, policy, collector.rollout.widths), collector.rollout
    data, rng = learner.data_of(b), np.random.default_rng(0)
    rows = rng.permutation(len(data.returns))[:100]
    advantages = rng.standard_normal(100).astype(np.float32)
    found, sums = learner.gradients(data, list(policy.parameters()), 100, (rows, advantages))

    seen, masks = torch.from_numpy(b.features).flatten(0, 1)[rows], {}
    actions = torch.from_numpy(data.actions[rows])
    if action == "request":
        masks, actions = {"action_masks": data.masks[rows]}, actions[:, 0]
    values, log_probs, entropy = policy.evaluate_actions(seen, actions, **masks)
    ratio, weights = torch.exp(log_probs - torch.from_numpy(data.log_probs[rows])), torch.from_numpy(advantages)
    clipped = ratio.clamp(0.8, 1.2)
    losses = (
        -torch.minimum(weights * ratio, weights * clipped),
        (values[:, 0] - torch.from_numpy(data.returns[rows])) ** 2,
    )
    (losses[0] - 0.1 * entropy + 0.5 * losses[1]).mean().backward()
    for gradient, parameter in zip(found, policy.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, atol=1e-5, rtol=1e-4)
    outside = (ratio != clipped).sum()
    wanted = losses[0].sum(), losses[1].sum(), entropy.sum(), (ratio - 1 - ratio.log()).sum(), outside
    assert sums == pytest.approx([each.item() for each in wanted], rel=1e-3, abs=1e-3) and outside > 0


def same(one, other, rows=slice(None)):
    return all(
        np.array_equal(getattr(one, name)[rows], getattr(other, name))
        for name in one._fields
        if name != "widths" and len(getattr(other, name))
    )


def test_an_environments_rollout_does_not_depend_on_who_collects_the_others():
    whole, policy = started(TINY, num_envs=40)
    networks, fields = networks_of(policy), {"gae_lambda": TINY.gae_lambda, **TINY.world()}
    threads = make_collector(replace(TINY, num_envs=40, threads=3))
    first, second = (Collector(n, "default", 0, 32, first=at, **fields) for n, at in ((23, 0), (17, 23)))
    for other in (threads, first, second):
        other.start()
    for step in range(3):
        for each in (whole, threads, first, second):
            each.collect(*networks, step)
        assert same(whole.rollout, threads.rollout)
        assert same(whole.rollout, first.rollout, slice(23)) and same(whole.rollout, second.rollout, slice(23, 40))
    assert whole.num_episodes.max() > 1
    threads.close()


def test_advantages_are_those_of_the_buffers():
    collector, policy = started(TINY, n_steps=64)
    collector.collect(*networks_of(policy), 0)
    b, box = collector.rollout, spaces.Box(-1, 1, (1,))
    buffer = Rollouts(64, box, box, gae_lambda=TINY.gae_lambda, n_envs=TINY.num_envs)
    starts = np.concatenate([np.zeros((6, 1), bool), b.ended], 1)
    for t in range(64):
        buffer.discounts[t] = b.discounts[:, t]
        value = torch.from_numpy(b.values[:, t].copy())
        buffer.add(np.zeros((6, 1)), np.zeros((6, 1)), b.rewards[:, t], starts[:, t], value, value)
    buffer.compute_returns_and_advantage(torch.from_numpy(b.values[:, -1].copy()), starts[:, -1])
    assert b.ended.any() and np.allclose(buffer.advantages.T, b.advantages, atol=1e-5)


def curve(out):
    lines = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(tmp_path):
    train(replace(TINY, out=str(tmp_path / "whole")))
    broken = replace(TINY, out=str(tmp_path / "broken"))

    def interrupt(step, utility):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, interrupt)
    assert 0 < len(curve(tmp_path / "broken")) < 12
    train(replace(broken, resume=True))
    assert curve(tmp_path / "broken") == curve(tmp_path / "whole") and len(curve(tmp_path / "whole")) == 12
    for mine, theirs in zip(*(read_folder(tmp_path / name / "policy") for name in ("whole", "broken")), strict=True):
        if isinstance(mine, dict):
            assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
    assert load_policy(tmp_path / "whole" / "policy").decision_s > 0.0


def test_threads_and_a_waiting_actor_change_no_figure_that_they_should_not(tmp_path):
    config = replace(TINY, steps=576, eval_every=576, critic_warmup=384)
    for threads in (1, 2):
        train(replace(config, threads=threads, out=str(tmp_path / str(threads))))
    first, second = curve(tmp_path / "1"), curve(tmp_path / "2")
    assert first == second and len(first) == 3
    moved = [line["train/approx_kl"] for line in first]
    assert max(moved[:2]) < 1e-6 < moved[2]


def test_the_folder_decides_as_the_policy(tmp_path):
    from llmsched_gym.agents.export import export

    collector, policy = started(TINY)
    collector.collect(*networks_of(policy), 0)
    exported = policy_of(*export(policy, collector.config))
    seen = collector.rollout.features.reshape(-1, collector.rollout.features.shape[-1])
    wanted = policy.predict(seen, deterministic=True)[0]
    assert all(np.array_equal(exported(features), action) for features, action in zip(seen, wanted, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"set": {"observation": "slots"}}, "observation: expected features for compiled rollouts, got 'slots'"),
        ({"action": "priority"}, "action: expected knobs or preset or request for compiled rollouts, got 'priority'"),
    ],
)
def test_what_is_not_compiled_is_refused_in_one_line(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train(replace(TINY, out=str(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()
