"""Cost profiles: the shipped ones against published figures, rooflines by hand, fits, and every damaged file."""

import csv
import dataclasses
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from llmsched_gym.cli import main
from llmsched_gym.cost import (
    DEVICES,
    MODELS,
    PROFILES,
    Profile,
    ProfileError,
    SmoothLinear,
    TableLinear,
    build,
    fit_profile,
    list_profiles,
    load_profile,
    roofline,
)
from llmsched_gym.cost.fit import errors
from llmsched_gym.cost.measured_batches import batch_row, read_batches
from llmsched_gym.cost.tiles import best_tile, tile_gain

DATA_DIR = os.environ.get("LLMSCHED_DATA_DIR")
RTX = "rtx6000ada-mistral-7b"


def data_file(*parts):
    path = Path(DATA_DIR or "", *parts)
    if not DATA_DIR or not path.exists():
        pytest.skip(f"needs {parts[-1]} below the folder named by LLMSCHED_DATA_DIR")
    return path


def tiny(**fields):
    """A profile with round numbers: a batch of n tokens takes 1 + 10 + n ms, before attention."""
    values = {
        "name": "tiny",
        "model": MODELS["mistral-7b"],
        "device": DEVICES["h100-sxm"],
        "tile_tokens": 4,
        "linear": TableLinear((1, 2, 12), (11.0, 12.0, 22.0)),
        "overhead_ms": 1.0,
        "pair_ms": 0.5,
        "kv_ms": 0.25,
        "num_kv_blocks": 10,
    }
    return Profile(**{**values, **fields})


# What a batch costs


def test_predictions_by_hand():
    profile = tiny()
    assert profile.predict_s([], []) == 0.0
    assert profile.predict_s([], [8]) == pytest.approx((1 + 11 + 0.25 * 8) / 1e3)
    assert profile.predict_s([(0, 3)], []) == pytest.approx((1 + 13 + 0.5 * 6 + 0.25 * 3) / 1e3)  # pairs 1 + 2 + 3
    assert profile.predict_s([(2, 2), (0, 1)], [5, 7]) == pytest.approx((1 + 15 + 0.5 * (3 + 4 + 1) + 0.25 * 17) / 1e3)
    assert (profile.pair_s, profile.kv_s) == (0.0005, 0.00025)


def test_table_between_below_and_past_its_knots():
    linear = TableLinear((4, 8, 16), (10.0, 14.0, 15.0))
    expected = {1: 10.0, 4: 10.0, 6: 12.0, 8: 14.0, 12: 14.5, 16: 15.0, 24: 16.0, 1600: 213.0}
    assert {n: linear.at(n) for n in expected} == pytest.approx(expected)
    table = linear.table(1600)
    assert table.shape == (1600,)
    assert {n: table[n - 1] for n in expected} == pytest.approx(expected)


@pytest.mark.parametrize("name", PROFILES)
def test_tables_agree_with_predictions(name):
    profile = dataclasses.replace(load_profile(name), surface=None)
    table = profile.linear_table_s(9000)
    assert table.shape == (9001,) and table[0] == 0.0 and table.dtype == np.float64
    for n in [*range(1, 300), 511, 512, 513, 4096, 8191, 8192, 9000]:
        whole = table[n] + profile.pair_s * n * (n + 1) / 2 + profile.kv_s * n
        assert profile.predict_s([(0, n)], []) == pytest.approx(whole, rel=1e-12)
    with pytest.raises(ValueError, match="read-only"):
        table[0] = 1.0


