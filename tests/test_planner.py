"""The planner that tries schedulers ahead, and the futures that it draws."""

import json

import helpers
import numpy as np
import pytest

from llmsched_gym.agents import planner_headroom
from llmsched_gym.agents.futures import Futures, hinted, remaining
from llmsched_gym.agents.planner import Plan, Planner, mean_utility, run_planned, run_until, schedulers, standing
from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.engine import Engine
from llmsched_gym.engine.records import RUNNING, WAITING
from llmsched_gym.evaluation.outcomes import Outcomes
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.scheduler import install, make_scheduler
from llmsched_gym.workload import make_table
from llmsched_gym.workload.lengths import load_lengths

BUSY = scenario("default", qps=2.5, num_requests=12, warmup_s=2.0, drain_s=20.0)
SHORT = {"interval_s": 2.0, "horizon_s": 6.0}
ASKED = (
    "prompt_tokens",
    "num_output_tokens",
    "num_computed_tokens",
    "arrival_s",
    "phase",
    "lateness_s",
    "last_token_s",
)


@pytest.mark.parametrize("futures", [0, 2])
def test_who_always_picks_on_time_runs_as_on_time_does(futures, monkeypatch):
    choose = Planner.choose
    monkeypatch.setattr(Planner, "choose", lambda self, engine: (0, choose(self, engine)[1]))
    plan = Plan(**SHORT, futures=futures, alternatives=("on-time", "srpt-capped"))
    ours = run_planned(BUSY, plan, 5, num_steps=4000).episode
    theirs = simulate(BUSY, "on-time", 5, num_steps=4000)
    assert len(ours.steps) == len(theirs.steps) > 300
    assert np.array_equal(ours.steps, theirs.steps)
    assert ours.requests["resolved_s"].tolist() == pytest.approx(theirs.requests["resolved_s"].tolist(), nan_ok=True)
    assert mean_utility(ours) == mean_utility(theirs)


def test_the_informed_planner_finds_the_better_order_and_keeps_what_it_saw():
    # first come, first served makes the short prompt wait for the long one; by deadline both are on time
    rows = [helpers.request(prompt=4000, ttft=100.0, output=3), helpers.request(prompt=100, ttft=0.3, output=3)]
    rows += [helpers.request(arrival_s=6.0, prompt=4000, ttft=100.0), helpers.request(6.0, prompt=100, ttft=0.3)]
    world = scenario("paper", num_requests=4, profile="rtx6000ada-mistral-7b")
    table = helpers.table(rows)
    plan = Plan(interval_s=0.5, horizon_s=20.0, alternatives=("sarathi", "sarathi[order=edf]"))
    found = run_planned(world, plan, 0, table=table)
    held = [mean_utility(simulate(world, name, 0, table=table)) for name in plan.alternatives]
    assert held == [0.5, 1.0]
    assert found.chosen[0] == 1 and mean_utility(found.episode) == 1.0
    # rollouts reach the end, so what is seen is never lost again
    assert all(later >= value for value, later in zip(found.promised, found.promised[1:], strict=False))
    assert found.promised[-1] == 4.0


def test_with_a_margin_it_leaves_the_first_only_for_what_futures_agree_on(monkeypatch):
    engine = Engine(BUSY, 200)
    engine.reset(make_table(BUSY, 5))
    for margin, values, best in (
        (0.0, [[5, 4, 6], [5, 7, 5]], 1),
        (1.5, [[5, 4, 6], [5, 7, 5]], 0),
        (1.5, [[5, 4, 6], [5, 7, 6]], 2),
    ):
        planner = Planner(Plan(**SHORT, futures=2, margin=margin, alternatives=("on-time", "slai", "sarathi")), BUSY, 5)
        monkeypatch.setattr(planner, "_values", lambda engine, state, env, values=values: np.array(values[env], float))
        assert planner.choose(engine)[0] == best


def test_what_the_requests_are_worth_at_the_end_is_their_utility():
    world = BUSY.replace(qps=4.0, warmup_s=0.0, patience_s=5.0, num_requests=40, drain_s=600.0)
    for rule in ("every-gap", "fraction:0.9", "deadline", "mean"):
        episode = simulate(world.replace(tbt_rule=rule), "sarathi[budget=2048]", 1)
        here, outcomes = episode.requests[episode.cohort], Outcomes(episode)
        worth = standing(episode.scenario, here, float(episode.sim.clock_s))
        assert worth.tolist() == pytest.approx(outcomes.utility.tolist())
        assert 0.0 < outcomes.attained.mean() < 1.0


