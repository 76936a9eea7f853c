"""The surface of attention from whole measured batches: what is left of their time beside the linear layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmsched_gym.cost import fit_table
from llmsched_gym.cost.fit_surface import octaves, pairs, rising
from llmsched_gym.cost.profile import Profile, ProfileError
from llmsched_gym.cost.surface import Sums, Surface, nested

if TYPE_CHECKING:
    from llmsched_gym.cost.measured_batches import Batch


PULL = 0.15
"""How much the additive model counts beside the batches: a sweep has few of them for each figure of a surface."""


def with_surface(base: Profile, batches: Sequence[Batch]) -> Profile:
    """`base`, an additive fit, with a surface fitted to what its linear layers leave of the batches' time.

    Chunks and decodes alone are corrections of what `base` says of them; decodes beside a chunk start from so many
    times what they cost alone, the same number everywhere. Decodes count by their mean context, errors relative to the
    time of the whole batch; chunks alone have a say where there is one in the batch. Raises :class:`ProfileError` if
    there are no decodes alone, or no hybrid batches of several numbers of decodes, contexts and chunks.
    """
    c = np.array([sum(size for _, size in batch.chunks) for batch in batches], float)
    p = np.array([batch.chunks[0][0] if batch.chunks else 0 for batch in batches], float)
    n = np.array([len(batch.decode_contexts) for batch in batches], float)
    k = np.array([sum(batch.decode_contexts) for batch in batches]) / np.maximum(n, 1.0)
    total = np.array([batch.ms for batch in batches])
    left = total - base.overhead_ms - np.array([base.linear.at(batch.num_tokens) for batch in batches])
    alone, both = c == 0, (c > 0) & (n > 0)
    lone = np.array([len(batch.chunks) == 1 for batch in batches]) & (n == 0)
    for axis, name in ((n, "numbers of decodes"), (k, "contexts"), (c, "chunks")):
        if len(np.unique(axis[both])) < 2:
            raise ProfileError(f"measurements: a surface needs hybrid batches of several {name}")
    if not alone.any() or not lone.any():
        raise ProfileError("measurements: a surface needs batches of decodes alone, and of one chunk alone")

    sequences, context, chunk = octaves(n, first=1), octaves(k), octaves(c)
    prefix = (0, *octaves(np.append(p, (1.0, 2.0))))
    rest = left[lone] - base.pair_ms * pairs(c[lone], p[lone])
    guess = base.kv_ms * np.add.outer(np.array(chunk, float), np.array(prefix, float))
    chunk_ms = fit_table.fit((chunk, prefix), (c[lone], p[lone]), rest, total[lone], guess=guess, pull=PULL)
    guess = base.kv_ms * np.outer(sequences, context)
    at = (n[alone], k[alone])
    decode_ms = rising(fit_table.fit((sequences, context), at, left[alone], total[alone], guess=guess, pull=PULL), 0, 1)
    surface = Surface(
        sequences=sequences,
        context=context,
        chunk=chunk,
        prefix=prefix,
        decode_ms=nested(decode_ms),
        chunk_ms=nested(chunk_ms),
        hybrid_ms=nested(np.zeros((len(chunk), *decode_ms.shape))),
        floor_ms=(0.0,) * len(context),
        launch_ms=max(float(chunk_ms[0, 0]), 0.0),
    )

    chunks = [batch.chunks for batch, hybrid in zip(batches, both, strict=True) if hybrid]
    beside = np.array([surface.ms(Sums(0, 0.0, 0.0, 1, each), base.pair_ms) for each in chunks])
    together = (c[both], n[both], k[both])
    above = left[both] - np.maximum(beside, 0.0)
    expected = fit_table.weights((sequences, context), together[1:]) @ decode_ms.ravel()
    known = expected > 0.0
    factor = max(float(np.median(above[known] / expected[known])), 0.0) if known.any() else 1.0
    guess = np.broadcast_to(factor * decode_ms, (len(chunk), *decode_ms.shape))
    hybrid_ms = fit_table.fit((chunk, sequences, context), together, above, total[both], guess=guess, pull=PULL)
    surface = dataclasses.replace(surface, hybrid_ms=nested(rising(hybrid_ms, 1, 2)))
    return dataclasses.replace(base, surface=surface.rounded())
