"""What is proposed for vLLM's scheduler, on instances by hand; each is `vllm-v1` but for one rule."""

import math

import numpy as np
import pytest
from helpers import TICK_S, Run, profile, request
from test_schedulers_sglang import run as run_shared

from llmsched_gym.engine.records import RUNNING, WAITING
from llmsched_gym.registry import make_scheduler, registry
from llmsched_gym.scheduler import PolicyError

VARIANTS = ("max-prefills", "interleave", "vllm-slo", "queue-tokens", "vllm-priority", "ppas", "ppas+")
FIVE = [request(prompt=30, output=2)] * 5


@pytest.mark.parametrize("policy", VARIANTS)
def test_alone_a_request_is_served_as_by_v1(policy):
    rows = [request(prompt=100, output=3, ttft=9.0)]
    assert Run(f"{policy}[budget=64]", rows).drain() == [{0: 64}, {0: 36}, {0: 1}, {0: 1}]
    if policy not in ("interleave", "preflow"):
        assert registry()[policy].admission == "prompt-check"


# --- max-prefills


def test_nobody_enters_while_so_many_prompts_are_unfinished():
    rows = [request(prompt=100, output=3), *FIVE]
    assert Run("max-prefills[budget=64,n=1]", rows).steps(4) == [{0: 64}, {0: 36}, {0: 1, 1: 30}, {0: 1, 1: 1, 2: 30}]
    # in the second batch 0 ends, but was unfinished when it was formed: one more may enter
    assert Run("max-prefills[budget=64,n=2]", rows).steps(3) == [{0: 64}, {0: 36, 1: 28}, {0: 1, 1: 2, 2: 30}]
    assert Run("vllm-v1[budget=64]", rows).steps(3)[2] == {0: 1, 1: 2, 2: 30, 3: 30, 4: 1}


# --- interleave


def test_so_many_batches_of_prompts_and_then_so_many_of_decodes():
    rows = [request(prompt=10, output=9), request(prompt=500, output=1)]
    spec = "interleave[budget=50,k={},m={}]"
    first = [{0: 10, 1: 40}]
    assert Run(spec.format(2, 1), rows).steps(7) == [*first, {1: 50}, {1: 50}, {0: 1}, {1: 50}, {1: 50}, {0: 1}]
    assert Run(spec.format(1, 2), rows).steps(7) == [*first, {1: 50}, {0: 1}, {0: 1}, {1: 50}, {0: 1}, {0: 1}]
    # the first batch is not counted, as nothing decodes yet


def test_decodes_run_where_no_prompt_can():
    rows = [request(prompt=32, output=3), request(prompt=32, output=1)]
    # three blocks: 1 has to wait for 0, which goes on
    assert Run("interleave", rows, num_kv_blocks=3).drain() == [{0: 32}, {0: 1}, {0: 1}, {1: 32}]


# --- vllm-slo


def test_who_has_used_most_of_its_slo_enters_first():
    # after 0's batch of 1/32 s: 1 has used 1/32 of it, score 6.25 + 10 * (1 - 100 / 8192); 2 a half, 3 a quarter
    rows = [request(prompt=40, output=1)]
    rows += [request(prompt=100, output=1, ttft=s * TICK_S) for s in (32.0, 2.0, 4.0)]
    run = Run("vllm-slo[budget=100]", [rows[0], *((TICK_S * 1e-9, *row[1:]) for row in rows[1:])])
    assert run.drain() == [{0: 40}, {2: 100}, {3: 100}, {1: 100}]


def test_of_those_without_a_deadline_the_shorter_enters_first():
    rows = [request(prompt=n, output=1) for n in (60, 40, 50)]
    assert list(Run("vllm-slo[budget=100]", rows).step()) == [1, 2, 0]


def test_urgent_prompts_find_a_tenth_of_the_budget():
    # 0 has 300 tokens left when 1, whose SLO is 1.5 batches, has waited for one: 67 % of it
    rows = [request(prompt=400, output=1), request(1e-9, prompt=90, output=1, ttft=1.5 * TICK_S)]
    assert Run("vllm-slo[budget=100]", rows).steps(3) == [{0: 100}, {0: 90, 1: 10}, {0: 100}]
    assert Run("vllm-slo[budget=100,kept=0]", rows).steps(3) == [{0: 100}] * 3
    rows[1] = request(1e-9, prompt=90, output=1, ttft=1.75 * TICK_S)  # 57 %
    assert Run("vllm-slo[budget=100]", rows).steps(2)[1] == {0: 100}


def test_nothing_is_kept_while_most_of_running_decode():
    rows = [request(prompt=5, output=9), request(prompt=5, output=9), request(prompt=400, output=1)]
    rows += [request(1e-9, prompt=90, output=1, ttft=1.5 * TICK_S)]
    assert Run("vllm-slo[budget=100]", rows).steps(2)[1] == {0: 1, 1: 1, 2: 98}
    assert Run("vllm-slo[budget=100]", rows[1:]).steps(2)[1] == {0: 1, 1: 89, 2: 10}  # one of two


