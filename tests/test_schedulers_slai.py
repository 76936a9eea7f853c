"""SLAI and Sarathi-Serve, step by step. Batches take 1/32 s and hold 512 tokens unless a case says otherwise."""

import math

import pytest
from helpers import TICK_S, Durations, Run, Scripted, profile, request

from llmsched_gym.engine import Batch
from llmsched_gym.scheduler import install, make_scheduler

LONG = 7808  # prompt tokens that keep the budget full for 15 batches


def first_decode_step(policy, rows, most=20, **fields):
    """The step in which request 0 first decodes."""
    run = Run(policy, rows, **fields)
    for k in range(most):
        if run.step().get(0) == 1:
            return k
    return None


# --- the offset


@pytest.mark.parametrize(
    ("policy", "step"), [("slai", 12), ("slai-spf-fixed", 7), ("slai-fcfs-fixed", 7), ("sarathi", 1)]
)
def test_a_decode_waits_until_offset_mean_batches_before_its_deadline(policy, step):
    # token at 1/32 s, next one due 0.5 s later; LST = 17/32 - offset/32: 12/32 with offset 5, 7/32 with 10
    rows = [request(prompt=256, output=9), request(prompt=LONG)]
    assert first_decode_step(policy, rows) == step


def test_the_offset_is_a_bracket_parameter():
    rows = [request(prompt=256, output=9), request(prompt=LONG)]
    assert first_decode_step("slai-spf-fixed[offset=8]", rows) == 9
    assert first_decode_step("slai[offset=8]", rows) == 9
    assert first_decode_step("slai-spf-fixed[offset=inf]", rows) == 1


def test_a_strict_decode_is_critical_at_once_where_the_offset_exceeds_its_slo():
    rows = [request(prompt=256, output=9, tbt=0.1), request(prompt=LONG)]
    # 1/32 + 0.1 - 5/32 is before 1/32
    assert first_decode_step("slai", rows) == 1


@pytest.mark.parametrize(("num_kv_blocks", "step"), [(526, 12), (525, 7)])
def test_the_dynamic_offset_doubles_at_96_percent_kv_use(num_kv_blocks, step):
    # 16 + 488 blocks are in use after the first batch's scheduling: 504 / 525 = 0.96, 504 / 526 = 0.958
    rows = [request(prompt=256, output=9), request(prompt=LONG)]
    assert first_decode_step("slai", rows, num_kv_blocks=num_kv_blocks) == step


def test_the_switch_looks_at_use_before_the_frees_of_the_batch():
    # request 1 finishes in the first batch and frees its 9 blocks: 513 of 534 were in use at scheduling, 504 after
    rows = [request(prompt=200, output=9), request(prompt=144, output=1), request(prompt=7856)]
    run = Run("slai", rows, num_kv_blocks=534)
    run.step()
    assert run.sim.kv_cache_usage == (13 + 9 + 491) / 534
    assert (534 - run.sim.free_blocks) / 534 < 0.96 < run.sim.kv_cache_usage
    run.step()
    assert run.requests[0].lst_s == TICK_S + 0.5 - 10 * TICK_S


def test_the_last_schedulable_time_is_keyed_once():
    # the batches that follow are twice as long; keyed again, request 0 would be critical after the first of them
    rows = [request(prompt=256, output=9), request(prompt=LONG)]
    run = Run("slai-spf-fixed", rows, backend=Durations(TICK_S, 2 * TICK_S))
    batches = run.steps(5)
    assert [b.get(0) for b in batches] == [256, None, None, None, 1]
    assert run.requests[0].last_token_s == 9 * TICK_S


def test_every_token_is_keyed_anew():
    run = Run("slai-spf-fixed", [request(prompt=256, output=9), request(prompt=LONG)])
    # critical six batches behind each token: tokens at 1/32, 8/32 and 15/32 s
    assert [k for k, batch in enumerate(run.steps(15)) if batch.get(0) == 1] == [7, 14]


