"""On-time: promise as many prompts as can be kept, and put decodes off only for a promise's sake.

Ours, from two classics: Moore's algorithm says which prompts can all be on time (see `llmsched_gym.engine.promise`),
and as in least-laxity scheduling (Dertouzos and Mok, IEEE TSE 1989) what has slack waits: every decode runs in every
batch unless a promised prompt would then be late. Prompts that cannot be on time wait until the engine is quiet, or,
with `age`, have what the promised leave, and a share before them once they have waited so long. Predictions are
corrected by how much longer than predicted batches have taken lately.

With prefix caching they also wait while running requests fill much of the KV cache: what a late prompt takes are the
contexts of sessions that are on time, whose next turns are late then, too, and so on until nothing is cached.

Where the KV cache is short (it holds fewer than `short` requests of the longest length, the concurrency that vLLM
prints when it starts), they wait likewise: a late prompt takes what those on time need. And while as much is in use and
every promise has slack, batches are small: decodes come by faster, end sooner, and give their blocks back.

Where the profile knows that decodes cost more beside a prompt (`mix=auto`), time decides: if the decodes and the
prompts at hand take longer in one batch than in one each, decodes are put off while anything is promised, and prompts
get a batch of their own, as long as the cap allows.
"""

import math

from llmsched_gym.engine.aging import add_late, grow_chunk, oldest_late
from llmsched_gym.engine.batch import open_batch, set_cap
from llmsched_gym.engine.handles import unpack
from llmsched_gym.engine.jit import entry, kernel
from llmsched_gym.engine.mixing import price_of_mixing
from llmsched_gym.engine.pack import (
    EDF,
    FCFS,
    FEASIBLE,
    HOLD_ALWAYS,
    add_critical_decodes,
    add_deferred_decodes,
    add_prompts,
    fill,
    keep_going,
    margin_in_s,
    refuse_hopeless,
)
from llmsched_gym.engine.promise import NONE_DROPPED, STRETCH, promise
from llmsched_gym.engine.state import lane_of
from llmsched_gym.engine.step import LATEST_LST
from llmsched_gym.scheduler import Compiled, Own, not_negative, positive, positive_int

MIXES = ("together", "auto")
"""Whether decodes and prompts share a batch: always; or where one batch takes no longer than two."""
AUTO = MIXES.index("auto")

OWN = (
    Own("quiet", 60, positive_int, "whole number of running requests >= 1"),  # with so few, nobody need wait
    Own("stretch", STRETCH, positive, "factor on predicted prefill times, > 0"),
    Own("age", math.inf, not_negative, "seconds since arrival >= 0, inf for no aging"),  # from then on, a share
    Own("mix", AUTO, MIXES.index, f"one of {', '.join(MIXES)}"),
    # where the cache is short, or with prefix caching: with more in use they wait
    Own("usage", 0.45, not_negative, "share of the KV cache, >= 0"),
    Own("short", 20, not_negative, "number of requests of the longest length, >= 0"),  # a short cache holds fewer
)
QUIET, STRETCHED, AGE, MIX, USAGE, SHORT = range(len(OWN))
RESERVE_S = 0.3  # a promise with less slack is at risk; chosen on selection seeds of the drift suite, as `quiet` is
# Of a short KV cache, chosen on the tight suite, seeds 2000-2007, 1 request/s.
SMALL_BATCH = 256  # tokens
SPARE_S = 0.6  # the slack of every promise from which on batches are small
# Of aging, chosen on the paper suite, seeds 2000-2019, 1.8 requests/s.
AGED_SHARE = 0.4  # of the room behind urgent decodes, for prompts that have waited longer than `age`
AGED_STRETCH = 5.0  # while there are any, as much less is promised: the longest are dropped before they take room
AGED_USAGE = 0.95  # with the KV cache so full decodes are not put off: late prompts are long, and blocks run out


@kernel()
def holds_few(sim, requests):
    """Whether the KV cache holds fewer than so many requests of the longest length."""
    return float(sim.total_blocks) * sim.block_size < requests * sim.max_model_len


@kernel()
def plan(lane):
    """Set the cap, order, limit, margin, hold and room for tokens of the open batch."""
    batch, knobs = lane.batch, lane.knobs
    set_cap(lane, knobs.cap / lane.sim.cost_ratio)
    ages = knobs.own[AGE] < math.inf
    stretch = knobs.own[STRETCHED]
    if ages and oldest_late(lane, knobs.own[AGE]) >= 0:
        stretch *= AGED_STRETCH
    promised, _, slack_s, _, shortest_dropped = promise(lane, stretch)
    # by deadline while all can be on time, else (or with nobody in time) shortest first without those that cannot
    batch.order = EDF if promised > 0 and shortest_dropped == NONE_DROPPED else FEASIBLE
    if ages and promised == 0 and shortest_dropped == NONE_DROPPED:
        batch.order = FCFS
    batch.limit = min(knobs.limit, shortest_dropped - 1)
    apart = knobs.own[MIX] == AUTO and promised > 0 and price_of_mixing(lane, batch.token_room) > 1.0
    if apart:
        batch.token_room = lane.sim.max_num_batched_tokens
    batch.margin = knobs.margin if apart or slack_s < RESERVE_S else math.nan
    if ages and lane.sim.kv_cache_usage > AGED_USAGE:
        batch.margin = math.nan
    is_short = not lane.sim.prefix_caching and holds_few(lane.sim, knobs.own[SHORT])
    is_full = (lane.sim.prefix_caching or is_short) and lane.sim.kv_cache_usage > knobs.own[USAGE]
    if is_short and is_full and slack_s > SPARE_S and not apart:
        batch.token_room = min(batch.token_room, SMALL_BATCH)
    if knobs.hold and (ages or is_full or lane.sim.num_running > knobs.own[QUIET]):
        batch.hold = HOLD_ALWAYS


@kernel()
def fill_aging(lane):
    """As `pack.fill`, with late prompts by age: those due before the promised ones, the others behind them."""
    batch, margin_s = lane.batch, margin_in_s(lane)
    add_critical_decodes(lane, margin_s)
    if lane.knobs.refuse and lane.sim.allow_refusal:
        refuse_hopeless(lane)
    before = batch.num_items
    add_late(lane, lane.knobs.own[AGE], AGED_SHARE)
    last = batch.num_items - 1
    add_prompts(lane, batch.order)
    if last >= before:
        grow_chunk(lane, last)  # its share may have cut it short
    add_late(lane, 0.0, 1.0)
    add_deferred_decodes(lane, margin_s)
    keep_going(lane)


def on_time(lane):
    """Plan, then pack."""
    open_batch(lane)
    plan(lane)
    if lane.knobs.own[AGE] < math.inf:
        fill_aging(lane)
    else:
        fill(lane)


@entry()
def plan_env(s, env):
    """Plan the batch that comes next in environment `env`, without forming it."""
    lane = lane_of(unpack(s), env)
    open_batch(lane)
    plan(lane)


SCHEDULERS = {
    "on-time": Compiled(
        "the most prompts that can all make their TTFT SLO (Moore 1968); decodes are put off only for their sake",
        on_time,
        {"token_budget": 768, "cap": 0.8, "margin": 3.0, "hold": 1, "victim": LATEST_LST},
        options=("margin", "refuse"),
        own=OWN,
        plan=plan_env,
    ),
}