# --- queue-tokens


def test_a_newcomer_is_refused_while_too_much_waits():
    # all of them come during 0's first batch: 50 wait, then 100, and more than 99 is too much
    rows = [request(prompt=100, output=1), *[request(1e-9, prompt=50, output=1)] * 4]
    run = Run("queue-tokens[budget=50,limit=99]", rows)
    assert run.steps(5) == [{0: 50}, {0: 50}, {1: 50}, {2: 50}, {}]
    assert run.sim.num_refused == 2
    run = Run("queue-tokens[budget=50,limit=100]", rows)
    run.steps(2)
    assert run.sim.num_refused == 1


def test_who_was_let_in_is_not_asked_again():
    rows = [request(prompt=200, output=1), request(1e-9, prompt=50, output=1)]
    rows += [request(1.5 * TICK_S, prompt=500, output=1), request(2.5 * TICK_S, prompt=1, output=1)]
    run = Run("queue-tokens[budget=50,limit=60]", rows)
    assert run.steps(4) == [{0: 50}] * 4
    assert run.requests["phase"][1:4].tolist()[:2] == [WAITING, WAITING] and run.sim.num_refused == 1


def test_without_a_limit_it_is_what_the_ttft_slo_leaves_time_for():
    # 50 tokens a batch of 1/32 s: within two batches 100, and 3 finds 100 before it, 4 finds 150
    rows = [request(prompt=100, output=1), *[request(1e-9, prompt=50, output=1, ttft=2 * TICK_S)] * 4]
    run = Run("queue-tokens[budget=50]", rows)
    run.steps(2)
    assert run.sim.num_refused == 1
    rows = [request(prompt=100, output=1), *[request(1e-9, prompt=50, output=1, ttft=math.inf)] * 4]
    run = Run("queue-tokens[budget=50]", rows)
    run.steps(2)
    assert run.sim.num_refused == 0


def test_it_says_so_where_refusal_is_not_allowed():
    with pytest.raises(PolicyError, match="policy 'queue-tokens': refuses requests, expected allow_refusal=True"):
        Run("queue-tokens", [request()], allow_refusal=False)


# --- vllm-priority


def test_strict_users_enter_first():
    rows = [
        request(prompt=50, output=1),
        request(1e-9, prompt=50, output=1),
        request(2e-9, prompt=50, output=1, tbt=0.1),
    ]
    assert Run("vllm-priority[budget=50]", rows).drain() == [{0: 50}, {2: 50}, {1: 50}]


def test_the_last_by_priority_gives_way_even_from_the_batch():
    # five blocks, two each at first: 0 (relaxed) has its third when 1 (strict), admitted later, needs one
    rows = [request(prompt=16, output=40), request(prompt=16, output=40, tbt=0.1)]
    run = Run("vllm-priority", rows, num_kv_blocks=5)
    assert list(run.step()) == [1, 0]
    run.steps(16)
    assert run.sim.free_blocks == 1
    assert run.step() == {1: 1}  # 0, that comes last, gave itself up
    assert (run.requests[0].phase, run.requests[1].phase) == (WAITING, RUNNING)
    # 0 runs first when 1 comes a batch later: it is taken out of the batch again
    rows = [request(prompt=17, output=40), request(1e-9, prompt=16, output=40, tbt=0.1)]
    run = Run("vllm-priority", rows, num_kv_blocks=5)
    assert run.steps(2) == [{0: 17}, {0: 1, 1: 16}]
    run.steps(15)
    assert run.requests["num_computed_tokens"][:2].tolist() == [33, 31]
    assert run.step() == {0: 1, 1: 1}
    assert run.sim.free_blocks == 0
    assert run.step() == {1: 1}
    assert run.requests[0].num_preemptions == 1 and run.requests[1].num_preemptions == 0


def test_what_is_taken_back_goes_back_to_the_budget():
    # a budget of 3 for three decodes: 0 (relaxed) is first in admission and in the batch, 1 needs its block
    rows = [request(prompt=14, output=40)]
    rows += [request(1e-9, prompt=13, output=40, tbt=0.1), request(1e-9, prompt=12, output=40, tbt=0.1)]
    run = Run("vllm-priority[budget=14]", rows, num_kv_blocks=4)
    assert run.steps(3) == [{0: 14}, {0: 1, 1: 13}, {0: 1, 1: 1, 2: 12}]
    # 0 takes the fourth block, its second, and two batches later 1 finds none
    assert run.steps(2) == [{0: 1, 1: 1, 2: 1}] * 2
    assert run.decide() == {1: 1, 2: 1}
    batch = run.engine.state.batches[0]
    assert (batch.num_tokens, batch.num_decodes, batch.kv_tokens) == (2, 2, 17 + 15)
    assert (batch.token_room, batch.free_blocks) == (14 - 2, 1)


def test_blocks_of_shared_prompts_go_back_too():
    rows = [(0, "abc", 40, 30, 99), (0, "abd", 40, 30, 99), (0, "xyz", 40, 30, 99)]
    found = run_shared("vllm-priority", *rows, num_kv_blocks=9)
    found.drain()
    assert found.sim.num_finished == 3 and found.sim.num_preemptions > 0


