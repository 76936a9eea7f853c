"""Where blocks lie, for backends that have a cache: with prefix caching their blocks are the engine's places."""

from __future__ import annotations

import numpy as np

from llmsched_gym.config import blocks_needed
from llmsched_gym.engine.blocks import NUM_COLUMNS, OWNER, POSITION
from llmsched_gym.engine.records import NONE
from llmsched_gym.engine.state import State


def places_of(state: State, k: int, requests: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
    """Places of the blocks of the first `num_tokens` (num,) of running `requests` (num,) of lane `k`.

    int32, shape (num, most blocks of one), NONE behind a request's last.
    """
    sim = state.sims[k]
    needed = blocks_needed(num_tokens, sim.block_size)
    most = int(needed.max(initial=0))
    # the lists lie behind the table of identities, see `blocks.listed`
    lists = state.blocks[k].reshape(-1)[(int(sim.table_mask) + 1) * NUM_COLUMNS :]
    positions = np.arange(most)
    at = state.prefixes[k]["row"][requests][:, None] * int(sim.row_blocks) + positions
    held = positions < needed[:, None]
    return np.where(held, lists[np.where(held, at, 0)], np.int32(NONE))


def cached_blocks(state: State, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Owner of the last token, position and place of all blocks that can be found, each int32 (num,)."""
    blocks = state.blocks[k, : state.sims[k].total_blocks]
    place = np.flatnonzero(blocks[:, OWNER] != NONE).astype(np.int32)
    return blocks[place, OWNER], blocks[place, POSITION], place
