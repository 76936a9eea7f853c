"""The program where decodes cost more beside a prompt chunk than alone: over what a batch is composed of.

A composition is n decodes and c prompt tokens. All decodes read the workload's mean context, and chunks lie behind the
mean prefix that pieces of their size have, so that the query-key pairs of all prompts add up to exactly what they do.
Chunks are no longer than the prompt around a prompt token is on average: longer stretches of tokens are several.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmsched_gym.config import Scenario
from llmsched_gym.cost import Profile
from llmsched_gym.cost.surface import Surface
from llmsched_gym.fluid.solution import Fluid
from llmsched_gym.fluid.work import Work, mean_cost_factor

PER_OCTAVE = 8  # numbers of decodes
FEW = 16  # up to so many decodes every number is tried
STEPS = ((8, 512), (32, 2048), (128, 1 << 62))  # batch sizes: multiples of the first up to the second
NUDGE = 1e-3  # relative change of a limit, for its price


@dataclass(frozen=True)
class Compositions:
    """What the program may choose from, with the time of each."""

    decodes: np.ndarray  # (num,) may be fractions: the mean of two batches
    chunk_tokens: np.ndarray  # (num,)
    linear_s: np.ndarray  # (num,) overhead, linear layers, output head, what a batch with a chunk costs more
    attention_s: np.ndarray  # (num,)

    @property
    def seconds(self) -> np.ndarray:
        """Time of a batch of each composition, of the shape of the compositions."""
        return self.linear_s + self.attention_s


def by_composition(
    scenario: Scenario, profile: Profile, work: Work, blocks: int, *, exclusive: bool = False, priced: bool = True
) -> Fluid:
    """The largest rate on a profile with a surface; `exclusive` allows only batches of one phase.

    Without `priced` the prices of memory and sequences, which take two more programs, are 0.
    """
    if profile.surface is None:
        raise ValueError(f"fluid capacity: expected a profile with a surface, got {profile.name}")
    seqs = scenario.max_num_seqs or profile.device.max_num_seqs
    scale = mean_cost_factor(scenario)
    found = compositions(profile, work, blocks, seqs, scenario.max_num_batched_tokens, exclusive)
    qps, rates = solve(found, work, blocks, seqs, scale)
    sizes = np.rint(found.decodes + found.chunk_tokens).astype(int)
    batches_per_s, decodes_per_s = float(rates.sum()), float(rates @ found.decodes)
    used = [int(n) for n in np.unique(sizes[rates > 1e-9 * batches_per_s])]
    beside = float(rates[found.chunk_tokens > 0] @ found.decodes[found.chunk_tokens > 0])
    prices = [0.0, 0.0]
    if priced:
        for i, limits in enumerate(((blocks * (1 + NUDGE), seqs), (blocks, seqs * (1 + NUDGE)))):
            more = compositions(profile, work, *limits, scenario.max_num_batched_tokens, exclusive)
            gain = solve(more, work, *limits, scale)[0] / qps - 1
            prices[i] = gain / NUDGE if gain > 1e-3 * NUDGE else 0.0
    return Fluid(
        qps=qps,
        batch_tokens=tuple(used),
        batch_share=tuple(float(rates[sizes == n].sum() / batches_per_s) for n in used),
        batches_per_s=batches_per_s,
        decodes_per_batch=decodes_per_s / batches_per_s,
        linear_share=float(rates @ found.linear_s / (rates @ found.seconds)),
        memory_price=prices[0],
        seqs_price=prices[1],
        work=work,
        mixed_share=beside / decodes_per_s if decodes_per_s > 0 else 0.0,
    )


def solve(found: Compositions, work: Work, blocks: float, seqs: float, scale: float) -> tuple[float, np.ndarray]:
    """The largest rate, 1/s, and how many batches of each composition run per second, (num,)."""
    from scipy.optimize import linprog

    served = work.batches - work.decode_tokens  # share of the arrivals: one batch each for its prompt at least
    with_chunk = found.chunk_tokens > 0
    held = work.decode_blocks / max(work.decode_tokens, 1e-12)  # blocks of a decode
    ones = np.ones(len(with_chunk))
    rows = [
        (0.0, scale * found.seconds),  # a second has a second
        (work.held_blocks / blocks, -ones),  # no batch holds more than all blocks ...
        (work.batches / seqs, -ones),  # ... or more than so many requests
        # and prompts share those with the decodes beside them
        (work.held_blocks - work.decode_blocks, with_chunk * (held * found.decodes - blocks)),
        (served, with_chunk * (found.decodes - seqs)),
    ]
    result: Any = linprog(
        c=np.concatenate([[-1.0], 0.0 * ones]),
        A_ub=np.stack([np.concatenate([[rate], batches]) for rate, batches in rows]),
        b_ub=[1.0, *(0.0 for _ in rows[1:])],
        A_eq=np.stack(
            [
                np.concatenate([[work.decode_tokens], -found.decodes]),
                np.concatenate([[work.prefill_tokens], -found.chunk_tokens]),
            ]
        ),
        b_eq=[0.0, 0.0],
        method="highs",
    )
    if result.status != 0:
        raise ValueError(f"fluid capacity: {result.message}")
    return float(result.x[0]), np.asarray(result.x[1:])


def compositions(
    profile: Profile, work: Work, blocks: float, seqs: float, max_tokens: int, exclusive: bool
) -> Compositions:
    """Decodes up to what memory and sequences allow at the mean context, in batches of up to the limit."""
    held = work.decode_blocks / work.decode_tokens if work.decode_tokens > 0 else math.inf
    counts = numbers_of_decodes(min(seqs, blocks / held, float(max_tokens)))
    sizes = batch_sizes(max_tokens, profile.tile_tokens)
    beside = np.array([0.0]) if exclusive else np.concatenate([[0.0], counts])
    n, size = (x.ravel() for x in np.meshgrid(beside, sizes.astype(float), indexing="ij"))
    n, size = n[size - n >= 1.0], size[size - n >= 1.0]
    decodes, chunk = np.concatenate([counts, n]), np.concatenate([0.0 * counts, size - n])
    linear_s = np.interp(decodes + chunk, np.arange(max_tokens + 1), profile.linear_table_s(max_tokens))
    head_s, attention_s = attention(profile, work, decodes, chunk)
    return Compositions(decodes, chunk, linear_s + head_s, attention_s)


def attention(
    profile: Profile, work: Work, decodes: np.ndarray, chunk_tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of output head and eager launches, and of attention, of compositions; each (num,).

    What the longest of unequal contexts takes more is left out, in the scheduler's favour.
    """
    surface = profile.surface
    assert surface is not None
    context = (work.kv_tokens - work.prefill_kv_tokens) / max(work.decode_tokens, 1e-12)
    prefill_tokens = max(work.prefill_tokens, 1e-12)
    pairs = work.pairs / prefill_tokens  # of a prompt token, on average
    longest = max(2 * work.own_pairs / prefill_tokens - 1, 1.0)  # tokens computed around a prompt token
    has_chunk, has_decodes = chunk_tokens > 0, decodes > 0
    parts = np.maximum(chunk_tokens / longest, 1.0)
    each = np.maximum(chunk_tokens, 1.0) / parts
    behind = np.maximum(pairs - (each + 1) / 2, 0.0)
    chunk_ms = table_at(surface.chunk_ms, (surface.chunk, surface.prefix), (each, behind))
    chunks_ms = surface.launch_ms + parts * (chunk_ms - surface.launch_ms) + profile.pair_ms * pairs * chunk_tokens
    alone_ms = table_at(surface.decode_ms, (surface.sequences, surface.context), (decodes, context))
    axes = (surface.chunk, surface.sequences, surface.context)
    # past the last chunk a table of measurements can go on downwards, which is no gain that anybody has
    measured = np.minimum(chunk_tokens, surface.chunk[-1])
    hybrid_ms = [table_at(surface.hybrid_ms, axes, (c, decodes, context)) for c in (chunk_tokens, measured)]
    together_ms = np.maximum(chunks_ms, surface.floor_at(context)) + np.maximum(*hybrid_ms)
    ms = np.where(has_chunk, np.where(has_decodes, together_ms, chunks_ms), alone_ms)
    head_ms = sequences_ms(surface, decodes + has_chunk * parts) + has_chunk * surface.chunk_batch_ms
    return head_ms / 1e3, ms / 1e3