# --- ppas, ppas+


def test_two_prompts_and_a_decode_are_pressure():
    rows = [request(prompt=10, output=9), request(1e-9, prompt=300, output=1), request(1e-9, prompt=300, output=1)]
    assert Run("ppas[large=100]", rows).steps(3) == [{0: 10}, {0: 1, 1: 24}, {0: 1, 1: 24}]
    assert Run("ppas[large=100,small=40]", rows).steps(2)[1] == {0: 1, 1: 39}
    assert Run("ppas[large=100]", [request(prompt=300)] * 2).steps(2) == [{0: 100}] * 2  # no decode
    assert Run("ppas[large=100]", rows[:2]).steps(2)[1] == {0: 1, 1: 99}  # one prompt


def test_one_long_prompt_beside_two_decodes_is_pressure_to_ppas_plus():
    rows = [request(prompt=10, output=9), request(prompt=10, output=9), request(1e-9, prompt=330, output=1)]
    # in the second batch it is not under way yet; then 232 tokens are left, and 209
    batches = [{0: 10, 1: 10}, {0: 1, 1: 1, 2: 98}, *[{0: 1, 1: 1, 2: 23}] * 2]
    assert Run("ppas+[large=100]", rows).steps(4) == batches
    assert Run("ppas+[large=100,long=233]", rows).steps(3)[2] == {0: 1, 1: 1, 2: 98}
    assert Run("ppas+[large=100,long=232]", rows).steps(4)[2:] == [{0: 1, 1: 1, 2: 23}, {0: 1, 1: 1, 2: 98}]
    assert Run("ppas+[large=100]", rows[1:]).steps(3)[2] == {0: 1, 1: 99}  # one decode
    assert Run("ppas[large=100]", rows).steps(3)[2] == {0: 1, 1: 1, 2: 98}


def test_budgets_follow_from_the_devices():
    rows = [request(prompt=10, output=9), *[request(1e-9, prompt=5000, output=1)] * 2]
    assert Run("ppas", rows).steps(2)[1] == {0: 1, 1: 511}


# --- preflow


def test_preflow_weighs_age_against_own_and_remaining_work():
    # W(20) = 210, W(40) = 820; equal age: the shorter first
    rows = [request(prompt=40, output=1), request(prompt=20, output=1)]
    assert Run("preflow[budget=40]", rows).drain() == [{1: 20, 0: 20}, {0: 20}]
    # 0 is older by d: it goes first once 2 ** (d / half) exceeds (820 / 210) ** 2, that is d > 3.93 half
    for age, first in ((3.9, 2), (4.0, 1)):
        rows = [request(prompt=10, output=1), request(1e-9, prompt=40, output=1)]
        rows.append(request(1e-9 + age * TICK_S / 8, prompt=20, output=1))
        run = Run(f"preflow[budget=40,half={TICK_S / 8}]", rows)
        run.step()
        assert next(iter(run.step())) == first


def test_preflow_goes_on_with_what_is_nearly_done():
    # 100 - 60 left: 5050 - 1830 = 3220 of 5050; a newcomer of 89 has 4005 ** 2 < 5050 * 3220 < 4095 ** 2, one of 90
    for prompt, first in ((89, 1), (90, 0)):
        rows = [request(prompt=100, output=1), request(1e-9, prompt=prompt, output=1)]
        assert next(iter(Run("preflow[budget=60,half=1e9]", rows).steps(2)[1])) == first


# --- parameters


@pytest.mark.parametrize(
    ("spec", "message"),
    {
        "max-prefills[n=0]": "n: expected whole number of prompts >= 1, got '0'",
        "interleave[k=1.5]": "k: expected whole number of batches >= 1, got '1.5'",
        "preflow[half=0]": "half: expected seconds > 0",
        "queue-tokens[limit=-1]": "limit: expected whole number of prompt tokens",
        "ppas[long=3]": "unknown parameter 'long'",
        "vllm-slo[kept=x]": "kept: expected share of the budget from 0 to 1, got 'x'",
    }.items(),
)
def test_a_bad_parameter_is_one_clear_line(spec, message):
    with pytest.raises(PolicyError, match=message):
        make_scheduler(spec)


def test_v1_is_what_they_are_without_their_rule():
    rng = np.random.default_rng(7)
    times = np.cumsum(rng.exponential(0.02, 60))
    rows = [request(float(t), int(rng.integers(1, 300)), int(rng.integers(1, 50))) for t in times]
    fields = {"device": profile((5.0, 5.4), kv_ms=0.001), "num_kv_blocks": 60, "max_num_seqs": 16}
    expected = Run("vllm-v1[budget=100]", rows, **fields).drain()
    for spec in ("max-prefills[n=999]", "queue-tokens[limit=99999]", "ppas[small=100]", "ppas+[small=100]"):
        assert Run(spec.replace("[", "[budget=100,"), rows, **fields).drain() == expected, spec
