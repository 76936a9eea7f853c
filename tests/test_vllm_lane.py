"""The lane of a live server and what surrounds it, without vLLM: rows, bookkeeping, SLOs, the online fit, metrics."""

import math

import numpy as np
import pytest

from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.cost import load_profile
from llmsched_gym.engine import Batch, Engine, Execution
from llmsched_gym.engine.records import FINISHED, RUNNING, WAITING
from llmsched_gym.real_backend.errors import BackendError
from llmsched_gym.real_backend.vllm.fit import EVERY, FIRST, OnlineFit
from llmsched_gym.real_backend.vllm.lane import Lane, Served
from llmsched_gym.real_backend.vllm.metrics import Metrics
from llmsched_gym.real_backend.vllm.options import Options, read_options, slo_of
from llmsched_gym.real_backend.vllm.versions import check_version
from llmsched_gym.registry import make_scheduler
from llmsched_gym.scheduler import install
from llmsched_gym.workload import Request, make_table

WORLD = scenario("paper", num_kv_blocks=2000, max_num_seqs=16, max_num_batched_tokens=512, watermark=0.0)


def make_lane(policy="slai", capacity=64, world=WORLD):
    scheduler = make_scheduler(policy) if isinstance(policy, str) else policy
    return Lane(world, load_profile(world.profile), scheduler, capacity)


def step(lane, now_s, duration_s, blocks=None):
    """One synchronous step on a server that has what the lane thinks."""
    free = int(lane.sim.total_blocks) - sum(held(lane).values()) if blocks is None else blocks
    lane.begin(now_s, free, 16, int(lane.sim.num_running), 512)
    formed = lane.form()
    booked = lane.book(now_s, now_s + duration_s)
    lane.observe(booked)
    return formed, booked


