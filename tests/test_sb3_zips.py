"""SB3's zips as policies: what was true in training is true in evaluation, or is refused in one line."""

import json
import pickle
import subprocess
import sys
import warnings
import zipfile

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")

from sb3_contrib import ARS, QRDQN, TQC, TRPO, CrossQ, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from llmsched_gym.agents import export
from llmsched_gym.config import scenario
from llmsched_gym.env import LLMSchedEnv
from llmsched_gym.env.core import space_settings
from llmsched_gym.env.sb3 import LLMSchedVecEnv
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.policies import read_folder
from llmsched_gym.scheduler import PolicyError, make_scheduler

WORLD = {"num_requests": 12, "qps": 2.0, "warmup_s": 0.0, "drain_s": 5.0}  # the untrained may close batches for ever
ON_POLICY = {"n_steps": 16, "batch_size": 16}


def train(path, cls, policy="MlpPolicy", env=None, steps=32, settings=None, **fields):
    env = env or DummyVecEnv([lambda: LLMSchedEnv(horizon_s=5.0, **fields)])
    if settings is None:
        settings = {"buffer_size": 100} if cls in (DQN, QRDQN, SAC, TD3, DDPG, TQC, CrossQ) else {}
        settings = ON_POLICY if cls in (PPO, MaskablePPO, RecurrentPPO, TRPO) else settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kwargs = {} if cls is ARS else {"policy_kwargs": {"net_arch": [8]}}
        model = cls(policy, env, device="cpu", seed=0, **settings, **kwargs)
        if cls is not ARS:
            model.learn(steps)
    model.save(path)
    return model


def zipped(path, **options):
    return f"{path}[{','.join(f'{k}={v}' for k, v in {'allow_pickle': 'true', **options}.items())}]"


def first_tokens(policy):
    return simulate(scenario("default", **WORLD), policy, 3).requests["first_token_s"]


def driven(act, **fields):
    """First token times when `act(observation, start, mask)` steps the environment itself."""
    env = LLMSchedEnv(**WORLD, **fields)
    seen, _ = env.reset(seed=3)
    start, done = True, False
    while not done:
        mask = env.action_masks() if env.config.action == "request" else None
        seen, _, terminated, truncated, _ = env.step(act(seen, start, mask))
        start, done = False, terminated or truncated
    return env.core.engine.state.requests[0][: len(env.core.tables[0])]["first_token_s"]


def same(a, b):
    return np.array_equal(a, b, equal_nan=True)


@pytest.mark.parametrize(
    ("cls", "action"),
    [
        (PPO, "knobs"),
        (A2C, "knobs"),
        (TRPO, "knobs"),
        (MaskablePPO, "request"),
        (MaskablePPO, "knobs"),
        (DQN, "request"),
        (QRDQN, "request"),
        (PPO, "priority"),
        (SAC, "priority"),
        (TD3, "priority"),
        (DDPG, "priority"),
        (TQC, "priority"),
        (CrossQ, "priority"),
        (ARS, "priority"),
    ],
)
def test_every_algorithm_decides_as_it_does_in_its_environment(tmp_path, cls, action):
    fields = {"action": action} | ({"token_budget": 256} if action != "knobs" else {"action_repeat": 4})
    model = train(tmp_path / "m.zip", cls, **fields)

    def act(seen, start, mask):
        extra = {"action_masks": mask} if cls is MaskablePPO and mask is not None else {}
        return model.predict(seen, deterministic=True, **extra)[0]

    scheduler = make_scheduler(zipped(tmp_path / "m.zip"))
    assert {name: getattr(scheduler.config, name) for name in fields} == fields
    assert same(first_tokens(zipped(tmp_path / "m.zip")), driven(act, **fields))


def test_the_repetition_of_actions_is_in_the_zip(tmp_path):
    for i, env in enumerate(
        (
            LLMSchedVecEnv(2, horizon_s=5.0, action_repeat=4),
            DummyVecEnv([lambda: gym.make("LLMSched-v0", horizon_s=5.0, action_repeat=4)]),
            SubprocVecEnv([lambda: LLMSchedEnv(horizon_s=5.0, action_repeat=4)], start_method="spawn"),
        )
    ):
        train(tmp_path / f"{i}.zip", PPO, env=env)
        assert make_scheduler(zipped(tmp_path / f"{i}.zip")).config.action_repeat == 4
        assert make_scheduler(zipped(tmp_path / f"{i}.zip", repeat=2)).config.action_repeat == 2
        env.close()


