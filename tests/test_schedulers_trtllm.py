"""TensorRT-LLM: batches, orders and admission worked out by hand, and that nobody is ever preempted."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import Run, request, table
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schedulers_sglang import PREFIXES, run

from llmsched_gym.scheduler import PolicyError, make_scheduler
from llmsched_gym.workload import shares_of_ids


def test_all_decodes_then_chunks_that_end_with_a_block():
    rows = [(0, "", 100, 3, 9), (0, "", 40, 2, 9), (0.05, "", 100, 2, 9)]
    assert run("trtllm[budget=64]", *rows, cached=False).drain() == [
        {0: 64},
        {0: 36, 1: 16},  # of 28 tokens left a block's
        {0: 1, 1: 24, 2: 32},
        {0: 1, 1: 1, 2: 48},
        {2: 20},
        {2: 1},
    ]


def test_who_enters_can_be_served_to_the_end():
    # 10 blocks: 0 may come to need 2 + 3, 1 then 1 + 5, which is one too many, and nobody overtakes it
    rows = [(0, "", 32, 5, 48), (0, "", 16, 2, 80), (0, "", 16, 2, 16)]
    found = run("trtllm", *rows, cached=False, num_kv_blocks=10)
    assert found.drain() == [{0: 32}, *[{0: 1}] * 4, {1: 16, 2: 16}, {1: 1, 2: 1}]
    rows[1] = (0, "", 16, 2, 64)
    assert run("trtllm", *rows, cached=False, num_kv_blocks=10).step() == {0: 32, 1: 16}


def test_blocks_that_others_use_cost_nothing_and_cached_ones_their_place():
    # 8 blocks: 0 holds 4 and may need 1 more; 1 shares 3 of them, computes one and may need 1 more
    rows = [(0, "abcd", 64, 9, 16), (0.01, "abcx", 64, 2, 16), (0.01, "uvw", 33, 1, 1)]
    found = run("trtllm", *rows, num_kv_blocks=8)
    assert found.steps(2) == [{0: 64}, {0: 1, 1: 16}]
    assert found.sim.free_blocks == 8 - 4 - 1 - 1  # the decode's, and the new prompt's own
    rows[1] = (0.01, "abcx", 64, 2, 64)  # may need 3 more than before
    assert run("trtllm", *rows, num_kv_blocks=8).steps(2) == [{0: 64}, {0: 1}]


def test_orders():
    found = run("trtllm[order=shortest-uncached-first]", *PREFIXES, max_num_seqs=1)
    assert found.drain()[-3:] == [{3: 32}, {1: 48}, {2: 96}]
    assert run("trtllm", *PREFIXES, max_num_seqs=1).drain()[-3:] == [{1: 48}, {2: 96}, {3: 32}]


@pytest.mark.parametrize(("starvation", "place"), [(0, 7), (5, 5), (2, 2)])
def test_after_so_many_batches_the_oldest_goes_first(starvation, place):
    rows = [(0, "", 90, 1, 1)] + [(0, "", 10 + i, 1, 1) for i in range(7)]
    spec = f"trtllm[order=shortest-uncached-first,starvation={starvation}]"
    batches = run(spec, *rows, cached=False, max_num_seqs=1).drain()
    assert [next(iter(batch)) for batch in batches].index(0) == place
    # from then on all have waited as long, and the line is by arrival
    assert [next(iter(batch)) for batch in batches] == [*range(1, place + 1), 0, *range(place + 1, 8)]


WORDS = st.text("ab", min_size=1, max_size=8)
ROWS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.0, 0.03, 0.3]), WORDS, st.integers(1, 16), st.integers(1, 40), st.integers(0, 60)
    ),
    min_size=1,
    max_size=14,
)


@pytest.mark.parametrize("cached", [False, True])
def test_nobody_is_ever_preempted(cached):
    most = [0]

    @settings(max_examples=60)
    @given(
        drawn=ROWS,
        num_kv_blocks=st.integers(8, 40),
        seqs=st.sampled_from([1, 3, 16]),
        options=st.fixed_dictionaries(
            {},
            optional={
                "order": st.sampled_from(["fcfs", "shortest-uncached-first"]),
                "starvation": st.sampled_from(["1", "9"]),
                "budget": st.sampled_from(["1", "20", "100"]),
                "admission": st.sampled_from(["prompt", "chunk", "prompt-check"]),
                "hold": st.just("true"),
            },
        ),
        told=st.booleans(),
    )
    def holds(drawn, num_kv_blocks, seqs, options, told):
        times = np.cumsum([gap for gap, *_ in drawn])
        prompts = [16 * (len(word) - 1) + last for _, word, last, *_ in drawn]
        rows = zip(times, prompts, drawn, strict=True)
        given_table = table([request(float(t), n, output, ttft=0.5) for t, n, (*_, output, _) in rows])
        if told:  # else a request may fill the context
            limits = np.array([output + spare for *_, output, spare in drawn], np.int32)
            given_table = replace(given_table, max_output_tokens=limits)
        if cached:
            words = [[ord(letter) for letter in word] for _, word, *_ in drawn]
            shares_with, shared_tokens = shares_of_ids(words, given_table.prompt_tokens, 16)
            given_table = replace(given_table, shares_with=shares_with, shared_tokens=shared_tokens)
        text = ",".join(f"{key}={value}" for key, value in options.items())
        world = {"num_kv_blocks": num_kv_blocks, "max_num_seqs": seqs, "max_model_len": 300, "prefix_caching": cached}
        found = Run(f"trtllm[{text}]", given_table, **world)
        waited = 0
        while not found.engine.is_over():
            found.step()
            waited = max(waited, int(found.sim.num_waiting > 0 < found.sim.num_running))
        most[0] += waited
        assert found.sim.num_preemptions == 0
        assert found.sim.num_finished + found.episode.num_rejected == len(drawn)

    holds()
    assert most[0] > 5, "nobody had to wait beside somebody"


def test_its_options():
    scheduler = make_scheduler("trtllm[order=shortest-uncached-first,starvation=7]")
    assert (int(scheduler.knobs["order"]), scheduler.settings["starvation"]) == (1, 7)
    with pytest.raises(PolicyError, match="order: expected one of fcfs, shortest-uncached-first, got 'lpm'"):
        make_scheduler("trtllm[order=lpm]")
    with pytest.raises(PolicyError, match="starvation: expected whole number of batches, 0 for none, got 'no'"):
        make_scheduler("trtllm[starvation=no]")
