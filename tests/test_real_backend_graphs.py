"""Batches at fixed shapes: which shape, what the padding holds, and that it changes nothing."""

import numpy as np
import pytest

# ruff: noqa: E402 - a missing torch is to skip these tests before anything imports it
torch = pytest.importorskip("torch", reason="the real backend needs torch")
pytest.importorskip("transformers", reason="the real backend needs transformers")
from test_real_backend import WORLD, generated, random_table, run_chaos, tiny_model

from llmsched_gym.real_backend import BackendError, make_backend
from llmsched_gym.real_backend.attention import NAME, KVCache, choose_attention
from llmsched_gym.real_backend.graphs import Shape, StaticBatches, decode_sizes, padded_size
from llmsched_gym.real_backend.layout import Work
from llmsched_gym.real_backend.runner import Runner
from llmsched_gym.real_backend.weights import LoadedModel, model_spec

torch.set_num_threads(1)
CPU = torch.device("cpu")


def test_sizes_by_hand():
    assert decode_sizes(1) == [1] and decode_sizes(8) == [1, 2, 4, 8] and decode_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert decode_sizes(256)[-2:] == [192, 256] and decode_sizes(1000)[-1] == 256
    sizes = decode_sizes(20)
    assert [padded_size(n, sizes) for n in (1, 3, 9, 17, 20, 21)] == [1, 4, 16, 20, 20, None]


def prefilled(graphs, lengths=(40, 17, 33)):
    """A backend that holds the KV of sequences, and the batch that decodes one token of each."""
    backend = make_backend(WORLD, tiny_model(), "cpu", graphs=graphs)
    n = len(lengths)
    table = random_table(n)
    table.prompt_tokens[:] = lengths
    backend.reset(table)
    request, computed = np.arange(n), np.array(lengths)
    prompts = backend._take_blocks(request, computed, np.zeros(n, np.int32), np.ones(n, bool))
    backend.tokens.make_prompts(request)
    backend._book(*backend._run(prompts, backend.blocks))
    return backend, backend._take_blocks(request, np.ones(n, np.int64), computed, np.ones(n, bool))