def test_a_zip_that_does_not_say_is_asked_about(tmp_path):
    env = LLMSchedVecEnv(1, horizon_s=5.0)
    vars(env.action_space).pop("llmsched")
    train(tmp_path / "m.zip", PPO, env=env)
    with pytest.raises(PolicyError, match=r"repeat: the zip does not say .* action_repeat .*: say repeat=N") as error:
        make_scheduler(zipped(tmp_path / "m.zip"))
    assert "\n" not in str(error.value)
    assert make_scheduler(zipped(tmp_path / "m.zip", repeat=3)).config.action_repeat == 3
    for bad in ("0", "1.5", "x"):
        with pytest.raises(PolicyError, match="repeat: expected a whole number"):
            make_scheduler(zipped(tmp_path / "m.zip", repeat=bad))
    assert space_settings(gym.spaces.Discrete(3)) == {}


def test_a_recurrent_policy_keeps_its_state_within_a_run(tmp_path):
    model = train(tmp_path / "m.zip", RecurrentPPO, "MlpLstmPolicy", action_repeat=2, steps=64)
    held = {"state": None}

    def remembers(seen, start, mask):
        action, held["state"] = model.predict(
            seen, state=None if start else held["state"], episode_start=np.array([start]), deterministic=True
        )
        return action

    policy = make_scheduler(zipped(tmp_path / "m.zip"))
    expected = driven(remembers, action_repeat=2)
    assert same(first_tokens(policy), expected)
    assert same(first_tokens(policy), expected)  # the next run starts anew
    # the state matters: the same observation, seen again, is another input
    predictor, seen = policy.policy, np.full(model.observation_space.shape, 0.5, np.float32)
    predictor.reset()
    predictor(seen)
    first = [np.array(part) for part in predictor._state]
    predictor(seen)
    assert not np.allclose(first[0], predictor._state[0])


@pytest.fixture(scope="module")
def normalised(tmp_path_factory):
    """A model trained under VecNormalize, its statistics beside it, and the model."""
    folder = tmp_path_factory.mktemp("normalised")
    env = VecNormalize(LLMSchedVecEnv(4, horizon_s=20.0, action_repeat=2))
    model = train(folder / "m.zip", PPO, env=env, steps=512, settings={"n_steps": 64})
    env.save(folder / "vecnormalize.pkl")
    return folder, model, env


def test_statistics_of_vecnormalize_are_used(normalised, tmp_path):
    folder, model, env = normalised
    env.training = False

    def act(seen, start, mask):
        return model.predict(env.normalize_obs(seen), deterministic=True)[0]

    expected = driven(act, action_repeat=2)
    assert same(first_tokens(zipped(folder / "m.zip")), expected)
    assert not same(first_tokens(zipped(folder / "m.zip", vecnormalize="none")), expected)
    moved = tmp_path / "other.zip"
    moved.write_bytes((folder / "m.zip").read_bytes())
    with pytest.raises(PolicyError, match="vecnormalize: it was trained on normalised observations") as error:
        make_scheduler(zipped(moved))
    assert "\n" not in str(error.value)
    assert same(first_tokens(zipped(moved, vecnormalize=folder / "vecnormalize.pkl")), expected)
    (tmp_path / "other_vecnormalize.pkl").write_bytes((folder / "vecnormalize.pkl").read_bytes())
    assert same(first_tokens(zipped(moved)), expected)


def test_statistics_that_cannot_be_honoured(normalised, tmp_path):
    folder, _, _ = normalised
    train(tmp_path / "m.zip", PPO)
    (tmp_path / "vecnormalize.pkl").write_bytes((folder / "vecnormalize.pkl").read_bytes())
    with pytest.raises(PolicyError, match="lies beside it, and its last observation was not normalised"):
        make_scheduler(zipped(tmp_path / "m.zip"))
    make_scheduler(zipped(tmp_path / "m.zip", vecnormalize="none"))
    slots = VecNormalize(LLMSchedVecEnv(1, observation="slots", horizon_s=5.0), norm_obs_keys=["features"])
    slots.save(tmp_path / "slots.pkl")
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1]))
    (tmp_path / "text.pkl").write_text("no pickle")
    for file, words in (
        ("slots.pkl", "of other observations"),
        ("list.pkl", "expected a VecNormalize, got list"),
        ("text.pkl", "cannot be unpickled"),
        ("none.pkl", "cannot be read"),
    ):
        with pytest.raises(PolicyError, match=words) as error:
            make_scheduler(zipped(tmp_path / "m.zip", vecnormalize=tmp_path / file))
        assert "\n" not in str(error.value)


def test_statistics_are_not_unpickled_without_the_flag(normalised, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "load", forbidden)
    monkeypatch.setattr(pickle, "loads", forbidden)
    for spec in (f"{normalised[0]}/m.zip", f"{normalised[0]}/m.zip[vecnormalize=true]"):
        with pytest.raises(PolicyError, match="allow_pickle=true"):
            make_scheduler(spec)


