"""A model of random weights in a folder, as vLLM loads it: small, and of outputs that depend on every token before."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

TINY = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,  # vLLM's attention on CPUs has no smaller one
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SCALE = 0.25  # of uniform weights; with small ones greedy outputs repeat two tokens, whatever is computed


def write_tiny_model(folder: str | Path, seed: int = 0, max_model_len: int = 8192, scale: float = SCALE) -> Path:
    """Write config and weights of a two-layer Mistral to `folder`, which is made; returns it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**TINY, "max_position_embeddings": max_model_len}
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    assert isinstance(hidden, int) and isinstance(inner, int) and isinstance(vocab, int)
    heads, kv = hidden, hidden // 2

    def uniform(*shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=generator) * 2 - 1) * scale

    weights = {"model.embed_tokens.weight": uniform(vocab, hidden), "lm_head.weight": uniform(vocab, hidden)}
    weights["model.norm.weight"] = torch.ones(hidden)
    for i in range(int(str(config["num_hidden_layers"]))):
        at = f"model.layers.{i}"
        weights[f"{at}.input_layernorm.weight"] = torch.ones(hidden)
        weights[f"{at}.post_attention_layernorm.weight"] = torch.ones(hidden)
        for name, rows in (("q", heads), ("k", kv), ("v", kv), ("o", hidden)):
            weights[f"{at}.self_attn.{name}_proj.weight"] = uniform(rows, hidden)
        weights[f"{at}.mlp.gate_proj.weight"] = uniform(inner, hidden)
        weights[f"{at}.mlp.up_proj.weight"] = uniform(inner, hidden)
        weights[f"{at}.mlp.down_proj.weight"] = uniform(hidden, inner)
    save_file(weights, str(folder / "model.safetensors"), {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder
