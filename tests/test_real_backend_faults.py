"""What can go wrong with a real model: memory, nan, checkpoints. Nothing is lost, and the message is one clear line."""

import json
import warnings

import numpy as np
import pytest

# ruff: noqa: E402 - a missing torch is to skip these tests before anything imports it
torch = pytest.importorskip("torch", reason="the real backend needs torch")
transformers = pytest.importorskip("transformers", reason="the real backend needs transformers")
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from test_real_backend import MODELS, SHAPES, WORLD, random_table, run_chaos, table_of, tiny_model

from llmsched_gym.engine import Batch, Engine, check
from llmsched_gym.engine.records import FINISHED
from llmsched_gym.real_backend import BackendError, make_backend
from llmsched_gym.real_backend.weights import load_model
from llmsched_gym.scheduler import install, make_scheduler

torch.set_num_threads(1)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


class Injected:
    """A forward pass that fails when told to."""

    def __init__(self, backend, fails):
        self.forward, self.fails, self.count = backend.runner.forward, fails, 0
        backend.runner.forward = self

    def __call__(self, inputs):
        self.count += 1
        tokens = inputs.input_ids.shape[1]
        if self.fails(self.count, tokens):
            self.forward(inputs)  # the cache may be half written when memory runs out
            raise self.error(tokens)
        return self.forward(inputs)

    def error(self, tokens):
        return torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {tokens} MiB.")


class HostInjected(Injected):
    def error(self, tokens):
        return RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")


@pytest.mark.parametrize(
    ("kind", "fails"),
    [
        (Injected, lambda count, tokens: tokens > 20),  # every larger pass, split more than once
        (Injected, lambda count, tokens: count % 3 == 0 and tokens > 1),  # now and then
        (HostInjected, lambda count, tokens: tokens > 40),
    ],
)
def test_out_of_memory_loses_no_request(kind, fails):
    table = random_table()
    backend = make_backend(WORLD, tiny_model(), "cpu")
    run_chaos(backend, table, seed=5, admission="prompt")
    expected = [backend.tokens.answer(r).tolist() for r in range(len(table))]

    injected = kind(backend, fails)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state, _ = run_chaos(backend, table, seed=5, admission="prompt")
    assert (state.requests[0]["phase"][: len(table)] == FINISHED).all()
    assert [backend.tokens.answer(r).tolist() for r in range(len(table))] == expected
    assert backend.num_splits >= 5 and backend.blocks.num_free == backend.num_kv_blocks
    assert injected.count > backend.num_splits
    assert len([w for w in caught if "two passes" in str(w.message)]) == 1, "one warning, not one per batch"


def test_out_of_memory_with_one_token_names_the_request():
    backend = make_backend(WORLD, tiny_model(), "cpu")
    engine = Engine(WORLD, 3, backend=backend)
    engine.reset(table_of([5, 5, 5], [4, 4, 4]))
    engine.submit(Batch({2: 5}))
    engine.execute()
    engine.submit(Batch({2: 1}))
    Injected(backend, lambda count, tokens: True)
    with pytest.raises(BackendError) as error:
        engine.execute()
    assert one_line(error).startswith("request 2: out of memory with a single token")
    backend.check()


def test_other_errors_are_not_taken_for_memory():
    backend = make_backend(WORLD, tiny_model(), "cpu")
    engine = Engine(WORLD, 1, backend=backend)
    engine.reset(table_of([5], [4]))
    engine.submit(Batch({0: 5}))
    injected = Injected(backend, lambda count, tokens: True)
    injected.error = lambda tokens: RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        engine.execute()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_name_the_request(value):
    backend = make_backend(WORLD, tiny_model(), "cpu")
    table = table_of([5, 9, 7], [4, 4, 4])
    engine = Engine(WORLD, 3, backend=backend)
    engine.reset(table)
    forward = backend.runner.forward

    def broken(inputs):
        logits = forward(inputs).clone()
        logits[inputs.emitting.tolist().index(1)] = value
        return logits

    backend.runner.forward = broken
    engine.submit(Batch({0: 5, 1: 9, 2: 7}))
    with pytest.raises(BackendError) as error:
        engine.execute()
    assert one_line(error).startswith("request 1: the model's logits are not finite")


def test_an_episode_after_nan_is_clean():
    """nan in the cache of a dead request would reach others through padding, were it left there."""
    backend = make_backend(WORLD, tiny_model(), "cpu")
    table = table_of([20, 50, 33], [9, 4, 12])
    scheduler = make_scheduler("sarathi[budget=64]")

    def play():
        engine = Engine(WORLD, 3, backend=backend)
        engine.reset(table)
        install(scheduler, engine.state)
        engine.run(scheduler)
        check(engine.state)
        return [backend.tokens.answer(r).tolist() for r in range(3)]

    expected = play()
    weight = backend.loaded.model.model.layers[0].self_attn.v_proj.weight
    kept = weight.detach().clone()
    weight.data[0, 0] = float("nan")
    with pytest.raises(BackendError, match="not finite"):
        play()
    weight.data.copy_(kept)
    assert play() == expected