def test_a_request_is_worth_one_from_a_timely_first_token_on_and_loses_it_with_a_late_one():
    engine = Engine(BUSY, 200)
    engine.reset(make_table(BUSY, 5))
    on_time = make_scheduler("on-time")
    install(on_time, engine.state)
    run_until(engine, on_time, 3.0)
    requests, clock_s = engine.state.requests[0, :60], float(engine.state.sims[0].clock_s)
    running = (requests["phase"] == RUNNING) & (requests["num_output_tokens"] > 0)
    assert running.sum() >= 2
    assert (standing(BUSY, requests, clock_s)[running] == 1.0).all()
    late = standing(BUSY, requests, clock_s + 6.5)[running]
    waited_s = clock_s + 6.5 - requests["last_token_s"][running]
    lost = 0.5 * (waited_s - requests["tbt_slo_s"][running]) / 60.0
    assert late.tolist() == pytest.approx((-lost).tolist())
    assert (standing(BUSY, requests, clock_s)[requests["phase"] == 0] == 0.0).all()


def test_drawn_futures_change_nothing_that_has_happened():
    engine = Engine(BUSY, 200)
    table = make_table(BUSY, 7)
    engine.reset(table)
    on_time = schedulers(["on-time"])[0]
    install(on_time, engine.state)
    futures = Futures(BUSY, 7, 3, 10.0)
    lengths = set()
    for decision, until_s in enumerate((0.5, 3.0, 6.0, 12.0)):
        run_until(engine, on_time, until_s)
        before = engine.state.requests[0].copy()
        ahead = futures.draw(engine, engine.save(), decision)
        again = futures.draw(engine, engine.save(), decision)
        assert engine.state.requests[0].tobytes() == before.tobytes()
        come = int(engine.state.worlds[0].next_arrival)
        live = np.isin(before["phase"][:come], (WAITING, RUNNING))
        for env, future in enumerate(ahead):
            assert future.given.table == again[env].given.table
            futures.engine.restore(future, env)
            state = futures.engine.state
            for name in ASKED:
                assert np.array_equal(state.requests[env][name][:come], before[name][:come], equal_nan=True), name
            output = state.output_tokens[env, :come]
            assert (output[live] > before["num_output_tokens"][:come][live]).all()
            assert np.array_equal(output[~live], table.output_tokens[:come][~live])
            total = output + before["prompt_tokens"][:come]
            assert (total[live] <= state.episodes[env].largest_request).all()
            stop = int(state.worlds[env].num_requests)
            arrival_s = state.arrivals[env]["arrival_s"][come:stop]
            assert (arrival_s > engine.state.sims[0].clock_s).all() and (np.diff(arrival_s) >= 0).all()
            lengths.add(tuple(output[live].tolist()))
            futures.engine.run(on_time, env, max_steps=50)
    assert len(lengths) >= 8  # each future is another


