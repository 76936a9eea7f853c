"""The three ways in, as their pages and the notebook show them: every command and snippet runs, at a small size."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from llmsched_gym.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "paths"
SMALL = {
    "evaluate": ["--seeds", "1", "--num-requests", "30", "--qps", "6", "--policy", "slai,sarathi", "--no-bound"],
    "capacity": ["--seeds", "1", "--num-requests", "30", "--policy", "slai", "--qps", "4,6"],
    "watch": ["--speed", "inf", "--seconds", "10", "--policy", "slai"],
}
"""What makes a command cheap: options that come last count."""


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (PAGES / f"{page}.md").read_text(encoding="utf-8"), re.S)


def commands(page):
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("llmsched ")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_a_trace_and_a_gpu_to_a_capacity(folder, capsys):
    made, *_ = blocks("device", "sh")
    subprocess.run(["sh", "-c", made], check=True, timeout=60)
    asked = commands("device")
    assert [words[0] for words in asked] == ["trace", "roofline", "evaluate", "watch", "capacity"]
    for words in asked:
        if words[0] in ("evaluate", "capacity"):
            words = [*words[: words.index("--out")], "--workers", "1"]  # reports are tested where they are made
        assert main([*words, *SMALL.get(words[0], [])]) == 0, words
        printed = capsys.readouterr().out
        if words[0] == "trace":
            assert "over 8,192 tokens    0.55 %" in printed


def test_a_first_agent(capsys):
    (snippet,) = blocks("agent", "python")
    exec(snippet, {})
    assert 0.5 < float(re.search(r"earns ([\d.]+) a request", capsys.readouterr().out)[1]) <= 1.0
    train, evaluate = commands("agent")
    assert train[0] == "ppo" and evaluate[0] == "evaluate"
    Config = pytest.importorskip("llmsched_gym.agents.ppo").Config
    names = {word[2:].replace("-", "_") for word in train if word.startswith("--")}
    assert names <= {*Config.__dataclass_fields__, "set"}


def test_a_device_in_the_theory(folder, capsys):
    (made,) = commands("theory")
    assert main(made) == 0
    space = {}
    for snippet in blocks("theory", "python"):
        small = snippet.replace("num_requests=4000", "num_requests=200").replace(
            '"num_requests": 4000', '"num_requests": 200'
        )
        exec(small.replace('"resolution": 0.02', '"resolution": 0.5'), space)
    printed = capsys.readouterr().out
    assert "3.77 requests/s, limited by max_num_seqs" in printed and "of the fluid capacity" in printed
    assert re.search("(bounded|growing|undecided)$", printed.strip())


def test_the_notebook_runs(folder, monkeypatch, capsys):
    pytest.importorskip("stable_baselines3")
    monkeypatch.setenv("LLMSCHED_FIRST_HOUR_STEPS", "2048")
    monkeypatch.syspath_prepend(str(ROOT))
    file = ROOT / "examples" / "first_hour.ipynb"
    cells = [cell for cell in json.loads(file.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert file.stat().st_size < 20_000 and all("execution_count" in cell for cell in cells)
    space = {"__name__": "__main__"}
    for cell in cells:
        exec("".join(cell["source"]), space)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["agent", "slai", "on-time", "sarathi"]
    assert Path("out/ppo.zip").exists()
