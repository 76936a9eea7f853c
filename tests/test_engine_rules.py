"""The engine's rules, one small case each, checked step by step. Batches take 1/32 s unless a case says otherwise."""

import math
import re

import numpy as np
import pytest
from helpers import TICK_S, Durations, Run, Scripted, profile, request, table

from llmsched_gym.config import scenario
from llmsched_gym.engine import Batch, Engine, IllegalBatch, InvariantError, StalledScheduler, check
from llmsched_gym.engine import core as engine_core
from llmsched_gym.engine.batch import open_batch
from llmsched_gym.engine.records import (
    ABANDONED,
    CACHE_LINE,
    FINISHED,
    PENDING,
    REFUSED,
    REJECTED,
    REQUEST,
    RUNNING,
    WAITING,
)
from llmsched_gym.scheduler import Compiled, install, make_scheduler
from llmsched_gym.workload import NOISE_BLOCK, noise_block

# --- rules 1 to 3: batches and tokens


def test_a_prompt_in_chunks_then_a_decode_per_token():
    run = Run(Scripted({0: 10}, {0: 6}, {0: 1}, {0: 1}), [request(prompt=16, output=3)], backend=Durations(0.5))
    run.step()
    row = run.requests[0]
    assert (row.phase, row.num_computed_tokens, row.num_output_tokens) == (RUNNING, 10, 0)
    assert np.isnan(row.first_token_s)
    run.step()
    assert (row.num_output_tokens, row.first_token_s) == (1, 1.0)  # the pass that completes the prompt emits
    run.steps(2)
    assert (row.phase, row.num_output_tokens, row.resolved_s) == (FINISHED, 3, 2.0)
    assert run.gaps(0) == [0.5, 0.5]
    assert run.engine.is_over()


def test_one_output_token_needs_no_decode():
    run = Run("sarathi", [request(output=1)])
    assert run.drain() == [{0: 16}]
    assert run.requests[0].resolved_s == TICK_S


def test_ttft_is_the_end_of_the_completing_pass_minus_arrival():
    run = Run("sarathi", [request(arrival_s=0.25, prompt=1024, output=1, ttft=0.05)])
    run.drain()
    assert run.requests[0].first_token_s == 0.25 + 2 * TICK_S
    assert run.requests[0].ttft_missed == 1
    assert run.requests[0].first_scheduled_s == 0.25


def test_on_time_includes_the_deadline():
    rows = [request(prompt=16, output=2, ttft=0.5, tbt=0.5), request(prompt=16, output=2, ttft=0.4375, tbt=0.4375)]
    run = Run("sarathi", rows, backend=Durations(0.5))
    run.drain()
    assert run.requests["ttft_missed"][:2].tolist() == [0, 1]
    assert run.requests["num_late_gaps"][:2].tolist() == [0, 1]
    assert run.requests["lateness_s"][:2].tolist() == [0.0, 0.125]


def test_gaps_include_the_passes_a_request_sits_out():
    batches = [{0: 16, 1: 16}, {0: 1}, {1: 1}, {0: 1, 1: 1}]
    run = Run(Scripted(*batches), [request(output=3, tbt=0.3)] * 2, backend=Durations(0.25, 0.5, 0.125, 0.0625))
    run.drain()
    assert run.gaps(0) == [0.5, 0.1875]
    assert run.gaps(1) == [0.625, 0.0625]
    assert run.requests["max_gap_s"][:2].tolist() == [0.5, 0.625]
    assert run.requests["num_late_gaps"][:2].tolist() == [1, 1]


def test_a_batch_of_one_decode_and_one_chunk_costs_what_the_profile_says():
    device = profile((10.0, 30.0), tokens=(1, 101), kv_ms=0.25, pair_ms=0.5)
    run = Run(Scripted({0: 8}, {0: 1, 1: 5}), [request(prompt=8, output=5), request(prompt=50)], device=device)
    run.steps(2)
    # one decode reads 8 tokens and its own; the chunk of 5 behind none has 5 * 3 pairs
    second = 10.0 + 0.2 * 5 + 0.25 * (9 + 5) + 0.5 * 15
    assert run.sim.last_batch_s == pytest.approx(second / 1e3, abs=1e-15)
    first = 10.0 + 0.2 * 7 + 0.25 * 8 + 0.5 * 36
    assert run.clock_s == pytest.approx((first + second) / 1e3, abs=1e-15)
    assert run.sim.last_predicted_s == run.sim.last_batch_s


