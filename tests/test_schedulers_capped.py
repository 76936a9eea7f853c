"""srpt-capped, feasible-first and edf by hand, and the cap on predicted batch time wherever it is set."""

import math

import numpy as np
import pytest
from helpers import Run, Scripted, profile, request
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsched_gym.config import scenario
from llmsched_gym.engine import Batch
from llmsched_gym.engine.batch import batch_s
from llmsched_gym.evaluation.run import simulate

# n tokens take n + 0.4 ms: the cap of 0.95 * 100 ms admits 94
LINEAR = profile((1.4, 2.4))


def test_prompts_are_cut_at_the_cap():
    run = Run("srpt-capped", [request(prompt=200, output=1)], device=LINEAR)
    assert run.drain() == [{0: 94}, {0: 94}, {0: 12}]


def test_the_cap_follows_the_tightest_decode():
    # a relaxed decode alone allows 475 ms; with a strict one beside it, 95 ms again
    rows = [
        request(prompt=50, output=9),
        request(0.04, prompt=900, output=1),
        request(3.0, prompt=9, output=9, tbt=0.1),
    ]
    run = Run("srpt-capped", rows, device=LINEAR)
    assert run.steps(2) == [{0: 50}, {0: 1, 1: 473}]
    run = Run("srpt-capped", [request(prompt=50, output=9, tbt=0.1), rows[1]], device=LINEAR)
    assert run.steps(2) == [{0: 50}, {0: 1, 1: 93}]


def test_a_shorter_remaining_prompt_overtakes_between_chunks():
    rows = [request(prompt=150, output=1), request(0.01, prompt=50, output=1)]
    assert Run("srpt-capped", rows, device=LINEAR).drain() == [{0: 94}, {1: 50, 0: 44}, {0: 12}]
    # 56 tokens are left of the first: a prompt of 60 does not overtake it, nor does one of 56
    for prompt in (60, 56):
        rows = [request(prompt=150, output=1), request(0.01, prompt=prompt, output=1)]
        assert Run("srpt-capped", rows, device=LINEAR).drain() == [{0: 94}, {0: 56, 1: 38}, {1: prompt - 38}]


def test_srpt_as_an_order_of_the_packing_kernel():
    rows = [request(prompt=1000, output=1), request(0.01, prompt=400, output=1)]
    assert Run("sarathi[order=srpt]", rows).drain() == [{0: 512}, {1: 400, 0: 112}, {0: 376}]
    assert Run("sarathi[order=spf]", rows).drain() == [{0: 512}, {0: 488, 1: 24}, {1: 376}]


def test_a_shorter_prompt_without_blocks_does_not_stop_the_started_one():
    rows = [request(prompt=1000, output=1), request(0.01, prompt=400, output=1), request(0.01, prompt=450, output=1)]
    run = Run("sarathi[order=srpt]", rows, num_kv_blocks=80)
    assert run.drain() == [{0: 512}, {0: 488}, {1: 400, 2: 112}, {2: 338}]


def test_a_decode_waits_until_two_capped_batches_before_its_deadline():
    # cap 95 ms by the strict decode; the relaxed one is critical from 0.5 s - 0.19 s behind its last token
    rows = [request(prompt=10, output=50, tbt=0.1), request(prompt=10, output=50), request(0.001, prompt=900, output=1)]
    run = Run("srpt-capped", rows, device=LINEAR)
    assert run.step() == {0: 10, 1: 10}
    emitted_s = run.clock_s
    while True:
        now_s = run.clock_s
        batch = run.step()
        assert batch[0] == 1
        if 1 in batch:
            break
        assert now_s <= emitted_s + 0.5 - 0.19
        assert run.sim.last_batch_s <= 0.095
    assert emitted_s + 0.5 - 0.19 < now_s < emitted_s + 0.5 - 0.19 + 0.095


