"""What the fluid program says of a machine under a workload."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmsched_gym.fluid.work import Work


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
    mixed_share: float | None = None  # share of decodes beside a prompt chunk; None: additive, it makes no difference

    @property
    def mean_batch_tokens(self) -> float:
        """Mean tokens of a batch."""
        return float(np.dot(self.batch_tokens, self.batch_share))

    @property
    def limited_by(self) -> str:
        """What makes batches smaller than the fastest ones: KV memory, max_num_seqs, or nothing."""
        if max(self.memory_price, self.seqs_price) < 1e-9:
            return "computing"
        return "memory" if self.memory_price >= self.seqs_price else "max_num_seqs"
