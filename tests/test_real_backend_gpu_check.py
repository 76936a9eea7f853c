"""The GPU check: bounds by hand, one failing section among others, and the whole command, small, on the CPU."""

import csv
import json

import pytest

# ruff: noqa: E402 - a missing torch is to skip these tests before anything imports it
torch = pytest.importorskip("torch", reason="the real backend needs torch")
pytest.importorskip("transformers", reason="the real backend needs transformers")

from llmsched_gym.config import DeviceSpec, ModelSpec
from llmsched_gym.cost import DEVICES, MODELS, load_profile
from llmsched_gym.real_backend.calibration.sweep import Composition, Limits
from llmsched_gym.real_backend.gpu_check import check as gpu_check
from llmsched_gym.real_backend.gpu_check import report, speed
from llmsched_gym.real_backend.gpu_check.sections import SECTIONS
from llmsched_gym.real_backend.gpu_check.state import Check, TimeUp

SMALL = ["--model", "random:tiny", "--device", "cpu", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_bounds_by_hand():
    model = ModelSpec("m", 8, 16, 2, num_heads=4, num_kv_heads=2, head_dim=2, vocab_size=10)
    device = DeviceSpec("d", 1e9, bandwidth_bytes_s=1e6, flops_s=1e6)
    assert (model.layer_params, model.head_params, model.kv_bytes_per_token) == (2 * (16 * 12 + 384), 80, 32)
    found = speed.bound_ms(model, device, Composition(((3, 2),), (10,)))
    moved = 2 * (1152 + 80) + 32 * (10 + 5 + 3)
    flops = 2 * (1152 * 3 + 80 * 2) + 4 * 4 * 2 * 2 * (10 + 2 * 3 + 3)
    assert found == {"bound_ms": flops / 1e3, "bytes_ms": moved / 1e3, "flops_ms": flops / 1e3}


def test_the_bound_of_decodes_is_that_of_the_published_shapes():
    """32 decodes at 1,024 tokens on an H100: weights and KV at 3.35 TB/s, 5.5 ms."""
    found = speed.bound_ms(MODELS["mistral-7b"], DEVICES["h100-sxm"], Composition(decodes=(1024,) * 32))
    assert found["bound_ms"] == pytest.approx(5.5, abs=0.1)


def test_kernels_are_told_apart_by_name():
    names = {"_attend": "attention", "fmha_cutlassF_bf16": "attention", "nvjet_tst_128x64": "product"}
    names |= {"sm90_xmma_gemm_bf16": "product", "vectorized_elementwise_kernel": "other", "aten::addmm": "product"}
    assert {name: speed.kind_of(name) for name in names} == names


def test_batches_stay_within_the_limits():
    assert list(speed.batches(Limits(max_seqs=256), 30_000)) == [
        *(f"{n} decodes" for n in (1, 8, 32, 64, 128, 256)),
        "16 decodes + 48 prefill",
        "64 decodes + 448 prefill",
        "64 decodes + 1984 prefill",
    ]
    small = speed.batches(Limits(max_tokens=64, max_context=64, max_seqs=8), 100)
    assert list(small) == ["1 decodes", "8 decodes"] and small["8 decodes"].decodes == (32,) * 8


def test_a_section_that_fails_or_is_late_stops_no_other(tmp_path, monkeypatch):
    def broken(check):
        raise RuntimeError("a bad\nthing")

    def late(check):
        check.add_row("bounds", {"batch": "x", "ms": float("inf")})
        raise TimeUp

    sections = {"one": (broken, 0.5), "two": (late, 0.25), "three": (lambda check: None, 0.25)}
    monkeypatch.setattr(gpu_check, "SECTIONS", sections)
    lines = []
    check = Check("m", tmp_path, "cpu", Limits())
    gpu_check.run_sections(check, list(sections), 5.0, lines.append)
    found = json.loads((tmp_path / "summary.json").read_text())
    fates = [found["sections"][name]["fate"] for name in sections]
    assert fates == ["failed: RuntimeError: a bad thing", "time ran out", "done"] and len(lines) == 3
    assert "RuntimeError" in (tmp_path / "errors.txt").read_text()
    assert found["bounds"] == [{"batch": "x", "ms": None}], "JSON has no infinity"
    assert list(csv.DictReader((tmp_path / "bounds.csv").open())) == [{"batch": "x", "ms": "inf"}]
    assert "| one | failed: RuntimeError: a bad thing |" in (tmp_path / "summary.md").read_text()


def test_no_time_left_runs_nothing(tmp_path):
    check = Check("random:tiny", tmp_path, "cpu", Limits())
    gpu_check.run_sections(check, list(SECTIONS), 0.0, lambda line: None)
    assert {entry["fate"] for entry in check.results["sections"].values()} == {"time ran out"}


def test_a_backend_whose_graphs_fail_is_made_without(tmp_path, monkeypatch):
    asked = []

    def make(self, graphs):
        asked.append(graphs)
        if graphs is None:
            raise RuntimeError("capture failed")
        return "backend"

    monkeypatch.setattr(Check, "_make_backend", make)
    check = Check("random:tiny", tmp_path, "cpu", Limits())
    assert check.backend == "backend" and check.backend == "backend" and asked == [None, False]
    assert check.results["without_graphs"] == "RuntimeError: capture failed"


def test_everything_runs_on_the_cpu(tmp_path, capsys):
    limits = ["--max-tokens", "128", "--max-context", "96", "--max-seqs", "8", "--mixtures", "10"]
    assert gpu_check.main([*SMALL, *limits, "--out", str(tmp_path / "out"), "--minutes", "0.6"]) == 0
    said = json.loads(capsys.readouterr().out)
    late = {name for name in SECTIONS if said[name] == "time ran out"}
    assert {said[name] for name in SECTIONS} <= {"done", "time ran out"} and late <= {"sweep", "sim2real", "generate"}
    out = tmp_path / "out"
    found = json.loads((out / "summary.json").read_text())
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["ceilings"]["bandwidth_gb_s"] > 0.0 and found["fit"]["held_out_rows"] > 0
    assert found["correctness"]["tokens"]["passed"] and found["correctness"]["tokens"]["tokens"] > 100
    assert all(row["passed"] for row in found["correctness"]["logits"])
    assert load_profile(out / "profile.json").fit == {k: v for k, v in found["fit"].items() if k != "tile_tokens"}
    rows = list(csv.DictReader((out / "bounds.csv").open()))
    assert [row["batch"] for row in rows] == ["1 decodes", "8 decodes", "16 decodes + 48 prefill"][: len(rows)]
    assert all(float(row["ms"]) > 0.0 and 0.0 <= float(row["share_outside"]) <= 1.0 for row in rows)
    if "sim2real" not in late:
        assert found["sim2real"]["loads"] == 3 and (out / "sim2real" / "report.html").exists()
    assert "## Batches against their bounds" in (out / "summary.md").read_text()
    assert gpu_check.main([*SMALL, "--out", str(out)]) == 2 and "has a summary already" in capsys.readouterr().err


def test_static_shapes_pass_the_check_of_graphs(tmp_path):
    from llmsched_gym.real_backend.gpu_check.correct import graphs_against_eager

    limits = Limits(max_tokens=64, max_context=64, max_seqs=8)
    check = Check("random:tiny", tmp_path, "cpu", limits, graphs=True)
    rows = graphs_against_eager(check.backend, limits)
    assert [row["decodes"] for row in rows] == [1, 3, 7] and all(row["passed"] for row in rows)
    check.backend.check()


def test_wrong_sections_are_one_line(tmp_path, capsys):
    assert gpu_check.main([*SMALL, "--out", str(tmp_path / "x"), "--sections", "sweep,all"]) == 2
    assert "sections: expected some of versions" in capsys.readouterr().err


def test_tables_of_markdown_by_hand():
    assert report.table([{"a": 1.23456, "b": None}, {"a": "x|y", "b": True}]) == (
        "| a | b |\n|---|---|\n| 1.235 | - |\n| x/y | True |"
    )
    assert report.table([]) == "none"


def test_a_failed_section_is_told_by_the_exit_code(tmp_path, capsys):
    arguments = [
        "--model",
        str(tmp_path / "none"),
        "--out",
        str(tmp_path / "out"),
        "--sections",
        "versions,correctness",
    ]
    assert gpu_check.main(arguments) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["versions"] == "done" and "no such folder" in printed["correctness"]