def test_a_decode_that_finds_the_budget_full_keeps_its_time():
    # eight critical decodes, room for four: the others follow in the next batch, unkeyed
    rows = [request(prompt=1, output=9, tbt=0.1) for _ in range(8)]
    run = Run("slai[budget=4]", rows)
    assert run.step() == {0: 1, 1: 1, 2: 1, 3: 1}
    assert run.step() == {0: 1, 1: 1, 2: 1, 3: 1}  # critical decodes come before prompts
    run = Run("slai[budget=4]", rows[:4])
    run.steps(1)
    times = run.requests["lst_s"][:4].copy()
    run.decide()
    assert math.isnan(times[0]) and run.requests["lst_s"][0] == TICK_S + 0.1 - 5 * TICK_S


def test_the_mean_counts_batches_and_not_idle_time():
    rows = [request(0.0, prompt=256, output=1), request(1.0, prompt=256, output=9), request(1.0, prompt=LONG)]
    run = Run("slai-spf-fixed", rows, backend=Durations(TICK_S, 3 * TICK_S, TICK_S))
    run.steps(3)  # a batch, a jump to 1.0, a batch
    assert run.sim.mean_batch_s == 2 * TICK_S
    assert run.decide() == {1: 1, 2: 511}
    assert run.requests[1].lst_s == (1.0 + 3 * TICK_S) + 0.5 - 10 * 2 * TICK_S


def test_deferred_decodes_take_what_prompts_leave_by_urgency():
    # three decodes keyed in different batches; a prompt leaves room for two of them
    rows = [request(prompt=16, output=90, tbt=9.0), request(prompt=16, output=90, tbt=8.0)]
    rows += [request(prompt=16, output=90, tbt=7.0), request(0.05, prompt=30, output=2)]
    run = Run("slai[budget=48]", rows)
    assert run.step() == {0: 16, 1: 16, 2: 16}
    assert run.step() == {0: 1, 1: 1, 2: 1}
    assert run.step() == {3: 30, 0: 1, 1: 1, 2: 1}
    run = Run("slai[budget=32]", [*rows[:3], request(0.04, prompt=30, output=2)])
    assert run.step() == {0: 16, 1: 16}
    assert run.step() == {2: 16, 0: 1, 1: 1}
    assert run.step() == {3: 30, 2: 1, 1: 1}  # the two most urgent of three


def test_equal_times_go_by_request_index():
    rows = [request(prompt=1, output=9) for _ in range(4)] + [request(0.01, prompt=6, output=1)]
    run = Run("slai[budget=4]", rows)
    assert run.step() == {0: 1, 1: 1, 2: 1, 3: 1}
    run = Run("slai[budget=8]", rows)
    assert run.steps(2) == [{0: 1, 1: 1, 2: 1, 3: 1}, {4: 6, 0: 1, 1: 1}]


# --- the order of prompts


def test_shortest_prompt_first_does_not_overtake_a_started_one():
    rows = [request(prompt=1000, output=1), request(0.01, prompt=40, output=1), request(0.02, prompt=30, output=1)]
    for policy in ("slai", "sarathi-spf"):
        assert Run(policy, rows).drain() == [{0: 512}, {0: 488, 2: 24}, {2: 6, 1: 40}]


@pytest.mark.parametrize("policy", ["sarathi-spf", "sarathi-spf[hold=true]"])
def test_of_several_started_prompts_the_first_admitted_goes_on(policy):
    rows = [request(prompt=600, output=1), request(prompt=400, output=1)]
    run = Run(policy, rows)
    scheduler, run.scheduler = run.scheduler, Scripted({0: 100, 1: 100})
    run.step()
    run.scheduler = scheduler
    assert run.step() == {0: 500, 1: 12}


def test_first_come_first_served_keeps_the_order_of_arrival():
    rows = [request(prompt=500, output=1), request(prompt=40, output=1), request(prompt=30, output=1)]
    for policy in ("sarathi", "slai-fcfs-fixed"):
        assert Run(policy, rows).drain() == [{0: 500, 1: 12}, {1: 28, 2: 30}]


