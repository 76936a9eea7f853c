"""Files of profiles: written, read, damaged, unknown."""

import dataclasses
import json
import os

import pytest

from llmsched_gym.cost import (
    Profile,
    ProfileError,
    SmoothLinear,
    load_profile,
)
from tests.profile_cases import tiny


@pytest.mark.parametrize(
    "profile", [tiny(), tiny(linear=SmoothLinear(1.0, 2.0, 4.0), notes=("a", "b"), fit={"mape": 0.1})]
)
def test_json_round_trip(tmp_path, profile):
    path = tmp_path / "sub" / "p.json"
    profile.to_json(path)
    assert Profile.from_json(path) == profile == load_profile(path)
    assert [p.name for p in path.parent.iterdir()] == ["p.json"]
    hash(profile)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "p.json"
    tiny().to_json(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        tiny(fit={"mape": float("nan")}).to_json(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "p.json"
    tiny().to_json(path)
    assert load_profile(path) is load_profile(path)
    tiny(num_kv_blocks=77).to_json(path)
    os.utime(path, ns=(1, 1))
    assert load_profile(path).num_kv_blocks == 77


REMOVE = object()


def damaged(tmp_path, field, value):
    data = tiny().to_dict()
    *parents, last = field.split(".")
    inner = data
    for name in parents:
        inner = inner[name]
    if value is REMOVE:
        del inner[last]
    else:
        inner[last] = value
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Profile) if f.default is dataclasses.MISSING])
def test_missing_fields(tmp_path, field):
    path = damaged(tmp_path, field, REMOVE)
    with pytest.raises(ProfileError) as error:
        load_profile(path)
    assert str(error.value) == f"{path}: {field}: missing"


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("name", 3, "name: expected a name"),
        ("tile_tokens", 0, "tile_tokens: expected a whole number >= 1, got 0"),
        ("num_kv_blocks", 10**20, "num_kv_blocks: expected a whole number <= 2,147,483,647, got 1000"),
        ("tile_tokens", 1.5, "tile_tokens"),
        ("num_kv_blocks", True, "num_kv_blocks"),
        ("overhead_ms", -1.0, "overhead_ms: expected a finite number >= 0, got -1.0"),
        ("pair_ms", float("nan"), "pair_ms: expected a finite number >= 0, got nan"),
        ("kv_ms", float("inf"), "kv_ms"),
        ("kv_ms", "fast", "kv_ms: expected a finite number >= 0, got 'fast'"),
        ("linear", 5, "linear.kind: expected table or smooth"),
        ("linear.kind", "cubic", "linear.kind: expected table or smooth"),
        ("linear.tokens", [1, 3, 2], "linear.tokens: expected increasing numbers"),
        ("linear.tokens", [1, 2, 2], "linear.tokens: expected increasing numbers"),
        ("linear.tokens", [1, 2], "linear.tokens: expected at least two knots, as many as linear.ms"),
        ("linear.tokens", [0, 2, 3], "linear.tokens: expected whole numbers >= 1"),
        ("linear.tokens", "abc", "linear.tokens: expected a list of numbers"),
        ("linear.ms", [1.0, float("nan"), 2.0], "linear.ms: expected a finite number > 0, got nan"),
        ("linear.ms", [1.0, -2.0, 2.0], "linear.ms"),
        ("linear.ms", REMOVE, "linear.ms: missing"),
        ("linear.power", 4, "linear.power: unknown field"),
        ("model.hidden_size", REMOVE, "model.hidden_size: missing"),
        ("model.num_layers", -3, "model.num_layers: expected a finite number > 0"),
        ("model.colour", 1, "model.colour: unknown field"),
        ("device.flops_s", "many", "device.flops_s"),
        ("device", [], "device: expected a JSON object, got list"),
        ("notes", "free text", "notes: expected a list of sentences"),
        ("fit", 0.1, "fit: expected an object or null"),
        ("speed", 1, "speed: unknown field"),
    ],
)
def test_damaged_fields(tmp_path, field, value, message):
    path = damaged(tmp_path, field, value)
    with pytest.raises(ProfileError) as error:
        load_profile(path)
    assert str(error.value).startswith(f"{path}: {message}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message", [("{", "not a JSON file"), ("[]", "expected a JSON object"), ("", "not a JSON")]
)
def test_files_that_hold_no_profile(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ProfileError, match=message) as error:
        load_profile(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_unknown_profiles(tmp_path):
    with pytest.raises(ProfileError, match="profile: expected one of a100-mistral-7b, h100-mistral-7b, rtx4090-llama"):
        load_profile("b200")
    with pytest.raises(ProfileError, match="cannot read"):
        load_profile(tmp_path / "gone.json")
    with pytest.raises(ProfileError, match="cannot read"):
        Profile.from_json(tmp_path)
