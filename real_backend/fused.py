"""A decoder's forward pass in ten launches a layer instead of forty: the model's own weights, fused kernels between.

transformers' modules compute the same; what is saved is launches. On a fast GPU a 7B model's decode step is shorter
than the host's time to launch its modules' kernels one by one, and in a recorded graph each small kernel still costs
some microseconds. Projections that read the same input are one product: their weights are laid side by side, and the
model's own parameters become views of them, so that nothing is held twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from llmsched_gym.real_backend import fused_kernels as kernels
from llmsched_gym.real_backend.paged_attention import attend

if TYPE_CHECKING:
    from llmsched_gym.real_backend.runner import Inputs
    from llmsched_gym.real_backend.weights import LoadedModel

MODEL_TYPES = ("llama", "mistral", "qwen2")
"""Decoders of RMS norms, rotary positions, grouped attention and a gated SiLU; others run through their own modules."""


@dataclass
class _Linear:
    """One or more of the model's projections as one product."""

    weight: torch.Tensor  # (outputs, inputs)
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass
class _Layer:
    input_norm: torch.Tensor
    qkv: _Linear
    scale: float
    window: int | None
    output: _Linear
    mlp_norm: torch.Tensor
    gate_up: _Linear
    down: _Linear


def fits(model: Any) -> bool:
    """Whether the model is one whose layers are computed here as its own modules would."""
    config = model.config
    return config.model_type in MODEL_TYPES and config.hidden_act == "silu"


class FusedModel:
    """The forward pass of a model that `fits`, for batches that are laid out for the paged kernel.

    Args:
        loaded: its projections' parameters become views of joined weights.
        max_positions: positions that sequences may have.
    """

    def __init__(self, loaded: LoadedModel, max_positions: int) -> None:
        model: Any = loaded.model
        config, decoder = model.config, model.model
        spec = loaded.spec
        self._heads, self._head_dim = spec.num_heads, spec.head_dim
        self._eps = config.rms_norm_eps
        self._embedding, self._norm = decoder.embed_tokens.weight, decoder.norm.weight
        self._head = _Linear(model.lm_head.weight, model.lm_head.bias)
        with torch.inference_mode():
            positions = torch.arange(max_positions, device=loaded.device)[None]
            cos, sin = decoder.rotary_emb(self._embedding[:1], positions)
        self._cos, self._sin = cos[0].contiguous(), sin[0].contiguous()  # (max_positions, head_dim)
        shared_window = config.sliding_window if config.model_type == "mistral" else None
        self._layers = []
        for layer in decoder.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self._layers.append(
                _Layer(
                    input_norm=layer.input_layernorm.weight,
                    qkv=_join(attention.q_proj, attention.k_proj, attention.v_proj),
                    scale=attention.scaling,
                    window=getattr(attention, "sliding_window", shared_window),
                    output=_join(attention.o_proj),
                    mlp_norm=layer.post_attention_layernorm.weight,
                    gate_up=_join(mlp.gate_proj, mlp.up_proj),
                    down=_join(mlp.down_proj),
                )
            )

    def forward(self, inputs: Inputs) -> torch.Tensor:
        """Logits of the emitting rows, (num_emitting, vocab)."""
        segments, positions = inputs.segments, inputs.position_ids[0]
        assert segments.paged is not None
        residual = F.embedding(inputs.input_ids[0], self._embedding)
        num_tokens, attended = len(residual), self._heads * self._head_dim
        out = residual.new_empty((num_tokens, self._heads, self._head_dim))
        hidden = kernels.add_norm(residual, None, self._layers[0].input_norm, self._eps)
        following = [*(layer.input_norm for layer in self._layers[1:]), self._norm]
        for index, (layer, next_norm) in enumerate(zip(self._layers, following, strict=True)):
            keys, values = segments.cache.layer(index)
            qkv = layer.qkv(hidden)
            kernels.rotate_and_store(qkv, positions, segments.slots, self._cos, self._sin, keys, values)
            query = qkv[:, :attended].view(num_tokens, self._heads, self._head_dim)
            attend(query, keys, values, out, segments.paged, layer.scale, layer.window)
            hidden = layer.output(out.view(num_tokens, attended))
            hidden = kernels.add_norm(hidden, residual, layer.mlp_norm, self._eps)
            hidden = layer.down(kernels.silu_mul(layer.gate_up(hidden)))
            hidden = kernels.add_norm(hidden, residual, next_norm, self._eps)
        return self._head(hidden[inputs.last_rows])


def _join(*linears: Any) -> _Linear:
    """The projections as one; each keeps its part as a view."""
    if len(linears) == 1:
        return _Linear(linears[0].weight, linears[0].bias)
    with torch.inference_mode(False), torch.no_grad():
        weight = torch.cat([linear.weight for linear in linears])
        bias = None
        if linears[0].bias is not None:
            bias = torch.cat([linear.bias for linear in linears])
        start = 0
        for linear in linears:
            rows = slice(start, start + linear.out_features)
            linear.weight.data = weight[rows]
            if bias is not None:
                linear.bias.data = bias[rows]
            start = rows.stop
    return _Linear(weight, bias)