# --- rule 4: blocks


@pytest.mark.parametrize(
    ("admission", "held"),
    [("prompt", [3, 3, 3, 3, 4]), ("chunk", [1, 2, 3, 3, 4]), ("prompt-check", [1, 2, 3, 3, 4])],
    ids=["prompt", "chunk", "prompt-check"],
)
def test_blocks_by_admission(admission, held):
    batches = [{0: 16}, {0: 8}, {0: 23}, {0: 1}, {0: 1}]
    run = Run(Scripted(*batches), [request(prompt=47, output=9)], admission=admission)
    seen = []
    for _ in batches:
        run.step()
        seen.append(int(run.requests[0].num_blocks))
    assert seen == held
    assert run.sim.free_blocks == 1000 - 4


def test_admission_by_prompt_check_asks_for_the_whole_prompt_and_no_watermark():
    rows = [request(prompt=32, output=2), request(prompt=48)]
    run = Run(Scripted({0: 32}), rows, admission="prompt-check", num_kv_blocks=5, watermark=0.2)
    run.step()
    with pytest.raises(IllegalBatch, match="rule 4: request 1 needs 3 blocks, 2 are free and 0 held back"):
        run.engine.submit(Batch({0: 1, 1: 1}))
    run.engine.submit(Batch({1: 1}))
    run.engine.execute()
    assert (run.requests[1].num_blocks, run.sim.free_blocks) == (1, 2)


def test_kv_cache_usage_is_taken_after_scheduling_and_before_the_frees():
    run = Run("sarathi", [request(prompt=32, output=1)], num_kv_blocks=8)
    run.step()
    assert run.sim.free_blocks == 8
    assert run.sim.kv_cache_usage == 2 / 8 == run.sim.kv_cache_usage_max


# --- rule 5: preemption


def test_recompute_keeps_tokens_and_counts_the_gap():
    batches = [
        {0: 16},  # token 1
        {0: 1},  # token 2
        Batch({1: 16}, preempt=[0]),
        {0: 10},
        {0: 8},  # P + e = 18 are computed again: token 3
        {0: 1},
    ]
    run = Run(Scripted(*batches), [request(output=4), request()], backend=Durations(0.5))
    run.steps(3)
    row = run.requests[0]
    assert (row.phase, row.num_preemptions, row.num_blocks) == (WAITING, 1, 0)
    assert (row.prefill_tokens, row.num_computed_tokens, row.num_output_tokens) == (18, 0, 2)
    assert run.sim.waiting_tokens == 18
    run.steps(2)
    assert row.num_output_tokens == 3
    run.step()
    assert (row.phase, row.num_output_tokens) == (FINISHED, 4)
    assert run.gaps(0) == [0.5, 1.5, 0.5]
    assert row.first_token_s == 0.5
    assert row.first_scheduled_s == 0.0


def test_preempted_requests_go_to_the_head_of_waiting():
    rows = [request(output=4), request(output=4), request(), request()]
    run = Run(Scripted({0: 16, 1: 16}, Batch({0: 1}, preempt=[1])), rows)
    run.steps(2)
    assert run.engine.view().waiting.index.tolist() == [1, 2, 3]


def test_a_decode_without_a_block_evicts_the_latest_arrival():
    # three blocks, two decodes that both need their second one
    run = Run("sarathi", [request(output=3), request(output=3)], num_kv_blocks=3)
    assert run.steps(2) == [{0: 16, 1: 16}, {0: 1, 1: 1}]
    first, second = run.requests[0], run.requests[1]
    assert (first.phase, first.num_output_tokens) == (RUNNING, 2)
    assert (second.phase, second.num_output_tokens, second.num_preemptions) == (WAITING, 1, 1)
    assert run.sim.last_batch_tokens == 1
    # request 1 finds its two blocks (17 tokens) only when request 0 is gone
    assert run.drain() == [{0: 1}, {1: 17}, {1: 1}]
    assert run.requests["num_output_tokens"][:2].tolist() == [3, 3]
    assert run.gaps(1) == [3 * TICK_S, TICK_S]


