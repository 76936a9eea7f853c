"""Profiles fitted to measured batches."""

import numpy as np
import pandas as pd
import pytest

from llmsched_gym.cost import (
    DEVICES,
    MODELS,
    ProfileError,
    fit_profile,
    load_profile,
    roofline,
)
from llmsched_gym.cost.fit import errors
from llmsched_gym.cost.measured_batches import batch_row, read_batches
from tests.profile_cases import RTX


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
