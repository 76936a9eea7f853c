"""KV blocks that requests share: small instances by hand, by the rules of vLLM's KV cache manager.

`benchmarks/conformance_vllm.py --prefix-caching` compares them with the real one.
"""

from dataclasses import replace

import numpy as np
import pytest
from helpers import Run, request, table

from llmsched_gym.config import ConfigError
from llmsched_gym.engine import Batch, IllegalBatch, check
from llmsched_gym.workload import Request, shares_of_ids, shares_of_turns


def run(policy, *rows, **fields):
    """A run of requests given as (arrival, a letter for each block of 16 tokens, prompt, output)."""
    given = table([request(arrival, prompt, output) for arrival, _, prompt, output in rows])
    ids = [[ord(letter) for letter in word] for _, word, _, _ in rows]
    shares_with, shared_tokens = shares_of_ids(ids, given.prompt_tokens, 16)
    given = replace(given, shares_with=shares_with, shared_tokens=shared_tokens)
    return Run(policy, given, prefix_caching=True, **{"num_kv_blocks": 40, **fields})


def cached(found):
    return found.requests["num_cached_tokens"].tolist()


def computed(batches, r):
    return sum(batch.get(r, 0) for batch in batches)


def test_a_fork_computes_what_is_behind_the_prefix():
    found = run("vllm-v1", (0, "abcd", 60, 20), (0.1, "abx", 48, 1), (9, "abcz", 64, 1))
    batches = found.drain()
    # the fourth block of the first prompt is full only with its output, which nobody else has
    assert cached(found) == [0, 32, 48]
    assert [computed(batches, r) for r in range(3)] == [60 + 19, 16, 16]


def test_equal_prompts_in_one_batch_share_all_blocks_but_the_last():
    found = run("vllm-v1", (0, "abcd", 64, 2), (0, "abcd", 64, 2))
    assert found.step() == {0: 64, 1: 16}
    assert found.sim.free_blocks == 40 - 5
    found.drain()
    assert cached(found) == [0, 48]


def test_a_prompt_of_exact_blocks_computes_its_last_block_again():
    found = run("vllm-v1", (0, "ab", 32, 1), (9, "ab", 32, 1), (18, "abc", 33, 1))
    found.drain()
    assert cached(found) == [0, 16, 32]


def test_the_last_blocks_of_a_chain_are_evicted_first():
    # the first holds a to d of five blocks; the second needs three: the unused one, then d and c
    found = run("vllm-v1", (0, "abcd", 64, 1), (9, "xyz", 48, 1), (18, "abcd", 64, 1), num_kv_blocks=5)
    found.drain()
    assert cached(found) == [0, 0, 32]


def test_a_preempted_request_finds_its_blocks_again():
    # all share two blocks; each ends with 99 tokens in seven, five of its own: 17 blocks are wanted, and there are 12
    found = run("vllm-v1", (0, "abc", 40, 60), (0, "abd", 40, 60), (0.1, "abe", 44, 60), num_kv_blocks=12)
    found.drain()
    rows = found.requests
    assert cached(found) == [0, 32, 32]
    assert rows["num_preemptions"].sum() > 0
    recached = found.engine.state.prefixes[0]["num_recached_tokens"]
    assert (recached >= 32 * rows["num_preemptions"]).all()
    assert (recached % 16 == 0).all()


@pytest.mark.parametrize(("policy", "first"), [("sarathi", 1), ("sarathi-spf", 2), ("srpt-capped", 2)])
def test_shortest_first_goes_by_what_is_not_cached(policy, first):
    # the long prompt is cached but for one block; the short one, which came before it, has three blocks of its own
    found = run(policy, (0, "abcdefg", 112, 1), (9, "xyz", 48, 2), (9, "abcdefh", 112, 2), max_num_seqs=1)
    while found.clock_s < 9:
        found.step()
    waiting = found.engine.view().waiting
    assert dict(zip(waiting.index.tolist(), waiting.num_uncached_tokens.tolist(), strict=True)) == {1: 48, 2: 16}
    assert found.step() == {first: {1: 48, 2: 16}[first]}


def test_generated_tokens_can_be_found():
    prompt, output = np.array([20, 57]), np.array([30, 2])
    given = table([request(0.0, 20, 30), request(9.0, 57, 2)])
    shares = shares_of_turns(np.array([-1, 0]), np.array([0, 7]), prompt, output)
    given = replace(given, shares_with=shares[0], shared_tokens=shares[1])
    found = Run("vllm-v1", given, prefix_caching=True, num_kv_blocks=40)
    found.drain()
    assert cached(found) == [0, 48]  # 49 of 50 tokens were computed: three blocks


