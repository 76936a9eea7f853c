"""Students of several worlds, with the price of mixing among their features and without, and what starts from them."""

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
pytest.importorskip("tensorboard", reason="tensorboard is not installed")
pytest.importorskip("torch", reason="torch is not installed")

import torch

from llmsched_gym.agents.envs import TrainingEnv
from llmsched_gym.agents.export import export, load_actor
from llmsched_gym.agents.imitate import Config as ImitateConfig
from llmsched_gym.agents.imitate import imitate
from llmsched_gym.agents.networks import normaliser_of
from llmsched_gym.agents.train import Config as TrainConfig
from llmsched_gym.agents.train import make_model, typical_features
from llmsched_gym.config import ConfigError
from llmsched_gym.policies import read_folder, write_folder

SURFACE = "rtx4090-llama-3.1-8b-vllm"
SCARCE = {"qps": 2.2, "horizon_s": 30.0, "num_kv_blocks": 15000}


def worlds_file(path, *worlds):
    path.write_text(json.dumps(worlds))
    return str(path)


def test_one_student_learns_in_worlds_with_a_surface_and_without(tmp_path):
    file = worlds_file(tmp_path / "w.json", {"qps": 1.5}, {"suite": "drift", "profile": SURFACE, **SCARCE})
    settings = {"rounds": 1, "steps": 30, "num_envs": 8, "epochs": 3, "eval_seeds": 1, "eval_requests": 20}
    config = ImitateConfig(
        teacher="on-time", out=str(tmp_path / "s"), worlds=file, set={"horizon_s": 20.0}, action_repeat=1, **settings
    )
    folder = imitate(config)
    lines = [json.loads(line) for line in (tmp_path / "s" / "progress.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(len(line["by_world"]) == 2 for line in lines)
    utilities = [each["mean_utility"] for each in lines[-1]["by_world"]]
    assert lines[-1]["mean_utility"] == pytest.approx(np.mean(utilities))
    spec, _ = read_folder(folder)
    assert spec.observation["features"][-1] == "price_of_mixing"
    assert spec.training["worlds"][1] == {"suite": "drift", "horizon_s": 30.0, "profile": SURFACE, **SCARCE}
    # a student of both teaches where there is no price of mixing
    again = replace(config, teacher=str(folder), worlds="", out=str(tmp_path / "again"), rounds=0)
    assert len(read_folder(imitate(again))[0].observation["features"]) == len(spec.observation["features"]) - 1


@pytest.mark.parametrize("text", ["", "{}", "[]", "[1]", None])
def test_a_bad_file_of_worlds_is_one_line(tmp_path, text):
    file = tmp_path / "w.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=r"worlds: .*w\.json") as error:
        imitate(ImitateConfig(worlds=str(file), out=str(tmp_path / "out")))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("observation", ["features", "slots"])
def test_a_training_starts_from_a_folder_that_sees_the_price_of_mixing_or_lacks_it(tmp_path, observation):
    made = {}
    for profile in ("rtx6000ada-mistral-7b", SURFACE):
        fields = {"profile": profile, "observation": observation, "horizon_s": 20.0, "qps": 2.0}
        env = TrainingEnv(4, "default", 0, **fields)
        settings = TrainConfig(observation=observation, set={"profile": profile}, hidden=(16,), width=8, n_steps=4)
        policy = make_model(settings, env).policy
        normaliser_of(policy).fit(typical_features(env, 0, steps=60))
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        folder = write_folder(tmp_path / profile, *export(policy, env.env.config))
        made[profile] = policy, env, folder
    (plain, env, without), (surface, _, folder) = made.values()
    observations = env.reset()
    named = observations if observation == "slots" else {"features": observations}
    wide = {**named, "features": np.pad(named["features"], ((0, 0), (0, 1)))}

    def logits(policy, given):
        tensors = {name: torch.from_numpy(values) for name, values in given.items()}
        found = policy.get_distribution(tensors if observation == "slots" else tensors["features"])
        return torch.cat([one.logits for one in found.distribution], -1)

    with torch.no_grad():
        wanted = logits(surface, wide)
        load_actor(plain, env.env.config, folder)
        assert torch.allclose(logits(plain, named), wanted, atol=1e-4)
        priced = {**wide, "features": wide["features"] + np.eye(59, dtype=np.float32)[-1]}
        load_actor(surface, env.env.config, without)
        assert torch.allclose(logits(surface, priced), logits(surface, wide))
