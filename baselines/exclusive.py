"""Batches of one phase only, as seen by SLOs: for experiments on the price of mixing, so not in the registry.

Named as ``llmsched_gym.baselines.exclusive:EXCLUSIVE``. A batch of prompts takes at most `cap` of the smallest TBT SLO
and makes its decodes critical (`margin * cap` above `1 - cap`), so that the two kinds take turns at the pace of the
strictest user; with nobody strict there, batches of prompts are longer, as the cap always allows.
"""

from llmsched_gym.engine.batch import open_batch
from llmsched_gym.engine.pack import (
    FEASIBLE,
    add_critical_decodes,
    add_deferred_decodes,
    add_prompts,
    keep_going,
    margin_in_s,
)
from llmsched_gym.scheduler import Compiled


def exclusive(lane):
    """All decodes once one of them is critical, else prompts, else all decodes."""
    open_batch(lane)
    margin_s = margin_in_s(lane)
    add_critical_decodes(lane, margin_s)
    if lane.batch.num_items == 0:
        add_prompts(lane, lane.batch.order)
        if lane.batch.num_items > 0:
            return
    add_deferred_decodes(lane, margin_s)
    keep_going(lane)


EXCLUSIVE = Compiled(
    "decodes alone once one is critical, else prompts alone that leave time for them",
    exclusive,
    {"order": FEASIBLE, "hold": 1, "cap": 0.4, "margin": 2.0, "token_budget": 8192},
    options=("order", "margin"),
)
