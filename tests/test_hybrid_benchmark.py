"""`benchmarks.hybrid`: its worlds, what its tables say of known figures, and runs that go on where they stopped."""

import csv

import numpy as np
import pytest

from benchmarks import hybrid
from llmsched_gym.cost import PROFILES, load_profile
from llmsched_gym.scheduler import make_scheduler

RNG = np.random.default_rng(0)
COMMON = RNG.uniform(-0.02, 0.02, 20)  # what seeds share


def shares(mean, noise=0.001):
    return np.clip(mean + COMMON + RNG.normal(0, noise, 20), 0, 1).tolist()


def rows_of(world, values):
    return [hybrid.summary(world, policy, values) for policy in values]


def world(section="loads", profile="h100-mistral-7b", at=0.9):
    return hybrid.World(section, profile, at, 2.0, ())


# --- worlds


def test_the_worlds_of_each_section():
    facts, axis = hybrid.facts(["on-time"]), hybrid.axis(["edf"])
    assert [(w.profile.partition("-")[0], w.qps) for w in facts[::2]] == [
        ("rtxpro6000", 3.0),
        ("rtxpro6000", 3.5),
        ("rtx4090", 1.8),
    ]
    for own, twin in zip(facts[::2], facts[1::2], strict=True):
        assert twin.profile == f"{own.profile}[additive=true]" and twin.qps == own.qps
        assert load_profile(own.profile).surface is not None and load_profile(twin.profile).surface is None
    assert [w.at for w in axis] == [1.0, 1.5, 2.0, 3.0, 4.0]
    assert axis[0].qps > axis[1].qps == pytest.approx(axis[-1].qps, rel=1e-6)  # exclusive batches are optimal by then
    assert axis[0].qps == pytest.approx(0.9 * hybrid.capacity("rtx6000ada-mistral-7b"), rel=0.01)
    for every in (facts, axis):
        assert len({w.folder for w in every}) == len(every)
        assert all(len(set(w.policies)) == len(w.policies) for w in every)
    assert axis[0].policies[-1] == "edf" and facts[0].policies.count("on-time") == 1
    for policy in axis[0].policies:
        make_scheduler(policy)


def test_loads_are_shares_of_every_profiles_own_capacity(monkeypatch):
    monkeypatch.setattr(hybrid, "capacity", lambda name: 10.0 + PROFILES.index(name))
    found = hybrid.loads(["on-time"])
    assert [(w.profile, w.at) for w in found] == [(name, at) for name in PROFILES for at in hybrid.SHARES]
    assert found[1].qps == 9.0 and found[-1].qps == 10.0 + len(PROFILES) - 1


def test_a_variant_that_did_the_same_is_no_other_policy():
    values = {"on-time": shares(0.9), "edf": shares(0.8)}
    values["on-time[mix=together]"] = values["on-time"]
    assert hybrid.summary(world(), "on-time", values)["best_other"] == "edf"
    values["on-time[mix=together]"] = shares(0.95)
    assert hybrid.summary(world(), "on-time", values)["best_other"] == "on-time[mix=together]"


# --- tables


def test_differences_are_paired_and_to_the_best_of_the_others():
    values = {"a": shares(0.9), "b": shares(0.901), "c": shares(0.7)}
    a, b, c = rows_of(world(), values)
    assert (a["best_other"], b["best_other"], c["best_other"]) == ("b", "a", "b")
    assert a["difference"] == pytest.approx(-b["difference"]) == pytest.approx(-0.001, abs=0.001)
    # seeds move all policies alike: paired intervals are far narrower than each one's own
    assert a["difference_ci_high"] - a["difference_ci_low"] < 0.2 * (a["ci_high"] - a["ci_low"])
    assert hybrid.verdict(c) == "worse" and hybrid.verdict(rows_of(world(), {"a": [0.5], "b": [0.4]})[0]) == (
        "too few seeds"
    )


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.001, 0.01, "better"),
        (-0.004, 0.002, "equal"),
        (-0.004, -0.002, "equal"),
        (-0.006, 0.002, "not shown"),
        (-0.02, -0.01, "worse"),
    ],
)
def test_verdicts(low, high, said):
    assert hybrid.verdict({"difference_ci_low": low, "difference_ci_high": high}) == said


def test_tables_in_words():
    rows = [
        *rows_of(world(), {"on-time": shares(0.9), "m.n:SLOW": shares(0.9, 0.003), "slai": shares(0.6)}),
        *rows_of(world(at=1.0), {"on-time": shares(0.5), "m.n:SLOW": shares(0.8), "slai": shares(0.6)}),
    ]
    text = hybrid.loads_text(rows, "on-time")
    lines = text.split("\n")
    assert lines[2].startswith("| h100-mistral-7b | 0.9 | 2.00 | 90.") and lines[2].endswith("| equal |")
    assert "| `slow` |" in lines[3] and lines[3].endswith("| worse |")
    assert "`on-time`, `slow` |" in text or "`slow`, `on-time` |" in text
    assert hybrid.axis_text(rows, "on-time").endswith("(axis.png)")
    assert "h100-mistral-7b, 2/s" in hybrid.facts_text(rows, "on-time")


# --- runs


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(hybrid, "POLICIES", ("sarathi", "on-time"))
    monkeypatch.setattr(hybrid, "AXIS_POLICIES", ("sarathi", hybrid.PACED))
    monkeypatch.setattr(hybrid, "FACTORS", (1.0, 4.0))
    return ["--section", "axis", "--seeds", "2", "--num-requests", "60", "--workers", "1", "--candidate", "on-time"]


def test_a_run_goes_on_where_it_stopped(small, tmp_path, monkeypatch, capsys):
    out = tmp_path / "hybrid"
    assert hybrid.main([*small, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.err.endswith("1/2 worlds\n2/2 worlds\n")
    first = {name: (out / f"axis.{name}").read_bytes() for name in ("csv", "md", "png")}
    assert first["png"].startswith(b"\x89PNG") and first["md"].decode() in said.out
    with (out / "axis.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 and {row["at"] for row in rows} == {"1.0", "4.0"}
    assert rows[0]["policy"] == "sarathi" and 0 <= float(rows[0]["attainment"]) <= 1 and rows[0]["ci_low"] == ""

    from llmsched_gym.evaluation import cells

    monkeypatch.setattr(cells, "simulate", lambda *args, **settings: pytest.fail("ran again"))
    for name in first:
        (out / f"axis.{name}").unlink()
    assert hybrid.main([*small, "--out", str(out)]) == 0
    assert {name: (out / f"axis.{name}").read_bytes() for name in first} == first


def test_other_settings_do_not_mix_with_what_a_folder_holds(small, tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    assert hybrid.main([*small, *out]) == 0
    assert hybrid.main([*small, *out, "--seeds", "3"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "holds results of another configuration (it differs in seeds)" in said


@pytest.mark.parametrize(
    "argv", [["--section", "facts,all"], ["--seeds", "0"], ["--policy", "on-tim"], ["--candidate", "slai[x=1]"]]
)
def test_bad_arguments(argv, tmp_path, capsys):
    out = tmp_path / "none"
    try:
        code = hybrid.main([*argv, "--out", str(out)])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and not out.exists()
    assert "Traceback" not in capsys.readouterr().err
