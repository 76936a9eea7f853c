"""SGLang: batches, orders, admission by memory and retraction, worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import TICK_S, Run, request, table

from llmsched_gym.baselines.sglang import DECAY_BATCHES, DECAYED, FIRST_RATIO, LEAST_RATIO, MOST_SORTED
from llmsched_gym.config import DeviceSpec
from llmsched_gym.cost import load_profile
from llmsched_gym.scheduler import PolicyError, make_scheduler
from llmsched_gym.workload import shares_of_ids


def run(policy, *rows, cached=True, **fields):
    """A run of requests given as (arrival, a letter for each block of 16 tokens, prompt, output, most output)."""
    given = table([request(arrival, prompt, output) for arrival, _, prompt, output, _ in rows])
    given = replace(given, max_output_tokens=np.array([most for *_, most in rows], np.int32))
    if cached:
        ids = [[ord(letter) for letter in word] for _, word, *_ in rows]
        shares_with, shared_tokens = shares_of_ids(ids, given.prompt_tokens, 16)
        given = replace(given, shares_with=shares_with, shared_tokens=shared_tokens)
    return Run(policy, given, prefix_caching=cached, **{"num_kv_blocks": 100, **fields})


def ratio(found):
    return FIRST_RATIO - found.engine.state.memory[0, DECAYED]


def test_prompts_go_before_decodes_and_never_beside_them():
    rows = [(0, "", 100, 4, 9), (0, "", 40, 2, 9), (0.05, "", 100, 2, 9)]
    assert run("sglang[chunk=64]", *rows, cached=False).drain() == [
        {0: 64},
        {0: 36, 1: 28},
        {1: 12, 2: 52},
        {2: 48},
        {0: 1, 1: 1, 2: 1},
        {0: 1},
        {0: 1},
    ]


def test_no_more_batches_of_prompts_in_a_row_than_it_is_told():
    rows = [(0, "", 16, 4, 9), (0.01, "", 200, 1, 9)]
    found = run("sglang[chunk=64,consecutive=2]", *rows, cached=False)
    assert found.step() == {0: 16}
    # the second prompt came during the first batch: one more of prompts, then decodes have their turn
    assert found.drain() == [{1: 64}, {0: 1}, {1: 64}, {1: 64}, {0: 1}, {1: 8}, {0: 1}]


def test_the_chunk_is_by_the_memory_of_the_device():
    of = DeviceSpec("any", 16e9, 1e12, 1e14)
    sizes = [replace(of, memory_bytes=gib * 2**30).sglang_chunk_tokens for gib in (16, 24, 48, 80, 141, 180)]
    assert sizes == [2048, 4096, 4096, 8192, 8192, 16_384]
    rows = [(0, "", 9000, 1, 1)]
    for name, chunk in (("rtx6000ada-mistral-7b", 4096), ("h100-mistral-7b", 8192)):
        found = run("sglang", *rows, cached=False, device=load_profile(name), num_kv_blocks=1000, max_model_len=10_000)
        assert found.step() == {0: chunk}


# --- orders: the first request fills the cache, the others come together and find one slot each

PREFIXES = [
    (0, "abcdefgh", 128, 1, 1),
    (9, "xyz", 48, 1, 1),  # 48 to compute, none cached
    (9, "abcdefxxxxxx", 192, 1, 1),  # 96 to compute, 96 cached
    (9, "abcvw", 80, 1, 1),  # 32 to compute, 48 cached
]


@pytest.mark.parametrize(
    ("order", "computed"),
    [
        ("fcfs", [{1: 48}, {2: 96}, {3: 32}]),
        ("lpm", [{2: 96}, {3: 32}, {1: 48}]),
        ("shortest-prefill-first", [{3: 32}, {1: 48}, {2: 96}]),
    ],
)
def test_orders(order, computed):
    found = run(f"sglang[order={order}]", *PREFIXES, max_num_seqs=1)
    assert found.drain()[-3:] == computed


def test_knobs_have_the_order_of_cached_prefixes_too():
    assert run("sarathi[order=lpm]", *PREFIXES, max_num_seqs=1).drain()[-3:] == [{2: 96}, {3: 32}, {1: 48}]
    assert run("sarathi[order=lpm]", *PREFIXES, max_num_seqs=1, cached=False).drain()[-3:] == [
        {1: 48},
        {2: 192},
        {3: 80},
    ]


def test_a_longer_prefix_does_not_stop_a_prompt_under_way():
    rows = [*PREFIXES[:2], (9.01, "abcdefgz", 128, 1, 1)]
    assert run("sarathi[order=lpm,budget=16]", *rows).drain()[-4:] == [{1: 16}, {1: 16}, {1: 16}, {2: 16}]


def test_response_ratios():
    # served one at a time; what the second computes has been waited for by all that came before it
    rows = [
        (0, "", 64, 1, 1),
        (0, "", 640, 1, 1),  # waited 64 tokens by the second batch: ratio 0.1
        (0.01, "", 32, 1, 1),  # came during the first: its tokens are counted before anybody sees it, 0
        (0.04, "", 16, 1, 1),  # during the second batch, 640 tokens
    ]
    found = run("sglang[order=hrrn]", *rows, cached=False, max_num_seqs=1)
    # after 704: 32 has waited 640 (20), 16 nothing
    assert found.drain() == [{0: 64}, {1: 640}, {2: 32}, {3: 16}]
    rows = [(0, "", 64, 1, 1), (0, "", 640, 1, 1), (0, "", 32, 1, 1)]
    found = run("sglang[order=hrrn]", *rows, cached=False, max_num_seqs=1)
    assert found.drain() == [{0: 64}, {2: 32}, {1: 640}]  # 64 / 32 > 64 / 640


@pytest.mark.parametrize("order", ["lpm", "hrrn", "shortest-prefill-first"])
@pytest.mark.parametrize("waiting", [MOST_SORTED, MOST_SORTED + 1])
def test_a_long_line_is_first_come_first_served(order, waiting):
    words = ["".join(chr(200 + 4 * i + j) for j in range(4)) for i in range(waiting)]  # nobody has seen these
    rows = [PREFIXES[0], *[(9, word, 64, 1, 1) for word in words], (9, "abcdefgi", 128, 1, 1)]
    found = run(f"sglang[order={order}]", *rows[: waiting + (order == "hrrn")], rows[-1], max_num_seqs=1)
    found.step()
    while found.sim.num_waiting == 0:
        found.step()
    if order == "hrrn":  # nothing has been processed since they came: by arrival
        assert found.step() == {1: 64}
    assert found.sim.num_waiting == waiting
    # of the last one all but a block is cached
    last = len(found.table) - 1
    in_order = waiting <= MOST_SORTED or order == "shortest-prefill-first"
    assert found.step() == ({last: 16} if in_order else {last - waiting + 1: 64})


def test_shorter_prompts_take_from_the_chunk_of_a_longer_one():
    rows = [(0, "", 300, 1, 1), (0.01, "", 20, 1, 1), (0.01, "", 30, 1, 1)]
    found = run("sglang[order=shortest-prefill-first,chunk=64]", *rows, cached=False)
    # a block's worth of the 64 stays with the prompt under way: 20 of 48 fit, and then not 30 of 28
    assert found.steps(3) == [{0: 64}, {1: 20, 0: 44}, {2: 30, 0: 34}]
    assert run("sglang[chunk=64]", *rows, cached=False).steps(3) == [{0: 64}, {0: 64}, {0: 64}]


# --- memory


def test_admission_reserves_a_share_of_what_may_come():
    # 20 blocks, 320 tokens: 0 takes 4 blocks and may emit 200, of which 0.7 are reserved
    rows = [(0, "", 64, 3, 200), (0.01, "", 16, 1, 80), (0.01, "", 16, 1, 1)]
    found = run("sglang", *rows, cached=False, num_kv_blocks=20)
    assert found.step() == {0: 64}
    # 16 + 80 + 16 < 256 - 0.7 * 199 = 116.7: it fits; with 85 tokens it would not
    assert found.step() == {1: 16}
    rows[1] = (0.01, "", 16, 1, 85)
    found = run("sglang", *rows, cached=False, num_kv_blocks=20)
    assert found.drain() == [{0: 64}, {0: 1}, {0: 1}, {1: 16, 2: 16}]  # nobody overtakes who does not fit


def test_who_did_not_fit_is_not_asked_until_somebody_leaves():
    # 1,600 tokens less 64 and 0.7 x 1,999 leave 136.7, and 16 + 120 and a block's are wanted
    rows = [(0, "", 64, 60, 2000), (0.01, "", 16, 1, 120)]
    found = run("sglang", *rows, cached=False)
    assert found.steps(50) == [{0: 64}, *[{0: 1}] * 49]
    left = 16 * found.sim.free_blocks - ratio(found) * 1950
    assert left > 16 + 120 + 16  # by now it would fit
    assert found.drain() == [*[{0: 1}] * 10, {1: 16}]


def test_the_share_decays_with_decodes_and_is_whole_again_after_idling():
    found = run("sglang", (0, "", 16, 700, 700), (999, "", 16, 3, 3), cached=False)
    found.step()
    assert ratio(found) == pytest.approx(0.7)
    found.steps(300)
    assert ratio(found) == pytest.approx(0.7 - 300 * (0.7 - LEAST_RATIO) / DECAY_BATCHES)
    found.steps(320)
    assert ratio(found) == pytest.approx(0.7 * 0.14)
    while found.sim.num_finished == 0:
        found.step()
    while found.sim.num_running == 0:
        found.step()
    assert ratio(found) == pytest.approx(0.7)


def test_retraction_takes_the_longest_prompt_of_equal_outputs_to_the_end_of_the_line():
    # limits of one token are not kept, so that memory is short: 6 blocks, of which 3 are taken at first
    rows = [(0, "", 32, 20, 1), (0, "", 16, 20, 1), (0.01, "", 16, 1, 1)]
    found = run("sglang", *rows, cached=False, num_kv_blocks=6, max_num_seqs=2)
    assert found.step() == {0: 32, 1: 16}
    assert found.steps(16) == [{0: 1, 1: 1}] * 16
    assert found.sim.free_blocks == 1  # each took one for its next 16 tokens; now both need another
    assert found.step() == {1: 1}
    assert found.requests["num_preemptions"].tolist() == [1, 0, 0]
    assert ratio(found) == 1.0  # (17 + 20) / (1 + 1) and more
    assert found.step() == {2: 16}  # which came before 0 joined the line again
    assert found.drain()[-1] == {0: 1}
    assert found.sim.num_finished == 3


def test_retraction_takes_the_fewest_outputs_first():
    # the second comes when the first has 17 tokens; 16 batches of decodes later both need a block, and one is free
    rows = [(0, "", 32, 60, 1), (16.5 * TICK_S, "", 16, 20, 1)]
    found = run("sglang", *rows, cached=False, num_kv_blocks=7)
    assert found.steps(17) == [{0: 32}, *[{0: 1}] * 16]
    assert found.step() == {1: 16}
    assert found.steps(16) == [{0: 1, 1: 1}] * 16
    assert found.step() == {0: 1}
    assert found.requests["num_preemptions"].tolist() == [0, 1]
    found.drain()
    assert found.sim.num_finished == 2


def test_its_options():
    scheduler = make_scheduler("sglang[order=lpm,chunk=512,consecutive=3]")
    assert (int(scheduler.knobs["order"]), int(scheduler.knobs["token_budget"])) == (1, 512)
    assert scheduler.settings["consecutive"] == 3
    with pytest.raises(PolicyError, match="order: expected one of fcfs, lpm, hrrn, shortest-prefill-first, got 'spf'"):
        make_scheduler("sglang[order=spf]")
    with pytest.raises(PolicyError, match="consecutive: expected whole number of batches, 0 for no limit, got '-1'"):
        make_scheduler("sglang[consecutive=-1]")
    with pytest.raises(PolicyError, match="unknown parameter 'consecutive'"):
        make_scheduler("sarathi[consecutive=1]")