class OwnObservation:
    space = gym.spaces.Box(0.0, 1.0, (3,), np.float32)

    def observe(self, view):
        return np.zeros(3, np.float32)


def test_what_a_zip_cannot_do_here_is_one_line(tmp_path):
    train(tmp_path / "own.zip", PPO, observation=OwnObservation())
    train(tmp_path / "pole.zip", DQN, env=DummyVecEnv([lambda: gym.make("CartPole-v1")]))
    train(tmp_path / "pendulum.zip", SAC, env=DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    (tmp_path / "text.zip").write_text("no zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("data", json.dumps({}))
    for name, options, words in (
        ("own.zip", {}, "observations of its own"),
        ("pole.zip", {"token_budget": 5}, "its spaces are not those"),
        ("pendulum.zip", {"token_budget": 5, "repeat": 1}, "its spaces are not those"),
        ("text.zip", {}, "cannot be read as an SB3 zip"),
        ("empty.zip", {}, "its policy class cannot be unpickled"),
        ("none.zip", {}, "no such file"),
        ("own.zip", {"frob": 1}, "unknown parameter 'frob'"),
    ):
        with pytest.raises(PolicyError, match=words) as error:
            make_scheduler(zipped(tmp_path / name, **options))
        assert "\n" not in str(error.value)


@pytest.fixture
def exported(monkeypatch, capsys):
    """The export command in this process: (its exit code, what it said on stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
        capsys.readouterr()
        return export.main(), capsys.readouterr().err

    return run


def test_export_keeps_what_it_can_and_refuses_the_rest(normalised, tmp_path, exported):
    train(tmp_path / "m.zip", PPO, action_repeat=4)
    command = [sys.executable, "-m", "llmsched_gym.agents.export", tmp_path / "m.zip", tmp_path / "folder"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert make_scheduler(str(tmp_path / "folder")).config.action_repeat == 4
    train(tmp_path / "lstm.zip", RecurrentPPO, "MlpLstmPolicy")
    train(tmp_path / "dqn.zip", DQN, action="request")
    for path, words in (
        (tmp_path / "lstm.zip", "expected a policy of PPO or MaskablePPO, got RecurrentActorCriticPolicy"),
        (tmp_path / "dqn.zip", "expected a policy of PPO or MaskablePPO, got DQNPolicy"),
        (normalised[0] / "m.zip", "a folder holds no VecNormalize statistics"),
    ):
        code, said = exported(path, tmp_path / "none")
        assert code == 2 and words in said and said.count("\n") == 1, said
        assert not (tmp_path / "none").exists()


def test_a_model_sees_the_price_of_mixing_if_it_was_trained_on_it(tmp_path, exported):
    """Where the profile has none it is 0; a model that was trained without it does without."""
    surface = "rtx4090-llama-3.1-8b-vllm"
    models = {profile: tmp_path / f"{profile}.zip" for profile in ("rtx6000ada-mistral-7b", surface)}
    for profile, path in models.items():
        model = train(path, PPO, profile=profile)
        for executing in models:
            seen = []
            policy = make_scheduler(zipped(path))
            policy.policy.normalise = lambda observation, seen=seen: seen.append(observation) or observation
            simulate(scenario("default", profile=executing, **WORLD), policy, 3)
            assert {x.shape for x in seen} == {model.observation_space.shape}
            if profile == surface:
                assert any(x[-1] > 0.0 for x in seen) == (executing == surface)
        assert exported(path, tmp_path / profile)[0] == 0
        spec, tensors = read_folder(tmp_path / profile)
        assert len(spec.observation["features"]) == tensors["hidden.0.weight"].shape[1] == len(seen[0])


def test_a_mask_among_the_observations_is_there_in_evaluation(tmp_path):
    fields = {"action": "request", "mask_in_observation": ("seen", "legal")}
    model = train(tmp_path / "m", PPO, "MultiInputPolicy", **fields)

    def act(seen, start, mask):
        return model.predict(seen, deterministic=True)[0]

    assert same(first_tokens(zipped(tmp_path / "m.zip")), driven(act, **fields))


def test_a_model_whose_mask_has_a_tuple_of_one_as_length_is_read(tmp_path):
    def older(env):
        space = env.observation_space
        space.spaces["in_use"] = gym.spaces.MultiBinary(space["in_use"].shape)  # as it was made before 2026-11-28
        return env

    env = DummyVecEnv([lambda: older(LLMSchedEnv(horizon_s=5.0, observation="slots", action="request"))])
    assert env.observation_space["in_use"].n == (64,)
    train(tmp_path / "old.zip", A2C, "MultiInputPolicy", env, steps=5)
    assert len(first_tokens(zipped(tmp_path / "old.zip"))) > 0