def held(lane):
    """Blocks that a server holds: of what is computed, whatever has been promised."""
    rows = lane.engine.state.requests[0]
    return {r: -(-int(rows[r].num_computed_tokens) // 16) for r in range(lane.num_rows) if rows[r].phase == RUNNING}


@pytest.mark.parametrize("policy", ["slai", "vllm-v1", "on-time", "learned"])
def test_a_lane_decides_as_the_engine_does_on_the_same_requests(policy):
    scheduler = make_scheduler(policy)
    world = WORLD.replace(
        qps=2.0, num_requests=40, num_kv_blocks=1200, admission=scheduler.admission, max_num_batched_tokens=512
    )
    table = make_table(world, 0)
    batches = []

    class Keep:
        def execute(self, batch):
            batches.append(set(zip(batch.request.tolist(), batch.num_tokens.tolist(), strict=True)))
            return Execution(0.03)

    engine = Engine(world, len(table), backend=Keep())
    engine.reset(table)
    engine.state.own_coef_s[:, 3] = 512
    install(scheduler, engine.state)
    engine.state.sims[0].decision_s = 0.0
    lane = make_lane(policy, capacity=64, world=world)
    rows, came, number = {}, 0, 0
    while not engine.is_over() and number < 1500:
        now_s = float(engine.state.sims[0].clock_s)
        while came < len(table) and table.arrival_s[came] <= now_s:
            slo = {"ttft_slo_s": float(table.ttft_slo_s[came]), "tbt_slo_s": float(table.tbt_slo_s[came])}
            request = Request(
                int(table.prompt_tokens[came]),
                int(table.output_tokens[came]),
                slo_class=int(table.slo_class[came]),
                **slo,
            )
            rows[lane.add(request, float(table.arrival_s[came]))] = came
            came += 1
        before = len(batches)
        engine.decide(scheduler)
        engine.execute()
        end_s = float(engine.state.sims[0].clock_s)
        blocks = int(lane.sim.total_blocks) - sum(held(lane).values())
        lane.begin(now_s, blocks, 16, int(lane.sim.num_running), 512)
        formed = lane.form()
        ran = {(rows[r], n) for r, n in zip(formed.rows, formed.tokens, strict=True)}
        assert ran == (batches[-1] if len(batches) > before else set())
        if ran:
            lane.observe(lane.book(now_s, end_s))
            number += 1
        for r in list(rows):
            if lane.phase(r) == FINISHED:
                served = lane.leave(r, True)
                theirs = engine.state.requests[0, rows.pop(r)]
                assert served.max_gap_s == pytest.approx(float(theirs.max_gap_s))
                assert served.num_late == theirs.num_late_gaps
    assert number > 1000 and len(rows) < 40


def test_rows_are_taken_again_and_a_table_that_is_full_grows():
    lane = make_lane(capacity=4)
    rows, now_s = [], 0.0
    for _ in range(9):
        rows.append(lane.add(Request(32, 4), now_s))
    assert len(set(rows)) == 9 and lane.num_rows == 16
    for round_ in range(400):
        step(lane, now_s, 0.01)
        now_s += 0.01
        for r in list(rows):
            if lane.phase(r) == FINISHED:
                lane.leave(r, True)
                rows.remove(r)
                rows.append(lane.add(Request(32 + round_, 3), now_s))
    assert lane.num_born > 300 and lane.num_rows == 16 and lane.num_live == len(rows) == 9


def test_a_request_that_leaves_while_its_batch_runs_gets_nothing_more_and_its_row_is_another_s():
    lane = make_lane()
    a, b = lane.add(Request(20, 9), 0.0), lane.add(Request(20, 9), 0.0)
    step(lane, 0.0, 0.01)
    lane.begin(0.01, 1000, 16, 2, 512)
    assert sorted(lane.form().rows) == [a, b]
    lane.leave(a, False)
    booked = lane.book(0.01, 0.02)
    assert booked.emitted.tolist() == [b]
    lane.observe(booked)
    assert lane.sim.num_abandoned == 1 and lane.sim.num_running == 1
    again = [lane.add(Request(5, 5), 0.02) for _ in range(lane.num_rows - 1)]
    assert a in again and np.isnan(lane.served[a]).any()


def test_a_batch_booked_ahead_is_put_right_when_its_end_is_known():
    lane = make_lane()
    r = lane.add(Request(20, 9, ttft_slo_s=1.0, tbt_slo_s=0.05), 0.0)
    lane.begin(0.0, 1000, 16, 0, 512)
    lane.form()
    first = lane.book(0.0, 0.02)
    lane.begin(0.02, 1000, 16, 1, 512)
    lane.form()
    request = lane.engine.state.requests[0, r]
    assert request.last_token_s == 0.02 and request.lst_s <= 0.07
    lst_s = float(request.lst_s)
    lane.observe(first, 0.05)
    request = lane.engine.state.requests[0, r]
    assert request.last_token_s == request.first_token_s == 0.05
    assert request.lst_s == pytest.approx(lst_s + 0.03)
    assert lane.sim.mean_batch_s == pytest.approx(0.05)
    second = lane.book(0.05, 0.06)
    lane.observe(second, 0.13)
    served = lane.leave(r, True)
    assert served == Served(0.05, pytest.approx(0.08), 1, 1, 1.0, 0.05, 1)
    assert not served.attained


def test_what_the_server_runs_instead_is_what_the_lane_books():
    lane = make_lane()
    a, b = lane.add(Request(100, 9), 0.0), lane.add(Request(50, 9), 0.0)
    lane.begin(0.0, 1000, 16, 0, 512)
    formed = lane.form()
    assert set(formed.admitted) == {a, b}
    lane.take_back(b)
    lane.rebook([a], [32], [40])  # 32 tokens lay in a cache
    assert lane.phase(b) == WAITING and lane.work()[0] == 40
    booked = lane.book(0.0, 0.01)
    assert booked.emitted.tolist() == []
    assert lane.engine.state.requests[0, a].num_computed_tokens == 72
    lane.begin(0.01, 1000, 16, 1, 512)
    formed = lane.form()
    assert dict(zip(formed.rows, formed.tokens, strict=True))[a] == 28
    assert formed.admitted == [b]


def test_blocks_promised_to_running_prompts_are_not_free_to_the_scheduler():
    lane = make_lane("sarathi")
    lane.add(Request(1024, 9), 0.0)
    lane.begin(0.0, 100, 16, 0, 512)
    formed = lane.form()
    assert formed.tokens == [512]
    lane.book(0.0, 0.01)
    lane.begin(0.01, 100 - 32, 16, 1, 512)  # the server has given 32 blocks; 32 more are promised
    assert lane.sim.free_blocks == 36


def test_a_python_scheduler_decides_on_the_lane_and_an_illegal_batch_leaves_it_as_it_was():
    class Head:
        fails = False

        def schedule(self, view):
            if self.fails:
                return Batch({int(view.waiting[0].index): 10_000})
            return Batch({int(r.index): 1 for r in view.decodes} or {int(view.waiting[0].index): 30})

    scheduler = Head()
    lane = make_lane(scheduler)
    r = lane.add(Request(30, 3), 0.0)
    scheduler.fails = True
    lane.begin(0.0, 1000, 16, 0, 512)
    with pytest.raises(ValueError, match="rule 1"):
        lane.form()
    lane.clear()
    assert lane.phase(r) == WAITING and lane.work()[0] == 0
    scheduler.fails = False
    for i in range(3):
        step(lane, 0.1 * i, 0.1)
    assert lane.phase(r) == FINISHED


def test_options_come_from_the_command_line_and_else_from_the_environment():
    environment = {"LLMSCHED_POLICY": "sarathi", "LLMSCHED_PROFILE": "h100-mistral-7b"}
    assert read_options({}, {}).policy == "slai"
    assert read_options({}, environment) == Options("sarathi", "h100-mistral-7b")
    assert read_options({"llmsched": {"policy": "on-time"}}, environment).policy == "on-time"
    for given, what in (
        ({"llmsched": {"police": 1}}, "expected some of policy, .* got 'police'"),
        ({"llmsched": "slai"}, "expected an object"),
        ({"llmsched": {"slo_class": "gold"}}, "slo_class: expected one of strict, relaxed"),
        ({"llmsched": {"ttft_slo_s": -1}}, "ttft_slo_s: expected seconds"),
        ({"llmsched": {"metrics_port": 0}}, "metrics_port"),
    ):
        with pytest.raises(ConfigError, match=what):
            read_options(given, {})


def test_slos_of_a_request_are_its_own_its_class_s_or_the_default():
    options = Options(ttft_slo_s=0.5, ttft_slo_per_token_s=0.001, strict_tbt_slo_s=0.1, relaxed_tbt_slo_s=0.5)
    slo, usable = slo_of(None, 500, options)
    assert (slo.ttft_slo_s, slo.tbt_slo_s, slo.slo_class, usable) == (1.0, 0.5, 1, True)
    slo, usable = slo_of({"tbt_slo_s": "0.05", "ttft_slo_s": 2}, 500, options)
    assert (slo.ttft_slo_s, slo.tbt_slo_s, slo.slo_class, usable) == (2.0, 0.05, 0, True)
    slo, usable = slo_of({"slo_class": "strict"}, 500, options)
    assert (slo.ttft_slo_s, slo.tbt_slo_s, slo.slo_class, usable) == (1.0, 0.1, 0, True)
    assert slo_of({"slo_class": 1, "tbt_slo_s": 0.01}, 5, options)[0].slo_class == 1
    for bad in ({"ttft_slo_s": "soon"}, {"tbt_slo_s": -1}, {"slo_class": "gold"}, {"slo_class": [0]}):
        slo, usable = slo_of(bad, 500, options)
        assert not usable and (slo.ttft_slo_s, slo.tbt_slo_s, slo.slo_class) == (1.0, 0.5, 1)


def test_the_online_fit_finds_the_costs_of_batches_and_follows_a_change():
    rng = np.random.default_rng(0)
    fit = OnlineFit()

    def run(count, factor):
        for _ in range(count):
            tokens, pairs, kv = rng.integers(1, 512), rng.integers(0, 100_000), rng.integers(0, 200_000)
            seconds = factor * (4e-3 + 2e-5 * tokens + 3e-9 * pairs + 1e-8 * kv) * rng.lognormal(0, 0.02)
            fit.add(tokens, pairs, kv, seconds)

    run(FIRST - 1, 1.0)
    assert fit.coefficients is None
    run(40 * EVERY, 1.0)
    assert fit.coefficients == pytest.approx([4e-3, 2e-5, 3e-9, 1e-8], rel=0.1)
    run(80 * EVERY, 2.0)
    assert fit.coefficients == pytest.approx([8e-3, 4e-5, 6e-9, 2e-8], rel=0.1)
    lane = make_lane()
    fit.write(lane.engine.state)
    assert lane.engine.state.own_linear_s[0, 100] == pytest.approx(8e-3 + 4e-3, rel=0.1)
    assert lane.engine.state.own_linear_s[0, 0] == 0.0


def test_metrics_count_who_attained_what():
    metrics = Metrics()
    metrics.over(Served(0.5, 0.05, 10, 0, 1.0, 0.1, 0), True, True)
    metrics.over(Served(1.5, 0.2, 10, 3, 1.0, 0.1, 0), True, True)
    metrics.over(Served(math.nan, 0.0, 0, 0, 1.0, 0.5, 1), False, False)
    counts = metrics.counts
    assert counts[("requests", "strict", "attained")] == counts[("requests", "strict", "late")] == 1
    assert counts[("requests", "relaxed", "aborted")] == 1
    assert counts[("gaps", "strict", "yes")] == 17 and counts[("gaps", "strict", "no")] == 3
    assert counts[("promises", "strict", "yes")] == counts[("promises", "strict", "no")] == 1


def test_other_versions_of_vllm_are_refused_in_one_line():
    check_version("0.32.0")
    check_version("0.33.1+cpu")
    for version in ("0.31.0", "0.34.0", "1.0"):
        with pytest.raises(
            BackendError, match=rf"^vllm {version}: the scheduler plug-in is made for 0.32.x and 0.33.x"
        ):
            check_version(version)
