"""The cost model: what a batch costs, and the shipped profiles."""

import csv
import dataclasses
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from llmsched_gym.cost import (
    PROFILES,
    Profile,
    ProfileError,
    TableLinear,
    build,
    list_profiles,
    load_profile,
)
from llmsched_gym.cost.tiles import best_tile
from tests.profile_cases import RTX, tiny

DATA_DIR = os.environ.get("LLMSCHED_DATA_DIR")


def data_file(*parts):
    path = Path(DATA_DIR or "", *parts)
    if not DATA_DIR or not path.exists():
        pytest.skip(f"needs {parts[-1]} below the folder named by LLMSCHED_DATA_DIR")
    return path


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


@pytest.mark.parametrize("name", ["rtx6000ada-mistral-7b", "a100-mistral-7b"])
def test_a_scaled_profile_takes_so_much_longer(name):
    profile = load_profile(name)
    slower = profile.scaled(1.25)
    for chunks, contexts in ([((0, 512),), ()], [((100, 37),), (500, 900)], [(), (10,)]):
        assert slower.predict_s(chunks, contexts) == pytest.approx(
            1.25 * profile.predict_s(chunks, contexts), rel=1e-12
        )
    assert slower.num_kv_blocks == profile.num_kv_blocks
