"""Profiles by data sheets: rooflines, tiles, several devices."""

import dataclasses

import numpy as np
import pytest

from llmsched_gym.cli import main
from llmsched_gym.cost import (
    DEVICES,
    MODELS,
    Profile,
    ProfileError,
    SmoothLinear,
    load_profile,
    roofline,
)
from llmsched_gym.cost.tiles import best_tile, tile_gain
from tests.profile_cases import RTX


def test_roofline_by_hand():
    profile = roofline("mistral-7b", "h100-sxm")
    assert isinstance(profile.linear, SmoothLinear)
    assert MODELS["mistral-7b"].layer_params * 2 == pytest.approx(13.96e9, rel=1e-3)
    assert profile.linear.weight_ms == pytest.approx((13.96e9 + 0.262e9) / (0.8 * 3350e9) * 1e3, rel=1e-3)
    assert profile.linear.token_ms == pytest.approx(13.96e9 / (0.7 * 989e12) * 1e3, rel=1e-3)
    assert profile.kv_ms == pytest.approx(128 * 1024 / (0.8 * 3350e9) * 1e3)
    assert profile.pair_ms == pytest.approx(524_288 / (0.5 * 989e12) * 1e3)
    assert profile.num_kv_blocks == int((0.9 * 80e9 - MODELS["mistral-7b"].weight_bytes) / (16 * 128 * 1024))
    assert any("not measured" in note for note in profile.notes)


def test_roofline_of_the_rtx_is_near_the_fitted_one():
    rough, fitted = roofline("mistral-7b", "rtx6000ada"), load_profile(RTX)
    for batch in (([], [1000] * 30), ([(0, 512)], []), ([(1024, 480)], [500] * 32)):
        assert rough.predict_s(*batch) == pytest.approx(fitted.predict_s(*batch), rel=0.03)


def test_waves_make_a_staircase():
    profile = roofline("mistral-7b", "a100-80gb", tile_tokens=256, waves=True)
    smooth = roofline("mistral-7b", "a100-80gb", tile_tokens=256)
    steps, line = profile.linear_table_s(20_000), smooth.linear_table_s(20_000)
    for first in (1, 257, 8193, 16_129):
        assert np.ptp(steps[first : first + 256]) == 0.0
        assert steps[first] == pytest.approx(line[first + 255], rel=1e-12)
    assert steps[8193] > steps[8192] and steps[20_000] > steps[16_385] > steps[16_384]


def test_roofline_errors():
    with pytest.raises(ProfileError, match=r"model: expected one of mistral-7b, llama-3-8b, .*qwen2\.5-7b, got 'gpt'"):
        roofline("gpt", "h100-sxm")
    with pytest.raises(ProfileError, match="device: expected one of"):
        roofline("mistral-7b", "abacus")
    small = dataclasses.replace(DEVICES["h100-sxm"], memory_bytes=8e9)
    with pytest.raises(ProfileError, match="num_kv_blocks: the weights of mistral-7b leave no memory"):
        roofline("mistral-7b", small)


def test_devices_that_share_every_layer_by_hand():
    alone, shared = roofline("llama-3.1-8b", "h100-sxm"), roofline("llama-3.1-8b", "h100-sxm", tensor_parallel=4)
    assert shared.kv_ms == pytest.approx(alone.kv_ms / 4) and shared.pair_ms == pytest.approx(alone.pair_ms / 4)
    # 64 all-reduces; of 4,096 hidden states of 2 bytes each device sends 2 * 3/4
    assert shared.overhead_ms == pytest.approx(3.4 + 64 * 0.01)
    token_ms = 64 * 1.5 * 8192 / (0.8 * 450e9) * 1e3
    for n in (1, 7, 100, 512, 3000, 16_384):
        assert shared.linear.at(n) == pytest.approx(alone.linear.at(n) / 4 + token_ms * n, rel=1e-3)
    assert shared.linear.at(40_000) == pytest.approx(alone.linear.at(40_000) / 4 + token_ms * 40_000, rel=0.01)
    assert shared.num_kv_blocks > 4 * alone.num_kv_blocks  # the weights are there once
    assert shared.device.max_num_seqs == 1024 and shared.device.vllm_token_budget == 8192
    assert roofline("qwen2.5-7b", "l40s", tensor_parallel=2).device.vllm_token_budget == 2048  # each has 48 GB
    stairs = roofline("llama-3.1-8b", "h100-sxm", tensor_parallel=4, waves=True)
    assert stairs.linear.at(128) - stairs.linear.at(1) == pytest.approx(127 * token_ms)
    with pytest.raises(ProfileError, match=r"has 8 key-value heads; expected one of 1, 2, 4, 8, got 3"):
        roofline("llama-3.1-70b", "h100-sxm", tensor_parallel=3)
    with pytest.raises(ProfileError, match="no memory on 2xl40s"):
        roofline("llama-3.1-70b", "l40s", tensor_parallel=2)


def test_a_profile_of_several_devices_is_read_as_it_was_written(tmp_path):
    for profile in (roofline("llama-3.1-70b", "h200-sxm", tensor_parallel=2), roofline("qwen2.5-7b", "l40s")):
        profile.to_json(tmp_path / "profile.json")
        assert Profile.from_json(tmp_path / "profile.json") == profile


def test_tiles_read_off_a_staircase():
    tokens = list(range(8, 2049, 8))
    for tile in (32, 64, 128, 256):
        ms = [1.0 * -(-n // tile) for n in tokens]
        assert best_tile(tokens, ms) == tile
        assert tile_gain(tokens, ms, tile) > 0.02 and abs(tile_gain(tokens, ms, 2 * tile)) < 1e-12
    assert tile_gain([1, 2], [1.0, 1.0], 64) is None
    assert best_tile(tokens, [float(n) for n in tokens]) == 32


def test_the_command_of_rooflines(tmp_path, capsys):
    command = ["roofline", "llama-3.1-70b", "h100-sxm"]
    assert main([*command, "--tensor-parallel", "4", "--out", str(tmp_path / "new" / "four.json")]) == 0
    made = Profile.from_json(tmp_path / "new" / "four.json")
    assert (made.name, made.device.name) == ("four", "4xh100-sxm") and made.basis == "roofline, not measured"
    shown = capsys.readouterr().out
    assert f"{1e3 * made.predict_s([(0, 512)], []):.1f}" in shown and made.notes[0] in shown
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    for wrong, line in (
        (command, "the weights of llama-3.1-70b leave no memory on h100-sxm"),
        ([*command, "--tensor-parallel", "3"], "expected one of 1, 2, 4, 8, got 3"),
        ([*command, "--out", str(tmp_path)], "out: expected a .json file"),
        ([*command, "--out", str(tmp_path / "notes.json")], "is a file of something else, and no profile"),
    ):
        assert main(wrong) == 2
        error = capsys.readouterr().err
        assert line in error and error.count("\n") == 1