def test_what_is_left_of_an_answer_is_drawn_given_what_has_been_emitted():
    lengths = load_lengths("sharegpt")
    rng = np.random.default_rng(0)
    middle = (lengths.num_bins // 2 + rng.random(40_000)) / lengths.num_bins
    prompt, output = lengths.draw(np.stack([middle, rng.random(40_000)], axis=1))
    for emitted in (0, 100, 400):
        left = output[output > emitted]
        drawn = remaining(lengths, prompt[:4000], np.full(4000, emitted), np.full(4000, 10_000), rng.random(4000))
        assert drawn.min() >= emitted + 1
        assert np.quantile(drawn, (0.25, 0.5, 0.75)) == pytest.approx(np.quantile(left, (0.25, 0.5, 0.75)), rel=0.08)
    assert remaining(lengths, prompt[:1], np.array([100_000]), np.array([200_000]), np.array([0.5])) == 100_001


def test_a_hint_narrows_what_is_drawn_to_what_would_have_such_hints():
    lengths = load_lengths(BUSY.workload)
    rng = np.random.default_rng(0)
    prompt, output = lengths.draw(rng.random((60_000, 2)))
    sigma, emitted = 0.5, 50
    hints = output * np.exp(sigma * rng.standard_normal(len(output)))
    most = np.full(1000, 10_000)
    for told in (100.0, 400.0):
        is_like = (
            (output > emitted) & (hints > 0.97 * told) & (hints < 1.03 * told)
        )  # who has such a hint, by rejection
        like = output[is_like]
        prompts = rng.choice(prompt[is_like], 1000)
        drawn = hinted(lengths, prompts, np.full(1000, emitted), most, np.full(1000, told), sigma, rng)
        assert drawn.min() > emitted
        assert np.quantile(drawn, (0.25, 0.5, 0.75)) == pytest.approx(np.quantile(like, (0.25, 0.5, 0.75)), rel=0.12)
    oracle = hinted(lengths, prompt[:9], np.zeros(9, int), most[:9], output[:9].astype(float), 0.0, rng)
    assert (oracle == output[:9]).all()


def test_futures_of_a_told_run_keep_the_outputs_that_were_told():
    told = BUSY.replace(length_hint="oracle")
    table = make_table(told, 7)
    engine = Engine(told, len(table))
    engine.reset(table)
    on_time = make_scheduler("on-time")
    install(on_time, engine.state)
    engine.run(on_time, max_steps=400)
    futures = Futures(told, 7, 1, 10.0)
    futures.engine.restore(futures.draw(engine, engine.save(), 1)[0])
    state, come = futures.engine.state, int(engine.state.worlds[0].next_arrival)
    assert (state.output_tokens[0, :come] == engine.state.output_tokens[0, :come]).all()
    ahead = slice(come, int(state.worlds[0].num_requests))
    assert (state.arrivals[0, ahead]["length_hint"] == state.output_tokens[0, ahead]).all()


def config(tmp_path, **fields):
    small = {"suites": "default", "profiles": "rtx6000ada-mistral-7b", "loads": "own", "seeds": 2, "num_requests": 6}
    small |= {"warmup_s": 0.0, "interval_s": 4.0, "horizon_s": 4.0, "futures": 1, "set": {"drain_s": 4.0}}
    small |= {"alternatives": "on-time;sarathi", "out": str(tmp_path / "runs.jsonl")}
    return planner_headroom.Config(**{**small, **fields})


def test_the_command_goes_on_behind_what_is_there(tmp_path):
    first = planner_headroom.headroom(config(tmp_path))
    out = tmp_path / "runs.jsonl"
    lines = out.read_text().splitlines(keepends=True)
    assert len(lines) == 8 and {json.loads(line)["policy"] for line in lines} == set(first[0]["means"])
    out.write_text("".join(lines[:-1]) + lines[-1][:20])  # killed while it wrote the last
    seconds = [json.loads(line)["seconds"] for line in lines[:-1]]
    again = planner_headroom.headroom(config(tmp_path))
    assert again == first
    assert [json.loads(line)["seconds"] for line in out.read_text().splitlines()][:-1] == seconds
    text = planner_headroom.as_text(first)
    assert first[0]["best"] in text and len(text.splitlines()) == 3


def test_a_gain_has_an_interval_and_a_suite_without_one_is_solved():
    rows = [
        {"suite": "s", "profile": "p", "load": "own", "qps": None, "policy": policy, "seed": seed, "mean_utility": u}
        for policy, gain in (("on-time", 0.0), ("slai", -0.1), ("informed", 0.02), ("uninformed", 0.001))
        for seed in range(10)
        for u in (0.5 + 0.01 * seed + gain * (1.0 + 0.1 * (seed % 2)),)
    ]
    line = planner_headroom.summary(rows)[0]
    assert line["best"] == "on-time" and line["certain"] and not line["solved"]
    assert line["uninformed_over_base"] == line["uninformed_over_best"] == pytest.approx(0.00105)
    assert line["informed_over_best"] == pytest.approx(0.021)
    low, high = line["informed_over_best_interval"]
    assert 0.019 < low < 0.021 < high < 0.023
    few = planner_headroom.summary([row for row in rows if row["seed"] < 9])[0]
    assert few["informed_over_best_interval"] is None and not few["certain"]
    less = [{**row, "mean_utility": row["mean_utility"] - 0.015 * (row["policy"] == "informed")} for row in rows]
    assert planner_headroom.summary(less)[0]["solved"]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"suites": "cluster"}, "suites: expected suites of one engine, got 'cluster'"),
        ({"set": {"profile": "a100-mistral-7b"}}, "set: profile has an option of its own, --profiles"),
        ({"set": {"num_requests": 5}}, "set: num_requests has an option of its own, --num-requests"),
        ({"suites": ","}, "suites: expected names separated by commas"),
        ({"loads": "much"}, "loads: expected own or shares of the fluid capacity, 0 to 10, got 'much'"),
        ({"alternatives": "on-time;shortest-total"}, "alternatives: expected compiled schedulers that are told no"),
        ({"horizon_s": 1.0}, "horizon_s: expected interval_s"),
        ({"futures": 1, "margin": 1.0}, "futures: expected two or more with a margin, got 1"),
        ({"interval_s": 0.0}, "interval_s: expected seconds > 0"),
    ],
)
def test_a_bad_setting_is_one_line_and_nothing_is_written(tmp_path, fields, line):
    with pytest.raises(ConfigError, match=line):
        planner_headroom.headroom(config(tmp_path, **fields))
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "runs.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(ConfigError, match="is a file of something else"):
        planner_headroom.headroom(config(tmp_path))