@given(
    st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 512)), max_size=5),
    st.lists(st.integers(1, 8192), max_size=9),
)
@settings(max_examples=60, deadline=None)
def test_splitting_a_chunk_keeps_its_pairs(chunks, contexts):
    """Only pairs cost anything here, and a chunk has as many as the two it is cut into."""
    profile = tiny(linear=TableLinear((1, 2), (1e-9, 1e-9)), overhead_ms=0.0, kv_ms=0.0, pair_ms=1e3)
    halves = [half for c, n in chunks for half in ((c, n // 2), (c + n // 2, n - n // 2)) if half[1]]
    assert profile.predict_s(chunks, contexts) == profile.predict_s(halves, contexts)
    assert profile.predict_s(chunks, contexts) == pytest.approx(sum(c + i + 1 for c, n in chunks for i in range(n)))


# The shipped profiles


def test_default_profile_is_the_published_formula():
    profile = load_profile(RTX)
    n = np.arange(1, 8193)
    expected = (3.4 + ((14.5 / 0.768) ** 4 + (0.090 * n) ** 4) ** 0.25) / 1e3
    np.testing.assert_allclose(profile.linear_table_s(8192)[1:], expected, rtol=1e-12)
    np.testing.assert_allclose(
        profile.linear_table_s(8192)[1:], (3.4 + (18.88**4 + (0.090 * n) ** 4) ** 0.25) / 1e3, rtol=2e-5
    )
    assert profile.pair_ms == pytest.approx(5.825e-6, rel=1e-4) and profile.kv_ms == pytest.approx(1.7067e-4, rel=1e-4)
    assert (profile.num_kv_blocks, profile.tile_tokens) == (14_733, 128)
    assert any("assumed" in note and "128" in note for note in profile.notes)


def test_chunk_sweep_within_three_percent():
    profile = load_profile(RTX)
    relative = [build.sweep_ttft_ms(profile, chunk) / ms - 1.0 for chunk, ms in build.CHUNK_SWEEP_MS.items()]
    assert np.sqrt(np.mean(np.square(relative))) <= 0.03
    assert max(map(abs, relative)) < 0.06
    assert profile.fit == pytest.approx(build.sweep_error(profile))
    # 2048 = 5 * 384 + 128: the last chunk is a partial one
    starts = [(384 * i, 384) for i in range(5)] + [(1920, 128)]
    assert build.sweep_ttft_ms(profile, 384) == pytest.approx(1e3 * sum(profile.predict_s([c], []) for c in starts))


def test_embedded_sweep_is_the_published_one():
    with data_file("facts", "rtx6000ada_mistral7b_chunk_sweep.csv").open() as file:
        assert {int(row["chunk"]): float(row["ttft_ms"]) for row in csv.DictReader(file)} == build.CHUNK_SWEEP_MS


@pytest.mark.parametrize("log", ["vllm", "sarathi_spf", "slai_spf_dynamic"])
def test_golden_durations(log):
    """The published schedulers' logs: a decode there reads the prompt and what was decoded before it."""
    profile = load_profile(RTX)
    with data_file("golden", "case_a_requests.csv").open() as file:
        prompt = {int(row["index"]): int(row["prompt_tokens"]) for row in csv.DictReader(file)}
    computed = dict.fromkeys(prompt, 0)
    checked = mixed = 0
    with gzip.open(data_file("golden", f"case_a_{log}.jsonl.gz"), "rt") as file:
        for line in file:
            row = json.loads(line)
            chunks = [(computed[i], n) for i, kind, n in row["batch"] if kind == "prefill"]
            contexts = [computed[i] for i, kind, _ in row["batch"] if kind == "decode"]
            for i, _, n in row["batch"]:
                computed[i] += n
            assert profile.predict_s(chunks, contexts) == pytest.approx(row["dur"], rel=1e-12)
            checked += 1
            mixed += bool(chunks) and bool(contexts)
    assert checked > 1000 and (mixed > 100 or log == "vllm")


def test_a100_keeps_every_published_point():
    tokens, ms = build.read_table(data_file("facts", "linear_ops_ms_by_tokens.csv"), "A100-80GB", build.A100_SHAPE)
    profile = load_profile("a100-mistral-7b")
    assert len(tokens) == 451
    table = 1e3 * profile.linear_table_s(tokens[-1]) - profile.overhead_ms
    np.testing.assert_allclose(table[tokens], ms, rtol=1e-9)
    assert ms[tokens.index(264)] == pytest.approx(24.8 + 1.7, abs=0.2)  # GeMM + other
    assert best_tile(tokens, ms) == profile.tile_tokens == 256


def test_a100_shows_the_staircase():
    profile = load_profile("a100-mistral-7b")
    table = profile.linear_table_s(8192)
    assert table[136] / table[128] > 1.25 and table[384] / table[264] < 1.06
    per_token = table[1:] / np.arange(1, 8193)
    on = per_token[511:4096:256].mean()
    assert per_token[600:4096].mean() > on


def test_shipped_files_are_what_the_command_writes(tmp_path):
    facts = data_file("facts", "linear_ops_ms_by_tokens.csv")
    result = CliRunner().invoke(build.app, ["--facts", str(facts), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for name in (
        RTX,
        "a100-mistral-7b",
    ):  # those of kernel tables are in test_fit_tables  # that one is measured, see test_real_backend_calibrate
        assert Profile.from_json(tmp_path / f"{name}.json") == load_profile(name), name
    result = CliRunner().invoke(build.app, ["--facts", str(tmp_path / "gone.csv"), "--out", str(tmp_path)])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    (tmp_path / "bad.csv").write_text("gpu,model_shape,num_tokens\nA100-80GB,llama-3-8b,8\n")
    with pytest.raises(ProfileError, match="line 2: expected gpu"):
        build.read_table(tmp_path / "bad.csv", "A100-80GB", "llama-3-8b")
    with pytest.raises(ProfileError, match="no rows"):
        build.read_table(facts, "B200", "llama-3-8b")


def test_shipped_profiles_are_complete_and_ordered():
    additive = {RTX, "a100-mistral-7b", "h100-mistral-7b"}
    surfaces = {"rtx4090-llama-3.1-8b-vllm", f"{RTX}-vllm", "rtxpro6000-llama-3.1-8b-vllm"}
    assert set(PROFILES) == additive | surfaces
    assert {profile.name for profile in list_profiles() if profile.surface is None} == additive
    assert [profile.name for profile in list_profiles()] == list(PROFILES)
    for profile in list_profiles():
        assert profile.notes and profile.engine and profile.num_kv_blocks > 1000
    for batch in (([], [1024] * 32), ([(0, 512)], []), ([(0, 1984)], [1024] * 64)):
        h100, a100, rtx = (load_profile(f"{d}-mistral-7b").predict_s(*batch) for d in ("h100", "a100", "rtx6000ada"))
        assert h100 < a100 < rtx


# Rooflines


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


# Fits


def random_batches(rng, num):
    for _ in range(num):
        chunks = [(int(rng.integers(0, 4096)), int(rng.integers(1, 513))) for _ in range(rng.integers(0, 4))]
        contexts = rng.integers(1, 4096, rng.integers(0 if chunks else 1, 64)).tolist()
        yield chunks, contexts


def measure(profile, rng, num, noise=0.0):
    rows = []
    for chunks, contexts in random_batches(rng, num):
        rows.append(
            batch_row(chunks, contexts, 1e3 * profile.predict_s(chunks, contexts) * np.exp(noise * rng.normal()))
        )
    return pd.DataFrame(rows)


FIT = {
    "name": "fitted",
    "model": MODELS["mistral-7b"],
    "device": DEVICES["rtx6000ada"],
    "num_kv_blocks": 9,
    "tile_tokens": 8,
}


def test_fit_recovers_a_known_profile(tmp_path):
    truth, rng = load_profile(RTX), np.random.default_rng(0)
    path = tmp_path / "m.csv"
    measure(truth, rng, 1500, noise=0.01).to_csv(path, index=False)
    fitted = fit_profile(path, overhead_ms=3.4, **FIT)
    assert fitted.fit["mape"] < 0.02 and fitted.fit["p95_ape"] < 0.04
    assert (fitted.fit["rows"], fitted.fit["held_out_rows"]) == (1200, 300)
    assert fitted.pair_ms == pytest.approx(truth.pair_ms, rel=0.05)
    assert fitted.kv_ms == pytest.approx(truth.kv_ms, rel=0.05)
    fresh = [(c, d, truth.predict_s(c, d)) for c, d in random_batches(rng, 300)]
    assert np.mean([abs(fitted.predict_s(c, d) / s - 1.0) for c, d, s in fresh]) < 0.02
    assert (np.diff(fitted.linear_table_s(1600)[1:]) >= 0.0).all()
    again = fit_profile(path, overhead_ms=3.4, **FIT)
    assert again == fitted and fit_profile(path, overhead_ms=3.4, seed=1, **FIT) != fitted
    fitted.to_json(tmp_path / "p.json")
    assert load_profile(str(tmp_path / "p.json")) == fitted


def test_fit_without_overhead_puts_it_into_the_table():
    truth, rng = roofline("mistral-7b", "h100-sxm"), np.random.default_rng(1)
    fitted = fit_profile(measure(truth, rng, 800), **FIT)
    assert fitted.overhead_ms == 0.0 and fitted.fit["mape"] < 0.01
    n = np.array([32, 128, 512, 1024])
    np.testing.assert_allclose(fitted.linear_table_s(1024)[n], truth.linear_table_s(1024)[n], rtol=0.03)


def test_fit_follows_a_staircase_given_its_knots():
    truth, rng = roofline("mistral-7b", "a100-80gb", tile_tokens=128, waves=True), np.random.default_rng(2)
    knots = [n for first in range(1, 1500, 128) for n in (first, first + 127)]
    assert fit_profile(measure(truth, rng, 1500), knots=knots, **FIT).fit["mape"] < 0.005


def test_fit_of_a_sweep_uses_every_token_count():
    truth = load_profile("a100-mistral-7b")
    rows = [
        batch_row(chunks, contexts, 1e3 * truth.predict_s(chunks, contexts))
        for n in (64, 128, 136, 256, 264)
        for c in (0, 500, 1000, 4000)
        for chunks, contexts in (([(c, n)], []), ([(c, n // 2)], [c + 100] * (n - n // 2)))
    ]
    fitted = fit_profile(pd.DataFrame(rows), **FIT)
    assert fitted.linear.tokens == (64, 128, 136, 256, 264)
    assert fitted.fit["mape"] < 1e-6 and fitted.kv_ms == pytest.approx(truth.kv_ms, rel=1e-4)


def test_disturbed_rows_do_not_move_the_fit():
    truth, rng = load_profile(RTX), np.random.default_rng(3)
    table = measure(truth, rng, 1000, noise=0.01)
    table.loc[rng.choice(1000, 50, replace=False), "ms"] *= 5.0
    fitted = fit_profile(table, **FIT)
    undisturbed = [row for row in read_batches(measure(truth, rng, 200))]
    assert errors(fitted, undisturbed)["mape"] < 0.02


def test_measurements_survive_a_file(tmp_path):
    frame = pd.DataFrame(
        [batch_row([(0, 5), (7, 3)], [9], 1.5), batch_row([], [4, 5], 2.5), batch_row([(1, 2)], [], 3.5)]
    )
    frame.to_csv(tmp_path / "m.csv", index=False)
    batches = read_batches(tmp_path / "m.csv")
    assert batches == read_batches(frame) == read_batches(pd.read_csv(tmp_path / "m.csv"))
    assert batches[0].chunks == ((0, 5), (7, 3)) and batches[1].decode_contexts == (4, 5) and batches[0].num_tokens == 9


@pytest.mark.parametrize(
    "text, message",
    [
        ("prefill,decode,ms\n0:5,,1\n0-5,,1\n", "line 3, column 'prefill': expected items computed:n"),
        ("prefill,decode,ms\n-1:5,,1\n", "line 2, column 'prefill'"),
        ("prefill,decode,ms\n0:0,,1\n", "line 2, column 'prefill'"),
        ("prefill,decode,ms\n,3;x,1\n", "line 2, column 'decode'"),
        ("prefill,decode,ms\n,0,1\n", "line 2, column 'decode'"),
        ("prefill,decode,ms\n,3,-1\n", "line 2, column 'ms': expected a time from 1e-06 to 1,000,000 ms, got '-1'"),
        (
            "prefill,decode,ms\n,3,1e300\n",
            "line 2, column 'ms': expected a time from 1e-06 to 1,000,000 ms, got '1e300'",
        ),
        ("prefill,decode,ms\n0:99999999999,,1\n", "line 2, column 'prefill': expected items computed:n of at most"),
        ("prefill,decode,ms\n,3;99999999999,1\n", "line 2, column 'decode': expected context lengths of at most"),
        ("prefill,decode,ms\n,3,nan\n", "line 2, column 'ms'"),
        ("prefill,decode,ms\n,3,\n", "line 2, column 'ms'"),
        ("prefill,decode,ms\n,,3\n", "line 2: an empty batch"),
        ("prefill,ms\n0:5,1\n", "no column 'decode'"),
        ("prefill,decode,ms,ms\n0:5,,1,2\n", "column 'ms' is there twice"),
        ("", "cannot read"),
        ("prefill,decode,ms\n" + "0:5,,1\n" * 5, "5 measured batches; a fit needs at least 20"),
        ("prefill,decode,ms\n" + "0:5,,1\n" * 30, "knots: expected at least two different token counts"),
        ("prefill,decode,ms\n" + ",5,1\n,5;6,1\n" * 30, "prefill: no batch has a prefill chunk"),
    ],
)
def test_bad_measurements(tmp_path, text, message):
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(ProfileError, match=message) as error:
        fit_profile(path, **FIT)
    assert "\n" not in str(error.value)


def test_fit_with_too_much_overhead():
    table = measure(load_profile(RTX), np.random.default_rng(0), 50)
    with pytest.raises(ProfileError, match="overhead_ms: 1000 is more than the fastest measured batch"):
        fit_profile(table, overhead_ms=1000.0, **FIT)
    with pytest.raises(ProfileError, match=r"gone\.csv: cannot read"):
        fit_profile("gone.csv", **FIT)


# Files


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


@pytest.mark.parametrize("name", ["rtx6000ada-mistral-7b", "a100-mistral-7b"])
def test_a_scaled_profile_takes_so_much_longer(name):
    profile = load_profile(name)
    slower = profile.scaled(1.25)
    for chunks, contexts in ([((0, 512),), ()], [((100, 37),), (500, 900)], [(), (10,)]):
        assert slower.predict_s(chunks, contexts) == pytest.approx(
            1.25 * profile.predict_s(chunks, contexts), rel=1e-12
        )
    assert slower.num_kv_blocks == profile.num_kv_blocks


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
