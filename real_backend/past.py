"""What a prefix cache holds when an episode begins: which passes compute it. Without torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from llmsched_gym.config import BLOCK_SIZE
from llmsched_gym.real_backend.errors import BackendError


class Chain(NamedTuple):
    """Blocks of one request, those from `start` on to be computed behind the others."""

    request: int
    start: int  # blocks
    places: list[int]  # of all blocks, from the first on


def chains(
    request: np.ndarray, position: np.ndarray, place: np.ndarray, owner: Callable[[int, int], int]
) -> Iterator[Chain]:
    """Cached blocks in an order in which each can be computed behind those before it; each place comes once.

    Args:
        request, position, place: (num_blocks,), the block at `position` of `request`, whose last token is its own.
            Those with whom a request shares come before it; its cached blocks begin with its first one.
        owner: whose own token stands at a position (tokens) of a request.
    """
    places: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for r, i, at in zip(request.tolist(), position.tolist(), place.tolist(), strict=True):
        places[r, i].append(at)
    done: set[tuple[int, int]] = set()
    for r, most in sorted({r: i + 1 for r, i in sorted(places)}.items()):
        blocks = [(owner(r, (i + 1) * BLOCK_SIZE - 1), i) for i in range(most)]
        missing = next((block for block in blocks if block not in places), None)
        if missing is not None:
            raise BackendError(f"block {most - 1} of request {r} is cached, and block {missing[1]} before it is not")
        own = [places[block][0] for block in blocks]
        start = next(i for i, block in enumerate(blocks) if block not in done)
        yield Chain(r, start, own)
        for i in range(start, most):
            yield from (Chain(r, i, [*own[:i], other]) for other in places[blocks[i]][1:])
        done.update(blocks)
