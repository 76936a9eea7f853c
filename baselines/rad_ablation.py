"""RAD without one of its principles, or with both, or off the tile: for experiments, so not in the registry.

Named as ``llmsched_gym.baselines.rad_ablation:FIXED_SPLIT``.
"""

from llmsched_gym.baselines.rad import form_batch
from llmsched_gym.engine.pack import FCFS
from llmsched_gym.scheduler import Compiled

OFF_TILE_TOKENS = 8


def untiled(lane):
    """As many tokens as there is work for, whatever the tile."""
    form_batch(lane, 1, False, True)


def fixed_split(lane):
    """Half of each batch belongs to prompts and half to decodes, used or not."""
    form_batch(lane, int(lane.coef_s[2]), True, False)


def untiled_fixed_split(lane):
    """Neither principle."""
    form_batch(lane, 1, False, False)


def off_tile(lane):
    """Batches of k * (T + 8) tokens: RAD that is wrong about the tile by a little."""
    form_batch(lane, int(lane.coef_s[2]) + OFF_TILE_TOKENS, True, True)


def _variants(what, function, budget=512):
    settings = {"order": FCFS}
    return tuple(Compiled(what, function, {**settings, "token_budget": n}) for n in (8192, budget))


UNTILED, UNTILED_512 = _variants("RAD without tiling", untiled)
FIXED_SPLIT, FIXED_SPLIT_512 = _variants("RAD with half of each batch for prompts and half for decodes", fixed_split)
NEITHER, NEITHER_512 = _variants("RAD with neither principle", untiled_fixed_split)
# 544 tokens hold 2 * (256 + 8) and 4 * (128 + 8)
OFF_TILE, OFF_TILE_512 = _variants(f"RAD for a tile {OFF_TILE_TOKENS} tokens too large", off_tile, 544)
