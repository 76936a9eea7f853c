"""Which batches a calibration measures: token counts around tiles, contexts, decode counts, and mixtures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmsched_gym.config import BLOCK_SIZE, blocks_needed

FIRST_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28)
"""Batch tokens below the first tile edge."""
EDGE_TOKENS, FINE_TOKENS = 64, 512
"""Token counts are measured around all multiples of the first, and at multiples of half of it up to the second."""
CHUNKS = (16, 64, 256, 512, 2048)
CONTEXTS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
DECODES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
HYBRID_DECODES, HYBRID_CONTEXTS = (8, 16, 32, 64, 128), (64, 512, 1024, 2048, 4096)
HYBRID_CHUNKS = ((0, 64), (0, 256), (0, 512), (2048, 512), (0, 1920))


@dataclass(frozen=True)
class Composition:
    """One batch: prefill chunks as (computed, n) tokens, decodes as context lengths, the new token included."""

    chunks: tuple[tuple[int, int], ...] = ()
    decodes: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(n for _, n in self.chunks) + len(self.decodes)

    @property
    def num_seqs(self) -> int:
        return len(self.chunks) + len(self.decodes)

    def num_blocks(self, block_size: int = BLOCK_SIZE) -> int:
        """KV blocks that its sequences hold."""
        lengths = (*(c + n for c, n in self.chunks), *self.decodes)
        return sum(blocks_needed(length, block_size) for length in lengths)


@dataclass(frozen=True)
class Limits:
    """The largest batches that are measured."""

    max_tokens: int = 2048
    max_context: int = 8192  # tokens of one sequence
    max_seqs: int = 128
    mixtures: int = 160  # random batches of chunks and decodes

    def __post_init__(self) -> None:
        for name, low in (("max_tokens", 2), ("max_context", BLOCK_SIZE), ("max_seqs", 2), ("mixtures", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected a whole number >= {low}, got {getattr(self, name)}")

    def allow(self, batch: Composition, num_blocks: int, block_size: int = BLOCK_SIZE) -> bool:
        longest = max([c + n for c, n in batch.chunks] + list(batch.decodes))
        return (
            batch.num_tokens <= self.max_tokens
            and longest <= self.max_context
            and batch.num_seqs <= self.max_seqs
            and batch.num_blocks(block_size) <= num_blocks
        )


def plan(limits: Limits, num_blocks: int, seed: int = 0, block_size: int = BLOCK_SIZE) -> list[Composition]:
    """Different batches within the limits and a cache of `num_blocks`, in random order, so that a slow drift of the
    machine does not look like an effect of their size."""
    rng = np.random.default_rng(seed)
    batches = [*_token_counts(limits), *_contexts(limits), *_decodes(limits), *_hybrids(limits)]
    num_tokens = num_blocks * block_size
    batches += [_mixture(limits, num_tokens, rng) for _ in range(limits.mixtures)]
    allowed = list(dict.fromkeys(batch for batch in batches if limits.allow(batch, num_blocks, block_size)))
    return [allowed[i] for i in rng.permutation(len(allowed))]


def _token_counts(limits: Limits) -> list[Composition]:
    """Whole prompts; those longer than a sequence can be are cut into equal ones."""
    counts = {*FIRST_COUNTS, limits.max_tokens, *range(EDGE_TOKENS // 2, FINE_TOKENS + 1, EDGE_TOKENS // 2)}
    for edge in range(EDGE_TOKENS, limits.max_tokens + 1, EDGE_TOKENS):
        counts |= {edge - 1, edge, edge + 1}
    batches = []
    for count in sorted(counts):
        parts = -(-count // limits.max_context)
        batches.append(Composition(tuple((0, (count + i) // parts) for i in range(parts))))
    return batches


def _contexts(limits: Limits) -> list[Composition]:
    """One chunk behind a context."""
    behind = [c for c in CONTEXTS if c < limits.max_context]
    return [
        Composition(((min(c, limits.max_context - n), n),))
        for n in CHUNKS
        for c in [*behind, limits.max_context]
        if n < limits.max_context
    ]


def _decodes(limits: Limits) -> list[Composition]:
    """Decodes of equal contexts."""
    lengths = {*(c for c in CONTEXTS if c <= limits.max_context), limits.max_context}
    counts = {*(d for d in DECODES if d <= limits.max_seqs), limits.max_seqs}
    return [Composition(decodes=(length,) * count) for length in sorted(lengths) for count in sorted(counts)]


def _hybrids(limits: Limits) -> list[Composition]:
    """Equal decodes beside a chunk: together what the others measure alone."""
    decodes = [n for n in HYBRID_DECODES if n < limits.max_seqs]
    contexts = [c for c in HYBRID_CONTEXTS if c <= limits.max_context]
    return [Composition((chunk,), (c,) * n) for n in decodes for c in contexts for chunk in HYBRID_CHUNKS]


def _mixture(limits: Limits, num_tokens: int, rng: np.random.Generator) -> Composition:
    """Decodes of different contexts and one to three chunks, as they meet in a running system."""
    decodes = int(np.exp(rng.uniform(0.0, np.log(min(limits.max_seqs - 1, limits.max_tokens - 1)))))
    typical = min(limits.max_context, num_tokens / (2 * decodes)) * rng.uniform(0.1, 0.9)
    lengths = np.clip(typical * np.exp(0.6 * rng.standard_normal(decodes)), 1, limits.max_context).astype(int)
    parts = int(rng.integers(1, min(3, limits.max_seqs - decodes) + 1))
    total = int(np.exp(rng.uniform(np.log(parts), np.log(limits.max_tokens - decodes + 1))))
    chunks = []
    for part in range(parts):
        n = min(max(total // parts + (part < total % parts), 1), limits.max_context)
        computed = int(rng.integers(0, limits.max_context - n + 1)) if rng.random() < 0.5 else 0
        chunks.append((computed, n))
    return Composition(tuple(chunks), tuple(lengths.tolist()))
