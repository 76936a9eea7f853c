"""The pieces of the transformers engine by themselves: blocks, prompts, groups of decodes, split passes, weights."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

# ruff: noqa: E402 - a missing torch is to skip these tests before anything imports it
torch = pytest.importorskip("torch", reason="the real backend needs torch")
transformers = pytest.importorskip("transformers", reason="the real backend needs transformers")
from test_real_backend import WORLD

from llmsched_gym.config import blocks_needed
from llmsched_gym.real_backend import BackendError, make_backend
from llmsched_gym.real_backend.backend import split
from llmsched_gym.real_backend.block_table import BlockTable
from llmsched_gym.real_backend.runner import Work, group_decodes
from llmsched_gym.real_backend.tokens import TokenStore, prompt_ids
from llmsched_gym.real_backend.weights import RANDOM_MODELS

torch.set_num_threads(1)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 70)), max_size=60))
def test_blocks_are_never_lost(steps):
    """Grow (tokens > 0) or release requests at random: every block is free or held once, and all come back."""
    table = BlockTable(num_blocks=12, max_num_seqs=10, max_model_len=80)
    table.clear(10)
    length = {}
    for r, tokens in steps:
        if tokens == 0 and r in length:
            table.release(r)
            del length[r]
        elif tokens > 0:
            rows = table.occupy(np.array([r]))
            new = max(length.get(r, 0), tokens)
            if table.can_grow(rows, np.array([new])):
                table.grow(rows, np.array([new]))
                length[r] = new
            elif r not in length:
                table.release(r)
        table.check()
        assert table.num_free == 12 - sum(blocks_needed(n) for n in length.values())
        assert table.requests == sorted(length)
    table.keep_only(np.array([0, 1]))
    assert set(table.requests) <= {0, 1}
    table.keep_only(np.array([], int))
    table.check()
    assert table.num_free == 12


def test_prompts_come_from_seed_and_request():
    ids = prompt_ids(7, 3, 1000, 500)
    assert np.array_equal(ids, prompt_ids(7, 3, 1000, 500))
    assert np.array_equal(ids[:10], prompt_ids(7, 3, 10, 500)), "a prompt's start does not depend on its length"
    assert ids.min() >= 3 and ids.max() < 500 and len(np.unique(ids)) > 400
    for other in (prompt_ids(8, 3, 1000, 500), prompt_ids(7, 4, 1000, 500)):
        assert np.mean(ids == other) < 0.02
    assert prompt_ids(0, 0, 4, 1024).tolist() == prompt_ids(0, 0, 4, 1024).tolist()
    assert prompt_ids(2**40, 0, 5, 2).tolist() == [1] * 5, "a vocabulary of two has one id left"


def test_the_store_keeps_prompts_and_answers_apart():
    store = TokenStore(np.array([3, 2]), np.array([2, 1]), seed=0, vocab_size=50)
    both = np.array([0, 1])
    store.make_prompts(both)
    prompts = [store.prompt(r).tolist() for r in (0, 1)]
    store.append(both, np.array([11, 12]))
    assert store.is_complete(both).tolist() == [False, True]
    store.append(np.array([0]), np.array([13]))
    assert store.answer(0).tolist() == [11, 13] and store.answer(1).tolist() == [12]
    assert [store.prompt(r).tolist() for r in (0, 1)] == prompts
    assert store.read(np.array([0, 0, 1]), np.array([3, 4, 2])).tolist() == [11, 13, 12]


def test_decodes_are_grouped_by_length():
    assert group_decodes(np.array([], int)) == []
    assert group_decodes(np.array([1, 1, 2, 3, 4, 4, 9])) == [(0, 2), (2, 6), (6, 7)]
    for start, stop in group_decodes(np.arange(1, 500)):
        assert stop - start >= 1 and 2 * (start + 1) >= stop
        assert (stop - start) * stop * 16 <= 1 << 16 or stop - start == 1


def test_splitting_a_pass_keeps_all_its_work():
    request, emits = np.array([4, 7, 9]), np.array([False, True, True])
    work = Work(request, np.arange(3), np.array([50, 1, 30]), np.array([0, 5, 16]), emits)
    first, second = split(work)
    assert first.request.tolist() + second.request.tolist() == [4, 7, 9]
    a, b = split(work.take(slice(0, 1)))
    assert (a.num_tokens[0], a.num_computed[0], b.num_tokens[0], b.num_computed[0]) == (25, 0, 25, 25)
    a, b = split(work.take(slice(2, 3)))
    assert not a.emits[0] and b.emits[0] and b.num_computed[0] == 31


def test_random_models_have_the_shapes_they_are_named_for():
    config = transformers.AutoConfig.for_model(**RANDOM_MODELS["random:mistral-7b"])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(7.242e9, rel=1e-3)
    assert config.sliding_window is None and config.rope_parameters["rope_theta"] == 1e6


def test_random_weights_come_from_the_seed():
    weights = [make_backend(WORLD, "random:tiny", "cpu", seed=s).loaded.model.lm_head.weight for s in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:x"])
def test_an_unknown_device_is_one_clear_line(name):
    with pytest.raises(BackendError, match="device: expected cpu, cuda or cuda:INDEX") as error:
        make_backend(WORLD, "random:tiny", name)
    assert "\n" not in str(error.value)


def test_a_missing_gpu_is_one_clear_line():
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(BackendError, match="sees no GPU here"):
        make_backend(WORLD, "random:tiny", "cuda")


def test_the_package_imports_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from llmsched_gym import real_backend\n"
        "from llmsched_gym.config import scenario\n"
        "try:\n    real_backend.make_backend(scenario('paper'))\n"
        "except real_backend.BackendError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1 and "pip install '.[real]'" in done.stdout
