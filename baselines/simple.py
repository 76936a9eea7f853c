"""Schedulers from first principles: earliest deadline, capped shortest-remaining, feasible first, random."""

import numpy as np

from llmsched_gym.config import blocks_needed
from llmsched_gym.engine.batch import (
    add_chunk,
    add_decode,
    can_admit,
    chunk_room,
    decode_fits,
    insert_sorted,
    is_prefill,
    open_batch,
)
from llmsched_gym.engine.due import next_due_s
from llmsched_gym.engine.pack import EDF, FEASIBLE, SRPT, admission_filters, keep_going, next_waiting
from llmsched_gym.engine.step import LATEST_LST
from llmsched_gym.engine.view import Batch, View
from llmsched_gym.scheduler import Compiled


def edf(lane):
    """Earliest deadline first over prompts and decodes alike (Liu and Layland, JACM 1973), 512 tokens."""
    open_batch(lane)
    batch, requests, scratch = lane.batch, lane.requests, lane.scratch
    for i in range(lane.sim.num_running):
        r = lane.running[i]
        insert_sorted(lane, i, r, next_due_s(requests[r]))
    hold, limit = admission_filters(lane)
    waiting = next_waiting(lane, EDF, hold, limit)
    i = 0
    for _ in range(lane.sim.num_running + lane.sim.max_num_seqs):
        if batch.token_room <= 0 or (i >= lane.sim.num_running and waiting < 0):
            break
        running_first = waiting < 0
        if i < lane.sim.num_running and not running_first:
            running_first = next_due_s(requests[scratch[i]]) <= next_due_s(requests[waiting])
        if running_first:
            r = scratch[i]
            i += 1
            if not is_prefill(requests[r]):
                if decode_fits(lane, r) or batch.num_items == 0:
                    add_decode(lane, r)
            elif chunk_room(lane, r) > 0:
                add_chunk(lane, r, chunk_room(lane, r))
            continue
        n = chunk_room(lane, waiting)
        if n > 0 and can_admit(lane, waiting, n):
            add_chunk(lane, waiting, n)
            waiting = next_waiting(lane, EDF, hold, limit)
        else:
            waiting = -1
    keep_going(lane)


CAPPED = {"cap": 0.95, "margin": 2.0, "victim": LATEST_LST}


class RandomScheduler:
    """A random legal batch: each runnable request takes part with probability 1/2, prompts get a random chunk."""

    what = "a random legal batch, from the seed's own generator"

    def __init__(self, budget: str = "512") -> None:
        self.budget = int(budget)
        self.rng = np.random.default_rng(0)

    def reset(self, seed: int) -> None:
        self.rng = np.random.default_rng([seed, 7])

    def schedule(self, view: View) -> Batch:
        """Visit running and waiting requests in random order while tokens, sequences and blocks last."""
        tokens: dict[int, int] = {}
        room = min(self.budget, view.max_num_batched_tokens)
        slots = view.max_num_seqs - len(view.running)
        free = view.free_blocks - view.watermark_blocks
        stuck = False
        candidates = [(r, False) for r in view.running] + [(r, True) for r in view.waiting]
        for i in self.rng.permutation(len(candidates)):
            request, is_waiting = candidates[i]
            if room <= 0 or self.rng.random() < 0.5:
                continue
            left = int(request.prefill_tokens - request.num_computed_tokens)
            n = int(self.rng.integers(1, min(left, room) + 1)) if left > 0 else 1
            if is_waiting:
                blocks = blocks_needed(int(request.prefill_tokens), view.block_size)
                if slots <= 0 or blocks > free:
                    continue
                slots -= 1
                free -= blocks
            else:
                held = blocks_needed(int(request.num_computed_tokens + n), view.block_size)
                blocks = max(0, held - int(request.num_blocks))
                if left > 0 and blocks > free:  # with blocks by chunk; for a decode the engine evicts
                    stuck = True
                    continue
                free -= blocks
            tokens[int(request.index)] = n
            room -= n
        if stuck and not tokens:
            return Batch(preempt=[int(view.running[-1].index)])
        return Batch(tokens)


SCHEDULERS = {
    "edf": Compiled("earliest deadline first over prompts and decodes, 512 tokens", edf, {"order": EDF}),
    "srpt-capped": Compiled(
        "shortest remaining prompt first, deferred decodes, predicted batch time up to 0.95 of the tightest TBT SLO",
        settings={"order": SRPT, "token_budget": 8192, **CAPPED},
    ),
    "feasible-first": Compiled(
        "srpt-capped, prompts that can still make their TTFT SLO before those that cannot",
        settings={"order": FEASIBLE, "token_budget": 8192, **CAPPED},
    ),
    "random": RandomScheduler,
}