def test_a_chunk_without_blocks_is_illegal_unless_somebody_is_preempted():
    rows = [request(prompt=48, output=2), request(prompt=16, output=9), request(prompt=16, output=9)]
    first = {0: 16, 1: 16, 2: 16}
    run = Run(Scripted(first, {0: 32}), rows, admission="chunk", num_kv_blocks=4)
    run.step()
    with pytest.raises(IllegalBatch, match="rule 4: the next chunk of request 0 needs 2 blocks, 1 are free"):
        run.step()
    run = Run(Scripted(first, Batch({0: 32, 2: 1}, preempt=[1])), rows, admission="chunk", num_kv_blocks=4)
    run.steps(2)  # request 2 needs a block too, and nobody came later
    assert run.requests["phase"][:3].tolist() == [RUNNING, WAITING, WAITING]
    assert run.requests["num_output_tokens"][:3].tolist() == [1, 1, 1]
    assert run.engine.view().waiting.index.tolist() == [2, 1]


def test_several_are_evicted_where_one_is_not_enough():
    rows = [request(prompt=95, output=1), request(prompt=8, output=30), request(prompt=8, output=30)]
    run = Run("sarathi-spf[admission=chunk,budget=40]", rows, num_kv_blocks=6)
    assert run.steps(2) == [{1: 8, 2: 8, 0: 24}, {1: 1, 2: 1, 0: 38}]
    assert run.sim.free_blocks == 0
    # the last chunk needs two blocks; each decode holds one
    assert run.step() == {1: 1, 2: 1, 0: 33}
    assert run.requests["phase"][:3].tolist() == [FINISHED, WAITING, WAITING]
    assert run.requests["num_output_tokens"][:3].tolist() == [1, 2, 2]
    assert run.engine.view().waiting.index.tolist() == [1, 2]
    assert (run.sim.last_batch_tokens, run.sim.last_batch_decodes) == (33, 0)


def test_whoever_needs_the_block_may_be_the_victim():
    # request 1 came last; it needs a block that is not there, and goes itself
    run = Run(Scripted({0: 17, 1: 16}, {1: 1}), [request(prompt=17, output=9), request(output=9)], num_kv_blocks=3)
    run.steps(2)
    assert run.requests["phase"][:2].tolist() == [RUNNING, WAITING]
    assert run.sim.num_batches == 1  # nobody was left in the batch
    assert run.clock_s == TICK_S + 0.01


# --- rules 6 to 9


def test_a_request_that_can_never_fit_is_rejected_at_arrival():
    rows = [
        request(0.0, prompt=8000, output=192),
        request(0.5, prompt=8000, output=193),  # P + D = 8193 > max_model_len
    ]
    run = Run("sarathi", rows, num_kv_blocks=600)
    run.drain()
    assert run.requests["phase"][:2].tolist() == [FINISHED, REJECTED]
    assert run.episode.num_rejected == 1
    assert run.requests[1].resolved_s == 0.5


@pytest.mark.parametrize(("output", "phase"), [(15, FINISHED), (16, REJECTED)])
def test_rejection_counts_blocks_and_watermark(output, phase):
    # 100 blocks of which 5 are held back: P + D of up to 95 * 16 = 1520
    run = Run("sarathi", [request(prompt=1505, output=output)], num_kv_blocks=100, watermark=0.05)
    run.drain()
    assert run.requests[0].phase == phase


def test_an_empty_batch_moves_the_clock_to_the_next_arrival_or_an_idle_step():
    run = Run(Scripted({}, {}, {}, {0: 16}), [request(0.5, output=1), request(0.515)])
    clocks = []
    for _ in range(4):
        run.step()
        clocks.append(run.clock_s)
    # nobody is there: straight to the arrival; then one idle step; then the arrival is nearer
    assert clocks == [0.5, 0.51, 0.515, 0.525]
    assert run.sim.num_batches == 0 and run.sim.num_idle_steps == 3


def test_the_scheduler_is_not_asked_while_nobody_is_there():
    run = Run(Scripted({0: 16}, {0: 1}), [request(2.0)])
    run.drain()
    assert run.scheduler.position == 2
    assert run.requests[0].resolved_s == 2.0 + 2 * TICK_S


def test_a_stalled_scheduler_raises(monkeypatch):
    monkeypatch.setattr(engine_core, "MAX_IDLE_STEPS", 50)
    run = Run(Scripted(), [request()])
    with pytest.raises(StalledScheduler, match="no batch in 50 steps although work is pending"):
        run.engine.run(run.scheduler)
    assert run.clock_s == 0.0 and run.sim.clock_s == pytest.approx(0.51)


