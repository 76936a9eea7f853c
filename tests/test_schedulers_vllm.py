"""vLLM V1: small instances by hand. `benchmarks/conformance_vllm.py` compares it with vLLM's own scheduler."""

import pytest
from helpers import TICK_S, Durations, Run, profile, request

from llmsched_gym.config import DeviceSpec
from llmsched_gym.cost import DEVICES, load_profile, roofline
from llmsched_gym.engine.records import WAITING


def test_v1_gives_each_running_request_its_turn_and_then_admits():
    rows = [request(prompt=3000, output=3), request(prompt=100, output=2), request(0.01, prompt=2048, output=1)]
    assert Run("vllm-v1", rows).drain() == [
        {0: 2048},
        {0: 952, 1: 100, 2: 996},
        {0: 1, 1: 1, 2: 1052},
        {0: 1},
    ]


def test_v1_takes_blocks_chunk_by_chunk():
    run = Run("vllm-v1[budget=40]", [request(prompt=100, output=2)])
    held = []
    for _ in range(3):
        run.step()
        held.append(int(run.requests[0].num_blocks))
    assert held == [3, 5, 7]
    assert run.scenario.admission == "prompt-check"


def test_v1_admits_down_to_the_last_block():
    rows = [request(prompt=48, output=1), request(prompt=16, output=1)]
    assert Run("vllm-v1", rows, num_kv_blocks=4).drain() == [{0: 48, 1: 16}]
    # with whole prompts and a watermark of one block the second has to wait
    rows = [request(prompt=16, output=1)] * 3
    assert Run("sarathi", rows, num_kv_blocks=4, watermark=0.5).drain() == [{0: 16, 1: 16}, {2: 16}]
    assert Run("sarathi[admission=chunk]", rows, num_kv_blocks=4, watermark=0.5).drain() == [{0: 16, 1: 16, 2: 16}]


def test_v1_preempts_the_last_admitted_and_admits_nobody_then():
    # two blocks each, one is free; both need their third in the same batch, and request 2 has just come
    rows = [request(prompt=16, output=19), request(prompt=16, output=19), request(0.51, prompt=5, output=1)]
    run = Run("vllm-v1", rows, num_kv_blocks=5)
    assert run.steps(17)[-1] == {0: 1, 1: 1}
    assert (run.sim.free_blocks, run.requests[2].phase) == (1, WAITING)
    assert run.step() == {0: 1}  # request 1 gave itself up, and request 2 was not let in
    row = run.requests[1]
    assert (row.phase, row.prefill_tokens, row.num_preemptions) == (WAITING, 33, 1)
    # request 1 wants three blocks, and nobody overtakes it until request 0 has finished
    assert run.drain()[:2] == [{0: 1}, {1: 33, 2: 5}]


def test_v1_spends_its_budget_by_admission_not_by_phase():
    rows = [request(prompt=60, output=9), request(prompt=60, output=9)]
    run = Run("vllm-v1[budget=64]", rows, backend=Durations(0.5))
    assert run.steps(4) == [{0: 60, 1: 4}, {0: 1, 1: 56}, {0: 1, 1: 1}, {0: 1, 1: 1}]


# --- admission: all known tokens must fit now (vLLM since 0.19), or the first chunk (up to 0.18)

SMALLEST = [request(prompt=128, output=20), request(4 * TICK_S, prompt=200, output=2)]
"""20 blocks, 64 tokens a batch: 0 decodes with 9 blocks held, 11 are free, and the 200 tokens of 1 need 13."""


def test_a_prompt_that_does_not_fit_waits_for_its_blocks():
    run = Run("vllm-v1[budget=64]", SMALLEST, num_kv_blocks=20)
    assert run.steps(2) == [{0: 64}, {0: 64}]
    assert run.steps(19) == [{0: 1}] * 19
    assert run.sim.num_preemptions == 0
    assert run.drain() == [{1: 64}, {1: 64}, {1: 64}, {1: 8}, {1: 1}]


