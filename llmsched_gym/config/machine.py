"""Shapes of a model and figures of a device, as rooflines, memory and servers' defaults need them."""

from __future__ import annotations

from dataclasses import dataclass

from llmsched_gym.config.fields import plain_fields


@dataclass(frozen=True)
class ModelSpec:
    """Shapes of a decoder-only transformer with grouped-query attention."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    bytes_per_value: int = 2  # bf16

    def __post_init__(self) -> None:
        plain_fields(self)

    @property
    def layer_params(self) -> int:
        """Weights of the linear layers of all transformer blocks."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def head_params(self) -> int:
        """Parameters of the output head."""
        return self.hidden_size * self.vocab_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, input embedding and output head included."""
        return (self.layer_params + 2 * self.head_params) * self.bytes_per_value

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that a token takes in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.bytes_per_value


@dataclass(frozen=True)
class DeviceSpec:
    """One accelerator, or several that share every layer: what a roofline needs to know. Figures are those of all."""

    name: str
    memory_bytes: float
    bandwidth_bytes_s: float
    flops_s: float  # dense bf16
    bandwidth_efficiency: float = 0.8
    flops_efficiency: float = 0.7
    num_devices: int = 1

    def __post_init__(self) -> None:
        plain_fields(self)

    @property
    def each_bytes(self) -> float:
        """Memory of one of the devices, which is what engines go by."""
        return self.memory_bytes / self.num_devices

    @property
    def is_large(self) -> bool:
        """Whether vLLM serves it with large batches: 70 GiB or more and no A100 (0.32, `vllm/engine/arg_utils.py`)."""
        return self.each_bytes >= 70 * 2**30 and "a100" not in self.name.lower()

    @property
    def max_num_seqs(self) -> int:
        """Running requests that an engine allows on it unless told otherwise: vLLM's 1,024 on large devices."""
        return 1024 if self.is_large else 128

    @property
    def vllm_token_budget(self) -> int:
        """Tokens in a batch of vLLM's server on it unless told otherwise (0.32)."""
        if self.each_bytes >= 160 * 2**30:
            return 16_384
        return 8192 if self.is_large else 2048

    @property
    def sglang_chunk_tokens(self) -> int:
        """Prompt tokens in a batch of SGLang's server on it unless told otherwise (0.5.23, `memory_hook.py`)."""
        for gib, tokens in ((20, 2048), (60, 4096), (160, 8192)):
            if self.each_bytes < gib * 2**30:
                return tokens
        return 16_384
