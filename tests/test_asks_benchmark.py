"""`benchmarks.asks`: schedulers and bursts, the figures that it adds to rows, and what its tables say of known rows."""

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import asks
from llmsched_gym.config import scenario
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.registry import make_scheduler, registry
from llmsched_gym.workload import make_table

CHEAP = asks.Ask("Known", (0.8,), (("a", "b"),), ("ttft_p99_s", "slo_attainment"))


def known(ttft_s, attained, seeds=10):
    """Rows of `a`, and of `b` with such a TTFT and attainment, beside what seeds share."""
    rows = []
    for seed in range(seeds):
        common = {"requested_qps": asks.load_of(0.8), "seed": seed}
        rows.append({**common, "policy": "a", "ttft_p99_s": 1.0 + seed, "slo_attainment": 0.5 + 0.01 * seed})
        own = {"ttft_p99_s": ttft_s * (1.0 + seed), "slo_attainment": attained + 0.01 * seed}
        rows.append({**common, "policy": "b", **own})
    return rows


def test_every_scheduler_of_every_ask_exists_and_groups_have_someone_to_compare():
    for ask in asks.ASKS.values():
        assert all(len(group) > 1 for group in ask.groups)
        assert set(ask.figures) <= set(asks.LABELS)
        for group in ask.groups:
            for policy in group:
                make_scheduler(policy)


def test_a_burst_moves_arrivals_alone_and_only_its_own():
    given = make_table(scenario("paper", qps=1.0, num_requests=100), 0)
    burst = asks.with_burst(given, 20)
    start = int(np.flatnonzero(burst.arrival_s != given.arrival_s)[0]) - 1
    assert start == 40
    assert (burst.arrival_s[start : start + 20] == given.arrival_s[start]).all()
    assert (np.diff(burst.arrival_s) >= 0).all()
    assert (burst.arrival_s[start + 20 :] == given.arrival_s[start + 20 :]).all()
    assert (burst.prompt_tokens == given.prompt_tokens).all()


def test_figures_that_rows_lack_are_those_of_the_requests():
    found = asks.run("sarathi", 1.5, 3, 80, 0)
    episode = simulate(scenario("paper", qps=1.5, num_requests=80), "sarathi", 3)
    requests = episode.requests[episode.cohort]
    ttft_s = requests["first_token_s"] - requests["arrival_s"]
    assert found["gap_max_s"] == pytest.approx(requests["max_gap_s"].max())
    assert found["ttft_max_s"] == pytest.approx(ttft_s.max())
    longest = requests["prompt_tokens"] >= np.quantile(requests["prompt_tokens"], 0.9)
    assert ttft_s[longest].min() <= found["longest_ttft_p99_s"] <= ttft_s[longest].max()
    assert found["longest_attained"] == found["attained_by_decile"][-1]


def test_prompts_first_make_every_decode_wait_for_a_burst():
    first, alternating = (asks.run(policy, 1.1, 0, 120, 40) for policy in ("vllm-v0", "interleave[k=1,m=1]"))
    assert first["gap_max_s"] > 5.0 * alternating["gap_max_s"]
    assert first["requested_qps"] == 1.1 and first["num_requests"] == 120


def test_tables_give_changes_paired_by_seed():
    table = asks.table_of(CHEAP, known(0.5, 0.7))
    a, b = (line.split("|")[3:7] for line in table.splitlines()[2:])
    assert a[1].strip() == a[3].strip() == "base" and "[" in a[0] and "[" in a[2]
    # all seeds agree, whatever they share: the paired interval is a point
    assert [cell.strip() for cell in b] == ["2.75", "-50 % [-50, -50]", "74.50", "+20.00 [+20.00, +20.00]"]


def test_counts_are_means_and_their_changes_differences():
    rows = [{"requested_qps": 1.1, "seed": seed, "policy": "a", "num_preemptions": seed} for seed in range(10)]
    rows += [row | {"policy": "b", "num_preemptions": row["num_preemptions"] + 3} for row in rows]
    table = asks.table_of(asks.Ask("Known", (0.8,), (("a", "b"),), ("num_preemptions",)), rows)
    a, b = (line.split("|")[3:5] for line in table.splitlines()[2:])
    assert a[0].split()[0] == "4.50" and [cell.strip() for cell in b] == ["7.50", "+3.00 [+3.00, +3.00]"]


def test_no_change_has_no_sign_of_one_and_few_seeds_no_interval():
    assert "-0" not in asks.table_of(CHEAP, known(1.0, 0.5))
    assert "[" not in asks.table_of(CHEAP, known(0.5, 0.7, seeds=9))


def test_the_command_prints_a_table_for_each_ask(monkeypatch, capsys):
    small = asks.Ask("Small", (0.8,), (("sarathi", "sarathi-spf"),), ("gap_max_s", "longest_ttft_p99_s"), 8)
    monkeypatch.setattr(asks, "ASKS", {"small": small})
    assert asks.main(["--ask", "small", "--seeds", "2", "--num-requests", "64", "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "### Small" in printed and printed.count("\n| 1.1 |") == 2


@pytest.mark.parametrize(
    "wrong", [["--ask", "nothing"], ["--seeds", "0"], ["--num-requests", "63"], ["--first-seed", "-1"]]
)
def test_wrong_arguments_are_one_line(wrong, capsys):
    with pytest.raises(SystemExit) as error:
        asks.main(wrong)
    assert error.value.code == 2 and "expected" in capsys.readouterr().err.splitlines()[-1]


def test_the_page_names_schedulers_that_exist():
    page = (Path(__file__).parents[1] / "docs" / "choosing.md").read_text(encoding="utf-8")
    tried = [line.split(" | ")[2] for line in page.splitlines() if line.startswith("| ") and line.count(" | ") == 4]
    names = [name for cell in tried for name in re.findall(r"`([^`]+)`", cell) if "=" not in name or "[" in name]
    assert len(set(names) & set(registry())) > 10
    for name in names:
        make_scheduler(name)