def idler(lane):
    open_batch(lane)


def test_a_compiled_scheduler_that_stalls_raises_too(monkeypatch):
    monkeypatch.setattr(engine_core, "MAX_IDLE_STEPS", 50)
    run = Run(Compiled("an empty batch, always", idler), [request()])
    with pytest.raises(StalledScheduler):
        run.engine.run(run.scheduler)


ILLEGAL = {
    "prompt overrun": (Batch({0: 9}), "rule 1: request 0 gets 9 tokens, but 8 of its prompt remain"),
    "two decodes": (Batch({1: 2}), "rule 1: request 1 gets 2 tokens, but a decode is exactly 1"),
    "no tokens": (Batch({1: 0}), "rule 1: request 1 gets 0 tokens, expected a whole number >= 1"),
    "negative": (Batch({1: -1}), "rule 1: request 1 gets -1 tokens"),
    "fraction": (Batch({0: 1.5}), "rule 1: request 0 gets 1.5 tokens"),
    "nan": (Batch({0: math.nan}), "rule 1: request 0 gets nan tokens"),
    "text": (Batch({0: "1"}), "rule 1: request 0 gets '1' tokens"),
    "no index": (Batch({0.5: 1}), "rule 1: expected the index of a request, got 0.5"),
    "no mapping": (Batch([0, 1]), "rule 1: Batch.tokens must map requests to tokens, got list"),
    "no batch": ({0: 1}, "rule 1: schedule\\(\\) must return a Batch, got dict"),
    "nothing": (None, "rule 1: schedule\\(\\) must return a Batch, got NoneType"),
    "finished": (Batch({2: 1}), "rule 1: request 2 gets tokens, but neither waits nor runs"),
    "future": (Batch({6: 1}), "rule 6: request 6 has not arrived"),
    "unknown": (Batch({99: 1}), "rule 6: request 99 has not arrived"),
    "negative index": (Batch({-1: 1}), "rule 6: request -1 has not arrived"),
    "preempt waiting": (Batch(preempt=[3]), "rule 1: request 3 is preempted, but does not run"),
    "preempt twice": (Batch(preempt=[0, 0]), "rule 1: request 0 is preempted, but does not run"),
    "preempt and run": (Batch({0: 1}, preempt=[0]), "rule 1: request 0 gets tokens, but neither waits nor runs"),
    "refuse": (Batch(refuse=[3]), "rule 12: refusing requests needs allow_refusal=True"),
    "tokens": (Batch({0: 8, 1: 1, 3: 60}), "rule 1: 69 tokens, max_num_batched_tokens is 64"),
    "sequences": (Batch({3: 1, 5: 1}), "rule 1: 4 sequences would run, max_num_seqs is 3"),
    "blocks": (Batch({4: 1}), "rule 4: request 4 needs 8 blocks, 8 are free and 1 held back"),
}


@pytest.mark.parametrize("case", ILLEGAL)
def test_an_illegal_batch_names_its_rule_and_changes_nothing(case):
    rows = [
        request(prompt=16, output=5),  # runs, 8 of its prompt computed
        request(prompt=16, output=5),  # decodes
        request(prompt=16, output=1),  # finished
        request(prompt=64),  # waits
        request(prompt=128),  # waits
        request(prompt=16),  # waits
        request(9.0),
    ]
    limits = {"num_kv_blocks": 10, "watermark": 0.1, "max_num_seqs": 3, "max_num_batched_tokens": 64}
    run = Run(Scripted({0: 8, 1: 16, 2: 16}), rows, **limits)
    run.step()
    batch, message = ILLEGAL[case]
    before = {name: array.tobytes() for name, array in run.engine.state._asdict().items()}
    with pytest.raises(IllegalBatch, match=message):
        run.engine.submit(batch)
    assert {name: array.tobytes() for name, array in run.engine.state._asdict().items()} == before
    run.engine.submit(Batch({0: 8, 1: 1}))
    run.engine.execute()
    check(run.engine.state)


def test_a_refused_batch_leaves_the_engine_usable_through_decide():
    run = Run(Scripted({0: 99}, {0: 16}), [request(output=1)])
    with pytest.raises(IllegalBatch):
        run.step()
    assert run.step() == {0: 16}
    assert run.engine.is_over()


