"""What fuzzing has found in readers of files, and what a full disk and a torn file leave behind."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest

import llmsched_gym
from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.cost import Profile, ProfileError, load_profile
from llmsched_gym.evaluation.arena import read_constants
from llmsched_gym.evaluation.grid import evaluate
from llmsched_gym.evaluation.store import read_rows
from llmsched_gym.report.results import ReportError, read_results
from llmsched_gym.workload import TraceError, load_trace
from llmsched_gym.workload.mixture import load_sessions

DATA = Path(llmsched_gym.__file__).parent / "data"
HUGE = 10**400


def change(name, value, *keys):
    def apply(tmp_path):
        data = json.loads((DATA / name).read_text(encoding="utf-8"))
        inner = data
        for key in keys[:-1]:
            inner = inner[key]
        assert keys[-1] in inner or isinstance(inner, list)
        inner[keys[-1]] = value
        path = tmp_path / "file.json"
        path.write_text(json.dumps(data), encoding="utf-8")
        return path

    return apply


SURFACE = "profiles/rtx6000ada-mistral-7b-vllm.json"


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (change(SURFACE, HUGE, "model", "num_layers"), "model.num_layers"),
        (change("profiles/rtx4090-llama-3.1-8b-vllm.json", HUGE, "linear", "ms", 0), "linear.ms"),
        (change(SURFACE, HUGE, "surface", "floor_ms", 0), "surface.floor_ms"),
        (change(SURFACE, 5, "surface", "sequence_ms"), "surface.sequence_ms"),
    ],
)
def test_profiles_that_fuzzing_has_found(make, field, tmp_path):
    with pytest.raises(ProfileError, match=field) as error:
        load_profile(make(tmp_path))
    assert "\n" not in str(error.value)


def test_a_workload_with_a_number_beyond_float64(tmp_path):
    data = json.loads((DATA / "workloads/chat.json").read_text(encoding="utf-8"))
    name = next(key for key, value in data.items() if isinstance(value, dict) and "values" in value)
    data[name]["values"][0] = HUGE
    path = tmp_path / "file.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{name}.values: expected"):
        load_sessions(str(path))


WORLD = scenario("paper", qps=1.0, num_requests=5)


def test_a_full_disk_is_an_error_of_the_system_and_the_same_command_goes_on(tmp_path):
    """RLIMIT_FSIZE: no file may grow beyond so many bytes, as on a disk that is full."""
    expected = evaluate(WORLD, ["sarathi"], seeds=2)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, usual[1]))
    try:
        with pytest.raises((OSError, ConfigError)):
            evaluate(WORLD, ["sarathi"], seeds=2, out=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert not list(tmp_path.rglob("runs.parquet")) and not list(tmp_path.rglob("*.partial"))
    for rows in (evaluate(WORLD, ["sarathi"], seeds=2, out=tmp_path), read_rows(tmp_path)):
        assert [row["sim_time_s"] for row in rows] == [row["sim_time_s"] for row in expected]


def test_json_that_is_nested_too_deeply(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": ' + "[" * 100_000, encoding="utf-8")
    with pytest.raises(TraceError):
        load_trace(path)


def test_a_torn_table_is_one_line_and_the_rows_stay_readable(tmp_path):
    rows = evaluate(WORLD, ["sarathi"], seeds=1, out=tmp_path)
    torn = tmp_path / "requests.parquet"
    torn.write_bytes(torn.read_bytes()[:-20])
    assert read_rows(tmp_path) == rows
    assert evaluate(WORLD, ["sarathi"], seeds=1, out=tmp_path) == rows
    with pytest.raises(ReportError) as error:
        read_results(tmp_path)
    assert "requests.parquet" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("read", [lambda path: scenario(str(path)), read_constants])
def test_toml_that_is_nested_too_deeply(read, tmp_path):
    path = tmp_path / "suite.toml"
    path.write_text("what = " + "[" * 5000)
    with pytest.raises(ConfigError, match="nested too deeply") as error:
        read(path)
    assert "\n" not in str(error.value)


def profile_with(tmp_path, name, change):
    data = json.loads((DATA / "profiles" / f"{name}.json").read_text())
    change(data)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(data))
    return path


WITH_SURFACE, SMOOTH, TABLE = "rtx6000ada-mistral-7b-vllm", "rtx6000ada-mistral-7b", "a100-mistral-7b"


@pytest.mark.parametrize(("name", "change", "field"), [
    (WITH_SURFACE, lambda d: d["surface"]["decode_ms"][0].__setitem__(0, "1"), "decode_ms: expected 9 x 11 numbers"),
    (WITH_SURFACE, lambda d: d["surface"].update(launch_ms="0"), "surface.launch_ms: expected"),
    (WITH_SURFACE, lambda d: d["surface"]["decode_ms"][0].__setitem__(0, 1e300), "surface.decode_ms: expected"),
    (WITH_SURFACE, lambda d: d["surface"]["chunk_ms"][0].__setitem__(0, -1e6), "surface.chunk_ms: expected less"),
    (WITH_SURFACE, lambda d: d["surface"].update(launch_ms=1e6), "surface.launch_ms: expected less"),
    (WITH_SURFACE, lambda d: d["surface"].update(sequence_ms=[1000.0, 1.0]), "surface.sequence_ms: expected times"),
    (SMOOTH, lambda d: d["linear"].update(power=1e300), "linear: expected finite milliseconds > 0"),
    (SMOOTH, lambda d: d.update(pair_ms=1e300), "pair_ms: expected milliseconds <= 1e"),
    (TABLE, lambda d: d["linear"]["ms"].__setitem__(-1, 1e-3), "linear: expected finite milliseconds > 0"),
])  # fmt: skip
def test_profiles_by_which_batches_would_take_no_time_or_for_ever(name, change, field, tmp_path):
    with pytest.raises(ProfileError, match=field) as error:
        load_profile(profile_with(tmp_path, name, change))
    assert "\n" not in str(error.value)


def test_shipped_profiles_are_made_again_as_they_are():
    for path in (DATA / "profiles").glob("*.json"):
        profile = load_profile(path.stem)
        assert Profile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile
        assert np.isfinite(profile.scaled(10.0).linear_table_s(8192)).all()
