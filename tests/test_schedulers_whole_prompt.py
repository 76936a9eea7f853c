"""vLLM V0, Orca, FasterTransformer: small instances by hand."""

import pytest
from helpers import Run, request

# --- vLLM V0


def test_v0_prefers_whole_prompts_to_decodes():
    rows = [request(prompt=n, output=3) for n in (5000, 3000, 500)]
    assert Run("vllm-v0", rows).drain() == [
        {0: 5000, 1: 3000},  # 8500 would be above 8192
        {2: 500},
        {0: 1, 1: 1, 2: 1},
        {0: 1, 1: 1, 2: 1},
    ]


def test_v0_lets_nobody_overtake():
    rows = [request(prompt=n, output=1) for n in (5000, 4000, 100)]
    assert Run("vllm-v0", rows).drain() == [{0: 5000}, {1: 4000, 2: 100}]


def test_v0_interrupts_decodes_for_a_newcomer():
    rows = [request(prompt=16, output=4), request(0.04, prompt=40, output=2)]
    assert Run("vllm-v0", rows).drain() == [{0: 16}, {0: 1}, {1: 40}, {0: 1, 1: 1}, {0: 1}]


def test_v0_decodes_while_a_prompt_finds_no_blocks():
    rows = [request(prompt=64, output=3), request(0.01, prompt=48, output=1)]
    run = Run("vllm-v0", rows, num_kv_blocks=8, watermark=0.125)  # 4 held, then 5; 3 wanted, 1 held back
    assert run.drain() == [{0: 64}, {1: 48}, {0: 1}, {0: 1}]
    run = Run("vllm-v0", rows, num_kv_blocks=7, watermark=0.15)
    assert run.drain() == [{0: 64}, {0: 1}, {0: 1}, {1: 48}]


@pytest.mark.parametrize("policy", ["vllm-v0", "orca", "faster-transformer"])
def test_only_a_prompt_above_the_engines_limit_is_split(policy):
    rows = [request(prompt=100, output=2), request(prompt=10, output=2)]
    run = Run(policy, rows, max_num_batched_tokens=64)
    assert run.drain() == [{0: 64}, {0: 36, 1: 10}, {0: 1, 1: 1}]


@pytest.mark.parametrize("policy", ["vllm-v0", "orca", "faster-transformer"])
def test_a_smaller_budget_never_splits_the_first_prompt(policy):
    rows = [request(prompt=100, output=1), request(prompt=20, output=1), request(prompt=20, output=1)]
    assert Run(f"{policy}[budget=30]", rows).drain() == [{0: 100}, {1: 20}, {2: 20}]


# --- Orca


def test_orca_runs_whole_prompts_with_all_decodes():
    rows = [request(prompt=5000, output=3), request(prompt=3191, output=2), request(0.01, prompt=500, output=1)]
    assert Run("orca", rows).drain() == [{0: 5000, 1: 3191}, {0: 1, 1: 1, 2: 500}, {0: 1}]


def test_orca_waits_for_room_beside_the_decodes_rather_than_split():
    rows = [request(prompt=10, output=3), request(prompt=10, output=4), request(0.01, prompt=63, output=1)]
    run = Run("orca[budget=64]", rows, max_num_batched_tokens=64)
    # 63 tokens beside two decodes are one too many
    assert run.drain() == [{0: 10, 1: 10}, {0: 1, 1: 1}, {0: 1, 1: 1}, {1: 1, 2: 63}]


# --- FasterTransformer


def test_a_group_runs_to_its_end_before_the_next():
    rows = [request(prompt=10, output=1 + k % 3) for k in range(33)] + [request(0.01, prompt=10, output=2)]
    batches = Run("faster-transformer", rows).drain()
    first = set(range(32))
    assert set(batches[0]) == first
    assert set(batches[1]) == {r for r in first if r % 3 > 0}
    assert set(batches[2]) == {r for r in first if r % 3 == 2}
    assert batches[3:] == [{32: 10, 33: 10}, {32: 1, 33: 1}, {32: 1}]


def test_a_long_group_prefills_over_several_batches():
    rows = [request(prompt=5000, output=2) for _ in range(3)]
    assert Run("faster-transformer", rows).drain() == [{0: 5000}, {1: 5000}, {2: 5000}, {0: 1, 1: 1, 2: 1}]


def test_who_comes_during_a_group_waits_for_the_next():
    rows = [request(prompt=10, output=4), request(0.01, prompt=10, output=1)]
    assert Run("faster-transformer", rows).drain() == [{0: 10}, {0: 1}, {0: 1}, {0: 1}, {1: 10}]
    # a continuous batcher takes it in at once
    assert Run("orca", rows).drain() == [{0: 10}, {0: 1, 1: 10}, {0: 1}, {0: 1}]


def test_a_group_closes_where_blocks_end():
    rows = [request(prompt=32, output=2) for _ in range(4)]
    # the third is evicted at its first decode and joins the next group
    assert Run("faster-transformer", rows, num_kv_blocks=7).drain() == [
        {0: 32, 1: 32, 2: 32},
        {0: 1, 1: 1, 2: 1},
        {2: 33, 3: 32},
        {3: 1},
    ]