def test_an_engine_that_counts_wrongly_is_caught():
    backend = make_backend(WORLD, tiny_model(), "cpu")
    engine = Engine(WORLD, 1, backend=backend)
    engine.reset(table_of([30], [4]))
    engine.submit(Batch({0: 10}))
    engine.execute()
    engine.state.requests[0]["num_computed_tokens"][0] = 12
    engine.submit(Batch({0: 5}))
    with pytest.raises(BackendError, match="request 0: 12 tokens count as computed, the cache holds 10"):
        engine.execute()


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def load(name):
    return load_model(str(name), torch.device("cpu"))


def test_a_local_folder_gives_its_weights(folder):
    loaded = load(folder)
    assert torch.equal(loaded.model.lm_head.weight, tiny_model().lm_head.weight)
    assert loaded.spec.num_kv_heads == 2 and loaded.spec.head_dim == 16 and loaded.spec.bytes_per_value == 4
    assert make_backend(WORLD, str(folder), "cpu").measure([(0, 8)], []) > 0.0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"num_key_value_heads": 4},
            r"wrong shape: the checkpoint's .*k_proj.weight is \[32, 64\].* asks for \[64, 64\]",
        ),
        ({"vocab_size": 97}, "wrong shape: the checkpoint's"),
        ({"num_hidden_layers": 3}, r"the checkpoint lacks model.layers.2.* \(9 weights in all\)"),
        ({"num_hidden_layers": 1}, "wrong shape: the checkpoint has model.layers.1"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "position encoding 'dynamic'",
        ),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layers of kind 'chunked_attention'"),
        ({"model_type": "no-such-model"}, "cannot be loaded"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_config(folder, fields, expected, capsys):
    edit_config(folder, **fields)
    with pytest.raises(BackendError, match=expected) as error:
        load(folder)
    assert one_line(error).startswith(f"model '{folder}'")
    out = capsys.readouterr()
    assert "LOAD REPORT" not in out.err + out.out and "Traceback" not in out.err


def test_a_torn_checkpoint(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(BackendError, match="cannot be loaded") as error:
        load(folder)
    one_line(error)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/no/such/folder", "no such folder"),
        ("./nor/this/one", "no such folder"),
        ("random:giant", "expected one of random:mistral-7b, random:tiny"),
    ],
)
def test_a_missing_model(name, expected):
    with pytest.raises(BackendError, match=expected) as error:
        load(name)
    one_line(error)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(BackendError, match=r"no config\.json") as error:
        load(tmp_path)
    one_line(error)


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (
            GatedRepoError,
            "is gated: accept its terms at https://huggingface.co/org/model and log in with `hf auth login`",
        ),
        (RepositoryNotFoundError, "no such folder and no such model on the hub"),
        (LocalEntryNotFoundError, "the hub cannot be reached: name a folder, or use random:mistral-7b"),
    ],
)
def test_the_hub_says_no(monkeypatch, cause, expected):
    def refuse(*args, **kwargs):
        raise OSError("a long story\nover several lines") from cause.__new__(cause)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(BackendError) as error:
        load("org/model")
    assert expected in one_line(error)


def test_weights_of_nan_are_seen_before_anything_runs():
    model = tiny_model()
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(BackendError, match="not finite") as error:
        make_backend(WORLD, model, "cpu")
    one_line(error)


def test_a_model_with_another_attention_is_refused():
    config = transformers.AutoConfig.for_model(
        "gemma2", **{**SHAPES, **MODELS["mistral"], "head_dim": 16, "sliding_window": 16}
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(BackendError, match="softcap") as error:
        make_backend(WORLD, model, "cpu")
    one_line(error)


def test_a_model_shorter_than_the_scenario_is_refused():
    with pytest.raises(BackendError, match=r"max_model_len 512: .* knows 256 positions") as error:
        make_backend(WORLD.replace(max_model_len=512), tiny_model(), "cpu")
    one_line(error)


def test_too_many_blocks_for_the_memory_is_one_line(monkeypatch):
    zeros = torch.zeros

    def refuse(shape, **kwargs):
        if shape[0] > WORLD.num_kv_blocks:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 TB")
        return zeros(shape, **kwargs)

    monkeypatch.setattr("llmsched_gym.real_backend.attention.torch.zeros", refuse)
    with pytest.raises(BackendError) as error:
        make_backend(WORLD, tiny_model(), "cpu")
    one_line(error)


def test_prompts_do_not_depend_on_the_run():
    a, b = (make_backend(WORLD, tiny_model(), "cpu") for _ in range(2))
    for backend in (a, b):
        backend.reset(random_table())
    b.tokens.make_prompts(np.array([7, 2]))
    for r in (2, 7):
        assert np.array_equal(a.tokens.prompt(r), b.tokens.prompt(r))
