"""on-time: Moore's algorithm against all subsets, what it plans by hand, and its plan as knobs."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from helpers import Run, profile, request, table
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import aging
from llmsched_gym.baselines.on_time import AGED_SHARE, SMALL_BATCH
from llmsched_gym.config import scenario
from llmsched_gym.cost import load_profile
from llmsched_gym.engine.batch import waiting_prefill
from llmsched_gym.engine.handles import unpack
from llmsched_gym.engine.jit import entry
from llmsched_gym.engine.mixing import price_of_mixing
from llmsched_gym.engine.promise import NONE_DROPPED, STRETCH, promise
from llmsched_gym.engine.records import PENDING
from llmsched_gym.engine.state import lane_of
from llmsched_gym.env import LLMSchedEnv
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.outcomes import Outcomes
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.policies.bridge import SchedulerPolicy, knobs_now
from llmsched_gym.scheduler import install, make_scheduler
from llmsched_gym.workload import shares_of_ids

LINEAR = profile((1.0, 2.0))  # n tokens take n ms: a cap of 80 ms admits 80
STRICT = {"prompt": 20, "output": 99, "tbt": 0.1}


@entry()
def promise_env(s, env, stretch):
    return promise(lane_of(unpack(s), env), stretch)


def promised(rows, stretch=1.0):
    """(promised, dropped, slack_s, work_s, shortest) of prompts that all arrive at 0."""
    run = Run("sarathi[budget=8192]", rows, device=LINEAR)
    return promise_env(run.engine.handle, 0, stretch)


def test_the_longest_prompt_is_dropped_when_not_all_can_be_on_time():
    rows = [request(prompt=n, ttft=due) for n, due in ((100, 0.3), (500, 0.65), (200, 0.7))]
    count, dropped, slack_s, work_s, shortest = promised(rows)
    # 100 and 500 end at 0.6, with 200 at 0.8: 500 has to go
    assert (count, dropped, shortest) == (2, 1, 500)
    assert (slack_s, work_s) == pytest.approx((0.2, 0.3))
    assert promised(rows[:2])[:2] == (2, 0)
    assert promised(rows[:2])[4] == NONE_DROPPED
    assert promised(rows[:2], stretch=1.2)[:2] == (1, 1)  # 0.6 s take 0.72 s


def test_with_prefix_caching_promises_count_what_is_not_cached():
    def waiting(*rows):
        """A run in which `rows`, (blocks, prompt, TTFT SLO), wait, and the cache holds a to h."""
        words = ["abcdefgh", *(word for word, _, _ in rows)]
        given = table([request(0.0, 128, 1), *(request(9.0, n, 99, tbt=0.1, ttft=due) for _, n, due in rows)])
        shares = shares_of_ids([[ord(letter) for letter in word] for word in words], given.prompt_tokens, 16)
        given = replace(given, shares_with=shares[0], shared_tokens=shares[1])
        run = Run("on-time[budget=8192]", given, device=LINEAR, prefix_caching=True)
        while run.clock_s < 9:
            run.step()
        return run

    rows = [("abcdefgz", 128, 0.2), ("ijklmn", 96, 0.1), ("opqrstu", 112, 0.25)]
    run = waiting(*rows)
    count, dropped, slack_s, work_s, _ = promise_env(run.engine.handle, 0, 1.0)
    assert (count, dropped) == (3, 0)  # 96, 16 and 112 ms; of the first 112 of 128 tokens are cached
    assert (slack_s, work_s) == pytest.approx((0.004, 0.224))
    run = waiting(("abcdexyz", 128, 0.07), ("uv", 32, 0.075))  # 48 and 32 ms: the first has to go
    assert promise_env(run.engine.handle, 0, 1.0)[:2] == (1, 1)
    assert promise_env(run.engine.handle, 0, 1.0)[4] == 48


def test_with_prefix_caching_the_price_of_mixing_counts_what_is_not_cached():
    device = LINEAR.with_mixing(4.0)
    given = table([request(0.0, 128, 1), request(8.9, 40, 99), request(9.0, 128, 2), request(9.0, 32, 2)])
    words = ["abcdefgh", "rst", "abcdefgz", "uv"]
    shares = shares_of_ids([[ord(letter) for letter in word] for word in words], given.prompt_tokens, 16)
    given = replace(given, shares_with=shares[0], shared_tokens=shares[1])
    run = Run("sarathi", given, device=device, prefix_caching=True)
    while run.clock_s < 9:
        run.step()
    assert run.sim.num_waiting == 2
    contexts = [int(r.num_computed_tokens) + 1 for r in run.engine.view().decodes]
    for room, chunk in ((512, 16 + 32), (40, 40)):
        wanted = device.predict_s([(0, chunk)], contexts)
        wanted /= device.predict_s([(0, chunk)], []) + device.predict_s([], contexts)
        assert price_of_mixing(lane_of(run.engine.state, 0), room) == pytest.approx(wanted, rel=1e-9)
    assert waiting_prefill(lane_of(run.engine.state, 0), math.inf) == 48


def test_hopeless_prompts_are_neither_promised_nor_dropped():
    assert promised([request(prompt=300, ttft=0.2)]) == (0, 0, math.inf, 0.0, NONE_DROPPED)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 150)), min_size=1, max_size=7))
def test_no_more_prompts_can_be_on_time_than_are_promised(jobs):
    count, dropped, slack_s, _, _ = promised([request(prompt=n, ttft=due / 1e3 + 1e-6) for n, due in jobs])

    def on_time(chosen):
        chosen = sorted(chosen, key=lambda job: job[1])
        return all(
            done <= due for done, (_, due) in zip(itertools.accumulate(n for n, _ in chosen), chosen, strict=True)
        )

    most = max(k for k in range(len(jobs) + 1) if any(on_time(c) for c in itertools.combinations(jobs, k)))
    assert count == most
    assert count + dropped == sum(n <= due for n, due in jobs)
    assert slack_s >= 0.0


def test_decodes_step_back_only_for_a_promise_at_risk():
    decoding = [request(**STRICT), request(prompt=20, output=99)]
    for due_s, deferred in ((5.0, False), (0.5, True)):
        rows = [*decoding, request(0.01, prompt=200, output=1, ttft=due_s)]
        run = Run("on-time", rows, device=LINEAR)
        assert run.step() == {0: 20, 1: 20}
        # 200 tokens, stretched to 260 ms, leave a slack of 0.21 s of 0.47 s, less than the 0.3 s wanted
        assert (1 in run.step()) is not deferred


def test_prompts_go_by_deadline_until_one_cannot_be_on_time():
    first_due = [request(prompt=60, output=1, ttft=0.5), request(prompt=30, output=1, ttft=0.9)]
    assert Run("on-time", first_due, device=LINEAR).step() == {0: 60, 1: 20}
    # a prompt of 600 tokens, stretched to 0.78 s, is dropped: shortest first now, and it waits
    run = Run("on-time", [*first_due, request(prompt=600, output=1, ttft=0.8)], device=LINEAR)
    assert run.drain() == [{1: 30, 0: 50}, {0: 10, 2: 70}, *[{2: 80}] * 6, {2: 50}]


def test_held_prompts_wait_for_decodes_only_when_told_always():
    rows = [request(prompt=10, output=30), request(0.001, prompt=50, output=1, ttft=0.01)]
    for hold, beside in (("true", True), ("always", False)):
        run = Run(f"sarathi[hold={hold}]", rows, device=LINEAR)
        run.step()
        assert (1 in run.step()) is beside
        run.drain()
        assert run.sim.num_finished == 2  # nobody waits for ever


def test_a_quiet_engine_serves_the_hopeless():
    late = request(0.001, prompt=50, output=1, ttft=0.01)
    for running, served in ((60, True), (61, False)):
        for policy, expected in (("on-time", served), ("on-time[quiet=100]", True)):
            run = Run(policy, [*[request(prompt=1, output=9)] * running, late], device=LINEAR)
            run.step()
            assert (running in run.step()) is expected


@pytest.mark.parametrize(
    ("policy", "caching", "blocks", "served"),
    [
        ("on-time", True, 10, True),
        ("on-time", True, 8, False),
        # without prefix caching only of a short cache: 8 blocks are 128 tokens, of 8,192 in the longest request
        ("on-time", False, 10, True),
        ("on-time", False, 8, False),
        ("on-time[short=0.015]", False, 8, True),
        ("on-time[short=0.016]", False, 8, False),
        ("on-time[usage=0.55]", False, 8, True),
    ],
)
def test_late_prompts_wait_for_a_full_cache_that_is_shared_or_short(policy, caching, blocks, served):
    # one running request with four blocks: 0.4 or 0.5 of the cache, and 0.45 is what makes late prompts wait
    rows = [request(prompt=60, output=9), request(0.001, prompt=16, output=1, ttft=0.001)]
    run = Run(policy, rows, device=LINEAR, prefix_caching=caching, num_kv_blocks=blocks)
    run.step()
    assert (1 in run.step()) is served
    run.drain()
    assert run.sim.num_finished == 2


@pytest.mark.parametrize(
    ("policy", "ttft", "blocks", "tokens"),
    [
        ("on-time", 0.75, 80, SMALL_BATCH),
        ("on-time", 0.65, 80, 601),  # 600 tokens take 60 ms, 78 when stretched: less than 0.6 s is left
        ("on-time", 0.75, 90, 601),  # less than 0.45 of it is in use
        ("on-time[short=0]", 0.75, 80, 601),
        ("on-time[budget=100]", 0.75, 80, 100),
    ],
)
def test_batches_are_small_while_a_short_cache_fills_and_promises_have_slack(policy, ttft, blocks, tokens):
    rows = [request(prompt=580, output=9), request(0.001, prompt=600, output=1, ttft=ttft)]  # 37 blocks and 38
    run = Run(policy, rows, device=profile((0.1, 0.2)), num_kv_blocks=blocks)
    while run.requests[0]["num_output_tokens"] == 0:
        run.step()
    assert run.step() == {0: 1, 1: tokens - 1}


def test_late_prompts_go_by_age():
    rows = [request(prompt=400, output=1, ttft=0.01), request(0.001, prompt=300, output=1, ttft=0.01)]
    # without aging the shorter one overtakes
    for policy, second in (("on-time", {1: 80}), ("on-time[age=inf]", {1: 80}), ("on-time[age=1000]", {0: 80})):
        run = Run(policy, rows, device=LINEAR)
        assert run.steps(2) == [{0: 80}, second]


def test_an_aged_prompt_has_its_share_before_promised_ones():
    rows = [request(prompt=400, output=1, ttft=0.01), request(0.001, prompt=300, output=1, ttft=100.0)]
    assert AGED_SHARE == 0.4
    # 80 tokens a batch; at 0.08 s, after its first 80 tokens, the late prompt is due or not
    first = {0: 80}
    due = Run("on-time[age=0.05]", rows, device=LINEAR)
    assert due.drain() == [first, *[{0: 32, 1: 48}] * 6, {0: 68, 1: 12}, {0: 60}]
    # not due, it has what the promised one leaves in a batch; without aging not even that
    assert Run("on-time[age=1000]", rows, device=LINEAR).steps(5)[1:] == [*[{1: 80}] * 3, {1: 60, 0: 20}]
    assert Run("on-time", rows, device=LINEAR).steps(5)[1:] == [*[{1: 80}] * 3, {1: 60}]


def test_while_one_is_due_less_is_promised():
    late = request(prompt=400, output=1, ttft=0.01)
    rows = [request(prompt=10, output=99, ttft=9.0), late, request(0.001, prompt=100, output=1, ttft=0.5)]
    # 100 tokens take 0.13 s with the usual stretch, 0.65 s with that of aging, and 0.42 s are left
    for age, second in ((0.05, {0: 1, 1: 330}), (1000, {0: 1, 2: 100, 1: 298})):  # 0.4 s, less a rounding
        assert Run(f"on-time[age={age}]", rows, device=LINEAR).steps(2) == [{0: 10, 1: 70}, second]


def test_with_aging_decodes_are_not_put_off_when_blocks_run_out():
    rows = [request(prompt=20, output=10, tbt=0.1), request(prompt=20, output=10), request(0.01, prompt=200, ttft=0.5)]
    for policy, blocks, third in (("on-time", 17, False), ("on-time[age=9]", 17, True), ("on-time[age=9]", 50, False)):
        run = Run(policy, rows, device=LINEAR, num_kv_blocks=blocks)
        batches = run.steps(3)
        assert 1 not in batches[1], "at risk, and blocks are free"
        assert (1 in batches[2]) is third


@pytest.mark.parametrize("seed", [1, 2])
def test_no_aging_is_on_time(seed):
    world = scenario("drift", num_requests=300)
    runs = [simulate(world, policy, seed) for policy in ("on-time", "on-time[age=inf]", "on-time[age=5]")]
    requests = [run.requests[run.requests["phase"] != PENDING].tobytes() for run in runs]
    assert requests[0] == requests[1] != requests[2]


def test_aging_bounds_the_longest_wait():
    world = scenario("paper", qps=1.9)
    policies = ("on-time", "on-time[age=60]", "on-time[age=20]")
    longest_s = [Outcomes(simulate(world, policy, 2002)).ttft_s.max() for policy in policies]
    assert longest_s[0] / 3 > longest_s[1] > longest_s[2]


def test_figures_of_pooled_requests():
    ttft_s = np.arange(1001.0)
    found = aging.pooled("on-time", ttft_s, ttft_s < 900.9)
    assert (found.attainment, found.median_s) == (901 / 1001, 500.0)
    assert found.tails_s == {"p99": 990.0, "p99.9": 999.0, "largest": 1000.0}
    ttft_s[7] = math.inf  # never served
    assert aging.pooled("on-time", ttft_s, ttft_s < 900.9).tails_s["largest"] == math.inf


def test_the_plan_as_knobs_leaves_the_engine_alone():
    env = LLMSchedEnv(suite="drift", num_requests=60)
    env.reset(seed=3)
    policy = SchedulerPolicy(env, "on-time")
    state, seen = env.core.engine.state, set()

    def values():  # of fields: what lies between them is nobody's
        arrays = state.batches, state.knobs, state.requests
        return [array[name].tobytes() for array in arrays for name in array.dtype.names]

    for _ in range(3000):
        before = values()
        seen.add(tuple(policy.action()))
        assert before == values()
        if policy.step()[2]:
            break
    assert len(seen) > 2  # by deadline or shortest first, decodes put off or not, ...


def test_its_knobs_pack_the_same_batches_while_nobody_is_dropped():
    env = LLMSchedEnv(qps=1.2, num_requests=80, jitter=0.0)
    twin = LLMSchedEnv(qps=1.2, num_requests=80, jitter=0.0)
    env.reset(seed=5)
    twin.reset(seed=5)
    policy, scheduler = SchedulerPolicy(env, "on-time"), make_scheduler("on-time")
    for _ in range(500):
        action = knobs_now(scheduler, twin.core.engine, 0, twin.config)
        assert np.array_equal(policy.step()[0], twin.step(action)[0])


def test_observations_tell_what_can_be_promised():
    env = LLMSchedEnv(qps=2.2, num_requests=150, cost_scale=1.2)
    observation, _ = env.reset(seed=4)
    names = ("promised", "promised_work", "promise_slack", "dropped", "shortest_dropped")
    entries = [env.feature_names.index(name) for name in names]
    dropped_once = False
    for _ in range(1500):
        count, dropped, slack_s, work_s, shortest = promise_env(env.core.engine.handle, 0, STRETCH)
        wanted = [
            np.log1p(count) / np.log1p(128),
            work_s / 4,
            slack_s,
            np.log1p(dropped) / np.log1p(128),
            shortest / 8192,
        ]
        assert observation[entries] == pytest.approx(np.clip(wanted, 0.0, 1.0), abs=1e-6)
        dropped_once = dropped_once or dropped > 0
        observation, _, terminated, _, _ = env.step(np.zeros(7, np.int64))
        if terminated:
            break
    assert dropped_once


def test_it_beats_what_does_not_look_at_slack():
    world = scenario("default", qps=1.8, num_requests=600)
    utility = {
        p: np.mean([row(simulate(world, p, seed))["mean_utility"] for seed in range(4)])
        for p in ("on-time", "feasible-first", "slai", "sarathi")
    }
    assert utility["on-time"] > max(v for p, v in utility.items() if p != "on-time") + 0.01


# --- the price of mixing


def mixing_lane(factor, decodes=30, context=1500, prompt=2000):
    """Decodes under way and a prompt that waits, on a profile where decodes cost `factor` times beside a chunk."""
    device = load_profile("rtx6000ada-mistral-7b").with_mixing(factor)
    rows = [request(0.0, context, 1000, tbt=0.1 if i == 0 else 0.5) for i in range(decodes)] + [
        request(15.0, prompt, 2, ttft=5.0)
    ]
    run = Run("on-time", rows, device=device, num_kv_blocks=14733)
    while run.engine.state.episodes[0].num_arrived <= decodes:
        run.step()
    return run, device


def test_the_price_of_mixing_is_one_batch_over_two():
    run, device = mixing_lane(6.0)
    view = run.engine.view()
    contexts = [int(r.num_computed_tokens) + 1 for r in view.decodes]
    together = device.predict_s([(0, 700)], contexts)
    apart = device.predict_s([(0, 700)], []) + device.predict_s([], contexts)
    assert price_of_mixing(lane_of(run.engine.state, 0), 700) == pytest.approx(together / apart, rel=1e-9)


@pytest.mark.parametrize(("factor", "apart"), [(1.0, False), (12.0, True)])
def test_decodes_are_put_off_where_mixing_takes_longer(factor, apart):
    run, _ = mixing_lane(factor)
    batch = run.decide()
    assert 30 in batch and (len(batch) <= 2) == apart  # the strict user's decode is always critical
    together = make_scheduler("on-time[mix=together]")
    install(together, run.engine.state)
    run.scheduler = together
    assert len(run.decide()) > 2


def test_mixing_never_costs_on_a_sum():
    rows = [request(0.0, 100, 40) for _ in range(5)] + [request(0.1, 300, 2)]
    run = Run("on-time", rows)
    run.steps(5)
    assert price_of_mixing(lane_of(run.engine.state, 0), 768) == 0.0