def sequences_ms(surface: Surface, count: np.ndarray) -> np.ndarray:
    """Output head and sampler of so many sequences, which may be fractions."""
    most = math.ceil(float(count.max(initial=1.0)))
    table = [surface.sequence_at(n) for n in range(1, most + 1)]
    return np.interp(count, np.arange(1, most + 1), table)


def table_at(table: Any, knots: tuple[tuple[int, ...], ...], at: tuple[Any, ...]) -> np.ndarray:
    """The surface's interpolation for arrays: multilinear, constant below the first knots, going on past the last."""
    from scipy.interpolate import RegularGridInterpolator

    points = np.broadcast_arrays(*(np.maximum(x, first[0]) for x, first in zip(at, knots, strict=True)))
    interpolate = RegularGridInterpolator(knots, np.array(table), bounds_error=False, fill_value=None)
    return np.asarray(interpolate(np.stack(points, axis=-1).astype(float)))


def numbers_of_decodes(most: float) -> np.ndarray:
    """Every number up to `FEW`, then `PER_OCTAVE` an octave, and `most` itself; empty below one."""
    if most < 1.0:
        return np.zeros(0)
    few = np.arange(1.0, min(FEW, math.floor(most)) + 1)
    octaves = math.log2(max(most / FEW, 1.0))
    more = FEW * 2.0 ** (np.arange(1, math.floor(PER_OCTAVE * octaves) + 1) / PER_OCTAVE)
    return np.unique(np.minimum(np.concatenate([few, np.rint(more), [most]]), most))


def batch_sizes(max_tokens: int, tile: int) -> np.ndarray:
    """Tokens of batches with a chunk: `STEPS`, whole tiles and the limit."""
    sizes = [np.arange(tile, max_tokens + 1, tile), np.array([1, max_tokens])]
    low = 0
    for step, high in STEPS:
        sizes.append(np.arange(low + step, min(high, max_tokens) + 1, step))
        low = high
    return np.unique(np.concatenate(sizes))
