"""On-time: promise as many prompts as can be kept, and put decodes off only for a promise's sake.

Ours, from two classics: Moore's algorithm says which prompts can all be on time (see `llmsched_gym.engine.promise`),
and as in least-laxity scheduling (Dertouzos and Mok, IEEE TSE 1989) what has slack waits: every decode runs in every
batch unless a promised prompt would then be late. Prompts that cannot be on time wait until the engine is quiet.
Predictions are corrected by how much longer than predicted batches have taken lately.
"""

import math

from llmsched_gym.engine.batch import open_batch, set_cap
from llmsched_gym.engine.jit import entry, kernel
from llmsched_gym.engine.pack import EDF, FEASIBLE, HOLD_ALWAYS, fill
from llmsched_gym.engine.promise import NONE_DROPPED, STRETCH, promise
from llmsched_gym.engine.state import lane_of
from llmsched_gym.engine.step import LATEST_LST
from llmsched_gym.scheduler import Compiled

RESERVE_S = 0.3  # a promise with less slack is at risk; chosen on selection seeds of the drift suite, as `quiet` is


@kernel()
def plan(lane):
    """Set the cap, order, limit, margin and hold of the open batch."""
    batch, knobs = lane.batch, lane.knobs
    set_cap(lane, knobs.cap / lane.sim.cost_ratio)
    promised, _, slack_s, _, shortest_dropped = promise(lane, knobs.stretch)
    # by deadline while all can be on time, else (or with nobody in time) shortest first without those that cannot
    batch.order = EDF if promised > 0 and shortest_dropped == NONE_DROPPED else FEASIBLE
    batch.limit = min(knobs.limit, shortest_dropped - 1)
    batch.margin = knobs.margin if slack_s < RESERVE_S else math.nan
    if knobs.hold and lane.sim.num_running > knobs.quiet:
        batch.hold = HOLD_ALWAYS


def on_time(lane):
    """Plan, then pack."""
    open_batch(lane)
    plan(lane)
    fill(lane)


@entry()
def plan_env(s, env):
    """Plan the batch that comes next in environment `env`, without forming it."""
    lane = lane_of(s, env)
    open_batch(lane)
    plan(lane)


SCHEDULERS = {
    "on-time": Compiled(
        "the most prompts that can all make their TTFT SLO (Moore 1968); decodes are put off only for their sake",
        on_time,
        {
            "token_budget": 768,
            "cap": 0.8,
            "margin": 3.0,
            "hold": 1,
            "quiet": 60,
            "stretch": STRETCH,
            "victim": LATEST_LST,
        },
        options=("margin", "quiet", "stretch", "refuse"),
        plan=plan_env,
    ),
}
