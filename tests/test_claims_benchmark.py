"""`benchmarks.claims`: verdicts and changes by hand, instances as they are described, and lines of small runs."""

import numpy as np
import pytest

from benchmarks import claims
from llmsched_gym.config import scenario
from llmsched_gym.registry import make_scheduler


@pytest.mark.parametrize(
    ("ends", "target", "said"),
    [
        ((0.1, 2.0), 0.0, "yes"),
        ((-0.1, 2.0), 0.0, "undecided"),
        ((-2.0, 0.0), 0.0, "no"),
        ((53.0, 60.0), 53.0, "yes"),
        ((50.0, 60.0), 53.0, "undecided"),
        ((40.0, 52.9), 53.0, "no"),
        (None, 0.0, "undecided"),
    ],
)
def test_a_claim_holds_if_the_whole_interval_says_so(ends, target, said):
    assert claims.verdict(ends, target) == said


def flat(name, ours, theirs):
    value, ends = claims.gain(claims.FIGURES[name], ours, theirs)
    return [value, *ends]


def test_gains_are_points_of_shares_and_percent_of_all_else_whichever_way_is_better():
    up, down = [0.5 + 0.01 * i for i in range(10)], [0.4 + 0.01 * i for i in range(10)]
    assert flat("slo_attainment", up, down) == pytest.approx([10.0] * 3)
    ours, theirs = [1.0 + i for i in range(10)], [2.0 + 2.0 * i for i in range(10)]
    assert flat("ttft_p99_s", ours, theirs) == pytest.approx([50.0] * 3)
    assert flat("token_rate", ours, theirs) == pytest.approx([-50.0] * 3)
    assert claims.gain(claims.FIGURES["token_rate"], ours[:9], theirs[:9])[1] is None


def test_changes_are_shown_as_ratios_and_points():
    claim = claims.Claim("paper", "says", "here", None, "a", ("b",), ())
    for name, text in {
        "ttft_p99_s": "×0.500 [0.400, 0.600]",
        "token_rate": "×1.500 [1.400, 1.600]",
        "slo_attainment": "+50.0 points [+40.0, +60.0]",
    }.items():
        found = claims.line(claim, "what", claims.FIGURES[name], 50.0, (40.0, 60.0))
        assert found.change == text and found.verdict == "yes"


def test_every_scheduler_of_every_claim_exists():
    found = [claim for group in claims.claims().values() for claim in group]
    assert len(found) > 10
    for claim in found:
        assert set(claim.figures) <= set(claims.FIGURES)
        for policy in (claim.policy, *claim.others):
            make_scheduler(policy)


def test_instances_are_as_they_are_described():
    world, table = claims.unit_instance(3)
    assert world.num_kv_blocks == 12 and (table.prompt_tokens == 16).all() and (table.length_hint == 2).all()
    world, table = claims.many_types(3)
    assert set(table.output_tokens) == {8, 32, 128, 512} and (table.length_hint == table.output_tokens).all()
    world, table = claims.long_prompts(3)
    is_long = table.prompt_tokens >= 65_536
    assert 0.02 < is_long.mean() < 0.08 and table.prompt_tokens.max() + table.output_tokens.max() < world.max_model_len
    assert table.ttft_slo_s == pytest.approx(0.5 + 0.0005 * table.prompt_tokens.astype(float))
    assert (np.diff(table.arrival_s) >= 0).all()


def test_a_claim_is_judged_against_the_best_of_the_others_on_other_seeds(monkeypatch):
    seen = []

    def run(world, given, policy, seed):
        seen.append((policy, seed))
        share = {"ours": 0.7, "weak": 0.2, "strong": 0.6 if seed >= claims.SELECTION else 0.5}[policy]
        return {"slo_attainment": share, "token_rate": 3.0}

    monkeypatch.setattr(claims, "run", run)
    world = scenario("paper", qps=1.0, num_requests=20)
    claim = claims.Claim("p", "s", "c", lambda s: (world, None), "ours", ("weak", "strong"), ("slo_attainment",))
    (found,) = claims.judge(claim, range(10), 1)
    assert found.what == "attainment of `ours` against `strong`" and found.verdict == "yes"
    assert found.change == "+20.0 points [+20.0, +20.0]"
    assert ("ours", claims.SELECTION) not in seen and ("weak", claims.SELECTION) in seen


def test_figures_of_a_run_are_those_of_its_requests():
    found = claims.run(scenario("paper", qps=1.0, num_requests=20), None, "sarathi", 0)
    assert found["e2e_mean_s"] > found["ttft_p50_s"] and found["token_rate"] > 0.0
    assert set(claims.FIGURES) <= set(found)


@pytest.mark.parametrize("wrong", [["--claim", "nothing"], ["--seeds", "0"], ["--first-seed", "-1"]])
def test_wrong_arguments_are_one_line(wrong, capsys):
    with pytest.raises(SystemExit) as error:
        claims.main(wrong)
    assert error.value.code == 2 and "expected" in capsys.readouterr().err.splitlines()[-1]