@pytest.mark.parametrize("case", ["running", "with tokens", "twice"])
def test_only_requests_that_wait_for_their_first_token_are_refused(case):
    run = Run(Scripted({0: 16, 1: 16}, Batch(preempt=[1])), [request(output=5)] * 3, allow_refusal=True)
    run.steps(2)
    refused = {"running": [0], "with tokens": [1], "twice": [2, 2]}[case]
    with pytest.raises(IllegalBatch, match=f"rule 12: request {refused[0]} is refused, but does not wait for its"):
        run.engine.submit(Batch(refuse=refused))


def test_refusal_resolves_a_request():
    run = Run(Scripted(Batch({0: 16}, refuse=[1])), [request(output=1), request()], allow_refusal=True)
    run.step()
    assert run.requests["phase"][:2].tolist() == [FINISHED, REFUSED]
    assert (run.sim.num_refused, run.requests[1].resolved_s) == (1, 0.0)
    assert run.engine.is_over()


def test_deciding_twice_forgets_the_first_decision():
    batches = [Batch({0: 16, 1: 16}), Batch({2: 16}, preempt=[0, 1], refuse=[3]), Batch({0: 1, 1: 1, 3: 16})]
    run = Run(Scripted(*batches), [request(output=5)] * 4, allow_refusal=True)
    run.step()
    run.decide()
    run.step()
    assert run.requests["num_preemptions"][:4].tolist() == [0, 0, 0, 0]
    assert run.requests["num_output_tokens"][:4].tolist() == [2, 2, 0, 1]


def test_a_compiled_decision_can_be_taken_twice():
    run = Run("vllm-v1", [request(output=40), request(output=40)], num_kv_blocks=5)
    while not run.engine.state.batches[0].num_preempt:
        run.decide()
        decided = run.step()
    assert run.requests["num_preemptions"][:2].tolist() == [0, 1]
    assert decided == {0: 1}


# --- rules 10 to 13


DAMAGE = [
    ("sims", 0, "clock_s", 0.01, "a clock went back"),
    ("sims", 0, "num_waiting", 2, "waiting count differs"),
    ("sims", 0, "num_running", 1, "running count differs"),
    ("sims", 0, "num_finished", 2, "finished count differs"),
    ("episodes", 0, "num_rejected", 1, "rejected count differs"),
    ("sims", 0, "num_refused", 1, "refused count differs"),
    ("sims", 0, "num_abandoned", 1, "abandoned count differs"),
    ("episodes", 0, "num_arrived", 5, "arrived != waiting + running + resolved"),
    ("sims", 0, "free_blocks", 7, "blocks used + free != total"),
    ("sims", 0, "tokens_emitted", 9, "tokens emitted != sum over requests"),
    ("sims", 0, "waiting_tokens", 15, "waiting tokens != sum over waiting"),
    ("sims", 0, "num_preemptions", 1, "preemptions != sum over requests"),
    ("episodes", 0, "num_resolved", 0, "list of resolved requests and phases differ"),
    ("sims", 0, "max_num_seqs", 1, "more sequences run than max_num_seqs"),
    ("episodes", 0, "patience_s", 0.001, "a lateness exceeds the patience"),
    ("worlds", 0, "num_unresolved", 1, "unresolved count differs"),
    ("waiting", 0, 0, 0, "a request is in two places"),
    ("running", 0, 1, 0, "a request is in two places"),
    ("arrivals", 4, "arrival_s", 0.0, "an arrival was overlooked"),
    ("requests", 0, "arrival_s", 1.0, "a request's arrival has changed"),
    ("requests", 4, "prompt_tokens", 5, "a request can be read before its arrival"),
    ("requests", 0, "num_blocks", 3, "blocks used + free != total"),
    ("requests", 2, "num_blocks", 1, "a request that does not run holds blocks"),
    ("requests", 0, "num_computed_tokens", 33, "blocks held != ceil"),
    ("requests", 0, "num_computed_tokens", 21, "a decode's KV is not its prompt"),
    ("requests", 2, "num_computed_tokens", 1, "a waiting request holds KV"),
    ("requests", 0, "num_output_tokens", 2, "a decode's KV is not its prompt and emitted tokens but the last"),
    ("requests", 0, "num_scheduled_tokens", 1, "marked as scheduled"),
    ("requests", 0, "resolved_s", 1.0, "resolved_s and phase disagree"),
    ("requests", 2, "ttft_slo_s", -9.0, "a client whose patience is over is still here"),
]