def test_feasible_prompts_go_before_hopeless_ones():
    rows = [request(prompt=80, output=1, ttft=0.05), request(prompt=90, output=1, ttft=0.2)]
    # 80 tokens take 80.4 ms: too late for the first, who is shorter
    assert Run("srpt-capped", rows, device=LINEAR).drain() == [{0: 80, 1: 14}, {1: 76}]
    assert Run("feasible-first", rows, device=LINEAR).drain() == [{1: 90, 0: 4}, {0: 76}]
    easy = [request(prompt=80, output=1, ttft=0.0805), rows[1]]
    assert Run("feasible-first", easy, device=LINEAR).drain() == [{0: 80, 1: 14}, {1: 76}]


def test_the_first_token_estimate_counts_whole_chunks():
    device = profile((20.0, 30.0), tokens=(1, 101), kv_ms=0.01, pair_ms=0.02)
    chunks = [(0, 40), (40, 40), (80, 20)]
    needed_s = sum(device.predict_s([chunk], []) for chunk in chunks)
    for ttft, possible in ((needed_s + 1e-9, True), (needed_s - 1e-9, False)):
        run = Run("sarathi[budget=40]", [request(prompt=100, output=1, ttft=ttft)], device=device)
        assert run.engine.view().can_make_ttft(0) is possible
        run.step()
        assert run.engine.view().can_make_ttft(0) is possible
        run.drain()
        assert bool(run.requests[0].ttft_missed) is not possible


def test_a_request_with_a_token_has_made_its_ttft_for_good():
    run = Run(Scripted({0: 16}), [request(output=9, ttft=0.01), request(ttft=0.01)])
    run.steps(2)
    assert run.engine.view().can_make_ttft(0) is True
    assert run.engine.view().can_make_ttft(1) is False
    with pytest.raises(IndexError, match="request 2 has not arrived"):
        run.engine.view().can_make_ttft(2)


def test_view_predicts_with_its_own_profile():
    device, own = profile((10.0, 20.0), tokens=(1, 11)), profile((30.0, 50.0), tokens=(1, 11), kv_ms=1.0, pair_ms=2.0)
    run = Run(
        Scripted({0: 8}, {0: 1}), [request(prompt=8, output=9), request(prompt=50)], device=device, own_profile=own
    )
    run.step()
    view = run.engine.view()
    assert view.predict_s({0: 1, 1: 5}) == pytest.approx(own.predict_s([(0, 5)], [9]), abs=1e-15)
    assert view.predict_s({}) == 0.0
    assert run.sim.last_predicted_s == pytest.approx(own.predict_s([(0, 8)], []), abs=1e-15)
    assert run.sim.last_batch_s == pytest.approx(device.predict_s([(0, 8)], []), abs=1e-15)
    with pytest.raises(ValueError, match="at most 8192 tokens"):
        view.predict_s({1: 9000})


# --- edf


def test_earliest_deadline_first_over_prompts_and_decodes():
    rows = [request(prompt=100, output=2, ttft=10.0), request(prompt=50, output=9, ttft=1.0)]
    run = Run("edf[budget=64]", rows)
    # the decode is due 0.5 s behind its token, the prompt at 10 s
    assert run.steps(2) == [{1: 50, 0: 14}, {1: 1, 0: 63}]
    rows[1] = request(prompt=50, output=9, ttft=1.0, tbt=20.0)
    run = Run("edf[budget=64]", rows)
    assert run.steps(3) == [{1: 50, 0: 14}, {0: 64}, {0: 22, 1: 1}]


def test_an_urgent_newcomer_overtakes_a_started_prompt():
    rows = [request(prompt=150, output=1, ttft=10.0), request(0.01, prompt=80, output=1, ttft=1.0)]
    assert Run("edf[budget=64]", rows).drain() == [{0: 64}, {1: 64}, {1: 16, 0: 48}, {0: 38}]
    assert Run("sarathi[budget=64,order=edf]", rows).drain() == [{0: 64}, {1: 64}, {1: 16, 0: 48}, {0: 38}]


@pytest.mark.parametrize("policy", ["edf", "sarathi[order=edf]"])
def test_prompts_without_a_ttft_slo_are_served_too(policy):
    rows = [request(prompt=100, output=2), request(prompt=50, output=2), request(prompt=9, output=1, ttft=1.0)]
    assert Run(f"{policy.rstrip(']')}{',' if ']' in policy else '['}budget=120]", rows).drain() == [
        {2: 9, 0: 100, 1: 11},
        {0: 1, 1: 39},
        {1: 1},
    ]


