"""Calibration: what is measured, a profile recovered from made-up times, and a sweep that survives being killed."""

import csv
import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmsched_gym.cost import DEVICES, MODELS, Profile, TableLinear, load_profile
from llmsched_gym.cost.measured_batches import read_batches
from llmsched_gym.real_backend import BackendError
from llmsched_gym.real_backend.calibration.calibrate import fit
from llmsched_gym.real_backend.calibration.calibrate import main as calibrate_main
from llmsched_gym.real_backend.calibration.measurements import COLUMNS, Sheet, key, run_sweep
from llmsched_gym.real_backend.calibration.sweep import Composition, Limits, plan

SMALL = Limits(max_tokens=256, max_context=256, max_seqs=16, mixtures=40)
BLOCKS = 400


def synthetic(tile=None, max_tokens=256):
    """A made-up device: 2 ms and 0.02 ms per token, in steps of `tile` tokens if there is one, and attention."""
    if tile is None:
        linear = TableLinear((1, max_tokens), (2.02, 2.0 + 0.02 * max_tokens))
    else:
        tops = range(tile, max_tokens + 1, tile)
        tokens = [n for top in tops for n in (top - tile + 1, top)]
        linear = TableLinear(
            (*tokens, max_tokens + tile), (*(2.0 + 0.02 * (-(-n // tile) * tile) for n in tokens), 99.0)
        )
    return Profile(
        name="made-up",
        model=MODELS["mistral-7b"],
        device=DEVICES["h100-sxm"],
        tile_tokens=tile or 32,
        linear=linear,
        overhead_ms=0.0,
        pair_ms=2e-5,
        kv_ms=4e-4,
        num_kv_blocks=BLOCKS,
    )


def clock_of(profile, noise=0.0, seed=0, calls=None):
    """A backend's `measure` whose times are the profile's, give or take."""
    rng = np.random.default_rng(seed)

    def measure(chunks, decodes):
        if calls is not None:
            calls.append((tuple(chunks), tuple(decodes)))
        return profile.predict_s(chunks, decodes) * float(np.exp(noise * rng.standard_normal()))

    return measure


def fitted(sheet, truth, **options):
    return fit(sheet, truth.model, truth.device, BLOCKS, name="again", **options)


def test_the_plan_keeps_its_limits_and_covers_what_it_should():
    limits = Limits()
    batches = plan(limits, 14_000)
    assert batches == plan(limits, 14_000) and batches != plan(limits, 14_000, seed=1)
    assert len(set(batches)) == len(batches) and all(limits.allow(batch, 14_000) for batch in batches)
    whole = {b.num_tokens for b in batches if not b.decodes and all(c == 0 for c, _ in b.chunks)}
    assert {n + d for n in range(64, 2048, 64) for d in (-1, 0, 1)} | {1, 2, 3, 32, 96, 2048} <= whole
    decodes = {len(b.decodes) for b in batches if not b.chunks}
    assert {1, 2, 32, 64, 128} <= decodes and max(decodes) == 128
    assert {max(b.decodes) for b in batches if not b.chunks} >= {16, 1024, 8192}
    mixed = [b for b in batches if b.chunks and b.decodes]
    assert len(mixed) >= 150 and {len(b.chunks) for b in mixed} == {1, 2, 3}
    assert any(c > 4000 for b in batches for c, _ in b.chunks)


def test_the_plan_fits_into_a_small_cache():
    assert all(batch.num_blocks() <= 40 for batch in plan(SMALL, 40))
    larger = plan(SMALL, 20, block_size=32)
    assert all(batch.num_blocks(32) <= 20 for batch in larger) and any(batch.num_blocks() > 20 for batch in larger)
    assert len(plan(SMALL, 40)) > 50


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_a_synthetic_profile_is_recovered(tmp_path, noise):
    truth = synthetic()
    sheet = Sheet(tmp_path / "rows.csv", "made up")
    run_sweep(clock_of(truth, noise), plan(SMALL, BLOCKS), sheet)
    found = fitted(sheet, truth, tile_tokens=32)
    assert found.fit["mape"] <= 0.002 + noise
    assert found.pair_ms == pytest.approx(truth.pair_ms, rel=0.02 + 10 * noise)
    assert found.kv_ms == pytest.approx(truth.kv_ms, rel=0.02 + 3 * noise)
    for batch in plan(SMALL, BLOCKS, seed=99):
        expected = truth.predict_s(batch.chunks, batch.decodes)
        assert found.predict_s(batch.chunks, batch.decodes) == pytest.approx(expected, rel=0.01 + 2 * noise)


def test_tiles_are_seen_and_their_steps_kept(tmp_path):
    truth = synthetic(tile=128, max_tokens=1024)
    limits = Limits(max_tokens=1024, max_context=1024, max_seqs=16, mixtures=60)
    sheet = Sheet(tmp_path / "rows.csv", "made up")
    run_sweep(clock_of(truth), plan(limits, 4000), sheet, rounds=1, repeats=1)
    found = fitted(sheet, truth)
    assert found.tile_tokens == 128
    step = found.linear.at(257) - found.linear.at(256)
    assert step == pytest.approx(0.02 * 128, rel=0.05) and found.linear.at(256) - found.linear.at(130) < 0.2
    assert found.fit["mape"] < 0.01


def test_a_disturbed_round_does_not_matter(tmp_path):
    """Another program slows one of three rounds down threefold: medians over rounds leave it out."""
    truth = synthetic()
    batches, count = plan(SMALL, BLOCKS), [0]

    def measure(chunks, decodes):
        count[0] += 1
        slow = 3.0 if count[0] <= 4 * len(batches) else 1.0
        return slow * truth.predict_s(chunks, decodes)

    sheet = Sheet(tmp_path / "rows.csv", "made up")
    run_sweep(measure, batches, sheet)
    assert fitted(sheet, truth, tile_tokens=32).fit["mape"] < 0.01


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_what_the_fit_reads(tmp_path):
    truth = synthetic()
    sheet = Sheet(tmp_path / "deep" / "rows.csv", "made up, with commas")
    batch = Composition(((0, 5), (16, 3)), (7, 8))
    seen = []
    assert run_sweep(clock_of(truth), [batch], sheet, rounds=2, progress=lambda *args: seen.append(args)) == 0
    (one,) = read_batches(sheet.medians())
    assert (one.chunks, one.decode_contexts) == (batch.chunks, batch.decodes)
    assert one.ms == pytest.approx(1e3 * truth.predict_s(batch.chunks, batch.decodes), abs=1e-6)
    assert len(read_batches(sheet.path)) == 2 and seen == [(0, 2), (1, 2), (2, 2)]
    assert sheet.done() == {key(batch, 0), key(batch, 1)}


def test_a_finished_sweep_measures_nothing_again(tmp_path):
    batches, calls = plan(SMALL, BLOCKS), []
    sheet = Sheet(tmp_path / "rows.csv", "made up")
    run_sweep(clock_of(synthetic()), batches, sheet)
    assert run_sweep(clock_of(synthetic(), calls=calls), batches, sheet) == 3 * len(batches) and calls == []


@pytest.mark.parametrize("cut", [1, 9, 40])
def test_a_row_cut_off_by_a_kill_is_measured_again(tmp_path, cut):
    batches, path = plan(SMALL, BLOCKS)[:30], tmp_path / "rows.csv"
    sheet = Sheet(path, "made up")
    run_sweep(clock_of(synthetic()), batches, sheet, rounds=1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    calls = []
    assert run_sweep(clock_of(synthetic(), calls=calls), batches, sheet, rounds=1, repeats=2) == 29
    assert calls == [(batches[-1].chunks, batches[-1].decodes)] * 3, "one pass to warm up, two that count"
    assert len(read_batches(path)) == 30


def test_a_header_cut_off_by_a_kill_is_written_again(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prefill,dec")
    sheet = Sheet(path, "made up")
    run_sweep(clock_of(synthetic()), plan(SMALL, BLOCKS)[:3], sheet, rounds=1)
    assert len(read_batches(path)) == 3


KILLED = """
import os, signal, sys
from pathlib import Path
from llmsched_gym.real_backend.calibration.measurements import Sheet, run_sweep
from llmsched_gym.real_backend.calibration.sweep import Limits, plan

path, calls = Path(sys.argv[1]), [0]

def measure(chunks, decodes):
    calls[0] += 1
    if calls[0] == 50:
        with path.open("a") as file:
            file.write("0:17,1")  # half of a row, as a kill in the middle of a write leaves it
        os.kill(os.getpid(), signal.SIGKILL)
    return 1e-3 * (1 + sum(n for _, n in chunks) + len(decodes))

run_sweep(measure, plan(Limits(256, 256, 16, 40), 400), Sheet(path, "made up"), rounds=1, repeats=3)
"""


def test_a_killed_sweep_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "rows.csv"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    batches = plan(SMALL, BLOCKS)
    assert path.read_text().count("\n") == 1 + 12, "header and twelve rows of four calls each"

    def measure(chunks, decodes):
        return 1e-3 * (1 + sum(n for _, n in chunks) + len(decodes))

    sheet = Sheet(path, "made up")
    assert run_sweep(measure, batches, sheet, rounds=1) == 12
    rows = read_batches(path)
    assert [(b.chunks, b.decode_contexts) for b in rows] == [(b.chunks, b.decodes) for b in batches]
    assert all(b.ms == pytest.approx(1 + b.num_tokens) for b in rows)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda lines: ["a,b,c", *lines[1:]], "line 1: expected the columns prefill,decode,ms"),
        (lambda lines: [*lines[:3], "0:1,,3.5", *lines[3:]], "line 4: expected 8 values, got 3"),
        (lambda lines: [lines[0], lines[1].replace("made up", "elsewhere")], "line 2: measured on 'elsewhere'"),
    ],
)
def test_a_csv_of_something_else_is_refused(tmp_path, edit, expected):
    path = tmp_path / "rows.csv"
    run_sweep(clock_of(synthetic()), plan(SMALL, BLOCKS)[:5], Sheet(path, "made up"), rounds=1)
    path.write_text("\n".join(edit(path.read_text().splitlines())) + "\n")
    with pytest.raises(BackendError, match=expected) as error:
        Sheet(path, "made up").done()
    assert "\n" not in str(error.value) and str(path) in str(error.value)


# --- the command -----------------------------------------------------------------------------------------------------


def test_calibration_of_a_real_model(tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="the real backend needs torch")
    pytest.importorskip("transformers", reason="the real backend needs transformers")
    threads = torch.get_num_threads()
    out = tmp_path / "tiny.json"
    command = ["--model", "random:tiny", "--device", "cpu", "--out", str(out), "--threads", "1", "--clock", "cpu"]
    command += ["--max-tokens", "48", "--max-context", "64", "--max-seqs", "8", "--mixtures", "25"]
    command += ["--rounds", "1", "--repeats", "1"]
    try:
        assert calibrate_main(command) == 0
        profile = load_profile(out)
        text = capsys.readouterr()
        assert "held-out batches" in text.out and text.out.count("\n") == 1 and "Traceback" not in text.err
        assert profile.model.num_layers == 2 and profile.fit["mape"] < 1.0
        assert 0.05 < 1e3 * profile.predict_s([(0, 32)], [10]) < 1000.0
        with out.with_suffix(".csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert tuple(rows[0]) == COLUMNS and "torch" in rows[0]["setup"] and "cpu time" in rows[0]["setup"]
        assert calibrate_main(command) == 0, "the second run finds its rows"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--out", "p.json"], "Missing option '--model'"),
        (["--model", "random:tiny", "--out", "p.txt"], "out: expected a .json file"),
        (["--model", "random:nothing", "--out", "p.json"], "expected one of random:mistral-7b, random:tiny"),
        (["--model", "random:tiny", "--out", "p.json", "--max-seqs", "1"], "max_seqs: expected a whole number >= 2"),
        (["--model", "random:tiny", "--out", "p.json", "--clock", "sun", "--device", "cpu"], "clock: expected one of"),
        (["--model", "random:tiny", "--out", "p.json", "--repeats", "0"], "--repeats"),
    ],
)
def test_a_wrong_command_is_one_line(arguments, expected, capsys, monkeypatch, tmp_path):
    pytest.importorskip("torch", reason="the real backend needs torch")
    pytest.importorskip("transformers", reason="the real backend needs transformers")
    monkeypatch.chdir(tmp_path)
    assert calibrate_main(arguments) == 2
    text = capsys.readouterr()
    errors = [line for line in text.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and expected in errors[0] and text.out == ""


def test_limits_are_checked():
    for field in dataclasses.fields(Limits):
        with pytest.raises(ValueError, match=field.name):
            Limits(**{field.name: -1})


def test_the_shipped_profile_of_the_h100_is_the_fit_of_its_rows():
    shipped = load_profile("h100-mistral-7b")
    sheet = Sheet(Path(__file__).parent.parent / "docs" / "gpu" / "h100" / "sweep.csv.gz", "")
    again = fit(sheet, shipped.model, shipped.device, shipped.num_kv_blocks, name=shipped.name)
    assert (again.tile_tokens, again.linear.tokens) == (shipped.tile_tokens, shipped.linear.tokens)
    assert again.linear.ms == pytest.approx(shipped.linear.ms)
    assert (again.pair_ms, again.kv_ms) == pytest.approx((shipped.pair_ms, shipped.kv_ms))
    kinds = shipped.fit["kinds"]
    assert {**again.fit, "kinds": None} == pytest.approx({**shipped.fit, "kinds": None}) and shipped.fit["mape"] < 0.05
    assert again.surface is None and list(kinds) == ["decodes", "chunks", "hybrid"]
    assert all(again.fit["kinds"][kind] == pytest.approx(kinds[kind]) for kind in kinds)


def test_rows_of_another_model_of_the_same_last_name_are_refused(tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="the real backend needs transformers")
    small = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    for folder, width in (("m1", 32), ("m2", 64)):
        config = transformers.AutoConfig.for_model("llama", hidden_size=width, intermediate_size=64, **small)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / folder / "final")
    limits = ["--max-tokens", "32", "--max-context", "32", "--max-seqs", "2", "--mixtures", "8"]
    rest = [*limits, "--rounds", "1", "--repeats", "1", "--device", "cpu", "--csv", str(tmp_path / "rows.csv")]

    def run(folder):
        model = ["--model", str(tmp_path / folder / "final")]
        return calibrate_main([*model, "--out", str(tmp_path / f"{folder}.json"), *rest])

    assert run("m1") == 0
    kept = (tmp_path / "rows.csv").read_bytes()
    (tmp_path / "m1").rename(tmp_path / "moved")
    assert run("moved") == 0  # the same model elsewhere
    assert (tmp_path / "rows.csv").read_bytes() == kept
    capsys.readouterr()
    assert run("m2") == 2
    assert "measured on 'final (" in capsys.readouterr().err
    assert (tmp_path / "rows.csv").read_bytes() == kept and not (tmp_path / "m2.json").exists()


def test_the_staircase_of_the_h100(tmp_path, capsys):
    from llmsched_gym.real_backend.calibration.staircase import main

    sweep = Path(__file__).parent.parent / "docs" / "gpu" / "h100" / "sweep.csv.gz"
    picture = tmp_path / "stairs.png"
    assert main([str(sweep), "--profile", "h100-mistral-7b", "--out", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0.15 < found["step"]["256"] < 0.2 < found["step"]["512"] and picture.stat().st_size > 10_000
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for arguments, line in (
        ([str(tmp_path / "other.csv"), "--profile", "h100-mistral-7b", "--out", str(picture)], "expected the columns"),
        ([str(sweep), "--profile", "h100-mistral-7b", "--out", "x.doc"], "out: expected a .png or .svg file"),
        ([str(tmp_path / "no.csv"), "--profile", "h100-mistral-7b", "--out", str(picture)], "no.csv"),
    ):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert line in err and err.count("\n") == 1 and not out