@pytest.mark.parametrize(("array", "row", "field", "value", "rule"), DAMAGE)
def test_the_checker_names_what_is_broken(array, row, field, value, rule):
    # 0 decodes with 20 tokens of KV, 1 is a started prompt, 2 waits, 3 has finished late, 4 is still to come
    rows = [request(prompt=20, output=5), request(), request(ttft=2.0), request(output=1, ttft=0.01), request(9.0)]
    run = Run(Scripted({0: 20, 1: 8, 3: 16}), rows, patience_s=5.0)
    run.step()
    record = getattr(run.engine.state, array)[0]
    (record if array in ("sims", "episodes", "worlds", "waiting", "running") else record[row])[field] = value
    with pytest.raises(InvariantError, match=re.escape(rule)):
        check(run.engine.state, 0, run.clock_s)


def test_the_tie_of_two_arrivals_goes_to_the_lower_index():
    run = Run("sarathi", [request(prompt=300, output=1), request(prompt=300, output=1)])
    assert run.drain() == [{0: 300, 1: 212}, {1: 88}]


def test_execution_time_is_profile_times_scale_and_noise():
    rows = [request(prompt=16, output=40)]
    exact = Run("sarathi", rows)
    scaled = Run("sarathi", rows)
    scaled.engine.state.worlds[0].cost_scale = 1.25
    assert scaled.steps(3) and exact.steps(3)
    assert scaled.clock_s == 1.25 * exact.clock_s
    noisy = Run("sarathi", rows, jitter=0.25)
    noisy.drain()
    factor = noisy.sim.busy_s / (40 * TICK_S)
    assert 0.8 < factor < 1.25 and factor != 1.0
    again = Run("sarathi", rows, jitter=0.25)
    again.drain()
    assert again.clock_s == noisy.clock_s


def test_noise_goes_on_behind_its_second_block():
    steps = 2 * NOISE_BLOCK + 50
    rows = [request(prompt=1, output=1) for _ in range(steps)]
    run = Run("sarathi", rows, max_num_seqs=1, jitter=0.1)
    assert run.engine.run(run.scheduler)
    assert run.sim.num_batches == steps
    noise = np.concatenate([noise_block(run.scenario, 0, k) for k in range(3)])[:steps]
    ends = np.sort(run.requests["resolved_s"][:steps])
    assert np.allclose(np.diff(ends, prepend=0.0), TICK_S * noise, rtol=1e-9)


def test_a_decision_time_is_added_to_every_batch():
    scheduler = Scripted({}, {0: 16}, {0: 1})
    scheduler.decision_s = 0.25
    run = Run(scheduler, [request()], backend=Durations(0.5))
    run.step()
    assert run.clock_s == 0.01
    run.drain()
    assert run.clock_s == 0.01 + 2 * 0.75
    assert run.sim.mean_batch_s == pytest.approx(0.75, rel=1e-12)


def test_a_run_ends_with_its_cohort_or_its_time():
    rows = [request(k * 1.0, output=1) for k in range(4)]
    run = Run("sarathi", table(rows, cohort=(1, 3)))
    assert run.engine.run(run.scheduler)
    assert run.requests["phase"][:4].tolist() == [FINISHED, FINISHED, FINISHED, PENDING]
    cut = Run("sarathi", rows, drain_s=0.5)  # half a second behind the last arrival
    cut.engine.state.worlds[0].stop_s = 1.5
    assert cut.engine.run(cut.scheduler)
    assert cut.requests["phase"][:4].tolist() == [FINISHED, FINISHED, PENDING, PENDING]
    assert cut.sim.clock_s == 1.5


def test_continuing_runs_stop_at_the_horizon():
    world = scenario("default", horizon_s=2.0, jitter=0.0)
    engine = Engine(world, 3, profile=profile())
    engine.reset(table([request(0.0, prompt=16, output=4000)] * 3))
    scheduler = make_scheduler("sarathi")
    install(scheduler, engine.state)
    assert engine.run(scheduler)
    assert engine.state.sims[0].clock_s == 2.0
    assert engine.state.sims[0].num_running == 3


