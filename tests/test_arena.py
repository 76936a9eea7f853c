"""`llmsched arena`: its worlds and rates, rankings and fronts of known figures, runs that go on, errors in a line."""

import json
import math

import pytest

from llmsched_gym import cli
from llmsched_gym.config import ConfigError, find_suite, suite_text
from llmsched_gym.evaluation import arena as arenas
from llmsched_gym.evaluation import cells
from llmsched_gym.evaluation.store import grid_config
from llmsched_gym.fluid import fluid_capacity
from llmsched_gym.registry import make_scheduler, registry
from llmsched_gym.report import arena

SMALL = {"suites": ("paper",), "profiles": ("own",), "loads": (0.5, 0.9), "seeds": 2, "num_requests": 20}
PAIR = {"policies": ("sarathi", "sarathi-spf"), "reference": "sarathi"}
OPTIONS = [
    "--suites",
    "paper",
    "--profiles",
    "own",
    "--loads",
    "0.5,0.9",
    "--seeds",
    "2",
    "--num-requests",
    "20",
    "--tuned",
    "none",
    "--workers",
    "1",
]


def known(label, attainment, ttft_s, tokens, seeds=10, **more):
    """Rows of a scheduler in two worlds whose figures differ by a little from seed to seed, the same for everybody."""
    rows = []
    for seed in range(seeds):
        for share in (0.5, 0.9):
            figures = {
                "slo_attainment": attainment + 0.001 * seed,
                "ttft_p99_s": None if ttft_s is None else ttft_s * (1.0 + seed),
                "itl_p99_s_by_class": {"strict": 0.1, "relaxed": 0.2},
                "num_requests_by_class": {"strict": 1, "relaxed": 1},
                "throughput_tok_s": tokens,
                "attained_by_decile": [1.0, attainment, None],
            }
            place = {"arena_suite": "paper", "arena_profile": "own", "share": share, "seed": seed, "clairvoyant": False}
            rows.append({"label": label, **place, **figures, **more})
    return rows


def standings(rows, name, reference="a"):
    objective = next(o for o in arena.OBJECTIVES if o.name == name)
    return {s.label: s for s in arena.ranking(arena.figures(rows), objective, reference)}


def test_all_schedulers_but_the_random_one_take_part_and_those_that_know_lengths_again_with_hints():
    found = arenas.Arena(hints=("noisy:0.5",))
    assert set(found.policies) == set(registry()) - {"random"}
    assert found.seeds >= 10  # or there would be no intervals
    hinted = [world for world in found.worlds() if world.kind == "noisy:0.5"]
    assert set(hinted[0].policies) == {"a-min", "mc-sf", "shortest-total", "wait"}
    assert found.world("paper", "own", "noisy:0.5").length_hint == "noisy:0.5"
    assert found.label("own", "noisy:0.5", "wait") == "wait, noisy:0.5"


def test_loads_are_shares_of_each_profiles_own_capacity():
    world = arenas.Arena(**SMALL, **PAIR).worlds()[0]
    own, other = (world.arena.world("paper", name) for name in ("own", "rtx6000ada-mistral-7b-vllm"))
    for given in (own, other):
        rates = world.rates(given)
        assert list(rates.values()) == [0.5, 0.9]
        assert list(rates) == pytest.approx([share * fluid_capacity(given).qps for share in (0.5, 0.9)], rel=1e-3)
    assert other.profile != own.profile


def test_rankings_are_paired_with_the_reference_and_mark_the_best():
    rows = known("a", 0.5, 1.0, 100.0) + known("b", 0.6, 2.0, 50.0) + known("c", 0.9, 9.0, 9.0, clairvoyant=True)
    found = standings(rows, "attainment")
    assert list(found) == ["c", "b", "a"] and [s.tied for s in found.values()] == [False, True, False]
    # seeds differ in what all share, so that the paired interval is a point
    assert found["b"].change == pytest.approx(10.0) and found["b"].change_ends == pytest.approx((10.0, 10.0))
    assert found["a"].value == pytest.approx(50.45) and found["a"].change_ends is None
    found = standings(rows, "ttft_p99_s")
    assert next(iter(found)) == "a" and found["b"].change == pytest.approx(2.0)
    assert found["a"].value == pytest.approx(math.prod(range(1, 11)) ** 0.1)
    found = standings(rows, "throughput")
    assert found["b"].change_ends == pytest.approx((0.5, 0.5))
    assert standings(rows, "worst_tenth")["b"].value == pytest.approx(60.0)


def test_a_latency_that_never_came_counts_as_the_latest_one_and_few_seeds_have_no_interval():
    rows = known("a", 0.5, 1.0, 100.0, seeds=9) + known("b", 0.5, None, 100.0, seeds=9)
    found = standings(rows, "ttft_p99_s")
    assert found["b"].value == pytest.approx(arena.LATE_S) and found["b"].change_ends is None


def test_the_front_is_whom_nobody_beats_at_once():
    rows = [
        *known("a", 0.5, 1.0, 100.0),
        *known("b", 0.6, 2.0, 100.0),  # later, attains more
        *known("c", 0.5, 2.0, 100.0),  # as a, later
        *known("d", 0.1, 9.0, 101.0),  # the highest throughput
        *known("e", 0.9, 0.1, 900.0, clairvoyant=True),
    ]
    assert arena.front(arena.figures(rows), "a") == ["b", "a", "d"]