@pytest.mark.parametrize(
    "policy",
    [
        "vllm-v1",
        "sarathi",
        "slai",
        "rad",
        "orca",
        "on-time",
        "random",
        "srpt-capped",
        "sarathi[order=spf,evict=session]",
    ],
)
def test_the_rules_hold_where_memory_is_short(policy):
    rng = np.random.default_rng(1)
    rows = [
        (float(at), "".join("abc"[i] for i in rng.integers(0, 2, 8)), int(rng.integers(20, 128)), int(n))
        for at, n in zip(np.sort(rng.uniform(0, 3, 30)), rng.integers(1, 60, 30), strict=True)
    ]
    found = run(policy, *rows, num_kv_blocks=24, max_num_seqs=8)
    found.drain(20_000)
    assert found.sim.num_finished == 30
    assert sum(cached(found)) > 0
    assert found.sim.free_blocks == 24


def test_a_batch_that_is_formed_and_not_run_gives_its_blocks_back():
    found = run("vllm-v1", (0, "abcd", 64, 2), (0, "abcd", 64, 2))
    first = found.decide()
    assert found.decide() == first == {0: 64, 1: 16}
    found.engine.submit(Batch({1: 64}))
    found.engine.execute()
    check(found.engine.state)
    assert found.requests["num_computed_tokens"].tolist() == [0, 64]


def test_blocks_that_are_left_cost_again():
    # 2 finds a and b, which 0 holds, and needs seven others; when 0 has left them it needs nine, and eight are free
    found = run("vllm-v1", (0, "abcd", 64, 8), (0, "xyz", 48, 20), (0, "abuvwxyzq", 144, 1), num_kv_blocks=12)
    found.steps(8)
    assert found.sim.free_blocks == 8
    assert found.steps(12) == [{1: 1}] * 12
    assert found.step() == {2: 112}


def test_a_batch_by_hand_pays_for_blocks_of_whom_it_preempts():
    # 2 needs nine blocks: five besides those of 0, where three are free, or nine when 0 is preempted, and eight
    found = run("vllm-v1", (0, "abcd", 64, 9), (0, "mn", 31, 9), (0, "abcduvwxy", 144, 1), num_kv_blocks=10)
    found.steps(3)
    for batch in (Batch({2: 80}, preempt=(0,)), Batch({2: 80})):
        with pytest.raises(IllegalBatch, match="blocks"):
            found.engine.submit(batch)


def test_what_a_batch_would_have_computed_is_not_found_when_it_does_not_run():
    # 1 has found the four blocks of 0, two of which a batch that is formed would compute: but 0 gets 15 tokens only
    rows = (0, "mn", 31, 9), (0, "abcd", 64, 2), (0, "abcduvwxy", 144, 1)
    found = run("vllm-v1", *rows, num_kv_blocks=10, max_num_batched_tokens=64)
    assert found.step() == {0: 31, 1: 33}
    assert found.decide() == {0: 1, 1: 31}
    found.engine.submit(Batch({1: 15}))
    found.engine.execute()
    check(found.engine.state)


def test_what_a_request_would_have_computed_is_not_found_when_it_does_not_enter():
    found = run("vllm-v1", (0, "abcd", 64, 2), (0, "abuvwxyzq", 144, 1), num_kv_blocks=10)
    assert found.decide() == {0: 64}
    found.engine.submit(Batch({0: 16}))
    found.engine.execute()
    check(found.engine.state)


def test_requests_that_enter_may_share_with_those_who_came():
    found = run("vllm-v1", (0, "abc", 40, 9))
    found.step()
    assert found.engine.enter(Request(48, 2, shares_with=0, shared_tokens=40)) == 1
    found.drain()
    assert cached(found)[1] == 32
    with pytest.raises(ConfigError, match=r"^shares_with: expected a request that has arrived or -1, got 7"):
        found.engine.enter(Request(48, 2, shares_with=7))
    with pytest.raises(ConfigError, match=r"^shared_tokens: expected 0 to 48, got 60"):
        found.engine.enter(Request(48, 2, shares_with=0, shared_tokens=60))


@pytest.mark.parametrize(
    ("parent", "message"),
    [
        ([-1, 5], "parent: request 1 has parent 5, which does not exist: there are 2 requests"),
        ([1, 0], "parent: request 0 is an ancestor of its own"),
        ([1, -1], "parent: request 0 comes before its parent, request 1"),
        ([-2, -1], "parent: expected a request or -1 for request 0, got -2"),
    ],
)
def test_parents_that_cannot_be_are_one_line(parent, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        shares_of_turns(np.array(parent), np.array([0, 7]), np.array([20, 57]), np.array([30, 2]))


def test_fewer_ids_than_a_prompt_needs_are_one_line():
    with pytest.raises(ConfigError, match=r"^ids: expected 3 for the 40 tokens of request 0 in blocks of 16, got 2$"):
        shares_of_ids([[1, 2]], np.array([40]), 16)
