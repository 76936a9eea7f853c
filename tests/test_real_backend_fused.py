"""The fused forward pass against the model's own modules, under triton's interpreter on a CPU, compiled on a GPU."""

import copy

import pytest

# ruff: noqa: E402 - a missing torch or triton is to skip these tests before anything imports it
torch = pytest.importorskip("torch", reason="the real backend needs torch")
pytest.importorskip("transformers", reason="the real backend needs transformers")
pytest.importorskip("triton", reason="the fused kernels need triton")
from test_real_backend import WORLD, generated, random_table, run_chaos, tiny_model

from llmsched_gym.real_backend import fused_kernels as kernels
from llmsched_gym.real_backend import make_backend
from llmsched_gym.real_backend.fused import fits

torch.set_num_threads(1)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EQUAL = {"rtol": 0.0, "atol": 0.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_residual_are_the_modules(dtype):
    torch.manual_seed(0)
    hidden, residual = (torch.randn(5, 96, device=DEVICE).to(dtype) for _ in range(2))
    weight = torch.randn(96, device=DEVICE).to(dtype)
    total = hidden + residual
    wide = total.float()
    expected = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
    found = kernels.add_norm(hidden, residual, weight, 1e-5)
    torch.testing.assert_close(found, expected)
    # triton's interpreter cuts bfloat16 off where GPUs round
    torch.testing.assert_close(residual, total, **({"rtol": 0.01, "atol": 0.0} if DEVICE.type == "cpu" else EQUAL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_mul_is_the_modules(dtype):
    torch.manual_seed(1)
    gate_up = torch.randn(3, 2 * 1500, device=DEVICE).to(dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    torch.testing.assert_close(kernels.silu_mul(gate_up), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("name", ["mistral", "llama", "qwen2", "qwen2, one layer with a window"])
def test_tokens_through_fused_kernels_equal_generate(name):
    model = tiny_model(name)
    alone = copy.deepcopy(model)
    backend = make_backend(WORLD, model, str(DEVICE), attention="triton", graphs=True)
    assert backend.runner.fused is not None and "fused kernels" in backend.setup
    table = random_table(3)
    run_chaos(backend, table, seed=5, admission="chunk")
    for r in range(len(table)):
        expected = generated(alone, backend.tokens.prompt(r), int(table.output_tokens[r]))
        assert backend.tokens.answer(r).tolist() == expected


def test_joined_weights_are_still_the_models_own():
    model = tiny_model("mistral")
    before = copy.deepcopy(model.state_dict())
    make_backend(WORLD, model, str(DEVICE), attention="triton")
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.untyped_storage().data_ptr() == attention.v_proj.weight.untyped_storage().data_ptr()


def test_a_pass_that_differs_from_the_modules_is_not_used(monkeypatch):
    monkeypatch.setattr(kernels, "silu_mul", lambda gate_up: gate_up[:, : gate_up.shape[1] // 2].contiguous())
    with pytest.warns(UserWarning, match="fused kernels are .* off the model's modules"):
        backend = make_backend(WORLD, tiny_model("mistral"), str(DEVICE), attention="triton")
    assert backend.runner.fused is None


def test_other_models_run_through_their_modules():
    model = tiny_model("mistral")
    model.config.hidden_act = "gelu"
    assert not fits(model)
