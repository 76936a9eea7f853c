"""What a workload needs, as means over its requests, whoever schedules."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np

from llmsched_gym.config import Scenario
from llmsched_gym.workload.generate import arrival_kind, make_table, trace_of
from llmsched_gym.workload.lengths import load_lengths
from llmsched_gym.workload.sessions import load_sessions
from llmsched_gym.workload.traces import TraceWarning

LATTICE = 1 << 18
"""Points at which a fitted length distribution is evaluated."""
SESSION_TURNS = 1 << 16
"""Turns that stand for a workload of sessions."""


@dataclass(frozen=True)
class Work:
    """Means per arrival of a request, or of a session: what must be done, whoever schedules.

    Rejected requests need nothing.
    """

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


def work_of(scenario: Scenario, num_blocks: int) -> Work:
    """Means per arrival of the scenario, of a session where requests come in sessions.

    With prefix caching every token that an earlier request had in the same place is found, in full blocks.
    """
    trace = trace_of(scenario)
    waits = trace is not None and trace.think_s is not None
    if waits or (trace is None and load_sessions(scenario.workload) is not None):
        return _session_work(scenario, SESSION_TURNS if trace is None else len(trace), num_blocks)
    if trace is None:
        return mean_work(*_lattice(scenario.workload), scenario, num_blocks)
    kept = arrival_kind(scenario, trace) == "trace"
    shared = trace.shares[1] if trace.shares is not None and kept else None
    return mean_work(trace.prompt_tokens, trace.output_tokens, scenario, num_blocks, shared, shared)


def _session_work(scenario: Scenario, num_requests: int, num_blocks: int) -> Work:
    """From so many turns of whole sessions; of what is found, others hold the system prompts alone."""
    whole = {"num_requests": num_requests, "warmup_s": 0.0, "arrivals_continue": False, "qps": 1.0}
    kept = {} if scenario.trace is None else {"trace_arrivals": "keep"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TraceWarning)
        table = make_table(scenario.replace(**whole, **kept), 0)
    others = np.where(table.is_root, table.identity()[1], 0) if table.prefix_tokens is None else table.prefix_tokens
    lengths = table.prompt_tokens, table.output_tokens
    num_sessions = int(table.is_root.sum())
    return mean_work(*lengths, scenario, num_blocks, table.identity()[1], others, num_sessions)


def _lattice(workload: str) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and output tokens that stand for a fitted distribution."""
    i = np.arange(LATTICE)
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    return load_lengths(workload).draw(np.stack([(i + 0.5) / LATTICE, i * golden % 1.0], axis=1))


def mean_work(
    prompt: np.ndarray,
    output: np.ndarray,
    scenario: Scenario,
    num_blocks: int,
    shared: np.ndarray | None = None,
    held_by_others: np.ndarray | None = None,
    num_arrivals: int | None = None,
) -> Work:
    """Means over requests of the given lengths; those that rule 7 rejects count as arrivals without work.

    With prefix caching nobody computes the first `shared` tokens of a prompt, in full blocks and without its last
    token, and of these nobody holds blocks for the first `held_by_others` alone. Means are over `num_arrivals`, of
    requests unless given.
    """
    p, d, size = np.asarray(prompt, float), np.asarray(output, float), scenario.block_size
    total = p + d
    watermark = int(scenario.watermark * num_blocks)
    served = (total <= scenario.max_model_len) & (np.ceil(total / size) + watermark <= num_blocks)

    def found(tokens: np.ndarray | None) -> np.ndarray:
        if tokens is None or not scenario.prefix_caching:
            return np.zeros_like(p)
        return np.asarray(np.minimum(tokens, p - 1.0) // size * size)

    cached, elsewhere = found(shared), found(held_by_others)

    def mean(values: np.ndarray) -> float:
        return float(np.where(served, values, 0.0).sum() / (num_arrivals or len(values)))

    def blocks_up_to(n: np.ndarray) -> np.ndarray:
        """Sum of ceil(i / size) for i = 1..n."""
        whole, rest = np.divmod(n, size)
        return size * whole * (whole + 1) / 2 + rest * (whole + 1)

    decodes = d - 1.0
    decode_blocks = blocks_up_to(p + decodes) - blocks_up_to(p)
    return Work(
        prefill_tokens=mean(p - cached),
        decode_tokens=mean(decodes),
        pairs=mean((p * (p + 1) - cached * (cached + 1)) / 2),
        # decode j of D - 1 computes token P + j and reads as many
        kv_tokens=mean(p - cached + decodes * p + decodes * d / 2),
        held_blocks=mean(np.ceil(p / size) - elsewhere / size + decode_blocks),
        batches=mean(d),
        decode_blocks=mean(decode_blocks),
    )


def mean_cost_factor(scenario: Scenario) -> float:
    """Mean of the factor on batch times: cost scale, log-normal jitter, stragglers (rule 13)."""
    scale = float(np.mean(scenario.cost_scale))
    stragglers = 1.0 + scenario.straggler_share * (scenario.straggler_factor - 1.0)
    return scale * math.exp(scenario.jitter**2 / 2) * stragglers