def test_equally_short_prompts_go_by_request_index():
    rows = [request(prompt=n, output=1) for n in (300, 200, 200, 200)]
    assert Run("sarathi-spf", rows).drain() == [{1: 200, 2: 200, 3: 112}, {3: 88, 0: 300}]


def test_strict_users_go_first_and_then_the_shortest():
    rows = [
        request(prompt=100, output=1),
        request(prompt=600, output=1, tbt=0.1),
        request(prompt=300, output=1, tbt=0.1),
        request(prompt=50, output=1),
    ]
    assert Run("slai-priority", rows).drain() == [{2: 300, 1: 212}, {1: 388, 3: 50, 0: 74}, {0: 26}]
    # without priority the lengths alone decide
    assert Run("slai", rows).drain() == [{3: 50, 0: 100, 2: 300, 1: 62}, {1: 512}, {1: 26}]


def test_priority_does_not_overtake_a_started_prompt():
    rows = [
        request(prompt=800, output=1),
        request(0.01, prompt=500, output=1, tbt=0.1),
        request(0.01, prompt=9, output=1),
    ]
    assert Run("slai-priority", rows).drain() == [{0: 512}, {0: 288, 1: 224}, {1: 276, 2: 9}]


def test_sarathi_runs_all_decodes_before_prompts():
    rows = [request(prompt=16, output=9, tbt=9.0), request(prompt=16, output=9, tbt=9.0), request(0.01, prompt=LONG)]
    run = Run("sarathi", rows)
    assert run.steps(3) == [{0: 16, 1: 16}, {0: 1, 1: 1, 2: 510}, {0: 1, 1: 1, 2: 510}]
    # slai defers them
    assert Run("slai", rows).steps(3) == [{0: 16, 1: 16}, {2: 512}, {2: 512}]


def test_sarathis_decodes_go_by_arrival_when_tokens_are_short():
    rows = [request(prompt=1, output=9) for _ in range(6)]
    run = Run("sarathi[budget=4]", rows)
    assert run.steps(3) == [{0: 1, 1: 1, 2: 1, 3: 1}] * 3


# --- admission


def test_admission_leaves_the_watermark():
    # 100 blocks, 5 held back, 61 in use after the decode
    for prompt, second in ((34 * 16, {0: 1, 1: 511}), (34 * 16 + 1, {0: 1})):
        rows = [request(prompt=960, output=9, tbt=9.0), request(0.05, prompt=prompt, output=2)]
        run = Run("sarathi", rows, num_kv_blocks=100, watermark=0.05)
        assert run.steps(2) == [{0: 512}, {0: 448}]
        assert run.step() == second


def test_a_decode_may_use_the_watermark():
    run = Run("sarathi", [request(prompt=16, output=3)], num_kv_blocks=3, watermark=0.34)
    assert run.sim.watermark_blocks == 1
    run.steps(2)
    assert run.sim.free_blocks == 1
    run = Run("sarathi", [request(prompt=16, output=3), request(prompt=16, output=3)], num_kv_blocks=4, watermark=0.25)
    assert run.steps(2) == [{0: 16, 1: 16}, {0: 1, 1: 1}]
    assert (run.sim.free_blocks, run.sim.num_preemptions) == (0, 0)


def test_nobody_overtakes_a_prompt_that_finds_no_blocks():
    rows = [request(prompt=960, output=99, tbt=9.0), request(0.05, prompt=700), request(0.05, prompt=16)]
    run = Run("sarathi", rows, num_kv_blocks=100)
    run.steps(2)
    assert run.steps(5) == [{0: 1}] * 5
    # shortest first puts the small one at the head of the line; behind it the long one waits
    run = Run("sarathi-spf", rows, num_kv_blocks=100)
    run.steps(2)
    assert run.step() == {0: 1, 2: 16}


