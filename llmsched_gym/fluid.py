"""The fluid capacity: a rate of arrivals that no scheduler sustains more than, as a small linear program.

Derivation, assumptions and what the bound leaves out: docs/theory.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from llmsched_gym.config import Scenario
from llmsched_gym.cost import Profile, load_profile
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

    @property
    def tokens(self) -> float:
        return self.prefill_tokens + self.decode_tokens


@dataclass(frozen=True)
class Fluid:
    """The solution of the linear program."""

    qps: float  # the capacity, requests per second
    batch_tokens: tuple[int, ...]  # sizes of the optimal batches
    batch_share: tuple[float, ...]  # share of the batches that have each size
    batches_per_s: float
    decodes_per_batch: float
    linear_share: float  # share of time in linear layers and overhead; the rest is attention
    memory_price: float  # relative gain in capacity per relative gain in KV blocks
    seqs_price: float  # likewise for max_num_seqs
    work: Work

    @property
    def mean_batch_tokens(self) -> float:
        return float(np.dot(self.batch_tokens, self.batch_share))

    @property
    def limited_by(self) -> str:
        """What makes batches smaller than the fastest ones: KV memory, max_num_seqs, or nothing."""
        if max(self.memory_price, self.seqs_price) < 1e-9:
            return "computing"
        return "memory" if self.memory_price >= self.seqs_price else "max_num_seqs"


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
    return Work(
        prefill_tokens=mean(p),
        decode_tokens=mean(decodes),
        pairs=mean(p * (p + 1) / 2),
        # decode j of D - 1 computes token P + j and reads as many
        kv_tokens=mean(p + decodes * p + decodes * d / 2),
        held_blocks=mean(np.ceil(p / size) + blocks_up_to(p + decodes) - blocks_up_to(p)),
        batches=mean(d),
    )


def fluid_capacity(scenario: Scenario, profile: Profile | None = None) -> Fluid:
    """The largest rate that the profile, the workload and the engine's limits allow in the long run.

    Unknowns are the rate and how many batches of N tokens run per second, for every N up to the limit, so whole tiles
    and everything between them are among them. A profile other than the scenario's may be given.
    """
    from scipy.optimize import linprog

    profile = profile or load_profile(scenario.profile)
    blocks = scenario.blocks(profile.num_kv_blocks)
    work = mean_work(*lengths(scenario), scenario, blocks)
    attention_s = profile.pair_s * work.pairs + profile.kv_s * work.kv_tokens
    scale = mean_cost_factor(scenario)
    size = np.arange(1, scenario.max_num_batched_tokens + 1)
    linear_s = profile.linear_table_s(scenario.max_num_batched_tokens)[1:]

    # variables: rate, then batches per second of each size; costs in seconds per second
    time = np.concatenate([[scale * attention_s], scale * linear_s])
    ones = np.ones(len(size))
    memory = np.concatenate([[work.held_blocks / blocks], -ones])
    seqs = np.concatenate([[work.batches / (scenario.max_num_seqs or profile.device.max_num_seqs)], -ones])
    tokens = np.concatenate([[work.tokens], -size])
    found = linprog(
        c=np.concatenate([[-1.0], 0.0 * ones]),
        A_ub=np.stack([time, memory, seqs]),
        b_ub=[1.0, 0.0, 0.0],
        A_eq=tokens[None, :],
        b_eq=[0.0],
        method="highs",
    )
    if found.status != 0:
        raise ValueError(f"fluid capacity: {found.message}")
    qps, rates = float(found.x[0]), found.x[1:]
    used = np.flatnonzero(rates > 1e-9 * rates.sum())
    batches_per_s = float(rates.sum())
    # a constraint's right-hand side is rate * need / limit: its price per relative change of the limit
    prices = [max(0.0, -float(m)) * batches_per_s / qps for m in found.ineqlin.marginals[1:]]
    return Fluid(
        qps=qps,
        batch_tokens=tuple(int(n) for n in size[used]),
        batch_share=tuple(float(r) for r in rates[used] / batches_per_s),
        batches_per_s=batches_per_s,
        decodes_per_batch=qps * work.decode_tokens / batches_per_s,
        linear_share=1.0 - scale * attention_s * qps,
        memory_price=prices[0],
        seqs_price=prices[1],
        work=work,
    )


def mean_cost_factor(scenario: Scenario) -> float:
    """Mean of the factor on batch times: cost scale, log-normal jitter, stragglers (rule 13)."""
    scale = float(np.mean(scenario.cost_scale))
    stragglers = 1.0 + scenario.straggler_share * (scenario.straggler_factor - 1.0)
    return scale * math.exp(scenario.jitter**2 / 2) * stragglers
