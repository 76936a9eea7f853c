"""Training: discounts by hand, export, checkpoints, resuming after kills, and that PPO learns."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
pytest.importorskip("tensorboard", reason="tensorboard is not installed")
pytest.importorskip("torch", reason="torch is not installed")

import torch
from gymnasium import spaces
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from llmsched_gym.agents import decision_time
from llmsched_gym.agents.checkpoint import load_checkpoint, save_checkpoint
from llmsched_gym.agents.decision_time import finish, measure_decision_s
from llmsched_gym.agents.envs import TrainingEnv
from llmsched_gym.agents.export import export
from llmsched_gym.agents.options import parse
from llmsched_gym.agents.rollout import Discounts, Rollouts
from llmsched_gym.agents.run_folder import checkpoints, start_run
from llmsched_gym.agents.seeds import TRAINING_SEEDS
from llmsched_gym.agents.train import Config, make_model, normaliser_of, train, typical_features
from llmsched_gym.config import ConfigError, env_config
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.policies import LoadedPolicy, load_policy, read_folder
from llmsched_gym.policies.load import make_policy

TINY = Config(
    steps=2048,
    num_envs=4,
    n_steps=32,
    batch_size=64,
    epochs=2,
    action_repeat=2,
    set={"horizon_s": 20.0, "qps": 1.5, "warmup_s": 0.0, "drain_s": 30.0, "max_backlog": 8},
    hidden=(16,),
    width=8,
    eval_every=512,
    eval_seeds=1,
    eval_requests=10,
    checkpoint_every=256,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_advantages_by_hand():
    box = spaces.Box(-1, 1, (1,))
    buffer = Rollouts(3, box, box, gamma=0.5, gae_lambda=0.5, n_envs=1)
    values, rewards, starts, discounts = [1.0, 2.0, 3.0], [1.0, 0.0, 2.0], [1, 0, 1], [0.9, 0.8, 0.5]
    buffer.reset()
    for step in range(3):
        buffer.discounts[step] = discounts[step]
        tensor = torch.tensor([values[step]])
        buffer.add(
            np.zeros((1, 1)), np.zeros((1, 1)), np.array([rewards[step]]), np.array([starts[step]]), tensor, tensor
        )
    buffer.compute_returns_and_advantage(torch.tensor([4.0]), np.array([False]))
    third = 2.0 + 0.5 * 4.0 - 3.0
    second = 0.0 - 2.0  # an episode ends here: nothing after it counts
    first = (1.0 + 0.9 * 2.0 - 1.0) + 0.9 * 0.5 * second
    assert buffer.advantages[:, 0].tolist() == pytest.approx([first, second, third])
    assert buffer.returns[:, 0].tolist() == pytest.approx([first + 1.0, second + 2.0, third + 3.0])


def test_a_constant_discount_is_sb3s():
    from stable_baselines3.common.buffers import RolloutBuffer

    box, rng = spaces.Box(-1, 1, (1,)), np.random.default_rng(0)
    ours, theirs = (cls(20, box, box, gamma=0.97, gae_lambda=0.9, n_envs=3) for cls in (Rollouts, RolloutBuffer))
    for _ in range(20):
        reward, start, value = rng.standard_normal(3), rng.random(3) < 0.2, torch.from_numpy(rng.standard_normal(3))
        for buffer in (ours, theirs):
            buffer.add(np.zeros((3, 1)), np.zeros((3, 1)), reward, start, value, value)
    last, done = torch.tensor([1.0, 2.0, 3.0]), np.array([True, False, False])
    for buffer in (ours, theirs):
        buffer.compute_returns_and_advantage(last, done)
    assert np.allclose(ours.advantages, theirs.advantages, atol=1e-5)


def test_steps_get_their_own_discount_and_truncation_is_bootstrapped_with_it():
    env = TrainingEnv(4, "default", 0, horizon_s=1.0, qps=1.5, action_repeat=2)
    model = make_model(replace(TINY, n_steps=64), env)
    _, callback = model._setup_learn(10_000, Discounts(per_second=True))
    seen = []
    original = env.step_wait

    def recorded():
        result = original()
        cut = [i for i, info in enumerate(result[3]) if info.get("TimeLimit.truncated")]
        seen.append(([info["duration_s"] for info in result[3]], result[1].copy(), cut, [dict(i) for i in result[3]]))
        return result

    env.step_wait = recorded
    model.collect_rollouts(env, callback, model.rollout_buffer, 64)
    buffer, num_cut = model.rollout_buffer, 0
    assert np.allclose(buffer.discounts, np.exp(-np.array([s[0] for s in seen]) / 120.0), rtol=1e-6)
    assert buffer.discounts.std() > 0
    for step, (_, rewards, cut, infos) in enumerate(seen):
        for i in range(4):
            expected = rewards[i]
            if i in cut:
                last = torch.from_numpy(infos[i]["terminal_observation"])[None]
                expected += buffer.discounts[step, i] * float(model.policy.predict_values(last).detach())
                num_cut += 1
            assert buffer.rewards[step, i] == pytest.approx(expected, abs=1e-5)
    assert num_cut > 0


def test_episodes_come_from_training_seeds_and_the_state_can_be_put_back():
    fields = {"horizon_s": 3.0, "action_repeat": 2}
    first, second = TrainingEnv(3, "drift", 5, **fields), TrainingEnv(3, "drift", 5, **fields)
    first.reset()
    action, rng = first.action_space, np.random.default_rng(0)
    actions = [np.stack([rng.integers(action.nvec) for _ in range(3)]) for _ in range(120)]
    for a in actions[:50]:
        first.step(a)
    second.reset()
    second.restore(first.save())
    for a in actions[50:]:
        x, y = first.step(a), second.step(a)
        assert np.array_equal(x[0], y[0]) and np.array_equal(x[1], y[1]) and np.array_equal(x[2], y[2])
        assert all(t.seed in TRAINING_SEEDS for t in first.env.core.tables)


WORLDS = [
    ("features", "knobs"),
    ("slots", "knobs"),
    ("slots", "priority"),
    ("slots", "request"),
    ("features", "request"),
]


@pytest.mark.parametrize(("observation", "action"), WORLDS)
def test_numpy_decides_like_torch(observation, action, tmp_path, monkeypatch):
    quick = partial(measure_decision_s, decisions=50)  # one by requests asks the network 65 times
    monkeypatch.setattr(decision_time, "measure_decision_s", quick)
    algorithm = "maskable" if action == "request" else "ppo"
    config = replace(TINY, observation=observation, action=action, algorithm=algorithm, layers=2)
    env = TrainingEnv(8, "default", 0, **{**config.world(), "qps": 2.0})
    model = make_model(config, env)
    normaliser_of(model.policy).fit(typical_features(env, 0, steps=50))
    for parameter in model.policy.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    spec, tensors = export(model.policy, env.env.config)
    folder = finish(tmp_path / "p", spec, tensors)
    spec, tensors = read_folder(folder)
    policy, rng = make_policy(spec, tensors), np.random.default_rng(0)

    observations, compared = env.reset(), 0
    for _ in range(60):
        masks = env.action_masks() if action != "priority" else None
        stacked = observations if isinstance(observations, dict) else {"": observations}
        batch = {k: torch.from_numpy(v) for k, v in stacked.items()}
        extra = {"action_masks": masks} if action == "request" else {}
        with torch.no_grad():
            distribution = model.policy.get_distribution(batch.get("", batch), **extra)
        wanted = distribution.mode().numpy()
        for i in range(8):
            one = {k: v[i] for k, v in stacked.items()}
            got = policy(one.get("", one), *([masks[i]] if action == "request" else []))
            if action == "priority":
                used = int(one["in_use"].sum())
                assert np.allclose(got[:used], np.clip(wanted[i][:used], -1, 1), atol=1e-5)
            else:
                assert np.array_equal(got, wanted[i])
            compared += 1
        if action == "request":
            step = np.array([rng.choice(np.flatnonzero(m)) for m in masks])
        else:
            step = np.stack([env.action_space.sample() for _ in range(8)])
        observations = env.step(step)[0]
    assert compared == 480
    measured = quick(load_policy(folder))
    assert 0 < measured["p50_s"] <= measured["p99_s"] < 0.5
    assert load_policy(folder).decision_s > 0


def test_outputs_are_torchs_within_1e_5():
    from llmsched_gym.policies.networks import Mlp

    env = TrainingEnv(8, "default", 0, **TINY.world())
    model = make_model(replace(TINY, hidden=(64, 64)), env)
    seen = typical_features(env, 0, steps=20)
    normaliser_of(model.policy).fit(seen)
    spec, tensors = export(model.policy, env.env.config)
    mlp = Mlp(spec.architecture, tensors, seen.shape[1], len(tensors["out.bias"]))
    with torch.no_grad():
        latent = model.policy.mlp_extractor.forward_actor(model.policy.extract_features(torch.from_numpy(seen)))
        wanted = model.policy.action_net(latent).numpy()
    assert max(np.abs(mlp(x) - y).max() for x, y in zip(seen, wanted, strict=True)) < 1e-5


def test_a_checkpoint_cut_in_half_is_passed_over(tmp_path):
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, {"step": step, "x": np.arange(step), "y": [1, {"z": torch.ones(2)}]})
    newest, before = checkpoints(tmp_path)
    assert load_checkpoint(tmp_path)["step"] == 30
    for damage in (lambda d: d[: len(d) // 2], lambda d: b"", lambda d: d[:-1] + bytes([d[-1] ^ 1])):
        data = newest.read_bytes()
        newest.write_bytes(damage(data))
        with pytest.warns(UserWarning, match="damaged checkpoint, using the one before"):
            found = load_checkpoint(tmp_path)
        assert found["step"] == 20 and np.array_equal(found["x"], np.arange(20))
        newest.write_bytes(data)
    before.unlink()
    newest.write_bytes(b"")
    with pytest.warns(UserWarning):
        assert load_checkpoint(tmp_path) is None


def curve(out):
    lines = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def events(folder):
    """(tag, step) of all TensorBoard events in all files of a run, sorted; twice what was logged twice."""
    files = sorted((folder / "tensorboard").glob("events.out.tfevents.*"))
    logged = (event for file in files for event in EventFileLoader(str(file)).Load())
    return sorted((value.tag, event.step) for event in logged for value in event.summary.value)


@pytest.mark.parametrize(("observation", "action", "most"), [("features", "knobs", 3), ("slots", "knobs", 1)])
def test_killed_and_resumed_is_the_unbroken_run(tmp_path, observation, action, most):
    algorithm = "maskable" if action == "request" else "ppo"
    config = replace(TINY, observation=observation, action=action, algorithm=algorithm, seed=3)
    if observation == "slots":
        config = replace(config, steps=512, eval_every=256, checkpoint_every=128)
    start = time.perf_counter()
    train(replace(config, out=str(tmp_path / "whole")))
    took_s = time.perf_counter() - start

    context, rng, out = (
        multiprocessing.get_context("forkserver"),
        random.Random(os.getpid()),
        tmp_path / "broken",
    )  # any moment
    context.set_forkserver_preload(["llmsched_gym.agents.train"])
    broken, kills = replace(config, out=str(out)), 0
    while True:
        resumes = (out / "config.json").exists()
        process = context.Process(target=train, args=(replace(broken, resume=resumes),))
        process.start()
        process.join(timeout=(0.5 + rng.random() * took_s) if kills < most else 300)
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        if kills == most and checkpoints(out):
            newest = checkpoints(out)[0]
            newest.write_bytes(newest.read_bytes()[:1000])  # as if the disk had filled up
    assert process.exitcode == 0
    assert curve(out) == curve(tmp_path / "whole")
    assert events(out) == events(tmp_path / "whole")
    for ours, theirs in zip(read_folder(out / "best"), read_folder(tmp_path / "whole" / "best"), strict=True):
        if isinstance(ours, dict):
            assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert isinstance(load_policy(out / "policy"), LoadedPolicy)


def test_a_warm_start_that_was_interrupted_before_its_first_checkpoint_is_one_still(tmp_path):
    config = replace(TINY, steps=128, eval_every=128)
    train(replace(config, out=str(tmp_path / "source")))
    whole, broken = (
        replace(config, warm_start=str(tmp_path / "source"), out=str(tmp_path / name)) for name in ("whole", "broken")
    )
    train(whole)
    start_run(broken)  # and no more
    train(replace(broken, resume=True))
    (_, mine), (_, theirs) = (read_folder(tmp_path / name / "policy") for name in ("whole", "broken"))
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)


def test_what_a_user_gets_wrong(tmp_path):
    with pytest.raises(ConfigError, match="nothing to resume"):
        train(Config(out=str(tmp_path / "none"), resume=True))
    with pytest.raises(ConfigError, match="warm_start: /no/dir: no such file or folder"):
        train(replace(TINY, out=str(tmp_path / "none"), warm_start="/no/dir"))
    for junk in (b"", b"junk\n", b"PK", b"\x80\x02.", b"(dp0\n."):
        (tmp_path / "junk").write_bytes(junk)
        with pytest.raises(ConfigError, match=r"^warm_start: .*junk: expected a run, a policy folder"):
            train(replace(TINY, out=str(tmp_path / "none"), warm_start=str(tmp_path / "junk")))
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match="maskable"):
        train(Config(out=str(tmp_path / "a"), action="request"))
    with pytest.raises(ConfigError, match="did you mean"):
        train(Config(out=str(tmp_path / "b"), set={"qpss": 1}))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="--resume"):
        train(Config(out=str(tmp_path / "c")))
    for text, match in {
        "{": "cannot be read",
        "[]": "something else's",
        '{"kind": "linear"}': "something else's",
    }.items():
        (tmp_path / "c" / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=match):
            train(Config(out=str(tmp_path / "c"), resume=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "-1"], "--seed: expected a whole number >= 0, got -1"),
        (["--seed", "1e30"], "--seed: expected a whole number <= 2,147,483,647"),
        (["--threads", "100000"], "--threads: expected a whole number <= 1,024, got 100000"),
        (["--hidden", "64,0"], "--hidden: expected whole numbers from 1 to 16,384, got 64,0"),
        (["--critic-warmup", "-5"], "--critic-warmup: expected a whole number >= 0, got -5"),
        (["--learning-rate", "inf"], "--learning-rate: expected a number <= 1e\\+12, got inf"),
        (["--tau-s", "inf"], "--tau-s: expected a number <= 1e\\+12, got inf"),
    ],
)
def test_numbers_that_no_option_can_mean(options, message):
    with pytest.raises(ConfigError, match=message):
        parse(Config, options, None)


def test_weights_that_are_no_numbers_any_more_end_a_training_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match="learning_rate: the weights are no numbers after 64 decisions"):
        train(replace(TINY, out=str(tmp_path / "a"), learning_rate=1e30, num_envs=4, n_steps=16, steps=128))


def test_the_same_seed_gives_the_same_curve(tmp_path):
    short = replace(TINY, steps=256)
    for name in ("a", "b"):
        train(replace(short, out=str(tmp_path / name)))
        shutil.rmtree(tmp_path / name / "tensorboard")
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(replace(short, seed=1, out=str(tmp_path / "c")))
    assert curve(tmp_path / "a") != curve(tmp_path / "c")


def test_ppo_finds_the_best_constant_of_a_small_instance(tmp_path):
    """All users strict, time to the first token of no matter: small batches make every deadline, large ones none."""
    world = {"qps": 1.0, "strict_share": 1.0, "ttft_slo_s": 5.0, "warmup_s": 0.0, "jitter": 0.0}
    config = Config(
        out=str(tmp_path / "run"),
        steps=90_000,
        num_envs=64,
        n_steps=32,
        batch_size=512,
        learning_rate=2e-3,
        entropy=0.0,
        tau_s=10.0,
        gae_lambda=0.95,
        reward_scale=0.1,
        hidden=(32,),
        set={**world, "horizon_s": 30.0, "max_backlog": 4},
        eval_every=10**9,
        eval_requests=50,
        checkpoint_every=10**9,
    )

    def utility(policy):
        scenario = env_config("default", num_requests=50, **world)
        return np.mean([row(simulate(scenario, policy, seed))["mean_utility"] for seed in range(2000, 2004)])

    assert utility("sarathi[budget=256]") == 1.0  # nothing is better
    assert utility("sarathi[budget=8192]") < 0.2
    env = TrainingEnv(2, "default", 0, **config.world())
    untrained = LoadedPolicy(*export(make_model(config, env).policy, env.env.config))
    learned = utility(str(train(config)))
    assert learned > max(0.85, utility(untrained) + 0.1)
