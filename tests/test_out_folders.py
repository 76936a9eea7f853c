"""A wrong --out: a folder of somebody else's is left as it is, with one line; one of its own kind is gone on with."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import new_folder, ray_map
from llmsched_gym import cli
from llmsched_gym.agents.run_folder import open_run
from llmsched_gym.config import ConfigError
from llmsched_gym.evaluation.replay import claim_replay
from llmsched_gym.evaluation.store import claim_results
from llmsched_gym.policies import read_folder, write_folder
from llmsched_gym.scheduler import PolicyError

SHIPPED = Path(__file__).parents[1] / "llmsched_gym" / "data" / "policies" / "tuned-constant"
QUICK = ["--seeds", "1", "--num-requests", "4", "--workers", "1", "--set", "warmup_s=0"]
RUN = "request_id,arrival_s,prompt_tokens,output_tokens,ttft_s,e2e_s\n"


def held(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(params=["report.html", "config.json", "runs.parquet", "servers/mine/notes.txt", "capacity-mine.json"])
def stranger(request, tmp_path):
    """A folder in which somebody else keeps something, called as a file of ours may be."""
    path = tmp_path / "thesis" / request.param
    path.parent.mkdir(parents=True)
    path.write_text('{"mine": 1}')
    return tmp_path / "thesis"


@dataclass(frozen=True)
class Training:
    out: str
    resume: bool = False


def test_strangers_folders_are_left_as_they_are(stranger, capsys):
    before = held(stranger)
    run = stranger.parent / "run.csv"
    run.write_text(RUN)
    out = ["--out", str(stranger)]
    commands = [
        ["evaluate", "--policy", "sarathi", "--qps", "1", *QUICK, *out],
        ["capacity", "--policy", "sarathi", "--criterion", "paper", *QUICK, *out],
        ["serve-bench", "--label", "x", "--url", "http://127.0.0.1:9", "--qps", "1", "--seeds", "1", *out],
        ["replay", str(run), "--profile", "rtx6000ada-mistral-7b", *out],
        ["reproduce", "--pieces", "main_table", *out],
    ]
    for command in commands:
        assert cli.main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"llmsched: out: {stranger} holds files of something else (") and error.count("\n") == 1
    with pytest.raises(ConfigError, match=r"^out: .*thesis holds "):
        open_run(Training(str(stranger)))
    with pytest.raises(PolicyError, match=r"^out: .*thesis holds .* would be replaced as a whole"):
        write_folder(stranger, *read_folder(SHIPPED))
    assert held(stranger) == before and sorted(path.name for path in stranger.parent.iterdir()) == ["run.csv", "thesis"]


def test_folders_of_ones_own_kind_are_gone_on_with(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".DS_Store").write_text("")  # is nobody's
    capacity = ["capacity", "--policy", "sarathi", "--criterion", "attainment:0.5", "--qps", "1,2", *QUICK]
    evaluate = ["evaluate", "--policy", "sarathi", "--qps", "1", "--no-bound", *QUICK]
    for command in (capacity, evaluate, capacity, evaluate):
        assert cli.main([*command, "--out", str(out)]) == 0, capsys.readouterr().err
    (out / "notes.txt").write_text("mine, beside the results")
    assert cli.main([*evaluate, "--out", str(out)]) == 0
    claim_results(tmp_path / "none yet")
    (tmp_path / "replay").mkdir()
    (tmp_path / "replay" / "requests.csv").write_text("row,prompt_tokens,output_tokens,arrival_s,measured_ttft_s\n")
    claim_replay(tmp_path / "replay")
    policy = write_folder(tmp_path / "policy", *read_folder(SHIPPED))
    assert write_folder(policy, *read_folder(SHIPPED)) == policy


def test_a_policy_folder_with_something_of_ones_own_in_it_is_not_replaced(tmp_path):
    policy = write_folder(tmp_path / "policy", *read_folder(SHIPPED))
    (policy / "notes.txt").write_text("mine")
    with pytest.raises(PolicyError, match=r"holds notes.txt, and would be replaced as a whole"):
        write_folder(policy, *read_folder(SHIPPED))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PolicyError, match="expected a folder, got the file"):
        write_folder(tmp_path / "file", *read_folder(SHIPPED))
    assert (policy / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("own", [False, True])
def test_checks_of_ray_empty_no_folder_but_their_own(own, tmp_path):
    (tmp_path / "own_policy.py").write_text(ray_map.OWN if own else "mine")
    if own:
        new_folder(tmp_path, ray_map.MARKS)
        assert not held(tmp_path)
        return
    with pytest.raises(ConfigError, match=r"holds files of something else"):
        new_folder(tmp_path, ray_map.MARKS)
    assert (tmp_path / "own_policy.py").read_text() == "mine"
