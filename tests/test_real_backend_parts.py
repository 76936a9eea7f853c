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
from llmsched_gym.real_backend.block_table import BlockTable, PlacedBlocks
from llmsched_gym.real_backend.layout import Layout, Work
from llmsched_gym.real_backend.tokens import TokenStore, prompt_ids
from llmsched_gym.real_backend.weights import RANDOM_MODELS

torch.set_num_threads(1)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 70)), max_size=60))
def test_blocks_are_never_lost(steps):
    """Grow (tokens > 0) or release requests at random: every block is free or held once, and all come back."""
    table = BlockTable(num_blocks=12, max_num_seqs=9, max_model_len=80)
    table.clear(10)
    length = {}
    for r, tokens in steps:
        if tokens == 0:
            table.release(np.array([r]))
            length.pop(r, None)
            continue
        more, computed = min(tokens, 80 - length.get(r, 0)), length.get(r, 0)
        if blocks_needed(computed + more) - blocks_needed(computed) > table.num_free:
            with pytest.raises(BackendError, match="the cache has 12 blocks"):
                table.take(*np.array([[r], [more], [computed]]))
        elif r not in length and len(length) == 9:
            with pytest.raises(BackendError, match="at most 9 running requests"):
                table.take(*np.array([[r], [more], [computed]]))
        else:
            items = table.take(*np.array([[r], [more], [computed]]))
            assert items[:, 0].tolist() == [r, table.row_of[r], more, computed]
            length[r] = computed + more
        table.check()
        assert table.num_free == 12 - sum(blocks_needed(n) for n in length.values())
        assert table.requests == sorted(length)
    table.keep_only(np.array([0, 1]))
    table.check()
    assert set(table.requests) == {0, 1} & set(length)
    table.keep_only(np.array([], int))
    table.check()
    assert table.num_free == 12


def test_what_the_table_cannot_do_is_one_line_and_takes_nothing():
    table = BlockTable(num_blocks=12, max_num_seqs=2, max_model_len=80)
    table.clear(4)
    table.take(*np.array([[0, 1], [30, 5], [0, 0]]))
    for items, words in (
        ([[0, 1], [1, 1], [30, 4]], "request 1: 4 tokens count as computed, the cache holds 5"),
        ([[2], [1], [3]], "request 2: 3 tokens count as computed, the cache holds 0"),
        ([[0], [60], [30]], "request 0: 90 tokens, the cache's rows have room for 80"),
        ([[4], [1], [0]], "request 4: expected 0 to 3"),
        ([[2], [1], [0]], "request 2: expected at most 2 running requests"),
    ):
        with pytest.raises(BackendError, match=words):
            table.take(*np.array(items))
        table.check()
        assert table.num_free == 9 and table.requests == [0, 1]
    table.take(*np.array([[0], [1], [0]]))  # starts over
    table.check()
    assert table.num_free == 10


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
    assert store.append(both, np.array([11, 12]))[1] == 1
    assert store.is_complete(both).tolist() == [False, True]
    store.append(np.array([0]), np.array([13]))
    assert store.answer(0).tolist() == [11, 13] and store.answer(1).tolist() == [12]
    assert [store.prompt(r).tolist() for r in (0, 1)] == prompts
    assert store.read(np.array([0, 0, 1]), np.array([3, 4, 2])).tolist() == [11, 13, 12]
    with pytest.raises(BackendError, match="request 1: a token behind the 3 that it is to have"):
        store.append(np.array([1]), np.array([14]))


def laid_out(num_tokens, num_computed, emits=None, layout=None):
    """A batch of requests 0, 1, ... whose i-th block is 100 r + i + 1 and whose token at a position is the position."""
    num_tokens, num_computed = np.array(num_tokens), np.array(num_computed)
    n, total = len(num_tokens), num_tokens + num_computed
    blocks = 100 * np.arange(n)[:, None] + np.arange(1, blocks_needed(int(total.max())) + 1)
    store = TokenStore(total, np.ones(n, np.int64), 0, 50)
    for r in range(n):
        store.ids[store.start[r] : store.start[r + 1]] = np.arange(total[r] + 1)
    emits = np.ones(n, bool) if emits is None else np.array(emits)
    work = Work(np.arange(n), np.arange(n), num_tokens, num_computed, emits)
    return (layout or Layout(torch.device("cpu"))).fill(work, PlacedBlocks(blocks), store, portable=True)


def test_a_batch_is_laid_out_by_hand():
    """A chunk of 3 tokens behind 15, and decodes behind 20 and 3 tokens, the longer of which wants no token."""
    laid = laid_out([3, 1, 1], [15, 20, 3], [True, False, True])
    assert laid.order.tolist() == [2, 1, 0] and laid.emitting.tolist() == [2, 0]
    assert laid.ids.tolist() == laid.positions.tolist() == [[3, 20, 15, 16, 17]]
    assert laid.slots.tolist() == [16 * 201 + 3, 16 * 102 + 4, 16 * 1 + 15, 16 * 2, 16 * 2 + 1]
    assert laid.wanted.tolist() == [0, 4]
    (group,) = laid.decodes
    assert (group.start, group.stop, group.lengths.tolist()) == (0, 2, [4, 21])
    assert group.blocks.tolist() == [[201, 202], [101, 102]]
    (chunk,) = laid.chunks
    assert (chunk.start, chunk.stop, chunk.computed, chunk.blocks.tolist()) == (2, 5, 15, [[1, 2]])


def test_a_layout_that_has_seen_other_batches_lays_out_as_a_new_one():
    """Batches of one shape share views, others get their own; a batch that is too large for the array makes it grow."""
    layout, rng = Layout(torch.device("cpu")), np.random.default_rng(0)
    kept = 0
    for _ in range(60):
        n = int(rng.integers(1, 5))
        num_tokens = np.where(rng.random(n) < 0.7, 1, rng.integers(1, 40, n)) * (100 if rng.random() < 0.1 else 1)
        batch = num_tokens, rng.integers(0, 40, n), rng.random(n) < 0.8
        for _ in range(2):
            views = layout._views
            old, new = laid_out(*batch, layout=layout), laid_out(*batch)
            kept += layout._views is views
            for a, b in zip(old[:4], new[:4], strict=True):
                assert torch.equal(a, b)
            for a, b in zip(old.decodes + old.chunks, new.decodes + new.chunks, strict=True):
                assert (a.start, a.stop) == (b.start, b.stop) and torch.equal(a.blocks, b.blocks)
            assert all(torch.equal(a.lengths, b.lengths) for a, b in zip(old.decodes, new.decodes, strict=True))
            assert [chunk.computed for chunk in old.chunks] == [chunk.computed for chunk in new.chunks]
            assert np.array_equal(old.emitting, new.emitting) and np.array_equal(old.order, new.order)
    assert 60 <= kept < 90 and len(layout._host) > 1 << 12


def test_decodes_are_grouped_by_length():
    def groups(num_blocks):
        laid = laid_out(np.ones_like(num_blocks), 16 * num_blocks - 1)
        return sorted((group.start, group.stop) for group in laid.decodes)

    assert groups(np.array([1, 9, 2, 4, 3, 1, 4])) == [(0, 2), (2, 6), (6, 7)]
    found = groups(np.arange(1, 500))
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])] and found[-1][1] == 499
    for start, stop in found:
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