def test_at_most_128_run():
    rows = [request(prompt=1, output=2) for _ in range(130)]
    batches = Run("sarathi", rows).drain()
    assert [len(b) for b in batches] == [128, 128, 2, 2]
    assert batches[2] == {128: 1, 129: 1}
    assert [len(b) for b in Run("slai", rows, max_num_seqs=50).drain()] == [50, 50, 50, 50, 30, 30]


def test_an_over_long_prompt_is_rejected_and_the_others_run():
    rows = [request(prompt=8190, output=3), request(prompt=8193, output=1), request(prompt=16, output=1)]
    run = Run("slai", rows)
    assert run.drain() == [{2: 16}]
    assert (run.episode.num_rejected, run.sim.num_finished) == (2, 1)


# --- victims (rule 5)


def decodes_at(policy, rows, blocks, **fields):
    """A run whose requests all have their first token, one batch before they need a new block."""
    run = Run(policy, rows, num_kv_blocks=blocks, **fields)
    run.step()
    return run


def test_slai_evicts_the_latest_schedulable_time():
    # the strict request came last, but it is the urgent one
    rows = [request(output=5), request(output=5, tbt=0.4), request(output=5, tbt=0.1)]
    run = decodes_at("slai", rows, 5)
    assert run.step() == {2: 1, 1: 1, 0: 1}
    assert run.requests["num_preemptions"][:3].tolist() == [1, 0, 0]
    assert run.sim.last_batch_tokens == 2
    # by arrival it would have been the strict one
    run = decodes_at("slai[victim=latest-arrival]", rows, 5)
    run.step()
    assert run.requests["num_preemptions"][:3].tolist() == [0, 0, 1]


def test_of_equal_times_the_newest_goes():
    run = decodes_at("slai", [request(output=5)] * 3, 5)
    run.step()
    assert run.requests["num_preemptions"][:3].tolist() == [0, 0, 1]


@pytest.mark.parametrize("policy", ["srpt-capped", "feasible-first", "sarathi[victim=latest-lst]"])
def test_where_nobody_is_deferred_the_latest_deadline_goes(policy):
    rows = [request(output=5), request(output=5, tbt=0.4), request(output=5, tbt=0.1)]
    run = decodes_at(policy, rows, 5, device=profile(1.0))
    run.step()
    assert run.requests["num_preemptions"][:3].tolist() == [1, 0, 0]


def started_and_two_decodes(policy):
    """Requests 0 and 1 decode and need a block each; 2 is a started prompt that holds 4; 6 blocks are all there are."""
    rows = [request(output=5, tbt=0.1), request(output=5), request(prompt=64)]
    run = Run(policy, rows, num_kv_blocks=6)
    scheduler, run.scheduler = run.scheduler, Scripted({0: 16, 1: 16, 2: 8})
    run.step()
    run.scheduler = scheduler
    install(scheduler, run.engine.state)
    run.step()
    return run.requests["num_preemptions"][:3].tolist()


def test_a_started_prompt_is_the_least_urgent():
    assert started_and_two_decodes("slai") == [0, 0, 1]
    assert started_and_two_decodes("slai[victim=authors]") == [0, 0, 1]
    assert started_and_two_decodes("sarathi") == [0, 0, 1]


def test_the_authors_rule_gives_up_the_most_urgent_decode():
    rows = [request(output=5), request(output=5, tbt=0.4), request(output=5, tbt=0.1)]
    run = decodes_at("slai[victim=authors]", rows, 3)
    assert run.step() == {2: 1, 1: 1, 0: 1}
    # no prompt is started: request 2 gives itself up, its block serves request 1, and request 0 finds none
    assert run.requests["num_preemptions"][:3].tolist() == [1, 0, 1]


def test_the_newest_of_several_started_prompts_is_evicted():
    for victim in ("authors", "latest-lst", "latest-arrival"):
        rows = [request(output=5), request(prompt=64), request(prompt=64), request(prompt=16, output=9)]
        run = Run(f"slai[victim={victim}]", rows, num_kv_blocks=10)
        run.scheduler = Scripted({0: 16, 1: 8, 2: 8, 3: 16}, Batch({0: 1}))  # under slai's settings
        run.steps(2)
        expected = [0, 0, 0, 1] if victim == "latest-arrival" else [0, 0, 1, 0]
        assert run.requests["num_preemptions"][:4].tolist() == expected, victim