def test_a_page_says_who_leads_and_an_arena_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = ["arena", "--out", str(out), "--policies", "sarathi,sarathi-spf", "--reference", "sarathi", *OPTIONS]
    assert cli.main(command) == 0
    page = (out / "report.md").read_text()
    assert "| sarathi |" in page and "## Pareto fronts" in page and "## Throughput" in page
    assert '"pareto-0"' in (out / "report.html").read_text() and (out / "figures" / "pareto-0.png").exists()
    assert "llmsched arena --out" in page and "--reference sarathi" in page
    world = out / "paper" / "own" / "untuned"
    assert sorted(path.name for path in world.iterdir()) == ["config.json", "runs.parquet"]
    held = json.loads((out / "config.json").read_text())
    assert held["arena"]["loads"] == [0.5, 0.9] and held["worlds"][0]["folder"] == "paper/own/untuned"
    capsys.readouterr()
    monkeypatch.setattr(cells, "simulate", None)  # nothing is run again
    assert cli.main(command) == 0 and (out / "report.md").read_text() == page
    assert cli.main([*command, "--seeds", "3"]) == 2  # runs of another grid are not mixed in
    error = capsys.readouterr().err
    assert "holds an arena of other seeds; choose another folder" in error and error.count("\n") == 1
    assert json.loads((out / "config.json").read_text()) == held


def test_tuned_constants_run_under_the_name_of_what_they_tune(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[[tuned]]\nprofile = "own"\nname = "sarathi"\npolicy = "sarathi[budget=256]"\nseeds = 8\n')
    constants = arenas.read_constants(path)
    tuned = [w for w in arenas.Arena(**SMALL, **PAIR, constants=constants).worlds() if w.kind == "tuned"]
    assert [w.policies for w in tuned] == [("sarathi[budget=256]",)]
    rows = tuned[0].run(tmp_path, 1, lambda done, total: None)
    assert {row["label"] for row in rows} == {"sarathi, tuned"} and len(rows) == 4
    assert not arenas.chosen(constants, ["rtx6000ada-mistral-7b-vllm"])


def test_the_shipped_constants_can_be_made_and_say_how_they_were_found():
    found = arenas.read_constants(arenas.TUNED_FILE)
    assert {constants.profile for constants in found} == set(arenas.Arena.profiles)
    for constants in found:
        make_scheduler(constants.policy)
        assert constants.policy.startswith(constants.name + "[") and constants.how["template"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    {
        ("--loads", "high"): "loads: expected numbers separated by commas, got 'high'",
        ("--loads", "0"): "loads: expected shares of the fluid capacity above 0 and up to 10, got 0",
        ("--suites", "cluster"): "suite: expected one of paper, default",
        ("--profiles", "nothing"): "nothing",
        ("--policies", "nobody"): "policy 'nobody' is unknown",
        ("--reference", "slai"): "reference: expected one of the policies, got 'slai'",
        ("--hints", "loud"): "length_hint: expected one of none, oracle, noisy:NUMBER, got 'loud'",
        ("--hints", "oracle"): "hints: expected noisy:SIGMA, got 'oracle'",
        ("--tuned", "missing.toml"): "tuned: cannot read missing.toml: No such file or directory",
        ("--capacity", "all"): "criterion: expected METRIC.FIGURE<=SECONDS",
        ("--seeds", "0"): "seeds: expected a whole number >= 1, got 0",
        ("--num-requests", "0"): "num_requests: expected a whole number >= 1, got 0",
    }.items(),
)
def test_bad_input_is_one_line_and_writes_nothing(wrong, said, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["arena", "--out", str(out), "--policies", "sarathi", "--reference", "sarathi", *OPTIONS, *wrong]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not out.exists()


def test_suites_that_would_share_a_folder_are_refused_before_the_first_run(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.toml").write_text(suite_text(find_suite("paper")))
    suites = tuple(str(tmp_path / name / "mine.toml") for name in ("one", "two"))
    with pytest.raises(ConfigError, match="would have the same folder, mine/own/untuned; rename a file"):
        arenas.Arena(**SMALL | {"suites": suites}, **PAIR)


def test_a_file_of_constants_that_is_none_is_one_line(tmp_path):
    path = tmp_path / "mine.toml"
    for text, said in {
        "tuned = 3": "expected tables",
        "[[tuned]]\nname = 3": "a text 'profile'",
        "nothing": "no TOML",
        2 * '[[tuned]]\nprofile = "own"\nname = "slai"\npolicy = "slai"\n': "constants of slai for own once",
    }.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            arenas.read_constants(path)


def test_a_name_that_ends_in_a_plus_is_no_folder(tmp_path, monkeypatch):
    """Results do not depend on what lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    world = arenas.Arena(**SMALL, **PAIR).world("paper", "own")
    before = grid_config(world, ["eb+"])
    (tmp_path / "notes.txt").write_text("mine")
    assert grid_config(world, ["eb+"]) == before
