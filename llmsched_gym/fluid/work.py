"""What a workload needs, as means over its requests, whoever schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from llmsched_gym.config import Scenario
from llmsched_gym.workload.lengths import load_lengths
from llmsched_gym.workload.traces import cached_trace

LATTICE = 1 << 18
"""Points at which a fitted length distribution is evaluated."""


@dataclass(frozen=True)
class Work:
    """Means per arriving request: what must be done for it, whoever schedules. Rejected requests need nothing."""

    prefill_tokens: float
    decode_tokens: float  # output - 1: the pass that completes the prompt emits the first token
    pairs: float  # query-key pairs of the prefill; the same for every way to cut a prompt into chunks
    kv_tokens: float  # KV read: by every decode its context, by the prefill at least the prompt once
    held_blocks: float  # KV blocks held, summed over the batches that the request must take part in
    batches: float  # batches that the request must take part in
    decode_blocks: float = 0.0  # of held_blocks, those that its decodes hold

    @property
    def tokens(self) -> float:
        """Tokens a request, prompt and decodes together."""
        return self.prefill_tokens + self.decode_tokens


def lengths(scenario: Scenario) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and output tokens that stand for the scenario's distribution: all rows of a trace, or a lattice."""
    if scenario.trace is not None:
        trace = cached_trace(scenario.trace, scenario.trace_invalid)
        return trace.prompt_tokens, trace.output_tokens
    i = np.arange(LATTICE)
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    return load_lengths(scenario.workload).draw(np.stack([(i + 0.5) / LATTICE, i * golden % 1.0], axis=1))


def mean_work(prompt: np.ndarray, output: np.ndarray, scenario: Scenario, num_blocks: int) -> Work:
    """Means over requests of the given lengths; those that rule 7 rejects count as arrivals without work."""
    p, d, size = np.asarray(prompt, float), np.asarray(output, float), scenario.block_size
    total = p + d
    watermark = int(scenario.watermark * num_blocks)
    served = (total <= scenario.max_model_len) & (np.ceil(total / size) + watermark <= num_blocks)

    def mean(values: np.ndarray) -> float:
        return float(np.where(served, values, 0.0).mean())

    def blocks_up_to(n: np.ndarray) -> np.ndarray:
        """Sum of ceil(i / size) for i = 1..n."""
        whole, rest = np.divmod(n, size)
        return size * whole * (whole + 1) / 2 + rest * (whole + 1)

    decodes = d - 1.0
    decode_blocks = blocks_up_to(p + decodes) - blocks_up_to(p)
    return Work(
        prefill_tokens=mean(p),
        decode_tokens=mean(decodes),
        pairs=mean(p * (p + 1) / 2),
        # decode j of D - 1 computes token P + j and reads as many
        kv_tokens=mean(p + decodes * p + decodes * d / 2),
        held_blocks=mean(np.ceil(p / size) + decode_blocks),
        batches=mean(d),
        decode_blocks=mean(decode_blocks),
    )


def mean_cost_factor(scenario: Scenario) -> float:
    """Mean of the factor on batch times: cost scale, log-normal jitter, stragglers (rule 13)."""
    scale = float(np.mean(scenario.cost_scale))
    stragglers = 1.0 + scenario.straggler_share * (scenario.straggler_factor - 1.0)
    return scale * math.exp(scenario.jitter**2 / 2) * stragglers