def test_padding_goes_to_the_scratch_block_and_changes_nothing():
    backend, work = prefilled(graphs=True)
    static, cache = backend.runner.static, backend.runner.cache
    before = [part.clone() for part in cache.keys]
    emitting, best, ids = static.run(Shape(3, 3, 0, 3), work, backend.blocks, backend.tokens)
    assert emitting.tolist() == work.request.tolist() and list(static.decode_shapes) == [1, 2, 4, 8]
    for poison in (0.0, 7.0):  # what the scratch block holds must not matter
        for part in (*cache.keys, *cache.values):
            part[0] = poison
        for size in (4, 8):
            shape = Shape(size, size, 0, size)
            _, padded_best, padded_ids = static.run(shape, work, backend.blocks, backend.tokens)
            np.testing.assert_allclose(padded_best, best, rtol=1e-5)
            assert padded_ids.tolist() == ids.tolist()
    held = sorted({int(b) for row in work.row for b in backend.blocks.blocks[row]} - {0})
    free = [b for b in range(1, backend.num_kv_blocks + 1) if b not in held]
    for part, old in zip(cache.keys, before, strict=True):
        assert torch.equal(part[free], old[free]), "padding wrote to a block that is not scratch"
        new = [(int(r), int(c)) for r, c in zip(work.row, work.num_computed, strict=True)]
        slots = [backend.blocks.blocks[r, c // 16] * 16 + c % 16 for r, c in new]
        changed = (part != old).flatten(2).any(-1).flatten().nonzero().flatten().tolist()
        assert set(changed) - set(range(16)) == set(slots), "one new token of each sequence is written"


def test_static_shapes_give_what_the_eager_path_gives():
    steps = []
    for graphs in (True, False):
        backend, work = prefilled(graphs)
        assert (backend.runner.static is not None) == graphs
        emitting, ids = backend.runner.step(work, backend.blocks, backend.tokens)
        steps.append(dict(zip(emitting.tolist(), ids.tolist(), strict=True)))
    assert steps[0] == steps[1] and len(steps[0]) == 3


def work_of(*num_tokens):
    n = np.array(num_tokens)
    return Work(np.arange(len(n)), np.arange(len(n)), n, n, n > 0)


def test_without_the_kernel_only_batches_of_single_tokens_have_a_shape():
    static = make_backend(WORLD, tiny_model(), "cpu", graphs=True).runner.static
    assert static.shape_of(work_of(1)).tokens == 1 and static.shape_of(work_of(*[1] * 7)).tokens == 8
    assert static.shape_of(work_of(1, 2)) is None and static.shape_of(work_of(*[1] * 9)) is None


@pytest.mark.parametrize("name", ["mistral", "mistral, window"])
def test_tokens_with_static_shapes_equal_generate(name):
    backend = make_backend(WORLD, tiny_model(name), "cpu", graphs=True)
    runs = []
    run = backend.runner.static.run
    backend.runner.static.run = lambda *args: runs.append(len(args[1].request)) or run(*args)
    table = random_table(10)
    run_chaos(backend, table, seed=5, admission="prompt")
    # which batches form depends on how fast this machine is
    assert len(runs) > 5 and max(runs) > 1
    alone = tiny_model(name)
    for r in range(len(table)):
        answer = backend.tokens.answer(r).tolist()
        assert answer == generated(alone, backend.tokens.prompt(r), int(table.output_tokens[r]))


def test_the_attention_is_chosen_by_device():
    assert choose_attention("auto", CPU, 64) == "sdpa" and choose_attention("sdpa", CPU, 64) == "sdpa"
    with pytest.raises(BackendError, match="attention: expected one of auto, sdpa, triton, got 'flash'"):
        choose_attention("flash", CPU, 64)


@pytest.mark.parametrize(("installed", "reason"), [(False, "not installed"), (True, "needs a GPU")])
def test_triton_where_it_cannot_run_is_one_clear_line(installed, reason, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    with pytest.raises(BackendError, match=reason) as error:
        choose_attention("triton", CPU, 64)
    assert "\n" not in str(error.value)


def test_a_plain_backend_on_a_cpu_has_neither():
    backend = make_backend(WORLD, tiny_model(), "cpu")
    assert backend.attention == "sdpa" and backend.runner.static is None
    assert "graphs" not in backend.setup and "attention" not in backend.setup


def test_a_kernel_that_does_not_compile_is_done_without(monkeypatch):
    def no_compiler(*_):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr("llmsched_gym.real_backend.backend.choose_attention", lambda *_: "triton")
    monkeypatch.setattr("llmsched_gym.real_backend.runner.Runner._paged", no_compiler)
    with pytest.warns(UserWarning, match="no C compiler"):
        backend = make_backend(WORLD, tiny_model(), "cpu")
    assert backend.attention == backend.runner.attention == "sdpa"


def test_nothing_in_a_pass_of_decodes_waits_for_the_device():
    """On the meta device every look at a value raises, as it would while a graph is recorded."""
    meta = torch.device("meta")
    model = tiny_model().to(meta)
    model.set_attn_implementation(NAME)
    spec = model_spec("meta", model.config, torch.float32)
    cache = KVCache(spec.num_layers, 4, spec.num_kv_heads, spec.head_dim, torch.float32, meta)
    runner = Runner(LoadedModel("meta", model, spec, torch.float32, meta), cache)
    with torch.inference_mode():
        best, ids = StaticBatches(runner, 8, 64, blocks_per_seq=4)._forward(Shape(8, 8, 0, 8))
    assert best.shape == ids.shape == (8,) and best.device == meta and cache.num_writes == spec.num_layers
