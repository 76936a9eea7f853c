"""What a workload needs, as means over its requests, whoever schedules."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from llmsched_gym.config import Scenario, blocks_needed
from llmsched_gym.workload.generate import arrival_kind, trace_of
from llmsched_gym.workload.lengths import load_lengths
from llmsched_gym.workload.mixture import load_sessions
from llmsched_gym.workload.sessions import DrawsSessions, Sessions, SessionStream
from llmsched_gym.workload.traces import Trace, cached_trace

LATTICE = 1 << 18
"""Points at which a fitted length distribution is evaluated."""


SESSIONS = 20_000
"""Sessions that stand for their distribution."""


@dataclass(frozen=True)
class Work:
    """Means per arrival, a request or a session: what must be done for it, whoever schedules.

    Rejected requests need nothing. With prefix caching whatever was there before is found cached, as if memory were
    infinite: no machine hits more.
    """

    prefill_tokens: float
    decode_tokens: float  # output - 1: the pass that completes the prompt emits the first token
    pairs: float  # query-key pairs of the prefill; the same for every way to cut a prompt into chunks
    kv_tokens: float  # KV read: by every decode its context, by the prefill at least the prompt once
    held_blocks: float  # KV blocks held, summed over the batches that the request must take part in
    batches: float  # batches that the request must take part in
    decode_blocks: float = 0.0  # of held_blocks, those that its decodes hold
    prefill_kv_tokens: float = 0.0  # of kv_tokens, those that the prefill reads
    own_pairs: float = 0.0  # of pairs, those with tokens that are computed, not found cached

    @property
    def tokens(self) -> float:
        """Tokens a request, prompt and decodes together."""
        return self.prefill_tokens + self.decode_tokens


def scenario_work(scenario: Scenario, num_blocks: int) -> Work:
    """What an arrival of the scenario needs on a machine of so many KV blocks."""
    trace = trace_of(scenario)
    if trace is not None and trace.shares is not None:
        return _trace_work(scenario, trace, num_blocks)
    model = None if trace is not None else load_sessions(scenario.workload)
    if model is None:
        return mean_work(*lengths(scenario), scenario, num_blocks)
    drawn = _drawn(model, scenario.max_model_len)
    prompt, known = drawn.prompt_tokens, drawn.prompt_tokens - drawn.new_tokens
    if not scenario.prefix_caching:
        return mean_work(prompt, drawn.output_tokens, scenario, num_blocks, num_arrivals=len(drawn))
    size = scenario.block_size
    cached = np.minimum(known, prompt - 1) // size * size
    system = np.repeat(drawn.prefix_tokens, drawn.num_turns) // size * size
    system = np.minimum(system, cached)
    return mean_work(prompt, drawn.output_tokens, scenario, num_blocks, cached, system, num_arrivals=len(drawn))


def _trace_work(scenario: Scenario, trace: Trace, num_blocks: int) -> Work:
    """Of a trace that says what its prompts have in common; where clients wait for answers, of a session."""
    waits = trace.parent is not None
    num_arrivals = int((trace.parent < 0).sum()) if trace.parent is not None else None
    prompt, cached = trace.prompt_tokens, np.zeros(len(trace))
    if trace.shares is not None and scenario.prefix_caching and (waits or arrival_kind(scenario, trace) == "trace"):
        cached = np.minimum(trace.shares[1], prompt - 1) // scenario.block_size * scenario.block_size
    # the file does not say who else holds the blocks that rows have in common; a session's are its own
    common = 0.0 if waits else cached
    return mean_work(prompt, trace.output_tokens, scenario, num_blocks, cached, common, num_arrivals)


@functools.lru_cache(maxsize=4)
def _drawn(model: DrawsSessions, max_model_len: int) -> Sessions:
    """Sessions that stand for those of a model."""
    return SessionStream(model, np.random.default_rng(0), max_model_len).first(SESSIONS)


def lengths(scenario: Scenario) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and output tokens that stand for the scenario's distribution: all rows of a trace, or a lattice."""
    if scenario.trace is not None:
        trace = cached_trace(scenario.trace, scenario.trace_invalid)
        return trace.prompt_tokens, trace.output_tokens
    i = np.arange(LATTICE)
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    return load_lengths(scenario.workload).draw(np.stack([(i + 0.5) / LATTICE, i * golden % 1.0], axis=1))


def mean_work(
    prompt: np.ndarray,
    output: np.ndarray,
    scenario: Scenario,
    num_blocks: int,
    cached: np.ndarray | float = 0.0,
    common: np.ndarray | float = 0.0,
    num_arrivals: int | None = None,
) -> Work:
    """Means over requests of the given lengths; those that rule 7 rejects count as arrivals without work.

    Args:
        prompt, output: tokens; shape (n,).
        scenario: the engine's limits.
        num_blocks: KV blocks of the machine.
        cached: prompt tokens that need not be computed, whole blocks; shape (n,).
        common: of these, those whose blocks others hold as well, so that they take no memory; shape (n,).
        num_arrivals: what the means are over; None: the requests, fewer where an arrival is a session of several.
    """
    p, d, size = np.asarray(prompt, float), np.asarray(output, float), scenario.block_size
    c = np.asarray(cached, float)
    arrivals = len(p) if num_arrivals is None else num_arrivals
    total = p + d
    watermark = int(scenario.watermark * num_blocks)
    served = (total <= scenario.max_model_len) & (blocks_needed(total, size) + watermark <= num_blocks)

    def mean(values: np.ndarray) -> float:
        return float(np.where(served, values, 0.0).sum() / arrivals)

    def blocks_up_to(n: np.ndarray) -> np.ndarray:
        """Sum of ceil(i / size) for i = 1..n."""
        whole, rest = np.divmod(n, size)
        return size * whole * (whole + 1) / 2 + rest * (whole + 1)

    decodes = d - 1.0
    decode_blocks = blocks_up_to(p + decodes) - blocks_up_to(p)
    return Work(
        prefill_tokens=mean(p - c),
        decode_tokens=mean(decodes),
        pairs=mean(p * (p + 1) / 2 - c * (c + 1) / 2),
        # decode j of D - 1 computes token P + j and reads as many
        kv_tokens=mean(p + decodes * p + decodes * d / 2),
        held_blocks=mean(blocks_needed(p, size) + decode_blocks - d * np.asarray(common) / size),
        batches=mean(d),
        decode_blocks=mean(decode_blocks - decodes * np.asarray(common) / size),
        prefill_kv_tokens=mean(p),
        own_pairs=mean((p - c) * (p - c + 1) / 2),
    )


def mean_cost_factor(scenario: Scenario) -> float:
    """Mean of the factor on batch times: cost scale, log-normal jitter, stragglers (rule 13)."""
    scale = float(np.mean(scenario.cost_scale))
    stragglers = 1.0 + scenario.straggler_share * (scenario.straggler_factor - 1.0)
    return scale * math.exp(scenario.jitter**2 / 2) * stragglers