# --- preemption under a scheduler


def test_recomputed_requests_emit_every_token_once():
    rows = [request(prompt=40, output=60), request(prompt=40, output=60), request(prompt=40, output=60)]
    for policy in ("slai", "slai[victim=authors]", "sarathi", "sarathi-spf", "slai-priority"):
        run = Run(policy, rows, num_kv_blocks=14)
        run.drain()
        assert run.sim.num_preemptions > 0, policy
        assert run.requests["num_output_tokens"][:3].tolist() == [60, 60, 60]
        assert run.sim.tokens_emitted == 180
        for r in range(3):
            assert sum(run.gaps(r)) == pytest.approx(run.requests[r].resolved_s - run.requests[r].first_token_s)
            assert len(run.gaps(r)) == 59


def test_a_preempted_prompt_counts_with_its_tokens_in_shortest_first():
    rows = [request(prompt=30, output=60, tbt=0.4), request(prompt=30, output=60)]
    run = Run("slai", rows, num_kv_blocks=6)
    while run.sim.num_preemptions == 0:
        run.step()
    row = run.requests[1]
    assert row.prefill_tokens == 30 + row.num_output_tokens
    assert make_scheduler("slai").settings["victim"] == 1


# --- holding back, limits, refusal


def test_hopeless_prompts_wait_while_feasible_work_exists():
    # 0 needs two batches and has time for one; 1 can make it
    rows = [request(prompt=600, output=1, ttft=0.04), request(prompt=600, output=1, ttft=0.5)]
    assert Run("sarathi", rows).drain() == [{0: 512}, {0: 88, 1: 424}, {1: 176}]
    assert Run("sarathi[hold=true]", rows).drain() == [{1: 512}, {1: 88}, {0: 512}, {0: 88}]
    late = [rows[0], request(prompt=600, output=1, ttft=0.04)]
    assert Run("sarathi[hold=true]", late).drain() == [{0: 512}, {0: 88, 1: 424}, {1: 176}]


def test_a_started_prompt_that_has_become_hopeless_is_held_too():
    rows = [request(prompt=1536, output=1, ttft=0.1), request(0.01, prompt=100, output=1, ttft=0.1)]
    run = Run("sarathi[hold=true]", rows, backend=Durations(TICK_S, 4 * TICK_S, TICK_S))
    assert run.step() == {0: 512}
    assert run.step() == {0: 512}
    assert run.requests[1].ttft_missed == 0
    rows[1] = request(0.01, prompt=100, output=1, ttft=0.5)
    run = Run("sarathi[hold=true]", rows, backend=Durations(TICK_S, 4 * TICK_S, TICK_S))
    assert run.steps(4) == [{0: 512}, {0: 512}, {1: 100}, {0: 512}]


def test_the_limit_holds_long_prompts_while_others_wait():
    rows = [request(prompt=200, output=1), request(prompt=50, output=1), request(prompt=101, output=1)]
    assert Run("sarathi", rows).drain() == [{0: 200, 1: 50, 2: 101}]
    assert Run("sarathi[limit=100]", rows).drain() == [{1: 50}, {0: 200, 2: 101}]
    assert Run("sarathi[limit=101]", rows).drain() == [{1: 50, 2: 101}, {0: 200}]


def test_hopeless_prompts_are_refused_where_that_is_allowed():
    rows = [request(prompt=600, output=1, ttft=0.04), request(prompt=600, output=1, ttft=0.5)]
    run = Run("sarathi[refuse=true]", rows, allow_refusal=True)
    assert run.drain() == [{1: 512}, {1: 88}]
    assert (run.sim.num_refused, run.requests[0].resolved_s) == (1, 0.0)
    run = Run("sarathi[refuse=true]", rows)
    run.drain()
    assert (run.sim.num_refused, run.sim.num_finished) == (0, 2)