def test_a_preempted_request_is_due_by_its_last_token():
    rows = [request(prompt=16, output=9, ttft=5.0), request(prompt=30, output=1, ttft=2.0)]
    run = Run("sarathi[order=edf,budget=20]", rows)
    scheduler = run.scheduler
    run.scheduler = Scripted({0: 16}, Batch(preempt=[0]))
    run.steps(2)
    run.scheduler = scheduler
    assert run.step() == {0: 17, 1: 3}
    run = Run("edf[budget=20]", rows)
    scheduler, run.scheduler = run.scheduler, Scripted({0: 16}, Batch(preempt=[0]))
    run.steps(2)
    run.scheduler = scheduler
    assert run.step() == {0: 17, 1: 3}


# --- the cap, wherever it is set

CAPPED = ["srpt-capped", "feasible-first", "slai[cap=0.6]", "sarathi[cap=0.5]", "sarathi-spf[cap=0.7,admission=chunk]"]


@pytest.mark.parametrize("policy", [*CAPPED, "vllm-v1[cap=0.8]", "edf[cap=0.8]"])
@settings(max_examples=6)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_batch_is_predicted_above_the_cap_unless_critical_decodes_alone_are(policy, seed):
    rng = np.random.default_rng(seed)
    rows = [
        request(float(t), int(rng.integers(1, 900)), int(rng.integers(1, 30)), float(rng.choice([0.1, 0.5])), 1.0)
        for t in np.cumsum(rng.exponential(0.05, 30))
    ]
    device = profile((4.0, 4.25), kv_ms=0.002, pair_ms=1e-4)
    run = Run(policy, rows, device=device, num_kv_blocks=200)
    knobs, state = run.engine.state.knobs[0], run.engine.state
    above = 0
    while not run.engine.is_over():
        view = run.engine.view()
        decodes = {int(r.index): r for r in view.decodes}
        slo_s = min((r.tbt_slo_s for r in decodes.values()), default=0.1)
        batch = run.decide()
        counts = state.batches[0]
        predicted_s = batch_s(
            state.own_linear_s[0], state.own_coef_s[0], counts.num_tokens, counts.pairs, counts.kv_tokens
        )
        assert predicted_s == pytest.approx(view.predict_s(batch), rel=1e-12)
        if predicted_s > knobs.cap * slo_s:
            above += 1
            for r in batch:
                assert r in decodes
                if policy.startswith("sarathi"):
                    continue  # all its decodes are critical
                if not math.isnan(knobs.margin):
                    due_s = decodes[r].last_token_s + decodes[r].tbt_slo_s
                    assert due_s - knobs.margin * knobs.cap * slo_s < view.now_s
                elif policy.startswith("slai"):
                    assert state.requests[0, r].lst_s <= view.now_s
                else:
                    assert len(batch) == 1
        run.engine.execute()
    assert run.sim.num_finished == 30
    assert above < run.sim.num_batches / 2


def test_the_capped_token_count_is_the_largest_that_fits():
    for cap in (0.2, 0.31, 0.5, 0.77):
        device = profile((3.0, 3.21), kv_ms=0.003, pair_ms=2e-4)
        run = Run(f"sarathi[cap={cap},budget=8192]", [request(prompt=8000, output=1)], device=device)
        for _ in range(4):
            view = run.engine.view()
            n = run.decide()[0]
            assert view.predict_s({0: n}) <= cap * 0.1 < view.predict_s({0: n + 1})
            run.engine.execute()


@pytest.mark.parametrize(("qps", "seed"), [(1.0, 2), (1.4, 0)])
def test_nobody_is_late_when_the_last_strict_decode_finishes_and_the_cap_grows(qps, seed):
    episode = simulate(scenario("paper", qps=qps, num_requests=600), "srpt-capped", seed)
    assert set(episode.requests["slo_class"].tolist()) == {0, 1}
    assert not episode.requests["num_preemptions"].any()
    assert not episode.requests["num_late_gaps"].any()