def test_by_chunk_it_enters_to_be_thrown_out_again():
    run = Run("vllm-v1[budget=64,reserve=false]", SMALLEST, num_kv_blocks=20)
    assert run.scenario.admission == "chunk"
    assert run.steps(4) == [{0: 64}, {0: 64}, {0: 1}, {0: 1}]
    for _ in range(3):  # the third chunk needs 12 blocks
        assert run.steps(3) == [{0: 1, 1: 63}, {0: 1, 1: 63}, {0: 1}]
    assert run.requests[1].num_preemptions == 3


def test_nothing_is_reserved_for_a_prompt_that_has_entered():
    # 1 enters as its 4 blocks are free; the decode beside it takes one of them, and its last chunk finds none
    rows = [request(prompt=47, output=30), request(TICK_S, prompt=64, output=1)]
    run = Run("vllm-v1[budget=17]", rows, num_kv_blocks=7)
    assert run.steps(4) == [{0: 17}, {0: 17}, {0: 13, 1: 4}, {0: 1, 1: 16}]
    assert run.sim.free_blocks == 2
    assert run.steps(3) == [{0: 1, 1: 16}, {0: 1}, {0: 1}]
    assert run.requests[1].num_preemptions == 1


def test_a_preempted_request_waits_for_the_blocks_of_prompt_and_output():
    rows = [request(prompt=16, output=40), request(prompt=16, output=40)]
    run = Run("vllm-v1", rows, num_kv_blocks=5)
    batches = run.drain()
    assert batches[17] == {0: 1}  # both want a third block, one is free
    assert [i for i, batch in enumerate(batches) if batch.get(1, 0) > 1][1:] == [40]
    assert batches[40] == {1: 33}, "16 and 17 emitted: when the other has finished"


# --- long_prefill_token_threshold


def test_a_chunk_stays_below_the_threshold():
    rows = [request(prompt=250, output=1) for _ in range(3)]
    run = Run("vllm-v1[budget=100,threshold=40]", rows)
    assert run.step() == {0: 40, 1: 40, 2: 20}
    assert run.steps(2) == [{0: 40, 1: 40, 2: 20}] * 2


def test_the_threshold_is_off_while_a_request_is_alone():
    rows = [request(prompt=250, output=1), request(1.5 * TICK_S, prompt=50, output=2)]
    # it is back as soon as another one waits, and it holds for resumed and new ones alike
    assert Run("vllm-v1[budget=100,threshold=40]", rows).drain() == [
        {0: 100},
        {0: 100},
        {0: 40, 1: 40},
        {0: 10, 1: 10},
        {1: 1},
    ]
    assert Run("vllm-v1[budget=100]", rows).drain()[2] == {0: 50, 1: 50}


# --- the device


@pytest.mark.parametrize(
    ("device", "budget", "seqs"),
    [
        (DEVICES["rtx6000ada"], 2048, 128),
        (DEVICES["a100-80gb"], 2048, 128),
        (DEVICES["h100-sxm"], 8192, 1024),
        (DeviceSpec("NVIDIA H200", 141e9, 4800e9, 989e12), 8192, 1024),
        (DeviceSpec("NVIDIA A100-SXM4-80GB", 85e9, 2039e9, 312e12), 2048, 128),
        (DeviceSpec("b200", 192e9, 8000e9, 2250e12), 16_384, 1024),
    ],
    ids=lambda value: value.name if isinstance(value, DeviceSpec) else str(value),
)
def test_budget_and_sequences_by_gpu(device, budget, seqs):
    own = roofline("mistral-7b", device)
    run = Run("vllm-v1", [request()], device=own)
    assert (run.engine.state.knobs[0].token_budget, run.sim.max_num_seqs) == (budget, seqs)
    assert Run("sarathi", [request()], device=own).sim.max_num_seqs == seqs, "a limit of the engine, not of a policy"
    run = Run("vllm-v1[budget=100]", [request()], device=own, max_num_seqs=7)
    assert (run.engine.state.knobs[0].token_budget, run.sim.max_num_seqs) == (100, 7)


def test_the_budget_is_of_the_profile_that_the_scheduler_has():
    run = Run("vllm-v1", [request()], device=load_profile("h100-mistral-7b"), own_profile=profile())
    assert (run.engine.state.knobs[0].token_budget, run.sim.max_num_seqs) == (2048, 1024)