@pytest.mark.parametrize("duration_s", [-0.1, math.nan, math.inf])
def test_a_backend_cannot_turn_the_clock_back(duration_s):
    run = Run("sarathi", [request()], backend=Durations(duration_s))
    with pytest.raises(ValueError, match="backend: expected a duration in seconds >= 0"):
        run.step()


def test_a_backend_gets_the_batch_as_applied():
    backend = Durations(0.5)
    run = Run("sarathi", [request(output=3), request(output=3)], backend=backend, num_kv_blocks=3)
    run.steps(2)
    first, second = backend.batches
    assert first.request.tolist() == [0, 1] and first.num_tokens.tolist() == [16, 16]
    assert first.num_computed.tolist() == [0, 0] and first.emits.tolist() == [True, True]
    assert first.preempted.tolist() == []
    # request 1 was evicted for the block of request 0
    assert second.request.tolist() == [0] and second.num_computed.tolist() == [16]
    assert second.preempted.tolist() == [1] and second.emits.tolist() == [True]


def test_patience_ends_a_wait():
    rows = [request(0.0, prompt=8000, output=9, tbt=100.0), request(0.0, ttft=1.0)]
    run = Run("sarathi", rows, backend=Durations(1.0), patience_s=3.0, max_num_seqs=1)
    run.steps(3)
    assert run.requests[1].phase == WAITING
    run.step()  # at 4 s the client has been late for 3 s
    row = run.requests[1]
    assert (row.phase, row.lateness_s, row.resolved_s, row.num_output_tokens) == (ABANDONED, 3.0, 4.0, 0)
    assert run.sim.num_abandoned == 1


def test_an_early_first_token_brings_the_departure_forward():
    # due for its first token only at 100 s, but silent after 0.5 s: it leaves 3 s behind 0.5 + 0.5
    rows = [request(0.0, output=9, ttft=100.0), request(0.0, prompt=6000, output=1, ttft=1000.0)]
    batches = [{0: 16}, *[{1: 100}] * 20]
    run = Run(Scripted(*batches), rows, backend=Durations(0.5), patience_s=3.0)
    run.steps(7)
    assert run.requests[0].phase == RUNNING
    run.step()
    assert (run.requests[0].phase, run.requests[0].resolved_s) == (ABANDONED, 4.0)


def test_a_client_may_come_and_leave_during_one_batch():
    rows = [request(0.0, output=9, tbt=100.0), request(1.0, ttft=1.0), request(2.0, ttft=1.0)]
    run = Run("sarathi", rows, backend=Durations(5.0), patience_s=3.0)
    run.step()
    assert run.requests["phase"][:3].tolist() == [RUNNING, ABANDONED, WAITING]
    assert run.requests[1].resolved_s == 5.0


def test_a_token_that_comes_after_the_client_has_left_is_not_emitted():
    rows = [request(0.0, output=9, tbt=0.5), request(0.0)]
    run = Run(Scripted({0: 16}, {0: 1}, {1: 16}), rows, backend=Durations(0.5, 4.0), patience_s=3.0)
    run.steps(2)
    row = run.requests[0]
    assert (row.phase, row.num_output_tokens, row.num_blocks) == (ABANDONED, 1, 0)
    assert run.sim.tokens_emitted == 1


def test_a_table_larger_than_the_engine_is_an_error():
    engine = Engine(scenario("paper"), 2, profile=profile())
    with pytest.raises(ValueError, match="table: expected at most 2 requests, got 3"):
        engine.reset(table([request()] * 3))


def test_records_of_requests_start_at_cache_lines():
    run = Run("sarathi", [request(0.0, 10, 2)])
    assert REQUEST.itemsize % CACHE_LINE == 0
    assert run.engine.state.requests.ctypes.data % CACHE_LINE == 0


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_chunk_in_a_block_that_its_request_has_is_legal_wherever_it_stands(order):
    run = Run("sarathi", [request(prompt=16, output=8), request(prompt=48, output=2)], num_kv_blocks=4, watermark=0.0)
    run.engine.submit(Batch({0: 16, 1: 16}))
    run.engine.execute()
    assert run.sim.free_blocks == 0
    tokens = {0: 1, 1: 16}  # a decode that has to evict, and a chunk that takes no block
    run.engine.submit(Batch({r: tokens[r] for r in order}))
    run.engine.execute()
    check(run.engine.state)
    assert run.sim.num_preemptions == 1
